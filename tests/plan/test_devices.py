"""Devices on made-up hosts: how they are handed over, and what is said where something is missing."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from qemu_userns.cli.explain import describe_plan
from qemu_userns.plan.facts import ABSENT, CHARACTER, DIRECTORY, MISSING, REGULAR, Account, PagesFact, PathFact
from qemu_userns.plan.grants import LockLimit, OpenFd, Refuse
from qemu_userns.plan.refusals import NO_NODE, explain_denied, find_remedy
from tests.plans import asked_for, plan_of

if TYPE_CHECKING:
    from qemu_userns.plan.plan import Plan

MIB = 1 << 20
LIMITED = (8 * MIB, 16 * MIB)
VFIO = ("-device", "vfio-pci,sysfsdev=/sys/x")
KVM_GONE = {"/dev/kvm": PathFact("/dev/kvm", "/dev/kvm", ABSENT)}


def node(path: str, mode: int = 0o660, group: str = "kvm", *, may: bool = False, device: int = 0) -> PathFact:
    """Return the fact of a device node of root's and a group's."""
    named = "" if may else group
    mode |= stat.S_IFCHR
    return PathFact(path, path, CHARACTER, mode=mode, gid=104, device=device, group=named, readable=may, writable=may)


def absent(path: str, error: str | None = None) -> dict[str, PathFact]:
    return {path: PathFact(path, path, ABSENT, error=error)}


def refusals(plan: Plan) -> list[tuple[str, str, str | None]]:
    return [(grant.why, grant.reason, grant.hint) for grant in plan.grants if isinstance(grant, Refuse)]


def locks(*argv: str, lock_limit: tuple[int, int] = (8 * MIB, -1), **options: Any) -> list[int | None]:
    found = plan_of(*argv, lock_limit=lock_limit, **options)
    assert not refusals(found)
    return [grant.limit_bytes for grant in found.grants if isinstance(grant, LockLimit)]


# --- what is missing is named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "path", "remedy"),
    [
        (("-device", "vhost-vsock-pci,guest-cid=3"), "/dev/vhost-vsock", "modprobe vhost_vsock"),
        (("-device", "vhost-scsi-pci,wwpn=x"), "/dev/vhost-scsi", "modprobe vhost_scsi"),
        (("-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"), "/dev/vhost-vdpa-0", "modprobe vhost_vdpa"),
        (("-device", "vhost-vdpa-device-pci,vhostdev=/dev/vhost-vdpa-0"), "/dev/vhost-vdpa-0", "modprobe vhost_vdpa"),
        (("-object", "iommufd,id=i"), "/dev/iommu", "modprobe iommufd"),
        (VFIO, "/dev/vfio/vfio", "modprobe vfio"),
        (VFIO, "/dev/vfio/01", "modprobe vfio-pci"),
        (("-device", "vfio-pci,sysfsdev=/sys/x,iommufd=i"), "/dev/vfio/devices/vfio0", "CONFIG_VFIO_DEVICE_CDEV"),
        (("-device", "usb-host,hostdevice=/dev/bus/usb/001/002"), "/dev/bus/usb/001/002", "lsusb"),
        (("-object", "input-linux,id=i,evdev=/dev/input/event3"), "/dev/input/event3", "modprobe evdev"),
        (("-device", "u2f-passthru,hidraw=/dev/hidraw0"), "/dev/hidraw0", "plug the device in"),
        (("-device", "virtio-gpu-pci,blob=on"), "/dev/udmabuf", "modprobe udmabuf"),
        (("-display", "egl-headless,rendernode=/dev/dri/renderD128"), "/dev/dri/renderD128", "graphics card's driver"),
        (("-object", "sev-guest,id=s"), "/dev/sev", "sev=1"),
        (("-object", "memory-backend-epc,id=m,size=1M"), "/dev/sgx_vepc", "CONFIG_X86_SGX_KVM"),
        (("-tpmdev", "passthrough,id=t,path=/dev/tpm0"), "/dev/tpm0", "tpm_tis"),
        (("-chardev", "parallel,id=c,path=/dev/parport0"), "/dev/parport0", "modprobe ppdev"),
        (("-accel", "kvm"), "/dev/kvm", "kvm_intel or kvm_amd"),
    ],
)
@pytest.mark.parametrize("error", [None, MISSING])
def test_a_node_that_is_not_there_names_what_makes_it(argv: tuple[str, ...], path: str, remedy: str, error: str | None) -> None:
    ((why, reason, hint),) = refusals(plan_of(*argv, paths=absent(path, error), version=(10, 0)))
    assert why.endswith(path)
    assert why.startswith(argv[0])
    assert reason == NO_NODE
    assert remedy in (hint or "")


def test_a_qemu_without_iommufd_says_so_itself() -> None:
    assert refusals(plan_of("-object", "iommufd,id=i", paths=absent("/dev/iommu"))) == []


def test_the_longest_path_names_the_module() -> None:
    assert find_remedy("/dev/vfio/7") == "load the kernel's module vfio-pci: modprobe vfio-pci"
    assert "CONFIG" in (find_remedy("/dev/vfio/devices/vfio0") or "")
    assert find_remedy("/dev/null") is None
    assert find_remedy("/home/user/disk") is None


@pytest.mark.parametrize(
    ("fact", "want", "hint"),
    [
        (
            node("/dev/kvm"),
            6,
            "it belongs to 0:104 and has mode 0660; its group is kvm: usermod -aG kvm user, and log in again",
        ),
        (
            node("/dev/kvm", 0o640),
            6,
            "it belongs to 0:104 and has mode 0640; its group kvm would need g+rw, which a udev rule can set (MODE=)",
        ),
        (
            node("/dev/kvm", 0o600),
            4,
            "it belongs to 0:104 and has mode 0600; its group kvm would need g+r, which a udev rule can set (MODE=)",
        ),
        (
            node("/x/file", 0o600, ""),
            4,
            "it belongs to 0:104 and has mode 0600; be its owner, in its group, or change the mode",
        ),
    ],
)
def test_what_may_not_be_opened_names_group_or_mode(fact: PathFact, want: int, hint: str) -> None:
    assert explain_denied(fact, Account("user", 1000, 1000, (1000,)), want) == hint


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (("-device", "vhost-vsock-pci,guest-cid=3"), "/dev/vhost-vsock"),
        (("-netdev", "vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0"), "/dev/vhost-vdpa-0"),
        (("-object", "iommufd,id=i"), "/dev/iommu"),
        (("-device", "vfio-pci,sysfsdev=/sys/x,iommufd=i"), "/dev/vfio/devices/vfio0"),
        (("-device", "usb-host,hostbus=1,hostaddr=2"), "/dev/bus/usb/001/002"),
        (("-object", "input-linux,id=i,evdev=/dev/input/event3"), "/dev/input/event3"),
        (VFIO, "/dev/vfio/01"),
        (("-accel", "kvm"), "/dev/kvm"),
    ],
)
def test_a_device_that_the_caller_may_not_open_is_refused(argv: tuple[str, ...], path: str) -> None:
    ((why, reason, hint),) = refusals(plan_of(*argv, paths={path: node(path)}, version=(9, 0)))
    assert (why.rpartition(" ")[2], reason) == (path, "Permission denied")
    assert "usermod -aG kvm user" in (hint or "")


# --- kvm ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [KVM_GONE, {"/dev/kvm": node("/dev/kvm")}])
@pytest.mark.parametrize("argv", [("-accel", "kvm"), ("-enable-kvm",), ("-M", "q35,accel=kvm"), ("-accel", "kvm,x=1")])
def test_kvm_that_nothing_can_stand_in_for_is_refused(argv: tuple[str, ...], paths: dict[str, PathFact]) -> None:
    ((why, _, _),) = refusals(plan_of(*argv, paths=paths))
    assert why.endswith(" /dev/kvm")


@pytest.mark.parametrize(
    "argv", [("-M", "q35,accel=kvm:tcg"), ("-accel", "kvm", "-accel", "tcg"), ("-accel", "tcg", "-accel", "kvm")]
)
def test_kvm_that_tcg_can_stand_in_for_is_left_to_qemu(argv: tuple[str, ...]) -> None:
    assert asked_for(plan_of(*argv, paths=KVM_GONE)) == []
    assert refusals(plan_of(*argv, paths={"/dev/kvm": node("/dev/kvm")})) == []


def test_a_newer_qemu_gets_kvm_in_an_fdset() -> None:
    paths = {"/dev/kvm": node("/dev/kvm", may=True)}
    plan = plan_of("-accel", "kvm,kernel-irqchip=on", root=True, paths=paths, version=(9, 0))
    assert asked_for(plan) == ["open /dev/kvm rw"]
    (grant,) = [grant for grant in plan.grants if isinstance(grant, OpenFd)]
    fdset = OWN_FDSET_BASE + 1
    words = ("-accel", f"kvm,kernel-irqchip=on,device=/dev/fdset/{fdset}")
    assert plan.words[-2:] == words
    assert ("-add-fd", f"fd={grant.number},set={fdset},opaque=/dev/kvm") in zip(plan.words, plan.words[1:], strict=False)


@pytest.mark.parametrize(("argv", "version"), [(("-accel", "kvm"), (8, 2)), (("-enable-kvm",), (10, 0))])
def test_other_qemus_get_a_node_of_their_own(argv: tuple[str, ...], version: tuple[int, ...]) -> None:
    paths = {"/dev/kvm": node("/dev/kvm", may=True)}
    assert asked_for(plan_of(*argv, root=True, paths=paths, version=version)) == ["node /dev/kvm"]


def test_kvm_that_qemu_may_open_is_shown_whatever_its_version() -> None:
    assert asked_for(plan_of("-accel", "kvm", version=(10, 0))) == ["device /dev/kvm"]


# --- vsock --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cid"), [("3", 3), ("0x1f", 31), ("4294967294", 0xFFFFFFFE), ("2", None), ("4294967295", None), ("x", None)]
)
def test_a_guests_number_is_taken_with_the_device(text: str, cid: int | None) -> None:
    plan = plan_of("-device", f"vhost-vsock-pci,guest-cid={text}")
    assert [grant.guest_cid for grant in plan.grants if isinstance(grant, OpenFd)] == [cid]


# --- TPMs ---------------------------------------------------------------------------------------------------------------

CANCEL = "/sys/class/misc/tpm0/device/cancel"
TPM = ("-tpmdev", "passthrough,id=t,path=/dev/tpm0")


def tpm_host(may: bool = True) -> dict[str, PathFact]:
    """Return a host whose TPM has a file that cancels commands, root's alone."""
    cancel = PathFact(CANCEL, "/sys/devices/x/cancel", REGULAR, mode=stat.S_IFREG | 0o200, readable=may, writable=may)
    return {"/dev/tpm0": node("/dev/tpm0", 0o666, may=True), CANCEL: cancel, **absent("/sys/class/tpm/tpm0/device/cancel")}


