"""vhost-vdpa in the test host: a network card that the tests make by VDUSE, which sees how it is driven.

Source: Documentation/userspace-api/vduse.rst of the kernel, which has network cards since 6.9.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.plugged import plugged
from integration.shares import Launch, dropin_words
from integration.talk import fds_of, wait_until
from integration.test_hotplug_guest import wait_for
from integration.vm import running_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.root, pytest.mark.host]

NAME = "test"
# VDUSE reaches what is shared only.
SHARED = ["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-M", "memory-backend=m"]
PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "32", "-S"]

CREATE, DESTROY, SET_UP_QUEUE = 0x41508102, 0x41008103, 0x40208114  # VDUSE_CREATE_DEV and so on, linux/vduse.h
QUEUE_SIZE, PAGE = 1024, 4096
SET_STATUS = 1  # of its messages the one that says something here
REQUEST, RESPONSE = struct.Struct("=II16xB127x"), struct.Struct("=II16x128x")
DRIVER_OK, LINK_UP = 4, 1
VIRTIO_NET, VENDOR, QUEUES = 1, 0, 2
FEATURES = 1 << 5 | 1 << 32 | 1 << 33  # VIRTIO_NET_F_MAC, VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM
MAC = "52:54:00:aa:bb:cc"


def add_device(name: str) -> Path:
    """Have the kernel's vhost-vdpa device of one of VDUSE; return its node."""
    subprocess.run(["vdpa", "dev", "add", "name", name, "mgmtdev", "vduse"], check=True)
    wait_until(lambda: list(Path(f"/sys/bus/vdpa/devices/{name}").glob("vhost-vdpa-*")), "the vdpa device")
    node = Path("/dev", next(Path(f"/sys/bus/vdpa/devices/{name}").glob("vhost-vdpa-*")).name)
    wait_until(node.exists, f"{node}")
    return node


def load_modules() -> None:
    for module in ("vduse", "vhost_vdpa"):
        subprocess.run(["modprobe", module], check=True)


class NetworkCard:
    """A network card that no frame leaves; it tells which states its driver has set."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self._control = os.open("/dev/vduse/control", os.O_RDWR | os.O_CLOEXEC)
        config = struct.pack("=6sHH50x", bytes.fromhex(MAC.replace(":", "")), LINK_UP, 1)  # all of it, or QEMU reads nothing
        head = struct.pack("=256sIIQII52xI", NAME.encode(), VENDOR, VIRTIO_NET, FEATURES, QUEUES, PAGE, len(config))
        fcntl.ioctl(self._control, CREATE, head + config)
        self._device = os.open(f"/dev/vduse/{NAME}", os.O_RDWR | os.O_CLOEXEC)
        for index in range(QUEUES):
            fcntl.ioctl(self._device, SET_UP_QUEUE, struct.pack("=IH26x", index, QUEUE_SIZE))
        self._ending, self._end = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        """Answer the kernel until the end."""
        while self._ending not in select.select([self._device, self._ending], [], [])[0]:
            kind, number, value = REQUEST.unpack(os.read(self._device, REQUEST.size))
            if kind == SET_STATUS:
                self.states.append(value)
            os.write(self._device, RESPONSE.pack(number, 0))

    def close(self) -> None:
        """End; the kernel's vdpa device is gone."""
        os.close(self._end)
        self._thread.join()
        os.close(self._ending)
        os.close(self._device)
        fcntl.ioctl(self._control, DESTROY, struct.pack("=256s", NAME.encode()))
        os.close(self._control)


@pytest.fixture
def card() -> Iterator[tuple[NetworkCard, Path]]:
    """Return a network card, and the node of its device."""
    load_modules()
    card = NetworkCard()
    try:
        yield card, add_device(NAME)
    finally:
        subprocess.run(["vdpa", "dev", "del", NAME], check=True)
        card.close()


@pytest.mark.kvm
@pytest.mark.slow
def test_a_guest_drives_a_network_card(launch: Launch, shared_tmp: Path, card: tuple[NetworkCard, Path]) -> None:
    device, node = card
    extra = [*SHARED, "-netdev", f"vhost-vdpa,id=n,vhostdev={node}", "-device", f"virtio-net-pci,netdev=n,mac={MAC}"]
    with running_guest([*dropin_words(), *launch.options], tmp=shared_tmp, extra=extra, accel="kvm") as guest:
        assert str(node) in fds_of(guest.pid).values()
        assert not (guest.proc / f"root{node}").exists()
        guest.check("modprobe virtio_net")
        guest.check(wait_for(f"cat /sys/class/net/*/address | grep -q {MAC}"))
        guest.check("ip link set $(basename $(dirname $(grep -l {MAC} /sys/class/net/*/address))) up".replace("{MAC}", MAC))
        wait_until(lambda: device.states and device.states[-1] & DRIVER_OK, "the guest's driver")


def test_a_network_card_is_plugged_in_and_out(launch: Launch, shared_tmp: Path, card: tuple[NetworkCard, Path]) -> None:
    node = card[1]
    with plugged(shared_tmp / "vm", launch, machine=PC) as vm, vm.balanced():
        for _ in range(2):
            vm.qmp.execute("netdev_add", type="vhost-vdpa", id="n", vhostdev=str(node))
            assert str(node) in fds_of(vm.process.pid).values()
            assert "vhost-vdpa" in vm.qmp.hmp("info network")
            vm.qmp.execute("netdev_del", id="n")
