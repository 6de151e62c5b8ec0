"""Show a file that only its owner may read to QEMU, by an idmapped mount: mount_setattr(2), "ID-mapped mounts"."""

import os

from qemu_userns.errors import HostError
from qemu_userns.host.usernamespace import Holder, open_namespace, write_file
from qemu_userns.linux import mount


def map_mount(fd: int, owner: "tuple[int, int]", shown_as: "tuple[int, int]", path: str) -> None:
    """Make a detached mount show files of `owner` as files of `shown_as`: mount_setattr(2), "ID-mapped mounts".

    Should: run as root outside.
    Must not: leave the mount writable; QEMU could create files of `owner` through it.

    Args:
        fd: the detached mount; borrowed.
        owner: uid and gid of the files.
        shown_as: outside uid and gid of QEMU.
        path: for the error text.

    Raises:
        HostError: the file system cannot be idmapped.
    """
    holder = Holder(None)
    try:
        write_file(f"/proc/{holder.pid}/uid_map", f"{owner[0]} {shown_as[0]} 1")
        write_file(f"/proc/{holder.pid}/gid_map", f"{owner[1]} {shown_as[1]} 1")
        namespace = open_namespace(holder.pid, "user")
        try:
            attributes = mount.MOUNT_ATTR_IDMAP | mount.MOUNT_ATTR_RDONLY
            mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH | mount.AT_RECURSIVE, attributes, namespace)
        finally:
            os.close(namespace)
    except OSError as err:
        raise HostError(
            f"cannot show {path} to QEMU",
            f"only its owner may read it, and an idmapped mount of it fails: {err.strerror}",
            "make it readable for QEMU's id, or move it to a file system that can be idmapped (ext4, xfs, btrfs, tmpfs)",
        ) from err
    finally:
        holder.let_go()
