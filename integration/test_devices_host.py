"""Devices and rights that few machines have, in the test host: its kernel has vhost-vsock, and its root may raise limits."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.plugged import compared, plugged
from integration.shares import Launch, dropin_words
from integration.talk import REAL, as_user, fds_of, home_of, outcome, started, version_of, wait_until
from integration.test_hotplug_guest import booting, wait_for
from integration.vm import running_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.plugged import Vm

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.host]

PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "32", "-S"]
CID = 4021
TPM_TRIES, TPM_S = 4, 30
SPARE_NIC = "0x10d3"  # e1000e
NVME = 'json:{{"driver":"raw","file":{{"driver":"nvme","device":"{address}","namespace":1}}}}'


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
@pytest.mark.parametrize("value", ["on", "on-fault"])
def test_all_memory_is_locked_for_root(launch: Launch, shared_tmp: Path, value: str) -> None:
    option = ("-overcommit", f"mem-lock={value}")
    if value == "on-fault" and version_of(REAL) < (10, 0):
        plain, ours = (outcome(words, *PC, *option) for words in ([REAL], [*dropin_words(), *launch.options]))
        assert plain == ours
        assert "expects 'on' or 'off'" in plain[2]
        return
    with plugged(shared_tmp / "vm", launch, *option, machine=PC) as vm:
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


@pytest.mark.root
@pytest.mark.parametrize("name", ["nvme://{address}/1", NVME])
def test_qemus_own_driver_of_nvme_has_the_device_by_vfio(launch: Launch, shared_tmp: Path, spare_nic: str, name: str) -> None:
    """It reads in the card's registers that this is no disk, as plain QEMU's does."""
    drive = ("-drive", f"if=none,id=d,file={name.format(address=spare_nic).replace(',', ',,')}")
    plain, ours = (outcome(words, *PC, *drive) for words in ([REAL], [*dropin_words(), *launch.options]))
    assert ours == plain
    assert "NVMe" in plain[2]
    options = {"driver": "nvme", "node_name": "d", "device": spare_nic, "namespace": 1}
    compared(shared_tmp, launch, lambda vm: [vm.qmp.ask("blockdev-add", **options) for _ in range(2)], machine=PC)


@pytest.mark.root
@pytest.mark.parametrize("hard_mib", [2048, 8])
def test_a_user_who_may_open_the_group_gets_a_pci_device_if_his_limit_is_enough(
    unprivileged_user: str, shared_tmp: Path, spare_nic: str, hard_mib: int
) -> None:
    """The soft limit is raised for QEMU, which may not lock more by CAP_IPC_LOCK in its user namespace."""
    node, qmp = Path("/dev/vfio", Path(f"/sys/bus/pci/devices/{spare_nic}/iommu_group").resolve().name), shared_tmp / "qmp"
    shared_tmp.chmod(0o777)
    shutil.chown(node, "root", "kvm")
    options = [*PC, "-device", f"vfio-pci,host={spare_nic}", "-qmp", f"unix:{qmp},server=on,wait=off"]
    words = ["prlimit", f"--memlock={8 << 20}:{hard_mib << 20}", "--", *as_user(unprivileged_user, *dropin_words()), *options]
    env = home_of(unprivileged_user)
    node.chmod(0o600)
    denied = f"qemu-userns: -device host {node}: Permission denied\nhint: it belongs to 0:"
    stderr = outcome(words, env=env)[2]
    assert stderr.startswith(denied)
    assert "its group kvm would need g+w, which a udev rule can set (MODE=)" in stderr
    node.chmod(0o660)
    without_group = [word for word in words if word != "--init-groups"]
    without_group.insert(without_group.index("--regid"), "--clear-groups")
    remedy = f"its group is kvm: usermod -aG kvm {unprivileged_user}, and log in again"
    assert remedy in outcome(without_group, env=env)[2]
    if hard_mib == 8:
        stderr = outcome(words, env=env)[2]
        assert "RLIMIT_MEMLOCK (hard) is 8192 KiB, and " in stderr
        return
    with started(words, env=env) as process:
        wait_until(qmp.exists, "QEMU's monitor")
        wait_until(lambda: any("[vfio-device]" in target for target in fds_of(process.pid).values()), "the device")
        assert int(Path(f"/proc/{process.pid}/limits").read_text().split("Max locked memory")[1].split()[0]) >= 1056 << 20


@pytest.mark.root
def test_no_kernel_of_debians_has_iommufd(launch: Launch, shared_tmp: Path, spare_nic: str) -> None:
    """What it and a device of it lack is named; of QEMU before 9, which has no such object, by itself."""
    words = [*dropin_words(), *launch.options, *PC]
    status, _, stderr = outcome(words, "-object", "iommufd,id=i")
    assert status == 1
    if version_of(REAL) < (9, 0):
        assert "does not accept value 'iommufd'" in stderr
        assert stderr == outcome([REAL], *PC, "-object", "iommufd,id=i")[2]
        return
    assert stderr == (
        "qemu-userns: -object iommufd /dev/iommu: there is no such device node\n"
        "hint: load the kernel's module iommufd: modprobe iommufd\n"
    )
    place = f"/sys/bus/pci/devices/{spare_nic}"
    lacks = "the device has no node of its own, by which iommufd takes it"
    remedy = "load vfio-pci of a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6)"
    status, _, stderr = outcome(words, "-device", f"vfio-pci,host={spare_nic},iommufd=i")
    assert (status, stderr) == (1, f"qemu-userns: -device host {place}: {lacks}\nhint: {remedy}\n")
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced():
        assert "/dev/iommu: there is no such device node" in vm.qmp.refused("object-add", qom_type="iommufd", id="i")
        desc = vm.qmp.refused("device_add", driver="vfio-pci", host=spare_nic, iommufd="i")
        assert desc == f"device_add host {place}: {lacks} ({remedy})"


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


# --- what the host has of its own, root's alone ---------------------------------------------------------------------------


def holds(vm: Vm, node: str) -> bool:
    """Tell whether QEMU has a device node open."""
    return node in fds_of(vm.process.pid).values()


@pytest.mark.root
@pytest.mark.parametrize("named", ["hostdevice={node}", "hostbus={bus},hostaddr={address}"])
def test_a_usb_device_is_given_to_a_guest_and_plugged_in(launch: Launch, shared_tmp: Path, named: str) -> None:
    """The one that the test host has; QEMU asks it for its name."""
    found = next(path.parent for path in Path("/sys/bus/usb/devices").glob("*/product") if "Tablet" in path.read_text())
    bus, address = (int((found / name).read_text()) for name in ("busnum", "devnum"))
    members = named.format(bus=bus, address=address, node=f"/dev/bus/usb/{bus:03}/{address:03}")
    xhci = ["-device", "qemu-xhci,id=xhci"]
    with plugged(shared_tmp / "first", launch, *xhci, "-device", f"usb-host,{members},id=u", machine=PC) as vm:
        wait_until(lambda: "Product QEMU USB Tablet, ID: u" in vm.qmp.hmp("info usb"), "the device")
    with plugged(shared_tmp / "second", launch, *xhci, machine=PC) as vm:
        pairs = (member.split("=") for member in members.split(","))
        device: dict[str, object] = {name: int(value) if value.isdecimal() else value for name, value in pairs}
        vm.qmp.execute("device_add", driver="usb-host", id="u", **device)
        wait_until(lambda: "Product QEMU USB Tablet, ID: u" in vm.qmp.hmp("info usb"), "the device")


@pytest.mark.root
def test_an_input_device_and_a_parallel_port(launch: Launch, shared_tmp: Path) -> None:
    """QEMU asks each by ioctls what it is: a keyboard's first event device, and the port's mode."""
    event, port = "/dev/input/event0", "/dev/parport0"
    options = ["-object", f"input-linux,id=i,evdev={event}", "-parallel", port]
    with plugged(shared_tmp / "first", launch, *options, machine=PC) as vm:
        assert holds(vm, event)
        assert holds(vm, port)
        vm.qmp.hmp("o /b 0x378 0x5a")
        assert "= 0x5a" in vm.qmp.hmp("i /b 0x378")  # what the port latched
    with plugged(shared_tmp / "second", launch, machine=PC) as vm, vm.balanced():
        vm.qmp.execute("object-add", qom_type="input-linux", id="i", evdev=event)
        vm.qmp.execute("chardev-add", id="p", backend={"type": "parallel", "data": {"device": port}})
        assert holds(vm, event)
        assert holds(vm, port)
        vm.qmp.execute("object-del", id="i")
        vm.qmp.execute("chardev-remove", id="p")


@pytest.mark.root
def test_a_cd_of_the_hosts(launch: Launch, shared_tmp: Path) -> None:
    """By its own driver, which asks the drive for the size."""
    options = ["-blockdev", "host_cdrom,node-name=d,filename=/dev/sr0,read-only=on", "-device", "ide-cd,drive=d,id=cd"]
    with plugged(shared_tmp / "vm", launch, *options, machine=PC) as vm:
        (drive,) = vm.qmp.execute("query-block")
        image = drive["inserted"]["image"]
        size_bytes = int(Path("/sys/block/sr0/size").read_text()) * 512
        assert (drive["inserted"]["drv"], image["filename"], image["virtual-size"]) == ("host_cdrom", "/dev/sr0", size_bytes)


@pytest.fixture
def tpm(shared_tmp: Path) -> Iterator[str]:
    """Have a TPM, whose node is root's alone; Linux gives one up that is slow to answer at first, as all is here."""
    state = shared_tmp / "tpm"
    state.mkdir()
    before = find_tpms()
    words = ["swtpm", "chardev", "--tpm2", "--vtpm-proxy", "--tpmstate", f"dir={state}"]
    for _ in range(TPM_TRIES):
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as swtpm:
            try:
                end = time.monotonic() + TPM_S
                while not (found := find_tpms() - before) and time.monotonic() < end:
                    time.sleep(0.1)
                if found:
                    yield found.pop()
                    return
            finally:
                swtpm.terminate()
    pytest.fail("Linux takes no TPM of swtpm's")


