"""Devices and rights that few machines have, in the test host: its kernel has vhost-vsock, and its root may raise limits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.plugged import plugged
from integration.shares import Launch, dropin_words
from integration.talk import fds_of, outcome, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.host]

PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "32", "-S"]
CID = 4021
SPARE_NIC = "0x10d3"  # e1000e


# --- vhost-vsock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def vsock() -> None:
    """Have the devices that may be opened as a real host has them: of group kvm, which the test user is in."""
    if os.geteuid() == 0:
        subprocess.run(["modprobe", "vhost_vsock"], check=True)
    assert os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)


@pytest.mark.usefixtures("vsock")
def test_a_guests_number_is_nobody_elses(launch: Launch, shared_tmp: Path) -> None:
    device = f"vhost-vsock-pci,guest-cid={CID}"
    with plugged(shared_tmp / "first", launch, "-device", device, machine=PC) as vm:
        assert "/dev/vhost-vsock" in fds_of(vm.process.pid).values()
        status, _, stderr = outcome([*dropin_words(), *launch.options], *PC, "-device", device)
        assert status == 1
        assert stderr.splitlines()[0] == (f"qemu-userns: -device vhost-vsock-pci guest-cid={CID}: another VM has this number")
        with plugged(shared_tmp / "second", launch, machine=PC) as other:
            with other.balanced():
                desc = other.qmp.refused("device_add", driver="vhost-vsock-pci", id="v", guest_cid=CID)
            assert desc.startswith(f"device_add vhost-vsock-pci guest-cid={CID}: another VM has this number")
            other.qmp.execute("device_add", driver="vhost-vsock-pci", id="v", guest_cid=CID + 1, bus="pci.0")


# --- locked memory ------------------------------------------------------------------------------------------------------


def locked_kib(proc: Path) -> int:
    return int((proc / "status").read_text().split("VmLck:")[1].split()[0])


@pytest.mark.root
def test_all_memory_is_locked_for_root(launch: Launch, shared_tmp: Path) -> None:
    with plugged(shared_tmp / "vm", launch, "-overcommit", "mem-lock=on", machine=PC) as vm:
        assert locked_kib(vm.proc) > 32 * 1024
        assert (vm.proc / "limits").read_text().split("Max locked memory")[1].split()[:2] == ["unlimited", "unlimited"]


@pytest.mark.root
def test_all_memory_is_locked_for_a_user_whose_limit_is_enough(unprivileged_user: str, shared_tmp: Path) -> None:
    """The limit is kept as it is."""
    qmp = shared_tmp / "qmp"
    shared_tmp.chmod(0o777)
    words = [
        *(
            "prlimit",
            f"--memlock={1 << 30}:{2 << 30}",
            "--",
            "setpriv",
            "--reuid",
            unprivileged_user,
            "--regid",
            unprivileged_user,
        ),
        *("--init-groups", "--", "env", f"HOME=/home/{unprivileged_user}", *dropin_words(), *PC),
        *("-overcommit", "mem-lock=on", "-qmp", f"unix:{qmp},server=on,wait=off"),
    ]
    with subprocess.Popen(words) as process:
        try:
            wait_until(qmp.exists, "QEMU's monitor")
            proc = Path(f"/proc/{process.pid}")
            wait_until(lambda: locked_kib(proc) > 32 * 1024, "the locked memory")
            limits = (proc / "limits").read_text().split("Max locked memory")[1].split()[:2]
            assert limits == [str(1 << 30), str(2 << 30)]
        finally:
            process.terminate()


# --- vfio ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spare_nic() -> Iterator[str]:
    """Give the test host's second nic, which is behind its iommu, to vfio-pci; return its address."""
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    nics = [path for path in Path("/sys/bus/pci/devices").iterdir() if (path / "device").read_text().strip() == SPARE_NIC]
    assert nics, "the test host has no e1000e"
    nic = nics[0]
    assert (nic / "iommu_group").exists(), "the test host has no iommu"
    (nic / "driver_override").write_text("vfio-pci")
    if (nic / "driver").exists():
        (nic / "driver/unbind").write_text(nic.name)
    Path("/sys/bus/pci/drivers_probe").write_text(nic.name)
    group = Path("/dev/vfio", (nic / "iommu_group").resolve().name)
    wait_until(group.exists, "the group's node")
    yield nic.name
    (nic / "driver/unbind").write_text(nic.name)
    (nic / "driver_override").write_text("\n")