def test_what_cancels_a_tpms_command_comes_with_it() -> None:
    plan = plan_of(*TPM, root=True, paths=tpm_host())
    assert asked_for(plan) == ["device /dev/tpm0", "open /sys/devices/x/cancel w"]
    assert plan.words[-1] == f"passthrough,id=t,path=/dev/tpm0,cancel-path=/dev/fdset/{OWN_FDSET_BASE + 1}"
    assert asked_for(plan_of(*TPM, paths=tpm_host())) == ["device /dev/tpm0", "rw /sys/devices/x/cancel"]
    assert asked_for(plan_of(*TPM, paths=tpm_host(may=False))) == ["device /dev/tpm0"]
    named = (TPM[0], f"{TPM[1]},cancel-path=/x/file")
    assert asked_for(plan_of(*named, paths=tpm_host())) == ["device /dev/tpm0", "rw /x/file"]


# --- graphics -----------------------------------------------------------------------------------------------------------


def render_host(*may: bool) -> dict[str, PathFact]:
    """Return a host with render nodes that the caller may or may not open."""
    names = tuple(f"renderD{128 + number}" for number in range(len(may)))
    nodes = {
        f"/dev/dri/{name}": node(f"/dev/dri/{name}", group="render", may=it, device=226 << 8 | 128 + number)
        for number, (name, it) in enumerate(zip(names, may, strict=True))
    }
    return {"/dev/dri": PathFact("/dev/dri", "/dev/dri", DIRECTORY, entries=names), **nodes}


