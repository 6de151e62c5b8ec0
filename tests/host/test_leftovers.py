"""Files of a launch, and whether they are still its own."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.leftovers import is_stale
from qemu_userns.host.realpath import Parent

if TYPE_CHECKING:
    from pathlib import Path


def stale(path: Path) -> bool:
    with Parent(str(path)) as parent:
        return is_stale(parent)


def test_a_socket_is_stale_once_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        assert not stale(path)
    assert stale(path)


def test_a_busy_socket_is_served_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen(0)
        client.connect(str(path))  # takes the one place there is
        assert not stale(path)


def test_what_is_no_socket_is_not_stale(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
    (folder / "file").touch()
    (folder / "link").symlink_to("s")
    assert not stale(folder / "file")
    assert not stale(folder / "link")
    with pytest.raises(FileNotFoundError):
        stale(folder / "nothing")
