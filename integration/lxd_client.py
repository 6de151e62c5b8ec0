"""LXD's QMP client, byte for byte, and what it says to a VM (contracts/lxd.md 2)."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration.talk import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.lxd_conf import Shape

LIMIT_S = 60.0
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 2, 0x1000
IMAGE_SIZE = 2**20
FREE_PORT = "qemu_pcie11"


class LxdClient:
    """A monitor connection as LXD has it: one command at a time, written without a newline, its fd in the same sendmsg."""

    def __init__(self, connection: socket.socket, shape: Shape) -> None:
        """Borrow the connection, and read the greeting."""
        connection.settimeout(LIMIT_S)
        self._connection, self._shape = connection, shape
        self._reader = connection.makefile("rb", buffering=0)
        self._last_id = 0
        self.seen: list[str] = []
        greeting = self._read()
        assert greeting["QMP"]["capabilities"] == ["oob"]
        self.ask("qmp_capabilities")

    def close(self) -> None:
        self._reader.close()

    def ask(self, command: str, fd: int | None = None, /, **arguments: Any) -> Any:
        """Send a command, return its reply's return value, None if it is an error."""
        return self.reply(command, fd, **arguments).get("return")

    def reply(self, command: str, fd: int | None = None, /, **arguments: Any) -> dict[str, Any]:
        """Send a command, return its reply."""
        self.send(command, fd, **arguments)
        return self.read_reply()

    def send(self, command: str, fd: int | None = None, /, **arguments: Any) -> None:
        """Send a command."""
        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        if self._shape.numbered:
            self._last_id += 1
            message["id"] = self._last_id
        if command in self._shape.single_quoted:
            data = json.dumps(message).replace('"', "'")
        else:
            data = json.dumps(message, separators=(",", ":"))
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        assert self._connection.sendmsg([data.encode()], rights) == len(data)

    def read_reply(self) -> dict[str, Any]:
        """Read as far as to the reply of the last command."""
        while "event" in (reply := self._read()):
            pass
        if self._shape.numbered:
            assert reply["id"] == self._last_id
        return reply

    def poll(self, command: str) -> Any:
        """Ask, and forget it: how often one has to, and what is said then, differ."""
        seen, last_id = list(self.seen), self._last_id
        reply = self.ask(command)
        self.seen, self._last_id = seen, last_id
        return reply

    def wait_for(self, event: str) -> None:
        """Wait for an event that comes some time before or after the reply, and forget when."""
        while not (found := [line for line in self.seen if f'"event": "{event}"' in line]):
            self._read()
        self.seen = [line for line in self.seen if line not in found]

    def read_to_end(self) -> None:
        """Read until QEMU closes the connection."""
        while line := self._reader.readline():
            self.seen.append(line.decode())

    def events(self) -> list[dict[str, Any]]:
        """Return the events so far."""
        return [message for message in map(json.loads, self.seen) if "event" in message]

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        assert line.endswith(b"\n"), line
        self.seen.append(line.decode())
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


@contextlib.contextmanager
def connected_as_lxd(path: Path, shape: Shape) -> Iterator[LxdClient]:
    """Connect once, without waiting."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        client = LxdClient(connection, shape)
        with contextlib.closing(client):
            yield client


@contextlib.contextmanager
def image_fd(folder: Path, name: str, flags: int = os.O_RDWR) -> Iterator[int]:
    """Give an open image that only its owner may open."""
    path = folder / name
    path.write_bytes(bytes(IMAGE_SIZE))
    path.chmod(0o600)
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def nic_fd() -> Iterator[tuple[str, int]]:
    """Give a netdev type and an fd for it: a tap where we may make one, else a socket."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR)
            stack.callback(os.close, fd)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"lxdtest%d", IFF_TAP | IFF_NO_PI))
        except OSError:
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            stack.enter_context(pair[0])
            stack.enter_context(pair[1])
            yield "socket", pair[1].fileno()
        else:
            yield "tap", fd


