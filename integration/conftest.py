"""The marks and fixtures of tests/, and a check that no test leaves anything on the host."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from integration.leftovers import host_state, sweep_unheld_leases
from integration.plugged import compared
from integration.shares import launches
from tests.conftest import (
    dropin_folder,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    same_process,
    shared_tmp,
    unprivileged_user,
)
from tests.machine import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from integration.leftovers import HostState
    from integration.plugged import Compare
    from integration.shares import Launch

__all__ = [
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
    "same_process",
    "shared_tmp",
    "unprivileged_user",
]

GRACE_S = 5 * PATIENCE


@pytest.fixture(scope="session", autouse=True)
def clean_session() -> Iterator[None]:
    """Fail the last test if what tests share has left something."""
    before = host_state()
    yield
    assert_as_before(before)


@pytest.fixture(autouse=True)
def clean_host(shared_tmp: Path) -> Iterator[None]:
    """Fail a test after which a process, a mount or a run-time file is left.

    It depends on `shared_tmp` so that it looks before that folder is removed.
    """
    before = host_state()
    yield
    assert_as_before(before)


def assert_as_before(before: HostState) -> None:
    """Check that nothing is left on the host; the supervisor may need a moment to go."""
    end = time.monotonic() + GRACE_S
    sweep_unheld_leases()
    while (left := host_state().added_since(before)) and time.monotonic() < end:
        time.sleep(0.05)
        sweep_unheld_leases()
    assert not left, "left on the host:\n" + "\n".join(left)


@pytest.fixture(scope="module", params=launches(), ids=str)
def launch(request: pytest.FixtureRequest) -> Launch:
    """Each way that the tester has to start the drop-in."""
    found: Launch = request.param
    return found


@pytest.fixture
def compare(launch: Launch, shared_tmp: Path) -> Compare:
    """Have a dialogue with plain QEMU and with the drop-in's."""
    return lambda dialogue, *options, **more: compared(shared_tmp, launch, dialogue, *options, **more)


@pytest.fixture
def dropin() -> list[str]:
    """The drop-in for qemu-system-x86_64, as words of a command line; mark the test `dropin`."""
    return [str(dropin_folder() / "qemu-system-x86_64")]
