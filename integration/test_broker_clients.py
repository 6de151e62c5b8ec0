"""Clients that ask too much of the broker: many, rude, stuck, leaving, with bad bytes and fds. Plain QEMU is the reference."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.brokered import NEGOTIATE, STATUS, WITH_OOB, Raw, Served, assert_gone, open_raw, served, without_time
from integration.talk import DEADLINE_S, IDLE, PLAIN, fds_of, is_alive, outcome, started, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Dialogue = Callable[[Raw], list[bytes]]

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.slow]

MOST_CLIENTS = 128
MIB = 1 << 20
FD = re.compile(rb'"fd": \d+')
SOON_S = 2.0
RUNNING = {"return": {"status": "prelaunch", "singlestep": False, "running": False}}


@pytest.fixture
def vm(dropin: list[str], shared_tmp: Path) -> Iterator[Served]:
    with served(dropin, shared_tmp) as vm:
        yield vm


def same_with_plain(dropin: Sequence[str], folder: Path, dialogue: Dialogue, *options: str) -> list[bytes]:
    """Have a dialogue with plain QEMU and through the broker; what the client sees must be the same bytes."""
    seen = []
    for number, words in enumerate((PLAIN, dropin)):
        with served(words, folder, *options, name=f"q{number}") as vm, vm.connect() as client:
            seen.append([FD.sub(b'"fd": N', without_time(line)) for line in dialogue(client)])
    assert seen[1] == seen[0]
    return seen[0]


def until(client: Raw, mark: bytes) -> list[bytes]:
    """Return the lines up to the one that has a mark in it."""
    lines = [client.line()]
    while mark not in lines[-1]:
        assert lines[-1], f"the stream has ended after {lines}"
        lines.append(client.line())
    return lines


def converse(*said: bytes) -> Dialogue:
    """Return the dialogue of somebody who says it all at once, then asks for something with an id."""

    def have(client: Raw) -> list[bytes]:
        client.send(b"".join(said) + b"\n{'execute': 'query-status', 'id': 'the end'}\n")
        return until(client, b'"the end"')

    return have


# --- one client: what it sees is QEMU's own, byte for byte --------------------------------------------------------------


def test_greeting_and_errors_before_negotiation(dropin: list[str], shared_tmp: Path) -> None:
    commands = [STATUS, b"{'execute': 'no-such', 'id': 1}", b"{'exec-oob': 'query-yank', 'id': 2}", b"{'execute': 'quit'}"]
    commands += [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['none']}, 'id': 3}"]
    commands += [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': 'oob'}}", NEGOTIATE, NEGOTIATE, STATUS]
    seen = same_with_plain(dropin, shared_tmp, converse(*commands))
    assert b'"capabilities": ["oob"]' in seen[0]


@pytest.mark.parametrize(
    "ident", [b"1", b"-7", b"1.5e3", b"null", b"true", b'""', b'"\\u00e9\\n"', b"[]", b'{"a": [1, null, {}]}', b"9" * 18]
)
def test_ids_are_echoed(dropin: list[str], shared_tmp: Path, ident: bytes) -> None:
    commands = [b'{"execute": "%s", "id": %s}' % (name, ident) for name in (b"query-status", b"no-such", b"query-name")]
    commands += [b'{"exec-oob": "query-yank", "id": %s}' % ident]
    seen = same_with_plain(dropin, shared_tmp, converse(NEGOTIATE, *commands))
    assert sum(b'"id"' in line for line in seen) == len(commands) + 1


def test_commands_without_ids_are_answered_in_order(dropin: list[str], shared_tmp: Path) -> None:
    commands = [
        b"{'execute': 'query-status'}",
        b"{'execute': 'no-such'}",
        b"{'execute': 'query-name'} ",
        b"{'execute':'stop'}",
    ] * 50
    assert len(same_with_plain(dropin, shared_tmp, converse(NEGOTIATE, *commands))) >= len(commands) + 3


def test_out_of_band(dropin: list[str], shared_tmp: Path) -> None:
    """One by one: how many replies may pass others is a matter of luck, also with plain QEMU."""

    def have(client: Raw) -> list[bytes]:
        seen = [client.line()]
        for text in (
            WITH_OOB,
            b"{'exec-oob': 'query-yank', 'id': [1]}",
            b"{'exec-oob': 'query-yank'}",
            b"{'exec-oob': 'query-status', 'id': 1}",
            b"{'exec-oob': 'no-such', 'id': 1}",
            b"{'exec-oob': 'query-yank', 'execute': 'query-yank', 'id': 4}",
            b"{'exec-oob': 'yank', 'arguments': {}, 'id': 5}",
        ):
            client.send(text)
            seen.append(client.line())
        return seen

    same_with_plain(dropin, shared_tmp, have)


def test_byte_by_byte(dropin: list[str], shared_tmp: Path) -> None:
    def have(client: Raw) -> list[bytes]:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in NEGOTIATE + b"{'execute': 'no-such', \"id\": 'z'}}{'execute': 'query-name', 'id': 'the end'}":
            client.send(bytes([byte]))
        return until(client, b'"the end"')

    same_with_plain(dropin, shared_tmp, have)


def test_pretty(dropin: list[str], shared_tmp: Path) -> None:
    seen = []
    said = NEGOTIATE + b"{'execute': 'query-status', 'id': [1]}{'execute': 'no-such'}{'execute': 'query-name', 'id': 'the end'}"
    for number, words in enumerate((PLAIN, dropin)):
        path = shared_tmp / f"q{number}"
        with started([*words, *IDLE, "-qmp-pretty", f"unix:{path},server=on,wait=off"]), open_raw(path) as client:
            client.send(said)
            seen.append([*until(client, b'"the end"'), client.line()])
    assert seen[1] == seen[0]


BAD = [
    b"{",
    b"}",
    b"]",
    b"[1, 2]",
    b"17",
    b"'text'",
    b"null",
    b",",
    b":",
    b"{}",
    b"{'execute'}",
    b"{'execute': }",
    b"{'execute': 1}",
    b"{'execute': 'query-status', 'more': 1}",
    b"{'execute': 'query-status', 'arguments': []}",
    b"{'execute': 'query-status', 'arguments': {'a': NaN}}",
    b"{'execute': 'query-status', 'id': Infinity}",
    b"{'execute': 'query-status', 'id': 1, 'id': 2}",
    b"{'execute': 'query-status', 'execute': 'query-name', 'id': 2}",
    b"{'execute': 'query-status', 'id': 99999999999999999999}",
    b"{'execute': 'query-status', 'id': 1e999}",
    b"{'execute': 'query-status', 'id': 01}",
    b"{'execute': 'query-status' 'id': 1}",
    b"{'execute': 'query\x00status'}",
    b"\x00",
    b"\xff",
    b"{'execute': \xff{'execute': 'query-name', 'id': 1}",
    b"{'execute': 'query-status', 'id': '\xff'}",
    b"\xef\xbb\xbf{'execute': 'query-name'}",
    b"{'execute': 'query-status', 'id': '\xc3\x28'}",
    b"{'execute': 'query-status', 'id': '\\ud800'}",
    b"{'execute': 'query-status', 'id': '\\u0000'}",
    b"{'execute': 'query-status', 'id': '\n'}",
    b"{'execute': 'query-status', 'id': 'no end\xff'}",
    b"# a comment",
    b"%s",
    b"{'execute': %s}",
    b"[" * 1023 + b"]" * 1023,
    b"[" * 1024 + b"]" * 1024,
    b"[" * 1025 + b"]" * 1025,
    b"[" * 5000 + b"]" * 5000,
    b"{'a':" * 2000,
    b"[[[]}]",
    b"{'execute': 'query-status', 'id': " + b"[" * 1000 + b"]" * 1000 + b"}",
    b"{'execute': 'query-status', 'id': " + b"[" * 1023 + b"]" * 1023 + b"}",
    b"{'execute': '" + b"x" * 10_000 + b"'}",
    b"\x01\x02\x7f",
    b"\r\n\t \r",
]


def test_bad_input_gets_qemus_own_errors_and_disturbs_nobody(dropin: list[str], shared_tmp: Path) -> None:
    """Each on a connection of its own, so that what it does to the next message is seen too."""
    plain, ours = [], []
    with served(PLAIN, shared_tmp, name="plain") as vm:
        for text in BAD:
            with vm.connect() as client:
                plain.append(ends_of(client, text))
    with served(dropin, shared_tmp, name="ours") as vm, vm.client() as other:
        for text in BAD:
            with vm.connect() as client:
                ours.append(ends_of(client, text))
            assert other.ask(STATUS) == RUNNING, text
    for text, expected, got in zip(BAD, plain, ours, strict=True):
        assert got == expected, text[:100]


def ends_of(client: Raw, text: bytes) -> list[bytes]:
    """Say something, then what ends it in any case, then something good; return all that comes back."""
    client.send(NEGOTIATE + text + b"\n\xff\n{'execute': 'query-name', 'id': 'the end'}\n")
    return until(client, b'"the end"')


def test_a_message_that_is_too_large(vm: Served) -> None:
    before = vm.memory_kib()
    with vm.client() as other, vm.client() as client:
        for _ in range(3):
            client.send(b"{'execute': 'query-status', 'id': '")
            for _ in range(24):
                client.send(b"x" * MIB)
                assert other.ask(STATUS) == RUNNING
            client.send(b"'}")
            assert client.read()["error"] == {"class": "GenericError", "desc": "JSON token size limit exceeded"}
            assert client.ask(STATUS) == RUNNING
    assert vm.memory_kib() - before < 40 * 1024


def test_a_large_message_is_no_ones_but_its_senders(vm: Served) -> None:
    """QEMU itself reads byte by byte: 5 s for each MiB."""
    with vm.client() as other, vm.client() as client:
        client.send(b"{'execute': 'query-status', 'id': '" + b"y" * (MIB // 4))
        assert other.ask(STATUS) == RUNNING
        assert len(client.ask(b"'}")["id"]) == MIB // 4


# --- many clients -------------------------------------------------------------------------------------------------------


def test_events_go_to_all_that_have_negotiated(vm: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(vm.client()) for _ in range(20)]
        silent = stack.enter_context(vm.connect())
        assert "QMP" in silent.read()
        assert clients[0].ask(b"{'execute': 'cont'}") == {"return": {}}
        for client in clients[1:]:
            assert client.read()["event"] == "RESUME"
        assert silent.is_silent(0.1)


def test_more_clients_than_there_may_be(vm: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(vm.client()) for _ in range(MOST_CLIENTS)]
        with vm.connect() as late:
            assert late.rest() == b""
        assert all(client.ask(STATUS) == RUNNING for client in clients)
        clients[0].close()
        wait_until(lambda: connects(vm), "a place")
    assert f"a client is turned away: {MOST_CLIENTS} are there" in vm.log


def connects(vm: Served) -> bool:
    with vm.connect() as client:
        return b"QMP" in client.line()


def test_a_thousand_clients_that_connect_and_go(vm: Served) -> None:
    with vm.client() as steady:
        before, memory = vm.fds(), vm.memory_kib()
        for number in range(1000):
            client = vm.connect()
            if number % 3 == 1:
                client.send(NEGOTIATE + STATUS)
            elif number % 3 == 2:
                client.send(b"{'execute': 'query")
            client.close()
        assert steady.ask(STATUS) == RUNNING
        wait_until(lambda: vm.fds() == before, "the fds as before")
        assert vm.memory_kib() - memory < 4096


def test_a_client_that_never_reads_is_disconnected(vm: Served) -> None:
    """Nobody waits for it, and it costs no more memory than its bound."""
    with vm.client() as other, vm.client() as stuck:
        before, worst, rounds = vm.memory_kib(), 0.0, 0
        while "reads too slowly" not in vm.log:
            rounds += 1
            assert rounds < 400, "it is never disconnected"
            begin = time.monotonic()
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                stuck.socket.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    stuck.send(b"{'execute': 'query-qmp-schema'}")
            assert other.ask(STATUS) == RUNNING
            worst = max(worst, time.monotonic() - begin)
        assert worst < SOON_S
        assert vm.memory_kib() - before < 24 * 1024
        assert other.ask(STATUS) == RUNNING
        stuck.socket.settimeout(DEADLINE_S)
        assert stuck.rest().count(b"\n") > 0


def test_events_for_a_client_that_never_reads(vm: Served) -> None:
    """Small messages may not cost many times their size."""
    with vm.client() as other, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(vm.client())
        before = vm.memory_kib()
        for _ in range(3000):
            other.send(b"{'execute': 'cont'}{'execute': 'stop'}")
            for _ in range(4):
                assert other.line()
        assert vm.memory_kib() - before < 12 * 1024


def test_a_client_that_floods_without_reading(vm: Served) -> None:
    with vm.client() as other, vm.connect() as flood:
        before = vm.memory_kib()
        flood.socket.settimeout(0.05)
        sent = 0
        with contextlib.suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            while sent < 64 * MIB:
                sent += flood.socket.send(STATUS * 2000)
        assert other.ask(STATUS) == RUNNING
        assert vm.memory_kib() - before < 40 * 1024


def test_many_clients_at_once(vm: Served) -> None:
    """Everybody gets exactly what it asked for, though all of them ask at the same time."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(vm.client()) for _ in range(64)]
        for _ in range(5):
            for number, client in enumerate(clients):
                client.send(b"".join(b"{'execute': 'query-status', 'id': [%d, %d]}" % (number, i) for i in range(20)))
            for number, client in enumerate(clients):
                assert [client.read()["id"] for _ in range(20)] == [[number, i] for i in range(20)]


