"""Devices that QEMU opens by themselves, at launch and by hot-plug, against plain QEMU.

They are vhost-vsock, vhost-vdpa, usb-host, vfio-pci and iommufd. Few hosts have such devices. What this one lacks QEMU has to
miss in its own words. As root, stand-ins have the devices' names in a /dev of the test's own: QEMU's first ioctl on them fails as
plain QEMU's does, so it did get them, which its id could not open.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.plugged import Vm, compared, plugged
from integration.shares import Launch, dropin_words
from integration.talk import PLAIN, as_user, fds_of, home_of, outcome, wait_until
from qemu_userns.linux import process
from qemu_userns.plan.refusals import NO_NODE
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.plugged import Compare, Dialogue

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

# Little enough memory to be locked by whoever may lock the 8 MiB that the kernel allows.
PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "4", "-S", "-device", "qemu-xhci,id=xhci"]
LIMIT_S = 30
VSOCK = "vhost-vsock-pci,guest-cid=5,id=d"
NO_DEVICE = "0000:77:1f.0"
GROUP = "7"
MEDIATED_BUS = "/sys/bus/mdev"
RENDER_NODE = "/dev/dri/renderD128"
USB_NODE = "/dev/bus/usb/001/002"
OWN_NODE = "/dev/vfio/devices/vfio0"
STAND_INS = (
    *("vhost-vsock", "vhost-scsi", "vhost-vdpa-0", "bus/usb/001/002"),
    *(f"vfio/{GROUP}", "vfio/vfio", OWN_NODE.removeprefix("/dev/"), "iommu"),
    RENDER_NODE.removeprefix("/dev/"),
)
NEW_DEV = f"""
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 dev {{folder}}
cp -a /dev/. {{folder}} 2>/dev/null || true
mkdir -p {{folder}}/pts {{folder}}/shm {{folder}}/vfio/devices {{folder}}/bus/usb/001 {{folder}}/dri
mount --bind /dev/pts {{folder}}/pts
mount --bind /dev/shm {{folder}}/shm
for name in {" ".join(STAND_INS)}; do rm -f {{folder}}/$name; mknod -m 600 {{folder}}/$name c 1 3; done
mknod -m 600 {{folder}}/sgx_vepc c 1 5
mount --move {{folder}} /dev
"""


@pytest.fixture
def compare(launch: Launch, shared_tmp: Path) -> Compare:
    return lambda dialogue, **more: compared(shared_tmp, launch, dialogue, machine=PC, **more)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[None]:
    """Give this process a mount namespace of its own, whose /dev has stand-ins of root's alone."""
    cwd = Path.cwd()
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    process.unshare(process.CLONE_NEWNS)
    try:
        subprocess.run(["/bin/sh", "-c", NEW_DEV.format(folder=tmp_path)], check=True)
        yield
    finally:
        process.setns(before, process.CLONE_NEWNS)
        os.close(before)
        os.chdir(cwd)


@pytest.fixture
def vfio_device(shared_tmp: Path) -> Path:
    """Make what /sys has of a device that vfio-pci drives."""
    folder = shared_tmp / "made-up"
    folder.mkdir()
    (folder / "iommu_group").symlink_to(f"../../groups/{GROUP}")
    (folder / "driver").symlink_to("../../drivers/vfio-pci")
    return folder


def said(launch: Launch | None, *options: str) -> str:
    """Return why QEMU does not start."""
    words = [*(PLAIN if launch is None else dropin_words()), *PC, *options, *(launch.options if launch else ())]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1, ended
    return re.sub(r"^\S*qemu-system-\w+: ", "", ended.stderr, flags=re.MULTILINE)


def added(driver: str, **more: object) -> Dialogue:
    """Return a dialogue that plugs a device in twice, and sees what of it is left."""

    def dialogue(vm: Vm) -> list[Any]:
        answers = [vm.qmp.ask("device_add", driver=driver, id="d", **more) for _ in range(2)]
        return [*answers, vm.qmp.execute("query-fdsets"), vm.qmp.hmp("info qtree").count("dev: ")]

    return dialogue


