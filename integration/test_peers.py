"""QEMU as a client of its own monitors, which its view or the network shows it: it must not have files opened for itself."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.brokered import STATUS, Raw, Served, open_raw, served
from integration.talk import DEADLINE_S, as_user, connected, home_of, outcome, qmp_over, wait_until
from qemu_userns.linux import process
from tests.forked import in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    StartVm = Callable[..., contextlib.AbstractContextManager[Served]]

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

RUNNING = {"return": {"status": "prelaunch", "singlestep": False, "running": False}}
INSIDE = r"process \d+ of uid \d+ is in another user namespace, and may be QEMU"
QEMU = r"process \d+ of uid \d+ is QEMU, or works for it"
OVER_TCP = r"the process of uid \d+ at 127\.0\.0\.1 port \d+ may be QEMU"
GONE = r"process \d+ of uid \d+ has ended, and may have been QEMU"
EXEC = """
import os, socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
os.set_inheritable(client.fileno(), True)
then = "import os, sys; print(os.read(int(sys.argv[1]), 4))"
os.execv(sys.executable, [sys.executable, "-I", "-c", then, str(client.fileno())])
"""


@pytest.fixture
def share(shared_tmp: Path) -> Path:
    """A folder that QEMU sees, and in which everybody may write: its monitor is there too."""
    folder = shared_tmp / "share"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def start(dropin: list[str], share: Path) -> StartVm:
    """Give what starts a VM whose sockets everybody may connect to."""

    @contextlib.contextmanager
    def start(*options: str) -> Iterator[Served]:
        fsdev = ["-fsdev", f"local,id=f,path={share},security_model=none"]
        with served(dropin, share, *fsdev, *options, umask=0) as vm:
            yield vm

    return start


def inside(vm: Served, function: Callable[[], Any]) -> Any:
    """Run `function` with QEMU's ids in its namespaces, where it has even all capabilities."""

    def enter() -> Any:
        names = [os.open(f"/proc/{vm.pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
        root = os.open(f"/proc/{vm.pid}/root", os.O_PATH)
        for name in names:
            process.setns(name, 0)
        os.fchdir(root)
        os.chroot(".")
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return function()

    return in_child(enter)


def first_words(family: int, name: Any) -> bytes:
    """Connect, and return what is said first."""
    with socket.socket(family) as client:
        client.settimeout(DEADLINE_S)
        client.connect(name)
        with contextlib.suppress(ConnectionResetError):
            return client.recv(6)
    return b""


def assert_turned_away(vm: Served, why: str, times: int = 1) -> None:
    wanted = re.compile(rf": a client is turned away: {why}\n")
    wait_until(lambda: len(wanted.findall(vm.log)) >= times, f"{why!r} in the log")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# --- QEMU connects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-userns", "fs=host")], ids=["view", "host"])
def test_a_unix_socket_in_qemus_view(start: StartVm, options: tuple[str, ...]) -> None:
    with start(*options) as vm, vm.client() as client:
        path = str(vm.path)
        assert inside(vm, lambda: first_words(socket.AF_UNIX, path)) == b""
        assert_turned_away(vm, INSIDE)
        assert client.ask(STATUS) == RUNNING
        with vm.client() as other:
            assert other.ask(STATUS) == RUNNING


def test_qemu_does_not_fill_the_log(start: StartVm) -> None:
    with start() as vm, vm.client() as client:
        path = str(vm.path)
        for _ in range(5):
            assert inside(vm, lambda: first_words(socket.AF_UNIX, path)) == b""
        assert client.ask(STATUS) == RUNNING
        assert_turned_away(vm, INSIDE)
        assert vm.log.count("is turned away") == 1


def test_a_socket_of_ours_in_qemus_view(start: StartVm, share: Path) -> None:
    with start("-userns", f"qmp={share}/ours") as vm:
        open_raw(share / "ours").negotiate().close()
        (share / "ours").chmod(0o777)
        assert inside(vm, lambda: first_words(socket.AF_UNIX, f"{share}/ours")) == b""
        if os.geteuid():
            assert_turned_away(vm, INSIDE)
        else:  # it is root's alone, and QEMU has other ids
            wait_until(lambda: "is turned away, as the settings say" in vm.log, "a line in the log")


def test_tcp_on_the_loopback_interface(start: StartVm) -> None:
    address = ("127.0.0.1", free_port())
    with start("-qmp", f"tcp:127.0.0.1:{address[1]},server=on,wait=off") as vm:
        vm.client().close()
        with socket.create_connection(address, DEADLINE_S) as client:
            assert Raw(client).negotiate().ask(STATUS) == RUNNING
        assert inside(vm, lambda: first_words(socket.AF_INET, address)) == b""
        assert_turned_away(vm, OVER_TCP)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_qemu_itself(start: StartVm, share: Path, kind: str) -> None:
    """What a QEMU that was taken over does, it can be told to on a monitor that nobody stands before."""
    port = free_port()
    with start("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", "-userns", f"passthrough={share}/raw") as vm:
        vm.client().close()
        with connected(share / "raw") as connection, qmp_over(connection) as qmp:
            if kind == "unix":
                address = {"type": "unix", "data": {"path": str(vm.path)}}
            else:
                address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            qmp.execute("chardev-add", id="c", backend=backend)
        assert_turned_away(vm, QEMU if kind == "unix" else OVER_TCP)


def test_a_client_has_qemu_connected_to_its_own_monitor(start: StartVm) -> None:
    """As QEMU brings about by putting the monitor's socket where a client expects another: we connect for it, or it does."""
    with start() as vm, vm.client() as client:
        vm.path.chmod(0o700)  # in root's VMs that is not QEMU's
        address = {"type": "unix", "data": {"path": str(vm.path)}}
        client.execute("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "server": False}})
        assert_turned_away(vm, f"({QEMU}|{GONE})")
        assert client.ask(STATUS) == RUNNING


# --- QEMU listens -----------------------------------------------------------------------------------------------------


def test_a_monitor_that_finds_qemu_where_it_connects_to(start: StartVm, share: Path) -> None:
    path = f"{share}/them"

    def listen() -> bytes:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(DEADLINE_S)
            listener.bind(path)
            os.chmod(path, 0o777)
            listener.listen()
            client = listener.accept()[0]
            with client:
                client.settimeout(DEADLINE_S)
                return client.recv(6)

    with start("-chardev", f"socket,id=m,path={path},reconnect=1", "-mon", "m,mode=control") as vm:
        vm.client().close()
        assert inside(vm, listen) == b""
        assert_turned_away(vm, INSIDE)
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(DEADLINE_S)
            listener.bind(path)
            listener.listen()
            with Raw(listener.accept()[0]) as raw:
                assert raw.negotiate().ask(STATUS) == RUNNING


def test_a_monitor_that_finds_a_socket_that_was_made_for_qemu(start: StartVm, share: Path) -> None:
    """The launcher listens for QEMU with the caller's uid."""
    other = ["-chardev", f"socket,id=c,path={share}/c,server=on,wait=off"]
    with start(*other, "-chardev", f"socket,id=m,path={share}/them,reconnect=1", "-mon", "m,mode=control") as vm:
        vm.client().close()
        os.rename(share / "c", share / "them")
        assert_turned_away(vm, QEMU)
        os.rename(share / "them", share / "c")


# --- clients ----------------------------------------------------------------------------------------------------------


def test_a_client_that_becomes_another_program(start: StartVm) -> None:
    with start() as vm:
        vm.client().close()
        assert outcome([sys.executable, "-I", "-c", EXEC], str(vm.path)) == (0, "b'{\"QM'\n", "")


def test_a_client_whose_connection_outlives_it(start: StartVm) -> None:
    """It is served, as by plain QEMU, unless it cannot be told from one of QEMU's: that may have its uid."""
    with start() as vm, vm.client() as client:
        rows = [line.split() for line in Path(f"/proc/{vm.pid}/uid_map").read_text().splitlines()]
        is_mapped = any(int(first) <= os.geteuid() < int(first) + int(count) for _, first, count in rows)
        ours, theirs = socket.socketpair()

        def pass_on() -> None:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(vm.path))
                socket.send_fds(theirs, [b"x"], [connection.fileno()])

        supervisor = vm.supervisor
        os.kill(supervisor, signal.SIGSTOP)
        in_child(pass_on)
        os.kill(supervisor, signal.SIGCONT)
        with ours, theirs, Raw(socket.socket(fileno=socket.recv_fds(ours, 1, 1)[1][0])) as passed:
            if is_mapped:
                assert passed.rest() == b""
                assert_turned_away(vm, GONE)
            else:
                assert passed.negotiate().ask(STATUS) == RUNNING
        assert client.ask(STATUS) == RUNNING


@pytest.mark.root
def test_root_is_a_client_of_a_users_vm(dropin: list[str], share: Path, unprivileged_user: str) -> None:
    words = as_user(unprivileged_user, *dropin)
    with served(words, share, env=home_of(unprivileged_user), cwd="/") as vm, vm.client() as client:
        assert client.ask(STATUS) == RUNNING
        assert vm.path.stat().st_uid == pwd.getpwnam(unprivileged_user).pw_uid
