"""Which object of QEMU's holds what a command handed over, and when that object is gone. Pure.

An owner is a kind and a name. The name "" stands for what has none: it holds what it has until QEMU ends, or until the same
command replaces it. A command may both remove and make an owner: what was held before goes once it has succeeded.
"""

from qemu_userns.catalogue.commands import HMP, TRANSACTION
from qemu_userns.cmdline.hmp import parse_hmp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Owner = tuple[str, str]

# Command -> kind of the owner, and the arguments that may name it, the first one that is there.
_MAKES: "dict[str, tuple[str, tuple[str, ...]]]" = {
    "blockdev-add": ("blockdev", ("node-name",)),
    "blockdev-snapshot-sync": ("blockdev", ("snapshot-node-name",)),
    "netdev_add": ("netdev", ("id",)),
    "object-add": ("object", ("id",)),
    "device_add": ("device", ("id",)),
    "chardev-add": ("chardev", ("id",)),
    "chardev-change": ("chardev", ("id",)),
    "blockdev-change-medium": ("medium", ("id", "device")),
    "blockdev-create": ("job", ("job-id",)),
    "drive-backup": ("job", ("job-id", "device")),
    "drive-mirror": ("mirror", ("job-id", "device")),
    "block-export-add": ("export", ("id",)),
    "nbd-server-start": ("nbd-server", ()),
    "display-update": ("display", ("type",)),
    "migrate": ("migration", ()),
    "migrate-incoming": ("migration", ()),
    "migrate-recover": ("recovery", ()),
    "migrate-set-parameters": ("parameters", ()),
    "qom-set": ("property", ()),
    # HMP only
    "drive": ("drive", ("id",)),
    "gdbserver": ("gdbserver", ()),
    "logfile": ("logfile", ()),
    "trace-file": ("trace-file", ()),
    "wavcapture": ("capture", ()),
}
_REMOVES: "dict[str, tuple[str, tuple[str, ...]]]" = {
    "blockdev-del": ("blockdev", ("node-name",)),
    "x-blockdev-del": ("blockdev", ("node-name",)),
    "netdev_del": ("netdev", ("id",)),
    "object-del": ("object", ("id",)),
    "chardev-remove": ("chardev", ("id",)),
    "eject": ("medium", ("id", "device")),
    "blockdev-remove-medium": ("medium", ("id", "device")),
    "nbd-server-stop": ("nbd-server", ()),
    "drive_del": ("drive", ("id",)),
    # What they had before, they have no more.
    **{name: _MAKES[name] for name in ("blockdev-change-medium", "chardev-change", "display-update", "migrate", "gdbserver")},
    **{name: _MAKES[name] for name in ("logfile", "trace-file")},
}
_KIND_TO_COMMAND = {
    "blockdev": "blockdev-add",
    "netdev": "netdev_add",
    "object": "object-add",
    "device": "device_add",
    "chardev": "chardev-add",
}
# A mirror that has ended well is the disk from then on.
_JOBS_THAT_LET_GO = ("backup", "create")
_ENDS_OF_MIGRATION = ("completed", "failed", "cancelled")


def owner_of(name: str, arguments: "Mapping[str, object]") -> "Owner | None":
    """Return the owner of what a command names, None for a command that needs it no more once it has been answered."""
    if name == TRANSACTION:
        owners = [owner for owner in (owner_of(*action) for action in _find_actions(arguments)) if owner is not None]
        return owners[0] if len(owners) == 1 else ("transaction", "") if owners else None
    if name in ("blockdev-reopen", "x-blockdev-reopen"):
        nodes = arguments.get("options", arguments)
        named = [node for node in (nodes if isinstance(nodes, list) else [nodes]) if isinstance(node, dict)]
        return ("blockdev", _find_name(named[0], ("node-name",)) if len(named) == 1 else "")
    if name == HMP:
        name, arguments = _read_hmp(arguments)
    return _find(_MAKES, name, arguments)


def removed_by(name: str, arguments: "Mapping[str, object]") -> "Owner | None":
    """Return the owner that is gone once a command has succeeded."""
    if name == HMP:
        name, arguments = _read_hmp(arguments)
    owner = _find(_REMOVES, name, arguments)
    return None if owner is not None and not owner[1] and _REMOVES[name][1] else owner


def removed_by_event(name: str, data: "Mapping[str, object]") -> "Owner | None":
    """Return the owner that an event says is gone."""
    device, status = _find_name(data, ("device",)), _find_name(data, ("status",))
    owner = None
    if name == "DEVICE_DELETED":
        owner = ("device", device)
    elif name == "BLOCK_EXPORT_DELETED":
        owner = ("export", _find_name(data, ("id",)))
    elif name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and data.get("type") in _JOBS_THAT_LET_GO:
        owner = ("job", device)
    elif name == "BLOCK_JOB_CANCELLED" and data.get("type") == "mirror":
        owner = ("mirror", device)
    elif name == "JOB_STATUS_CHANGE" and status == "concluded":
        owner = ("job", _find_name(data, ("id",)))
    elif name == "MIGRATION" and status in _ENDS_OF_MIGRATION:
        return ("migration", "")
    return owner if owner is not None and owner[1] else None


def _find(table: "Mapping[str, tuple[str, tuple[str, ...]]]", name: str, arguments: "Mapping[str, object]") -> "Owner | None":
    if name not in table:
        return None
    kind, keys = table[name]
    return (kind, _find_name(arguments, keys))


def _find_name(arguments: "Mapping[str, object]", keys: "tuple[str, ...]") -> str:
    """Return the first argument that is there, "" if none is a name."""
    for key in keys:
        value = arguments.get(key)
        if isinstance(value, str):
            return value
    return ""


def _find_actions(arguments: "Mapping[str, object]") -> "list[tuple[str, Mapping[str, object]]]":
    """Return name and arguments of each action of a transaction."""
    actions = arguments.get("actions")
    found = [action for action in actions if isinstance(action, dict)] if isinstance(actions, list) else []
    return [(str(action.get("type")), data) for action in found if isinstance(data := action.get("data"), dict)]


def _read_hmp(arguments: "Mapping[str, object]") -> "tuple[str, Mapping[str, object]]":
    """Return the QMP twin of an HMP command, and its arguments."""
    line = parse_hmp(_find_name(arguments, ("command-line",)))
    if line is None:
        return "", {}
    obj = line.find_object()
    name = "chardev-change" if line.name == "chardev-change" else _KIND_TO_COMMAND.get(obj.kind, obj.kind)
    return name, {member.key: member.value for member in reversed(obj.members)}
