"""A session driven at random, and what has to hold whatever happens: for hypothesis and for atheris."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from qemu_userns.qmp.actions import Action, CloseClient, CloseFds, Keep, Prepare, Prepared, Refused, Release, SendClient, SendQemu
from qemu_userns.qmp.policy import FULL, Policy
from qemu_userns.qmp.session import Session
from tests.qmp.dialogue import GREETING, NEGOTIATED, RULES, TOKEN

POLICIES = [FULL, FULL, Policy(read_only=True), Policy(deny=frozenset(["quit"]))]
CLIENT_BYTES = [
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}',
    b'{"execute":"query-status","id":{"a":[1]}}',
    b'{"exec-oob":"query-yank","id":7}',
    b'{"exec-oob":"query-yank"}',
    b'{"execute":"getfd","arguments":{"fdname":"a"}}',
    b'{"execute":"getfd","arguments":{}}',
    b'{"execute":"closefd","arguments":{"fdname":"a"}}',
    b'{"execute":"add-fd","arguments":{"fdset-id":1}}',
    b'{"execute":"add-fd","arguments":{"fdset-id":2000000000}}',
    b'{"execute":"remove-fd","arguments":{"fdset-id":2000000000}}',
    b'{"execute":"query-fdsets"}',
    b'{"execute":"blockdev-add","arguments":{"node-name":"n","filename":"fd:a"},"id":"x"}',
    b'{"execute":"blockdev-del","arguments":{"node-name":"n"}}',
    b'{"execute":"screendump","arguments":{"filename":"/s"}}',
    b'{"execute":"netdev_add","arguments":{"id":"n","fd":"a"}}',
    b"{'execute':'quit'}",
    b'{"foo":1}',
    b'{"exec-oob":5}',
    b"\xff",
    b"[",
    b" ",
]
ERROR = b'{"error": {"class": "GenericError", "desc": "no"}}\r\n'
QEMU_BYTES = [
    GREETING,
    NEGOTIATED,
    b'{"return": {}}\r\n',
    b'{"return": {}}\r\n',
    b'{"return": {}}\r\n',
    b'{"return": [{"fdset-id": 2000000000, "fds": []}, 5, {}]}\r\n',
    ERROR,
    b'{"error": 5}\r\n',
    b'{"id": 5, "error": {}}\r\n',
    b'{"timestamp": {}, "event": "DEVICE_DELETED", "data": {"device": "n"}}\r\n',
    b'{"timestamp": {}, "event": 5, "data": 6}\r\n',
]


class Machine:
    """A session, and what it was given and has given back."""

    def __init__(self, pretty: bool = False) -> None:
        self.session = Session(TOKEN, pretty, RULES)
        self.given: list[int] = []
        self.back: list[int] = []
        self.handed: list[int] = []
        self.kept: list[int] = []
        self.released: list[int] = []
        self.tickets: list[int] = []
        self.unanswered: list[bytes] = []
        self.clients: set[int] = set()
        self.opened = 0
        self.stream = b""

    def step(self, number: Callable[[int], int], blob: Callable[[], bytes]) -> None:
        """Do one thing; `number(n)` chooses out of n, `blob` gives any bytes."""
        kind = number(16)
        if not self.clients or (kind == 0 and len(self.clients) < 4):
            self.opened += 1
            self.clients.add(self.opened)
            self.do(self.session.open_client(self.opened, POLICIES[number(len(POLICIES))]))
            if number(4):
                self.do(self.session.receive_client(self.opened, CLIENT_BYTES[number(2)], ()))
        elif kind == 1:
            client = self.choose(number)
            self.clients.discard(client)
            self.do(self.session.close_client(client))
            assert self.session.is_idle(client)
        elif kind < 8:
            text = blob() if kind == 2 else CLIENT_BYTES[number(len(CLIENT_BYTES))]
            if kind == 3:
                text = text[: number(len(text) + 1)]
            fds = tuple(self.new_fd() for _ in range(number(4)))
            self.do(self.session.receive_client(self.choose(number), text, fds))
        elif kind < 14:
            self.do(self.session.receive_qemu(self.reply(number, blob)))
        elif kind == 14 and self.tickets:
            self.answer(number)
        elif kind == 15 and not number(50):
            self.do(self.session.close_qemu())

    def choose(self, number: Callable[[int], int]) -> int:
        return sorted(self.clients)[number(len(self.clients))]

    def reply(self, number: Callable[[int], int], blob: Callable[[], bytes]) -> bytes:
        """Return what QEMU says: usually what a real one might."""
        kind = number(100)
        if kind == 0:
            return blob()
        if kind < 10 or not self.unanswered:
            return QEMU_BYTES[number(len(QEMU_BYTES))]
        data = self.unanswered.pop(number(len(self.unanswered)) if kind < 12 else 0)
        echo = re.search(rb'"id": ("token-\d+")', data)
        before = ERROR + ERROR if b"\xff" in data else b""
        if b'"qmp_capabilities"' in data and not echo:
            return NEGOTIATED
        if kind < 30:
            return before + (b'{"id": %s, "error": {"class": "GenericError", "desc": "no"}}\r\n' % echo[1] if echo else ERROR)
        return before + (b'{"return": {}, "id": %s}\r\n' % echo[1] if echo else b'{"return": {}}\r\n')

    def answer(self, number: Callable[[int], int]) -> None:
        ticket = self.tickets.pop(number(len(self.tickets)))
        if not number(4):
            self.do(self.session.answer(ticket, Refused("GenericError", "no")))
            return
        fdsets = tuple((2_000_000_000 + number(2), self.new_fd(), "o" * number(2)) for _ in range(number(4)))
        names = tuple((f"ours{index}", self.new_fd()) for index in range(number(3)))
        self.handed.append(len(self.handed) + 1)
        self.do(self.session.answer(ticket, Prepared(b'{"execute":"x"}', fdsets, names, len(self.handed))))

    def new_fd(self) -> int:
        self.given.append(len(self.given) + 100)
        return self.given[-1]

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, SendQemu):
                assert action.data
                self.back += action.fds
                self.unanswered.append(action.data)
            elif isinstance(action, CloseFds):
                assert action.fds
                self.back += action.fds
            elif isinstance(action, Prepare):
                self.tickets.append(action.ticket)
            elif isinstance(action, Keep):
                self.kept.append(action.handed)
            elif isinstance(action, Release):
                self.released.append(action.handed)
            elif isinstance(action, CloseClient):
                assert action.client in self.clients
                self.clients.discard(action.client)
            elif isinstance(action, SendClient):
                assert action.client in self.clients
                assert action.data.endswith(b"\n")

    def finish(self) -> None:
        """End everything; nothing may be lost or given back twice."""
        self.do(self.session.close_qemu())
        for ticket in [*self.tickets, 99999]:
            self.handed.append(len(self.handed) + 1)
            self.do(self.session.answer(ticket, Prepared(b"{}", ((1, self.new_fd(), ""),), (), len(self.handed))))
        assert not self.clients or not self.session._clients
        assert sorted(self.back) == sorted(self.given)
        assert max(Counter(self.released).values(), default=0) <= 1
        assert max(Counter(self.kept).values(), default=0) <= 1
        assert set(self.kept) | set(self.released) == set(self.handed)
