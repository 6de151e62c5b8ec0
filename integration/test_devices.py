"""Devices of the host that QEMU has, for each way of starting it, at launch and plugged in; and the texts where it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import select
import subprocess
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.huge_pages import HUGE_BYTES, HUGE_TOTAL, PAGES, huge_pages
from integration.plugged import Vm, plugged
from integration.shares import Launch, dropin_words
from integration.talk import DEADLINE_S, PLAIN, is_listening, outcome, started, wait_until
from integration.test_hotplug_guest import booting
from integration.vm import running_guest
from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from qemu_userns.plan.refusals import NO_NODE
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "32", "-S"]
MIB = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)
# TPM2_GetRandom for eight bytes: Trusted Platform Module Library, part 3. In shell's and in hexadecimal.
GET_RANDOM = r"\200\001\0\0\0\014\0\0\001\173\0\010"
ANSWER = "8001" + "00000014" + "00000000" + "0008" + "[0-9a-f]{16}"
PR_SCHED_CORE, PR_SCHED_CORE_GET, PR_SCHED_CORE_CREATE, SCOPE_THREAD = 62, 0, 1, 0
BLOCK = b"\x5a" * 4096


@pytest.fixture
def loop(shared_tmp: Path) -> Iterator[tuple[Path, Path]]:
    """Make a loop device, which is root's alone; return its node and its file."""
    file = shared_tmp / "loop.raw"
    file.write_bytes(bytes(MIB))
    made = subprocess.run(["losetup", "--find", "--show", file], check=True, capture_output=True, text=True)
    node = Path(made.stdout.strip())
    try:
        yield node, file
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


@pytest.fixture(params=["loop", "vg-lv"])
def named(request: pytest.FixtureRequest, shared_tmp: Path, loop: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same by the node's name or by a symlink to it, as LVM makes in /dev/mapper; the name and the file."""
    node, file = loop
    if request.param == "loop":
        return node, file
    name = shared_tmp / request.param
    name.symlink_to(node)
    return name, file


@pytest.fixture(params=["everybody's", "root's"])
def huge(request: pytest.FixtureRequest, shared_tmp: Path) -> Iterator[Path]:
    with huge_pages(shared_tmp / "huge", "1777" if request.param == "everybody's" else "755") as folder:
        yield folder


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, Path]]:
    """Make a pseudo terminal that stands for a serial line; yield one end and the name of the other."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        yield ours, Path(os.ttyname(theirs))
    finally:
        os.close(ours)
        os.close(theirs)


def said(launch: Launch, *options: str) -> tuple[str, str]:
    """Return the error of a launch that is refused, and the hint."""
    status, stdout, stderr = outcome([*dropin_words(), *launch.options], *PC, *options)
    assert (status, stdout) == (1, ""), stderr
    error, hint = stderr.splitlines()
    return error.removeprefix("qemu-userns: "), hint.removeprefix("hint: ")


def unviable(folder: Path) -> tuple[Path, Path]:
    """Make what /sys has of a device that vfio-pci drives, and of another one in its group that has the host's driver."""
    device, other = folder / "0000:01:00.0", folder / "groups/7/devices/0000:01:00.1"
    for place, driver in ((other, "e1000e"), (device, "vfio-pci")):
        place.mkdir(parents=True)
        (place / "driver").symlink_to(f"/sys/bus/pci/drivers/{driver}")
    (device / "iommu_group").symlink_to(folder / "groups/7")
    return device, other


# --- what is missing ----------------------------------------------------------------------------------------------------

MISSING = [
    (node, driver, members, remedy)
    for node, driver, members, remedy in (
        ("/dev/vhost-vsock", "vhost-vsock-pci", {"guest-cid": 5}, "load the kernel's module vhost_vsock: modprobe vhost_vsock"),
        ("/dev/vhost-scsi", "vhost-scsi-pci", {"wwpn": "naa.5001"}, "load the kernel's module vhost_scsi: modprobe vhost_scsi"),
        ("/dev/udmabuf", "virtio-gpu-pci", {"blob": True}, "load the kernel's module udmabuf: modprobe udmabuf"),
        (
            "/dev/input/event99",
            "virtio-input-host-pci",
            {"evdev": "/dev/input/event99"},
            "load the kernel's module evdev: modprobe evdev",
        ),
    )
    if not Path(node).exists()
]


