"""Read QMP commands with the catalogue: what they name of the host, and which object will hold that. Pure.

A command gives the same objects as the command line, in the same kinds and keys, so that one table serves both. The members
point into the command's own text; those of an HMP command into the words of its line (cmdline/hmp.py), numbered from 1.
"""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.command_rows import COMMAND_ROWS
from qemu_userns.catalogue.needs import find_object_needs, index_rows
from qemu_userns.cmdline.hmp import parse_hmp
from qemu_userns.cmdline.json import JsonError, find_characters, parse_json
from qemu_userns.cmdline.objects import Object
from qemu_userns.cmdline.source import Member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qemu_userns.catalogue.needs import Need

HMP = "human-monitor-command"
TRANSACTION = "transaction"
# Commands that make an object of the command line's.
_KINDS = {
    "blockdev-add": "blockdev",
    "netdev_add": "netdev",
    "object-add": "object",
    "device_add": "device",
    "chardev-add": "chardev",
    "chardev-change": "chardev",
}
_REOPEN = ("blockdev-reopen", "x-blockdev-reopen")
# What -chardev calls the members of QAPI's character devices.
_CHARDEV_KEYS = {"out": "path", "in": "input-path", "device": "path", "addr.str": "fd", "addr.path": "path"}
_TABLE = index_rows(COMMAND_ROWS)
_WITH_FD_NAMES = frozenset(
    (
        *_KINDS,
        *("blockdev-reopen", "blockdev-create", "nbd-server-start", "block-export-add", "display-update"),
        *("migrate", "migrate-incoming", "migrate-recover", "dump-guest-memory", "add_client", "getfd", "closefd"),
    )
)


def read_command(name: str, text: str) -> "tuple[Object, ...]":
    """Return the objects that a command names or makes; none if QEMU will refuse the text.

    Args:
        name: the command.
        text: all of its JSON.
    """
    try:
        members, _ = parse_json(text)
    except JsonError:
        return ()
    if name == HMP:
        return _read_hmp(members)
    return tuple(_read(name, _strip(members, "arguments.")))


def find_command_needs(name: str, objects: "Iterable[Object]") -> "tuple[Need, ...]":
    """Return what the objects of a command need of the host."""
    return tuple(need.replace(command=name) for obj in objects for need in find_object_needs(obj, _TABLE))


def find_hmp_line(text: str) -> "Member | None":
    """Return the member of an HMP command that is the line itself."""
    members, _ = parse_json(text)
    return next((member for member in members if member.key == "arguments.command-line"), None)


def fd_names(name: str, text: str) -> "tuple[tuple[int, int, str], ...]":
    """Return where a command refers to fds by the names that getfd gave them, getfd itself included: start, end and name.

    The span is inside of the quotes. HMP commands have none: QEMU looks their names up in a monitor of their own, which has none.
    """
    if name not in _WITH_FD_NAMES:
        return ()
    found = []
    for need in find_command_needs(name, read_command(name, text)):
        member = need.member
        if need.way not in (ways.FD, ways.NAME) or member is None or text[member.start] not in "\"'":
            continue
        if not need.path or need.path[0] in "0123456789":
            continue
        places = find_characters(text, member.start)
        start, end = (0, len(member.value)) if need.part is None else (need.part.start, need.part.end)
        found.append((places[start], places[end], need.path))
    return tuple(found)


def _read_hmp(members: "Iterable[Member]") -> "tuple[Object, ...]":
    """Return the object of an HMP command, for which a QMP monitor has one command of its own."""
    for member in members:
        line = parse_hmp(member.value) if member.key == "arguments.command-line" else None
        if line is not None:
            obj = line.find_object()
            # There the word is no file name but asks for a password.
            return () if obj.kind == "blockdev-change-medium" and obj.get("device") == "vnc" else (obj,)
    return ()


def _read(name: str, members: "tuple[Member, ...]") -> "Iterator[Object]":
    """Yield the objects of a command, or of an action of a transaction, from its arguments."""
    kind = _KINDS.get(name, name)
    if name == TRANSACTION:
        for action in _split(members, "actions."):
            kinds = [member.value for member in action if member.key == "type"]
            yield from _read(kinds[0] if kinds else "", _strip(action, "data."))
        return
    if name in _REOPEN:
        nodes = tuple(_split(members, "options.")) if name == _REOPEN[0] else (members,)
        yield from (_make("blockdev", node) for node in nodes)
        return
    if name == "nbd-server-start":
        members = tuple(member.replace(key=_unwrap(member.key)) for member in members)
    elif kind == "chardev":
        members = _rename_chardev(members)
    elif name == "blockdev-change-medium":
        members = tuple(_rename_medium(member) for member in members)
    yield _make(kind, members)
    if name == "blockdev-create":
        # A format's file may be given as the options of a node, in place of its name.
        yield _make("blockdev", tuple(member for member in _strip(members, "options.") if "." in member.key))


def _make(kind: str, members: "tuple[Member, ...]") -> Object:
    """Return an object; what is added to it comes behind the last scalar of its own."""
    named = next((member.value for member in members if member.key == "id"), None)
    end = max((member.end for member in members if "." not in member.key), default=0)
    return Object(kind, named, members, 0, 0, end + 1, "json", 0)


def _strip(members: "Iterable[Member]", prefix: str) -> "tuple[Member, ...]":
    """Return the members below a prefix, without it."""
    return tuple(member.replace(key=member.key[len(prefix) :]) for member in members if member.key.startswith(prefix))


def _split(members: "Iterable[Member]", prefix: str) -> "Iterator[tuple[Member, ...]]":
    """Yield the members of each item of a list."""
    items: "dict[str, list[Member]]" = {}
    for member in _strip(members, prefix):
        number, _, key = member.key.partition(".")
        items.setdefault(number, []).append(member.replace(key=key))
    yield from (tuple(item) for item in items.values())


def _unwrap(key: str) -> str:
    """Return a key without the "data" in which QAPI wraps the members of an old union."""
    return ".".join(part for part in key.split(".") if part != "data")


def _rename_chardev(members: "tuple[Member, ...]") -> "tuple[Member, ...]":
    """Give the members of a QAPI character device their names in -chardev; a socket is a server there unless it says no."""
    renamed = []
    for member in members:
        outer, _, key = member.key.partition("backend.")
        if key == "type":
            key = "backend"
        elif key != "data.type":  # a SPICE channel's
            key = _unwrap(key)
            key = _CHARDEV_KEYS.get(key, key)
            key = key if key == "addr.type" else key.removeprefix("addr.")
        renamed.append(member.replace(key=outer or key))
    keys = {member.key: member.value for member in renamed}
    if keys.get("backend") == "socket" and "server" not in keys:
        renamed.append(Member("server", "on", 0, 0, 0, "json"))
    return tuple(renamed)


def _rename_medium(member: Member) -> Member:
    """Call the file what -drive calls it, since it is a name in the block layer's language."""
    if member.key == "filename":
        return member.replace(key="file")
    if member.key == "read-only-mode" and member.value == "read-only":
        return member.replace(key="read-only", value="on")
    return member
