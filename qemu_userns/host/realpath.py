"""Open what the plan resolved, by its real path: a symlink that appears on the way since then is an error, not a detour.

Somebody else may own a directory on the way, and swap it for a symlink between the plan and the open; followed with root's rights
that would create, remove or show a file of their choice (Firecracker CVE-2026-1386, KubeVirt CVE-2025-64433).

Source: openat2(2), RESOLVE_NO_SYMLINKS, Linux 5.6.
"""

import os
import stat

from qemu_userns.errors import ResourceError
from qemu_userns.linux import mount

_STRICT = mount.RESOLVE_NO_SYMLINKS | mount.RESOLVE_NO_MAGICLINKS


def open_real(path: str, flags: int) -> int:
    """Open a real path.

    Args:
        path: absolute, without symlinks when it was planned for.
        flags: of open(2); O_CLOEXEC is added.

    Returns:
        An owned fd.

    Raises:
        OSError: ELOOP when a symlink is on the way now, and those of open(2).
    """
    return mount.openat2(mount.AT_FDCWD, path, flags, _STRICT)


def check_inode(found: os.stat_result, planned: "tuple[int, int]", path: str) -> None:
    """Stop when something else is at a path than what the plan saw."""
    if (found.st_dev, found.st_ino) != planned:
        raise ResourceError(path, "it was replaced while QEMU was being started")


class Parent:
    """The directory of a real path, held open, so that what is done to its entry is done there."""

    def __init__(self, path: str) -> None:
        """Open it; raises OSError as `open_real`."""
        directory, self.name = os.path.split(path)
        self.fd = open_real(directory, os.O_PATH | os.O_DIRECTORY)

    def __enter__(self) -> "Parent":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the directory."""
        os.close(self.fd)

    def status(self) -> os.stat_result:
        """Return the status of the entry, of a symlink its own."""
        return os.stat(self.name, dir_fd=self.fd, follow_symlinks=False)

    @property
    def path(self) -> str:
        """A path of the entry for calls that take no directory, short enough for a socket's address."""
        return f"/proc/self/fd/{self.fd}/{self.name}"


def is_trusted(directory: str) -> bool:
    """Say whether nobody but root can change where a real path leads: no directory on the way takes entries from others.

    A sticky directory (/tmp) lets others make entries but not replace root's.
    """
    while directory != "/":
        above = os.path.dirname(directory)
        entry, found = os.lstat(directory), os.lstat(above)
        sticky = found.st_mode & stat.S_ISVTX and entry.st_uid == 0
        if found.st_uid != 0 or (found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky):
            return False
        directory = above
    return True