def test_the_render_nodes_that_the_caller_may_open_are_shown_with_their_cards() -> None:
    assert asked_for(plan_of("-display", "egl-headless", paths=render_host(False, True))) == [
        "device /dev/dri/renderD129",
        "ro /sys/dev/char/226:129/device",
    ]


def test_render_nodes_that_nobody_may_open_are_refused() -> None:
    ((why, reason, hint),) = refusals(plan_of("-spice", "gl=on", paths=render_host(False)))
    assert (why, reason) == ("-spice gl /dev/dri/renderD128", "Permission denied")
    assert "usermod -aG render user" in (hint or "")


# --- terminals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-chardev", "serial,id=s,path=/dev/pts/7"), ["-chardev", "serial,id=s,path={}"]),
        (("-serial", "/dev/pts/7"), ["-chardev", "serial,id=serial0,path={}", "-serial", "chardev:serial0"]),
    ],
)
def test_a_terminal_comes_in_an_fdset(argv: tuple[str, ...], words: list[str]) -> None:
    plan = plan_of(*argv, root=True, paths={"/dev/pts/7": node("/dev/pts/7", may=True)})
    assert asked_for(plan) == ["open /dev/pts/7 rw"]
    name = f"/dev/fdset/{OWN_FDSET_BASE + 1}"
    assert list(plan.words[-len(words) :]) == [word.format(name) for word in words]