# --- leaving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"{'execute': 'query", STATUS, STATUS * 30, b"{'execute': 'query-qmp-schema'}" * 30, b"\xff{", b"[" * 3000]
)
def test_a_client_that_leaves_in_the_middle(vm: Served, said: bytes) -> None:
    with vm.client() as other:
        before = vm.fds()
        for _ in range(20):
            with vm.client() as client:
                client.send(said)
            assert other.ask(STATUS) == RUNNING
        wait_until(lambda: vm.fds() == before, "the fds as before")


@pytest.mark.parametrize("said", [b"", NEGOTIATE, NEGOTIATE + STATUS * 5, NEGOTIATE + STATUS * 500, b"{'execute'", b"\xff"])
def test_a_client_that_says_no_more_gets_its_answers(dropin: list[str], shared_tmp: Path, said: bytes) -> None:
    def have(client: Raw) -> list[bytes]:
        greeting = client.line()
        client.send(said)
        client.socket.shutdown(socket.SHUT_WR)
        return [greeting, *client.rest().splitlines()]

    same_with_plain(dropin, shared_tmp, have)


def test_a_slow_client_that_says_no_more_gets_all_of_its_answers(vm: Served) -> None:
    with vm.client() as client:
        client.send(b"{'execute': 'query-qmp-schema'}" * 20)
        client.socket.shutdown(socket.SHUT_WR)
        time.sleep(1)  # in which QEMU has answered everything
        lines = client.rest().splitlines()
        assert len(lines) == 20
        assert all("return" in json.loads(line) for line in lines)


