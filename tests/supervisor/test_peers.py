"""Who is at the other end of a socket: here the peers are this process, and others that stand for QEMU's."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_userns.linux import process
from qemu_userns.plan.identity import DIRECT, Identity, MapEntry
from qemu_userns.supervisor import peers
from qemu_userns.supervisor.peers import Peers, find_stranger, find_tcp_owner
from tests.forked import in_child, in_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

CLONE_NEWNET = 0x40000000
IP_FREEBIND = 15
ME = os.geteuid()
SOMEBODY = 4242
DEADLINE_S = 30
RESET = b"\1\0\0\0\0\0\0\0"  # struct linger
LOOPBACK = bytes([127, 0, 0, 1])
LOOPBACK_6 = bytes(15) + b"\1"
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = f"""{HEAD}\
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000  1000        0 12 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000   107        0 13 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:C351 0100007F:1F90 06 00000000:00000000 03:00001758 00000000     0        0 0 3 0000000000000000
"""
TCP6 = f"""{HEAD}\
   0: 0000000000000000FFFF00000100007F:C352 0000000000000000FFFF00000100007F:1F90 01 00000000:00000000 00:00000000 0  5 0 14
   1: 00000000000000000000000001000000:C350 00000000000000000000000001000000:1F90 01 00000000:00000000 00:00000000 0  6 0 15
