"""Which other files a disk image names: backing files, external data files, extents.

The headers are read here, never by qemu-img: that would cost a process, and it would open what a header names.
A header may be written by a guest, so everything in it is hostile: reads are bounded, offsets checked, and a name from a header
is opened only if the caller's `may_open` agrees. What is malformed is left out without an error: QEMU reports it.

Source: QEMU docs/interop/qcow2.txt, docs/interop/qed_spec.txt, block/qcow.c, block/vmdk.c; for names block.c
(bdrv_get_full_backing_filename, path_combine).
"""

import os
import stat
import struct

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_READ = 65536
MAX_NAME = 1023  # as in QEMU's block layer
MAX_DEPTH = 200  # as in QEMU's block layer
SECTOR = 512
PROTOCOLS_OF_FILES = ("file", "host_device", "host_cdrom")


class ImageFile(Record):
    """A file that QEMU opens for an image.

    `unresolved` marks a name that is no path (`nbd:...`, a json: name with none or several files); `path` is the name then.
    """

    path: str
    format: str
    role: str  # "image", "backing", "data-file" or "extent"
    unresolved: bool = False


class ImageHeader(Record):
    """The names in a header, as they stand there."""

    format: str
    backing: "str | None" = None
    backing_format: "str | None" = None
    data_file: "str | None" = None
    extents: "tuple[str, ...]" = ()


RAW = ImageHeader("raw")


def read_header(fd: int, size: int) -> ImageHeader:
    """Read the header of an image; borrows the fd.

    Args:
        fd: a regular file or block device, open for reading.
        size: its size in bytes.

    Returns:
        The format, "raw" if it is none that can name files, and the names.

    Raises:
        OSError: the file cannot be read.
    """
    head = os.pread(fd, min(size, SECTOR), 0)
    if head.startswith((b"KDMV", b"COWD")) or _is_descriptor(head):
        return _read_vmdk(fd, size, head)
    for magic, read in ((b"QFI\xfb\0\0\0\1", _read_qcow1), (b"QFI\xfb", _read_qcow2), (b"QED\0", _read_qed)):
        if head.startswith(magic):
            try:
                return read(fd, size, head)
            except struct.error:
                return RAW  # cut off
    return RAW


def find_chain(path: str, *, format: "str | None", may_open: "Callable[[str], bool]") -> "tuple[ImageFile, ...]":  # noqa: A002
    """Find the files that QEMU opens for an image, the image first.

    Args:
        path: the image, named by the operator and opened with the caller's rights.
        format: the format that the operator gave, None if QEMU is to probe it; of "raw" no header is read.
        may_open: asked before a file is opened that only a header names.

    Returns:
        The image, then what its header names, then what the header of its backing file names, and so on. A missing
        backing file ends the chain and is not in it; one that may not be opened is the last of it.
    """
    files: list[ImageFile] = []
    seen: set[tuple[int, int]] = set()
    current = ImageFile(path, format or "", "image")
    for _ in range(MAX_DEPTH):
        header = RAW
        if not current.unresolved and current.format != "raw" and (current.role == "image" or may_open(current.path)):
            try:
                header = _open_and_read(current.path, seen)
            except FileNotFoundError:
                if current.role != "image":
                    break
            except OSError:
                pass
        files.append(current.replace(format=current.format or header.format))
        if current.format not in ("", header.format):
            break  # not what it is said to be
        files += _other_files(current.path, header)
        if header.backing is None:
            break
        current = _backing_file(current.path, header)
    return tuple(files)


