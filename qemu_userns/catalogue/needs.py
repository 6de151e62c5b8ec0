"""Read the objects of a command line with the catalogue: what they need of the host. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.buses import find_pci_directory, find_usb_node
from qemu_userns.catalogue.images import NamedPath, find_paths
from qemu_userns.catalogue.rows import ANY_ENTRY, ROWS, SSH, Row
from qemu_userns.cmdline.chardev import LegacyChardev, parse_legacy
from qemu_userns.cmdline.objects import Object, as_switch
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.cmdline.source import Member

    Table = Mapping[str, list[Row]]


# Members that say what kind of thing an object is.
_KINDS = ("driver", "qom-type", "type", "accel")


class Need(Record):
    """One thing of the host that one member of one object names."""

    way: str
    path: str  # as the command line spells it, decoded; for fds the number, for accelerators the name
    obj: Object
    member: "Member | None"
    row: Row
    part: "NamedPath | None" = None  # where in the member's value it stands, if it is not all of it
    legacy: "LegacyChardev | None" = None  # the member is a character device in the old one-word language
    command: str = ""  # the QMP command, if it is none of the command line's

    def describe(self) -> str:
        """Name the word that asks: "-drive file", "-kernel", "-device vhost-vsock-pci", or "blockdev-add filename"."""
        word = self.command or f"-{self.obj.kind}"
        if self.member is None or (self.member.key == "value" and not self.command):
            return word
        return f"{word} {self.member.value if self.member.key in _KINDS else self.member.key}"

    @property
    def listens(self) -> bool:
        """Whether a socket is the server's end."""
        return as_switch(self._get("server")) == "on"

    @property
    def reconnects(self) -> bool:
        """Whether a socket that is connected to may be made later, or anew."""
        return any(self._get(key) not in ("", "0") for key in ("reconnect", "reconnect-ms"))

    def _get(self, key: str) -> str:
        """Return a member of the character device that this need stands for."""
        return (self.obj if self.legacy is None else self.legacy).get(key) or ""

    def find_entries(self, names: "Iterable[str]") -> "tuple[str, ...]":
        """Return the paths of those entries of the directory, out of `names`, that QEMU looks for."""
        wanted = self.row.entries
        return tuple(f"{self.path}/{name}" for name in names if ANY_ENTRY in wanted or name in wanted)


def names_tap(need: Need) -> bool:
    """Tell whether a need is an fd of a tap."""
    return need.way == ways.FD and need.obj.get("type") == "tap" and need.member is not None and need.member.key in ("fd", "fds")


# Where QEMU looks below a -L directory too; system/datadir.c.
_DATA_FOLDERS = ("keymaps", "dtb")

# What the schemes of an address lead to.
_SCHEMES = {
    ways.INCOMING: {"unix": ways.MADE, "fd": ways.FD, "file": ways.READ, "exec": ways.RUN},
    ways.MIGRATE: {"unix": ways.SOCKET, "fd": ways.FD, "file": ways.WRITE, "exec": ways.RUN},
    ways.DUMP: {"fd": ways.FD, "file": ways.WRITE},
    ways.VNC: {"unix": ways.DISPLAY},
    ways.EXPORT: {"unix": ways.MADE},
}


def index_rows(rows: "Iterable[Row]") -> "Table":
    """Return rows by the kind of object that they are about."""
    table: "dict[str, list[Row]]" = {}
    for row in rows:
        table.setdefault(row.kind, []).append(row)
    return table


_TABLE = index_rows(ROWS)
_LOGS_OF_QTEST = tuple(row for row in ROWS if (row.kind, row.key) in (("qtest-log", "value"), ("object", "log")))


def find_needs(commandline: "CommandLine") -> "tuple[Need, ...]":
    """Return the needs of all objects, in their order, and of options without a value."""
    needs = [need for obj in commandline.objects for need in find_object_needs(obj)]
    for index, option in enumerate(commandline.options):
        if option.value_index is None and option.name in _TABLE:
            flag = Object(option.name, None, (), option.index, 0, 0, "word", index)
            row = find_row(flag, "")
            if row is not None:
                needs.append(Need(row.way, "", flag, None, row))
    return tuple(needs)


def find_row(obj: Object, key: str, table: "Table" = _TABLE) -> "Row | None":
    """Return the first row that applies to a member of an object."""
    rows: "tuple[Row, ...]" = (*table.get(obj.kind, ()), *table["*"])
    for row in rows:
        outer = _match(row.key, key)
        if outer is not None and all((as_switch(obj.get(outer + name)) or "") in values for name, values in row.when):
            return row
    return None


def _match(pattern: str, key: str) -> "str | None":
    """Return what precedes the pattern in a key ("" or "file." or the like), None if it does not match."""
    if not pattern.startswith("**."):
        return "" if key == pattern else None
    inner = pattern[len("**.") :]
    if key == inner:
        return ""
    return key.removesuffix(inner) if key.endswith(f".{inner}") else None