def in_hmp(words: str) -> Dialogue:
    """Return the same in HMP, which has no error replies: what it got stays."""
    return lambda vm: [vm.qmp.hmp(f"device_add {words}") for _ in range(2)]


# --- what is not there --------------------------------------------------------------------------------------------------

MISSING = [
    "usb-host,hostbus=9,hostaddr=99",
    "usb-host,hostdevice=/dev/null",
    f"vfio-pci,host={NO_DEVICE}",
    f"vfio-pci,host={NO_DEVICE.removeprefix('0000:')}",
    "vfio-pci,host=nonsense",
    "vfio-pci,sysfsdev=/nowhere",
]


@pytest.mark.parametrize("device", MISSING)
def test_qemu_says_itself_what_is_missing(launch: Launch, device: str) -> None:
    assert said(launch, "-device", device) == said(None, "-device", device)


@pytest.mark.parametrize("device", [device for device in MISSING if "nonsense" not in device])
def test_and_when_it_is_plugged_in(launch: Launch, shared_tmp: Path, device: str) -> None:
    driver, *members = device.split(",")
    named = dict(member.split("=") for member in members if not member.startswith("id="))
    numbers = {name: int(value) if value.isdecimal() else value for name, value in named.items()}
    dialogue = added(driver, **{name.replace("-", "_"): value for name, value in numbers.items()})
    if driver != "usb-host":
        compared(shared_tmp, launch, dialogue, machine=PC)
        return
    with plugged(shared_tmp / "plain", None, machine=PC) as plain, plugged(shared_tmp / "ours", launch, machine=PC) as ours:
        assert dialogue(plain) == dialogue(ours)  # what libusb opens stays open


def test_an_object_that_this_qemu_may_not_have(compare: Compare, launch: Launch) -> None:
    assert said(launch, "-object", "iommufd,id=i") == said(None, "-object", "iommufd,id=i")
    compare(lambda vm: [vm.qmp.ask("object-add", qom_type="iommufd", id="i")])


def test_what_the_view_cannot_have_is_refused(launch: Launch, vfio_device: Path) -> None:
    assert "QEMU would look for the USB device in /sys" in said(launch, "-device", "usb-host,vendorid=0x1234")
    (vfio_device / "driver").unlink()
    (vfio_device / "driver").symlink_to("../../drivers/e1000e")
    assert "the device is driven by e1000e, not by vfio-pci" in said(launch, "-device", f"vfio-pci,sysfsdev={vfio_device}")


