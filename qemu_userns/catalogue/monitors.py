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

QMP, HMP = "control", "readline"
# -object of these types is what -mon is, which QEMU 11.1 deprecates.
OBJECTS = {"monitor-qmp": QMP, "monitor-hmp": HMP}
_BACKENDS = ("socket", "stdio")
_NOBODY = ("", "none", "null")  # nobody can be at the other end
_NOT_PLAIN = ("telnet", "tn3270", "websocket", "mux")
_USERS = ("serial", "parallel", "monitor", "qmp", "qmp-pretty", "debugcon", "gdb", "qtest")


class MonitorDevice(Record):
    """The character device of a QMP monitor."""

    obj: Object  # the -chardev, or the option in the old language
    legacy: "LegacyChardev | None"
    pretty: bool
    ends: bool = False  # the monitor goes with its client: close-action of a monitor-qmp object

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


class Untouched(Record):
    """A monitor that stays QEMU's own affair."""

    device: MonitorDevice
    qmp: bool
    why: str  # what it is that we do not serve


def find_untouched(commandline: "CommandLine") -> "tuple[Untouched, ...]":
    """Return the monitors that the command line names and that stay QEMU's own affair."""
    hmp = [Untouched(device, False, "HMP") for device, language, _ in _find_users(commandline) if language == HMP and device]
    qmp = [Untouched(device, True, _find_kind(device)) for device, plain in _find_devices(commandline) if not plain]
    return tuple(item for item in (*hmp, *qmp) if item.device.backend not in _NOBODY)


def _find_devices(commandline: "CommandLine") -> "Iterator[tuple[MonitorDevice, bool]]":
    """Yield the devices of QMP monitors, and whether QMP is all that passes through and through a kind that can be split."""
    users = list(_find_users(commandline))
    names = [name for _, _, name in users]
    for device, language, name in users:
        if device is not None and language == QMP:
            yield device, names.count(name) == 1 and device.backend in _BACKENDS and not _find_speech(device)


def _find_kind(device: MonitorDevice) -> str:
    """Say what keeps a QMP monitor from being served by the supervisor."""
    return _find_speech(device) or ("QMP on a shared device" if device.backend in _BACKENDS else f"QMP on a {device.backend}")


def _find_speech(device: MonitorDevice) -> str:
    """Say what passes through a device besides QMP, "" where it is QMP and nothing else."""
    if device.ends:
        return "QMP that ends with its client"
    if device.get("tls-creds"):
        return "QMP over TLS"
    if device.legacy is not None and device.legacy.mux:
        return "QMP on a mux"
    found = next((key for key in _NOT_PLAIN if as_switch(device.get(key)) == "on"), "")
    return found and f"QMP {'on a' if found == 'mux' else 'over'} {found}"


def _find_users(commandline: "CommandLine") -> "Iterator[tuple[MonitorDevice | None, str, str]]":
    """Yield who uses which character device: the device, the monitor's language ("" for none), and the device's name."""
    chardevs = {obj.id: obj for obj in commandline.objects if obj.kind == "chardev" and obj.id}
    for obj in commandline.objects:
        if obj.kind == "mon":
            name = obj.get("chardev") or ""
            language = QMP if obj.get("mode") == "control" else HMP
            yield _use_chardev(chardevs.get(name), obj.is_on("pretty")), language, name
        elif obj.kind == "object" and obj.get("qom-type") in OBJECTS:
            name = obj.get("chardev") or ""
            ends = obj.get("close-action") not in (None, "none")
            yield _use_chardev(chardevs.get(name), obj.is_on("pretty"), ends), OBJECTS[obj.get("qom-type") or ""], name
        elif obj.kind in _USERS:
            value = obj.get("value") or ""
            language = {"qmp": QMP, "qmp-pretty": QMP, "monitor": HMP}.get(obj.kind, "")
            pretty = obj.kind == "qmp-pretty"
            if value.startswith("chardev:"):
                name = value.removeprefix("chardev:")
                yield _use_chardev(chardevs.get(name), pretty), language, name
            else:
                # "mon:" makes a monitor of its own, beside the other user of the device.
                legacy = parse_legacy(value)
                language = language or (HMP if legacy is not None and legacy.mux else "")
                yield MonitorDevice(obj, legacy, pretty), language, f"{obj.kind} {obj.option}"
        elif obj.kind in ("device", "netdev", "object", "tpmdev") and obj.get("chardev"):
            yield None, "", obj.get("chardev") or ""


def _use_chardev(obj: "Object | None", pretty: bool, ends: bool = False) -> "MonitorDevice | None":
    """Return the device that a -chardev is, None if there is no such."""
    return None if obj is None else MonitorDevice(obj, None, pretty, ends)