@pytest.mark.parametrize(("node", "driver", "members", "remedy"), MISSING, ids=lambda value: str(value)[:30])
def test_a_missing_device_names_its_module(
    launch: Launch, shared_tmp: Path, node: str, driver: str, members: dict[str, Any], remedy: str
) -> None:
    words = ",".join([driver, *(f"{key}={'on' if value is True else value}" for key, value in members.items())])
    error, hint = said(launch, "-device", words)
    assert error.startswith("-device ")
    assert error.endswith(f" {node}: there is no such device node")
    assert hint == remedy
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced():
        desc = vm.qmp.refused("device_add", id="d", **{"driver": driver, **members})
        assert desc.startswith("device_add ")
        assert desc.endswith(f" {node}: there is no such device node ({remedy})")


ABSENT = [
    (node, options, remedy)
    for node, options, remedy in (
        ("/dev/sev", "-object sev-guest,id=s,cbitpos=47,reduced-phys-bits=1", "kvm_amd with sev=1"),
        ("/dev/sgx_vepc", "-object memory-backend-epc,id=e,size=1M,prealloc=on", "CONFIG_X86_SGX_KVM"),
        ("/dev/vhost-vdpa-0", "-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", "modprobe vhost_vdpa"),
        ("/dev/dri/renderD128", "-spice gl=on,rendernode=/dev/dri/renderD128", "load the graphics card's driver"),
        ("/dev/dri", "-display egl-headless", "load the graphics card's driver"),
        ("/dev/parport7", "-chardev parallel,id=p,path=/dev/parport7", "modprobe ppdev"),
        ("/dev/bus/usb/099/099", "-device usb-host,hostdevice=/dev/bus/usb/099/099", "`lsusb` lists those that are"),
        ("/dev/tpm9", "-tpmdev passthrough,id=t,path=/dev/tpm9", "the TPM switched on in the firmware"),
    )
    if not Path(node).exists()
]


@pytest.mark.parametrize(("node", "options", "remedy"), ABSENT, ids=lambda value: str(value)[:30])
def test_a_node_that_is_not_there_is_refused_with_what_makes_it(launch: Launch, node: str, options: str, remedy: str) -> None:
    error, hint = said(launch, *options.split())
    assert error.startswith(options.split()[0])
    assert error.endswith(f" {node}: {NO_NODE}")
    assert remedy in hint


@pytest.mark.ordinary
def test_a_device_of_another_group_names_the_group(launch: Launch, shared_tmp: Path) -> None:
    error, hint = said(launch, "-object", "rng-random,id=r,filename=/dev/hwrng")
    assert error == "-object filename /dev/hwrng: Permission denied"
    assert hint == "it belongs to 0:0 and has mode 0600; its group root would need g+r, which a udev rule can set (MODE=)"
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced():
        desc = vm.qmp.refused("object-add", qom_type="rng-random", id="r", filename="/dev/hwrng")
        assert desc == f"Could not open '/dev/hwrng': Permission denied ({hint})"


@pytest.mark.skipif(Path("/dev/vfio/vfio").exists(), reason="this kernel has vfio")
def test_what_keeps_a_device_from_vfio_is_named(launch: Launch, shared_tmp: Path) -> None:
    device, other = unviable(shared_tmp)
    words = f"vfio-pci,sysfsdev={device}"
    error, hint = said(launch, "-device", words)
    assert error == (f"-device sysfsdev {device}: iommu group 7 is not viable: e1000e drives 0000:01:00.1, which is in it too")
    assert hint == "bind it: driverctl set-override 0000:01:00.1 vfio-pci"
    (other / "driver").unlink()
    (other / "driver").symlink_to("/sys/bus/pci/drivers/pcieport")
    error, hint = said(launch, "-device", words)
    assert (error, hint) == (
        f"-device sysfsdev /dev/vfio/vfio: {NO_NODE}",
        "load the kernel's module vfio: modprobe vfio",
    )
    (device / "iommu_group").unlink()
    error, hint = said(launch, "-device", words)
    assert error == f"-device sysfsdev {device}: the device is in no iommu group"
    assert "intel_iommu=on" in hint