# --- what is there, and root's --------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("device", "error"),
    [
        (VSOCK, "vhost_set_owner failed: Inappropriate ioctl for device"),
        ('{"driver":"vhost-vsock-pci","guest-cid":5}', "vhost_set_owner failed: Inappropriate ioctl for device"),
        ("vhost-scsi-pci,wwpn=naa.5001405bd4e8476e", "Inappropriate ioctl for device"),
        ("usb-host,hostdevice=/dev/bus/usb/001/002", "failed to open host usb device /dev/bus/usb/001/002"),
        ("vfio-pci,sysfsdev={folder}", "failed to get group 7 status|error getting group status|ioctl"),
    ],
)
def test_qemu_gets_what_its_id_may_not_open(launch: Launch, vfio_device: Path, device: str, error: str) -> None:
    words = device.replace("{folder}", str(vfio_device))
    plain = said(None, "-device", words)
    assert re.search(error, plain), plain
    ours = said(launch, "-device", words)
    assert ours.partition(": ")[2].rpartition(": ")[2] == plain.partition(": ")[2].rpartition(": ")[2], ours


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_without_kvm_what_makes_it_is_said(launch: Launch) -> None:
    """By the launch, and by explain as one more row."""
    Path("/dev/kvm").unlink(missing_ok=True)
    hint = "load the kernel's module kvm_intel or kvm_amd, with virtualization switched on in the firmware"
    assert said(launch, "-accel", "kvm") == f"qemu-userns: -accel kvm /dev/kvm: {NO_NODE}\nhint: {hint}\n"
    explain = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", *PLAIN]
    status, stdout, stderr = outcome(explain, "-accel", "kvm", *launch.options)
    assert (status, stderr) == (1, "")
    assert f"refused:\n  -accel kvm /dev/kvm   why: {NO_NODE}   hint: {hint}\n" in stdout


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("named", "what"), [("", "egl-headless"), (f",rendernode={RENDER_NODE}", "rendernode")])
def test_a_graphics_card_of_a_group_names_the_group(unprivileged_user: str, named: str, what: str) -> None:
    node = Path(RENDER_NODE)
    node.unlink()
    os.mknod(node, stat.S_IFCHR, os.makedev(226, 128))
    shutil.chown(node, group="video")
    node.chmod(0o660)
    words = as_user(unprivileged_user, *dropin_words(), *PC, "-display", f"egl-headless{named}")
    hint = f"its group is video: usermod -aG video {unprivileged_user}, and log in again"
    error = f"qemu-userns: -display {what} {node}: Permission denied"
    whose = f"it belongs to 0:{node.stat().st_gid} and has mode 0660"
    assert outcome(words, env=home_of(unprivileged_user), cwd="/") == (1, "", f"{error}\nhint: {whose}; {hint}\n")


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_graphics_card_is_opened_by_its_name(launch: Launch, shared_tmp: Path) -> None:
    """Mesa asks the stand-in for its driver, and draws by itself."""
    options = ["-display", f"egl-headless,rendernode={RENDER_NODE}"]
    found = []
    for name, how in (("plain", None), ("ours", launch)):
        with plugged(shared_tmp / name, how, *options, machine=["-nodefaults", "-M", "none"]) as vm:
            found.append((vm.qmp.execute("query-display-options"), list(fds_of(vm.process.pid).values()).count(RENDER_NODE)))
    assert found[0] == found[1]
    assert found[0][1] > 0


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_memory_of_sgx_is_mapped_by_its_node(launch: Launch, shared_tmp: Path) -> None:
    """At the start and by object-add: the stand-in can be mapped."""
    epc = {"qom_type": "memory-backend-epc", "size": 1 << 20, "prealloc": True}
    found = []
    for name, how in (("plain", None), ("ours", launch)):
        options = ("-object", "memory-backend-epc,id=e,size=1M,prealloc=on")
        with plugged(shared_tmp / name, how, *options, machine=PC) as vm:
            added = vm.qmp.ask("object-add", id="f", **epc)
            shown = [(memory["id"], memory["size"], memory["share"]) for memory in vm.qmp.execute("query-memdev")]
            found.append((added, shown))
    assert found[0] == found[1]
    assert found[0][0] == {"return": {}}
    assert {("e", 1 << 20, True), ("f", 1 << 20, True)} <= set(found[0][1])


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_vdpa_node_comes_by_fd(launch: Launch, compare: Compare) -> None:
    netdev = ("-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0")
    plain, ours = (said(how, *netdev).strip().partition(": ")[2] for how in (None, launch))
    assert "Inappropriate ioctl for device" in plain
    assert ours == plain
    compare(lambda vm: [vm.qmp.ask("netdev_add", type="vhost-vdpa", id="n", vhostdev="/dev/vhost-vdpa-0") for _ in range(2)])


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_vsock_is_plugged_in(compare: Compare) -> None:
    compare(added("vhost-vsock-pci", guest_cid=5))


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_vsock_is_plugged_in_by_hmp(compare: Compare) -> None:
    compare(in_hmp("vhost-vsock-pci,guest-cid=5"), kept="vhost-vsock")


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("members", [{"hostdevice": USB_NODE}, {"hostbus": 1, "hostaddr": 2}], ids=str)
def test_a_usb_device_is_plugged_in(launch: Launch, shared_tmp: Path, members: dict[str, object]) -> None:
    error = f"failed to open host usb device {USB_NODE}"
    with plugged(shared_tmp / "plain", None, machine=PC) as vm:
        assert vm.qmp.refused("device_add", driver="usb-host", hostdevice=USB_NODE) == error
    with plugged(shared_tmp / "dropin", launch, machine=PC) as vm:
        mounts = vm.held().mounts
        assert vm.qmp.refused("device_add", driver="usb-host", id="d", **members) == error
        wait_until(lambda: vm.held().mounts == mounts, "what was shown is taken back")
        words = ",".join(f"{name}={value}" for name, value in members.items())
        assert error in vm.qmp.hmp(f"device_add usb-host,{words}")


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_vfio_device_is_plugged_in(compare: Compare, vfio_device: Path) -> None:
    compare(added("vfio-pci", sysfsdev=str(vfio_device)))


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_a_mediated_device_has_the_driver_that_divides_the_real_one(
    launch: Launch, compare: Compare, vfio_device: Path
) -> None:
    """So QEMU and we know it by its bus."""
    device = f"vfio-pci,sysfsdev={vfio_device}"
    (vfio_device / "driver").unlink()
    (vfio_device / "driver").symlink_to("../../drivers/i915")
    assert "the device is driven by i915, not by vfio-pci" in said(launch, "-device", device)
    subprocess.run(["mount", "-t", "tmpfs", "bus", "/sys/bus"], check=True)
    Path(MEDIATED_BUS).mkdir()
    (vfio_device / "subsystem").symlink_to(MEDIATED_BUS)
    plain, ours = (said(how, "-device", device) for how in (None, launch))
    assert "Inappropriate ioctl for device" in plain
    assert ours == plain
    compare(added("vfio-pci", sysfsdev=str(vfio_device)))


