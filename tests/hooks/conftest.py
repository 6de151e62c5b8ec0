"""What the tests of hooks share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from qemu_userns.hooks.bundle import build_bundle
from tests.systems import build_system

if TYPE_CHECKING:
    from pathlib import Path


_build_once = functools.cache(build_bundle)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a system that has LXD, Incus and one QEMU. The bundle is built once: that is most of what a hook takes."""
    monkeypatch.setattr("qemu_userns.hooks.install.build_bundle", _build_once)
    return build_system(tmp_path / "system")