def test_a_client_that_says_no_more_gets_what_the_opener_says(vm: Served, shared_tmp: Path) -> None:
    missing = json.dumps(
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": f"{shared_tmp}/no"}}
    )
    with vm.client() as client:
        client.send(missing.encode() * 3)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.rest().count(b"No such file") == 3


def test_many_commands_that_the_opener_refuses(vm: Served, shared_tmp: Path) -> None:
    """More than may wait: reading goes on as they are answered, though QEMU says nothing meanwhile."""
    missing = json.dumps(
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": f"{shared_tmp}/no"}}
    )
    with vm.client() as client:
        client.send(missing.encode() * 150)
        assert all("error" in client.read() for _ in range(150))
        assert client.ask(STATUS) == RUNNING


def test_a_client_that_leaves_while_its_command_is_prepared(vm: Served, shared_tmp: Path) -> None:
    (shared_tmp / "image").write_bytes(bytes(MIB))
    node = {"driver": "file", "node-name": "a", "filename": f"{shared_tmp}/image"}
    add = {"execute": "blockdev-add", "arguments": node}
    with vm.client() as other:
        other.execute("cont")  # a QEMU 7.2 that does not run marks fds as removed, and keeps them
        before = vm.fds()
        other.execute("blockdev-add", **node)
        other.execute("blockdev-del", **{"node-name": "a"})
        for _ in range(5):
            with vm.client() as client:
                client.send(json.dumps(add).encode())
            assert other.execute("query-status")["running"]

        def is_settled() -> bool:
            if other.execute("query-named-block-nodes"):  # of who left so late that QEMU had the command
                other.execute("blockdev-del", **{"node-name": "a"})
            return vm.fds() == before

        wait_until(is_settled, "the fds as before")
        assert other.execute("query-named-block-nodes") == []


