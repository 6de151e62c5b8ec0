"""A command that goes on at once does what it would have done in its turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.qmp.actions import Prepare, Refused, SendQemu
from qemu_userns.qmp.session import Session
from tests.qmp.dialogue import start

if TYPE_CHECKING:
    from qemu_userns.qmp.actions import Action

COMMANDS = [
    b"{'execute': 'query-status'}",
    b"{'execute': 'query-fdsets', 'id': 7}",
    b"{'execute': 'cont'}",
    b"{'execute': 'blockdev-add', 'arguments': {'driver': 'file', 'filename': '/x', 'node-name': 'a'}}",
    b"{'execute': 'remove-fd', 'arguments': {'fdset-id': 2000100064}}",
    b"{'execute': 'getfd', 'arguments': {'fdname': 'n'}}",
    b"{'execute': 'closefd', 'arguments': {'fdname': 'n'}}",
    b"{'exec-oob': 'query-yank'}",
    b"[]",
]
FD = 900  # of nobody: the session only passes numbers on
SAID = st.tuples(st.integers(1, 2), st.lists(st.sampled_from(COMMANDS), max_size=3), st.booleans())
STEPS = st.lists(st.one_of(SAID, st.sampled_from(["reply", "refuse"])), max_size=20)


def play(steps: list[tuple[int, list[bytes], bool] | str]) -> list[Action]:
    """Return all that a session does for two clients, with a QEMU that answers each command when it is told to."""
    session = start(1, 2)
    done: list[Action] = []
    replies, tickets, fd = 0, 0, FD
    answered = [0, 0]
    for step in steps:
        if isinstance(step, tuple):
            client, commands, with_fd = step
            fd += with_fd
            done += session.receive_client(client, b"".join(commands) or b" ", (fd,) if with_fd else ())
        replies = sum(isinstance(action, SendQemu) for action in done)
        tickets = sum(isinstance(action, Prepare) for action in done)
        if step == "reply" and answered[0] < replies:
            answered[0] += 1
            done += session.receive_qemu(b'{"return": {}}\r\n')
        if step == "refuse" and answered[1] < tickets:
            ticket = [action.ticket for action in done if isinstance(action, Prepare)][answered[1]]
            answered[1] += 1
            done += session.answer(ticket, Refused("GenericError", "no"))
    return done


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_at_once_is_as_in_turn(steps: list[tuple[int, list[bytes], bool] | str]) -> None:

    at_once = play(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_is_free", lambda *_: False)
        in_turn = play(steps)
    assert at_once == in_turn
