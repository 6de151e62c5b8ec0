"""Which VMs the run directory knows, and which of them have a supervisor."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.leftovers import Leftover
from qemu_userns.plan.facts import Account, Caller
from qemu_userns.plan.identity import SELF, Identity, MapEntry
from qemu_userns.plan.plan import NO_HOST
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.registry import Entry
from qemu_userns.supervisor.state import State
from tests.forked import first_thread_ended, in_child

if TYPE_CHECKING:
    from pathlib import Path

UID, GID = os.geteuid(), os.getegid()
OWN = Identity(UID, GID, (), False, SELF, (MapEntry(0, UID, 1),), (MapEntry(0, GID, 1),), "test")
NOBODY = 2**22 + 1  # more than PID_MAX_LIMIT: a process that there never is


def a_state(pid: int, started: int, leftovers: tuple[Leftover, ...] = ()) -> State:
    caller = Caller(Account("user", UID, GID, ()), UID == 0, "/", 0o022, 1024, frozenset())
    names = ("name", "", "/usr/bin/qemu", (7, 2, 0))
    return State(pid, *names, False, "", NO_HOST, OWN, caller, leftovers=leftovers, started=started)


def register(directory: Path, pid: int, started: int, *leftovers: Leftover) -> None:
    registry.write_entry(str(directory), pid, Entry(a_state(pid, started, leftovers), 0))


def leftover(path: Path, temporary: bool = True) -> Leftover:
    status = path.lstat()
    return Leftover(str(path), (status.st_dev, status.st_ino), temporary)


def test_a_vm_that_runs_is_known_and_stays(tmp_path: Path) -> None:
    register(tmp_path, os.getpid(), registry.find_start(os.getpid()))
    registry.sweep(str(tmp_path))
    assert [pid for pid, _ in registry.read_entries(str(tmp_path))] == [os.getpid()]


@pytest.mark.parametrize(("pid", "started"), [(NOBODY, 5), (NOBODY, 0), (os.getpid(), 5)])
def test_a_vm_that_has_ended_is_not_known_and_is_swept(tmp_path: Path, pid: int, started: int) -> None:
    """Also one that ended before its start could be read, and one whose pid is somebody else's by now."""
    register(tmp_path, pid, started)
    assert list(registry.read_entries(str(tmp_path))) == []
    registry.sweep(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["json", "json.new", "lock", "log", "qmp"])
def test_a_part_of_an_entry_is_swept(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{NOBODY}.{name}").touch()
    (tmp_path / f"{os.getpid()}.{name}").touch()
    registry.sweep(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getpid()}.{name}"]


def test_who_looks_for_a_supervisor_leaves_no_file_and_takes_no_lock(tmp_path: Path) -> None:
    directory, pid = str(tmp_path), os.getpid()
    assert not registry.is_locked(directory, pid)
    assert list(tmp_path.iterdir()) == []
    lock = registry.lock_entry(directory, pid)
    assert lock is not None
    assert in_child(lambda: registry.is_locked(directory, pid))
    os.close(lock)
    assert not registry.is_locked(directory, pid)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "vms").mkdir()
    return str(tmp_path / "vms")


def test_what_a_dead_vm_left_is_swept(tmp_path: Path, directory: str) -> None:
    folder = tmp_path.resolve()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "pid").write_text(f"{NOBODY}\n")
    (folder / "dir").mkdir()
    (folder / "dir/inner").touch()
    (folder / "log").write_text(f"{NOBODY}\n")
    gone = [leftover(folder / name) for name in ("socket", "pid", "dir")]
    register(folder / "vms", NOBODY, 5, *gone, leftover(folder / "log", temporary=False))
    registry.sweep(directory)
    assert sorted(path.name for path in folder.iterdir()) == ["log", "vms"]
    assert os.listdir(directory) == []


def test_a_zombie_runs_no_more(tmp_path: Path, directory: str) -> None:
    """Whoever started QEMU may wait for it late, or never."""
    folder = tmp_path.resolve()
    with subprocess.Popen(["sleep", "60"]) as process:
        started = registry.find_start(process.pid)
        (folder / "pid").write_text(f"{process.pid}\n")
        register(folder / "vms", process.pid, started, leftover(folder / "pid"))
        assert [pid for pid, _ in registry.read_entries(directory)] == [process.pid]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert list(registry.read_entries(directory)) == []
        registry.sweep(directory)
        assert [path.name for path in folder.iterdir()] == ["vms"]
        assert os.listdir(directory) == []


def test_a_process_whose_first_thread_has_ended_runs() -> None:
    with first_thread_ended() as process:
        started = registry.find_start(process.pid)
        assert started != 0
        assert registry.is_running(process.pid, a_state(process.pid, started))


def test_what_may_be_another_vms_stays(tmp_path: Path, directory: str) -> None:
    """The inodes of a dead VM are given to others, and its pidfile is taken over by the next one, which has not written yet."""
    folder = tmp_path.resolve()
    (folder / "pid").write_text("123\n")
    (folder / "moved").write_text(f"{NOBODY}\n")
    items = [leftover(folder / "pid"), Leftover(str(folder / "moved"), (1, 2), True)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(1)
        register(folder / "vms", NOBODY, 5, *items, leftover(folder / "socket"))
        registry.sweep(directory)
    assert sorted(path.name for path in folder.iterdir()) == ["moved", "pid", "socket", "vms"]


@pytest.mark.parametrize("registered", [False, True])
def test_a_pidfile_that_a_running_vm_has_taken_over_stays(tmp_path: Path, directory: str, registered: bool) -> None:
    folder = tmp_path.resolve()
    (folder / "pid").write_text(f"{NOBODY}\n")
    pidfile = leftover(folder / "pid")
    register(folder / "vms", NOBODY, 5, pidfile)
    if registered:
        register(folder / "vms", os.getpid(), registry.find_start(os.getpid()), pidfile)
    registry.sweep(directory, [] if registered else [pidfile.path])
    assert (folder / "pid").exists()
