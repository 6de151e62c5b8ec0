"""Which file is that of a socket that the supervisor was given."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from qemu_userns.supervisor.server import find_socket_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as found:
        yield found


def test_a_listening_socket_has_the_file_that_it_was_bound_to(listener: socket.socket, tmp_path: Path) -> None:
    path = tmp_path.resolve() / "s"
    listener.bind(str(path))
    listener.listen(1)
    status = path.stat()
    found = find_socket_file(listener.fileno())
    assert found is not None
    assert (found.path, found.inode, found.temporary) == (str(path), (status.st_dev, status.st_ino), True)


def test_the_path_is_the_real_one(listener: socket.socket, tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    listener.bind(str(folder / "link/s"))
    found = find_socket_file(listener.fileno())
    assert found is not None
    assert found.path == str(folder / "real/s")


def test_another_socket_at_the_path_is_not_its_file(listener: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener.bind(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        assert find_socket_file(listener.fileno()) is None
        assert find_socket_file(other.fileno()) is not None


@pytest.mark.parametrize("name", ["\0qemu-userns-test-abstract", "relative"])
def test_a_name_that_is_no_absolute_path(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    listener.bind(name)
    assert find_socket_file(listener.fileno()) is None


def test_sockets_without_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "gone")
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unbound, socket.socket(socket.AF_UNIX) as gone:
        tcp.bind(("127.0.0.1", 0))
        gone.bind(path)
        os.unlink(path)
        assert [find_socket_file(each.fileno()) for each in (tcp, unbound, gone)] == [None] * 3