@pytest.mark.root
@pytest.mark.host
@pytest.mark.usefixtures("stand_ins")
def test_iommufd_and_a_device_of_it_come_by_fd(launch: Launch, shared_tmp: Path, vfio_device: Path) -> None:
    """QEMU 9.0 and later; the device's own node is not in the view."""
    own = vfio_device / "vfio-dev" / Path(OWN_NODE).name
    own.mkdir(parents=True)
    (own / "dev").write_text("1:3\n")
    options = ("-object", "iommufd,id=i", "-device", f"vfio-pci,sysfsdev={vfio_device},iommufd=i")
    error = r": error bind device fd=\d+ to iommufd=\d+: Inappropriate ioctl for device"
    for how in (None, launch):
        assert re.search(error, said(how, *options))
    # An fd that an iommufd object was given QEMU keeps when the object goes (backends/iommufd.c: owned).
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced(kept="/dev/iommu"):
        for _ in range(2):
            vm.qmp.execute("object-add", qom_type="iommufd", id="i")
            assert "/dev/iommu" in fds_of(vm.process.pid).values()
            desc = vm.qmp.refused("device_add", driver="vfio-pci", id="v", sysfsdev=str(vfio_device), iommufd="i")
            assert re.search(error, desc), desc
            assert OWN_NODE not in fds_of(vm.process.pid).values()
            assert not Path(f"/proc/{vm.process.pid}/root{OWN_NODE}").exists()
            vm.qmp.execute("object-del", id="i")


@pytest.mark.root
@pytest.mark.usefixtures("stand_ins")
def test_the_number_of_the_fd_is_the_callers_where_it_names_one(launch: Launch) -> None:
    number = os.open("/dev/vhost-vsock", os.O_RDWR)
    try:
        words = [*dropin_words(), *PC, "-device", f"{VSOCK},vhostfd={number}", *launch.options]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, pass_fds=(number,))
        assert f"vhostfd={number}: vhost_set_owner failed" in ended.stderr
    finally:
        os.close(number)
