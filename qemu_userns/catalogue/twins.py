"""The QMP twin of an HMP command whose fds have names: HMP has no place for them (contracts/qemu.md 2.2). Pure."""

import json

from qemu_userns.cmdline.objects import as_switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.cmdline.objects import Object

NETDEV_ADD = "netdev_add"
# The members of a type that are no fds, by what they are in QAPI: texts, switches, numbers, lists of texts.
_TAP = (
    ("type", "id", "ifname", "script", "downscript", "br", "helper"),
    ("vnet_hdr", "vhost", "vhostforce"),
    ("queues", "poll-us", "sndbuf"),
    (),
)
_PASST = (
    (
        *("type", "id", "path", "address", "netmask", "mac", "gateway", "interface", "outbound", "outbound-if4", "outbound-if6"),
        *("dns", "fqdn", "map-host-loopback", "map-guest-addr", "dns-forward", "dns-host"),
    ),
    (
        *("quiet", "vhost-user", "dhcp-dns", "dhcp-search", "tcp", "udp", "icmp", "dhcp", "ndp", "dhcpv6", "ra"),
        *("freebind", "ipv4", "ipv6"),
    ),
    ("mtu",),
    ("search", "tcp-ports", "udp-ports", "param"),
)
_TYPES: "dict[str, tuple[tuple[str, ...], ...]]" = {"tap": _TAP, "bridge": _TAP, "passt": _PASST}
_UNITS = {"k": 10, "M": 20, "G": 30, "T": 40}


def find_twin(objects: "Sequence[Object]") -> "str | None":
    """Return the text of the QMP command that makes the same tap, or passt, as an HMP command does, None for anything else.

    What QEMU would refuse has none, so that it says so itself, in the words of HMP.
    """
    if len(objects) != 1 or objects[0].kind != "netdev" or objects[0].get("type") not in _TYPES:
        return None
    obj = objects[0]
    arguments = {member.key: _read(member.key, obj) for member in obj.members}
    if obj.id is not None:
        arguments["id"] = obj.id  # of several the first, where of others the last one counts
    return None if None in arguments.values() else json.dumps({"execute": NETDEV_ADD, "arguments": arguments})


def _read(key: str, obj: "Object") -> "str | int | bool | list[dict[str, str]] | None":
    """Return a value as QAPI types it, None where QEMU would refuse it."""
    text = obj.get(key) or ""
    texts, switches, numbers, lists = _TYPES[obj.get("type") or ""]
    if key in lists:
        return [{"str": member.value} for member in obj.find_all(key)]
    if key in texts:
        return text
    if key in switches:
        return {"on": True, "off": False}.get(as_switch(text) or "")
    shift = _UNITS.get(text[-1:], 0) if key == "sndbuf" else 0
    digits = text[:-1] if shift else text
    return int(digits) << shift if key in numbers and digits.isdecimal() and digits.isascii() else None