"""


@pytest.mark.parametrize(
    ("address", "port", "found"),
    [
        (LOOPBACK, 50000, (107, 13)),
        (LOOPBACK, 50001, (0, 0)),
        (LOOPBACK, 50002, (5, 14)),
        (LOOPBACK, 50003, None),
        (LOOPBACK_6, 50000, (6, 15)),
        (LOOPBACK_6, 50001, None),
        (bytes([1, 0, 0, 127]), 50000, None),
    ],
)
def test_a_socket_in_the_kernels_tables(address: bytes, port: int, found: tuple[int, int] | None) -> None:
    assert find_tcp_owner((TCP, TCP6), (address, port), (LOOPBACK if len(address) == 4 else LOOPBACK_6, 8080)) == found


def test_without_tables_nothing_is_found() -> None:
    assert find_tcp_owner(("", ""), (LOOPBACK, 50000), (LOOPBACK, 8080)) is None


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unix", "127.0.0.1", "::1", "mapped", "dual"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """Somebody who takes clients at each kind of address; an IPv4 client comes to an IPv6 socket in two ways."""
    kind = request.param
    with socket.socket({"unix": socket.AF_UNIX, "127.0.0.1": socket.AF_INET}.get(kind, socket.AF_INET6)) as listener:
        if kind == "unix":
            listener.bind("")  # any abstract name
        else:
            if kind in ("mapped", "dual"):
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(({"mapped": "::ffff:127.0.0.1", "dual": "::"}.get(kind, kind), 0))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        yield listener


def connect(listener: socket.socket) -> socket.socket:
    name = listener.getsockname()
    family = listener.family
    if isinstance(name, tuple) and name[0] == "::":
        family, name = socket.AF_INET, ("127.0.0.1", name[1])
    client = socket.socket(family)
    client.settimeout(DEADLINE_S)
    client.connect(name)
    return client


def fault_of(listener: socket.socket, uid: int, launcher: int = 0, children: Collection[int] = ()) -> str:
    """Accept a client, and judge it; QEMU has just one uid."""
    with listener.accept()[0] as accepted:
        entries = (MapEntry(0, uid, 1),)
        identity = Identity(uid, uid, (), False, DIRECT, entries, entries, "")
        return Peers(identity, launcher, children).find_fault(accepted.fileno())


def enter_own_namespace() -> None:
    """Enter a user namespace that has the same uid."""
    uid, gid = os.geteuid(), os.getegid()
    process.unshare(process.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def connect_inside(listener: socket.socket, depth: int = 1) -> socket.socket:
    for _ in range(depth):
        enter_own_namespace()
    return connect(listener)


@contextlib.contextmanager
def elsewhere(function: Callable[[], socket.socket]) -> Iterator[None]:
    """Run `function` in a process that is not a child of this one, and lives as long as the peer of what it returns."""

    told, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:
                client = function()
                os.write(ready, b"x")
                client.recv(1)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(ready)
    try:
        assert os.read(told, 1) == b"x"
        yield
    finally:
        os.close(told)


@pytest.mark.parametrize("uid", [ME, SOMEBODY])
def test_a_client_beside_the_supervisor(listener: socket.socket, uid: int) -> None:
    with elsewhere(lambda: connect(listener)):
        assert fault_of(listener, uid) == ""


def test_a_client_that_says_nothing_of_itself(listener: socket.socket) -> None:
    """Not dumpable: an ordinary user may not look at it."""

    def hide() -> socket.socket:
        process.prctl(process.PR_SET_DUMPABLE, 0)
        return connect(listener)

    with elsewhere(hide):
        fault = fault_of(listener, ME)
    assert (fault == "") == (listener.family == socket.AF_UNIX or ME == 0)


@pytest.mark.userns
@pytest.mark.parametrize("depth", [1, 2])
def test_a_peer_in_qemus_namespace_or_below(listener: socket.socket, depth: int) -> None:
    with elsewhere(lambda: connect_inside(listener, depth)):
        fault = fault_of(listener, ME)
    assert "may be QEMU" in fault
    assert f"of uid {ME}" in fault


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
@pytest.mark.parametrize("uid", [ME, SOMEBODY])
def test_a_peer_that_works_for_qemu(listener: socket.socket, uid: int) -> None:
    """The launcher, and a child of this process, as workers are; TCP does not tell, and nobody can put another address there."""
    with connect(listener):
        assert "is QEMU, or works for it" in fault_of(listener, uid, launcher=os.getpid())
    child = os.fork()
    if child == 0:
        try:
            connect(listener).recv(1)
        finally:
            os._exit(0)
    assert "is QEMU, or works for it" in fault_of(listener, uid)
    os.waitpid(child, 0)


@pytest.mark.userns
def test_a_kernel_that_gives_no_pidfd_of_a_peer(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    with elsewhere(lambda: connect(listener)):
        assert fault_of(listener, ME) == ""
    with elsewhere(lambda: connect_inside(listener)):
        assert "may be QEMU" in fault_of(listener, ME)
    in_child(lambda: connect(listener).close())
    assert "is turned away: " in fault_of(listener, ME)


@pytest.mark.parametrize("way", ["end", "reset"])
def test_a_peer_that_has_gone(listener: socket.socket, way: str) -> None:
    """What it has sent can still be read, so it must be known who it was."""

    def go() -> None:
        with connect(listener) as client:
            if way == "reset" and listener.family != socket.AF_UNIX:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.send(b"x")

    in_child(go)
    assert "is turned away: " in fault_of(listener, ME)


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize("listener", ["unix"], indirect=True)
def test_a_peer_that_has_gone_and_cannot_be_qemu(
    listener: socket.socket, pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the supervisor's uid, or with it and none of its children; plain QEMU reads what such clients have sent."""
    if not pidfd:
        monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)

    def go() -> int:
        with connect(listener) as client:
            client.send(b"x")
        return os.getpid()

    in_child(go)
    assert fault_of(listener, SOMEBODY) == ""
    assert "is QEMU, or works for it" in fault_of(listener, SOMEBODY, launcher=in_child(go))
    assert "is QEMU, or works for it" in fault_of(listener, SOMEBODY, children=[in_child(go)])
    in_child(go)
    assert "has ended" in fault_of(listener, ME)


@pytest.mark.userns
@pytest.mark.parametrize("listener", ["127.0.0.1", "::1"], indirect=True)
@pytest.mark.parametrize("inside", [False, True])
def test_a_tcp_socket_of_two_processes(listener: socket.socket, inside: bool) -> None:
    """It is not known who has made it."""
    with connect(listener) as client:

        def hold() -> socket.socket:
            if inside:
                enter_own_namespace()
            return client

        with elsewhere(lambda: client), elsewhere(hold):
            assert ("may be QEMU" in fault_of(listener, ME)) == inside


