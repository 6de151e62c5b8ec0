"""vhost-net in the test host: it is opened outside, once for each queue, and carries the data of a guest."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.networks import ip, own_network
from integration.plugged import Client
from integration.shares import Launch, dropin_words, fsdev
from integration.talk import DEADLINE_S, PLAIN, as_user, connected, fds_of, home_of, running, wait_until
from integration.test_hotplug_guest import unplug
from integration.test_kvm_host import CHROOT
from integration.test_net import IDLE, NO_SCRIPTS, Nic
from integration.vm import RunningGuest, running_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    *(pytest.mark.host, pytest.mark.root, pytest.mark.kvm),
    *(pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin),
]

VHOST = Path("/dev/vhost-net")
PORT = 9000
FOUR_QUEUES = 4
# A guest has by itself no more queues than processors; more than one of those is what KVM in an emulated processor stands badly.
# ETHTOOL_SCHANNELS of linux/ethtool.h by SIOCETHTOOL. The guest's own programs cannot, the host's Python can.
SET_QUEUES = """chroot /deb /usr/bin/python3 -IS -c '
import array, fcntl, socket, struct
channels = array.array("I", [0x3D, 0, 0, 0, 0, 0, 0, 0, %(queues)d])
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8946, struct.pack("16sP16x", b"%(name)s", channels.buffer_info()[0]))
'"""


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> Iterator[None]:
    with own_network(tmp_path):
        yield


class VhostNic(Nic):
    """A tap with vhost-net, and a server on the host's end of it."""

    def netdev(self) -> dict[str, Any]:
        return {**super().netdev(), "vhost": True}

    def use(self, guest: RunningGuest) -> None:
        """Have packets and data go there and back: a connection for each queue, as the kernel spreads them."""
        name = self.find(guest, f"10.7.{self.number}.2/24")
        if self.queues > 1:
            guest.check(SET_QUEUES % {"name": name, "queues": self.queues})
        assert int(guest.check(f"ls -d /sys/class/net/{name}/queues/rx-* | wc -l")) == self.queues
        address = f"10.7.{self.number}.1"
        guest.check(f"ping -c 2 -W {DEADLINE_S} -s 1400 {address}")
        with socket.create_server((address, PORT)) as listener:
            listener.settimeout(DEADLINE_S)
            thread = threading.Thread(target=send_back, args=(listener, self.queues))
            thread.start()
            talk = f"nc {address} {PORT} </sent >/got && cmp /sent /got && [ -s /got ] || exit 1"
            guest.check(
                f"dd if=/dev/urandom of=/sent bs=64k count=16 2>/dev/null; for _ in $(seq {self.queues}); do {talk}; done"
            )
            thread.join()


def send_back(listener: socket.socket, count: int) -> None:
    """Receive all that a client sends, and send it back; for some clients."""
    for _ in range(count):
        client, _ = listener.accept()
        with client:
            client.settimeout(DEADLINE_S)
            received = b""
            while data := client.recv(1 << 16):
                received += data
            client.sendall(received)


def vhost_fds(pid: int) -> int:
    """Count a process's fds of vhost-net."""
    return Counter(fds_of(pid).values())[str(VHOST)]


def vhost_workers(pid: int) -> int:
    """Count the kernel's threads that carry data for a process: one for each queue."""
    names = [*Path("/proc").glob("[0-9]*/comm"), *Path(f"/proc/{pid}/task").glob("*/comm")]
    found = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += name.read_text().strip() == f"vhost-{pid}"
    return found


def expect_queues(pid: int, count: int) -> None:
    """Wait until QEMU holds vhost-net as often, and the kernel has as many threads for it."""
    wait_until(lambda: (vhost_fds(pid), vhost_workers(pid)) == (count, count), f"{count} queues with vhost-net")


