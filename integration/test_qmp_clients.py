"""QMP clients that are not ours: QEMU's own library, and LXD's dialogue byte for byte. Plain QEMU is the reference.

Each test is a dialogue that returns what the client saw. The test `[plain]` shows that QEMU takes it, `[dropin]` that the
drop-in gives the same.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from integration.talk import IDLE, PLAIN, UUID, connected, is_alive, running, started, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from qemu.qmp import Message

    Dialogue = Callable[[Sequence[str], Path], list[Any]]
    Compare = Callable[[Dialogue], None]

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

LIMIT_S = 60.0
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 2, 0x1000
IMAGE_SIZE = 2**20
PIPELINED = 60

# What differs from run to run: when, and QEMU's own numbers for threads, fds and block nodes.
VARYING = [
    (re.compile(r"#block\d+"), "#block"),
    (re.compile(r'((?:micro)?seconds\\?"): \d+'), r"\1: 0"),
    (re.compile(r'(qom-path.{,80}thread-id\\?"|thread-id\\?"(?=: \d{3})|fd\\?"): \d+'), r"\1: 0"),
    # What the firmware has read by then.
    (re.compile(r'(rd_(?:bytes|operations|total_time_ns)\\?"): \d+'), r"\1: 0"),
    (re.compile(r'\\?"idle_time_ns\\?": \d+, '), ""),
]

# What belongs to root, and has to be written, gets an fdset of ours: no id map can reach it.
OWN_FDSET = re.compile(r"/dev/fdset/2\d{9}")


@pytest.fixture(params=["plain", "dropin"])
def compare(request: pytest.FixtureRequest, dropin: list[str], shared_tmp: Path) -> Compare:
    """Give what has a dialogue with plain QEMU, and for `dropin` with the drop-in too: the client must see the same."""

    def have(dialogue: Dialogue) -> None:
        emulators = {"plain": PLAIN, "dropin": dropin} if request.param == "dropin" else {"plain": PLAIN}
        seen = {}
        for name, words in emulators.items():
            folder = shared_tmp / name
            folder.mkdir()
            seen[name] = [fixed(json.dumps(item), folder) for item in dialogue(words, folder)]
        for ours, plain in zip_longest(seen.get("dropin", ()), seen["plain"] if "dropin" in seen else ()):
            assert ours == plain

    return have


def fixed(text: str, folder: Path) -> str:
    """Return what a client saw without what differs from run to run."""
    text = text.replace(str(folder), "FOLDER")
    text = OWN_FDSET.sub("FOLDER/image", text)
    for pattern, replacement in VARYING:
        text = pattern.sub(replacement, text)
    return text


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


# --- QEMU's Python library --------------------------------------------------------------------------------------------


def listening(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]


@contextlib.asynccontextmanager
async def client_of(address: Path | socket.socket) -> Any:
    """Connect QEMU's client, and disconnect it."""
    client = QMPClient("test")
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(address)) if isinstance(address, Path) else address
        connection.setblocking(False)
        await client.connect(connection.dup())
    try:
        yield client
    finally:
        with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
            await client.disconnect()


async def all_of(client: QMPClient, *commands: str) -> list[object]:
    """Execute commands one after the other; an error counts as a result."""
    return [await result_of(client.execute(command)) for command in commands]


async def result_of(execution: Awaitable[object]) -> object:
    try:
        return await execution
    except ExecuteError as error:
        return [error.error_class, str(error)]


def test_commands_errors_and_events(compare: Compare) -> None:
    async def dialogue(path: Path) -> list[object]:
        async with client_of(path) as client:
            seen: list[object] = [client.greeting._asdict()]
            seen += await all_of(client, "query-status", "query-version", "query-name", "no-such-command")
            seen.append(await result_of(client.execute("getfd", {"fdname": "none"})))
            seen.append(await result_of(client.execute("blockdev-add", {"driver": "none"})))
            events: list[Message] = []
            with client.listener(("RESUME", "STOP")) as listener:
                for command in ("cont", "stop"):
                    seen += await all_of(client, command)
                    events.append(await listener.get())
            return [*seen, *map(dict, events)]

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        with started([*words, *IDLE, *listening(folder / "q")]):
            return asyncio.run(dialogue(folder / "q"))

    compare(run)