def test_a_protocol_that_qemu_does_not_have_is_qemus_to_refuse(launch: Launch) -> None:
    drive = ("-drive", "file=fd:3,format=raw,if=none")
    plain = outcome(PLAIN, *PC, *drive)
    assert outcome([*dropin_words(), *launch.options], *PC, *drive) == plain
    assert "Unknown protocol 'fd'" in plain[2]


# --- block devices ------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("options", ["-drive file={},format=raw,if=none,id=d", "-blockdev host_device,node-name=d,filename={}"])
def test_a_block_device_of_roots_is_written(launch: Launch, shared_tmp: Path, named: tuple[Path, Path], options: str) -> None:
    node, file = named
    with plugged(shared_tmp / "vm", launch, *options.format(node).split(), machine=PC) as vm:
        assert "host_device" in {item["drv"] for item in vm.qmp.execute("query-named-block-nodes")}
        write_block(vm, node)
    assert file.read_bytes()[:4096] == BLOCK


@pytest.mark.root
def test_a_block_device_of_roots_is_plugged_in(launch: Launch, shared_tmp: Path, named: tuple[Path, Path]) -> None:
    node, file = named
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced():
        vm.qmp.execute("blockdev-add", driver="host_device", node_name="d", filename=str(node))
        write_block(vm, node)
        vm.qmp.execute("blockdev-del", node_name="d")
    assert file.read_bytes()[:4096] == BLOCK


@pytest.mark.root
def test_a_block_device_that_is_only_read_is_not_written(launch: Launch, shared_tmp: Path, loop: tuple[Path, Path]) -> None:
    node, file = loop
    options = ["-blockdev", f"host_device,node-name=d,filename={node},read-only=on"]
    with plugged(shared_tmp / "vm", launch, *options, machine=PC) as vm:
        write_block(vm, node)
    assert file.read_bytes()[:4096] == bytes(4096)


def write_block(vm: Vm, node: Path) -> None:
    """Write the first block of a node, as a guest would."""
    vm.qmp.hmp('qemu-io d "write -P 90 0 4k"')
    vm.qmp.hmp('qemu-io d "flush"')
    subprocess.run(["blockdev", "--flushbufs", node], check=True)


# --- in a guest ---------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("huge", ["root's"], indirect=True)
def test_a_guest_has_devices_of_roots(launch: Launch, shared_tmp: Path, loop: tuple[Path, Path], huge: Path) -> None:
    """A block device, a serial line, random numbers, and memory in huge pages."""
    node, file = loop
    file_text = b"written on the host\n"
    subprocess.run(["dd", f"of={node}", "bs=4k", "conv=sync,fsync", "status=none"], input=file_text, check=True)
    options = [
        *("-drive", f"file={node},format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"),
        *("-object", "rng-random,id=r,filename=/dev/hwrng", "-device", "virtio-rng-pci,rng=r"),
        *("-object", f"memory-backend-file,id=m,mem-path={huge},size=256M,prealloc=on", "-M", "memory-backend=m"),
    ]
    with terminal() as (ours, name):
        serial = ["-chardev", f"serial,id=s,path={name}", "-device", "isa-serial,chardev=s"]
        words = [*dropin_words(), *launch.options]
        with running_guest(words, tmp=shared_tmp, extra=[*options, *serial]) as guest:
            assert f"HugetlbPages:\t  {256 << 10} kB" in (guest.proc / "status").read_text()
            assert guest.check("head -n 1 /dev/vda").encode() == file_text
            assert int(guest.check("modprobe virtio_rng; head -c 16 /dev/hwrng | wc -c")) == 16
            guest.check("printf 'written in the guest' | dd of=/dev/vda bs=4k seek=1 conv=sync,fsync 2>/dev/null")
            guest.check("stty -F /dev/ttyS1 raw -echo 2>/dev/null; printf hello >/dev/ttyS1")
            assert wait_read(ours, 5) == b"hello"
    subprocess.run(["blockdev", "--flushbufs", node], check=True)
    assert file.read_bytes()[4096:].startswith(b"written in the guest\0")