def _open_and_read(path: str, seen: "set[tuple[int, int]]") -> ImageHeader:
    """Read the header of a file not seen before, without side effects on what is neither a file nor a disk; raises OSError."""
    node = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(node)
        key = (status.st_dev, status.st_ino)
        if key in seen or not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            return RAW
        seen.add(key)
        fd = os.open(f"/proc/self/fd/{node}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(node)
    try:
        return read_header(fd, os.lseek(fd, 0, os.SEEK_END))
    finally:
        os.close(fd)


def _other_files(image: str, header: ImageHeader) -> "list[ImageFile]":
    """Return the data file and the extents of an image; QEMU opens them as raw files."""
    files = [_resolve(image, name, "extent", "raw") for name in header.extents]
    if header.data_file is not None:
        # QEMU takes this name as it stands, relative to its working directory and not to the image.
        files.append(_resolve("", header.data_file, "data-file", "raw"))
    return files


def _backing_file(image: str, header: ImageHeader) -> ImageFile:
    """Return the backing file of an image; its format is empty where QEMU would probe it."""
    return _resolve(image, header.backing or "", "backing", header.backing_format or "")


def _resolve(image: str, name: str, role: str, given_format: str) -> ImageFile:
    """Make a path of a name in a header, as QEMU does."""
    if name.startswith("json:"):
        return _resolve_json(name, role, given_format)
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        if protocol not in PROTOCOLS_OF_FILES:
            return ImageFile(name, "raw", role, unresolved=True)
        return ImageFile(rest, given_format, role)  # a relative one is relative to the working directory
    return ImageFile(os.path.join(os.path.dirname(image), name), given_format, role)


def _resolve_json(name: str, role: str, given_format: str) -> ImageFile:
    """Take the one file name out of a json: name, nested or with dotted keys."""
    import json  # 10 ms, and rare

    unresolved = ImageFile(name, "raw", role, unresolved=True)
    try:
        options = json.loads(name[len("json:") :])
        found = list(_file_names(options)) if isinstance(options, dict) else []
        path = _decode_name(os.fsencode(found[0])) if len(found) == 1 else None
    except (ValueError, RecursionError):
        return unresolved
    if path is None:
        return unresolved
    driver = given_format or options.get("driver", "")  # QEMU lets the header's format win
    return ImageFile(path, "raw" if driver in PROTOCOLS_OF_FILES else str(driver), role)


def _file_names(options: "dict[str, object]") -> "Iterator[str]":
    """Yield the values of `filename` members at any depth; json.loads has limited the depth."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _file_names(value)
        elif key.rpartition(".")[2] == "filename" and isinstance(value, str):
            yield value


def _read_qcow1(fd: int, size: int, head: bytes) -> ImageHeader:
    """Read the header of a qcow (version 1) image."""
    offset, length = struct.unpack_from(">QI", head, 8)
    return ImageHeader("qcow", _read_name(fd, size, offset, length))


def _read_qcow2(fd: int, size: int, head: bytes) -> ImageHeader:
    """Read the header of a qcow2 image, version 2 or 3."""
    version, offset, length, cluster_bits = struct.unpack_from(">IQII", head, 4)
    if version not in (2, 3) or not 9 <= cluster_bits <= 21:
        return ImageHeader("qcow2")
    features, header_length = (0, 72)
    if version == 3:
        features, header_length = struct.unpack_from(">Q20xI", head, 72)
    cluster = 1 << cluster_bits
    extensions = _read_extensions(fd, header_length, min(offset or cluster, cluster, size))
    return ImageHeader(
        "qcow2",
        backing=_read_name(fd, min(size, cluster), offset, length),
        backing_format=_decode_name(extensions.get(0xE2792ACA, b"")),
        data_file=_decode_name(extensions.get(0x44415441, b"")) if features & 4 else None,
    )


def _read_extensions(fd: int, start: int, end: int) -> "dict[int, bytes]":
    """Read the header extensions of a qcow2 image between two offsets: type, length, data padded to 8 bytes."""
    if not 72 <= start < end:
        return {}
    area = os.pread(fd, min(end - start, MAX_READ), start)
    extensions: dict[int, bytes] = {}
    at = 0
    while at + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, at)
        if kind == 0 or at + 8 + length > len(area):
            break
        extensions[kind] = area[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
    return extensions


def _read_qed(fd: int, size: int, head: bytes) -> ImageHeader:
    """Read the header of a QED image."""
    features = struct.unpack_from("<Q", head, 16)[0]
    offset, length = struct.unpack_from("<II", head, 56)
    if not features & 1:
        return ImageHeader("qed")
    return ImageHeader("qed", _read_name(fd, size, offset, length), "raw" if features & 4 else None)


def _is_descriptor(head: bytes) -> bool:
    """Tell whether a file begins as a VMDK descriptor: `version=` after comments and empty lines."""
    for line in head.split(b"\n"):
        if line.strip() and not line.startswith(b"#"):
            return line.strip() in (b"version=1", b"version=2", b"version=3")
    return False


def _read_vmdk(fd: int, size: int, head: bytes) -> ImageHeader:
    """Read the descriptor of a VMDK image; a sparse extent has it inside, and only itself as extent."""
    own_extent = False
    offset, length = 0, size
    if head.startswith(b"COWD"):
        return ImageHeader("vmdk")
    if head.startswith(b"KDMV"):
        if len(head) < 44:
            return RAW
        capacity, _, offset, length = (value * SECTOR for value in struct.unpack_from("<QQQQ", head, 12))
        own_extent = capacity != 0
    if offset >= size:
        return ImageHeader("vmdk")
    text = os.pread(fd, min(length, size - offset, MAX_READ), offset).partition(b"\0")[0]
    extents, parent = _parse_descriptor(text)
    return ImageHeader("vmdk", backing=parent, extents=() if own_extent else extents)


def _parse_descriptor(text: bytes) -> "tuple[tuple[str, ...], str | None]":
    """Find the extents and the parent in a VMDK descriptor."""
    extents = []
    parent = None
    for line in text.split(b"\n"):
        words = line.split(b'"')
        if len(words) < 3:
            continue
        name = _decode_name(words[1])
        if words[0].strip() == b"parentFileNameHint=":
            parent = parent or name
        elif name and line.startswith((b"RW ", b"RDONLY ")) and len(words[0].split()) == 3:
            extents.append(name)
    return tuple(extents), parent


def _read_name(fd: int, end: int, offset: int, length: int) -> "str | None":
    """Read a name; None if there is none, or if it does not end before `end`."""
    if not offset or not 0 < length <= MAX_NAME or offset + length > end:
        return None
    name = os.pread(fd, length, offset)
    return _decode_name(name) if len(name) == length else None


def _decode_name(name: bytes) -> "str | None":
    """Decode a name as a file name; None if it cannot be one."""
    return os.fsdecode(name) if 0 < len(name) <= MAX_NAME and b"\0" not in name else None
