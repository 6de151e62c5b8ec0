"""Files of a launch that have to go: all of them when it fails, the temporary ones when QEMU has ended."""

import errno
import fcntl
import os
import stat

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.host.realpath import Parent


_DEEPEST = 40
_PIDFILE_MAX_BYTES = 32
_SCRIPT = "script"  # the first word of an encoded Downscript; interfaces have no blanks in their names
STALE = (0, 0)  # Leftover.inode of a socket that is about to be made: a socket that nobody listens on, whichever it is


class Leftover(Record):
    """A file, socket or directory that a launch has created."""

    path: str
    inode: "tuple[int, int]"  # a later VM may have put its own file at the path
    temporary: bool  # goes at QEMU's end, not only when the launch fails


class Downscript(Record):
    """A script to run once QEMU has let go of a tap: it takes back what another one did when that was opened."""

    path: str  # absolute
    interface: str


def encode(item: "Leftover | Downscript") -> str:
    """Return one as a line without NUL, for another process."""
    if isinstance(item, Downscript):
        return f"{_SCRIPT} {item.interface} {item.path}"
    return f"{item.inode[0]} {item.inode[1]} {'temporary' if item.temporary else 'kept'} {item.path}"


def decode(text: str) -> "Leftover | Downscript":
    """Return what `encode` wrote."""
    if text.startswith(f"{_SCRIPT} "):
        _, interface, path = text.split(" ", 2)
        return Downscript(path, interface)
    device, inode, fate, path = text.split(" ", 3)
    return Leftover(path, (int(device), int(inode)), fate == "temporary")


def hold(item: Leftover) -> "int | None":
    """Keep the inode of a file from being given to another one; return an owned fd that does, None if the file has gone.

    File systems hand out a number again as soon as it is free, and the next VM may have the same paths. A directory is locked
    too: what has not been used for a month is otherwise removed from /var/tmp (tmpfiles.d(5), "Age").
    """
    try:
        fd = os.open(item.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino) != item.inode:
        os.close(fd)
        return None
    return _lock_directory(fd) if stat.S_ISDIR(found.st_mode) else fd


def _lock_directory(place: int) -> int:
    """Lock a directory; take ownership of its O_PATH fd, return an owned one."""
    try:
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return place
    os.close(place)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return fd  # QEMU may have locked it itself
    return fd


def remove(leftovers: "Iterable[Leftover]", ended_pid: int = 0) -> None:
    """Remove each that is still the one that was created; what cannot be removed stays, as there is nobody to tell.

    Args:
        leftovers: what was created.
        ended_pid: of a VM that ended with nobody beside it, 0 for another. Since then its inodes were not held (`hold`), and the
            next VM takes over a pidfile that it finds: so a socket must be stale, and a file hold this pid.
    """
    from qemu_userns.host.realpath import Parent  # not needed before there is something to remove

    for item in leftovers:
        try:
            with Parent(item.path) as parent:
                found = parent.status()
                if not _is_ours(item, parent, found, ended_pid):
                    continue
                if stat.S_ISDIR(found.st_mode):
                    _remove_tree(parent.fd, parent.name, _DEEPEST)
                else:
                    os.unlink(parent.name, dir_fd=parent.fd)
        except OSError:
            continue


def _is_ours(item: Leftover, parent: "Parent", found: os.stat_result, ended_pid: int) -> bool:
    """Say whether what is there is what was created; raises OSError."""
    if item.inode == STALE:
        return is_stale(parent)
    if item.inode != (found.st_dev, found.st_ino):
        return False
    if not ended_pid or stat.S_ISDIR(found.st_mode):  # a directory's name is its own
        return True
    return is_stale(parent) or (stat.S_ISREG(found.st_mode) and _holds_pid(parent, ended_pid))


def _holds_pid(parent: "Parent", pid: int) -> bool:
    """Say whether a file is what QEMU writes as its pidfile; raises OSError."""
    fd = os.open(parent.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent.fd)
    try:
        return os.read(fd, _PIDFILE_MAX_BYTES) == b"%d\n" % pid
    finally:
        os.close(fd)


def is_stale(parent: "Parent") -> bool:
    """Say whether an entry of a directory is a unix socket on which nobody listens.

    One that is too busy to be connected to (EAGAIN), or may not be, counts as served.

    Raises:
        OSError: there is no such entry.
    """
    import _socket

    place = os.open(parent.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(place).st_mode)
        return is_socket and client.connect_ex(f"/proc/self/fd/{place}") == errno.ECONNREFUSED
    finally:
        client.close()
        os.close(place)


def _remove_tree(parent: int, name: str, depth: int) -> None:
    """Remove a directory of the VM's own with what is in it, following no symlink; too deep a one stays.

    Raises:
        OSError: as rmdir(2) and unlink(2).
    """
    if depth:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for entry in os.listdir(directory):
                try:
                    os.unlink(entry, dir_fd=directory)
                except IsADirectoryError:
                    _remove_tree(directory, entry, depth - 1)
        finally:
            os.close(directory)
    os.rmdir(name, dir_fd=parent)
