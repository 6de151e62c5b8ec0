"""The process beside the launcher, from the launcher's side."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_userns.errors import SandboxError
from qemu_userns.host.leftovers import Downscript, Leftover, decode, encode, remove
from qemu_userns.plan.facts import Account, Caller
from qemu_userns.plan.identity import DIRECT, SELF, Identity, MapEntry
from qemu_userns.plan.plan import NO_HOST
from qemu_userns.supervisor.process import COMMIT, Supervisor, fork_supervisor
from qemu_userns.supervisor.state import State, write_state
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


def test_a_script_survives_the_pipe() -> None:
    item = Downscript("/a script/ with blanks", "tap0")
    assert decode(encode(item)) == item


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


def in_launcher(function: Callable[[Supervisor], Any]) -> Any:
    """Be a launcher in a child process; it ends after `function`, and its sockets with it."""
    return in_child(lambda: function(fork_supervisor(OWN, "")))


def a_state(*leftovers: Leftover, daemonizes: bool = False) -> State:
    caller = Caller(Account("user", UID, GID, ()), UID == 0, "/", 0o022, 1024, frozenset())
    names = ("name", "uuid", "/usr/bin/qemu", (7, 2, 0))
    return State(os.getpid(), *names, daemonizes, "", NO_HOST, OWN, caller, leftovers=leftovers)


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


@pytest.mark.parametrize(("cause", "rule"), [(errno.EACCES, "mount,"), (errno.ENOSPC, None)])
def test_a_refusal_of_the_supervisors_arrives_whole(monkeypatch: pytest.MonkeyPatch, cause: int, rule: str | None) -> None:
    def refuse(_: object) -> None:
        raise SandboxError("what", "why", "a hint", rule="mount,") from OSError(cause, "why")

    monkeypatch.setattr("qemu_userns.supervisor.process.Holder", refuse)

    def launcher(supervisor: Supervisor) -> list[str]:
        try:
            supervisor.open_namespaces()
        except SandboxError as err:
            return [err.what, err.why, str(err.hint), str(err.find_rule())]
        return []

    assert in_launcher(launcher) == ["what", "why", "a hint", str(rule)]


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
            supervisor.hand_over([write_state(a_state(leftover(folder / "kept", False), leftover(folder / "temporary")))])

    in_launcher(launcher)
    wait_until(lambda: not list(folder.iterdir()))


@pytest.mark.userns
def test_after_commit_what_is_temporary_goes_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    for name in ("kept", "temporary", "not ours"):
        (folder / name).touch()
    hold_read, hold_write = os.pipe()

    def launcher(supervisor: Supervisor) -> None:
        os.close(hold_write)
        close_all(supervisor.open_namespaces())
        state = a_state(leftover(folder / "kept", False), leftover(folder / "temporary"), daemonizes=True)
        supervisor.hand_over([write_state(state)], "a name")
        supervisor.commit()
        if os.fork() == 0:  # QEMU, which keeps the channel and nothing of this test
            for fd in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, hold_read, supervisor.channel_fd}:
                with contextlib.suppress(OSError):
                    os.close(fd)
            os.write(supervisor.channel_fd, b"whatever QEMU says")
            os.read(hold_read, 1)
            os._exit(0)

    held = str(folder / "temporary")  # open, so that its inode number is not given to a file of the next VM
    try:
        in_launcher(launcher)
        # Waiting, it says nothing of the caller's command line and environment.
        wait_until(lambda: len(supervisors_of(held)) == 1)
        (pid,) = supervisors_of(held)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        assert command[0] == b"qemu-userns-supervisor: a name"
        assert not any(command[1:])
        assert not Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0")
        assert Path(f"/proc/{pid}/comm").read_text() == "qemu-userns-sup\n"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) != os.getsid(0)
        # Once the interpreter has started, it has read its memfd and closed it: the channel and a pidfd are left.
        wait_until(lambda: len(fds_of(pid)) == 6)
        assert fds_of(pid)[:3] == ["/dev/null", "/dev/null", "/dev/null"]
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


def supervisors_of(held: str) -> list[int]:
    """Return the waiting supervisors that hold a file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = (entry / "cmdline").read_bytes().startswith(b"qemu-userns-supervisor: ")
            if ours and held in fds_of(int(entry.name)):
                found.append(int(entry.name))
    return found