# --- locked memory ------------------------------------------------------------------------------------------------------


def test_root_may_lock_what_vfio_locks() -> None:
    assert locks(*VFIO, root=True) == [(128 + 1024) * MIB]
    assert locks(*VFIO, "-m", "512", root=True) == [(512 + 1024) * MIB]
    assert locks(*VFIO, "-m", "size=1G,slots=2,maxmem=4G", root=True) == [(4096 + 1024) * MIB]
    assert locks(*VFIO, "-m", "2g", root=True, lock_limit=(-1, -1)) == []
    assert locks(*VFIO, "-m", "2g", root=True, lock_limit=(1 << 40, 1 << 40)) == []


def test_with_an_iommu_in_the_guest_each_device_locks_it_all() -> None:
    two = (*VFIO, "-device", "vfio-pci,sysfsdev=/sys/y", "-m", "1G")
    assert set(locks(*two, root=True)) == {2048 * MIB}
    assert set(locks(*two, "-device", "intel-iommu", root=True)) == {3072 * MIB}


def test_an_ordinary_callers_hard_limit_has_to_be_enough_for_vfio() -> None:
    assert locks(*VFIO, lock_limit=(8 * MIB, -1)) == [1152 * MIB]
    assert locks(*VFIO, lock_limit=(8 * MIB, 2048 * MIB)) == [1152 * MIB]
    assert locks(*VFIO, lock_limit=(8 * MIB, 200 * MIB)) == [200 * MIB]  # the device's own memory may be little
    assert refusals(plan_of(*VFIO, root=True, lock_limit=LIMITED))  # as root without CAP_SYS_RESOURCE
    ((why, reason, hint),) = refusals(plan_of(*VFIO, lock_limit=LIMITED))
    assert why == "-device sysfsdev"
    assert reason == "RLIMIT_MEMLOCK (hard) is 16384 KiB, and 131072 KiB of memory are to be locked"
    assert "limits.conf" in (hint or "")


