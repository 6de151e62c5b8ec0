"""Write id maps from outside, and idmap mounts."""

import os

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.host.newidmap import run_newidmap
from qemu_userns.linux import mount, process
from qemu_userns.plan.identity import DIRECT, NEWIDMAP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.identity import Identity, MapEntry


def write_maps(pid: int, identity: "Identity") -> None:
    """Write uid_map and gid_map of a process that has just entered its user namespace.

    Should: run outside, as root for DIRECT and as the process's own user for NEWIDMAP.
    Must not: write anything when the process is gone; its pid may be another's by then.

    Raises:
        HostError: newuidmap or newgidmap is missing or refuses.
        SandboxError: the kernel refuses.
    """
    if identity.method == NEWIDMAP:
        run_newidmap(pid, identity.uid_map, identity.gid_map)
    elif identity.method == DIRECT:
        try:
            _write(f"/proc/{pid}/uid_map", identity.uid_map)
            _write(f"/proc/{pid}/gid_map", identity.gid_map)
        except OSError as err:
            raise SandboxError("cannot write the id maps", err.strerror or str(err)) from err


def map_mount(fd: int, owner: "tuple[int, int]", shown_as: "tuple[int, int]", path: str) -> None:
    """Make a detached mount show files of `owner` as files of `shown_as`: mount_setattr(2), "ID-mapped mounts".

    Should: run as root outside.
    Must not: be used for a mount that is writable; QEMU could create files of `owner` through it.

    Args:
        fd: the detached mount; borrowed.
        owner: uid and gid of the files.
        shown_as: outside uid and gid of QEMU.
        path: for the error text.

    Raises:
        HostError: the file system cannot be idmapped.
    """
    uid_map = f"{owner[0]} {shown_as[0]} 1"
    gid_map = f"{owner[1]} {shown_as[1]} 1"
    try:
        namespace = _open_user_namespace(uid_map, gid_map)
        try:
            mount.mount_setattr(
                fd, "", mount.AT_EMPTY_PATH | mount.AT_RECURSIVE, mount.MOUNT_ATTR_IDMAP | mount.MOUNT_ATTR_RDONLY, namespace
            )
        finally:
            os.close(namespace)
    except OSError as err:
        raise HostError(
            f"cannot show {path} to QEMU",
            f"only its owner may read it, and an idmapped mount of it fails: {err.strerror}",
            "make it readable for QEMU's id, or move it to a file system that can be idmapped (ext4, xfs, btrfs, tmpfs)",
        ) from err


def _open_user_namespace(uid_map: str, gid_map: str) -> int:
    """Make a user namespace with these maps; return an owned fd that keeps it."""
    ready_read, ready_write = os.pipe()
    hold_read, hold_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(hold_write)
            process.unshare(process.CLONE_NEWUSER)
            os.write(ready_write, b"r")
            os.read(hold_read, 1)  # ends when the parent has closed its side
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(hold_read)
    try:
        if not os.read(ready_read, 1):
            raise OSError(1, "user namespaces cannot be made")
        _write_file(f"/proc/{child}/uid_map", uid_map)
        _write_file(f"/proc/{child}/gid_map", gid_map)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_read)
        os.close(hold_write)
        os.waitpid(child, 0)


def _write(path: str, entries: "tuple[MapEntry, ...]") -> None:
    """Write a map in the one write(2) that the kernel takes."""
    _write_file(path, "\n".join(f"{entry.inside} {entry.outside} {entry.count}" for entry in entries))


def _write_file(path: str, text: str) -> None:
    """Write a kernel file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
