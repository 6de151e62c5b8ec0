"""Walk paths as the kernel does, and note what a view has to show for the same walk to succeed in it."""

import errno
import os
import stat

from qemu_userns.plan.facts import (
    ABSENT,
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    REGULAR,
    SOCKET,
    PathFact,
)

_KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFSOCK: SOCKET,
    stat.S_IFIFO: FIFO,
    stat.S_IFBLK: BLOCK,
    stat.S_IFCHR: CHARACTER,
}
_FD_PREFIXES = ("/dev/fd/", "/proc/self/fd/")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_MOST_LINKS = 40  # path_resolution(7)


class PathWalker:
    """Looks paths up, each component once."""

    def __init__(self, cwd: str, privileged: bool) -> None:
        """Prepare to walk.

        Args:
            cwd: where relative paths begin, a real path.
            privileged: whether the caller is root, whose rights must not be led astray: only root's symlinks are followed.
        """
        self._cwd = cwd
        self._privileged = privileged
        self._seen: "dict[str, os.stat_result | OSError]" = {}

    def look(self, given: str, to_write: bool = True) -> PathFact:
        """Return what `given` leads to; a path that cannot be walked is a fact too (`error`).

        Args:
            given: the path.
            to_write: whether to find out too if it, and the directory that it is in, can be written.
        """
        fd = find_fd(given)
        if fd is not None:
            return _look_at_fd(given, fd)
        walk = _Walk(self, self._cwd)
        try:
            real = walk.follow(given)
            found = self._lstat(real)
            if given.endswith(("/", "/.")) and not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), given)
        except FileNotFoundError:
            real, found = walk.missing(), None
        except OSError as err:
            return PathFact(given, given, ABSENT, walk.links, walk.passed, error=err.strerror or str(err))
        parent_writable = to_write and os.access(os.path.dirname(real), os.W_OK)
        if found is None:
            error = None if walk.only_last_missing else os.strerror(errno.ENOENT)
            return PathFact(given, real, ABSENT, walk.links, walk.passed, error=error, parent_writable=parent_writable)
        return PathFact(
            given,
            real,
            _KINDS[stat.S_IFMT(found.st_mode)],
            walk.links,
            walk.passed,
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            inode=(found.st_dev, found.st_ino),
            device=found.st_rdev,
            readable=os.access(real, os.R_OK),
            writable=to_write and os.access(real, os.W_OK),
            parent_writable=parent_writable,
        )

    def check_link(self, path: str, found: os.stat_result) -> None:
        """Refuse a symlink that somebody else may have put there for root to follow.

        Stricter than the kernel's protected_symlinks (proc_sys_fs(5)), because what root opens here is given to a guest.
        """
        if self._privileged and found.st_uid != 0:
            raise PermissionError(errno.EPERM, f"{path} is a symlink of uid {found.st_uid}, which root does not follow", path)

    def _lstat(self, path: str) -> os.stat_result:
        """Call lstat(2) once per path."""
        found = self._seen.get(path)
        if found is None:
            try:
                found = os.lstat(path)
            except OSError as err:
                found = err
            self._seen[path] = found
        if isinstance(found, OSError):
            raise found
        return found


class _Walk:
    """One walk: where it is, and the components still to go."""

    def __init__(self, walker: PathWalker, start: str) -> None:
        self._walker = walker
        self._at = start
        self._todo: "list[str]" = []
        self.links: "tuple[tuple[str, str], ...]" = ()
        self.passed: "tuple[str, ...]" = ()

    def follow(self, path: str) -> str:
        """Walk `path`; return the real path of its end."""
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._push(path)
        while self._todo:
            name = self._todo[-1]
            if name == "..":
                self._todo.pop()
                self.passed += (self._at,)
                self._at = os.path.dirname(self._at)
                continue
            here = os.path.join(self._at, name)
            found = self._walker._lstat(here)
            self._todo.pop()
            if stat.S_ISLNK(found.st_mode):
                self._walker.check_link(here, found)
                self._follow_link(here)
            elif self._todo and not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), here)
            else:
                self._at = here
        return self._at

    def _follow_link(self, here: str) -> None:
        """Continue with a symlink's target."""
        target = os.readlink(here)
        self.links += ((here, target),)
        if len(self.links) > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), here)
        self._push(target)

    def _push(self, path: str) -> None:
        """Put the components of a path before what is still to go."""
        if path.startswith("/"):
            self._at = "/"
        self._todo += [name for name in reversed(path.split("/")) if name not in ("", ".")]

    @property
    def only_last_missing(self) -> bool:
        """Whether the walk ended at its last component."""
        return len(self._todo) == 1

    def missing(self) -> str:
        """Return the path of what is missing."""
        return os.path.join(self._at, *reversed(self._todo))


def _look_at_fd(given: str, fd: int) -> PathFact:
    """Return what an fd is open on; one that is not open is QEMU's to complain about."""
    try:
        found = os.fstat(fd)
    except OSError:
        return PathFact(given, given, ABSENT, fd=fd)
    return PathFact(
        given,
        f"/proc/self/fd/{fd}",
        _KINDS[stat.S_IFMT(found.st_mode)],
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        inode=(found.st_dev, found.st_ino),
        device=found.st_rdev,
        readable=True,
        writable=os.access(f"/proc/self/fd/{fd}", os.W_OK),
        fd=fd,
    )


def find_fd(path: str) -> "int | None":
    """Return N for a path that is an alias of fd N, else None."""
    if path in _STANDARD:
        return _STANDARD[path]
    for prefix in _FD_PREFIXES:
        if path.startswith(prefix) and path[len(prefix) :].isdecimal():
            return int(path[len(prefix) :])
    return None
