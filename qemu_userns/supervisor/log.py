"""The log of a supervisor: a file in the run directory, bounded, gone with the VM."""

import os
import syslog
import time

_MAX_BYTES = 1 << 20
_MAX_WAITING = 100
_QUIET_S = 600.0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Log:
    """Lines with their time; those written before the file is open wait for it."""

    def __init__(self) -> None:
        """Start without a file."""
        self._fd: "int | None" = None
        self._waiting: "list[str]" = []
        self._size_bytes = 0

    def open(self, path: str) -> None:
        """Append to a file from now on; raises OSError."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self._write(line)

    def write(self, text: str) -> None:
        """Write a line; a log that is full, or on a full disk, takes no more."""
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} qemu-userns: {printable}\n"
        if self._fd is not None:
            self._write(line)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append(line)

    def give_up_file(self) -> None:
        """Tell the system's log what waits: there will be no file."""
        for line in self._waiting:
            syslog.syslog(syslog.LOG_WARNING, line.rstrip())
        self._waiting.clear()

    def _write(self, line: str) -> None:
        assert self._fd is not None
        data = line.encode(errors="backslashreplace")
        self._size_bytes += len(data)
        if self._size_bytes <= _MAX_BYTES:
            try:
                os.write(self._fd, data)
            except OSError:
                self._size_bytes = _MAX_BYTES


class Seldom:
    """Lines that somebody else can bring about as often as he likes: each is written once in a while, lest they fill the log."""

    def __init__(self, write: "Callable[[str], None]") -> None:
        """Start with none; `write` takes a line."""
        self._write = write
        self._told: "dict[str, tuple[float, int]]" = {}  # when it was written last, and how often it was not since

    def tell(self, text: str) -> None:
        """Write a line, unless one that differs in numbers only has been written lately."""
        kind = "".join(character for character in text if not character.isdigit())
        before, count = self._told.get(kind, (-_QUIET_S, 0))
        now = time.monotonic()
        if now - before < _QUIET_S:
            self._told[kind] = (before, count + 1)
            return
        self._told[kind] = (now, 0)
        self._write(text + (f" (and {count} before it)" if count else ""))
