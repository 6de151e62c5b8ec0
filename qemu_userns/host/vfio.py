"""Look at a device that vfio gives to a guest, in /sys."""

import os

from qemu_userns.plan.base import VFIO_CONTAINER, VFIO_DEVICES
from qemu_userns.plan.facts import VfioFact

_MEDIATED_BUS = "/sys/bus/mdev"
# Drivers that do no DMA of their own leave a group to vfio; the kernel's driver_managed_dma.
_HARMLESS_DRIVERS = ("", "pcieport", "pci-stub", "pciback", "shpchp")


def look_at_vfio(directory: str) -> VfioFact:
    """Return what the directory of a device says; the kernel's Documentation/driver-api/vfio.rst."""
    group = _read_link(f"{directory}/iommu_group")
    mediated = os.path.realpath(f"{directory}/subsystem") == _MEDIATED_BUS
    try:
        own = [name for name in os.listdir(f"{directory}/vfio-dev") if os.path.exists(f"{directory}/vfio-dev/{name}/dev")]
    except OSError:
        own = []
    return VfioFact(
        f"/dev/vfio/{group}" if group else "",
        f"{VFIO_DEVICES}/{own[0]}" if own else "",
        _read_link(f"{directory}/driver"),
        mediated,
        () if mediated else _find_others(f"{directory}/iommu_group/devices"),  # a mediated device has a group of its own
    )


def _find_others(group: str) -> "tuple[tuple[str, str], ...]":
    """Return the devices of a group whose drivers keep it from vfio, with these."""
    try:
        names = sorted(os.listdir(group))
    except OSError:
        return ()
    drivers = ((name, _read_link(f"{group}/{name}/driver")) for name in names)
    return tuple((name, driver) for name, driver in drivers if driver not in _HARMLESS_DRIVERS and "vfio" not in driver)


def find_nodes(directory: str) -> "tuple[str, ...]":
    """Return the nodes by which a device may be had."""
    found = look_at_vfio(directory)
    return tuple(path for path in (VFIO_CONTAINER, found.group, found.cdev) if path)


def _read_link(path: str) -> str:
    """Return the name of what a link of /sys leads to, "" if there is none."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""