def find_tpms() -> set[str]:
    return {str(path) for path in Path("/dev").glob("tpm[0-9]*")}


@pytest.mark.root
def test_a_tpm_of_the_hosts(launch: Launch, shared_tmp: Path, tpm: str) -> None:
    """QEMU asks it for its version, which is an answer of the TPM's own. It has no file that would cancel a command."""
    options = ["-tpmdev", f"passthrough,id=t,path={tpm},cancel-path=/dev/null", "-device", "tpm-tis,tpmdev=t"]
    with plugged(shared_tmp / "vm", launch, *options, machine=PC) as vm:
        (found,) = vm.qmp.execute("query-tpm")
        assert (found["options"]["type"], found["options"]["data"]["path"]) == ("passthrough", tpm)
        assert holds(vm, tpm)


@pytest.mark.root
def test_memory_of_a_graphics_card(launch: Launch, shared_tmp: Path) -> None:
    """Blobs take /dev/udmabuf, which Debian 13's kernel has, and Debian 12's has not."""
    memory = ["-object", "memory-backend-memfd,id=m,size=32M", "-M", "pc,memory-backend=m"]
    words = [*memory, "-device", "virtio-gpu-pci,blob=on"]
    if Path("/dev/udmabuf").exists():
        with plugged(shared_tmp / "vm", launch, *words, machine=PC) as vm:
            assert holds(vm, "/dev/udmabuf")
    else:
        status, _, stderr = outcome([*dropin_words(), *launch.options], *PC, *words)
        assert (status, stderr) == (
            1,
            "qemu-userns: -device blob /dev/udmabuf: there is no such device node\n"
            "hint: load the kernel's module udmabuf: modprobe udmabuf\n",
        )


