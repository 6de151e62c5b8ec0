"""Hand over device nodes: shown where QEMU opens them, or opened outside. Pure."""

from qemu_userns.catalogue.buses import USB_NODES
from qemu_userns.cmdline.source import append, remove
from qemu_userns.plan.base import KVM, VFIO_CONTAINER
from qemu_userns.plan.facts import ABSENT, BLOCK, CHARACTER, MISSING, REGULAR
from qemu_userns.plan.grants import READ, WRITE, Node, OpenFd
from qemu_userns.plan.plan import NO_HOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import VfioFact

_O_RDWR = 2
_USB_KEYS = ("hostbus", "hostaddr")


def show_node(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show a device node or FIFO; one that only root may open is made anew for QEMU's id."""
    fact = draft.path(need.path)
    want = READ if need.obj.kind == "object" else WRITE
    if not draft.check(need, fact, want):
        return
    if draft.facts.caller.root and fact.kind in (CHARACTER, BLOCK) and not draft.may(fact, READ | WRITE):
        draft.way_to(fact, need.describe())
        draft.add(Node(need.describe(), fact.real, fact.device, fact.kind == BLOCK))
    elif draft.facts.caller.root and not draft.may(fact, want):
        draft.refuse_access(need, "open it")
    else:
        draft.bind(fact, want == WRITE or fact.kind != REGULAR, need.describe(), device=fact.kind in (CHARACTER, BLOCK))


def open_node(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Open a node outside that QEMU would open by itself, and pass the fd; one that is not there QEMU misses itself."""
    fact = draft.path(need.path)
    if fact.kind == ABSENT and fact.error in (None, MISSING):
        return
    if fact.kind != CHARACTER or not draft.check(need, fact, READ | WRITE):
        return
    grant = OpenFd(need.describe(), fact.real, need.path, _O_RDWR, draft.next_fd(), None, fact.inode, fact.device)
    if draft.pass_node(need, grant):
        draft.add(grant)
    else:
        show_node(draft, need, commandline)


def show_usb(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Name the node of a USB device instead of bus and address, by which QEMU would look for it in /sys."""
    if need.path == USB_NODES:
        if draft.host_tree == NO_HOST:
            reason = "QEMU would look for the USB device in /sys, which its view does not show"
            draft.refuse(need.describe(), reason, "name it by hostbus= and hostaddr=, as lsusb does, or by hostdevice=")
        return
    fact = draft.path(need.path)
    if fact.kind == ABSENT and fact.error in (None, MISSING):
        return  # QEMU says that it does not find it
    show_node(draft, need, commandline)
    why = f"the device is {need.path}, and QEMU's view has no /sys to look for it"
    draft.edits += (remove(need.obj, member, why) for key in _USB_KEYS for member in need.obj.find_all(key))
    draft.edits.append(append(need.obj, "hostdevice", need.path, why))


def show_vfio(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a device's directory in /sys, and the nodes of vfio by which QEMU has it."""
    fact = draft.path(need.path)
    vfio = fact.vfio
    if fact.kind == ABSENT or fact.error is not None or vfio is None:
        return  # QEMU says that there is no such device
    draft.bind(fact, False, need.describe())
    nodes = _choose_nodes(need, vfio)
    if not nodes:
        return  # QEMU says that it has no iommu group
    if "vfio" not in vfio.driver and not vfio.mediated:
        driver = f"driven by {vfio.driver}" if vfio.driver else "without a driver"
        hint = f"bind it: driverctl set-override {fact.real.rpartition('/')[2]} vfio-pci"
        draft.refuse(f"{need.describe()} {need.path}", f"the device is {driver}, not by vfio-pci", hint)
        return
    if vfio.mediated:
        subsystem = draft.path(f"{need.path}/subsystem")
        draft.bind(subsystem, False, need.describe())  # QEMU asks whether it leads to /sys/bus/mdev
    for path in nodes:
        if draft.path(path).kind == ABSENT:
            draft.refuse(f"{need.describe()} {path}", draft.path(path).error or MISSING, "is the module vfio-pci loaded?")
        else:
            show_node(draft, need.replace(path=path), commandline)


def _choose_nodes(need: "Need", vfio: "VfioFact") -> "tuple[str, ...]":
    """Return the nodes that QEMU opens: of the group and of all groups, or with iommufd the device's own."""
    if need.obj.get("iommufd"):
        return (vfio.cdev,) if vfio.cdev else ()
    return (VFIO_CONTAINER, vfio.group) if vfio.group else ()


def show_kvm(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show /dev/kvm."""
    add_kvm(draft, need.describe())


def add_kvm(draft: "Draft", why: str) -> None:
    """Show /dev/kvm as the caller would open it; where it may not, QEMU says so, or goes on to the next accelerator."""
    fact = draft.path(KVM)
    if fact.kind != CHARACTER:
        return
    if draft.facts.caller.root and not draft.may(fact, READ | WRITE):
        draft.way_to(fact, why)
        draft.add(Node(why, fact.real, fact.device, block=False))
    else:
        draft.bind(fact, True, why, device=True)