# --- explain ------------------------------------------------------------------------------------------------------------


def explained(launch: Launch, *options: str) -> list[str]:
    """Return the lines of `qemu-userns explain`."""
    words = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", PLAIN[0], *PC, *options, *launch.options]
    status, stdout, stderr = outcome(words)
    assert (status, stderr) == (0, ""), stdout
    return [line.strip() for line in stdout.splitlines()]


def test_explain_shows_a_serial_line_and_a_network_of_its_own(launch: Launch) -> None:
    with terminal() as (_, name):
        lines = explained(launch, "-serial", str(name), "-userns", "net=none")
    assert lines[lines.index("network:") + 1] == "QEMU's own, without any interface"
    if os.geteuid() == 0:
        assert f"fd 301: {name}, read-write, in /dev/fdset/{OWN_FDSET_BASE + 1}   why: -serial" in lines
    else:
        assert f"{name} (rw, device)   why: -serial" in lines


@pytest.mark.root
@pytest.mark.parametrize("huge", ["root's"], indirect=True)
def test_explain_shows_devices_of_roots(launch: Launch, loop: tuple[Path, Path], huge: Path) -> None:
    node, _ = loop
    disk = ("-drive", f"file={node},format=raw,if=none")
    shown = {
        f"{node} (block device, a node of QEMU's own)   why: -drive file",
        "/dev/hwrng (character device, a node of QEMU's own)   why: -object filename",
        f"{huge} (rw, a private directory below it, removed at QEMU's end)   why: -mem-path",
    }
    assert shown <= {*explained(launch, *disk, "-object", "rng-random,id=r,filename=/dev/hwrng", "-mem-path", str(huge))}


# --- character devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["-chardev serial,id=s,path={}", "-serial {}"])
def test_a_serial_line_of_the_host(launch: Launch, shared_tmp: Path, spelled: str) -> None:
    with terminal() as (ours, name):
        use = ["-device", "isa-serial,chardev=s"] if "-chardev" in spelled else []
        with plugged(shared_tmp / "vm", launch, *spelled.format(name).split(), *use, machine=PC) as vm:
            vm.qmp.hmp(f"o /b 0x3f8 {ord('x')}")
            assert wait_read(ours, 1) == b"x"


def test_a_serial_line_is_plugged_in(launch: Launch, shared_tmp: Path) -> None:
    with terminal() as (_, name), plugged(shared_tmp / "vm", launch) as vm, vm.balanced():  # paused, QEMU would keep the fdset
        backend = {"type": "serial", "data": {"device": str(name)}}
        vm.qmp.execute("chardev-add", id="s", backend=backend)
        assert {"label": "s", "frontend-open": False, "filename": "serial"} in vm.qmp.execute("query-chardev")
        vm.qmp.execute("chardev-remove", id="s")


def wait_read(fd: int, count: int) -> bytes:
    """Read so many bytes, or as many as come within the time."""
    data = b""
    while len(data) < count and select.select([fd], [], [], DEADLINE_S)[0]:
        data += os.read(fd, count - len(data))
    return data


@pytest.mark.root
def test_a_source_of_random_numbers_of_roots(launch: Launch, shared_tmp: Path) -> None:
    options = ["-object", "rng-random,id=r,filename=/dev/hwrng", "-device", "virtio-rng-pci,rng=r"]
    with plugged(shared_tmp / "vm", launch, *options, machine=PC) as vm, vm.balanced():
        assert vm.qmp.execute("qom-get", path="/objects/r", property="filename") == "/dev/hwrng"
        vm.qmp.execute("object-add", qom_type="rng-random", id="r2", filename="/dev/hwrng")
        vm.qmp.execute("object-del", id="r2")