def test_all_of_qemu_may_be_locked() -> None:
    lock = ("-overcommit", "mem-lock=on", "-m", "64")
    assert locks(*lock, root=True) == [None]
    assert locks(*lock, root=True, lock_limit=(-1, -1)) == []
    assert locks(*lock, lock_limit=(64 * MIB, 64 * MIB)) == []
    assert refusals(plan_of(*lock, root=True, lock_limit=LIMITED))
    ((_, reason, _),) = refusals(plan_of(*lock, lock_limit=LIMITED))
    assert reason == "RLIMIT_MEMLOCK (soft) is 8192 KiB, and 65536 KiB of memory are to be locked"
    assert asked_for(plan_of("-overcommit", "mem-lock=off", lock_limit=LIMITED)) == []


@pytest.mark.parametrize(("free", "root"), [(16, False), (15, False), (15, True)])
def test_huge_pages_have_to_be_there(free: int, root: bool) -> None:
    pages = PagesFact(2 * MIB, free, 20)
    paths = {"/x/dir": PathFact("/x/dir", "/x/dir", DIRECTORY, uid=1000, mode=0o40700, readable=True, writable=True, pages=pages)}
    for argv in (("-mem-path", "/x/dir", "-m", "32"), ("-object", "memory-backend-file,id=m,size=32M,mem-path=/x/dir")):
        found = plan_of(*argv, root=root, paths=paths)
        if free == 16:
            assert asked_for(found) == ["rw /x/dir"]
            continue
        ((_, reason, hint),) = refusals(found)
        assert reason == "16 huge pages of 2048 KiB are needed, and 15 are to be had"
        assert hint == "sysctl vm.nr_hugepages=21, or /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


def test_a_directory_of_roots_gets_one_of_qemus_for_memory() -> None:
    fact = PathFact("/x/dir", "/x/dir", DIRECTORY, mode=0o40755, readable=True, writable=True)
    memory = ("-object", "memory-backend-file,id=m,size=32M,mem-path=/x/dir")
    twice = (*memory, "-object", "memory-backend-file,id=n,size=32M,mem-path=/x/dir")
    assert asked_for(plan_of(*twice, root=True, paths={"/x/dir": fact})) == ["createdir /x/dir"]


@pytest.mark.parametrize(
    ("size", "expected"), [("0.5G", 512), ("1t", 1 << 20), ("64M", 64), ("x", 128), ("", 128), ("67108864b", 64)]
)
def test_sizes_are_read_as_qemu_reads_them(size: str, expected: int) -> None:
    assert locks(*VFIO, "-m", size, root=True) == [(expected + 1024) * MIB]


# --- explain ------------------------------------------------------------------------------------------------------------


def test_explain_shows_each_handover() -> None:
    device = ("-device", "vhost-vsock-pci,guest-cid=3", "-accel", "kvm")
    paths = {"/dev/kvm": node("/dev/kvm", may=True)}
    tables = describe_plan(plan_of(*VFIO, *device, root=True, paths=paths, version=(10, 0), lock_limit=(8 * MIB, -1)))
    assert tables["limits"] == [{"what": "RLIMIT_MEMLOCK: at least 1179648 KiB", "why": "-device sysfsdev"}]
    fds = [row["what"].partition(": ")[2] for row in tables["fds"]]
    assert "/dev/vhost-vsock, read-write, guest CID 3" in fds
    assert f"/dev/kvm, read-write, in /dev/fdset/{OWN_FDSET_BASE + 1}" in fds
    assert {"what": "/dev/vfio/01 (character device, a node of QEMU's own)", "why": "-device sysfsdev"} in tables["view"]


def test_explain_shows_what_is_missing() -> None:
    (refused,) = describe_plan(plan_of("-device", "virtio-gpu-pci,blob=on", paths=absent("/dev/udmabuf")))["refused"]
    assert refused == {
        "what": "-device blob /dev/udmabuf",
        "why": NO_NODE,
        "hint": "load the kernel's module udmabuf: modprobe udmabuf",
    }
