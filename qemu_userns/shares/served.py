"""Find out whether a QEMU serves a directory."""

import os

from qemu_userns.errors import ResourceError

_NAMES = ("qemu-system-", "qemu-kvm", "virtfs-proxy-he")  # what /proc/PID/comm begins with


def check_not_served(root: int, path: str) -> bool:
    """Refuse a directory that a QEMU has open, itself or a directory above it: so `-fsdev local` holds the root of its share.

    Args:
        root: fd of the directory; borrowed.
        path: for the error text.

    Returns:
        Whether every QEMU of this host could be looked at; what another user's has open only root sees.

    Raises:
        ResourceError: one has.
    """
    wanted = _list_above(root)
    complete = True
    for pid in (name for name in os.listdir("/proc") if name.isdecimal()):
        try:
            with open(f"/proc/{pid}/comm") as file:
                name = file.read().strip()
            if not name.startswith(_NAMES):
                continue
            opened = [_identify(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        except PermissionError:
            complete = False
            continue
        except OSError:
            continue  # it has ended
        if wanted.intersection(opened):
            raise ResourceError(path, f"{name} (pid {pid}) serves it", "stop the VM first")
    return complete


def _list_above(root: int) -> "set[tuple[int, int] | None]":
    """Return device and inode numbers of a directory and those above it, but for the root of the host."""
    found: set[tuple[int, int] | None] = set()
    fd = os.dup(root)
    try:
        while True:
            status, above = os.fstat(fd), os.stat("..", dir_fd=fd)
            if (status.st_dev, status.st_ino) == (above.st_dev, above.st_ino):
                return found
            found.add((status.st_dev, status.st_ino))
            parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = parent
    finally:
        os.close(fd)


def _identify(path: str) -> "tuple[int, int] | None":
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