@pytest.fixture
def swtpm(shared_tmp: Path) -> Iterator[list[str]]:
    """Return the options of a TPM whose socket is the caller's alone: connected outside where QEMU's id may not."""
    state, path = shared_tmp / "tpm", shared_tmp / "tpm.sock"
    state.mkdir()
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={path}", "--terminate"]
    with started(words):
        wait_until(lambda: is_listening(path), "swtpm's socket")
        backend = ["-chardev", f"socket,id=t,path={path}", "-tpmdev", "emulator,id=tpm,chardev=t"]
        yield [*backend, "-device", "tpm-tis,tpmdev=tpm"]


def test_a_tpm_of_swtpm(launch: Launch, shared_tmp: Path, swtpm: list[str]) -> None:
    with plugged(shared_tmp / "vm", launch, *swtpm, machine=PC) as vm:
        (found,) = vm.qmp.execute("query-tpm")
        assert (found["id"], found["model"], found["options"]["type"]) == ("tpm", "tpm-tis", "emulator")
        assert "0x00011014" in vm.qmp.hmp("xp /1xw 0xfed40f00")  # the vendor, as it says in its registers


@pytest.mark.slow
def test_a_guest_asks_a_tpm(launch: Launch, shared_tmp: Path, swtpm: list[str]) -> None:
    """For random numbers. With a TPM SeaBIOS leaves the kernel no ACPI, by which it would look for one."""
    with booting(launch, shared_tmp, *swtpm, kernel_arguments="tpm_tis.force=1 tpm_tis.interrupts=0") as found:
        assert found.guest.check("cat /sys/class/tpm/tpm0/tpm_version_major") == "2\n"
        ask = f"exec 3<>/dev/tpm0; printf '{GET_RANDOM}' >&3; head -c 20 <&3 | hexdump -v -e '1/1 \"%02x\"'"
        assert re.fullmatch(ANSWER, found.guest.check(ask))


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [
        ("-mem-path", "{}", "-mem-prealloc"),
        ("-object", "memory-backend-file,id=m,mem-path={},size=32M,share=on,prealloc=on", "-M", "memory-backend=m"),
    ],
    ids=["-mem-path", "-object"],
)
def test_memory_in_huge_pages(launch: Launch, shared_tmp: Path, huge: Path, options: tuple[str, ...]) -> None:
    words = [word.format(huge) for word in options]
    with plugged(shared_tmp / "vm", launch, *words, machine=PC) as vm, vm.balanced():
        status = (vm.proc / "status").read_text()
        assert f"HugetlbPages:\t   {32 * MIB >> 10} kB" in status
        spare = {"qom-type": "memory-backend-file", "id": "n", "mem-path": str(huge), "size": 4 * MIB, "prealloc": True}
        vm.qmp.execute("object-add", **spare)
        vm.qmp.execute("object-del", id="n")
    wait_until(lambda: not list(huge.iterdir()), "the end of the VM's directory")


@pytest.mark.root
@pytest.mark.parametrize("huge", ["everybody's"], indirect=True)
def test_too_few_huge_pages_name_the_sysctl(launch: Launch, huge: Path) -> None:
    many = int(HUGE_TOTAL.read_text()) + 10 * PAGES
    error, hint = said(launch, "-mem-path", str(huge), "-m", f"{many * HUGE_BYTES // MIB}")
    found = re.fullmatch(rf"-mem-path {huge}: {many} huge pages of 2048 KiB are needed, and (\d+) are to be had", error)
    assert found, error
    assert int(found[1]) < many
    assert re.match(r"sysctl vm.nr_hugepages=\d+, or /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", hint)


