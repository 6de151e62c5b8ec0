"""Read the settings of taps that are made for a VM: `tap.NAME.KEY`, or a table [tap.NAME]."""

from qemu_userns.errors import UsageError
from qemu_userns.host.settings import TAP, WORDS
from qemu_userns.host.settings_qmp import find_uid
from qemu_userns.plan.grants import TapSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

KEYS: "dict[str, tuple[type, ...]]" = {"bridge": (str,), "mtu": (int,), "mac": (str,), "owner": (str, int), "up": (bool,)}
_NAME_MAX_BYTES = 15  # of an interface: IFNAMSIZ
_MTU_MIN, _MTU_MAX = 68, 65521  # of a tap, in bytes: drivers/net/tun.c
_MAC_PARTS = 6
_HEX = frozenset("0123456789abcdef")


def parse_tap(taps: "tuple[TapSettings, ...]", key: str, text: str, what: str) -> "tuple[TapSettings, ...]":
    """Return the settings of all taps with one more of one tap.

    Args:
        taps: so far.
        key: `tap.NAME.KEY`; NAME may have dots.
        text: its value.
        what: for the error.

    Raises:
        UsageError: there is no such setting, or the value is wrong.
    """
    name, _, member = key.removeprefix(TAP).rpartition(".")
    if not name or member not in _PARSERS:
        raise UsageError(
            what, "there is no such setting", f"write tap.NAME.KEY, NAME the id of a nic, KEY one of {', '.join(_PARSERS)}"
        )
    found = next((tap for tap in taps if tap.name == name), TapSettings(name))
    return (*(tap for tap in taps if tap.name != name), found.replace(**{member: _PARSERS[member](text, what)}))


def _parse_bridge(text: str, what: str) -> str:
    """Check the name of an interface: dev_valid_name() of the kernel."""
    if text in ("", ".", "..") or len(text.encode()) > _NAME_MAX_BYTES or set(text) & set("/: \t\n"):
        raise UsageError(what, f"'{text}' is no name of an interface", f"name a bridge, in at most {_NAME_MAX_BYTES} bytes")
    return text


def _parse_mtu(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and _MTU_MIN <= int(text) <= _MTU_MAX):
        raise UsageError(what, f"'{text}' is no mtu", f"write a number of bytes from {_MTU_MIN} to {_MTU_MAX}")
    return int(text)


def _parse_mac(text: str, what: str) -> str:
    parts = text.lower().split(":")
    if len(parts) != _MAC_PARTS or any(len(part) != 2 or set(part) - _HEX for part in parts):
        raise UsageError(what, f"'{text}' is no MAC address", "write six bytes: 52:54:00:12:34:56")
    if int(parts[0], 16) & 1 or set(parts) == {"00"}:
        raise UsageError(what, f"'{text}' is no address of one interface", "take one whose first byte is even: 52:54:00:12:34:56")
    return ":".join(parts)


def _parse_up(text: str, what: str) -> bool:
    if text not in WORDS:
        raise UsageError(what, f"'{text}' is neither on nor off", "write on or off")
    return WORDS[text]


_PARSERS: "dict[str, Callable[[str, str], object]]" = {
    "bridge": _parse_bridge,
    "mtu": _parse_mtu,
    "mac": _parse_mac,
    "owner": find_uid,
    "up": _parse_up,
}
