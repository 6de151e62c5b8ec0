"""Shares that the settings add to a command line, with all that each takes. Pure."""

from qemu_userns.plan.draft import find_memory
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qemu_userns.cmdline.objects import Object

NINEP, VIRTIOFS, BOTH = "9p", "virtiofs", "both"
DRIVERS = (NINEP, VIRTIOFS, BOTH)
MODELS = ("passthrough", "none", "mapped", "mapped-xattr", "mapped-file")
_ID = "userns-share"  # what the ids of the objects that are added begin with
_MEMORY = "userns-memory"
_DEFAULT_MEMORY = "128"  # MiB: what QEMU's manual says of -m
_PCI, _CCW, _MMIO = "pci", "ccw", "device"


class AddedShare(Record):
    """A directory that the settings share."""

    tag: str  # the mount tag, by which its other settings name it too
    path: str = ""  # absolute
    driver: str = NINEP
    readonly: bool = False
    model: str = "passthrough"

    @property
    def by_9p(self) -> bool:
        """Whether QEMU serves it."""
        return self.driver != VIRTIOFS

    @property
    def by_virtiofs(self) -> bool:
        """Whether a virtiofsd serves it."""
        return self.driver != NINEP


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
    if any(share.by_virtiofs for share in shares):
        yield from _share_memory(objects)
    for number, share in enumerate(shares):
        name = f"{_ID}{number}"
        path, tag = share.path.replace(",", ",,"), share.tag.replace(",", ",,")
        readonly = ",readonly=on" if share.readonly else ""
        if share.by_9p:
            yield from ("-fsdev", f"local,id={name},path={path},security_model={share.model}{readonly}")
            yield from ("-device", f"virtio-9p-{bus},id={name},fsdev={name},mount_tag={tag}")
        if share.by_virtiofs:
            chardev = name_chardev(number)
            yield from ("-device", f"vhost-user-fs-{bus},id={chardev},chardev={chardev},tag={tag}")


def name_chardev(number: int) -> str:
    """Return the id of the character device, and of the device, of the virtiofs share of a number, in order from 0."""
    return f"{_ID}{number}-fs"


def find_backends(objects: "Sequence[Object]") -> "frozenset[str]":
    """Return the ids of the objects that the guest's memory is, where the command line says so."""
    machines = (obj.get("memory-backend") for obj in objects if obj.kind == "machine")
    nodes = (obj.get("memdev") for obj in objects if obj.kind == "numa")
    return frozenset(name for name in (*machines, *nodes) if name)


def _share_memory(objects: "Sequence[Object]") -> "Iterator[str]":
    """Yield the words for memory that virtiofsd can have too, unless the command line has memory of its own."""
    if find_backends(objects):
        return
    size = find_memory(objects)[0]
    size = _DEFAULT_MEMORY if size in ("", "0") else size
    size += "M" if size[-1].isdigit() else ""
    yield from ("-object", f"memory-backend-memfd,id={_MEMORY},size={size},share=on")
    yield from ("-machine", f"memory-backend={_MEMORY}")


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