@pytest.mark.parametrize(
    "backend",
    ["memory-backend-ram", "memory-backend-memfd", "memory-backend-memfd,share=off", "memory-backend-file,mem-path={}"],
)
def test_memory_is_bound_to_a_node(launch: Launch, shared_tmp: Path, backend: str) -> None:
    place = shared_tmp / "memory"
    place.mkdir()
    launch.own(place)
    words = f"{backend.format(place)},id=m,size=32M,prealloc=on,host-nodes=0,policy=bind"
    with plugged(shared_tmp / "vm", launch, "-object", words, "-M", "memory-backend=m", machine=PC) as vm:
        (found,) = vm.qmp.execute("query-memdev")
        assert (found["policy"], found["host-nodes"]) == ("bind", [0])
        assert " bind:0 " in (vm.proc / "numa_maps").read_text()


@pytest.mark.ordinary
def test_a_limit_that_is_not_enough_is_named(launch: Launch) -> None:
    words = ["prlimit", f"--memlock={MIB}:{MIB}", "--", *dropin_words(), *launch.options]
    status, _, stderr = outcome(words, *PC, "-overcommit", "mem-lock=on")
    assert status == 1
    assert stderr.splitlines()[0] == (
        "qemu-userns: -overcommit mem-lock: RLIMIT_MEMLOCK (soft) is 1024 KiB, and 32768 KiB of memory are to be locked"
    )


# --- threads ------------------------------------------------------------------------------------------------------------


def test_threads_are_pinned_from_outside(launch: Launch, shared_tmp: Path) -> None:
    """By who started it, and by root: query-cpus-fast and query-iothreads tell ids of the host."""
    with plugged(shared_tmp / "vm", launch, "-smp", "2", "-object", "iothread,id=io", machine=PC) as vm:
        threads = [found["thread-id"] for found in (*vm.qmp.execute("query-iothreads"), *vm.qmp.execute("query-cpus-fast"))]
        assert len(set(threads)) == 3
        for thread, cpu in zip(threads, itertools.cycle(sorted(os.sched_getaffinity(0))), strict=False):
            assert Path(f"/proc/{vm.process.pid}/task/{thread}").exists()
            os.sched_setaffinity(thread, {cpu})
            assert os.sched_getaffinity(thread) == {cpu}
            assert os.sched_getscheduler(thread) == os.SCHED_OTHER
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
            assert os.sched_getscheduler(thread) == os.SCHED_BATCH


def test_cpu_threads_get_a_core_of_their_own_as_plain_qemus_do(launch: Launch, shared_tmp: Path) -> None:
    """Core scheduling from outside, by who started QEMU: prctl(2), PR_SCHED_CORE. It takes the right to look into a thread.

    Debian's kernels have no CONFIG_SCHED_CORE (6.1, 6.12): they answer EINVAL whatever the thread.
    """
    found = []
    for name, how in (("plain", None), ("dropin", launch)):
        with plugged(shared_tmp / name, how, machine=PC) as vm:
            (cpu,) = vm.qmp.execute("query-cpus-fast")
            found.append(share_no_core(cpu["thread-id"]))
            assert list(Path(f"/proc/{vm.process.pid}/task/{cpu['thread-id']}/fd").iterdir())
    assert found[0] == found[1]


def share_no_core(thread: int) -> tuple[int, bool]:
    """Give a thread a core scheduling cookie of its own; return the error number, and whether it has one."""
    cookie = ctypes.c_ulonglong(0)
    result = LIBC.prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, thread, SCOPE_THREAD, None)
    error = ctypes.get_errno() if result else 0
    LIBC.prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, thread, SCOPE_THREAD, ctypes.byref(cookie))
    assert error or cookie.value
    return error, cookie.value != 0


def test_threads_that_qemu_pins_itself(launch: Launch, shared_tmp: Path) -> None:
    objects = ["-object", "thread-context,id=tc,cpu-affinity=0"]
    memory = "memory-backend-ram,id=m,size=32M,prealloc=on,prealloc-context=tc"
    with plugged(shared_tmp / "vm", launch, *objects, "-object", memory, "-M", "memory-backend=m", machine=PC) as vm:
        assert vm.qmp.execute("qom-get", path="/objects/tc", property="cpu-affinity") == [0]
