"""A guest gets a disk, a nic and a serial port while it runs, by path and by fd, uses them, and loses them again."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.plugged import Client, Vm, plugged
from integration.shares import Launch
from integration.talk import DEADLINE_S, connected
from integration.vm import BOOT_S, GuestTimeoutError, diagnosis, machine_options, port_options
from tests.machine import ACCELERATOR

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

SLOTS = 6


class Guest:
    """The guest's shell, over a socket."""

    def __init__(self, channel: socket.socket, home: Path) -> None:
        """Wait until it has booted; `home` has its console."""
        self._channel = channel
        self._home = home
        self._received = b""
        self._lock = threading.Lock()
        channel.settimeout(BOOT_S)
        assert self._read() == "ready"

    def check(self, command: str) -> str:
        """Run shell commands that must succeed."""
        with self._lock:
            self._channel.sendall(base64.b64encode(command.encode()) + b"\n")
            status, _, output = self._read().partition(" ")
        text = base64.b64decode(output).decode(errors="replace")
        assert status == "0", f"{command}: {status}\n{text}"
        return text

    def _read(self) -> str:
        while b"\n" not in self._received:
            try:
                data = self._channel.recv(65536)
            except TimeoutError as err:
                raise GuestTimeoutError(f"no answer after {BOOT_S} s\n{diagnosis(self._home)}") from err
            assert data, "QEMU has ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()


@dataclass
class Booted:
    """A guest with slots to plug something in."""

    vm: Vm
    guest: Guest


@pytest.fixture
def booted(launch: Launch, shared_tmp: Path) -> Iterator[Booted]:
    slots = [word for n in range(SLOTS) for word in ("-device", f"pcie-root-port,id=slot{n},chassis={n + 1},bus=pcie.0")]
    with booting(launch, shared_tmp, *slots) as found:
        assert found.vm.other
        yield found


@contextlib.contextmanager
def booting(launch: Launch, folder: Path, *options: str, kernel_arguments: str = "") -> Iterator[Booted]:
    """Boot the guest, which is killed at the end."""
    home = folder / "home"
    home.mkdir()
    machine = machine_options(home, ACCELERATOR, 128, f"qemu_userns_serve {kernel_arguments}")
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as stack:
        with theirs:
            command = port_options("command", f"socket,fd={theirs.fileno()}")
            vm = stack.enter_context(
                plugged(folder / "vm", launch, *options, *command, machine=machine, pass_fds=(theirs.fileno(),))
            )
        yield Booted(vm, Guest(ours, home))


def wait_for(condition: str) -> str:
    """Return shell words that wait for a condition in the guest."""
    return f"for _ in $(seq 100); do {condition} && break; sleep 0.1; done; {condition}"


def use_disk(guest: Guest, serial: str) -> None:
    """Write to the disk of a serial number, and read it back."""
    find = f'name=$(grep -l "^{serial}$" /sys/block/vd*/serial 2>/dev/null)'
    guest.check(
        f"modprobe virtio_blk; {wait_for(find)}; disk=/dev/$(echo $name | cut -d/ -f4);"
        "head -c 512 /dev/zero | tr '\\0' Z >/tmp/block; dd if=/tmp/block of=$disk bs=512 count=1 conv=fsync && "
        "echo 3 >/proc/sys/vm/drop_caches && dd if=$disk bs=512 count=1 | cmp - /tmp/block"
    )


def unplug(client: Client, name: str) -> None:
    """Ask the guest to let a device go, and wait until it has."""
    client.execute("device_del", id=name)
    client.wait_event("DEVICE_DELETED", device=name)


def plug_disk(vm: Vm, client: Client, guest: Guest, name: str, slot: int, image: Path, fd: int | None) -> None:
    filename = str(image)
    if fd is not None:
        client.execute("add-fd", fd, fdset_id=slot + 1, opaque=str(image))
        filename = f"/dev/fdset/{slot + 1}"
    client.execute("blockdev-add", node_name=name, driver="raw", file={"driver": "file", "filename": filename})
    client.execute("device_add", driver="virtio-blk-pci", id=f"d{name}", drive=name, serial=name, bus=f"slot{slot}")
    use_disk(guest, name)
    assert image.read_bytes()[:512] == b"Z" * 512
    unplug(client, f"d{name}")
    client.execute("blockdev-del", node_name=name)
    if fd is not None:
        client.execute("remove-fd", fdset_id=slot + 1)