@pytest.mark.userns
def test_with_nothing_to_do_it_ends_with_execve() -> None:
    def launcher(supervisor: Supervisor) -> int:
        close_all(supervisor.open_namespaces())
        supervisor.hand_over(())
        supervisor.commit()
        with socket.socket(fileno=os.dup(supervisor.channel_fd)) as channel:
            channel.shutdown(socket.SHUT_WR)
        return len(os.read(supervisor.channel_fd, 1))  # the other end is closed

    assert in_launcher(launcher) == 0


@pytest.mark.userns
@pytest.mark.parametrize("stays", [False, True])
def test_what_was_created_goes_where_qemu_cannot_be_executed(tmp_path: Path, stays: bool) -> None:
    folder = tmp_path.resolve()
    (folder / "file").touch()

    def launcher(supervisor: Supervisor) -> None:
        supervisor.note(leftover(folder / "file", False))
        close_all(supervisor.open_namespaces())
        supervisor.hand_over([write_state(a_state(leftover(folder / "file", False)))] if stays else ())
        supervisor.commit()
        supervisor.fail()

    in_launcher(launcher)
    wait_until(lambda: not list(folder.iterdir()))


@pytest.mark.userns
@pytest.mark.parametrize("stderr", ["there", "closed", "nobody reads it"])
def test_a_supervisor_that_cannot_begin_ends_the_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str], stderr: str) -> None:
    """It says so where it can, and takes back what was created."""
    folder = tmp_path.resolve()
    (folder / "file").touch()

    def launch() -> None:
        if stderr == "closed":
            os.close(2)
        elif stderr == "nobody reads it":
            reader, writer = os.pipe()
            os.dup2(writer, 2)
            os.close(reader)
        supervisor = fork_supervisor(OWN, "")
        supervisor.note(leftover(folder / "file", False))
        close_all(supervisor.open_namespaces())
        supervisor.hand_over([os.memfd_create("no state")])
        time.sleep(30)

    with pytest.raises(AssertionError, match="the child was killed"):
        in_child(launch)
    wait_until(lambda: not list(folder.iterdir()))
    said = capfd.readouterr().err
    assert said.startswith("qemu-userns: the supervisor cannot begin: " if stderr == "there" else ""), said
    assert said.count("\n") == (stderr == "there")


@pytest.mark.parametrize("daemonizes", [False, True])
def test_it_waits_for_the_end_of_qemu(tmp_path: Path, daemonizes: bool) -> None:
    """QEMU's end is its process's; of a daemon, whose pid is not known, that of the channel."""
    folder = tmp_path.resolve()
    (folder / "file").touch()
    state = write_state(a_state(leftover(folder / "file"), daemonizes=daemonizes))
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen(["sleep", "60"]) as qemu:
        pidfd = os.pidfd_open(qemu.pid)
        fds = (theirs.fileno(), pidfd, state)
        script = "import sys; from qemu_userns.supervisor.life import begin, run; run(*begin(*map(int, sys.argv[1:])))"
        command = [sys.executable, "-c", script, *map(str, fds)]
        process = subprocess.Popen(command, pass_fds=fds)
        theirs.close()
        os.close(pidfd)
        os.close(state)
        ours.send(COMMIT.encode())
        ours.send(b"whatever QEMU says")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert (folder / "file").exists()
        if daemonizes:
            qemu.kill()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            ours.close()
        else:
            ours.close()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            qemu.kill()
        assert process.wait(WAIT_S) == 0
    assert not (folder / "file").exists()
