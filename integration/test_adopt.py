"""The VM outlives its supervisor, and `qemu-userns adopt` gives it a new one."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.talk import (
    DEADLINE_S,
    IDLE,
    connected,
    copy_program,
    fds_of,
    install_copy,
    qmp_over,
    started,
    supervisor_of,
    wait_until,
)
from qemu_userns.supervisor import registry
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.talk import Qmp

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.userns]

OURS = str(CHECKOUT / ".venv/bin/qemu-userns")
DROPIN = str(CHECKOUT / ".venv/dropin/qemu-system-x86_64")
HOME = Path(registry.find_run_dir(os.geteuid())) / "vms"


def ours(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OURS, *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def adopt(*words: str) -> None:
    done = ours("adopt", *words)
    assert (done.returncode, done.stderr) == (0, "")


def kill_supervisor(pid: int) -> None:
    supervisor = supervisor_of(pid)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: registry.find_start(supervisor) == 0 or is_zombie(supervisor), "the supervisor's end")


def is_zombie(pid: int) -> bool:
    return " Z " in Path(f"/proc/{pid}/stat").read_text()


@contextlib.contextmanager
def running_vm(tmp_path: Path, *words: str) -> Iterator[tuple[int, Path]]:
    """Start a VM with a monitor; yield its pid and the monitor's path."""
    path = tmp_path / "qmp"
    with started([DROPIN, *IDLE, "-name", "adopted", "-qmp", f"unix:{path},server=on,wait=off", *words]) as process:
        with client_of(path) as qmp:
            qmp.execute("cont")  # a QEMU 7.2 that does not run marks fds as removed, and keeps them
        yield process.pid, path


@contextlib.contextmanager
def client_of(path: Path) -> Iterator[Qmp]:
    with connected(path) as connection, qmp_over(connection) as qmp:
        yield qmp


def image(tmp_path: Path, name: str = "disk.img") -> Path:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


def mounts_of(pid: int, path: Path) -> int:
    return Path(f"/proc/{pid}/mountinfo").read_text().count(f" {path} ")


def test_clients_see_one_end_and_a_new_greeting(tmp_path: Path) -> None:
    with running_vm(tmp_path) as (pid, path):
        before = path.stat()
        with connected(path) as connection, qmp_over(connection) as qmp:
            qmp.execute("query-status")
            kill_supervisor(pid)
            with pytest.raises(ConnectionError):
                qmp.read()
        adopt(str(pid))
        after = path.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        with client_of(path) as qmp:
            assert qmp.execute("query-status")["status"] == "running"
            assert qmp.execute("query-chardev")[0]["filename"].startswith(f"unix:{path},server")
            qmp.execute("quit")
        wait_until(lambda: not list(HOME.glob(f"{pid}.*")), "the entry's end")
        wait_until(lambda: not path.exists(), "the socket's end")


def test_a_vm_whose_lock_another_process_holds_is_not_registered(tmp_path: Path) -> None:
    """Two supervisors would write its entry, and one of them remove it."""
    path = tmp_path / "qmp"
    words = ["sh", "-c", 'read go; exec "$@" </dev/null', "sh", DROPIN, *IDLE, "-qmp", f"unix:{path},server=on,wait=off"]
    with started(words, stdin=subprocess.PIPE) as process:
        lock = registry.lock_entry(registry.open_registry(os.geteuid()), process.pid)
        assert lock is not None
        try:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            with client_of(path) as qmp:
                assert not (HOME / f"{process.pid}.json").exists()
                qmp.execute("quit")
            process.wait(DEADLINE_S)
            assert [file.name for file in HOME.glob(f"{process.pid}.*")] == [f"{process.pid}.lock"]
        finally:
            (HOME / f"{process.pid}.lock").unlink()
            os.close(lock)


@pytest.mark.parametrize("adopted", [False, True])
def test_the_supervisor_goes_on_where_the_program_is_removed(tmp_path: Path, adopted: bool) -> None:
    """As it is for a moment in an update; what it imports later is of its own version."""
    disk, path, pidfile = image(tmp_path), tmp_path / "qmp", tmp_path / "pid"
    copy = copy_program(tmp_path)
    words = [install_copy(copy), *IDLE, "-pidfile", str(pidfile), "-qmp", f"unix:{path},server=on,wait=off"]
    with started(words) as process:
        with client_of(path) as qmp:
            qmp.execute("query-status")
        if adopted:
            kill_supervisor(process.pid)
            script = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qemu_userns.cli.main import main; main()"
            python = str(CHECKOUT / ".venv/bin/python")
            subprocess.run([python, "-B", "-c", script, str(copy), "adopt", str(process.pid)], check=True)
        shutil.rmtree(copy)
        with client_of(path) as qmp:
            for name in ("a", "b"):
                qmp.execute("blockdev-add", driver="file", filename=str(disk), **{"node-name": name})
            qmp.execute("blockdev-del", **{"node-name": "a"})
            qmp.execute("quit")
        process.wait(DEADLINE_S)
    wait_until(lambda: not path.exists() and not pidfile.exists(), "the end of what was made")