def plug_nic(vm: Vm, client: Client, guest: Guest, name: str, slot: int, folder: Path | None) -> None:
    """A nic whose other end is ours: by the path of our socket, or by a name of getfd."""
    mac = f"52:54:00:00:00:{slot:02x}"
    with contextlib.ExitStack() as stack:
        if folder is not None:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / name))
            vm.own(folder / name)
            listener.listen()
            listener.settimeout(DEADLINE_S)
            client.execute("netdev_add", id=name, type="stream", addr={"type": "unix", "path": str(folder / name)}, server=False)
            wire = stack.enter_context(listener.accept()[0])
        else:
            wire, theirs = socket.socketpair()
            stack.enter_context(wire)
            with theirs:
                client.execute("getfd", theirs.fileno(), fdname="wire")
            client.execute("netdev_add", id=name, type="socket", fd="wire")
        client.execute("device_add", driver="virtio-net-pci", id=f"d{name}", netdev=name, mac=mac, bus=f"slot{slot}")
        find = f'name=$(grep -l "^{mac}$" /sys/class/net/*/address 2>/dev/null)'
        guest.check(
            f"modprobe virtio_net; {wait_for(find)}; nic=$(echo $name | cut -d/ -f5);"
            f"ip link set $nic up; ip addr add 10.{slot}.0.1/24 dev $nic; arping -c 1 -w 1 -I $nic 10.{slot}.0.2; true"
        )
        wire.settimeout(DEADLINE_S)
        received = b""
        while bytes.fromhex(mac.replace(":", "")) not in received:
            received += wire.recv(65536)
        unplug(client, f"d{name}")
        client.execute("netdev_del", id=name)


def plug_port(vm: Vm, client: Client, guest: Guest, name: str, folder: Path | None) -> None:
    """A serial port, whose other end is a server of QEMU's by its path, or a socket by a name of getfd."""
    with contextlib.ExitStack() as stack:
        if folder is not None:
            address: dict[str, Any] = {"type": "unix", "data": {"path": str(folder / f"p{name}")}}
            options = {"server": True, "wait": False}
        else:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs:
                client.execute("getfd", theirs.fileno(), fdname="port")
            address, options = {"type": "fd", "data": {"str": "port"}}, {"server": False}
        client.execute("chardev-add", id=name, backend={"type": "socket", "data": {"addr": address, **options}})
        if folder is not None:
            ours = stack.enter_context(connected(folder / f"p{name}"))
        ours.settimeout(DEADLINE_S)
        client.execute("device_add", driver="virtserialport", id=f"d{name}", chardev=name, name=name, bus="ports.0")
        find = f'port=$(grep -l "^{name}$" /sys/class/virtio-ports/*/name 2>/dev/null)'
        guest.check(f"{wait_for(find)}; echo from the guest >/dev/$(echo $port | cut -d/ -f5)")
        assert ours.recv(100) == b"from the guest\n"
        client.execute("device_del", id=f"d{name}")
        client.wait_event("DEVICE_DELETED", device=f"d{name}")
        client.execute("chardev-remove", id=name)


def test_a_guest_gets_a_disk_a_nic_and_a_port_by_two_clients_at_once(booted: Booted) -> None:
    """One client names paths, the other sends fds; then what QEMU and the supervisor hold is as before."""
    vm, guest = booted.vm, booted.guest
    folder = vm.folder / "plug"
    folder.mkdir()
    by_path, by_fd = vm.image("disks/path"), vm.image("disks/fd", own=False)
    failures: list[BaseException] = []

    def second() -> None:
        fd = os.open(by_fd, os.O_RDWR)
        try:
            for _ in range(2):
                plug_disk(vm, vm.other, guest, "diskf", 0, by_fd, fd)
                plug_nic(vm, vm.other, guest, "nicf", 1, None)
                plug_port(vm, vm.other, guest, "portf", None)
        except BaseException as err:
            failures.append(err)
        finally:
            os.close(fd)

    with vm.balanced():
        thread = threading.Thread(target=second)
        thread.start()
        try:
            for _ in range(2):
                plug_disk(vm, vm.qmp, guest, "diskp", 2, by_path, None)
                plug_nic(vm, vm.qmp, guest, "nicp", 3, folder)
                (folder / "nicp").unlink()
                plug_port(vm, vm.qmp, guest, "portp", folder)
        finally:
            thread.join(BOOT_S)
        if failures:
            raise failures[0]
    assert not list(folder.iterdir())
