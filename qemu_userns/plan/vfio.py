"""Hand over what vfio gives to a guest, and the right to lock the guest's memory. Pure.

A device that reaches memory by itself takes that memory locked. CAP_IPC_LOCK counts only outside of the namespace, so that
RLIMIT_MEMLOCK is what allows it: root has it raised, everybody else needs one that is enough.

Source: Documentation/driver-api/vfio.rst of the kernel; hw/vfio of QEMU; how much is allowed: libvirt.
"""

from qemu_userns.plan.base import VFIO_CONTAINER
from qemu_userns.plan.facts import ABSENT
from qemu_userns.plan.grants import LockLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine, Object
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import VfioFact

_MIB, _GIB = 1 << 20, 1 << 30
_DEFAULT_BYTES = 128 * _MIB
_SHIFTS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
# The devices' own memory is locked too, at the guest's addresses.
_DEVICE_BYTES = _GIB
_IOMMUS = ("intel-iommu", "amd-iommu", "virtio-iommu-pci", "virtio-iommu-device", "arm-smmuv3")
_NO_LIMIT = -1  # RLIM_INFINITY as Python has it


def show_vfio(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a device's directory in /sys, and the nodes of vfio by which QEMU has it."""
    from qemu_userns.plan.devices import show_node

    fact = draft.path(need.path)
    vfio = fact.vfio
    if fact.kind == ABSENT or fact.error is not None or vfio is None:
        return  # QEMU says that there is no such device
    what, address = f"{need.describe()} {need.path}", fact.real.rpartition("/")[2]
    nodes = _choose_nodes(need, vfio)
    if not nodes:
        hint = "switch the IOMMU on, in the firmware and by the kernel's intel_iommu=on (AMD: amd_iommu=on)"
        draft.refuse(what, "the device is in no iommu group", hint)
    elif "vfio" not in vfio.driver and not vfio.mediated:
        driver = f"driven by {vfio.driver}" if vfio.driver else "without a driver"
        draft.refuse(what, f"the device is {driver}, not by vfio-pci", _bind_hint(address))
    elif vfio.others:
        (other, driver), *_ = vfio.others
        reason = f"iommu group {vfio.group.rpartition('/')[2]} is not viable: {driver} drives {other}, which is in it too"
        draft.refuse(what, reason, _bind_hint(other))
    else:
        draft.bind(fact, False, need.describe())
        if vfio.mediated:
            subsystem = draft.path(f"{need.path}/subsystem")
            draft.bind(subsystem, False, need.describe())  # QEMU asks whether it leads to /sys/bus/mdev
        for path in nodes:
            show_node(draft, need.replace(path=path), commandline)
        _allow_vfio(draft, need)


def lock_memory(draft: "Draft", need: "Need") -> None:
    """Allow QEMU to lock all its memory; a limit of an ordinary caller's stays, and has to be enough."""
    soft, _ = draft.facts.lock_limit
    if draft.facts.caller.root and soft != _NO_LIMIT:
        draft.add(LockLimit(need.describe(), None))
    elif not draft.facts.caller.root:
        _check_limit(draft, need, (soft, "soft"), _count_guest_bytes(draft.memory))


def _choose_nodes(need: "Need", vfio: "VfioFact") -> "tuple[str, ...]":
    """Return the nodes that QEMU opens: of the group and of all groups, or with iommufd the device's own."""
    if need.obj.get("iommufd"):
        return (vfio.cdev,) if vfio.cdev else ()
    return (VFIO_CONTAINER, vfio.group) if vfio.group else ()


def _bind_hint(address: str) -> str:
    return f"bind it: driverctl set-override {address} vfio-pci"


def _allow_vfio(draft: "Draft", need: "Need") -> None:
    """Raise the limit to what the guest's memory takes; with an iommu of the guest's own each device locks all of it."""
    guest = _count_guest_bytes(draft.memory)
    times = max(1, sum(_is_vfio(obj) for obj in draft.objects)) if any(map(_has_iommu, draft.objects)) else 1
    wanted = guest * times + _DEVICE_BYTES
    soft, hard = draft.facts.lock_limit
    if _is_enough(soft, wanted):
        return
    if draft.facts.caller.root or _check_limit(draft, need, (hard, "hard"), wanted):
        draft.add(LockLimit(need.describe(), wanted))


def _is_enough(limit: int, wanted: int) -> bool:
    return limit == _NO_LIMIT or limit >= wanted


def _check_limit(draft: "Draft", need: "Need", limit: "tuple[int, str]", wanted: int) -> bool:
    """Refuse what a limit of the caller's, soft or hard, does not allow; return whether it does."""
    value, kind = limit
    if _is_enough(value, wanted):
        return True
    draft.refuse(
        need.describe(),
        f"RLIMIT_MEMLOCK ({kind}) is {value >> 10} KiB, and {wanted >> 10} KiB of memory are to be locked",
        "raise it: memlock in /etc/security/limits.conf, LimitMEMLOCK= of a systemd unit, or prlimit --memlock= as root",
    )
    return False


def _is_vfio(obj: "Object") -> bool:
    return obj.kind == "device" and (obj.get("driver") or "").startswith("vfio-")


def _has_iommu(obj: "Object") -> bool:
    """Say whether an object gives the guest an iommu."""
    return (obj.kind == "device" and obj.get("driver") in _IOMMUS) or (obj.kind == "machine" and bool(obj.get("iommu")))


def _count_guest_bytes(memory: "Sequence[str]") -> int:
    """Return the most memory that the guest may have, from the values of -m: size, which is in MiB, and maxmem, in bytes."""
    return max(_read_size(text, unit) or 0 for text, unit in zip(memory, (_MIB, 1), strict=True)) or _DEFAULT_BYTES


def _read_size(text: str, unit: int) -> "int | None":
    """Return a size in bytes, None for what QEMU would refuse; `unit` is that of a number without one."""
    number, shift = (text[:-1], _SHIFTS[text[-1:].lower()]) if text[-1:].lower() in _SHIFTS else (text, None)
    try:
        value = float(number)
    except ValueError:
        return None
    return int(value * (unit if shift is None else 1 << shift))
