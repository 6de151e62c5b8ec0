"""The mount system calls: open_tree(2), move_mount(2), fsopen(2), mount_setattr(2), pivot_root(2), umount2(2).

Everything is Linux 5.12 or later. Paths are str; fds that are passed in are borrowed.
"""

import os
import struct

from qemu_userns.linux.syscall import call, find_function, syscall

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_IDMAP = 0x00100000
MS_REC = 1 << 14
MS_SLAVE = 1 << 19
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_mount = find_function("mount", 5)
_umount2 = find_function("umount2", 2)
_pivot_root = find_function("pivot_root", 2)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Open a mount, or with OPEN_TREE_CLONE a detached copy of it.

    Returns:
        An owned fd.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN over the mount namespace; EINVAL when the mount belongs to another namespace, or a
            locked mount below it would be uncovered by a copy that is not recursive.
    """
    return syscall(428, dirfd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC, path=path)


def move_mount(from_dirfd: int, from_path: str, to_dirfd: int, to_path: str, flags: int) -> None:
    """Move a mount, or attach a detached one.

    Raises:
        OSError: ENOENT when the target does not exist; ENOTDIR when only one side is a directory.
    """
    syscall(429, from_dirfd, os.fsencode(from_path), to_dirfd, os.fsencode(to_path), flags, path=to_path or from_path)


def fsopen(fsname: str, flags: int) -> int:
    """Open a context that makes a new file system; return an owned fd."""
    return syscall(430, fsname.encode(), flags, path=fsname)


def fsconfig(fd: int, command: int, key: "str | None" = None, value: "str | None" = None) -> None:
    """Set a string parameter of the context, or act on it (FSCONFIG_CMD_CREATE)."""
    key_bytes, value_bytes = (None if word is None else os.fsencode(word) for word in (key, value))
    syscall(431, fd, command, key_bytes, value_bytes, 0, path=key)


def fsmount(fd: int, flags: int, attributes: int) -> int:
    """Return an owned fd of a detached mount of the file system that the context made."""
    return syscall(432, fd, flags, attributes)


def mount_setattr(
    dirfd: int, path: str, flags: int, attr_set: int, userns_fd: int = 0, *, attr_clr: int = 0, propagation: int = 0
) -> None:
    """Set and clear attributes of a mount, and its propagation type (MS_SLAVE), with AT_RECURSIVE of all below it.

    Raises:
        OSError: EINVAL when the file system cannot be idmapped; EPERM when a locked attribute would be cleared.
    """
    attributes = struct.pack("QQQQ", attr_set, attr_clr, propagation, userns_fd)
    syscall(442, dirfd, os.fsencode(path), flags, attributes, len(attributes), path=path)


def set_propagation(path: str, flags: int) -> None:
    """Change the propagation type of a mount: mount(2) with MS_SLAVE and MS_REC."""
    call(_mount, None, os.fsencode(path), None, flags, None, path=path)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root mount of this mount namespace and move the old one to `put_old`."""
    call(_pivot_root, os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def umount2(target: str, flags: int) -> None:
    """Unmount."""
    call(_umount2, os.fsencode(target), flags, path=target)


RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """Open a file with limits on how its path is resolved; return an owned fd.

    Raises:
        OSError: ELOOP when a symlink was met under RESOLVE_NO_SYMLINKS.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return syscall(437, dirfd, os.fsencode(path), how, len(how), path=path)