def find_object_needs(obj: Object, table: "Table" = _TABLE) -> "Iterator[Need]":
    """Yield what one object needs; of a member that is given twice, the last one counts, but for lists."""
    for key in dict.fromkeys(member.key for member in obj.members):
        row = find_row(obj, key, table)
        if row is None and "." in key:
            row = find_row(obj, _name_lists(key), table)
        if row is None:
            continue
        found = obj.find_all(key)
        for member in found if row.way == ways.FORWARD else found[-1:]:
            yield from _expand(Need(row.way, row.node or member.value, obj, member, row))


def _name_lists(key: str) -> str:
    """Return a key as rows spell it that are about all elements of a list."""
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))


def _expand(need: Need) -> "Iterator[Need]":
    """Split a need whose value names several things, or names them in a language of its own."""
    if need.path.startswith("/dev/fdset/"):  # nothing of the host's: QEMU looks in the sets that -add-fd and add-fd made
        return
    match need.way:
        case ways.IMAGE if need.member is not None and need.member.key.rpartition(".")[2] == "filename":
            yield need  # a protocol node's own name, in which a colon means nothing
        case ways.IMAGE:
            for part in find_paths(need.path):
                row = SSH if part.way == ways.HOST_TREE else need.row
                yield need.replace(way=part.way, path=part.path, part=part, row=row)
        case ways.NEW_IMAGE:
            for part in find_paths(need.path):
                row = SSH if part.way == ways.HOST_TREE else need.row
                way = ways.WRITE if part.way == ways.IMAGE else part.way
                yield need.replace(way=way, path=part.path, part=part, row=row)
        case ways.DIRECTORY if need.obj.kind == "L":
            if need.path != "help":
                yield from (need, *(need.replace(path=f"{need.path}/{name}") for name in _DATA_FOLDERS))
        case ways.READ_LIST:
            yield from (need.replace(way=ways.READ, path=path) for path in need.path.split(":") if path)
        case ways.FDS:
            yield from _expand_list(need)
        case ways.KVM:
            yield from (need for name in need.path.split(":") if name == "kvm")
        case ways.INCOMING | ways.MIGRATE | ways.DUMP | ways.VNC | ways.EXPORT:
            yield from _expand_address(need)
        case ways.CHARDEV:
            yield from _expand_chardev(need)
        case ways.FORWARD:
            yield from _expand_forward(need)
        case ways.USB:
            path = find_usb_node(need.obj)
            if path is not None:
                yield need.replace(path=path)
        case ways.VFIO if need.member is not None and need.member.key.rpartition(".")[2] in ("host", "device"):
            path = find_pci_directory(need.path)
            if path is not None:
                yield need.replace(path=path)
        case ways.WRITE if need.path == "none" and need.row in _LOGS_OF_QTEST:
            return  # softmmu/qtest.c: no file
        case _:
            if need.path:
                yield need


def _expand_list(need: Need) -> "Iterator[Need]":
    """Split a list of fds."""
    start = 0
    for name in need.path.split(":"):
        yield need.replace(way=ways.FD, path=name, part=NamedPath(name, ways.FD, start, start + len(name)))
        start += len(name) + 1


def _expand_address(need: Need) -> "Iterator[Need]":
    """Read an address that begins with a scheme: of a migration, a dump, a display."""
    scheme, colon, rest = need.path.partition(":")
    way = _SCHEMES[need.way].get(scheme)
    if way is None or not colon or not rest:
        return
    path, offset, _ = rest.partition(",offset=") if scheme == "file" and need.way != ways.DUMP else (rest, "", "")
    if offset and way == ways.WRITE:
        way = ways.APPEND
    start = len(scheme) + 1
    yield need.replace(way=way, path=path, part=NamedPath(path, way, start, start + len(path)))


def _expand_chardev(need: Need) -> "Iterator[Need]":
    """Read a character device in the old language as the -chardev that it stands for."""
    legacy = parse_legacy(need.path)
    if legacy is None or need.member is None:
        return
    members = tuple(need.member.replace(key=key, value=value) for key, value in (("backend", legacy.backend), *legacy.members))
    chardev = need.obj.replace(kind="chardev", members=members)
    for inner in find_object_needs(chardev):
        yield inner.replace(obj=need.obj, member=need.member, legacy=legacy)


def _expand_forward(need: Need) -> "Iterator[Need]":
    """Read a forwarding rule of a user network: ADDRESS-cmd:PROGRAM or ADDRESS-CHARDEV to the host, unix:PATH-ADDRESS from it.

    Source: net/slirp.c, slirp_guestfwd() and, since QEMU 10.2, slirp_hostfwd().
    """
    if need.member is not None and need.member.key.startswith("hostfwd"):
        path, _, _ = need.path.removeprefix("unix:").rpartition("-")
        if path and need.path.startswith("unix:"):
            yield need.replace(way=ways.MADE, path=path)
        return
    _, _, target = need.path.partition("-")
    program = target.removeprefix("cmd:").split(maxsplit=1)[:1]
    if target.startswith("cmd:"):
        yield from (need.replace(way=ways.READ, path=word) for word in program if word.startswith("/"))
        return
    legacy = parse_legacy(target)
    if legacy is not None and legacy.backend == "socket" and legacy.get("path"):
        way = ways.MADE if as_switch(legacy.get("server")) == "on" else ways.SOCKET
        yield need.replace(way=way, path=legacy.get("path"))
