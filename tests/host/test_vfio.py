"""Devices for vfio, as a made-up /sys has them, and what QEMU is given of them: few machines have any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.vfio import find_nodes, look_at_vfio
from qemu_userns.plan.facts import DIRECTORY, PathFact, VfioFact
from tests.plans import asked_for, plan_of

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS = "0000:01:00.0"
BRIDGE, MATE = "0000:00:01.0", "0000:01:00.1"
CDEV = "CONFIG_VFIO_DEVICE_CDEV"


class Sys:
    """A /sys with devices in iommu groups, as Documentation/ABI/testing/sysfs-kernel-iommu_groups has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, driver: str = "", group: str | None = "01", cdev: str = "", bus: str = "pci") -> Path:
        """Add a device; return its directory."""
        device = self.folder / "devices" / name
        device.mkdir(parents=True)
        # The buses' own directories are the host's, whether it has them or not.
        (device / "subsystem").symlink_to(f"/sys/bus/{bus}")
        if driver:
            (device / "driver").symlink_to(f"/sys/bus/{bus}/drivers/{driver}")
        if group is not None:
            members = self.folder / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / name).symlink_to(device)
            (device / "iommu_group").symlink_to(members.parent)
        if cdev:
            (device / "vfio-dev" / cdev).mkdir(parents=True)
            (device / "vfio-dev" / cdev / "dev").write_text("511:0\n")
        return device


@pytest.fixture
def sys(tmp_path: Path) -> Sys:
    return Sys(tmp_path)


def given(device: Path, more: str = "", root: bool = False) -> list[str]:
    """Return what QEMU 9.0 is given of a device, or why it is refused; PLACE stands for its directory."""
    fact = PathFact(str(device), str(device), DIRECTORY, readable=True, vfio=look_at_vfio(str(device)))
    plan = plan_of("-device", f"vfio-pci,sysfsdev={device}{more}", paths={str(device): fact}, version=(9, 0), root=root)
    return [text.replace(str(device), "PLACE") for text in asked_for(plan) if not text.startswith("lock")]


def test_a_device_and_its_group(sys: Sys) -> None:
    sys.add(BRIDGE, "pcieport")
    sys.add(MATE, "vfio-pci")
    device = sys.add(ADDRESS, "vfio-pci", cdev="vfio3")
    assert look_at_vfio(str(device)) == VfioFact("/dev/vfio/01", "/dev/vfio/devices/vfio3", "vfio-pci", mediated=False)
    assert find_nodes(str(device)) == ("/dev/vfio/vfio", "/dev/vfio/01", "/dev/vfio/devices/vfio3")
    assert given(device) == ["ro PLACE", "device /dev/vfio/vfio", "device /dev/vfio/01"]
    assert given(device, ",iommufd=i") == ["ro PLACE", "open /dev/vfio/devices/vfio3 rw alone"]


def test_a_part_of_a_device(sys: Sys) -> None:
    device = sys.add("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "intel_vgpu_mdev", cdev="vfio0", bus="mdev")
    assert look_at_vfio(str(device)) == VfioFact("/dev/vfio/01", "/dev/vfio/devices/vfio0", "intel_vgpu_mdev", mediated=True)
    shown = ["ro PLACE", "ro PLACE/subsystem"]
    assert given(device) == [*shown, "device /dev/vfio/vfio", "device /dev/vfio/01"]
    assert given(device, ",iommufd=i") == [*shown, "open /dev/vfio/devices/vfio0 rw alone"]


@pytest.mark.parametrize("more", ["", ",iommufd=i"])
@pytest.mark.parametrize("root", [False, True])
def test_what_keeps_a_device_from_vfio(sys: Sys, more: str, root: bool) -> None:
    mate = sys.add(MATE, "snd_hda_intel")
    held = f"refuse: iommu group 01 is not viable: snd_hda_intel drives {MATE}, which is in it too"
    assert given(sys.add(ADDRESS, "vfio-pci", cdev="vfio3"), more, root) == [held]
    assert given(mate, more, root) == ["refuse: the device is driven by snd_hda_intel, not by vfio-pci"]
    assert given(sys.add("free"), more, root) == ["refuse: the device is without a driver, not by vfio-pci"]
    assert given(sys.add("alone", "e1000e", group=None), more, root) == ["refuse: the device is in no iommu group"]


def test_iommufd_takes_a_kernel_that_has_nodes_of_devices(sys: Sys) -> None:
    device = sys.add(ADDRESS, "vfio-pci")
    assert given(device, ",iommufd=i") == ["refuse: the device has no node of its own, by which iommufd takes it"]
    assert given(device) == ["ro PLACE", "device /dev/vfio/vfio", "device /dev/vfio/01"]
