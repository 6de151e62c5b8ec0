"""What `explain` says of networks, KVM and vfio: every handover, for root and for another user."""

from __future__ import annotations

import pytest

from qemu_userns.cli.explain import describe_plan
from tests.plans import plan_of

MIB = 1 << 20
CARD = "/sys/dev/char/0:0/device (ro)"
LOCK = "RLIMIT_MEMLOCK: at least 1179648 KiB"
PASST = "fd 301: a socket to /x/passt --quiet --fd=3, run outside, which ends with it"
BOTH = None  # root's is the same


def own(node: str) -> str:
    return f"{node} (character device, a node of QEMU's own)"


def shown(words: str, root: bool) -> list[str]:
    """Return what is handed over for a command line's options, as the tables have it."""
    plan = plan_of(*words.split(), root=root, fds=(9,), version=(10, 1), lock_limit=(8 * MIB, -1))
    tables = describe_plan(plan)
    assert tables["refused"] == []
    rows = [row for name in ("view", "fds", "limits") for row in tables[name]]
    return [row["what"] for row in rows if row.get("why", "").startswith("-")]


@pytest.mark.parametrize(
    ("words", "as_user", "as_root"),
    [
        ("-netdev tap,id=n,ifname=t0,script=no,downscript=no", ["fd 301: tap t0"], BOTH),
        (
            "-nic tap,queues=2,vhost=on,script=/x/up,downscript=no",
            [
                "fds 301, 302: tap that the kernel names, 2 queues, /x/up run outside",
                "fd 303: /dev/vhost-net, read-write",
                "fd 304: /dev/vhost-net, read-write",
            ],
            BOTH,
        ),
        ("-net tap,fd=9", ["fd 9: kept"], BOTH),
        (
            "-netdev bridge,id=n,br=b0",
            ["fd 301: the tap that /usr/lib/qemu/qemu-bridge-helper --use-vnet --fd=3 --br=b0 opens, run outside"],
            BOTH,
        ),
        ("-netdev user,id=n,tftp=/x/dir", ["/x/dir (ro)"], BOTH),
        ("-netdev stream,id=n,addr.type=unix,addr.path=/x/sock", ["/x/sock (rw)"], ["fd 301: connected to /x/sock"]),
        (
            "-netdev stream,id=n,server=on,addr.type=unix,addr.path=/x/new",
            ["fd 301: listens on /x/new, removed at QEMU's end"],
            BOTH,
        ),
        ("-netdev dgram,id=n,local.type=fd,local.str=9", ["fd 9: kept"], BOTH),
        ("-netdev socket,id=n,fd=9", ["fd 9: kept"], BOTH),
        ("-netdev af-xdp,id=n,ifname=e,inhibit=on,sock-fds=9", ["fd 9: kept"], BOTH),
        (
            "-chardev socket,id=c,path=/x/sock -netdev vhost-user,id=n,chardev=c",
            ["/x/sock (rw)"],
            ["/x/sock (ro, owner 1000:1000 shown as QEMU's)"],
        ),
        (
            "-chardev socket,id=c,path=/x/sock -device vhost-user-blk-pci,chardev=c",
            ["/x/sock (rw)"],
            ["fd 301: connected to /x/sock"],
        ),
        ("-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", ["fd 301: /dev/vhost-vdpa-0, read-write"], BOTH),
        ("-device vhost-vsock-pci,guest-cid=7", ["fd 301: /dev/vhost-vsock, read-write, guest CID 7"], BOTH),
        ("-accel kvm", ["/dev/kvm (rw, device)"], BOTH),
        ("-enable-kvm", ["/dev/kvm (rw, device)"], BOTH),
        ("-machine accel=kvm:tcg", ["/dev/kvm (rw, device)"], BOTH),
        (
            "-device vfio-pci,host=01:00.0",
            ["/dev/vfio/01 (rw, device)", "/dev/vfio/vfio (rw, device)", "/sys/bus/pci/devices/0000:01:00.0 (ro)", LOCK],
            [own("/dev/vfio/01"), "/dev/vfio/vfio (rw, device)", "/sys/bus/pci/devices/0000:01:00.0 (ro)", LOCK],
        ),
        (
            "-device vfio-pci,sysfsdev=/sys/x,iommufd=i -object iommufd,id=i",
            ["/sys/x (ro)", "fd 301: /dev/vfio/devices/vfio0, read-write", "fd 302: /dev/iommu, read-write", LOCK],
            BOTH,
        ),
        ("-netdev passt,id=n,path=/x/passt", [PASST], BOTH),
        (
            "-device vfio-pci,sysfsdev=/sys/x-mdev",
            ["/dev/vfio/01 (rw, device)", "/dev/vfio/vfio (rw, device)", "/sys/x-mdev (ro)", LOCK],
            [own("/dev/vfio/01"), "/dev/vfio/vfio (rw, device)", "/sys/x-mdev (ro)", LOCK],
        ),
        ("-device vfio-pci,sysfsdev=/sys/x,fd=9", ["fd 9: kept"], BOTH),
        ("-device vhost-scsi-pci,wwpn=x", ["fd 301: /dev/vhost-scsi, read-write"], BOTH),
        ("-device usb-host,hostbus=1,hostaddr=2", ["/dev/bus/usb/001/002 (rw, device)"], [own("/dev/bus/usb/001/002")]),
        ("-object input-linux,id=i,evdev=/dev/char3", ["/dev/char3 (rw, device)"], [own("/dev/char3")]),
        ("-device u2f-passthru,hidraw=/dev/char0", ["/dev/char0 (rw, device)"], [own("/dev/char0")]),
        ("-tpmdev passthrough,id=t,path=/dev/char0", ["/dev/char0 (rw, device)"], [own("/dev/char0")]),
        ("-parallel /dev/char0", ["/dev/char0 (rw, device)"], [own("/dev/char0")]),
        ("-device virtio-gpu-pci,blob=on", ["/dev/udmabuf (rw, device)"], [own("/dev/udmabuf")]),
        ("-object sev-guest,id=s", ["/dev/sev (rw, device)"], [own("/dev/sev")]),
        ("-object memory-backend-epc,id=m,size=1M", ["/dev/sgx_vepc (rw, device)"], [own("/dev/sgx_vepc")]),
        ("-display egl-headless,rendernode=/dev/char8", ["/dev/char8 (rw, device)", CARD], [own("/dev/char8"), CARD]),
    ],
)
def test_each_handover_is_shown(words: str, as_user: list[str], as_root: list[str] | None) -> None:
    assert shown(words, root=False) == as_user
    assert shown(words, root=True) == (as_user if as_root is BOTH else as_root)