@pytest.mark.strace
def test_what_objects_hold_is_known_after_an_adoption_that_was_killed(tmp_path: Path) -> None:
    disk = image(tmp_path)
    with running_vm(tmp_path) as (pid, path):
        with client_of(path) as qmp:
            qmp.execute("blockdev-add", driver="file", filename=str(disk), **{"node-name": "a"})
        before = registry.read_entry(str(HOME), pid)
        assert before.held
        kill_supervisor(pid)
        stay = "inject=/^rename:delay_exit=2s"
        words = ["strace", "-f", "-o", "/dev/null", "-e", "trace=/^rename", "-e", stay, OURS, "adopt", str(pid)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL):
            wait_until(lambda: registry.read_entry(str(HOME), pid).supervisor != before.supervisor, "the first save")
            after = registry.read_entry(str(HOME), pid)
            os.kill(after.supervisor, signal.SIGKILL)
        assert after.held == before.held
        adopt(str(pid))
        with client_of(path) as qmp:
            qmp.execute("blockdev-del", **{"node-name": "a"})
            wait_until(lambda: mounts_of(pid, disk) == 0, "the bind's end")
            assert qmp.execute("query-fdsets") == []


def test_what_objects_hold_is_known_and_taken_back(tmp_path: Path) -> None:
    disk, other = image(tmp_path), image(tmp_path, "other.img")
    with running_vm(tmp_path) as (pid, path):
        fds = fds_of(pid)
        with client_of(path) as qmp:
            for node, file in (("a", disk), ("b", other)):
                qmp.execute("blockdev-add", driver="file", filename=str(file), **{"node-name": node})
            shown = mounts_of(pid, disk)
        kill_supervisor(pid)
        adopt("adopted")
        with client_of(path) as qmp:
            assert {node["node-name"] for node in qmp.execute("query-named-block-nodes")} == {"a", "b"}
            qmp.execute("blockdev-del", **{"node-name": "a"})
            wait_until(lambda: mounts_of(pid, disk) == 0, "the bind's end")
            assert mounts_of(pid, other) == shown
            qmp.execute("blockdev-add", driver="file", filename=str(disk), **{"node-name": "c"})
            for node in ("b", "c"):
                qmp.execute("blockdev-del", **{"node-name": node})
            wait_until(lambda: mounts_of(pid, disk) + mounts_of(pid, other) == 0, "the binds' end")
            assert qmp.execute("query-fdsets") == []
        wait_until(lambda: len(fds_of(pid)) <= len(fds), "QEMU's fds as before")


def test_kill_under_load_loses_no_vm(tmp_path: Path) -> None:
    """Ten supervisors in a row are killed while four clients ask, plug and unplug."""
    disk = image(tmp_path)
    stop = threading.Event()
    answers = [0] * 4

    def ask(number: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, ConnectionError, AssertionError), client_of(tmp_path / "qmp") as qmp:
                while not stop.is_set():
                    node = f"n{number}"
                    qmp.ask("blockdev-add", driver="file", filename=str(disk), **{"node-name": node, "read-only": True})
                    qmp.execute("query-status")
                    qmp.ask("blockdev-del", **{"node-name": node})
                    answers[number] += 1

    with running_vm(tmp_path) as (pid, path):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                reached = sum(answers) + 4
                wait_until(functools.partial(lambda least: sum(answers) >= least, reached), "clients are served")
                kill_supervisor(pid)
                adopt(str(pid))
        finally:
            stop.set()
            for thread in threads:
                thread.join(DEADLINE_S)
        assert min(answers) > 0
        with client_of(path) as qmp:
            qmp.execute("quit")
        wait_until(lambda: not list(HOME.glob(f"{pid}.*")), "the entry's end")


def test_replace_puts_a_new_one_in_the_place_of_one_that_runs(tmp_path: Path) -> None:
    with running_vm(tmp_path) as (pid, path):
        first = supervisor_of(pid)
        done = ours("adopt", str(pid))
        assert done.returncode == 1
        assert done.stderr.startswith(f"qemu-userns: {pid}: this VM has a supervisor\nhint: qemu-userns adopt --replace")
        with client_of(path) as qmp:
            adopt("--replace", str(pid))
            with pytest.raises(ConnectionError):
                qmp.read()
        assert supervisor_of(pid) != first
        with client_of(path) as qmp:
            qmp.execute("query-status")


def test_all_adopts_those_that_need_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with running_vm(tmp_path / "one") as (one, path), running_vm(tmp_path / "two") as (two, _):
        kept = supervisor_of(two)
        kill_supervisor(one)
        done = ours("adopt", "--all")
        assert f"{one} (adopted)" in done.stdout.splitlines()
        assert str(two) not in done.stdout
        assert supervisor_of(two) == kept
        with client_of(path) as qmp:
            qmp.execute("query-status")


