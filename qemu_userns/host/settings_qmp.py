"""Read and check the settings about QMP monitors; off the launch path where there are none.

As a string, for the cache and for `-userns`, a table [[qmp.socket]] or [[qmp.monitor]] is a QemuOpts list in which the key of a
list is repeated:
`path=/run/vm.qmp,access=read-only,allow=stop,allow=cont`.
"""

import pwd

from qemu_userns.cmdline.opts import parse_opts
from qemu_userns.errors import UsageError
from qemu_userns.host.subids import END_OF_IDS
from qemu_userns.plan.rights import EVERY_MONITOR, FULL, READ_ONLY, MonitorRights, Rights, SocketRights

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.host.config import Config

SOCKET, MONITOR = "qmp.socket", "qmp.monitor"
TABLES = (SOCKET, MONITOR)
_RIGHTS = {"access": str, "allow": list, "deny": list, "users": list}
_KEYS = {SOCKET: {"path": str, "mode": str, **_RIGHTS}, MONITOR: {"name": str, **_RIGHTS}}
_LARGEST_MODE = 0o777


def encode_tables(document: object, where: str) -> "dict[str, list[str]]":
    """Return the strings of what is under the key `qmp` of a TOML document.

    Raises:
        UsageError: a key is unknown, or its value of a wrong type.
    """
    if not isinstance(document, dict):
        raise UsageError(f"{where}: qmp", "is not a table", "write [[qmp.socket]] and [[qmp.monitor]]")
    settings = {}
    for name, tables in document.items():
        key = f"qmp.{name}"
        if key not in TABLES:
            raise UsageError(f"{where}: {key}", "there is no such setting", f"known are {', '.join(TABLES)}")
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise UsageError(f"{where}: {key}", "is not a list of tables", f"write [[{key}]]")
        settings[key] = [_encode_table(table, key, where) for table in tables]
    return settings


def _encode_table(table: "Mapping[str, object]", kind: str, where: str) -> str:
    """Return one table as a string; raises UsageError."""
    pairs: "list[str]" = []
    for key, value in table.items():
        what = f"{where}: {kind}.{key}"
        wanted = _KEYS[kind].get(key)
        if wanted is None:
            raise _unknown(kind, what)
        if type(value) is not wanted:
            raise UsageError(what, f"is not a {wanted.__name__}", "correct its type")
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UsageError(what, "is an empty list", "leave it out, or name what it shall hold")
        for item in values:
            if not (isinstance(item, str) or (key == "users" and type(item) is int)):
                raise UsageError(what, "is not a list of str", "correct its type")
            pairs.append(f"{key}={str(item).replace(',', ',,')}")
    return ",".join(pairs)


def apply_qmp(config: "Config", settings: "Mapping[str, list[str]]", where: str) -> "Config":
    """Return the settings with those of one place that are about monitors; raises UsageError."""
    if SOCKET in settings:
        tables = [_split(value, SOCKET, where) for value in settings[SOCKET]]
        config = config.replace(sockets=tuple(_parse_socket(table, f"{where}: {SOCKET}") for table in tables))
    if MONITOR in settings:
        tables = [_split(value, MONITOR, where) for value in settings[MONITOR]]
        config = config.replace(monitors=tuple(_parse_monitor(table, f"{where}: {MONITOR}") for table in tables))
    if "passthrough" in settings:
        config = config.replace(passthrough=_parse_place(settings["passthrough"][0], f"{where}: passthrough"))
    added = tuple(SocketRights(_parse_place(path, f"{where}: qmp")) for path in settings.get("qmp", ()))
    return config.replace(sockets=(*config.sockets, *added))


def _parse_place(text: str, what: str) -> str:
    """Check the path of a socket; raises UsageError."""
    if not text.startswith("/") or text.endswith("/") or "\0" in text:
        raise UsageError(what, f"'{text}' is not an absolute path of a socket", "name the socket from / on")
    rest = text.replace("%%", "").replace("%n", "").replace("%u", "")
    if "%" in rest:
        raise UsageError(what, f"'{text}' has a % that means nothing", "%n is the VM's name, %u its uuid, %% a percent sign")
    return text


def _split(value: str, kind: str, where: str) -> "dict[str, list[str]]":
    """Return the members of a table, each with its values; raises UsageError."""
    found: "dict[str, list[str]]" = {}
    for member in parse_opts(value):
        if member.key not in _KEYS[kind]:
            raise _unknown(kind, f"{where}: {kind}.{member.key}")
        values = found.setdefault(member.key, [])
        if _KEYS[kind][member.key] is not list:
            values.clear()  # the last one counts, as in QEMU
        values.append(member.value)
    return found


def _parse_socket(table: "dict[str, list[str]]", what: str) -> SocketRights:
    """Parse a socket of ours; raises UsageError."""
    if "path" not in table:
        raise UsageError(what, "has no path", 'add path = "/run/..."')
    text = table.get("mode", ["0600"])[0]
    if not (text.isascii() and text.isdecimal()) or set(text) & {"8", "9"} or int(text, 8) > _LARGEST_MODE:
        raise UsageError(f"{what}.mode", f"'{text}' is no mode", 'write permission bits in octal, e.g. "0660"')
    return SocketRights(_parse_place(table["path"][0], f"{what}.path"), _parse_rights(table, what), int(text, 8))


def _parse_monitor(table: "dict[str, list[str]]", what: str) -> MonitorRights:
    """Parse the rights of a monitor of the caller's; raises UsageError."""
    name = table.get("name", [""])[0]
    if not name:
        raise UsageError(what, "has no name", f'add name = "LABEL", the id of a -chardev, or "{EVERY_MONITOR}"')
    return MonitorRights(name, _parse_rights(table, what))


def _parse_rights(table: "dict[str, list[str]]", what: str) -> Rights:
    """Parse what both tables have; raises UsageError."""
    access = table.get("access", [FULL])[0]
    if access not in (FULL, READ_ONLY):
        raise UsageError(f"{what}.access", f"'{access}' is not a choice", f"choose from {FULL}, {READ_ONLY}")
    for key in ("allow", "deny"):
        for name in table.get(key, ()):
            word = name.removesuffix("*").replace("-", "").replace("_", "").replace(".", "")
            if not name or (word and not (word.isascii() and word.isalnum())):
                raise UsageError(f"{what}.{key}", f"'{name}' is no QMP command", "name commands, e.g. query-status or query-*")
    users = tuple(dict.fromkeys(find_uid(user, f"{what}.users") for user in table.get("users", ())))
    return Rights(access, tuple(table.get("allow", ())), tuple(table.get("deny", ())), users)


def find_uid(text: str, what: str) -> int:
    """Return the uid of a user that is given by name or uid; raises UsageError."""
    if text.isascii() and text.isdecimal() and int(text) < END_OF_IDS:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):  # ValueError: NUL, or not to be encoded
        raise UsageError(what, f"there is no user '{text}'", "name users that `getent passwd` lists, or give uids") from None


def _unknown(kind: str, what: str) -> UsageError:
    """Return the error for an unknown key."""
    return UsageError(what, "there is no such setting", f"known are {', '.join(_KEYS[kind])}")
