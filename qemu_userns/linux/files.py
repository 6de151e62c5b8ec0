"""Files by descriptor: fchownat(2), renameat2(2)."""

import os

from qemu_userns.linux.mount import AT_EMPTY_PATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from qemu_userns.linux.syscall import call, find_function

RENAME_EXCHANGE = 2
RESOLVE_NO_XDEV = 0x01
RESOLVE_BENEATH = 0x08

_fchownat = find_function("fchownat", 5)
_renameat2 = find_function("renameat2", 5)


def open_beneath(dirfd: int, name: str, flags: int) -> int:
    """Open what a directory holds, on its own file system; return an owned fd.

    Raises:
        OSError: EXDEV when it is a mount point; ELOOP when it is a symlink, unless flags have O_PATH and O_NOFOLLOW.
    """
    return openat2(dirfd, name, flags, RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)


def chown_fd(fd: int, uid: int, gid: int) -> None:
    """Change the owner of an open file, also of a symlink or one opened with O_PATH."""
    call(_fchownat, fd, b"", uid, gid, AT_EMPTY_PATH)


def exchange(dirfd: int, name: str, other: str) -> None:
    """Let two names of one directory change places in one step.

    Raises:
        OSError: EINVAL when the file system cannot.
    """
    call(_renameat2, dirfd, os.fsencode(name), dirfd, os.fsencode(other), RENAME_EXCHANGE, path=other)