# --- fds ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def odd_fds(kind: str) -> Iterator[list[int]]:
    """Give fds that nobody should offer."""
    with contextlib.ExitStack() as stack:
        if kind in ("many", "most"):
            with tempfile.TemporaryFile() as file:
                fds = [os.dup(file.fileno()) for _ in range(17 if kind == "many" else 253)]
        elif kind == "path":
            fds = [os.open("/", os.O_PATH)]
        elif kind == "directory":
            fds = [os.open("/tmp", os.O_RDONLY)]
        elif kind == "twice":
            fds = [os.open("/dev/null", os.O_RDWR)]
            fds.append(os.dup(fds[0]))
        elif kind == "pair":
            fds = [end.detach() for end in socket.socketpair()]
        elif kind == "pidfd":
            fds = [os.pidfd_open(os.getpid())]
        elif kind == "namespace":
            fds = [os.open("/proc/self/ns/mnt", os.O_RDONLY)]
        elif kind == "memfd":
            fds = [os.memfd_create("m")]
        else:
            fds = list(os.pipe())
        for fd in fds:
            stack.callback(os.close, fd)
        yield fds


KINDS = ["many", "most", "path", "directory", "twice", "pair", "pidfd", "namespace", "memfd", "pipe"]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_fds_are_taken_as_by_plain_qemu(dropin: list[str], shared_tmp: Path, kind: str) -> None:
    def have(client: Raw) -> list[bytes]:
        seen = [client.line()]
        with odd_fds(kind) as fds:
            client.send(NEGOTIATE)
            seen.append(client.line())
            for data, given in (
                (b"{'execute': 'getfd', 'arguments': {'fdname': 'a'}}", fds),
                (b"{'execute': 'getfd', 'arguments': {'fdname': 'b'}}", []),
                (b"{'execute': 'closefd', 'arguments': {'fdname': 'a'}}", fds),
                (b"{'execute': 'add-fd', 'arguments': {'fdset-id': 3, 'opaque': 'o'}}", []),
                (b"{'execute': 'add-fd', 'arguments': {'fdset-id': -3}}", fds),
                (b"{'execute': 'getfd', 'arguments': {'fdname': '1'}}", fds),
                (b"{'execute': 'getfd', 'arguments': {}}", fds),
                (b"{'execute': 'remove-fd', 'arguments': {'fdset-id': 3}}", fds),
                (b"{'execute': 'getfd', 'arguments': {'fdname': 'c'}}", []),
                (b"{'execute': 'closefd', 'arguments': {'fdname': 'c'}}", []),
                (b"{'execute': 'query-fdsets'}", []),
            ):
                client.send(data, *given)
                seen.append(client.line())
        return seen

    same_with_plain(dropin, shared_tmp, have)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "said", [b" ", b"x", STATUS, b"{'execute': 'getfd'", b"\xff", b"{'execute': 'getfd', 'arguments': {'fdname': '1'}}"]
)
def test_no_fd_is_left_behind(vm: Served, kind: str, said: bytes) -> None:
    with vm.client() as other:
        before = vm.fds()
        with odd_fds(kind) as fds:
            for _ in range(3):
                with vm.client() as client:
                    client.send(said, *fds)
                    client.send(said[:1], *fds)
                    client.send(said, *fds)
        assert other.ask(STATUS) == RUNNING
        wait_until(lambda: vm.fds() == before, "the fds as before")