@pytest.mark.root
@pytest.mark.kvm
@pytest.mark.slow
def test_a_card_is_plugged_into_a_guest_that_runs(launch: Launch, shared_tmp: Path, spare_nic: str) -> None:
    slot = ("-device", "pcie-root-port,id=slot0,chassis=1,bus=pcie.0")
    find = "grep -l 52:54:00:12:34:56 /sys/class/net/*/address | cut -d/ -f5"
    with booting(launch, shared_tmp, *slot) as booted:
        client = booted.vm.qmp
        client.execute("device_add", driver="vfio-pci", id="v", sysfsdev=f"/sys/bus/pci/devices/{spare_nic}", bus="slot0")
        booted.guest.check("modprobe e1000e")
        booted.guest.check(wait_for(f'[ -n "$({find})" ]'))
        lease = booted.guest.check(f"ip link set $({find}) up; udhcpc -n -q -f -s /bin/true -i $({find}) 2>&1")
        assert "lease of 10.0.2." in lease
        client.execute("device_del", id="v")
        client.wait_event("DEVICE_DELETED", device="v")
        assert not any("[vfio-device]" in target for target in fds_of(booted.vm.process.pid).values())


# --- in a guest -----------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.kvm
@pytest.mark.slow
def test_a_guest_with_linux_uses_devices_of_the_hosts(
    launch: Launch, shared_tmp: Path, spare_nic: str, scsi_disk: tuple[Path, Path]
) -> None:
    """A network card, a disk by SG_IO, a CD and a USB device."""
    disk = scsi_disk[0]
    disk.write_bytes(b"of the host\n" + bytes(500))
    tablet = next(path.parent for path in Path("/sys/bus/usb/devices").glob("*/product") if "Tablet" in path.read_text())
    bus, address = ((tablet / name).read_text().strip() for name in ("busnum", "devnum"))
    extra = [
        *("-device", f"vfio-pci,host={spare_nic}", "-device", "virtio-scsi-pci,id=scsi"),
        *("-drive", f"file={disk},format=raw,if=none,id=g", "-device", "scsi-block,drive=g,bus=scsi.0"),
        *("-blockdev", "host_cdrom,node-name=cd,filename=/dev/sr0,read-only=on", "-device", "scsi-cd,drive=cd,bus=scsi.0"),
        *("-device", "qemu-xhci", "-device", f"usb-host,hostbus={bus},hostaddr={address}"),
    ]
    with running_guest([*dropin_words(), *launch.options], tmp=shared_tmp, extra=extra, accel="kvm") as guest:
        guest.check("modprobe -a e1000e virtio_scsi sd_mod sr_mod xhci_pci")
        find = "grep -l 52:54:00:12:34:56 /sys/class/net/*/address | cut -d/ -f5"
        guest.check(wait_for(f'[ -n "$({find})" ]'))
        # What the card reads and writes in the guest's memory.
        assert "lease of 10.0.2." in guest.check(f"ip link set $({find}) up; udhcpc -n -q -f -s /bin/true -i $({find}) 2>&1")
        guest.check(wait_for("[ -b /dev/sda ] && [ -b /dev/sr0 ]"))
        assert guest.check("cat /sys/block/sda/device/model; head -n 1 /dev/sda").split() == ["scsi_debug", "of", "the", "host"]
        with Path("/dev/sr0").open("rb") as cd:
            assert guest.check("md5sum </dev/sr0 | cut -c 1-32") == f"{hashlib.file_digest(cd, 'md5').hexdigest()}\n"
        guest.check(wait_for("cat /sys/bus/usb/devices/*/product | grep -q 'QEMU USB Tablet'"))
