"""Facts about a file, kept until the file changes.

A fact file is named after the kind of fact and the device and inode of the file it is about; its first line has that file's
size and mtime too. The other lines are `key<TAB>value`, a key repeated for each of its values, alone if it has none.
A cache only saves time: what is wrong with it is never an error, it is then as if there were none.
"""

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Facts = dict[str, list[str]]

VERSION = "qemu-userns-cache-1"
MAX_BYTES = 1 << 20


def cache_dir(environ: "Mapping[str, str]", euid: int) -> "str | None":
    """Return the cache directory of a user, None if the environment tells none; it need not exist."""
    if euid == 0:
        return "/var/cache/qemu-userns"
    base = environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):  # XDG Base Directory Specification: a relative one is to be ignored
        return f"{base}/qemu-userns"
    home = environ.get("HOME", "")
    return f"{home}/.cache/qemu-userns" if home.startswith("/") else None


def load(directory: "str | None", kind: str, status: os.stat_result) -> "Facts | None":
    """Load what is known about a file.

    Args:
        directory: the cache directory, None for no cache.
        kind: which facts.
        status: of the file that the facts are about.

    Returns:
        The facts; None if there are none, or none that can be trusted.
    """
    if directory is None:
        return None
    try:
        text = _read_trusted(directory, _file_name(kind, status))
    except OSError:
        return None
    first, *lines = os.fsdecode(text).split("\n")
    if first != _first_line(status) or not lines or lines.pop():  # without a newline at its end it is cut off
        return None
    facts: Facts = {}
    for line in lines:
        key, tab, value = line.partition("\t")
        values = facts.setdefault(key, [])
        if tab:
            values.append(value)
    return facts


def store(directory: "str | None", kind: str, status: os.stat_result, facts: "Facts") -> None:
    """Store what is known about a file, if that is possible.

    Args:
        directory: the cache directory, None for no cache; made if it is missing.
        kind: which facts.
        status: of the file that the facts are about, from before they were gathered.
        facts: not stored if they cannot be written as lines.
    """
    if directory is None or _changed_just_now(status):
        return
    lines = [_first_line(status)]
    for key, values in facts.items():
        lines += [f"{key}\t{value}" for value in values] or [key]
    if any("\n" in line for line in lines) or any("\t" in key for key in facts):
        return
    try:
        _write_whole(directory, _file_name(kind, status), os.fsencode("\n".join(lines) + "\n"))
    except (OSError, ValueError):
        return


def _file_name(kind: str, status: os.stat_result) -> str:
    """Name the fact file."""
    return f"{kind}-{status.st_dev:x}-{status.st_ino:x}"


def _first_line(status: os.stat_result) -> str:
    """Return the line that a fact file for this state of its file begins with."""
    return f"{VERSION} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _changed_just_now(status: os.stat_result) -> bool:
    """Tell whether the file could change once more without another mtime: a clock tick, or seconds on old file systems."""
    import time

    grain_ns = 50_000_000 if status.st_mtime_ns % 1_000_000_000 else 2_000_000_000
    return time.time_ns() - status.st_mtime_ns < grain_ns


def _read_trusted(directory: str, name: str) -> bytes:
    """Read a fact file that only this user or root could have written; raises OSError."""
    parent = _open_trusted(directory, os.O_DIRECTORY, None)
    try:
        fd = _open_trusted(name, os.O_NONBLOCK, parent)
    finally:
        os.close(parent)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("not a regular file")
        text = b""
        while block := os.read(fd, 65536):
            text += block
            if len(text) > MAX_BYTES:
                raise OSError("too large")
        return text
    finally:
        os.close(fd)


def _open_trusted(path: str, flags: int, dir_fd: "int | None") -> int:
    """Open what others cannot write; returns an owned fd; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=dir_fd)
    status = os.fstat(fd)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        os.close(fd)
        raise OSError("others may change it")
    return fd


def _write_whole(directory: str, name: str, text: bytes) -> None:
    """Write a fact file, which appears whole or not at all; raises OSError."""
    os.makedirs(directory, 0o700, exist_ok=True)
    parent = _open_trusted(directory, os.O_DIRECTORY, None)
    try:
        temporary = f".{name}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            if os.write(fd, text) != len(text):
                raise OSError("short write")
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            os.unlink(temporary, dir_fd=parent)
            raise
        finally:
            os.close(fd)
    finally:
        os.close(parent)
