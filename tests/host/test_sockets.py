"""Our own QMP sockets, as they are opened for the supervisor."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.opening import Opened
from qemu_userns.host.sockets import open_socket
from qemu_userns.plan.grants import LISTEN, Monitor, QmpSocket
from qemu_userns.plan.rights import Rights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.host.leftovers import Leftover


@pytest.fixture
def opened() -> Iterator[Opened]:
    told: list[Leftover] = []
    found = Opened((), told.append)
    yield found
    assert told == found.leftovers
    for fd in found.served:
        os.close(fd)


def asked(path: Path, mode: int = 0o600) -> QmpSocket:
    return QmpSocket("a test", "qemu-userns", str(path), str(path), mode, Rights())


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o000])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_mode_is_the_settings_whatever_the_umask(opened: Opened, tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        open_socket(asked(tmp_path / "s", mode), False, opened)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    found = (tmp_path / "s").lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == mode


@pytest.mark.parametrize("privileged", [False, True])
def test_clients_may_come_before_the_supervisor_runs(opened: Opened, tmp_path: Path, privileged: bool) -> None:
    open_socket(asked(tmp_path / "s"), privileged, opened)
    with socket.socket(socket.AF_UNIX) as client, socket.socket(fileno=os.dup(opened.served[0])) as listener:
        client.connect(str(tmp_path / "s"))
        listener.accept()[0].close()


def test_they_come_in_order_and_go_with_the_launch(opened: Opened, tmp_path: Path) -> None:
    for name in ("b", "a"):
        open_socket(asked(tmp_path / name), False, opened)
    names = []
    for fd in opened.served:
        with socket.socket(fileno=os.dup(fd)) as listener:
            names.append(listener.getsockname())
    assert names == [f"{tmp_path}/b", f"{tmp_path}/a"]
    assert opened.passed == []
    assert [item.temporary for item in opened.leftovers] == [False, True] * 2  # before it has its name, and after
    opened.undo()
    assert os.listdir(tmp_path) == []


def test_an_old_socket_gives_way(opened: Opened, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "s"))
    before = (tmp_path / "s").lstat().st_ino
    holder = os.open(tmp_path / "s", os.O_PATH)  # so that its number is not given again
    open_socket(asked(tmp_path / "s"), False, opened)
    os.close(holder)
    assert (tmp_path / "s").lstat().st_ino != before


def test_qemus_own_socket_of_a_monitor_never_blocks(opened: Opened, tmp_path: Path) -> None:
    """Two threads of QEMU 7.2 may see one connection: who comes too late must not wait for the next."""
    path = str(tmp_path / "s")
    private, way_in = numbers = [fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 500) for _ in range(2)]
    for number in numbers:
        os.close(number)
    open_socket(Monitor("a test", LISTEN, "m", False, private, way_in, path, path), False, opened)
    assert not os.get_blocking(private)
    os.close(private)
    os.close(way_in)
