"""Hand over what vfio gives to a guest, with the right to lock the guest's memory, which the device reaches by itself. Pure.

Source: Documentation/driver-api/vfio.rst of the kernel; hw/vfio of QEMU; how much is allowed: libvirt.
"""

from qemu_userns.plan.base import VFIO_CONTAINER, VFIO_DEVICES
from qemu_userns.plan.facts import ABSENT
from qemu_userns.plan.grants import LockLimit
from qemu_userns.plan.memory import check_limit, count_guest_bytes, is_enough

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine, Object
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import VfioFact

_DEVICE_BYTES = 1 << 30  # the devices' own memory, which is locked too, at the guest's addresses
_IOMMUS = ("intel-iommu", "amd-iommu", "virtio-iommu-pci", "virtio-iommu-device", "arm-smmuv3")


def show_vfio(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a device's directory in /sys, and show or open the nodes of vfio by which QEMU has it."""
    from qemu_userns.plan.devices import open_node, show_node
    from qemu_userns.plan.refusals import find_remedy

    fact = draft.path(need.path)
    vfio = fact.vfio
    if fact.kind == ABSENT or fact.error is not None or vfio is None:
        return  # QEMU says that there is no such device
    what, address = f"{need.describe()} {need.path}", fact.real.rpartition("/")[2]
    nodes = _choose_nodes(need, vfio)
    if not vfio.group and not nodes:
        hint = "switch the IOMMU on, in the firmware and by the kernel's intel_iommu=on (AMD: amd_iommu=on)"
        draft.refuse(what, "the device is in no iommu group", hint)
    elif "vfio" not in vfio.driver and not vfio.mediated:
        driver = f"driven by {vfio.driver}" if vfio.driver else "without a driver"
        draft.refuse(what, f"the device is {driver}, not by vfio-pci", _bind_hint(address))
    elif vfio.others:
        (other, driver), *_ = vfio.others
        reason = f"iommu group {vfio.group.rpartition('/')[2]} is not viable: {driver} drives {other}, which is in it too"
        draft.refuse(what, reason, _bind_hint(other))
    elif not nodes:
        draft.refuse(what, "the device has no node of its own, by which iommufd takes it", find_remedy(f"{VFIO_DEVICES}/"))
    else:
        draft.bind(fact, False, need.describe())
        if vfio.mediated:
            subsystem = draft.path(f"{need.path}/subsystem")
            draft.bind(subsystem, False, need.describe())  # QEMU asks whether it leads to /sys/bus/mdev
        hand_over = open_node if need.obj.get("iommufd") else show_node
        for path in nodes:
            hand_over(draft, need.replace(path=path), commandline)
        _allow_vfio(draft, need)


def _choose_nodes(need: "Need", vfio: "VfioFact") -> "tuple[str, ...]":
    """Return the nodes that QEMU opens, of the group and of all groups; or the device's own, which it takes by fd for iommufd."""
    if need.obj.get("iommufd"):
        return (vfio.cdev,) if vfio.cdev else ()
    return (VFIO_CONTAINER, vfio.group) if vfio.group else ()


def _bind_hint(address: str) -> str:
    return f"bind it: driverctl set-override {address} vfio-pci"


def _allow_vfio(draft: "Draft", need: "Need") -> None:
    """Raise the limit to what the guest's memory takes; with an iommu of the guest's own each device locks all of it."""
    times = max(1, sum(_is_vfio(obj) for obj in draft.objects)) if any(map(_has_iommu, draft.objects)) else 1
    guest = count_guest_bytes(draft.memory) * times
    soft, hard = draft.facts.lock_limit
    wanted = guest + _DEVICE_BYTES if is_enough(hard, guest + _DEVICE_BYTES) else hard
    if check_limit(draft, need, (hard, "hard"), guest) and not is_enough(soft, wanted):
        draft.add(LockLimit(need.describe(), wanted))


def _is_vfio(obj: "Object") -> bool:
    return obj.kind == "device" and (obj.get("driver") or "").startswith("vfio-")


def _has_iommu(obj: "Object") -> bool:
    """Say whether an object gives the guest an iommu."""
    return (obj.kind == "device" and obj.get("driver") in _IOMMUS) or (obj.kind == "machine" and bool(obj.get("iommu")))
