"""Networks of passt's that QEMU would start itself: passt runs outside, for a guest at its start and while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.shares import dropin_words
from integration.talk import DEADLINE_S, IDLE, PLAIN, outcome, version_of, wait_until
from integration.test_hotplug_guest import booting, wait_for
from integration.test_netdevs import WORDS, Speaker, speaking
from qemu_userns.errors import ResourceError
from qemu_userns.host.programs import open_passt
from qemu_userns.plan.grants import Passt

if TYPE_CHECKING:
    from integration.shares import Launch
    from integration.test_hotplug_guest import Guest

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.passt]

FIRST = (10, 1)
ADDRESSES = {"address": "10.9.0.2", "netmask": "24", "gateway": "10.9.0.1"}
MAC = "52:54:00:00:00:07"
SLOT = ("-device", "pcie-root-port,id=slot0,chassis=1,bus=pcie.0")
# Of those who ask for 10.9.0.1, to everybody.
ARP = bytes.fromhex("ffffffffffff" + MAC.replace(":", "") + "0806" + "0001080006040001")
QUESTION = ARP + bytes.fromhex(MAC.replace(":", "")) + bytes((10, 9, 0, 2)) + bytes(6) + bytes((10, 9, 0, 1)) + bytes(18)


def find_passts() -> set[int]:
    found = set()
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            if comm.read_text().startswith("passt"):
                found.add(int(comm.parent.name))
    return found


def use_network(guest: Guest, port: int) -> None:
    """Get an address of passt's, and words of a server on the host's side."""
    find = f'name=$(grep -l "^{MAC}$" /sys/class/net/*/address 2>/dev/null)'
    guest.check(f"modprobe virtio_net; {wait_for(find)}; ip link set $(echo $name | cut -d/ -f5) up")
    nic = guest.check(f"{find}; echo $name | cut -d/ -f5").strip()
    assert "lease of 10.9.0.2 obtained" in guest.check(f"udhcpc -n -q -f -s /bin/true -i {nic} 2>&1")
    guest.check(f"ip addr add 10.9.0.2/24 dev {nic}")
    assert guest.check(f"(echo hello; sleep 2) | timeout 5 nc 10.9.0.1 {port}").splitlines()[0] == WORDS.decode().strip()


def test_passt_answers_and_ends_with_the_socket() -> None:
    before = find_passts()
    argv = ("/usr/bin/passt", "--quiet", *(f"--{key}={value}" for key, value in ADDRESSES.items()), "--fd=3")
    with socket.socket(fileno=open_passt(Passt("-netdev passt", argv, 9))) as ours:
        assert not os.get_inheritable(ours.fileno())
        assert find_passts() - before
        ours.settimeout(DEADLINE_S)
        ours.sendall(len(QUESTION).to_bytes(4, "big") + QUESTION)
        answer = b""
        with ours.makefile("rb") as reader:
            while answer[12:14] != b"\x08\x06":
                answer = reader.read(int.from_bytes(reader.read(4), "big"))
        assert answer[28:32] == bytes((10, 9, 0, 1))
    wait_until(lambda: find_passts() <= before, "passt gone")


@pytest.mark.parametrize("form", ["members", "json", "hot-plugged", "by HMP"])
def test_a_guest_has_a_network_of_passts(form: str, launch: Launch, shared_tmp: Path) -> None:
    members = ",".join(["passt,id=n", *(f"{key}={value}" for key, value in ADDRESSES.items())])
    words = [*dropin_words(), *launch.options]
    if version_of(*words) < FIRST:
        status, stdout, stderr = outcome(words, *IDLE, "-netdev", members)
        assert (status, stdout) == (1, "")
        assert stderr.rpartition(": -netdev")[2] == outcome(PLAIN, *IDLE, "-netdev", members)[2].rpartition(": -netdev")[2]
        return
    before = find_passts()
    written = json.dumps({"type": "passt", "id": "n", **ADDRESSES, "param": [{"str": "--ipv4-only"}]})
    netdev = {"members": ["-netdev", members], "json": ["-netdev", written]}.get(form, [])
    card = ["-device", f"virtio-net-pci,netdev=n,mac={MAC}"] if netdev else []
    server = socketserver.TCPServer(("127.0.0.1", 0), Speaker)
    with speaking(server), contextlib.ExitStack() as stack:
        booted = stack.enter_context(booting(launch, shared_tmp, *SLOT, *netdev, *card))
        client = booted.vm.qmp
        if form == "hot-plugged":
            client.execute("netdev_add", type="passt", id="n", **ADDRESSES)
        elif form == "by HMP":
            assert client.hmp(f"netdev_add {members}") == ""
        if not netdev:
            client.execute("device_add", driver="virtio-net-pci", id="d", netdev="n", mac=MAC, bus="slot0")
        assert len(find_passts() - before) == 1
        use_network(booted.guest, server.server_address[1])
        if not netdev:
            client.execute("device_del", id="d")
            client.wait_event("DEVICE_DELETED", device="d")
            client.execute("netdev_del", id="n")
            wait_until(lambda: find_passts() <= before, "passt gone with its netdev")
    wait_until(lambda: find_passts() <= before, "passt gone with QEMU")


def test_a_passt_that_refuses_says_why() -> None:
    with pytest.raises(ResourceError) as caught:
        open_passt(Passt("-netdev passt", ("/usr/bin/passt", "--bogus", "--fd=3"), 9))
    assert "-netdev passt: passt failed: " in str(caught.value)
    assert "bogus" in str(caught.value)
    with pytest.raises(ResourceError) as caught:
        open_passt(Passt("-netdev passt", ("/nowhere/passt", "--fd=3"), 9))
    assert "/nowhere/passt cannot be executed" in str(caught.value)


def test_what_cannot_be_is_refused(dropin: list[str]) -> None:
    """QEMU before passt says that it has none; then a program that is not there, and vhost-user, are refused with what helps."""
    for more, text in (("path=/nowhere/passt", "there is no such program"), ("vhost-user=on", "a nic of vhost-user takes no fd")):
        status, stdout, stderr = outcome(dropin, *IDLE, "-netdev", f"passt,id=n,{more}")
        assert (status, stdout) == (1, "")
        assert text in stderr or version_of(*dropin) < FIRST
        assert "hint: " in stderr or text not in stderr
