"""AppArmor in the test host: a caller that has a profile keeps it, and a profile that forbids a step stops the launch."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.talk import DEADLINE_S, IDLE, running, supervisor_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    *(pytest.mark.host, pytest.mark.root),
    *(pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin),
]

NAME = "qemu-userns-test"
RULES = ("capability", "file", "network", "unix", "signal", "ptrace", "mount", "remount", "umount", "pivot_root")
# Known to the parser from 4.0 on, and enforced from then on.
USERNS = ("userns",) if Path("/etc/apparmor.d/abi/4.0").exists() else ()


@pytest.fixture
def caller(request: pytest.FixtureRequest, tmp_path: Path, dropin: list[str]) -> Iterator[list[str]]:
    """The drop-in, started by a caller who has a profile with all rules but one."""
    rules = " ".join(f"{rule}," for rule in (*RULES, *USERNS) if rule != request.param)
    file = tmp_path / "profile"
    file.write_text(f"profile {NAME} flags=(attach_disconnected, mediate_deleted) {{ {rules} }}\n")
    subprocess.run(["apparmor_parser", "--replace", "--skip-cache", file], check=True)
    try:
        yield ["aa-exec", "-p", NAME, "--", *dropin]
    finally:
        subprocess.run(["apparmor_parser", "--remove", file], check=True)


def label_of(pid: int) -> str:
    """Return a process's profile and its mode."""
    return Path(f"/proc/{pid}/attr/apparmor/current").read_text().strip()


@pytest.mark.parametrize("caller", [None], indirect=True)
def test_a_profile_is_kept(caller: list[str]) -> None:
    with running(caller) as vm:
        assert label_of(vm.pid) == label_of(supervisor_of(vm.pid)) == f"{NAME} (enforce)"
        assert vm.quit() == 0


@pytest.mark.parametrize("caller", ["mount", "umount", "pivot_root", "capability"], indirect=True)
def test_a_step_that_it_forbids_stops_the_launch(caller: list[str]) -> None:
    done = refused(caller)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-userns: cannot "), done.stderr
    assert f"its profile {NAME} lacks `" in done.stderr, done.stderr
    assert "Permission denied" in done.stderr or "Operation not permitted" in done.stderr, done.stderr


@pytest.mark.parametrize("caller", ["mount", *USERNS], indirect=True)
def test_the_first_step_names_the_profile_and_what_it_lacks(caller: list[str]) -> None:
    error, _, hint = refused(caller).stderr.splitlines()
    assert error == "qemu-userns: cannot make a user namespace: Permission denied"
    assert f"its profile {NAME} lacks `userns, capability sys_admin, mount,`" in hint


def refused(caller: list[str]) -> subprocess.CompletedProcess[str]:
    words = [*caller, *IDLE, "-monitor", "none"]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
