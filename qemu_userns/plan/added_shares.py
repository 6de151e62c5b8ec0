"""Shares that the settings add to a command line, with all that each takes. Pure."""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qemu_userns.cmdline.objects import Object

NINEP = "9p"
DRIVERS = (NINEP,)
MODELS = ("passthrough", "none", "mapped", "mapped-xattr", "mapped-file")
_ID = "userns-share"  # what the ids of the objects that are added begin with
_PCI, _CCW, _MMIO = "pci", "ccw", "device"


class AddedShare(Record):
    """A directory that the settings share."""

    tag: str  # the mount tag, by which its other settings name it too
    path: str = ""  # absolute
    driver: str = NINEP
    readonly: bool = False
    model: str = "passthrough"


def build_words(shares: "Sequence[AddedShare]", objects: "Sequence[Object]", program: str) -> "Iterator[str]":
    """Yield the words of the shares, to come behind the caller's: so his own devices have the addresses that they have without.

    Args:
        shares: to add.
        objects: of the command line.
        program: path of the real QEMU.

    Yields:
        Options and values; none where the machine can have no devices.
    """
    machine = find_machine(objects)
    if machine == "none":
        return
    bus = _find_bus(objects, machine, program.rpartition("/")[2])
    for number, share in enumerate(shares):
        name = f"{_ID}{number}"
        path, tag = share.path.replace(",", ",,"), share.tag.replace(",", ",,")
        readonly = ",readonly=on" if share.readonly else ""
        yield from ("-fsdev", f"local,id={name},path={path},security_model={share.model}{readonly}")
        yield from ("-device", f"virtio-9p-{bus},id={name},fsdev={name},mount_tag={tag}")


def find_machine(objects: "Sequence[Object]") -> str:
    """Return the machine's type, "" where QEMU chooses it."""
    types = [obj.get("type") for obj in objects if obj.kind == "machine" and obj.get("type")]
    return types[-1] or "" if types else ""


def _find_bus(objects: "Sequence[Object]", machine: str, name: str) -> str:
    """Return which of the buses that -virtfs knows (qdev_alias_table of QEMU's softmmu/qdev-monitor.c) the machine has.

    A microvm has no PCI unless it is told to, and is what a QEMU that is built for it takes by itself.
    """
    if name.endswith("-s390x"):
        return _CCW
    if machine == "microvm" or (not machine and name.endswith("-microvm")):
        return _PCI if any(obj.kind == "machine" and obj.is_on("pcie") for obj in objects) else _MMIO
    return _MMIO if name.endswith("-m68k") else _PCI
