"""Start QEMU without a guest, talk QMP to it, and read what the kernel says about it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from integration.vm import user_environment
from qemu_userns.supervisor.registry import find_run_dir
from tests.conftest import CHECKOUT
from tests.machine import PATIENCE
from tests.plain import wait_main_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

PLAIN = ["qemu-system-x86_64"]
REAL = "/usr/bin/qemu-system-x86_64"
IDLE = ["-nodefaults", "-display", "none", "-M", "none", "-S"]
UUID = "6b3f8a52-0c1e-4c55-9d2b-4f6f0e8f5a11"
LISTENING = "00010000"  # __SO_ACCEPTCON in /proc/net/unix: proc(5)
DEADLINE_S = 30 * PATIENCE


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = DEADLINE_S) -> T:
    """Return the first true value of `condition`; what has gone counts as not yet there."""
    end = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ConnectionRefusedError):
            if value := condition():
                return value
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def unmount(place: Path) -> None:
    """Unmount a file system; the supervisor of a VM that has just ended may hold something there for another moment."""
    command = ["umount", str(place)]
    wait_until(lambda: subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0, f"the end of {place}'s users")


class Qmp:
    """A QMP session; the greeting has been read and capabilities are negotiated."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer
        self.greeting = self.read()
        assert "QMP" in self.greeting, self.greeting
        assert self.execute("qmp_capabilities") == {}

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Execute a command, return its whole reply."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._writer.flush()
        while "event" in (reply := self.read()):
            pass
        return reply

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute a command that must succeed."""
        reply = self.ask(command, **arguments)
        assert "return" in reply, f"{command}: {reply}"
        return reply["return"]

    def hmp(self, line: str) -> str:
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        line = self._reader.readline()
        if not line:
            raise ConnectionError("QEMU has closed its monitor")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


@contextlib.contextmanager
def qmp_over(connection: socket.socket) -> Iterator[Qmp]:
    """Talk QMP over a socket, which is borrowed."""
    connection.settimeout(DEADLINE_S)
    with connection.makefile("rb") as reader, connection.makefile("wb") as writer:
        yield Qmp(reader, writer)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """Connect to a unix socket on the host as soon as somebody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        wait_until(lambda: client.connect_ex(str(path)) == 0, f"a listener at {path}")
        yield client


@contextlib.contextmanager
def started(command: Sequence[str], **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; kill it at the end, also after an exception, which Popen alone would wait with for ever.

    A plain QEMU serves the QMP monitors that it does not wait for already.
    """
    with subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, **popen}) as process:
        try:
            if command[0] == PLAIN[0] and "-qmp" in command and any(word.endswith(",server=on,wait=off") for word in command):
                wait_main_loop(process)
            yield process
        finally:
            process.kill()


class Running:
    """A QEMU that runs: the process that was started, and a monitor."""

    def __init__(self, process: subprocess.Popen[bytes], qmp: Qmp) -> None:
        self.process, self.qmp, self.pid = process, qmp, process.pid
        self.proc = Path(f"/proc/{process.pid}")

    @property
    def status(self) -> dict[str, str]:
        return status_of(self.pid)

    def quit(self) -> int:
        self.qmp.execute("quit")
        return self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def running(
    words: Sequence[str], *options: str, pass_fds: tuple[int, ...] = (), idle: bool = True, **popen: Any
) -> Iterator[Running]:
    """Start QEMU, its monitor on an inherited socket, and wait for its greeting; kill it at the end."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            monitor = ["-chardev", f"socket,id=talk,fd={fd}", "-mon", "chardev=talk,mode=control"]
            command = [*words, *(IDLE if idle else ()), *monitor, *options]
            popen.setdefault("stdin", subprocess.DEVNULL)
            process = subprocess.Popen(command, pass_fds=(*pass_fds, fd), **popen)
        try:
            with qmp_over(ours) as qmp:
                yield Running(process, qmp)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


@contextlib.contextmanager
def running_raw(words: Sequence[str], *options: str, idle: bool = True) -> Iterator[Running]:
    """Start QEMU with a monitor of its own, which nothing stands before: what comes there is what a taken-over QEMU does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "monitor"
        monitor = ["-qmp", f"unix:{path},server=on,wait=off"] if words == PLAIN else ["-userns", f"passthrough={path}"]
        with started([*words, *(IDLE if idle else ()), *monitor, *options]) as process:
            wait_main_loop(process)
            with connected(path) as connection, qmp_over(connection) as qmp:
                yield Running(process, qmp)
            process.kill()
            process.wait()


def outcome(words: Sequence[str], *options: str, stdin: bytes = b"", **run: Any) -> tuple[int, str, str]:
    """Run to the end; return exit status, stdout and stderr. Whoever holds the pipes open lets this time out."""
    done = subprocess.run([*words, *options], input=stdin, capture_output=True, timeout=DEADLINE_S, **run)
    return done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)


def version_of(*words: str) -> tuple[int, ...]:
    """Return the version of the QEMU that the words start: major, minor."""
    status, stdout, _ = outcome(words, "-version")
    assert status == 0
    found = re.search(r"version (\d+)\.(\d+)", stdout)
    assert found
    return tuple(map(int, found.groups()))


def as_user(name: str, *words: str) -> list[str]:
    """Return the words that start a program as a user, whose groups it has; unchanged unless root runs the tests."""
    if os.geteuid() != 0:
        return list(words)
    return ["setpriv", "--reuid", name, "--regid", name, "--init-groups", *words]


def home_of(name: str) -> dict[str, str]:
    """Return the environment of a user."""
    return user_environment(pwd.getpwnam(name)) if os.geteuid() == 0 else dict(os.environ)


def status_of(pid: int) -> dict[str, str]:
    """Return /proc/PID/status as a dictionary."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def words_of(pid: int) -> list[str]:
    """Return /proc/PID/cmdline."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def fds_of(pid: int) -> dict[int, str]:
    """Return number and target of each fd of a process, which opens and closes some meanwhile."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)
    return found


def is_listening(path: Path) -> bool:
    """Say whether somebody listens at a path: a program binds its socket before it does."""
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    return any(line.split()[3] == LISTENING and line.endswith(f" {path}") for line in lines[1:])


def supervisor_of(pid: int) -> int:
    """Return the pid of the supervisor that serves a VM of the tester's."""
    entry = Path(find_run_dir(os.geteuid())) / f"vms/{pid}.json"
    return int(json.loads(wait_until(entry.read_text, f"{entry}"))["supervisor"])


def map_of(pid: int, kind: str) -> list[tuple[int, int, int]]:
    """Return /proc/PID/uid_map or gid_map."""
    entries = (line.split() for line in Path(f"/proc/{pid}/{kind}_map").read_text().splitlines())
    return [(int(inside), int(outside), int(count)) for inside, outside, count in entries]


def copy_program(folder: Path) -> Path:
    """Copy this program into a folder, to be changed or removed; return where it is."""
    shutil.copytree(CHECKOUT / "qemu_userns", folder / "copy/qemu_userns", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "copy"


def install_copy(copy: Path) -> str:
    """Make the entries of a copy of this program, in it; return the one for QEMU."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from qemu_userns.hooks.install import install; install(*sys.argv[2:])"
    python = str(CHECKOUT / ".venv/bin/python")
    subprocess.run([python, "-B", "-c", script, str(copy), str(copy / "entries"), os.path.dirname(REAL)], check=True)
    return str(copy / "entries/qemu-system-x86_64")


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return status_of(pid)["State"][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
