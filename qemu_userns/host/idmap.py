"""Show files to QEMU under other ids than they have on disk, by an idmapped mount: mount_setattr(2), "ID-mapped mounts"."""

import os

from qemu_userns.errors import HostError
from qemu_userns.host.usernamespace import Holder, open_namespace, write_map
from qemu_userns.linux import mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.identity import MountMap


def map_mount(fd: int, idmap: "MountMap", writable: bool, path: str) -> None:
    """Make a detached mount, with what is mounted below it, show other ids than those on disk.

    Should: run as root outside.
    Must not: leave a mount writable that shows files of host root; QEMU could make such files through it.

    Args:
        fd: the detached mount; borrowed.
        idmap: from the ids on disk to the outside ids that the kernel takes them for.
        writable: whether it may be written, if no file of host root is in the map.
        path: for the error text.

    Raises:
        HostError: a file system cannot be idmapped.
    """
    holder = Holder(None)
    try:
        write_map(f"/proc/{holder.pid}/uid_map", idmap.uid_map)
        write_map(f"/proc/{holder.pid}/gid_map", idmap.gid_map)
        namespace = open_namespace(holder.pid, "user")
        try:
            attributes = mount.MOUNT_ATTR_IDMAP
            if not writable or idmap.shows_root:
                attributes |= mount.MOUNT_ATTR_RDONLY
            mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH | mount.AT_RECURSIVE, attributes, namespace)
        finally:
            os.close(namespace)
    except OSError as err:
        raise HostError(
            f"cannot show {path} to QEMU",
            f"its ids have to be mapped, and an idmapped mount of it fails: {err.strerror}",
            "make it readable for QEMU's id, or move it to a file system that can be idmapped (ext4, xfs, btrfs, tmpfs)",
        ) from err
    finally:
        holder.let_go()
