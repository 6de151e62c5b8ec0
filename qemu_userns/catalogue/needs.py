"""Read the objects of a command line with the catalogue: what they need of the host. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.images import NamedPath, find_paths
from qemu_userns.catalogue.rows import ROWS, Row
from qemu_userns.cmdline.chardev import LegacyChardev, parse_legacy
from qemu_userns.cmdline.objects import Object, as_switch
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.cmdline.source import Member


class Need(Record):
    """One thing of the host that one member of one object names."""

    way: str
    path: str  # as the command line spells it, decoded; for fds the number, for accelerators the name
    obj: Object
    member: "Member | None"
    row: Row
    part: "NamedPath | None" = None  # IMAGE: where in the member's value the path stands
    legacy: "LegacyChardev | None" = None  # the member is a character device in the old one-word language

    def describe(self) -> str:
        """Name the word that asks: "-drive file", or "-kernel"."""
        key = "" if self.member is None or self.member.key == "value" else f" {self.member.key}"
        return f"-{self.obj.kind or 'disk'}{key}"


_ROWS_BY_KIND: "dict[str, list[Row]]" = {}
for _row in ROWS:
    _ROWS_BY_KIND.setdefault(_row.kind, []).append(_row)


def find_needs(commandline: "CommandLine") -> "tuple[Need, ...]":
    """Return the needs of all objects, in their order, and of options without a value."""
    needs = [need for obj in commandline.objects for need in _find_object_needs(obj)]
    for index, option in enumerate(commandline.options):
        if option.value_index is None and option.name in _ROWS_BY_KIND:
            flag = Object(option.name, None, (), option.index, 0, 0, "word", index)
            row = find_row(flag, "")
            if row is not None:
                needs.append(Need(row.way, "", flag, None, row))
    return tuple(needs)


def find_row(obj: Object, key: str) -> "Row | None":
    """Return the first row that applies to a member of an object."""
    rows: "list[Row]" = _ROWS_BY_KIND.get(obj.kind, []) + _ROWS_BY_KIND["*"]
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


def _find_object_needs(obj: Object) -> "Iterator[Need]":
    """Yield what one object needs; of a member that is given twice, the last one counts."""
    for key in dict.fromkeys(member.key for member in obj.members):
        row = find_row(obj, key)
        member = obj.find(key)
        if row is not None and member is not None:
            yield from _expand(Need(row.way, member.value, obj, member, row))


def _expand(need: Need) -> "Iterator[Need]":
    """Split a need whose value names several things, or names them in a language of its own."""
    match need.way:
        case ways.IMAGE if need.member is not None and need.member.key.rpartition(".")[2] == "filename":
            if not need.path.startswith("/dev/fdset/"):  # a protocol node's own name, in which a colon means nothing
                yield need
        case ways.IMAGE:
            for part in find_paths(need.path):
                yield need.replace(way=part.way, path=part.path, part=part)
        case ways.READ_LIST:
            yield from (need.replace(way=ways.READ, path=path) for path in need.path.split(":") if path)
        case ways.FDS:
            yield from (need.replace(way=ways.FD, path=number) for number in need.path.split(":"))
        case ways.KVM:
            yield from (need for name in need.path.split(":") if name == "kvm")
        case ways.VNC:
            if need.path.startswith("unix:"):
                yield need.replace(way=ways.MADE, path=need.path[len("unix:") :])
        case ways.INCOMING:
            yield from _expand_incoming(need)
        case ways.CHARDEV:
            yield from _expand_chardev(need)
        case _:
            if need.path:
                yield need


def _expand_incoming(need: Need) -> "Iterator[Need]":
    """Split a migration address."""
    scheme, _, rest = need.path.partition(":")
    way = {"unix": ways.MADE, "fd": ways.FD, "file": ways.READ}.get(scheme)
    if way is not None:
        yield need.replace(way=way, path=rest.partition(",")[0] if scheme == "file" else rest)


def _expand_chardev(need: Need) -> "Iterator[Need]":
    """Read a character device in the old language as the -chardev that it stands for."""
    legacy = parse_legacy(need.path)
    if legacy is None or need.member is None:
        return
    members = tuple(need.member.replace(key=key, value=value) for key, value in (("backend", legacy.backend), *legacy.members))
    chardev = need.obj.replace(kind="chardev", members=members)
    for inner in _find_object_needs(chardev):
        yield inner.replace(obj=need.obj, member=need.member, legacy=legacy)
