"""What QEMU's mapped security models keep of a file. Pure.

mapped-xattr: `user.virtfs.uid`, `.gid`, `.mode` (32 bits) and `.rdev` (64 bits), little-endian. mapped-file: lines
`virtfs.uid=1000` in `.virtfs_metadata/NAME` beside the file, for the root of the share in `.virtfs_metadata_root` within it; QEMU
prints and reads C ints there. Whatever is missing is the host's. Source: QEMU 7.2, hw/9pfs/9p-local.c.
"""

import stat
import struct

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = "user.virtfs."
XATTR_SIZES = {"uid": 4, "gid": 4, "mode": 4, "rdev": 8}  # in bytes
ACLS = ("posix_acl_access", "posix_acl_default")
META_DIR, META_ROOT = ".virtfs_metadata", ".virtfs_metadata_root"
_LINE_MAX = 99  # bytes that QEMU reads at once of a line
_ACL_VERSION, _ACL_USER, _ACL_GROUP = 2, 0x02, 0x08
_NO_ID = 0xFFFFFFFF  # what the kernel tells of an id that a user namespace does not have
SPECIAL = (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)


class Kept(Record):
    """What is kept beside a file; None for what is missing."""

    uid: "int | None" = None
    gid: "int | None" = None
    mode: "int | None" = None
    rdev: "int | None" = None

    @property
    def complete(self) -> bool:
        """Whether nothing of it is read from the host's file."""
        return None not in (self.uid, self.gid, self.mode)


class Seen(Record):
    """What the guest sees of an entry: its own ids, mode with type, device number."""

    uid: int
    gid: int
    mode: int
    rdev: int = 0

    @property
    def kind(self) -> int:
        """Its type, as S_IFMT has it."""
        return stat.S_IFMT(self.mode)


def parse_xattrs(values: "dict[str, bytes]") -> Kept:
    """Parse extended attributes by their full names; QEMU passes over one of another size."""
    found = {}
    for name, size in XATTR_SIZES.items():
        value = values.get(PREFIX + name, b"")
        if len(value) == size:
            found[name] = int.from_bytes(value, "little")
    return Kept(**found)


def build_xattrs(seen: Seen) -> "dict[str, bytes]":
    """Return the extended attributes, `mode` last; a device number only for what has one."""
    values = {"uid": seen.uid, "gid": seen.gid, "rdev": seen.rdev, "mode": seen.mode}
    if seen.kind not in (stat.S_IFCHR, stat.S_IFBLK):
        del values["rdev"]
    return {PREFIX + name: value.to_bytes(XATTR_SIZES[name], "little") for name, value in values.items()}


def parse_metadata(data: bytes) -> Kept:
    """Parse a metadata file as QEMU does: a number as far as it goes, nothing of lines that it does not know."""
    found: dict[str, int] = {}
    for line in data.split(b"\n"):
        for name in XATTR_SIZES:
            key = f"virtfs.{name}".encode()
            if line.startswith(key):
                found[name] = _parse_int(line[len(key) + 1 : _LINE_MAX]) & 0xFFFFFFFF
    return Kept(**found)


def build_metadata(seen: Seen) -> bytes:
    """Return the text of a metadata file.

    Raises:
        ValueError: the device number has more than 32 bits.
    """
    if seen.rdev > 0xFFFFFFFF:
        raise ValueError("mapped-file keeps 32 bits of a device number")
    values = {"uid": seen.uid, "gid": seen.gid, "mode": seen.mode}
    if seen.kind in (stat.S_IFCHR, stat.S_IFBLK):
        values["rdev"] = seen.rdev
    return b"".join(b"virtfs.%s=%d\n" % (name.encode(), _to_signed(value)) for name, value in values.items())


def translate_acl(value: bytes, uid: "Callable[[int], int | None]", gid: "Callable[[int], int | None]") -> "bytes | None":
    """Return an access control list with other ids, None where an id has no other: acl(5), linux/posix_acl_xattr.h.

    Raises:
        ValueError: it is none.
    """
    if len(value) % 8 != 4 or struct.unpack_from("<I", value)[0] != _ACL_VERSION:
        raise ValueError("malformed access control list")
    out = [value[:4]]
    for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
        other: int | None = number
        if tag in (_ACL_USER, _ACL_GROUP):
            other = None if number == _NO_ID else (uid if tag == _ACL_USER else gid)(number)
        if other is None:
            return None
        out.append(struct.pack("<HHI", tag, permissions, other))
    return b"".join(out)


def _parse_int(text: bytes) -> int:
    """Parse as atoi(3) does."""
    text = text.lstrip(b" \t")
    sign = -1 if text.startswith(b"-") else 1
    text = text[1:] if text[:1] in (b"-", b"+") else text
    digits = text[: len(text) - len(text.lstrip(b"0123456789"))]
    return sign * int(digits or b"0")


def _to_signed(value: int) -> int:
    """Return the C int with the same 32 bits."""
    return value - (1 << 32) if value >= 1 << 31 else value