@pytest.mark.root
@pytest.mark.parametrize("name", ["host", "sysfsdev"])
def test_a_pci_device_is_given_to_a_guest(launch: Launch, shared_tmp: Path, spare_nic: str, name: str) -> None:
    value = spare_nic if name == "host" else f"/sys/bus/pci/devices/{spare_nic}"
    with plugged(shared_tmp / "vm", launch, "-device", f"vfio-pci,{name}={value},id=v", machine=PC) as vm:
        assert "vfio-pci" in vm.qmp.hmp("info qtree")
        assert int((vm.proc / "limits").read_text().split("Max locked memory")[1].split()[0]) >= 1056 << 20
        assert any(target.startswith("anon_inode:[vfio-device]") for target in fds_of(vm.process.pid).values())


@pytest.mark.root
def test_a_pci_device_is_plugged_in(launch: Launch, shared_tmp: Path, spare_nic: str) -> None:
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm:
        vm.qmp.execute("device_add", driver="vfio-pci", id="v", host=spare_nic)
        assert any(target.startswith("anon_inode:[vfio-device]") for target in fds_of(vm.process.pid).values())
        assert int((vm.proc / "limits").read_text().split("Max locked memory")[1].split()[0]) >= 1056 << 20


# --- block and SCSI devices ---------------------------------------------------------------------------------------------


@pytest.fixture
def scsi_disk() -> Iterator[tuple[Path, Path]]:
    """Have a disk that the kernel makes up; return its block and its generic node, which are root's alone."""
    for words in ("sd_mod", "sg", "scsi_debug dev_size_mb=8"):
        subprocess.run(["modprobe", *words.split()], check=True)
    try:
        disks = wait_until(lambda: find_disks("scsi_debug"), "the disk")
        nodes = [Path("/dev", name) for name in (disks[0].name, next((disks[0] / "device/scsi_generic").iterdir()).name)]
        for node in nodes:
            wait_until(node.exists, f"{node}")
            node.chmod(0o600)
        yield nodes[0], nodes[1]
    finally:
        subprocess.run(["rmmod", "scsi_debug"], check=True)


def find_disks(model: str) -> list[Path]:
    """Return the block devices of a model in /sys that have a generic node too."""
    named = [path for path in Path("/sys/block").iterdir() if (path / "device/model").exists()]
    return [
        path for path in named if (path / "device/model").read_text().strip() == model and (path / "device/scsi_generic").exists()
    ]


@pytest.mark.root
def test_a_scsi_device_is_passed_through(launch: Launch, shared_tmp: Path, scsi_disk: tuple[Path, Path]) -> None:
    """QEMU asks it by SG_IO who it is."""
    block, generic = scsi_disk
    options = [
        *("-device", "virtio-scsi-pci,id=scsi"),
        *("-drive", f"file={generic},if=none,id=g", "-device", "scsi-generic,drive=g,bus=scsi.0"),
    ]
    with plugged(shared_tmp / "generic", launch, *options, machine=PC) as vm:
        assert "scsi-generic" in vm.qmp.hmp("info qtree")
    options[-3:] = [f"file={block},format=raw,if=none,id=g", "-device", "scsi-block,drive=g,bus=scsi.0"]
    with plugged(shared_tmp / "block", launch, *options, machine=PC) as vm:
        assert "scsi-block" in vm.qmp.hmp("info qtree")