def ip(*lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def enter_network(*addresses: str) -> None:
    """Enter a network namespace whose loopback interface has more addresses."""
    process.unshare(CLONE_NEWNET)
    ip("link set lo up", *(f"address add {address} dev lo{' nodad' if ':' in address else ''}" for address in addresses))


@pytest.mark.userns
def test_peers_of_this_host_that_are_in_no_table_any_more() -> None:
    """What they have sent is there to be read; each address of this host's may be QEMU's."""
    pairs = [
        ("10.9.0.1", "10.9.0.2"),
        ("127.0.0.1", "127.0.0.9"),
        ("::ffff:10.9.0.1", "::ffff:10.9.0.2"),
        ("2001:db8::1", "2001:db8::2"),
        ("2001:db8::1", "fe80::9%lo"),
        ("2001:db8::1", "2001:db8:1::7"),
    ]

    def send(host: str, source: str, stack: contextlib.ExitStack) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = stack.enter_context(socket.socket(family))
        listener.bind((host, 0))
        listener.listen()
        with socket.socket(family) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)  # seconds in FIN_WAIT2 once it is closed
            client.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            client.bind(socket.getaddrinfo(source, 0, family)[0][4])
            client.connect(listener.getsockname())
            client.send(b"x")
        return listener

    def judge() -> list[str]:
        enter_network("10.9.0.1/24", "10.9.0.2/24", "2001:db8::1/64", "2001:db8::2/64", "fe80::9/64")
        ip("-6 route add local 2001:db8:1::/64 dev lo")
        with contextlib.ExitStack() as stack:
            listeners = [send(*pair, stack) for pair in pairs]
            end = time.monotonic() + DEADLINE_S
            tables = [Path("/proc/self/net", name) for name in ("tcp", "tcp6")]
            while any(re.search(" 0[456] ", table.read_text()) for table in tables):  # TCP_FIN_WAIT1, 2, TIME_WAIT
                assert time.monotonic() < end
                time.sleep(0.01)
            return [fault_of(listener, os.geteuid()) for listener in listeners]

    faults = in_namespaces(judge)
    assert [fault.endswith(" is closed") for fault in faults] == [True] * len(pairs), faults


@pytest.mark.userns
@pytest.mark.parametrize("ends", [False, True])
def test_a_peer_elsewhere(ends: bool) -> None:
    """In another network namespace, as on another host; plain QEMU reads what it has sent, also when it has closed since."""

    def judge() -> str:
        enter_network()
        ip("link add v0 type veth peer name v1", "address add 10.8.0.1/24 dev v0", "link set v0 up")
        ours = os.getpid()
        with socket.create_server(("10.8.0.1", 0)) as listener:

            def call() -> socket.socket:
                process.unshare(CLONE_NEWNET)
                here = ["nsenter", f"--net=/proc/{ours}/ns/net"]
                subprocess.run([*here, "ip", "link", "set", "v1", "netns", str(os.getpid())], check=True)
                ip("address add 10.8.0.2/24 dev v1", "link set v1 up")
                if ends:
                    with connect(listener) as first:
                        first.send(b"x")
                return connect(listener)

            with elsewhere(call):
                fault = fault_of(listener, os.geteuid())
                if ends:
                    listener.accept()[0].close()
                return fault

    assert in_namespaces(judge) == ""


def test_who_has_no_uid_is_a_stranger_where_users_are_named(listener: socket.socket) -> None:
    with connect(listener), listener.accept()[0] as accepted:
        fd = accepted.fileno()
        assert find_stranger(fd, ()) == ""
        is_unix = listener.family == socket.AF_UNIX
        assert find_stranger(fd, (SOMEBODY, ME)) == ("" if is_unix else "without a uid is turned away, as the settings say")
        if is_unix:
            assert find_stranger(fd, (SOMEBODY,)) == f"of uid {ME} is turned away, as the settings say"
    read, write = os.pipe()
    assert find_stranger(read, (ME,)).startswith("without a uid")
    os.close(read)
    os.close(write)
