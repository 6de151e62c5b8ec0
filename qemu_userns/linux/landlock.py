"""Landlock: landlock_create_ruleset(2), landlock_add_rule(2), landlock_restrict_self(2)."""

import errno
import os
import struct

from qemu_userns.linux.syscall import syscall

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1
LANDLOCK_SCOPE_SIGNAL = 2

# How many file access rights each ABI level knows (landlock(7)); a later level adds none but what is listed here.
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_RIGHTS = 16
# Rights that make sense on a file that is not a directory: execute, write, read, truncate, ioctl.
_FILE_RIGHTS = 0b1100000000000111


def probe_landlock() -> int:
    """Return the ABI level of the running kernel, 0 when Landlock is not there or not enabled."""
    try:
        return syscall(444, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as err:
        if err.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def landlock_create_ruleset(abi: int, scoped: int) -> int:
    """Return an owned fd of a ruleset that handles every file access right of `abi`, and the scopes `scoped` (ABI 6)."""
    attributes = struct.pack("QQQ", all_rights(abi), 0, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    return syscall(444, attributes[:size], size, 0)


def landlock_add_rule(ruleset_fd: int, parent_fd: int, rights: int) -> None:
    """Allow `rights` beneath the directory, or on the file, that `parent_fd` is open on."""
    syscall(445, ruleset_fd, LANDLOCK_RULE_PATH_BENEATH, struct.pack("=Qi", rights, parent_fd), 0)


def landlock_restrict_self(ruleset_fd: int) -> None:
    """Enforce a ruleset on this process for good; needs no_new_privs or CAP_SYS_ADMIN in the user namespace."""
    syscall(446, ruleset_fd, 0)


def all_rights(abi: int) -> int:
    """Return the mask of all file access rights that `abi` knows."""
    return (1 << _FS_RIGHTS_BY_ABI.get(abi, _FS_RIGHTS)) - 1


def file_rights(abi: int, fd: int) -> int:
    """Return the mask of rights that may be allowed on what `fd` is open on: fewer when it is not a directory."""
    directory = os.fstat(fd).st_mode & 0o170000 == 0o040000
    return all_rights(abi) if directory else all_rights(abi) & _FILE_RIGHTS
