"""QMP clients that are not ours: QEMU's own library, and LXD's dialogue byte for byte. Plain QEMU is the reference.

Each test is a dialogue that returns what the client saw. The test `[plain]` shows that QEMU takes it, `[dropin]` that the
drop-in gives the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from integration.lxd import Instance
from integration.lxd_client import boot_as_lxd, image_fd, work_as_lxd
from integration.lxd_conf import SHAPES, Shape
from integration.talk import IDLE, PLAIN, connected, running, started, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

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
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lxd_boots_a_vm_uses_it_and_stops_it(compare: Compare, shape: Shape) -> None:
    def run(words: Sequence[str], folder: Path) -> list[Any]:
        with Instance(shape, words, folder) as vm:
            vm.start()
            return lxd_dialogue(vm)

    compare(run)


def lxd_dialogue(vm: Instance) -> list[str]:
    with vm.connected() as client:
        boot_as_lxd(client, vm.path, vm.find_pid())
        seen = list(client.seen)
    with vm.connected() as client:  # LXD has been started anew
        kept = {fd["opaque"] for fdset in client.ask("query-fdsets") for fd in fdset["fds"]}
        assert {"rdwr:lxd_root", "rdonly:lxd_cd"} <= kept
        work_as_lxd(client)
        seen += client.seen
    with vm.connected() as client:
        client.ask("query-status")
        client.ask("quit")
        client.read_to_end()
        assert [event["event"] for event in client.events()] == ["SHUTDOWN"]
        seen += client.seen
    vm.wait_gone()
    return seen
