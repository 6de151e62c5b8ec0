"""What QEMU makes on the host by the caller's wish: pidfile, log, sockets, and the process that -daemonize leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.talk import (
    DEADLINE_S,
    IDLE,
    PLAIN,
    REAL,
    Running,
    connected,
    fds_of,
    is_alive,
    map_of,
    outcome,
    qmp_over,
    running,
    started,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]


@contextlib.contextmanager
def daemon(words: list[str], folder: Path, *options: str) -> Iterator[int]:
    """Start a QEMU with -daemonize that must succeed; give its pid as the pidfile has it, and kill it at the end."""
    pidfile = folder / "daemon.pid"
    files = ["-pidfile", str(pidfile), "-qmp", f"unix:{folder / 'daemon.qmp'},server=on,wait=off"]
    assert outcome(words, *IDLE, "-daemonize", *files, *options) == (0, "", "")
    pid = int(pidfile.read_text())
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the end of the daemon")


def test_daemonize_returns_when_pidfile_and_sockets_are_there(dropin: list[str], shared_tmp: Path) -> None:
    with daemon(dropin, shared_tmp) as pid:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(shared_tmp / "daemon.qmp"))  # at once: no retry
            assert os.readlink(f"/proc/{pid}/exe") == REAL
            assert os.getsid(pid) not in (os.getsid(0), 0)
            assert {fds_of(pid)[number] for number in (0, 1, 2)} == {"/dev/null"}
            assert map_of(pid, "uid") != map_of(os.getpid(), "uid")
            with qmp_over(client) as qmp:
                qmp.execute("quit")
        wait_until(lambda: not is_alive(pid), "the end of the daemon")
        wait_until(lambda: not list(shared_tmp.iterdir()), "pidfile and socket gone")


def test_a_killed_daemon_leaves_no_socket_and_no_pidfile(dropin: list[str], shared_tmp: Path) -> None:
    with daemon(dropin, shared_tmp) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not list(shared_tmp.iterdir()), "pidfile and socket gone")


def test_daemonize_that_fails_says_so_and_leaves_nothing(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    options = [*IDLE, "-daemonize", "-pidfile", str(pidfile), "-device", "nosuch"]
    plain = outcome(PLAIN, *options)
    assert plain[0] == 1
    assert outcome(dropin, *options) == plain
    wait_until(lambda: not pidfile.exists(), "the pidfile gone")


def test_the_pidfile_holds_the_started_pid_and_goes_at_the_end(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    with running(dropin, "-pidfile", str(pidfile)) as qemu:
        assert pidfile.read_text() == f"{qemu.pid}\n"
        assert stat.S_IMODE(pidfile.stat().st_mode) == 0o600
        assert qemu.quit() == 0
        wait_until(lambda: not pidfile.exists(), "the pidfile gone")


def test_a_relative_pidfile_is_in_the_callers_folder(dropin: list[str], shared_tmp: Path) -> None:
    with running(dropin, "-pidfile", "pid", cwd=shared_tmp) as qemu:
        assert (shared_tmp / "pid").read_text() == f"{qemu.pid}\n"
        assert os.readlink(qemu.proc / "cwd") == str(shared_tmp)


def test_a_stale_pidfile_is_replaced(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    pidfile.write_text("4194303 and more\n")
    with running(dropin, "-pidfile", str(pidfile)) as qemu:
        assert pidfile.read_text() == f"{qemu.pid}\n"
        assert qemu.quit() == 0
    wait_until(lambda: not pidfile.exists(), "the pidfile gone")


@pytest.mark.parametrize("holder", ["plain", "drop-in"])
def test_a_locked_pidfile_is_qemus_own_error_and_stays(dropin: list[str], shared_tmp: Path, holder: str) -> None:
    pidfile = shared_tmp / "pid"
    with running(PLAIN if holder == "plain" else dropin, "-pidfile", str(pidfile)) as first:
        second = [*IDLE, "-pidfile", str(pidfile)]
        refused = outcome(PLAIN, *second)
        assert refused[0] == 1
        status, stdout, stderr = outcome(dropin, *second)
        # As root, the other VM's pidfile is not this one's to open, and our own error says the same.
        assert (status, stdout, stderr) == refused or (os.geteuid() == 0 and "another process holds its lock" in stderr)
        assert status == 1
        assert pidfile.read_text() == f"{first.pid}\n"
        assert first.quit() == 0
    wait_until(lambda: not pidfile.exists(), "the pidfile gone")


def test_the_log_appears_on_the_host_and_stays(dropin: list[str], shared_tmp: Path) -> None:
    log = shared_tmp / "log"
    with running(dropin, "-D", str(log), "-d", "guest_errors,trace:qmp_job_*") as qemu:
        qemu.qmp.hmp("log all")
        status = log.stat()
        assert (status.st_uid, status.st_gid) == (qemu_id(qemu, "Uid"), qemu_id(qemu, "Gid"))
        assert stat.S_IMODE(status.st_mode) == 0o644
        assert qemu.quit() == 0
    assert log.is_file()


def test_umask_of_the_caller_applies_to_files_and_sockets(dropin: list[str], shared_tmp: Path) -> None:
    sock, log = shared_tmp / "socket", shared_tmp / "log"
    modes = []
    for words in (dropin, PLAIN):
        options = ["-serial", f"unix:{sock},server=on,wait=off", "-D", str(log), "-d", "unimp"]
        with running(words, *options, umask=0o027) as qemu:
            qemu.qmp.execute("query-status")
            modes.append([stat.S_IMODE(path.stat().st_mode) for path in (sock, log)])
            assert qemu.quit() == 0
        wait_until(lambda: not sock.exists(), "the socket gone")
        log.unlink()
    assert modes[0] == modes[1]


def qemu_id(qemu: Running, kind: str) -> int:
    return int(qemu.status[kind].split()[0])


@pytest.mark.parametrize(
    ("options", "greeting"),
    [
        (["-qmp", "unix:{},server=on,wait=off"], b'{"QMP"'),
        (["-qmp", "unix:{},server,nowait"], b'{"QMP"'),
        (["-qmp-pretty", "unix:{},server=on,wait=off"], b'{\r\n    "QMP"'),
        (["-monitor", "unix:{},server=on,wait=off"], b"QEMU "),
        (["-chardev", "socket,id=c,path={},server=on,wait=off", "-mon", "chardev=c,mode=control"], b'{"QMP"'),
        (["-chardev", "socket,path={},server=on,wait=off,id=c", "-mon", "c,mode=readline"], b"QEMU "),
        (["-chardev", "socket,id=c,path={},server=on,wait=off,mux=on", "-mon", "c", "-serial", "chardev:c"], b"QEMU "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_listening_socket_is_on_the_host_while_qemu_runs(
    dropin: list[str], shared_tmp: Path, options: list[str], greeting: bytes
) -> None:
    path = shared_tmp / "a socket"
    chardevs = []
    for words in (dropin, PLAIN):
        with running(words, *(option.format(path) for option in options)) as qemu:
            listed = qemu.qmp.execute("query-chardev")
            chardevs.append(sorted((item["label"], item["filename"]) for item in listed if item["label"] != "talk"))
            for _ in range(2):  # it listens again after a client has gone
                with connected(path) as client:
                    client.settimeout(DEADLINE_S)
                    received = b""
                    while len(received) < len(greeting):
                        received += client.recv(4096)
                    assert received.startswith(greeting)
            assert qemu.quit() == 0
        wait_until(lambda: not path.exists(), "the socket gone")
    assert chardevs[0] == chardevs[1]


def test_a_serial_socket_carries_bytes(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "serial"
    options = ["-chardev", f"socket,id=c,path={path},server=on,wait=off", "-object", "rng-egd,chardev=c,id=r"]
    with running(dropin, *options, "-serial", f"unix:{shared_tmp / 'other'},server,nowait") as qemu:
        with connected(path), connected(shared_tmp / "other"):
            connected_to = {item["label"]: item["filename"] for item in qemu.qmp.execute("query-chardev")}
            assert set(connected_to) == {"talk", "c", "serial0"}
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_a_regular_file_in_the_way_of_a_socket_is_replaced_as_by_qemu(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "socket"
    for words in (PLAIN, dropin):
        path.write_text("in the way")
        with running(words, "-qmp", f"unix:{path},server=on,wait=off") as qemu:
            with connected(path) as client, qmp_over(client) as qmp:
                assert qmp.execute("query-status")
            assert qemu.quit() == 0
        wait_until(lambda: not path.exists(), "the socket gone")


def test_a_directory_in_the_way_of_a_socket_is_an_error_and_stays(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "socket"
    path.mkdir()
    status, stdout, stderr = outcome(dropin, *IDLE, "-qmp", f"unix:{path},server=on,wait=off")
    assert (status, stdout) == (1, "")
    assert str(path) in stderr
    assert len(stderr.splitlines()) <= 2
    assert path.is_dir()


def test_a_killed_qemu_leaves_no_socket(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "socket"
    with running(dropin, "-qmp", f"unix:{path},server=on,wait=off") as qemu:
        assert path.is_socket()
        qemu.process.kill()
        wait_until(lambda: not path.exists(), "the socket gone")


def test_a_later_vms_socket_of_the_same_path_is_not_removed(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "socket"
    options = ["-qmp", f"unix:{path},server=on,wait=off"]
    with running(dropin, *options) as first, running(dropin, *options) as second:
        inode = path.stat().st_ino
        assert first.quit() == 0
        with connected(path) as client, qmp_over(client) as qmp:
            assert qmp.execute("query-status")
        assert path.stat().st_ino == inode
        assert second.quit() == 0
    wait_until(lambda: not path.exists(), "the socket gone")


def test_qemu_connects_to_a_server_on_the_host(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        server.settimeout(DEADLINE_S)
        with running(dropin, "-chardev", f"socket,id=c,path={path}", "-mon", "c,mode=control"):
            client, _ = server.accept()
            with client, qmp_over(client) as qmp:
                assert qmp.execute("query-status")
    assert path.is_socket()


def test_wait_on_waits_for_its_client_before_anything_else(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "socket"
    said = []
    for words in (dropin, PLAIN):
        command = [*words, *IDLE, "-chardev", f"socket,id=c,path={path},server=on,wait=on", "-mon", "c,mode=control"]
        with started(command, stderr=subprocess.PIPE) as process:
            assert process.stderr
            line = process.stderr.readline().decode()
            with connected(path) as client, qmp_over(client) as qmp:
                qmp.execute("quit")
            assert process.wait(DEADLINE_S) == 0
            said.append(line + process.stderr.read().decode())
    # Before "info:" QEMU repeats the option, in which the path has become an fd.
    assert said[0].partition("info:")[1:] == said[1].partition("info:")[1:]
    assert f"QEMU waiting for connection on: disconnected:unix:{path},server=on\n" in said[0]


def test_a_pty_is_told_by_its_number_on_the_host(dropin: list[str]) -> None:
    with running(dropin, "-chardev", "pty,id=p", "-mon", "p,mode=readline") as qemu:
        name = next(item["filename"] for item in qemu.qmp.execute("query-chardev") if item["label"] == "p")
        terminal = Path(name.removeprefix("pty:"))
        assert terminal.is_char_device()
        assert terminal.stat().st_uid == qemu_id(qemu, "Uid")
