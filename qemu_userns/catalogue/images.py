"""The block layer's language of file names: which host path a name leads to, if any. Pure.

Source: QEMU's docs/system/qemu-block-drivers.rst.inc, "Disk image file names"; a name has a protocol when a colon stands in
it before any slash.
"""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.buses import find_pci_directory
from qemu_userns.cmdline.objects import Object
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_PLAIN = ("file", "host_device", "host_cdrom")
# Options that stand before another name: fat:32:floppy:rw:DIR, blkdebug:CONFIG:IMAGE, blkverify:RAW:IMAGE
_FAT_FLAGS = ("floppy", "rw", "12", "16", "32")


# Members of a json:{...} name, at any depth.
_JSON_WAYS = (
    ("filename", ways.IMAGE),
    ("conf", ways.READ),
    ("config", ways.READ),
    ("server.path", ways.SOCKET),
    ("driver", ways.HOST_TREE),
    ("device", ways.VFIO),
)


class NamedPath(Record):
    """A host path within a block layer name."""

    path: str
    way: str
    start: int  # its span in the decoded name, so that it can be replaced there
    end: int
    in_json: bool = False


class Layer(Record):
    """The format layer above a file: which object spells it, and with which prefix of its keys."""

    obj: Object
    prefix: str  # "" or "backing." or the like

    @property
    def format(self) -> "str | None":
        """The format that the operator names, None when QEMU probes it."""
        return self.obj.get(f"{self.prefix}driver") or (None if self.prefix else self.obj.get("format"))


def find_layer(obj: Object, key: str, objects: "Iterable[Object]") -> "Layer | None":
    """Find the format layer of the file that a member names.

    Args:
        obj: the object that has the member.
        key: the member: "file" of -drive, "value" of -hda, "file.filename" at any depth, "filename" of a protocol node.
        objects: all of them, to find who refers to a protocol node by its node-name.

    Returns:
        None for a protocol node that nothing refers to.
    """
    if key.endswith("file.filename"):
        return Layer(obj, key.removesuffix("file.filename"))
    if key != "filename":
        return Layer(obj, "")
    node = obj.get("node-name")
    for other in objects:
        for member in other.members:
            if node and member.value == node and member.key.rpartition(".")[2] == "file":
                return Layer(other, member.key.removesuffix("file"))
    return None


def find_paths(name: str) -> "tuple[NamedPath, ...]":
    """Return the host paths that a block layer name leads to; none for names of fdsets, and of network protocols but ssh."""
    if name.startswith("json:"):
        return _find_json_paths(name)
    protocol, colon, rest = name.partition(":")
    start = len(protocol) + 1
    if not colon or "/" in protocol:
        return _path(name, ways.IMAGE, 0)
    if protocol in _PLAIN:
        return _path(rest, ways.IMAGE, start)
    if protocol == "fat":
        while rest.partition(":")[0] in _FAT_FLAGS:
            flag = rest.partition(":")[0]
            start += len(flag) + 1
            rest = rest[len(flag) + 1 :]
        writable = ":rw:" in name
        return _path(rest, ways.WRITE_DIRECTORY if writable else ways.DIRECTORY, start)
    if protocol in ("blkdebug", "blkverify"):
        first, _, image = rest.partition(":")
        way = ways.READ if protocol == "blkdebug" else ways.IMAGE
        found = _path(first, way, start) if first else ()
        start += len(first) + 1
        return (*found, *(part.replace(start=part.start + start, end=part.end + start) for part in find_paths(image)))
    if protocol == "ssh":
        return (NamedPath(name, ways.HOST_TREE, 0, len(name)),)
    if protocol == "nvme":  # nvme://ADDRESS/NAMESPACE
        device = find_pci_directory(rest.removeprefix("//").partition("/")[0])
        return () if device is None else (NamedPath(device, ways.VFIO, 0, len(name)),)
    return _find_config(name) if protocol == "rbd" else _find_socket(name, protocol)


def _path(path: str, way: str, start: int) -> "tuple[NamedPath, ...]":
    """Return one path, but for names that QEMU itself resolves."""
    if not path or path.startswith("/dev/fdset/"):
        return ()
    return (NamedPath(path, way, start, start + len(path)),)


def _find_socket(name: str, protocol: str) -> "tuple[NamedPath, ...]":
    """Return the unix socket of nbd:unix:PATH[:exportname=...] or nbd+unix:///EXPORT?socket=PATH."""
    if protocol == "nbd" and name.startswith("nbd:unix:"):
        start = len("nbd:unix:")
        return _path(name[start:].partition(":")[0], ways.SOCKET, start)
    if protocol.endswith("+unix") and "socket=" in name:
        start = name.index("socket=") + len("socket=")
        return _path(name[start:].partition("&")[0], ways.SOCKET, start)
    return ()


def _find_config(name: str) -> "tuple[NamedPath, ...]":
    """Return the configuration file of rbd:POOL/IMAGE:KEY=VALUE:..., in which a backslash takes a colon its meaning."""
    start = len("rbd:")
    for option in _split_rbd(name[start:]):
        if option.startswith("conf="):
            path = option.removeprefix("conf=")
            begin = start + len("conf=")
            return tuple(
                part.replace(path=path.replace("\\:", ":").replace("\\\\", "\\")) for part in _path(path, ways.READ, begin)
            )
        start += len(option) + 1
    return ()


def _split_rbd(text: str) -> "list[str]":
    """Split at the colons that no backslash stands before; block/rbd.c, qemu_rbd_next_tok()."""
    parts, begin, index = [], 0, 0
    while index < len(text):
        if text[index] == ":":
            parts.append(text[begin:index])
            begin = index + 1
        index += 2 if text[index] == "\\" else 1
    return [*parts, text[begin:]]


def _find_json_paths(name: str) -> "tuple[NamedPath, ...]":
    """Return the paths of a json:{...} name."""
    from qemu_userns.cmdline import json

    start = len("json:")
    try:
        members, _ = json.parse_json(name[start:])
    except json.JsonError:
        return ()
    found = (
        (member, way, _read_json_value(member.value, way))
        for member in members
        for end, way in _JSON_WAYS
        if f".{member.key}".endswith(f".{end}")
    )
    return tuple(
        NamedPath(path, way, member.start + start, member.end + start, in_json=True)
        for member, way, path in found
        if path is not None
    )


def _read_json_value(value: str, way: str) -> "str | None":
    """Return what a member of a json:{...} name leads to, None for nothing of the host's."""
    if way == ways.HOST_TREE:
        return value if value == "ssh" else None
    if way == ways.VFIO:
        return find_pci_directory(value)
    return None if value.startswith("/dev/fdset/") else value