def test_out_of_band_execution(compare: Compare) -> None:
    async def dialogue(path: Path) -> list[object]:
        async with client_of(path) as client:
            return [
                await result_of(client.execute("query-yank", oob=True)),
                await result_of(client.execute("query-status", oob=True)),
                await result_of(client.execute("no-such-command", oob=True)),
                *await asyncio.gather(*(client.execute("query-yank", oob=number % 2 == 0) for number in range(PIPELINED))),
            ]

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        with started([*words, *IDLE, *listening(folder / "q")]):
            return asyncio.run(dialogue(folder / "q"))

    compare(run)


def test_many_commands_at_once(compare: Compare) -> None:
    async def dialogue(path: Path) -> list[object]:
        async with client_of(path) as client:
            commands = ["query-status", "query-name", "no-such-command", "query-cpus-fast"] * (PIPELINED // 4)
            return list(await asyncio.gather(*(result_of(client.execute(command)) for command in commands)))

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        with started([*words, *IDLE, *listening(folder / "q")]):
            return asyncio.run(dialogue(folder / "q"))

    compare(run)


def test_an_fd_that_is_sent_on_a_blank(compare: Compare) -> None:
    async def dialogue(path: Path, fd: int) -> list[object]:
        async with client_of(path) as client:
            seen = []
            for name in ("one", "/dev/net/tun.0"):
                client.send_fd_scm(fd)
                seen.append(await result_of(client.execute("getfd", {"fdname": name})))
                seen.append(await result_of(client.execute("closefd", {"fdname": name})))
                seen.append(await result_of(client.execute("closefd", {"fdname": name})))
            client.send_fd_scm(fd)
            seen += await all_of(client, "query-status")
            seen.append(await result_of(client.execute("add-fd", {"fdset-id": 3, "opaque": "rdwr:disk"})))
            node = {"driver": "file", "node-name": "a", "filename": "/dev/fdset/3"}
            seen.append(await result_of(client.execute("blockdev-add", node)))
            return [*seen, *await all_of(client, "query-fdsets", "query-named-block-nodes")]

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        with image_fd(folder, "image") as fd, started([*words, *IDLE, *listening(folder / "q")]):
            return asyncio.run(dialogue(folder / "q", fd))

    compare(run)


def test_two_clients(compare: Compare) -> None:
    """With plain QEMU, which serves one client at a time, on two monitors; with the drop-in on one."""

    async def dialogue(paths: Sequence[Path], fds: Sequence[int]) -> list[object]:
        async with client_of(paths[0]) as one, client_of(paths[1]) as other:
            clients = (one, other)
            with one.listener("RESUME") as first, other.listener("RESUME") as second:
                seen: list[object] = list(await asyncio.gather(*(client.execute("query-status") for client in clients * 20)))
                for client, fd in zip(clients, fds, strict=True):
                    client.send_fd_scm(fd)
                for client in clients:  # names are each client's own, though they are the same
                    seen.append(await result_of(client.execute("getfd", {"fdname": "mine"})))
                for number, client in enumerate(clients):
                    node = {"type": "socket", "id": f"n{number}", "fd": "mine"}
                    seen.append(await result_of(client.execute("netdev_add", node)))
                seen += [await result_of(client.execute("closefd", {"fdname": "mine"})) for client in clients]
                seen += await all_of(other, "cont")
                seen += [dict(await listener.get()) for listener in (first, second)]
            await one.disconnect()
            return [*seen, *await all_of(other, "query-status")]

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        paths = [folder / "q", folder / ("q2" if words is PLAIN else "q")]
        monitors = [word for path in dict.fromkeys(paths) for word in listening(path)]
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in paths]
        with contextlib.ExitStack() as stack:
            for pair in pairs:
                stack.enter_context(pair[0])
                stack.enter_context(pair[1])
            stack.enter_context(started([*words, *IDLE, *monitors]))
            return asyncio.run(dialogue(paths, [pair[1].fileno() for pair in pairs]))

    compare(run)


