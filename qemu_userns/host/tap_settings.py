"""Set up taps that are made for a VM: owner, MAC address, MTU, bridge, up. pyroute2 is loaded here alone.

A tap is made by TUNSETIFF with QEMU's own flags, and is not persistent, so that it goes with its last fd, however the launch or
QEMU ends; one of pyroute2's would be persistent, and stay after a launch that is killed. All of it happens in this process's
network namespace, which the settings may name (network.py).

Source: drivers/net/tun.c and net/core/rtnetlink.c of the kernel.
"""

import errno
import fcntl
import os
import struct
from _socket import if_nametoindex

from qemu_userns.errors import ResourceError
from qemu_userns.host.taps import may_configure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.plan.grants import Tap, TapSettings

# linux/if_tun.h
_TUNSETOWNER, _TUNGETIFF, _IFF_PERSIST = 0x400454CC, 0x800454D2, 0x0800
_IFREQ = "16sH22x"
_THERE = "there is such an interface already, and settings are for a tap that is made for the VM"
_THERE_HINT = "leave ifname= out, name another, or set it up by ip link set and leave the settings out"
_PYROUTE2_HINT = "Debian: python3-pyroute2; else pip install pyroute2; then run qemu-userns install again"


def find_refused_settings(wanted: "Iterable[tuple[TapSettings, str]]") -> "tuple[tuple[str, str, str], ...]":
    """Return which taps cannot be made as the settings say.

    Args:
        wanted: settings, and the name that the tap shall have, "" for the kernel's choice.

    Returns:
        Name of the settings, reason, and hint of each.
    """
    found = ((settings.name, _find_reason(settings, name)) for settings, name in wanted)
    return tuple((name, *reason) for name, reason in found if reason is not None)


def _find_reason(settings: "TapSettings", name: str) -> "tuple[str, str] | None":
    if not may_configure():
        hint = (
            f"have root make and set up one (ip tuntap add, ip link set), name it by ifname=, and leave tap.{settings.name} out"
        )
        return "to make a tap and to set it up takes CAP_NET_ADMIN", hint
    if name and _find_index(name) is not None and not _goes_by_itself(name):
        return _THERE, _THERE_HINT
    if settings.bridge and _find_index(settings.bridge) is None:
        return f"there is no bridge {settings.bridge}", f"ip link add {settings.bridge} type bridge"
    from importlib.util import find_spec

    return None if find_spec("pyroute2") else ("the Python package pyroute2 is missing", _PYROUTE2_HINT)


def _find_index(name: str) -> "int | None":
    try:
        return if_nametoindex(name)
    except OSError:
        return None


def _goes_by_itself(name: str) -> bool:
    """Say whether an interface is a tap that is not persistent: of a VM that is about to end. /sys may be another network's."""
    try:
        with open(f"/sys/class/net/{name}/tun_flags", "rb") as file:
            return not int(file.read(), 16) & _IFF_PERSIST
    except OSError:
        return False


def set_up(grant: "Tap", settings: "TapSettings", name: str, fd: int) -> None:
    """Set up a tap that has just been made.

    Args:
        grant: of the tap.
        settings: what is set.
        name: of the tap.
        fd: of its first queue; borrowed.

    Raises:
        ResourceError: the tap was there before, pyroute2 is missing, or the kernel refuses something.
    """
    _, flags = struct.unpack(_IFREQ, fcntl.ioctl(fd, _TUNGETIFF, bytes(struct.calcsize(_IFREQ))))
    if flags & _IFF_PERSIST:
        raise ResourceError(f"{grant.why} {name}", _THERE, _THERE_HINT)
    what = f"{grant.why} {name}: tap.{settings.name}"
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as err:
        raise ResourceError(what, f"the Python package pyroute2 cannot be loaded: {err}", _PYROUTE2_HINT) from err
    if settings.owner is not None:
        fcntl.ioctl(fd, _TUNSETOWNER, settings.owner)
    index = if_nametoindex(name)
    with IPRoute() as route:
        for key, text, attributes in _list_changes(settings):
            try:
                route.link("set", index=index, **attributes)
            except NetlinkError as err:
                hint = "name a bridge" if err.code == errno.EOPNOTSUPP else None  # what else there is takes no ports
                raise ResourceError(f"{what}.{key}={text}", os.strerror(err.code), hint) from err


def _list_changes(settings: "TapSettings") -> "list[tuple[str, str, dict[str, object]]]":
    """Return key and value as the settings have them, and the attributes of the link, in the order in which they are set."""
    changes: "list[tuple[str, str, dict[str, object]]]" = []
    if settings.mac:
        changes.append(("mac", settings.mac, {"address": settings.mac}))
    if settings.mtu is not None:
        changes.append(("mtu", str(settings.mtu), {"mtu": settings.mtu}))
    if settings.bridge:
        try:
            master = if_nametoindex(settings.bridge)
        except OSError:
            master = -1  # it has just gone: ENODEV
        changes.append(("bridge", settings.bridge, {"master": master}))
    if settings.up:
        changes.append(("up", "on", {"state": "up"}))
    return changes
