"""Hand over a network of passt's: passt runs outside, and QEMU has the other end of its socket. Pure.

passt makes namespaces of its own to confine itself, which what QEMU starts may not. Its frames are those of `-netdev socket`,
each with its length before it. It ends with the socket.

Source: net/passt.c and qapi/net.json (NetDevPasstOptions) of QEMU 10.1 to 11.0; passt(1).
"""

import re

from qemu_userns.cmdline.objects import as_switch
from qemu_userns.cmdline.source import Edit, append, remove, replace
from qemu_userns.plan.facts import REGULAR
from qemu_userns.plan.grants import HELPER_FD, Passt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine, Object
    from qemu_userns.cmdline.source import Member
    from qemu_userns.plan.draft import Draft

_SINCE = (10, 1)
_FOLDERS = ("/usr/local/bin", "/usr/bin")
_TEXTS = {
    key: f"--{key}"
    for key in (
        *("mtu", "address", "netmask", "gateway", "interface", "outbound", "outbound-if4", "outbound-if6", "dns", "fqdn"),
        *("map-host-loopback", "map-guest-addr", "dns-forward", "dns-host"),
    )
} | {"mac": "--mac-addr"}
_SWITCHES = {
    **{(key, "off"): f"--no-{key}" for key in ("dhcp-dns", "dhcp-search", "tcp", "udp", "icmp", "dhcp", "ndp", "dhcpv6", "ra")},
    ("freebind", "on"): "--freebind",
    ("ipv4", "off"): "--ipv6-only",
    ("ipv6", "off"): "--ipv4-only",
}
# What stands between the elements of a list, None where each is a word of its own.
_LISTS = {"search": " ", "tcp-ports": ",", "udp-ports": ",", "param": None}
_KEYS = frozenset(_TEXTS) | {key for key, _ in _SWITCHES} | frozenset(_LISTS) | {"path", "quiet", "vhost-user"}
_CARD_KEYS = frozenset(("model", "mac", "addr", "vectors"))  # of -nic: the guest's card has them, not its network


def list_programs(path: str) -> "tuple[str, ...]":
    """Return where the passt may be that a netdev names; QEMU looks in PATH for a name without a slash."""
    return (path,) if "/" in path else tuple(f"{folder}/{path}" for folder in _FOLDERS)


def hand_over(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Have passt run outside with the words that QEMU would give it, and make a socket's netdev of QEMU's.

    What QEMU will refuse is left alone.
    """
    obj, kind = need.obj, need.obj.find("type")
    options = _find_options(obj)
    if kind is None or draft.version < _SINCE or not _is_valid(options):
        return
    program = next((path for path in list_programs(need.path) if draft.path(path).kind == REGULAR), "")
    if not program:
        hint = "install passt (Debian: passt), or name it by path="
        draft.refuse(f"{need.describe()} {need.path}", "there is no such program", hint)
        return
    if not program.startswith("/"):
        program = f"{draft.facts.caller.cwd.rstrip('/')}/{program}"
    number = draft.next_fd()
    draft.add(Passt(need.describe(), (program, *_build_words(options), f"--fd={HELPER_FD}"), number))
    why = f"passt runs outside, and its socket is passed as {draft.name_fd(number)}"
    draft.edits.append(replace(kind, "socket", why))
    draft.edits += _remove_all(obj, {member.key.partition(".")[0]: member for member in options}, commandline, why)
    draft.edits.append(append(obj, "fd", draft.name_fd(number), why))


def _find_options(obj: "Object") -> "tuple[Member, ...]":
    """Return the members that are passt's."""
    cards = _CARD_KEYS if obj.kind == "nic" else frozenset()
    return tuple(member for member in obj.members if member.key.partition(".")[0] in _KEYS - cards)


def _is_valid(options: "tuple[Member, ...]") -> bool:
    """Say whether QEMU would take all values."""
    switches = {key for key, _ in _SWITCHES} | {"quiet", "vhost-user"}
    return all(
        as_switch(member.value) in ("on", "off")
        if member.key in switches
        else member.value.isdecimal() and member.value.isascii()
        if member.key == "mtu"
        else True
        for member in options
    )


def _build_words(options: "tuple[Member, ...]") -> "Iterator[str]":
    """Yield passt's options as QEMU spells them, each a word."""
    values = {member.key: member.value for member in options}
    if as_switch(values.get("quiet")) != "off":
        yield "--quiet"
    for key, name in _TEXTS.items():
        if key in values:
            yield f"{name}={values[key]}"
    for (key, value), name in _SWITCHES.items():
        if as_switch(values.get(key)) == value:
            yield name
    for key, between in _LISTS.items():
        found = [member.value for member in options if member.key.partition(".")[0] == key]
        if between is None:
            yield from found
        elif found:
            yield f"--{key}={between.join(found)}"


def _remove_all(obj: "Object", last: "dict[str, Member]", commandline: "CommandLine", why: str) -> "Iterator[Edit]":
    """Take options out; `last` has the last member of each."""
    for key, member in last.items():
        if member.form == "json" and "." in member.key:
            text = commandline.sources[member.source].text
            first = next(other for other in obj.members if other.key.startswith(f"{key}."))
            opening = re.search(rf"""(["']){key}\1\s*:\s*\[\s*\{{\s*\Z""", text[: first.item])
            if opening is not None:
                yield Edit(member.source, opening.start(), text.index("]", member.end) + 1, "", why, "json")
        else:
            yield from (remove(obj, other, why) for other in obj.members if other.key.partition(".")[0] == key)
