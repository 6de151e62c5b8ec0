"""Files of a launch that have to go: all of them when it fails, the temporary ones when QEMU has ended."""

import os
import stat

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Leftover(Record):
    """A file, socket or directory that a launch has created."""

    path: str
    inode: "tuple[int, int]"  # a later VM may have put its own file at the path
    temporary: bool  # goes at QEMU's end, not only when the launch fails


def encode(leftovers: "Iterable[Leftover]") -> bytes:
    """Return the temporary ones as NUL-terminated fields, for `decode` in another process."""
    fields = [(str(item.inode[0]), str(item.inode[1]), item.path) for item in leftovers if item.temporary]
    return os.fsencode("".join(f"{field}\0" for group in fields for field in group))


def decode(data: bytes) -> "list[Leftover]":
    """Return what `encode` wrote."""
    fields = os.fsdecode(data).split("\0")[:-1]
    return [
        Leftover(path, (int(device), int(inode)), True)
        for device, inode, path in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    ]


def remove(leftovers: "Iterable[Leftover]") -> None:
    """Remove each that is still the one that was created; what cannot be removed stays, as there is nobody to tell."""
    for item in leftovers:
        try:
            found = os.lstat(item.path)
            if (found.st_dev, found.st_ino) != item.inode:
                continue
            if stat.S_ISDIR(found.st_mode):
                os.rmdir(item.path)
            else:
                os.unlink(item.path)
        except OSError:
            continue
