"""The log of a supervisor: a file in the run directory, bounded, gone with the VM."""

import os
import syslog
import time

_MAX_BYTES = 1 << 20
_MAX_WAITING = 100


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