def test_an_fd_on_the_second_byte(dropin: list[str], shared_tmp: Path) -> None:
    def have(client: Raw) -> list[bytes]:
        seen = [client.line()]
        client.send(NEGOTIATE)
        seen.append(client.line())
        with odd_fds("memfd") as fds:
            client.send(b"{")
            client.send(b"'execute': 'getfd', 'arguments': {'fdname'", *fds)
            client.send(b": 'a'}}{'execute': 'closefd', 'arguments': {'fdname': 'a'}}")
            return [*seen, client.line(), client.line()]

    seen = same_with_plain(dropin, shared_tmp, have)
    assert seen[-1] == b'{"return": {}}\r\n'


def test_the_clients_own_socket_as_an_fd(vm: Served) -> None:
    """A cycle of sockets in flight is the kernel's affair; the connection ends all the same."""
    with vm.client() as other:
        before = vm.fds()
        for _ in range(5):
            with vm.client() as client:
                client.send(b" ", client.socket.fileno())
                client.send(b"{'execute': 'getfd', 'arguments': {'fdname': 'self'}}", other.socket.fileno())
                assert client.read() == {"return": {}}
                assert client.ask(b"{'execute': 'closefd', 'arguments': {'fdname': 'self'}}") == {"return": {}}
        wait_until(lambda: vm.fds() == before, "the fds as before")
        assert other.ask(STATUS) == RUNNING


