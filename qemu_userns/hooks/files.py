"""Files that hooks write: whole or not at all, where nobody but root can put anything else in their place."""

import fcntl
import os
import stat

from qemu_userns.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NEW = ".qemu-userns-new"  # ends the name of a file that is being written
_LOCK = "/etc/.qemu-userns-hook.lock"
_DIRECTORY_MODE = 0o755
_FILE_MODE = 0o644
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Lock:
    """Held while a hook changes a system, so that one at a time does.

    A file of its own that nobody else may open: any directory, or file that others may read, they could lock for ever. It is
    removed under its own lock; who has opened it just before then locks a file that has no name any more, and tries again.
    """

    def __init__(self, root: str) -> None:
        """Wait until it is obtained.

        Raises:
            ResourceError: it cannot be made.
        """
        self._path = root + _LOCK
        try:
            while True:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._is_named():
                    return
                os.close(self._fd)
        except OSError as err:
            hint = "run it as root" if isinstance(err, PermissionError) else None
            raise ResourceError(self._path, err.strerror or str(err), hint) from err

    def release(self) -> None:
        """Give it back."""
        try:
            os.unlink(self._path)
        finally:
            os.close(self._fd)

    def _is_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False


def check_place(path: str, root: str, trusted_uid: "int | None" = None) -> None:
    """Check that only root, or the caller, decides what is at a path: then nobody else can race for it either.

    Args:
        path: below `root`, which need not exist.
        root: the directory of another system, "" for this one; what is above it is the caller's business.
        trusted_uid: whose directories may be on the way beside root's; None for the caller's.

    Raises:
        ResourceError: a directory on the way is somebody else's, or others may write to it; or a symlink leads out of `root`.
    """
    trusted = (0, os.geteuid() if trusted_uid is None else trusted_uid)
    place, top = os.path.realpath(os.path.dirname(root + path)), os.path.realpath(root or "/")
    if os.path.commonpath((place, top)) != top:
        raise ResourceError(root + path, f"a symlink leads out of {root}", "run the hook within that system: chroot(8)")
    while len(place) >= len(top):
        try:
            found = os.stat(place)
        except FileNotFoundError:
            found = None
        except OSError as err:
            raise ResourceError(place, err.strerror or str(err)) from err
        if found is not None and found.st_uid not in trusted:
            raise ResourceError(place, f"belongs to uid {found.st_uid}, who could put anything there", "chown it to root")
        if found is not None and found.st_mode & _WRITABLE_BY_OTHERS and (place != top or not root):
            raise ResourceError(place, f"others may write to it (mode {found.st_mode & 0o7777:04o})", f"chmod go-w {place}")
        if place == top:
            return
        place = os.path.dirname(place)


def read_text(path: str) -> "str | None":
    """Return what a file has; None if there is none.

    Raises:
        ResourceError: it cannot be read.
    """
    data = read_bytes(path)
    return None if data is None else data.decode(errors="surrogateescape")


def read_bytes(path: str) -> "bytes | None":
    """Return what a file has; None if there is none.

    Raises:
        ResourceError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise ResourceError(path, err.strerror or str(err)) from err


def write_text(path: str, text: str) -> None:
    """Write a file as `write_file` does."""
    write_file(path, text.encode(errors="surrogateescape"))


def write_file(path: str, data: bytes, mode: "int | None" = None) -> None:
    """Write a file beside its place and move it there, so that whoever opens it finds a whole one, after a crash too.

    Args:
        path: where a symlink is replaced.
        data: all that it has.
        mode: None for that of the file that is there, whose owner is then kept as well; a new file has 0644.

    Raises:
        ResourceError: it cannot be written; nothing is left.
    """
    remove_leftover(path)
    try:
        before = os.stat(path, follow_symlinks=False) if mode is None and os.path.lexists(path) else None
        temporary = path + NEW
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                if before is not None:
                    os.fchown(fd, before.st_uid, before.st_gid)
                os.fchmod(fd, stat.S_IMODE(before.st_mode) if before is not None else _FILE_MODE if mode is None else mode)
                file.flush()
                os.fsync(fd)  # after a crash of the host the new name must not stand for half a file
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as err:
        raise ResourceError(path, err.strerror or str(err)) from err


def remove_leftover(path: str) -> None:
    """Remove what somebody was writing for this path when killed.

    Raises:
        ResourceError: it cannot be removed.
    """
    if os.path.lexists(path + NEW):
        act(os.unlink, path + NEW)


def make_directories(path: str) -> None:
    """Make a directory and those above it, whatever the umask.

    Raises:
        ResourceError: one cannot be made.
    """
    for directory in reversed(find_missing(path)):
        act(os.mkdir, directory)
        act(lambda made: os.chmod(made, _DIRECTORY_MODE), directory)


def find_missing(path: str) -> "list[str]":
    """Return which of a directory and those above it are not there, the deepest first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def remove_directories(paths: "Iterable[str]") -> None:
    """Remove directories that are empty, the first first."""
    for path in paths:
        try:
            os.rmdir(path)
        except OSError:
            continue  # somebody has put something there, or it is gone


def save_files(paths: "Iterable[str]") -> "Callable[[], None]":
    """Return what puts files back as they are now, and removes directories that are not there now.

    Raises:
        ResourceError: one cannot be read; from the function, one cannot be written.
    """
    files = {path: read_bytes(path) for path in paths}
    missing = [directory for path in files for directory in find_missing(os.path.dirname(path))]

    def restore() -> None:
        for path, data in files.items():
            remove_leftover(path)
            if data is not None and read_bytes(path) != data:
                write_file(path, data)
            elif data is None and os.path.lexists(path):
                act(os.unlink, path)
        remove_directories(missing)

    return restore


def act(function: "Callable[..., None]", *arguments: str) -> None:
    """Call a function of os.

    Raises:
        ResourceError: it fails; the path is the last argument.
    """
    try:
        function(*arguments)
    except OSError as err:
        raise ResourceError(arguments[-1], err.strerror or str(err)) from err
