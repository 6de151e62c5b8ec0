"""The process beside the launcher, from the launcher's side."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_userns.host.leftovers import Leftover, decode, encode, remove
from qemu_userns.plan.identity import DIRECT, SELF, Identity, MapEntry
from qemu_userns.supervisor import main as supervisor_main
from qemu_userns.supervisor.process import Supervisor, fork_supervisor
from tests.forked import in_child

UID, GID = os.geteuid(), os.getegid()
OWN = Identity(UID, GID, (), False, SELF if UID else DIRECT, (MapEntry(0, UID, 1),), (MapEntry(0, GID, 1),), "test")
WAIT_S = 5


def leftover(path: Path, temporary: bool = True) -> Leftover:
    status = path.lstat()
    return Leftover(str(path), (status.st_dev, status.st_ino), temporary)


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


# --- leftovers --------------------------------------------------------------------------------------------------------


@given(
    st.binary(min_size=1).filter(lambda name: b"\0" not in name).map(os.fsdecode),
    st.integers(0, 2**64),
    st.integers(0, 2**64),
    st.booleans(),
)
def test_a_leftover_survives_the_pipe(path: str, device: int, inode: int, temporary: bool) -> None:
    item = Leftover(path, (device, inode), temporary)
    assert decode(encode(item)) == item
    assert "\0" not in encode(item)


def test_what_was_created_is_removed(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    (folder / "file").touch()
    (folder / "dir").mkdir()
    (folder / "link").symlink_to("file")
    remove([leftover(folder / name) for name in ("file", "dir", "link")])
    assert list(folder.iterdir()) == []


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    (folder / "file").touch()
    item = leftover(folder / "file")
    (folder / "file").rename(folder / "old")
    (folder / "file").touch()
    (folder / "full").mkdir()
    (folder / "full/inner").touch()
    gone = Leftover(str(folder / "gone"), (1, 2), True)
    remove([item, gone, leftover(folder / "full")])
    assert sorted(path.name for path in folder.iterdir()) == ["file", "old"]


def test_a_symlink_to_a_file_that_was_created_stays(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    (folder / "file").touch()
    item = leftover(folder / "file")
    (folder / "file").rename(folder / "moved")
    (folder / "file").symlink_to("moved")
    remove([item])
    assert (folder / "moved").exists()
    assert (folder / "file").is_symlink()


# --- the process ------------------------------------------------------------------------------------------------------


def in_launcher(function: Callable[[Supervisor], Any], leased: bool = False) -> Any:
    """Be a launcher in a child process; it ends after `function`, and its pipes with it."""
    return in_child(lambda: function(fork_supervisor(OWN, leased)))


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.userns
def test_the_namespace_comes_with_its_maps() -> None:
    def launcher(supervisor: Supervisor) -> tuple[str, str]:
        from qemu_userns.linux import process

        for namespace in supervisor.open_namespaces():
            process.setns(namespace, 0)
        return Path("/proc/self/uid_map").read_text(), Path("/proc/self/setgroups").read_text()

    uid_map, setgroups = in_launcher(launcher)
    assert uid_map.split() == ["0", str(UID), "1"]
    assert setgroups == "deny\n"


@pytest.mark.userns
@pytest.mark.parametrize("joined", [False, True])
def test_without_commit_everything_that_was_created_goes(tmp_path: Path, joined: bool) -> None:
    folder = tmp_path.resolve()
    for name in ("kept", "temporary"):
        (folder / name).touch()

    def launcher(supervisor: Supervisor) -> None:
        supervisor.note(leftover(folder / "kept", False))
        supervisor.note(leftover(folder / "temporary"))
        if joined:
            close_all(supervisor.open_namespaces())

    in_launcher(launcher)
    wait_until(lambda: not list(folder.iterdir()))


@pytest.mark.userns
def test_after_commit_what_is_temporary_goes_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    for name in ("kept", "temporary", "not ours"):
        (folder / name).touch()
    hold_read, hold_write = os.pipe()

    def launcher(supervisor: Supervisor) -> str:
        os.close(hold_write)
        supervisor.note(leftover(folder / "kept", False))
        supervisor.note(leftover(folder / "temporary"))
        close_all(supervisor.open_namespaces())
        supervisor.note(leftover(folder / "not ours"))  # too late: all files are made before
        assert supervisor.stays
        supervisor.commit()
        if os.fork() == 0:  # QEMU, which keeps the pipe and nothing of this test
            for fd in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, hold_read, supervisor.request_fd}:
                with contextlib.suppress(OSError):
                    os.close(fd)
            os.read(hold_read, 1)
            os._exit(0)
        return os.readlink(f"/proc/self/fd/{supervisor.request_fd}")

    try:
        pipe = in_launcher(launcher)
        # Waiting, it has become main.py: its command line says nothing of the caller's.
        found: list[int] = []

        def is_main() -> bool:
            found[:] = supervisors_of(pipe)
            return len(found) == 1 and Path(f"/proc/{found[0]}/cmdline").read_bytes().startswith(b"qemu-userns-supervisor")

        wait_until(is_main)
        (pid,) = found
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        assert command[0] == b"qemu-userns-supervisor"
        assert command[-1] == b"own"
        assert str(folder).encode() not in b" ".join(command)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) != os.getsid(0)
        # Once the interpreter has started, it has read its memfd and closed it.
        held = str(folder / "temporary")  # so that its inode number is not given to a file of the next VM
        wait_until(lambda: fds_of(pid) == sorted(["/dev/null", "/dev/null", "/dev/null", held, pipe]))
        assert sorted(path.name for path in folder.iterdir()) == ["kept", "not ours", "temporary"]
    finally:
        os.close(hold_read)
        os.close(hold_write)
    wait_until(lambda: not (folder / "temporary").exists())
    assert (folder / "kept").exists()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


def fds_of(pid: int) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return []


def supervisors_of(pipe: str) -> list[int]:
    """Return the waiting supervisor that has an end of this pipe."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = (entry / "cmdline").read_bytes().startswith(b"qemu-userns-supervisor\0")
            if ours and pipe in [os.readlink(fd) for fd in (entry / "fd").iterdir()]:
                found.append(int(entry.name))
    return found


@pytest.mark.userns
def test_with_nothing_to_do_it_ends_at_commit() -> None:
    def launcher(supervisor: Supervisor) -> bool:
        close_all(supervisor.open_namespaces())
        supervisor.commit()
        return supervisor.stays

    assert in_launcher(launcher) is False


def test_main_waits_for_the_end_of_the_pipe(tmp_path: Path) -> None:
    """main.py as it is started: bytes in the pipe mean nothing, its end means that QEMU has ended."""
    folder = tmp_path.resolve()
    (folder / "file").touch()
    state = os.memfd_create("state", 0)
    os.write(state, os.fsencode(encode(leftover(folder / "file")) + "\0"))
    read, write = os.pipe()
    script = supervisor_main.__file__
    process = subprocess.Popen([sys.executable, "-I", "-S", script, str(read), str(state), "own"], pass_fds=(read, state))
    os.close(read)
    os.close(state)
    os.write(write, b"whatever QEMU says\0commit\0")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert (folder / "file").exists()
    os.close(write)
    assert process.wait(WAIT_S) == 0
    assert not (folder / "file").exists()