@pytest.mark.slow
@pytest.mark.parametrize("way", [Launch("lease"), Launch("caller")], ids=str)
def test_a_guest_talks_over_vhost_net(way: Launch, unprivileged_user: str, shared_tmp: Path) -> None:
    """With one queue and with four, from the start and plugged in; `caller` is a user with taps of his own."""
    user = unprivileged_user if way.name == "caller" else None
    nics = [VhostNic(1, user=user), VhostNic(2, FOUR_QUEUES, user), VhostNic(3, user=user), VhostNic(4, FOUR_QUEUES, user)]
    at_start, plugged_in = nics[:2], nics[2:]
    shared_tmp.chmod(0o1777)
    extra = [
        *fsdev("usr", Path("/usr"), "none", ",readonly=on"),
        *("-qmp", f"unix:{shared_tmp}/qmp,server=on,wait=off", *way.options),
        *(word for n in range(2) for word in ("-device", f"pcie-root-port,id=slot{n},chassis={n + 1},bus=pcie.0")),
        *(word for nic in at_start for word in nic.words()),
    ]
    with (
        running_guest(dropin_words(), tmp=shared_tmp, extra=extra, user=user) as guest,
        connected(shared_tmp / "qmp") as connection,
    ):
        client = Client(connection)
        expect_queues(guest.pid, 1 + FOUR_QUEUES)
        assert not (guest.proc / "root/dev/vhost-net").exists()
        guest.check(CHROOT)
        for nic in at_start:
            nic.use(guest)
        for slot, nic in enumerate(plugged_in):
            client.execute("netdev_add", **nic.netdev())
            client.execute("device_add", bus=f"slot{slot}", **nic.device())
            expect_queues(guest.pid, 1 + FOUR_QUEUES + nic.queues)
            nic.use(guest)
            unplug(client, f"d{nic.number}")
            client.execute("netdev_del", id=nic.name)
            expect_queues(guest.pid, 1 + FOUR_QUEUES)


@pytest.fixture
def closed_vhost() -> Iterator[None]:
    """Let nobody but root open vhost-net."""
    mode = VHOST.stat().st_mode & 0o777
    VHOST.chmod(0o600)
    try:
        yield
    finally:
        VHOST.chmod(mode)


@pytest.mark.usefixtures("closed_vhost")
@pytest.mark.parametrize("force", ["", ",vhostforce=on"])
def test_without_the_right_to_it_qemu_does_as_without_us(unprivileged_user: str, force: str) -> None:
    """It complains, and fails with vhostforce=on. (QEMU 7.2 aborts otherwise, by an assertion of its own.)"""
    ip("tuntap", "add", "dev", "mine", "mode", "tap", "user", unprivileged_user)
    tap = f"tap,id=n,ifname=mine,{NO_SCRIPTS},vhost=on{force}"
    found = []
    for way in (PLAIN, dropin_words()):
        words = as_user(unprivileged_user, *way, *IDLE, "-monitor", "stdio", "-netdev", tap)
        environment = home_of(unprivileged_user)
        done = subprocess.run(
            words, input="quit\n", capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=environment, cwd="/"
        )
        said = re.search(r"(?:(?:warning: )?tap: open vhost char device failed|Could not open '/dev/vhost-net'): .*", done.stderr)
        assert said, done.stderr
        found.append((done.returncode, said.group()))
    assert found[0] == found[1]
    assert found[0][1].endswith(": Permission denied")


def test_vhostforce_alone_is_enough() -> None:
    with running([*dropin_words()], "-netdev", f"tap,id=n,ifname=t0,{NO_SCRIPTS},vhostforce=on") as vm:
        assert (vhost_fds(vm.pid), vhost_workers(vm.pid)) == (1, 1)
        vm.quit()


def test_an_fd_of_the_callers_is_kept() -> None:
    """As libvirt passes it."""
    with VHOST.open("r+b", buffering=0) as vhost:
        number = os.dup(vhost.fileno())
        value = f"tap,id=n,ifname=t0,{NO_SCRIPTS},vhost=on,vhostfd={number}"
        with running([*dropin_words()], "-netdev", value, pass_fds=(number,)) as vm:
            os.close(number)
            assert (vhost_fds(vm.pid), vhost_workers(vm.pid)) == (1, 1)
            assert os.readlink(vm.proc / f"fd/{number}") == str(VHOST)
            vm.quit()
