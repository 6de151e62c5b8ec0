"""A QEMU that is started to be asked: plain or through the drop-in, paused, with a QMP monitor on an inherited socket.

with probing(["qemu-system-x86_64"], ["-drive", "file=disk.raw,format=raw"], cwd=folder) as probe:
    print(probe.ask("query-block"))
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PROBE_FD = 77  # the same in every QEMU, so that what it reports can be compared
QUIET = ("-S", "-nodefaults", "-display", "none")
TIMEOUT_S = 60.0


class QmpError(Exception):
    """QEMU answered a command with an error."""


class QemuEndedError(Exception):
    """QEMU ended before it answered; the text is its exit status and what it wrote to stderr."""


class Probe:
    """A running QEMU, its monitor negotiated."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        """Borrow the process and the channel."""
        self.process = process
        self._channel, self._file = channel, channel.makefile("rb")
        self.stderr = ""  # known once it has ended
        self.stdout = ""

    def close(self) -> None:
        self._file.close()

    def negotiate(self) -> None:
        assert "QMP" in self._read()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command, return what it returns."""
        self._channel.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])

    def hmp(self, line: str) -> str:
        return str(self.ask("human-monitor-command", **{"command-line": line})).replace("\r\n", "\n")

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise QemuEndedError("QEMU closed its monitor")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


@contextlib.contextmanager
def probing(
    qemu: Sequence[str],
    words: Sequence[str | bytes],
    *,
    cwd: Path,
    pass_fds: tuple[int, ...] = (),
    env: dict[str, str] | None = None,
    quiet: Sequence[str] = QUIET,
) -> Iterator[Probe]:
    """Start QEMU with `words`, yield it when it answers, and have it quit.

    Raises:
        QemuEndedError: it ended on its own, with its stderr.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    monitor = ["-chardev", f"socket,id=probe,fd={PROBE_FD}", "-mon", "chardev=probe,mode=control"]
    with ours, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        number = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, PROBE_FD)
        assert number == PROBE_FD
        theirs.close()
        try:
            process = subprocess.Popen(
                [*qemu, *quiet, *words, *monitor],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                pass_fds=(*pass_fds, PROBE_FD),
            )
        finally:
            os.close(number)
        probe = Probe(process, ours)
        try:
            probe.negotiate()
            yield probe
            probe.ask("quit")
            process.wait(TIMEOUT_S)
        except (QemuEndedError, ConnectionError) as error:
            status = process.wait(TIMEOUT_S)
            err.seek(0)
            raise QemuEndedError(f"exit status {status}: {err.read().decode(errors='replace').strip()}") from error
        finally:
            process.kill()
            process.wait()
            probe.close()
        err.seek(0)
        out.seek(0)
        probe.stderr = err.read().decode(errors="replace")
        probe.stdout = out.read().decode(errors="replace")
