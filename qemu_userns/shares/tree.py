"""Walk a shared directory by descriptors: no path is resolved twice, no symlink followed, no mount point crossed."""

import os
import stat

from qemu_userns.errors import ResourceError
from qemu_userns.linux.files import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

ROOT = "."


class Entry:
    """One entry of the tree, held open while it is looked at."""

    def __init__(self, dirfd: int, name: str, fd: int, path: str) -> None:
        """Borrow both fds.

        Args:
            dirfd: of the directory that has the entry; for the root of the share its own.
            name: in that directory, `.` for the root.
            fd: of the entry; with O_PATH, if it is no directory.
            path: from the root of the share, for people.
        """
        self.dirfd = dirfd
        self.name = name
        self.fd = fd
        self.path = path
        self.status = os.fstat(fd)

    @property
    def kind(self) -> int:
        """Its type on the host, as S_IFMT has it."""
        return stat.S_IFMT(self.status.st_mode)

    @property
    def link(self) -> str:
        """The path by which calls that take no O_PATH descriptor reach the open file: proc(5)."""
        return f"/proc/self/fd/{self.fd}"

    def refresh(self) -> None:
        """Look at the file again."""
        self.status = os.fstat(self.fd)


def walk(
    root: int,
    skip: "Container[str]",
    enter: "Callable[[Entry], None] | None" = None,
    fault: "Callable[[str, str], None] | None" = None,
) -> "Iterator[Entry]":
    """Yield every entry, a directory after what it holds, the root last. An entry is closed when the next is asked for.

    Args:
        root: fd of the directory; borrowed.
        skip: names that are no entries.
        enter: is called with each directory before it is listed.
        fault: is called with a path and a reason for what cannot be opened; without it that is an error.

    Raises:
        ResourceError: an entry cannot be opened.
    """
    frames: list[tuple[Entry, Iterator[str]]] = []
    try:
        _push(frames, Entry(root, ROOT, os.dup(root), ROOT), skip, enter, fault)
        while frames:
            top, names = frames[-1]
            name = next(names, None)
            if name is None:
                yield top
                os.close(frames.pop()[0].fd)
                continue
            path = name if top.name == ROOT else f"{top.path}/{name}"
            fd = _open(top.fd, name, path, fault)
            if fd is None:
                continue
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                _push(frames, Entry(top.fd, name, fd, path), skip, enter, fault)
                continue
            try:
                yield Entry(top.fd, name, fd, path)
            finally:
                os.close(fd)
    finally:
        for entry, _ in frames:
            os.close(entry.fd)


def _open(dirfd: int, name: str, path: str, fault: "Callable[[str, str], None] | None") -> "int | None":
    """Return an owned fd; None for what is gone, or is a fault that has been told."""
    try:
        return open_beneath(dirfd, name, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as err:
        why = "is a mount point; convert it by itself" if err.errno == 18 else str(err.strerror)  # EXDEV
        _tell(fault, path, why)
        return None


def _push(
    frames: "list[tuple[Entry, Iterator[str]]]",
    entry: Entry,
    skip: "Container[str]",
    enter: "Callable[[Entry], None] | None",
    fault: "Callable[[str, str], None] | None",
) -> None:
    """Take over a directory's fd, and list it."""
    frames.append((entry, iter(())))
    if enter is not None:
        enter(entry)
    try:
        listed = os.open(entry.link, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        _tell(fault, entry.path, f"cannot be listed: {err.strerror}")
        return
    os.dup2(listed, entry.fd, inheritable=False)  # of the same directory, but not O_PATH any more
    os.close(listed)
    frames[-1] = (entry, iter(sorted(name for name in os.listdir(entry.fd) if name not in skip)))


def _tell(fault: "Callable[[str, str], None] | None", path: str, why: str) -> None:
    if fault is None:
        raise ResourceError(path, why)
    fault(path, why)