def test_two_clients_send_fds_at_the_same_time(vm: Served) -> None:
    """Every fd arrives with its own command."""
    with vm.client() as one, vm.client() as two, tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(40):
            files.append(os.open(f"{folder}/{number}", os.O_RDWR | os.O_CREAT))
        for number, fd in enumerate(files):
            client = (one, two)[number % 2]
            client.send(b" ", fd)
            client.send(b"{'execute': 'add-fd', 'arguments': {'fdset-id': %d}, 'id': %d}" % (number, number))
        replies = [(one, two)[number % 2].read() for number in range(40)]
        for fd in files:
            os.close(fd)
        table = fds_of(vm.pid)
        assert [Path(table[reply["return"]["fd"]]).name for reply in replies] == [str(number) for number in range(40)]


# --- the sockets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o027])
def test_mode_and_owner_are_plain_qemus(dropin: list[str], shared_tmp: Path, umask: int) -> None:
    found = []
    for number, words in enumerate((PLAIN, dropin)):
        with served(words, shared_tmp, name=f"q{number}", umask=umask) as vm, vm.client():
            status = vm.path.lstat()
            found.append((oct(status.st_mode), status.st_uid, status.st_gid))
    assert found[0] == found[1]


@pytest.mark.parametrize("what", ["file", "socket", "link", "directory"])
def test_what_is_at_the_path_already(dropin: list[str], shared_tmp: Path, what: str) -> None:
    seen = []
    for number, words in enumerate((PLAIN, dropin)):
        folder = shared_tmp / str(number)
        folder.mkdir()
        path = folder / "q"
        if what == "file":
            path.write_text("text")
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(path))
        elif what == "link":
            (folder / "target").write_text("text")
            path.symlink_to("target")
        else:
            path.mkdir()
        process = subprocess.Popen(
            [*words, *IDLE, "-qmp", f"unix:{path},server=on,wait=off"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for_socket_or_end(process, path)
            served_it = process.poll() is None
            if served_it:
                with open_raw(path) as client:
                    client.negotiate()
            seen.append((served_it, sorted(item.name for item in folder.iterdir())))
        finally:
            process.kill()
            process.wait()
    assert seen[0] == seen[1]


def wait_for_socket_or_end(process: subprocess.Popen[bytes], path: Path) -> None:
    wait_until(lambda: process.poll() is not None or path.is_socket(), "a socket or an end")


def test_a_socket_that_was_replaced_stays(vm: Served) -> None:
    with vm.client() as client, socket.socket(socket.AF_UNIX) as other:
        supervisor = vm.supervisor
        vm.path.unlink()
        other.bind(str(vm.path))
        assert client.ask(b"{'execute': 'quit'}") == {"return": {}}
        vm.process.wait(DEADLINE_S)
        wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
        assert vm.path.is_socket()


def test_starting_again_at_once_on_the_same_path(dropin: list[str], shared_tmp: Path) -> None:
    """The supervisor of the VM before may still be there; it takes nothing away from its successor."""
    for _ in range(5):
        with served(dropin, shared_tmp) as vm:
            # Before it has bound the path, the supervisor of the one before may still take a client, and end.
            wait_until(vm.entry.exists, "the first one's entry")
            with vm.client() as client:
                assert client.ask(STATUS) == RUNNING
            vm.process.kill()
            vm.process.wait()
            with served(dropin, shared_tmp) as again:
                wait_until(again.entry.exists, "the second one's entry")
                with again.client() as client:
                    assert client.ask(STATUS) == RUNNING
                    time.sleep(0.2)  # in which the first one's supervisor ends
                    assert again.path.is_socket()
                with again.client() as client:
                    assert client.ask(STATUS) == RUNNING


def test_a_path_that_is_too_long(dropin: list[str], shared_tmp: Path) -> None:
    for length in (107, 108, 109, 200):
        path = str(shared_tmp / ("x" * (length - len(str(shared_tmp)) - 1)))
        plain, ours = (ends_or_serves(words, path) for words in (PLAIN, dropin))
        assert plain == ours, length


def ends_or_serves(words: Sequence[str], path: str) -> tuple[bool, bool]:
    """Return whether QEMU runs with a socket at a path, and whether it says something about the length."""
    command = [*words, *IDLE, "-qmp", f"unix:{path},server=on,wait=off"]
    with started(command, stderr=subprocess.PIPE) as process:
        wait_until(lambda: process.poll() is not None or Path(path).is_socket(), "a socket or an end")
        runs = process.poll() is None
        process.kill()
        assert process.stderr
        return runs, b"too long" in process.stderr.read()


def test_tcp(dropin: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with started([*dropin, *IDLE, "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]) as process:
        clients = [tcp_client(port) for _ in range(3)]
        for client in clients:
            assert client.negotiate().ask(STATUS) == RUNNING
        clients[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        clients[0].send(STATUS)
        clients[0].close()  # a reset
        assert clients[1].ask(STATUS) == RUNNING
        assert clients[1].ask(b"{'execute': 'quit'}") == {"return": {}}
        assert process.wait(DEADLINE_S) == 0
        assert b'"SHUTDOWN"' in clients[2].rest()
        for client in clients:
            client.close()


def tcp_client(port: int) -> Raw:
    client = socket.socket()
    wait_until(lambda: client.connect_ex(("127.0.0.1", port)) == 0, "a listener")
    return Raw(client)


def test_an_abstract_socket(dropin: list[str]) -> None:
    name = f"qemu-userns-test-{os.getpid()}"
    with started(
        [*dropin, *IDLE, "-chardev", f"socket,id=m,path={name},abstract=on,server=on,wait=off", "-mon", "m,mode=control"]
    ):
        for _ in range(2):
            with abstract_client(name) as raw:
                assert raw.negotiate().ask(STATUS) == RUNNING


def abstract_client(name: str) -> Raw:
    client = socket.socket(socket.AF_UNIX)
    wait_until(lambda: client.connect_ex(f"\0{name}") == 0, "a listener")
    return Raw(client)


def test_a_listening_socket_that_is_inherited(dropin: list[str], shared_tmp: Path) -> None:
    """This process has it too, so a client that the broker is told of may be gone when it accepts."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared_tmp / "q"))
        listener.listen(5)
        fd = listener.fileno()
        command = [*dropin, *IDLE, "-chardev", f"socket,id=m,fd={fd},server=on,wait=off", "-mon", "m,mode=control"]
        with started(command, pass_fds=(fd,)) as process, open_raw(shared_tmp / "q") as steady:
            steady.negotiate()
            listener.settimeout(0)
            for _ in range(200):
                with open_raw(shared_tmp / "q"), contextlib.suppress(BlockingIOError):
                    listener.accept()[0].close()
                assert steady.ask(STATUS) == RUNNING
            process.kill()


def test_a_monitor_that_connects_out_again_and_again(dropin: list[str], shared_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared_tmp / "q"))
        listener.listen(5)
        listener.settimeout(DEADLINE_S)
        with started([*dropin, *IDLE, "-chardev", f"socket,id=m,path={shared_tmp}/q,reconnect=1", "-mon", "m,mode=control"]):
            for way in ("close", "half", "close", "stuck", "close"):
                with Raw(listener.accept()[0]) as raw:
                    assert raw.negotiate().ask(STATUS) == RUNNING
                    if way == "half":
                        raw.send(STATUS)
                        raw.socket.shutdown(socket.SHUT_WR)
                        assert raw.rest()
                    elif way == "stuck":
                        raw.send(b"{'execute': 'query-qmp-schema'}" * 60)
                        waiting = select.poll()
                        waiting.register(raw.socket, 0)
                        assert waiting.poll(DEADLINE_S * 1000), "it is never disconnected"


# --- stdio --------------------------------------------------------------------------------------------------------------


def test_stdio_loses_and_reorders_nothing(dropin: list[str]) -> None:
    said = (
        NEGOTIATE + b"".join(b"{'execute': 'query-status', 'id': %d}" % i for i in range(30)) + b"{'execute': 'quit', 'id': 'q'}"
    )
    for _ in range(50):
        status, out, _ = outcome([*dropin, *IDLE], "-qmp", "stdio", stdin=said)
        assert status == 0
        messages = [json.loads(line) for line in out.splitlines()]
        assert "QMP" in messages[0]
        assert [message.get("id") for message in messages if "event" not in message][2:] == [*range(30), "q"]
        assert [message["event"] for message in messages if "event" in message] == ["SHUTDOWN"]


def test_stdio_whose_reader_has_gone_blocks_nobody(dropin: list[str], shared_tmp: Path) -> None:
    """Neither the other monitors nor the supervisor's end."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with served(dropin, shared_tmp, "-chardev", "stdio,id=io,signal=off", "-mon", "io,mode=control", **pipes) as vm:
        assert vm.process.stdin
        assert vm.process.stdout
        vm.process.stdin.write(NEGOTIATE)
        vm.process.stdin.flush()
        assert b"QMP" in vm.process.stdout.readline()
        assert b"return" in vm.process.stdout.readline()
        vm.process.stdout.close()
        with vm.client() as client:
            for _ in range(50):
                client.execute("cont")
                client.execute("stop")
            supervisor = vm.supervisor
            client.execute("quit")
        assert vm.process.wait(DEADLINE_S) == 0
        vm.process.stdin.close()
        assert_gone(vm, supervisor)


def test_stdin_that_is_a_socket_and_stdout_that_is_a_pipe(dropin: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, started([*dropin, *IDLE, "-qmp", "stdio"], stdin=theirs, stdout=subprocess.PIPE) as process:
        assert process.stdout
        ours.sendall(NEGOTIATE + b"{'execute': 'quit'}")
        assert process.stdout.read().count(b"\n") == 4
        assert process.wait(DEADLINE_S) == 0


def test_stdout_that_nobody_reads_for_a_while(dropin: list[str]) -> None:
    """More than a pipe holds: all of it comes, in order, and QEMU goes on."""
    with started([*dropin, *IDLE, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(NEGOTIATE + b"{'execute': 'query-qmp-schema'}" * 10 + STATUS)
        process.stdin.flush()
        time.sleep(1)  # in which the pipe is full
        lines = [process.stdout.readline() for _ in range(13)]
        assert json.loads(lines[-1]) == RUNNING
        assert len(set(lines[2:12])) == 1
        process.stdin.close()


def test_files_as_stdio(dropin: list[str], shared_tmp: Path) -> None:
    (shared_tmp / "in").write_bytes(NEGOTIATE + STATUS + b"{'execute': 'quit'}")
    with (shared_tmp / "in").open("rb") as into, (shared_tmp / "out").open("wb") as out:
        with started([*dropin, *IDLE, "-qmp", "stdio"], stdin=into, stdout=out) as process:
            assert process.wait(DEADLINE_S) == 0
        wait_until(lambda: (shared_tmp / "out").read_bytes().count(b"\n") == 5, "all of it")


# --- the supervisor's own troubles --------------------------------------------------------------------------------------


def test_clients_that_hold_all_fds_of_the_supervisor(dropin: list[str], shared_tmp: Path) -> None:
    """Those who come then wait, and are served once there is room."""
    with served(dropin, shared_tmp) as vm, vm.client() as steady:
        resource.prlimit(vm.supervisor, resource.RLIMIT_NOFILE, (48, 48))
        with contextlib.ExitStack() as stack:
            for _ in range(48 - len(fds_of(vm.supervisor)) + 5):
                stack.enter_context(vm.connect())
            wait_until(lambda: "no client can be accepted" in vm.log, "a full table")
            assert steady.ask(STATUS) == RUNNING
            blocked = json.dumps(
                {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "a", "filename": "/etc/passwd"}}
            )
            reply = steady.ask(blocked.encode())
            assert "error" in reply or reply == {"return": {}}
            begin = cpu_time(vm.supervisor)
            time.sleep(1)
            assert cpu_time(vm.supervisor) - begin < 0.3, "it spins"
        with vm.client() as again:
            assert again.ask(STATUS) == RUNNING


def cpu_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_fds_that_do_not_fit_any_more(dropin: list[str], shared_tmp: Path) -> None:
    """The kernel drops what does not fit; the command goes on without."""
    with served(dropin, shared_tmp) as vm, vm.client() as steady:
        resource.prlimit(vm.supervisor, resource.RLIMIT_NOFILE, (48, 48))
        with contextlib.ExitStack() as stack, odd_fds("many") as fds:
            for _ in range(48 - len(fds_of(vm.supervisor)) + 5):
                stack.enter_context(vm.connect())
            wait_until(lambda: "no client can be accepted" in vm.log, "a full table")
            reply = steady.ask(b"{'execute': 'getfd', 'arguments': {'fdname': 'a'}}", *fds)
            assert "error" in reply or reply == {"return": {}}
        assert steady.ask(STATUS) == RUNNING