def test_a_daemon_is_adopted(tmp_path: Path) -> None:
    path, pidfile = tmp_path / "qmp", tmp_path / "pid"
    words = ["-qmp", f"unix:{path},server=on,wait=off", "-pidfile", str(pidfile), "-daemonize"]
    assert subprocess.run([DROPIN, *IDLE, *words], timeout=DEADLINE_S, check=False).returncode == 0
    pid = int(pidfile.read_text())
    try:
        kill_supervisor(pid)
        adopt(str(pid))
        with client_of(path) as qmp:
            qmp.execute("query-status")
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not pidfile.exists() and not path.exists(), "pidfile and socket are removed")


def test_a_listening_socket_of_the_caller_is_bound_again(tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        words = ["-chardev", f"socket,id=m,fd={fd},server=on,wait=off", "-mon", "chardev=m,mode=control"]
        process = subprocess.Popen([DROPIN, *IDLE, *words], pass_fds=(fd,), stdin=subprocess.DEVNULL)
    try:
        with client_of(path) as qmp:
            qmp.execute("query-status")
        kill_supervisor(process.pid)
        adopt(str(process.pid))
        with client_of(path) as qmp:
            qmp.execute("quit")
        assert process.wait(DEADLINE_S) == 0
        wait_until(lambda: not path.exists(), "the socket goes as QEMU would remove it")
    finally:
        process.kill()
        process.wait()


def test_another_s_socket_at_the_path_is_left_alone(tmp_path: Path) -> None:
    with running_vm(tmp_path) as (pid, path):
        kill_supervisor(pid)
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            inode = path.stat().st_ino
            done = ours("adopt", str(pid))
            assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"qemu-userns: {path}: something else is there now")
            assert path.stat().st_ino == inode
        path.unlink()
        adopt(str(pid))
        with client_of(path) as qmp:
            qmp.execute("query-status")


def test_a_stale_socket_at_the_path_gives_way(tmp_path: Path) -> None:
    """An adoption that was killed before it wrote down what it had bound leaves one."""
    with running_vm(tmp_path) as (pid, path):
        kill_supervisor(pid)
        held = os.open(path, os.O_PATH)  # so that its number is not given again
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        adopt(str(pid))
        os.close(held)
        with client_of(path) as qmp:
            qmp.execute("query-status")


def test_an_adoption_that_fails_half_way_can_be_tried_again(tmp_path: Path) -> None:
    second = tmp_path / "second"
    with running_vm(tmp_path, "-qmp", f"unix:{second},server=on,wait=off") as (pid, path):
        kill_supervisor(pid)
        second.unlink()
        second.touch()
        done = ours("adopt", str(pid))
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"qemu-userns: {second}: something else is there now")
        assert not path.exists()
        second.unlink()
        adopt(str(pid))
        for each in (path, second):
            with client_of(each) as qmp:
                qmp.execute("query-status")


def test_what_a_vm_without_a_supervisor_left_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    pidfile = tmp_path / "pid"
    with running_vm(tmp_path, "-pidfile", str(pidfile)) as (pid, path):
        kill_supervisor(pid)
    assert pidfile.exists()
    assert path.exists()
    with running_vm(tmp_path / "next"):
        wait_until(lambda: not pidfile.exists() and not path.exists(), "pidfile and socket are swept")
        assert not (HOME / f"{pid}.json").exists()


def test_the_next_vm_keeps_the_pidfile_that_it_took_over(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    with running_vm(tmp_path, "-pidfile", str(pidfile)) as (pid, _):
        kill_supervisor(pid)
    with running_vm(tmp_path, "-pidfile", str(pidfile)) as (after, _):
        wait_until(lambda: not (HOME / f"{pid}.json").exists(), "the entry is swept")
        assert pidfile.read_text() == f"{after}\n"


@pytest.mark.parametrize("words", [[], ["--all", "x"], ["nobody"], ["--what"]])
def test_wrong_words_get_one_line_and_a_hint(words: list[str]) -> None:
    done = ours("adopt", *words)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("qemu-userns: ")
    assert second.startswith("hint: ")


def test_the_command_line_of_a_supervisor_names_the_vm_but_not_its_uuid(tmp_path: Path) -> None:
    uuid = "6b3f8a52-0c1e-4c55-9d2b-4f6f0e8f5a12"
    with running_vm(tmp_path, "-uuid", uuid) as (pid, _):

        def words() -> Any:
            return Path(f"/proc/{supervisor_of(pid)}/cmdline").read_text().split("\0")

        assert words()[0] == "qemu-userns-supervisor: adopted"
        assert uuid not in "".join(words())
        adopt("--replace", str(pid))
        assert words()[0] == "qemu-userns-supervisor: adopted"
        assert uuid not in "".join(words())
