"""The main loop and the connections of the supervisor, on socket pairs; and what they do when the kernel or we fail."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.supervisor import worker
from qemu_userns.supervisor.connection import Connection
from qemu_userns.supervisor.poller import IN, Poller
from qemu_userns.supervisor.worker import Failed, start_worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.supervisor.worker import Tell

LARGE = bytes(4 << 20)
GETFD = b"{'execute': 'getfd'}"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Heard:
    """A connection, and what came in."""

    def __init__(self, poller: Poller, read_fd: int, write_fd: int) -> None:
        self.items: list[tuple[bytes, int]] = []
        self.connection = Connection(poller, read_fd, write_fd, self.receive)

    def receive(self, data: bytes, fds: tuple[int, ...]) -> None:
        for fd in fds:
            os.close(fd)
        self.items.append((data, len(fds)))
        if not data:
            self.connection.close()


def test_a_mistake_of_ours_ends_one_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    poller = Poller()
    reports: list[str] = []
    ended = []
    poller.report = reports.append
    ours, theirs = pair

    def broken() -> None:
        ended.append(True)
        poller.unwatch(ours.fileno())

    poller.watch(ours.fileno(), IN, lambda _: [][1], broken)
    theirs.send(b"x")
    poller.run_once(1)
    poller.run_once(0)
    assert ended == [True]
    assert len(reports) == 1
    assert reports[0].startswith("internal error: IndexError at test_connection.py:")


def test_a_mistake_before_there_is_a_log_ends_the_process(pair: tuple[socket.socket, socket.socket]) -> None:
    poller = Poller()
    poller.watch(pair[0].fileno(), IN, lambda _: [][1])
    pair[1].send(b"x")
    with pytest.raises(IndexError):
        poller.run_once(1)


def test_an_event_of_an_fd_whose_number_is_anothers_by_now() -> None:
    poller, heard = Poller(), []
    first, second = socket.socketpair(), socket.socketpair()

    def replace(_: int) -> None:
        poller.unwatch(first[0].fileno())
        poller.unwatch(second[0].fileno())
        poller.watch(second[0].fileno(), IN, lambda events: heard.append("the new one"))

    poller.watch(first[0].fileno(), IN, replace)
    poller.watch(second[0].fileno(), IN, lambda events: heard.append("the old one"))
    first[1].send(b"x")
    second[1].send(b"x")
    poller.run_once(1)
    assert heard == []
    poller.run_once(1)
    assert heard == ["the new one"]
    for end in (*first, *second):
        end.close()


def test_fds_come_with_their_own_command() -> None:
    """Also where the kernel would give the second one together with the first command."""
    poller = Poller()
    ours, theirs = socket.socketpair()
    heard = Heard(poller, fd := ours.detach(), fd)
    with theirs:
        for _ in range(2):
            theirs.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
            theirs.send(GETFD)
        theirs.send(GETFD)
    while not heard.connection.closed:
        poller.run_once(1)
    for data, count in heard.items:
        if count:
            assert data.count(b"}") <= 1
    assert b"".join(data for data, _ in heard.items) == (b" " + GETFD) * 2 + GETFD
    assert sum(count for _, count in heard.items) == 2


def test_what_is_queued_comes_before_the_end() -> None:
    poller, done = Poller(), []
    ours, theirs = socket.socketpair()
    connection = Connection(poller, fd := ours.detach(), fd, lambda *_: None)
    connection.send(LARGE)
    connection.send(b"last")
    connection.finish(lambda: done.append(True))
    received = bytearray()
    with theirs:
        theirs.setblocking(False)
        while True:
            poller.run_once(0)
            try:
                data = theirs.recv(1 << 20)
            except BlockingIOError:
                continue
            if not data:
                break
            received += data
    assert received == LARGE + b"last"
    assert done == [True]
    assert connection.closed


def test_a_peer_that_leaves_ends_what_waits_for_it() -> None:
    poller, done = Poller(), []
    ours, theirs = socket.socketpair()
    connection = Connection(poller, fd := ours.detach(), fd, lambda *_: None)
    connection.send(LARGE)
    connection.finish(lambda: done.append(True))
    theirs.close()
    poller.run_once(1)
    assert done == [True]
    assert connection.closed


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ENOMEM])
def test_any_error_of_a_socket_is_its_end(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Connection) -> tuple[bytes, tuple[int, ...]]:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Connection, "_receive_message", fail)
    poller = Poller()
    ours, theirs = socket.socketpair()
    heard = Heard(poller, fd := ours.detach(), fd)
    with theirs:
        theirs.send(b"x")
        poller.run_once(1)
    assert heard.items == [(b"", 0)]


def test_a_broken_stdout_does_not_make_it_wait_for_stdin() -> None:
    poller = Poller()
    into, out = os.pipe(), os.pipe()
    heard = Heard(poller, into[0], out[1])
    os.close(out[0])
    heard.connection.send(b"x")
    poller.run_once(1)
    poller.run_once(0)
    assert heard.connection.queued_bytes == 0
    os.write(into[1], b"still there")
    poller.run_once(1)
    assert heard.items == [(b"still there", 0)]
    os.close(into[1])
    poller.run_once(1)
    assert not heard.connection.hung_up
    assert heard.connection.closed


@pytest.mark.parametrize("call", ["fork", "socketpair"])
def test_no_worker_can_be_had(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(*((os, "fork") if call == "fork" else (worker, "socketpair")), fail)
    poller, answers = Poller(), []
    start_worker(poller, lambda _: (None, []), lambda answer, fds: answers.append(answer), 1)
    assert answers == []  # later: who asks is in the middle of something
    poller.run_once(0)
    assert isinstance(answers[0], Failed)
    assert "temporarily unavailable" in answers[0].text


def test_a_workers_answer_may_be_of_any_size() -> None:
    poller, answers = Poller(), []
    start_worker(poller, lambda _: (LARGE, [0, 1]), lambda *answer: answers.append(answer), 10)
    poller.run_once(10)
    ((data, fds),) = answers
    assert data == LARGE
    assert [os.fstat(fd) for fd in fds] == [os.fstat(fd) for fd in (0, 1)]
    for fd in fds:
        os.close(fd)


def test_what_a_worker_told_is_known_when_it_is_killed() -> None:
    def work(tell: Tell) -> tuple[None, list[int]]:
        tell("first", ())
        tell(LARGE, (0,))
        os.kill(os.getpid(), signal.SIGKILL)
        return None, []

    poller = Poller()
    heard: list[Any] = []
    start_worker(poller, work, lambda answer, _: heard.append(answer), 10, told=lambda *said: heard.append(said))
    while len(heard) < 3:
        poller.run_once(10)
    first, (large, fds), end = heard
    assert (first, large, len(fds)) == (("first", ()), LARGE, 1)
    assert os.fstat(fds[0]) == os.fstat(0)
    os.close(fds[0])
    assert isinstance(end, Failed)
    assert "given up" in end.text


def test_a_worker_whose_supervisor_is_killed_ends() -> None:
    """And does not go on as a copy of it."""
    go, said = os.pipe(), os.pipe()

    def work(_: object) -> tuple[None, list[int]]:
        os.write(said[1], b"works")
        os.read(go[0], 1)
        return None, []

    supervisor = os.fork()
    if supervisor == 0:
        try:
            start_worker(Poller(), work, lambda *_: None, 60, (go[0], said[1]))
            signal.pause()
        finally:
            os.write(said[1], b"escaped")
            os._exit(0)
    os.close(said[1])
    assert os.read(said[0], 16) == b"works"
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    os.write(go[1], b"x")
    assert os.read(said[0], 16) == b""
    for fd in (*go, said[0]):
        os.close(fd)
