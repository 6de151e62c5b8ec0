"""Which of a command line's monitors speak QMP on a socket or stdio: those that the supervisor can stand before. Pure.

HMP monitors, and QMP on anything else (TLS, telnet, websocket, pty, a device shared by `mux`), are QEMU's own affair.
"""

from qemu_userns.cmdline.chardev import parse_legacy
from qemu_userns.cmdline.objects import Object, as_switch
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.cmdline.chardev import LegacyChardev
    from qemu_userns.cmdline.objects import CommandLine

_BACKENDS = ("socket", "stdio")
_NOT_PLAIN = ("telnet", "tn3270", "websocket", "mux")
_USERS = ("serial", "parallel", "monitor", "qmp", "qmp-pretty", "debugcon", "gdb", "qtest")


class MonitorDevice(Record):
    """The character device of a QMP monitor."""

    obj: Object  # the -chardev, or the option in the old language
    legacy: "LegacyChardev | None"
    pretty: bool

    def get(self, key: str) -> str:
        """Return the value of one of its members, "" if it has none."""
        if self.legacy is not None:
            return self.legacy.get(key) or ""
        return self.obj.get(key) or ""

    @property
    def backend(self) -> str:
        """The kind of character device."""
        return self.legacy.backend if self.legacy is not None else self.get("backend")

    @property
    def listens(self) -> bool:
        """Whether it waits for clients instead of connecting to one."""
        return as_switch(self.get("server")) == "on"


def find_monitors(commandline: "CommandLine") -> "tuple[MonitorDevice, ...]":
    """Return the devices that speak QMP, in the order of the monitors, each once."""
    return tuple(device for device, plain in _find_devices(commandline) if plain)


def find_untouched(commandline: "CommandLine") -> "tuple[MonitorDevice, ...]":
    """Return the devices of QMP monitors that stay QEMU's own affair."""
    return tuple(device for device, plain in _find_devices(commandline) if not plain and device.backend not in ("", "none"))


def _find_devices(commandline: "CommandLine") -> "Iterator[tuple[MonitorDevice, bool]]":
    """Yield the devices of QMP monitors, and whether QMP is all that passes through and through a kind that can be split."""
    users = list(_find_users(commandline))
    for name, obj, pretty in users:
        if obj is None or pretty is None:
            continue
        legacy = parse_legacy(obj.get("value") or "") if obj.kind != "chardev" else None
        device = MonitorDevice(obj, legacy, pretty)
        alone = [other for other, _, _ in users].count(name) == 1
        yield device, alone and device.backend in _BACKENDS and _is_plain(device)


def _is_plain(device: MonitorDevice) -> bool:
    """Say whether what passes through a device is QMP and nothing else."""
    if device.get("tls-creds") or (device.legacy is not None and device.legacy.mux):
        return False
    return all(as_switch(device.get(key)) != "on" for key in _NOT_PLAIN)


def _find_users(commandline: "CommandLine") -> "Iterator[tuple[str, Object | None, bool | None]]":
    """Yield who uses which character device: its name, its object, and for QMP whether it is pretty, else None."""
    chardevs = {obj.id: obj for obj in commandline.objects if obj.kind == "chardev" and obj.id}
    for obj in commandline.objects:
        if obj.kind == "mon":
            name = obj.get("chardev") or ""
            yield name, chardevs.get(name), obj.is_on("pretty") if obj.get("mode") == "control" else None
        elif obj.kind in _USERS:
            value = obj.get("value") or ""
            pretty = {"qmp": False, "qmp-pretty": True}.get(obj.kind)
            if value.startswith("chardev:"):
                name = value.removeprefix("chardev:")
                yield name, chardevs.get(name), pretty
            else:
                yield f"{obj.kind} {obj.option}", obj, pretty
        elif obj.kind in ("device", "netdev", "object", "tpmdev") and obj.get("chardev"):
            yield obj.get("chardev") or "", None, None