def boot_as_lxd(client: LxdClient, folder: Path, pid: int) -> None:
    """Say what LXD says before the VM runs (contracts/lxd.md 2.2)."""
    client.ask("query-version")
    for _ in range(3):
        client.ask("ringbuf-read", device="qemu_serial-chardev", size=16, format="utf8")
    slots = [slot for slot in client.ask("query-hotpluggable-cpus") if "qom-path" not in slot]
    client.ask("device_add", driver=slots[0]["type"], id="cpu1", **slots[0]["props"])
    threads = {cpu["thread-id"] for cpu in client.ask("query-cpus-fast")}
    assert len(threads) == 2
    assert threads <= {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
    for thread in threads:
        os.sched_setaffinity(thread, {0})
        assert os.sched_getaffinity(thread) == {0}
    with image_fd(folder, "root.img") as fd:
        add_disk(client, fd, "lxd_root", "rdwr", read_only=False)
    with image_fd(folder, "cd.iso", os.O_RDONLY) as fd:
        add_disk(client, fd, "lxd_cd", "rdonly", read_only=True)
    client.ask("block_set_io_throttle", id="dev-lxd_root", bps=0, bps_rd=1000, bps_wr=0, iops=0, iops_rd=0, iops_wr=0)
    with nic_fd() as (kind, fd):
        client.ask("getfd", fd, fdname="/dev/net/tun.0")
        fds = {"fds": "/dev/net/tun.0", "vhost": False} if kind == "tap" else {"fd": "/dev/net/tun.0"}
        assert client.ask("netdev_add", id="lxd_eth0", type=kind, **fds) == {}
    nic = {"driver": "virtio-net-pci", "bus": FREE_PORT, "addr": "00.0", "mac": "00:16:3e:00:00:01"}
    assert client.ask("device_add", id="dev-lxd_eth0", netdev="lxd_eth0", **nic) == {}
    ours, theirs = socket.socketpair()
    with ours:
        path = str(folder / "virtiofs.sock")
        with theirs:
            client.ask("getfd", theirs.fileno(), fdname=path)
        backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": path}}, "server": False}}
        assert client.ask("chardev-add", id="lxd_share", backend=backend) is not None
        client.ask("chardev-remove", id="lxd_share")
        assert ours.recv(1) == b""
    client.ask("closefd", fdname="/dev/net/tun.0")
    client.ask("query-fdsets")
    client.ask("system_reset")
    assert client.ask("set-action", shutdown="poweroff", reboot="shutdown", panic="pause") == {}


def add_disk(client: LxdClient, fd: int, name: str, access: str, *, read_only: bool) -> None:
    found = client.ask("add-fd", fd, opaque=f"{access}:{name}")
    node = {"driver": "file", "node-name": name, "filename": f"/dev/fdset/{found['fdset-id']}", "read-only": read_only}
    cache = {"direct": False, "no-flush": False}
    assert client.ask("blockdev-add", aio="threads", cache=cache, discard="unmap", locking="off", **node) == {}
    kind = "scsi-cd" if read_only else "scsi-hd"
    assert client.ask("device_add", id=f"dev-{name}", driver=kind, drive=name, bus="qemu_scsi.0") == {}


def work_as_lxd(client: LxdClient) -> None:
    """Say what LXD says to a VM that runs, after a new connection (contracts/lxd.md 2.3)."""
    assert client.ask("cont") == {}
    client.ask("query-status")
    client.ask("query-blockstats")
    client.ask("device_del", id="dev-lxd_cd")  # nobody answers in the guest, which scsi does not mind
    client.wait_for("DEVICE_DELETED")
    client.ask("blockdev-del", **{"node-name": "lxd_cd"})
    remove_fd(client, "rdonly:lxd_cd")
    client.ask("blockdev-del", **{"node-name": "no such node"})
    client.ask("blockdev-add", driver="file", filename="/dev/fdset/77", **{"node-name": "a"})
    client.ask("getfd", fdname="without")
    client.ask("add-fd", opaque="rdwr:without")
    client.ask("ringbuf-read", device="qemu_serial-chardev", size=16, format="utf8")
    client.ask("stop")
    migrate_to_pipe(client)


def remove_fd(client: LxdClient, opaque: str) -> None:
    for fdset in client.ask("query-fdsets"):
        if any(fd.get("opaque") == opaque for fd in fdset["fds"]):
            client.ask("remove-fd", **{"fdset-id": fdset["fdset-id"]})
    assert opaque not in str(client.ask("query-fdsets"))


def migrate_to_pipe(client: LxdClient) -> bytes:
    """Save the VM's state as a stateful stop does, and return it."""
    read, write = os.pipe()
    received: list[bytes] = []

    def drain() -> None:
        while data := os.read(read, 1 << 20):
            received.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        try:
            client.ask("getfd", write, fdname="migration")
        finally:
            os.close(write)
        assert client.ask("migrate", uri="fd:migration") == {}
        wait_for_migration(client)
    finally:
        reader.join(LIMIT_S)
        os.close(read)
    state = b"".join(received)
    assert len(state) > 1000
    return state


def migrate_from(client: LxdClient, state: int) -> None:
    """Load a VM's state from a file as a stateful start does; borrows the fd."""
    client.ask("getfd", state, fdname="migration")
    assert client.ask("migrate-incoming", uri="fd:migration") == {}
    wait_for_migration(client)


def wait_for_migration(client: LxdClient) -> None:
    """Ask until a migration has ended, which must succeed."""
    wait_until(lambda: client.poll("query-migrate").get("status") in ("completed", "failed"), "the end of the migration", LIMIT_S)
    assert client.poll("query-migrate")["status"] == "completed"
    client.ask("query-status")
