"""QEMU behind the broker, seen from clients that are no better than a socket, and from /proc."""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration.talk import (
    DEADLINE_S,
    IDLE,
    fds_of,
    is_alive,
    started,
    status_of,
    supervisor_of,
    wait_until,
)
from qemu_userns.supervisor.registry import find_run_dir

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

NEGOTIATE = b"{'execute': 'qmp_capabilities'}\n"
WITH_OOB = b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}\n"
STATUS = b"{'execute': 'query-status'}\n"
STAMP = re.compile(rb'("(?:micro)?seconds": )\d+')
KIB = 1024


def without_time(data: bytes) -> bytes:
    """Return what QEMU said without when."""
    return STAMP.sub(rb"\g<1>0", data)


class Raw:
    """One end of a stream socket, byte for byte."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(DEADLINE_S)
        self._buffer = bytearray()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes, *fds: int) -> None:
        """Send all of it; the fds with the first byte."""
        if fds:
            count = self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            data = data[count:]
        self.socket.sendall(data)

    def line(self) -> bytes:
        """Return the next line, what there is of it at the end of the stream."""
        while (end := self._buffer.find(b"\n")) < 0:
            data = self._receive()
            if not data:
                end = len(self._buffer) - 1
                break
            self._buffer += data
        found = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return found

    def rest(self) -> bytes:
        """Return everything up to the end of the stream."""
        while data := self._receive():
            self._buffer += data
        found = bytes(self._buffer)
        self._buffer.clear()
        return found

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionResetError:
            return b""

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        line = self.line()
        assert line.endswith(b"\n"), f"the stream has ended: {line!r}"
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def ask(self, data: bytes, *fds: int) -> dict[str, Any]:
        """Send a command and return its reply, whatever events come before."""
        self.send(data, *fds)
        while "event" in (reply := self.read()):
            pass
        return reply

    def execute(self, command: str, **arguments: object) -> Any:
        reply = self.ask(json.dumps({"execute": command, "arguments": arguments}).encode())
        assert "return" in reply, f"{command}: {reply}"
        return reply["return"]

    def negotiate(self, words: bytes = NEGOTIATE) -> Raw:
        """Read the greeting and negotiate."""
        assert "QMP" in self.read()
        assert self.ask(words) == {"return": {}}
        return self

    def is_silent(self, duration_s: float) -> bool:
        """Tell whether nothing comes for a while, not even the end."""
        return not self._buffer and not select.select([self.socket], [], [], duration_s)[0]


def open_raw(path: Path) -> Raw:
    """Connect as soon as somebody listens."""
    client = socket.socket(socket.AF_UNIX)
    try:
        wait_until(lambda: client.connect_ex(str(path)) == 0, f"a listener at {path}")
    except BaseException:
        client.close()
        raise
    return Raw(client)


class Served:
    """A QEMU whose monitor is the broker's."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, pid: int | None = None) -> None:
        self.process, self.path, self.pid = process, path, pid or process.pid
        self.entry = Path(find_run_dir(os.geteuid())) / f"vms/{self.pid}.json"
        self.log_path = self.entry.with_suffix(".log")

    @property
    def log(self) -> str:
        """What the supervisor has written down."""
        return self.log_path.read_text()

    @property
    def supervisor(self) -> int:
        """The supervisor's pid."""
        return supervisor_of(self.pid)

    def connect(self) -> Raw:
        return open_raw(self.path)

    def client(self, words: bytes = NEGOTIATE) -> Raw:
        """Connect and negotiate."""
        return self.connect().negotiate(words)

    def memory_kib(self) -> int:
        return int(status_of(self.supervisor)["VmRSS"].split()[0])

    def fds(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return the fd tables of the supervisor and of QEMU, once the supervisor has done what it was asked."""
        return fds_of(self.supervisor), fds_of(self.pid)


@contextlib.contextmanager
def served(words: Sequence[str], folder: Path, *options: str, name: str = "q", **popen: Any) -> Iterator[Served]:
    """Start QEMU with a monitor at FOLDER/NAME."""
    path = folder / name
    with started([*words, *IDLE, "-qmp", f"unix:{path},server=on,wait=off", *options], **popen) as process:
        yield Served(process, path)


def assert_gone(vm: Served, supervisor: int, within_s: float = 2.0) -> float:
    """Wait until nothing of a VM is left that has just ended; return how long that took."""
    begin = time.monotonic()
    wait_until(lambda: not is_alive(supervisor), "the supervisor's end", within_s)
    took = time.monotonic() - begin
    left = [path for path in (vm.path, vm.entry, vm.log_path, vm.entry.with_suffix(".qmp")) if path.exists()]
    assert not left
    return took