def test_a_monitor_on_an_inherited_socket(compare: Compare) -> None:
    """QEMUMachine of QEMU's own test suite starts it so."""

    async def dialogue(ours: socket.socket, fd: int) -> list[object]:
        async with client_of(ours) as client:
            seen = await all_of(client, "query-status", "stop")
            client.send_fd_scm(fd)
            seen.append(await result_of(client.execute("getfd", {"fdname": "f"})))
            with client.listener("SHUTDOWN") as listener:
                seen += await all_of(client, "quit")
                seen.append(dict(await listener.get()))
            return seen

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        ours, theirs = socket.socketpair()
        with ours, image_fd(folder, "image") as fd:
            with theirs:
                options = ["-chardev", f"socket,id=mon,fd={theirs.fileno()}", "-mon", "chardev=mon,mode=control"]
                process = subprocess.Popen([*words, *IDLE, *options], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
            try:
                return [*asyncio.run(dialogue(ours, fd)), process.wait(LIMIT_S)]
            finally:
                process.kill()
                process.wait()

    compare(run)


def test_a_monitor_that_connects_out(compare: Compare) -> None:
    async def dialogue(words: Sequence[str], path: Path) -> list[object]:
        client = QMPClient("test")
        await client.start_server(str(path))
        with started([*words, *IDLE, "-qmp", f"unix:{path},server=off"]):
            await client.accept()
            seen = await all_of(client, "query-status", "no-such-command")
            await client.disconnect()
        return seen

    compare(lambda words, folder: asyncio.run(dialogue(words, folder / "q")))


@pytest.mark.parametrize("how", ["unix:{},server=on,wait=off", "tcp:127.0.0.1:0,server=on,wait=off", "fd"])
def test_query_chardev_names_the_monitor(compare: Compare, how: str) -> None:
    async def dialogue(ours: socket.socket) -> list[Any]:
        async with client_of(ours) as client:
            found = re.sub(r"127.0.0.1:\d+", "127.0.0.1:PORT", json.dumps(await client.execute("query-chardev")))
            found = found.replace("disconnected:", "")  # the supervisor is always connected
            return [item for item in json.loads(found) if (item["label"] == "mon") == (how == "fd")]

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        options = ["-chardev", f"socket,id=mon,fd={fd}", "-mon", "chardev=mon,mode=control"]
        options += [] if how == "fd" else ["-qmp", how.format(folder / "q")]
        process = subprocess.Popen([*words, *IDLE, *options], pass_fds=(fd,), stdin=subprocess.DEVNULL)
        try:
            theirs.close()
            return asyncio.run(dialogue(ours))
        finally:
            ours.close()
            process.kill()
            process.wait()

    compare(run)


@pytest.mark.parametrize("end", ["quit", "EOF"])
def test_a_monitor_on_stdio(compare: Compare, end: str) -> None:
    """All that is said arrives, also what QEMU says last; EOF on stdin ends nothing."""
    commands = b"{'execute': 'qmp_capabilities'}\n{'execute': 'query-status', 'id': [1, null]}\n"

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with started([*words, *IDLE, "-qmp", "stdio"], **pipes) as process:
            assert process.stdin
            assert process.stdout
            assert process.stderr
            process.stdin.write(commands + (b"{'execute': 'quit'}" if end == "quit" else b""))
            process.stdin.flush()
            seen = [process.stdout.readline().decode() for _ in range(3)]
            if end == "EOF":
                process.stdin.close()
                time.sleep(0.5)  # in which it could end
                process.terminate()
            seen += [process.stdout.read().decode(), re.sub(r"pid \d+", "pid", process.stderr.read().decode())]
            return [*seen, process.wait(LIMIT_S)]

    compare(run)


# --- libvirt ----------------------------------------------------------------------------------------------------------


def test_a_state_arrives_on_an_inherited_fd_that_only_a_command_names(compare: Compare) -> None:
    """libvirt's restore: `-incoming defer`, then migrate-incoming with the plain number of an fd that no option names."""

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        state = folder / "state"
        with running(PLAIN) as source:
            source.qmp.execute("migrate", uri=f"exec:cat >{state}")
            wait_until(lambda: source.qmp.execute("query-migrate").get("status") == "completed", "the state's end")
            source.quit()
        fd = os.open(state, os.O_RDONLY)
        try:
            with running(words, "-incoming", "defer", pass_fds=(fd,)) as target:
                seen = [target.qmp.ask("migrate-incoming", uri=f"fd:{fd}")]
                wait_until(lambda: target.qmp.execute("query-status")["status"] != "inmigrate", "the state", 10)
                return [*seen, target.qmp.execute("query-status")]
        finally:
            os.close(fd)

    compare(run)


# --- LXD --------------------------------------------------------------------------------------------------------------

# contracts/lxd.md 1.4 and 1.6, without what needs KVM or a guest.
LXD_OPTIONS = [
    *("-S", "-name", "v1", "-uuid", UUID, "-daemonize", "-nographic", "-nodefaults", "-no-user-config"),
    *("-sandbox", "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"),
    *("-serial", "chardev:console"),
]
LXD_CONF = """\
# Machine
[machine]
graphics = "off"
type = "q35"
accel = "tcg"
[global]
driver = "ICH9-LPC"
property = "disable_s3"
value = "1"
[boot-opts]
strict = "on"
# Console
[chardev "console"]
backend = "socket"
path = "{folder}/qemu.console"
server = "on"
wait = "off"
# QEMU machine protocol monitor
[chardev "monitor"]
backend = "socket"
path = "{folder}/qemu.monitor"
server = "on"
wait = "off"
[mon]
chardev = "monitor"
mode = "control"
[memory]
size = "64M"
[smp-opts]
cpus = "1"
maxcpus = "2"
[device "qemu_pcie1"]
driver = "pcie-root-port"
bus = "pcie.0"
addr = "1.0"
chassis = "1"
[device "qemu_pcie2"]
driver = "pcie-root-port"
bus = "pcie.0"
addr = "2.0"
chassis = "2"
[device "qemu_scsi"]
driver = "virtio-scsi-pci"
bus = "pcie.0"
addr = "3.0"
[device "dev-qemu_serial"]
driver = "virtio-serial-pci"
bus = "pcie.0"
addr = "4.0"
[chardev "qemu_serial-chardev"]
backend = "ringbuf"
size = "16B"
[device "qemu_serial"]
driver = "virtserialport"
name = "com.canonical.lxd"
chardev = "qemu_serial-chardev"
bus = "dev-qemu_serial.0"
[object "qemu_rng"]
qom-type = "rng-random"
filename = "/dev/urandom"
"""


class LxdClient:
    """A monitor connection as LXD has it: one command at a time, written without a newline, its fd in the same sendmsg."""

    def __init__(self, connection: socket.socket, folder: Path, *, numbered: bool) -> None:
        """Borrow the connection, and read the greeting."""
        connection.settimeout(LIMIT_S)
        self._connection, self._folder, self._numbered = connection, folder, numbered
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
        message: dict[str, object] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        if self._numbered:  # 6.6, 5.21.5 and later
            self._last_id += 1
            message["id"] = self._last_id
            data = json.dumps(message, separators=(",", ":"))
        else:  # 5.0 to 6.5, go-qemu
            data = json.dumps(message).replace('"', "'")
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        assert self._connection.sendmsg([data.encode()], rights) == len(data)
        while "event" in (reply := self._read()):
            pass
        if self._numbered:
            assert reply["id"] == self._last_id
        return reply.get("return")

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

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        assert line.endswith(b"\n"), line
        self.seen.append(line.decode())
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


def start_for_lxd(words: Sequence[str], folder: Path) -> int:
    """Start QEMU as LXD does, return its pid: it is ready when the started process has ended."""
    conf, pid_file = folder / "qemu.conf", folder / "qemu.pid"
    conf.write_text(LXD_CONF.format(folder=folder))
    conf.chmod(0o640)
    files = ["-readconfig", str(conf), "-pidfile", str(pid_file), "-D", str(folder / "qemu.log")]
    early_log = folder / "qemu.early.log"
    with early_log.open("wb") as log:
        done = subprocess.run(
            [*words, *LXD_OPTIONS, *files],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 0, early_log.read_text()
    return int(pid_file.read_text())


@contextlib.contextmanager
def connected_as_lxd(folder: Path, *, numbered: bool) -> Iterator[LxdClient]:
    """Connect once, without waiting."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "qemu.monitor"))
        client = LxdClient(connection, folder, numbered=numbered)
        with contextlib.closing(client):
            yield client


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


@pytest.mark.parametrize("numbered", [False, True], ids=["single quotes", "numeric ids"])
def test_lxd_boots_a_vm_uses_it_and_stops_it(compare: Compare, numbered: bool) -> None:
    def run(words: Sequence[str], folder: Path) -> list[Any]:
        pid = start_for_lxd(words, folder)
        try:
            return lxd_dialogue(folder, pid, numbered=numbered)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid), "QEMU's end")

    compare(run)


def lxd_dialogue(folder: Path, pid: int, *, numbered: bool) -> list[str]:
    with connected_as_lxd(folder, numbered=numbered) as client:
        boot_as_lxd(client, folder, pid)
        seen = list(client.seen)
    with connected_as_lxd(folder, numbered=numbered) as client:  # LXD has been started anew
        kept = {fd["opaque"] for fdset in client.ask("query-fdsets") for fd in fdset["fds"]}
        assert {"rdwr:lxd_root", "rdonly:lxd_cd"} <= kept
        work_as_lxd(client)
        seen += client.seen
    with connected_as_lxd(folder, numbered=numbered) as client:
        client.ask("query-status")
        client.ask("quit")
        client.read_to_end()
        assert any('"event": "SHUTDOWN"' in line for line in client.seen)
        seen += client.seen
    wait_until(lambda: not is_alive(pid), "QEMU's end", 5)
    wait_until(lambda: not (folder / "qemu.pid").exists(), "the end of the pidfile", 5)
    return seen


def boot_as_lxd(client: LxdClient, folder: Path, pid: int) -> None:
    """contracts/lxd.md 2.2."""
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
    with image_fd(folder, "root.img") as fd:
        add_disk(client, fd, "lxd_root", "rdwr", read_only=False)
    with image_fd(folder, "cd.iso", os.O_RDONLY) as fd:
        add_disk(client, fd, "lxd_cd", "rdonly", read_only=True)
    client.ask("block_set_io_throttle", id="dev-lxd_root", bps=0, bps_rd=1000, bps_wr=0, iops=0, iops_rd=0, iops_wr=0)
    with nic_fd() as (kind, fd):
        client.ask("getfd", fd, fdname="/dev/net/tun.0")
        fds = {"fds": "/dev/net/tun.0", "vhost": False} if kind == "tap" else {"fd": "/dev/net/tun.0"}
        assert client.ask("netdev_add", id="lxd_eth0", type=kind, **fds) == {}
    nic = {"driver": "virtio-net-pci", "bus": "qemu_pcie1", "addr": "00.0", "mac": "00:16:3e:00:00:01"}
    client.ask("device_add", id="dev-lxd_eth0", netdev="lxd_eth0", **nic)
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
    """contracts/lxd.md 2.3, after a new connection to the VM that waits."""
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


def migrate_to_pipe(client: LxdClient) -> None:
    """Save the VM's state as a stateful stop does."""
    read, write = os.pipe()
    received: list[int] = []

    def drain() -> None:
        while data := os.read(read, 1 << 20):
            received.append(len(data))

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        try:
            client.ask("getfd", write, fdname="migration")
        finally:
            os.close(write)
        assert client.ask("migrate", uri="fd:migration") == {}
        wait_until(lambda: client.poll("query-migrate")["status"] in ("completed", "failed"), "the end of the migration", LIMIT_S)
        assert client.poll("query-migrate")["status"] == "completed"
    finally:
        reader.join(LIMIT_S)
        os.close(read)
    assert sum(received) > 1000
    client.ask("query-status")


def test_lxd_checks_what_qemu_can(compare: Compare) -> None:
    """contracts/lxd.md 1.7: at its start, with a regular file where the monitor shall be, and a disk that is root's alone."""

    def run(words: Sequence[str], folder: Path) -> list[Any]:
        (folder / "qemu.monitor").write_bytes(b"")
        firmware = folder / "firmware"
        firmware.write_bytes(bytes(IMAGE_SIZE))
        image = folder / "image"
        image.write_bytes(bytes(IMAGE_SIZE))
        image.chmod(0o600)
        options = ["-S", "-nographic", "-nodefaults", "-no-user-config", "-machine", "q35"]
        options += ["-chardev", f"socket,id=monitor,path={folder / 'qemu.monitor'},server=on,wait=off"]
        options += ["-mon", "chardev=monitor,mode=control", "-drive", f"if=pflash,format=raw,readonly=on,file={firmware}"]
        with started([*words, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with connected(folder / "qemu.monitor") as connection:
                client = LxdClient(connection, folder, numbered=True)
                with contextlib.closing(client):
                    node = {"node-name": "feature-check", "filename": str(image)}
                    for aio in ("io_uring", "threads"):
                        client.ask("blockdev-add", driver="file", aio=aio, **node)
                        client.ask("query-named-block-nodes")
                        client.ask("blockdev-del", **{"node-name": "feature-check"})
                    client.ask("query-hotpluggable-cpus")
                    client.ask("query-sev-capabilities")
                    assert process.poll() is None
                    process.kill()
                    client.read_to_end()
            assert process.stdout
            assert process.stderr
            return [*client.seen, process.stdout.read().decode(), process.stderr.read().decode(), process.wait(LIMIT_S)]

    compare(run)
