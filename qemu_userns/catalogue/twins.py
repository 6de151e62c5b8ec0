"""The QMP twin of an HMP command whose fds have names: HMP has no place for them (contracts/qemu.md 2.2). Pure."""

import json

from qemu_userns.cmdline.objects import as_switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.cmdline.objects import Object

NETDEV_ADD = "netdev_add"
_TYPES = ("tap", "bridge")
# The members of these types that are no fds, by what they are in QAPI.
_TEXTS = ("type", "id", "ifname", "script", "downscript", "br", "helper")
_SWITCHES = ("vnet_hdr", "vhost", "vhostforce")
_NUMBERS = ("queues", "poll-us", "sndbuf")
_UNITS = {"k": 10, "M": 20, "G": 30, "T": 40}


def find_twin(objects: "Sequence[Object]") -> "str | None":
    """Return the text of the QMP command that makes the same tap as an HMP command does, None for anything else.

    What QEMU would refuse has none, so that it says so itself, in the words of HMP.
    """
    if len(objects) != 1 or objects[0].kind != "netdev" or objects[0].get("type") not in _TYPES:
        return None
    obj = objects[0]
    arguments = {member.key: _read(member.key, obj.get(member.key) or "") for member in obj.members}
    if obj.id is not None:
        arguments["id"] = obj.id  # of several the first, where of others the last one counts
    return None if None in arguments.values() else json.dumps({"execute": NETDEV_ADD, "arguments": arguments})


def _read(key: str, text: str) -> "str | int | bool | None":
    """Return a value as QAPI types it, None where QEMU would refuse it."""
    if key in _TEXTS:
        return text
    if key in _SWITCHES:
        return {"on": True, "off": False}.get(as_switch(text) or "")
    shift = _UNITS.get(text[-1:], 0) if key == "sndbuf" else 0
    digits = text[:-1] if shift else text
    return int(digits) << shift if key in _NUMBERS and digits.isdecimal() and digits.isascii() else None
