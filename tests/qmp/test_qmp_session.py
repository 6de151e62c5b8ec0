"""Dialogues of a session with plain values: what goes in, and every action that comes out."""

from collections.abc import Sequence

import pytest

from qemu_userns.qmp.actions import (
    Action,
    CloseClient,
    CloseFds,
    Keep,
    Log,
    Prepare,
    Prepared,
    Refused,
    Release,
    Removed,
    SendClient,
    SendQemu,
)
from qemu_userns.qmp.clients import WAITING_MAX
from qemu_userns.qmp.policy import FULL, Policy
from qemu_userns.qmp.session import Session
from tests.qmp.dialogue import DONE, GREETING, NEGOTIATED, RULES, TOKEN, negotiate, sent, start

STATUS = b'{"execute": "query-status"}'
RUNNING = b'{"return": {"status": "running", "singlestep": false, "running": true}}\r\n'
STOP = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
ADD = b'{"execute": "blockdev-add", "arguments": {"node-name": "n", "driver": "file", "filename": "/d"}, "id": 9}'
READY = b'{"execute": "blockdev-add", "arguments": {"node-name": "n", "driver": "file", "filename": "/dev/fdset/7"}, "id": 9}'
ERROR = b'{"error": {"class": "GenericError", "desc": "no"}}\r\n'


def error(desc: str, error_class: str = "GenericError", echo: str = "") -> bytes:
    return f'{{{echo}"error": {{"class": "{error_class}", "desc": "{desc}"}}}}\r\n'.encode()


def own(number: int, name: str, arguments: str) -> bytes:
    """Return a command of the session's own."""
    return f'{{"execute": "{name}", "arguments": {{{arguments}}}, "id": "{TOKEN}-{number}"}}'.encode()


def getfd(name: str) -> bytes:
    return f'{{"execute":"getfd","arguments":{{"fdname":"{name}"}}}}'.encode()


def test_the_session_negotiates_and_clients_get_qemus_greeting() -> None:
    session = Session(TOKEN, False, RULES)
    assert session.open_client(1, FULL) == []
    assert session.receive_client(1, STATUS, ()) == []
    assert session.receive_qemu(GREETING[:9]) == []
    asked = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "token-1"}'
    assert session.receive_qemu(GREETING[9:]) == [SendClient(1, GREETING), SendQemu(asked)]
    assert session.open_client(2, FULL) == [SendClient(2, GREETING)]
    expecting = error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
    assert session.receive_qemu(b'{"return": {}, "id": "token-1"}\r\n') == [SendClient(1, expecting)]
    negotiate(session, 2)
    assert session.receive_qemu(STOP) == [SendClient(2, STOP)]


def test_capabilities_that_qemu_does_not_offer() -> None:
    session = Session(TOKEN, False, RULES)
    actions = session.receive_qemu(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
    assert actions == [SendQemu(b'{"execute": "qmp_capabilities", "id": "token-1"}')]
    session.receive_qemu(DONE)
    session.open_client(1, FULL)
    session.receive_client(1, b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}', ())
    missing = error("Capability oob not available", echo='"id": 1, ')
    assert session.receive_qemu(NEGOTIATED) == [SendClient(1, missing)]


def test_replies_go_to_the_client_that_asked_and_clients_take_turns() -> None:
    session = start(1, 2)
    assert session.receive_client(1, STATUS + b'{"execute":"a"}' + b'{"execute":"b"}', ()) == [SendQemu(STATUS)]
    assert session.receive_client(2, b'{"execute":"c"}', ()) == []
    assert session.receive_qemu(RUNNING) == [SendClient(1, RUNNING), SendQemu(b'{"execute":"c"}')]
    assert session.receive_qemu(STOP + DONE) == [
        SendClient(1, STOP),
        SendClient(2, STOP),
        SendClient(2, DONE),
        SendQemu(b'{"execute":"a"}'),
    ]
    assert session.receive_qemu(ERROR) == [SendClient(1, ERROR), SendQemu(b'{"execute":"b"}')]
    assert not session.is_idle(1)
    assert session.receive_qemu(DONE) == [SendClient(1, DONE)]
    assert session.is_idle(1)


def test_out_of_band_commands_pass_the_line() -> None:
    session = start()
    session.open_client(1, FULL)
    negotiate(session, 1, oob=True)
    session.receive_client(1, STATUS, ())
    assert session.receive_client(1, b"{'exec-oob':'query-yank','id':{'b':1,'a':2}}", ()) == [
        SendQemu(b'{"exec-oob": "query-yank", "id": "token-2"}')
    ]
    assert session.receive_client(1, b'{"exec-oob":"yank","arguments":{"instances":[]}}', ()) == [
        SendQemu(b'{"exec-oob": "yank", "arguments": {"instances": []}, "id": "token-3"}')
    ]
    assert session.receive_qemu(b'{"return": [], "id": "token-3"}\r\n') == [SendClient(1, b'{"return": []}\r\n')]
    assert session.receive_qemu(b'{"id": "token-2", "error": {"class": "C", "desc": "d"}}\r\n') == [
        SendClient(1, b'{"id": {"a": 2, "b": 1}, "error": {"class": "C", "desc": "d"}}\r\n')
    ]
    assert session.receive_qemu(RUNNING) == [SendClient(1, RUNNING)]


def test_out_of_band_commands_behind_the_negotiation_pass_the_line_then() -> None:
    session = start()
    session.open_client(1, FULL)
    caps = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
    assert session.receive_client(1, caps + STATUS + b'{"exec-oob":"query-yank"}', ()) == [SendQemu(caps)]
    assert session.receive_qemu(NEGOTIATED) == [
        SendClient(1, DONE),
        SendQemu(b'{"exec-oob": "query-yank", "id": "token-2"}'),
        SendQemu(STATUS),
    ]


def test_few_out_of_band_commands_are_at_qemu_and_none_of_a_client_that_left() -> None:
    session = start()
    session.open_client(1, FULL)
    negotiate(session, 1, oob=True)
    actions = session.receive_client(1, b'{"exec-oob":"query-yank"}' * 30, ())
    assert len(actions) == 8
    actions = session.receive_qemu(b'{"return": [], "id": "token-2"}\r\n')
    assert [type(action) for action in actions] == [SendClient, SendQemu]
    assert session.close_client(1) == []
    assert session.receive_qemu(b'{"return": [], "id": "token-3"}\r\n') == []


def test_what_is_no_command_is_answered_by_qemu() -> None:
    session = start(1)
    data = b'{"foo": 1}\n\xff{"execute": "qmp_capabilities", "id": "token-2"}'
    assert session.receive_client(1, b'{"foo": 1}', ()) == [SendQemu(data)]
    assert session.receive_qemu(ERROR) == []
    assert session.receive_qemu(error("stray")) == [SendClient(1, ERROR)]
    assert session.receive_qemu(b'{"id": "token-2", "error": {}}\r\n') == []
    assert session.is_idle(1)


def test_half_a_message_is_never_sent() -> None:
    session = start(1)
    assert session.receive_client(1, STATUS[:-1], ()) == []
    assert session.close_client(1) == []


@pytest.mark.parametrize("data", [b'{"foo": 1}', b"\xff", b"[", b"1 ", b'{"execute":"a","execute":"b"}'])
def test_nothing_malformed_of_a_restricted_client_reaches_qemu(data: bytes) -> None:
    session = start()
    session.open_client(1, Policy(read_only=True))
    actions = session.receive_client(1, data, ())
    assert all(isinstance(action, SendClient) and b"GenericError" in action.data for action in actions)


def test_commands_of_a_restricted_client_are_printed_anew() -> None:
    session = start(policy=Policy(read_only=True))
    session.open_client(1, Policy(read_only=True))
    session.receive_client(1, b"{'execute':'qmp_capabilities'}", ())
    session.receive_qemu(NEGOTIATED)
    denied = error("The command quit is not allowed for this client", "CommandNotFound", '"id": 5, ')
    assert session.receive_client(1, b"{'id':5,'execute':'quit'}", ()) == [SendClient(1, denied)]
    assert session.receive_client(1, b"{'id':5,'execute':'query-name'}", ()) == [SendQemu(b'{"execute": "query-name", "id": 5}')]


def test_out_of_band_commands_that_wait_for_the_negotiation_are_looked_at_too() -> None:
    session = start()
    session.open_client(1, Policy(read_only=True))
    caps = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    assert session.receive_client(1, caps + b"{'exec-oob': 'yank'}{'exec-oob': 'query-yank'}", ()) == [SendQemu(caps)]
    denied = error("The command yank is not allowed for this client", "CommandNotFound")
    assert session.receive_qemu(NEGOTIATED)[1:] == [
        SendClient(1, denied),
        SendQemu(b'{"exec-oob": "query-yank", "id": "token-2"}'),
    ]


def test_fds_go_with_their_command() -> None:
    session = start(1, 2)
    assert session.receive_client(1, b" ", (10, 11)) == [CloseFds((11,))]
    assert session.receive_client(2, getfd("b"), (12,)) == [SendQemu(getfd("b"), (12,))]
    assert session.receive_client(1, STATUS + getfd("a") + getfd("c"), ()) == []
    assert session.receive_qemu(DONE) == [SendClient(2, DONE), SendQemu(STATUS)]
    assert session.receive_qemu(RUNNING) == [SendClient(1, RUNNING), SendQemu(getfd("a"), (10,))]
    assert session.receive_qemu(DONE) == [SendClient(1, DONE), SendQemu(getfd("c"))]
    assert session.receive_qemu(ERROR) == [SendClient(1, ERROR)]


def test_newer_fds_replace_older_ones_in_turn() -> None:
    session = start(1)
    assert session.receive_client(1, b" ", (10,)) == []
    assert session.receive_client(1, getfd("a")[:5], (11,)) == [CloseFds((10,))]
    assert session.receive_client(1, getfd("a")[5:], (12,)) == [CloseFds((11,)), SendQemu(getfd("a"), (12,))]
    assert session.receive_client(1, getfd("b"), (13,)) == []
    assert session.receive_client(1, getfd("c"), (14,)) == []
    assert session.receive_qemu(DONE) == [SendClient(1, DONE), SendQemu(getfd("b"), (13,))]
    assert session.close_client(1) == [CloseFds((14,))]


def test_an_fd_that_qemu_did_not_take_is_not_left_for_others() -> None:
    session = start(1)
    assert session.receive_client(1, b'{"execute":"getfd","arguments":{}}', (10,)) == [
        SendQemu(b'{"execute":"getfd","arguments":{}}')
    ]
    assert session.receive_qemu(ERROR) == [SendClient(1, ERROR)]
    assert session.receive_client(1, getfd("0a"), ()) == [SendQemu(getfd("0a"), (10,))]
    assert session.receive_qemu(ERROR) == [SendClient(1, ERROR), SendQemu(own(2, "getfd", '"fdname": "0"'))]
    assert session.receive_qemu(ERROR) == []


def test_a_command_before_the_negotiation_leaves_the_fd_pending() -> None:
    session = start()
    session.open_client(1, FULL)
    assert b"Expecting" in sent(session.receive_client(1, getfd("a"), (10,)), 1)
    negotiate(session, 1)
    assert session.receive_client(1, getfd("a"), ()) == [SendQemu(getfd("a"), (10,))]


def test_names_of_two_clients_do_not_meet() -> None:
    session = start(1, 2, 3)
    session.receive_client(1, getfd("a"), (10,))
    session.receive_qemu(DONE)
    assert session.receive_client(2, getfd("a"), (11,)) == [
        SendQemu(b'{"execute": "getfd", "arguments": {"fdname": "a#1"}}', (11,))
    ]
    session.receive_qemu(DONE)
    netdev = b'{"execute":"netdev_add","arguments":{"id":"n","fd":"a"}}'
    assert session.receive_client(2, netdev, ()) == [SendQemu(netdev.replace(b'"a"', b'"a#1"'))]
    assert session.receive_qemu(error("no fd a#1")) == [SendClient(2, error("no fd a"))]
    assert session.receive_client(1, netdev, ()) == [SendQemu(netdev)]
    assert session.receive_qemu(DONE) == [SendClient(1, DONE)]
    close = b'{"execute":"closefd","arguments":{"fdname":"a"}}'
    assert session.receive_client(2, close, ()) == [SendQemu(b'{"execute": "closefd", "arguments": {"fdname": "a#1"}}')]
    assert session.receive_qemu(error("File descriptor named 'a#1' not found")) == [
        SendClient(2, error("File descriptor named 'a' not found"))
    ]


def test_another_clients_name_cannot_be_closed() -> None:
    session = start(1, 2)
    session.receive_client(1, getfd("a"), (10,))
    session.receive_qemu(DONE)
    close = b'{"execute":"closefd","arguments":{"fdname":"a"}}'
    not_found = error("File descriptor named 'a' not found")
    assert session.receive_client(2, close, ()) == [SendClient(2, not_found)]
    session.close_client(1)
    assert session.receive_client(2, close, ()) == [SendQemu(close)]


def test_names_left_behind_are_replaced_as_by_qemu() -> None:
    session = start(1, 2)
    for client in (1, 2):
        session.receive_client(client, getfd("a"), (10 + client,))
        session.receive_qemu(DONE)
    assert session.close_client(1) == []
    assert session.close_client(2) == [SendQemu(own(2, "closefd", '"fdname": "a"'))]


def test_fdsets_of_ours_are_not_seen() -> None:
    session = start(1)
    query = b'{"execute": "query-fdsets", "id": 1}'
    session.receive_client(1, query, ())
    sets = b'{"fds": [{"fd": 5}], "fdset-id": %d}'
    listed = b", ".join(sets % number for number in (1, 2_000_000_000, 2_000_000_001))
    shown = b'{"return": [' + sets % 1 + b'], "id": 1}\r\n'
    assert session.receive_qemu(b'{"return": [' + listed + b'], "id": 1}\r\n') == [SendClient(1, shown)]
    for number in (2_000_000_000, 2_000_000_001):
        add = b'{"execute":"add-fd","arguments":{"fdset-id":%d}}' % number
        not_found = error(f"File descriptor named 'fdset-id:{number}' not found")
        assert session.receive_client(1, add, (10,)) == [CloseFds((10,)), SendClient(1, not_found)]
        assert session.receive_client(1, add.replace(b"add", b"remove"), ()) == [SendClient(1, not_found)]
    remove = b'{"execute":"remove-fd","arguments":{"fdset-id":2000000000,"fd":4}}'
    not_found = error("File descriptor named 'fdset-id:2000000000, fd:4' not found")
    assert session.receive_client(1, remove, ()) == [SendClient(1, not_found)]
    other = b'{"execute":"remove-fd","arguments":{"fdset-id":3}}'
    assert session.receive_client(1, other, ()) == [SendQemu(other)]


def prepared() -> Prepared:
    return Prepared(READY, ((7, 20, "ro"), (7, 21, "rw"), (8, 22, "")), (("name", 23),), 5)


def prepare(session: Session, name: str = "blockdev-add", said: bytes = ADD) -> int:
    actions = session.receive_client(1, said, ())
    assert actions == [Prepare(1, 1, name, said.decode())]
    return 1


def steps(session: Session, ticket: int, given: Prepared) -> list[SendQemu]:
    """Answer all that is handed over with success, and return what QEMU was sent."""
    found: list[SendQemu] = []
    actions = session.answer(ticket, given)
    while actions:
        (action,) = actions
        assert isinstance(action, SendQemu)
        found.append(action)
        if action.data == given.text:
            break
        actions = session.receive_qemu(DONE)
    return found


def test_what_a_command_names_is_handed_over_first_and_kept() -> None:
    session = start(1, 2)
    ticket = prepare(session)
    assert session.receive_client(1, STATUS, ()) == []
    assert session.receive_client(2, STATUS, ()) == [SendQemu(STATUS)]
    assert session.receive_qemu(RUNNING) == [SendClient(2, RUNNING)]
    found = steps(session, ticket, prepared())
    assert [action.fds for action in found] == [(20,), (21,), (22,), (23,), ()]
    assert [b"add-fd" in action.data for action in found] == [True, True, True, False, False]
    assert found[3].data == own(5, "getfd", '"fdname": "name"')
    done = b'{"return": {}, "id": 9}\r\n'
    assert session.receive_qemu(done) == [Keep(("blockdev", "n"), 5, (7, 8)), SendClient(1, done), SendQemu(STATUS)]
    session.receive_qemu(RUNNING)
    remove = b'{"execute":"blockdev-del","arguments":{"node-name":"n"}}'
    session.receive_client(2, remove, ())
    assert session.receive_qemu(DONE) == [SendClient(2, DONE), SendQemu(own(6, "remove-fd", '"fdset-id": 7'))]
    assert session.receive_qemu(DONE) == [SendQemu(own(7, "remove-fd", '"fdset-id": 8'))]
    assert session.receive_qemu(ERROR) == [Release(5)]


PLUG = b'{"execute": "netdev_add", "arguments": {"type": "tap", "id": "n"}, "id": 9}'
NOWHERE = f"qemu-userns.nowhere-{TOKEN}"
ASKED = own(2, "netdev_add", f'"fd": "{NOWHERE}", "type": "tap", "id": "n"')


def start_netdevs(*clients: int) -> Session:
    """Return a session that prepares netdev_add."""
    rules = RULES.replace(
        needs_opening=lambda command: True,
        owner_of=lambda name, arguments: ("netdev", str(arguments.get("id"))) if "id" in arguments else ("netdev", ""),
    )
    return start(*clients, rules=rules)


def test_a_netdev_is_prepared_once_its_id_is_known_to_be_free() -> None:
    session = start_netdevs(1)
    assert session.receive_client(1, PLUG + STATUS, ()) == [SendQemu(ASKED)]
    missing = error(f"File descriptor named '{NOWHERE}' has not been found", echo='"id": "token-2", ')
    assert session.receive_qemu(missing) == [Prepare(1, 1, "netdev_add", PLUG.decode())]
    assert session.answer(1, Prepared(PLUG, handed=4)) == [SendQemu(PLUG)]


def test_a_netdev_whose_id_is_taken_is_not_prepared() -> None:
    session = start_netdevs(1, 2)
    assert session.receive_client(1, PLUG, ()) == [SendQemu(ASKED)]
    taken = error("Duplicate ID 'n'", echo='"id": 9, ')
    assert session.receive_qemu(error("Duplicate ID 'n'", echo='"id": "token-2", ')) == [SendClient(1, taken)]
    line = PLUG.replace(b"netdev_add", b"human-monitor-command")
    session.receive_client(2, line, ())
    printed = b'{"return": "Error: Duplicate ID \'n\'\\r\\n", "id": 9}\r\n'
    assert session.receive_qemu(error("Duplicate ID 'n'", echo='"id": "token-3", ')) == [SendClient(2, printed)]
    assert session.is_idle(1)
    assert session.is_idle(2)


def test_a_netdev_without_an_id_is_left_to_qemu() -> None:
    nameless = PLUG.replace(b', "id": "n"', b"")
    assert start_netdevs(1).receive_client(1, nameless, ()) == [SendQemu(nameless)]


def test_a_client_that_leaves_while_qemu_is_asked_for_its_id() -> None:
    session = start_netdevs(1, 2)
    session.receive_client(1, PLUG, ())
    assert session.close_client(1) == []
    assert session.receive_client(2, PLUG, ()) == []
    asked = ASKED.replace(b"token-2", b"token-3")
    assert session.receive_qemu(error(NOWHERE, echo='"id": "token-2", ')) == [SendQemu(asked)]


def test_what_nothing_holds_after_the_reply_is_taken_back() -> None:
    session = start(1)
    ticket = prepare(session, "screendump", b'{"execute":"screendump","arguments":{"filename":"/s"}}')
    steps(session, ticket, prepared())
    actions = session.receive_qemu(DONE)
    assert actions[0] == SendClient(1, DONE)
    assert take_back(session, actions[1:]) == ["remove-fd", "remove-fd", "closefd", "release 5"]


def take_back(session: Session, actions: Sequence[Action]) -> list[str]:
    """Answer what QEMU is asked, and return what is taken back."""
    found: list[str] = []
    while actions:
        for action in actions:
            if isinstance(action, SendQemu):
                assert not action.fds
                found.append(action.data.split(b'"')[3].decode())
            elif isinstance(action, Release):
                found.append(f"release {action.handed}{' failed' if action.failed else ''}")
            else:
                raise AssertionError(action)
        actions = session.receive_qemu(DONE) if isinstance(actions[-1], SendQemu) else []
    return found


def test_an_error_of_the_command_takes_everything_back() -> None:
    session = start(1)
    steps(session, prepare(session), prepared())
    actions = session.receive_qemu(ERROR)
    assert actions[0] == SendClient(1, ERROR)
    assert take_back(session, actions[1:]) == ["remove-fd", "remove-fd", "closefd", "release 5 failed"]
    assert session.is_idle(1)


@pytest.mark.parametrize(
    ("failing", "closed", "taken_back"),
    [
        (0, (21, 22, 23), ["getfd", "release 5 failed"]),
        (1, (22, 23), ["getfd", "remove-fd", "release 5 failed"]),
        (2, (23,), ["getfd", "remove-fd", "release 5 failed"]),
        (3, (), ["getfd", "remove-fd", "remove-fd", "release 5 failed"]),
    ],
)
def test_an_error_on_the_way_closes_what_was_not_sent(failing: int, closed: tuple[int, ...], taken_back: list[str]) -> None:
    session = start(1)
    session.answer(prepare(session), prepared())
    for _ in range(failing):
        session.receive_qemu(DONE)
    actions = session.receive_qemu(b'{"id": "token-9", "error": {"class": "GenericError", "desc": "no"}}\r\n')
    assert actions[0] == SendClient(1, error("no", echo='"id": 9, '))
    actions = actions[1:] + session.receive_qemu(ERROR)  # the getfd that makes QEMU close what it was sent
    assert [action for action in actions if isinstance(action, CloseFds)] == ([CloseFds(closed)] if closed else [])
    assert take_back(session, [action for action in actions if not isinstance(action, CloseFds)]) == taken_back


def test_a_refusal_is_told() -> None:
    session = start(1)
    ticket = prepare(session)
    assert session.answer(ticket, Refused("GenericError", "no")) == [SendClient(1, error("no", echo='"id": 9, '))]
    assert session.answer(ticket, Refused("GenericError", "no")) == []


def test_what_is_prepared_for_a_client_that_has_gone_is_given_back() -> None:
    session = start(1)
    ticket = prepare(session)
    assert session.close_client(1) == []
    assert session.answer(ticket, prepared()) == [CloseFds((20, 21, 22, 23)), Release(5, failed=True)]
    assert session.answer(ticket, prepared()) == [CloseFds((20, 21, 22, 23)), Release(5, failed=True)]


def test_a_client_that_leaves_while_its_fds_are_handed_over() -> None:
    session = start(1)
    session.answer(prepare(session), prepared())
    assert session.close_client(1) == []
    actions = session.receive_qemu(DONE)
    assert actions[0] == CloseFds((21, 22, 23))
    assert take_back(session, list(actions[1:])) == ["remove-fd", "release 5 failed"]


def test_a_client_that_leaves_while_what_is_prepared_waits() -> None:
    session = start(1, 2)
    ticket = prepare(session)
    session.receive_client(2, STATUS, ())
    assert session.answer(ticket, prepared()) == []
    assert session.close_client(1) == [Release(5, failed=True), CloseFds((20, 21, 22, 23))]
    assert session.receive_qemu(RUNNING) == [SendClient(2, RUNNING)]


def test_a_client_that_leaves_while_its_command_runs() -> None:
    session = start(1, 2)
    steps(session, prepare(session), prepared())
    assert session.close_client(1) == []
    assert session.receive_client(2, STATUS, ()) == []
    assert session.receive_qemu(DONE) == [Keep(("blockdev", "n"), 5, (7, 8)), SendQemu(STATUS)]


def test_qemu_leaves_while_fds_are_handed_over() -> None:
    session = start(1, 2)
    session.receive_client(2, b" ", (30,))
    session.answer(prepare(session), prepared())
    assert session.close_qemu() == [
        CloseFds((21, 22, 23)), Release(5, failed=True), CloseClient(1, ""), CloseFds((30,)), CloseClient(2, ""),
    ]  # fmt: skip
    assert session.receive_client(1, b"", (31,)) == [CloseFds((31,))]
    assert session.open_client(3, FULL) == [CloseClient(3, "")]
    assert session.receive_qemu(STOP) == session.close_qemu() == session.close_client(1) == []
    assert not session.wants_input(1)


def test_what_a_command_made_stays_where_qemu_leaves_before_the_reply() -> None:
    session = start(1)
    steps(session, prepare(session), prepared())
    assert session.close_qemu() == [Release(5), CloseClient(1, "")]


def test_qemu_leaves_while_something_is_taken_back() -> None:
    session = start(1)
    session.keep(("blockdev", "n"), 5, (7,))
    session.keep(("blockdev", "n"), 6, (8,))
    assert session.remove_owner(("blockdev", "n")) == [SendQemu(own(2, "remove-fd", '"fdset-id": 7'))]
    assert session.close_qemu() == [Release(5), Release(6), CloseClient(1, "")]


def test_objects_that_other_sessions_may_have_given_something() -> None:
    session = start(1)
    session.receive_client(1, b'{"execute":"blockdev-del","arguments":{"node-name":"n"}}', ())
    assert session.receive_qemu(DONE) == [Removed(("blockdev", "n")), SendClient(1, DONE)]
    assert session.remove_owner(("blockdev", "n")) == []


def test_an_event_takes_back_what_its_object_has() -> None:
    session = start(1)
    event = b'{"timestamp": {}, "event": "DEVICE_DELETED", "data": {"device": "d", "path": "/p"}}\r\n'
    assert session.receive_qemu(event) == [SendClient(1, event)]
    session.keep(("blockdev", "d"), 5, ())
    assert session.receive_qemu(event) == [SendClient(1, event), Release(5)]


def test_names_in_a_prepared_command_are_qemus() -> None:
    session = start(1, 2)
    for client in (1, 2):
        session.receive_client(client, getfd("a"), (10,))
        session.receive_qemu(DONE)
    dump = b'{"execute":"screendump","arguments":{"filename":"fd:a"}}'
    (action,) = session.receive_client(2, dump, ())
    assert isinstance(action, Prepare)
    assert action.text == dump.decode().replace("fd:a", "fd:a#1")
    assert session.answer(action.ticket, Prepared(b"{}")) == [SendQemu(b"{}")]
    assert session.receive_qemu(error("fd a#1 is bad")) == [SendClient(2, error("fd a is bad"))]


def test_too_much_that_waits_stops_reading() -> None:
    session = start(1)
    session.receive_client(1, STATUS * WAITING_MAX, ())
    assert session.wants_input(1)
    session.receive_client(1, STATUS, ())
    assert not session.wants_input(1)
    assert not session.wants_input(2)
    session.receive_qemu(RUNNING)
    assert session.wants_input(1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"garbage\n", "QEMU sends what is no QMP"),
        (b"\r\n", "QEMU sends what is no QMP"),
        (b"x" * (64 << 20) + b"x", "QEMU sends a message without end"),
    ],
    ids=["garbage", "empty", "endless"],
)
def test_what_is_no_qmp_ends_the_session(data: bytes, reason: str) -> None:
    session = start(1)
    assert session.receive_qemu(data) == [Log(reason), CloseClient(1, reason)]


def test_replies_that_nobody_waits_for_and_greetings_are_logged_once() -> None:
    session = start(1)
    assert session.receive_qemu(DONE) == [Log("QEMU sends a reply that nobody waits for")]
    assert session.receive_qemu(DONE) == []
    assert session.receive_qemu(GREETING) == [Log("QEMU greets again")]
    assert session.receive_qemu(GREETING) == []
    assert session.receive_client(1, STATUS, ()) == [SendQemu(STATUS)]


def test_qemu_that_refuses_the_session_ends_it() -> None:
    session = Session(TOKEN, False, RULES)
    session.receive_qemu(GREETING)
    assert session.receive_qemu(ERROR) == [Log("QEMU refuses its own capabilities")]


def test_a_message_that_is_too_large_is_answered_in_turn() -> None:
    session = start(1)
    session.receive_client(1, STATUS, ())
    assert session.receive_client(1, b'{"a":"' + b"x" * (9 << 20), ()) == []
    assert session.receive_client(1, b'"}' + STATUS, ()) == []
    assert session.receive_qemu(RUNNING) == [
        SendClient(1, RUNNING), SendClient(1, error("JSON token size limit exceeded")), SendQemu(STATUS),
    ]  # fmt: skip


TAKE = own(2, "getfd", '"fdname": "qemu-userns.display"')
UPDATE = '"type": "vnc", "addresses": [{"str": "qemu-userns.display", "type": "fd"}]'
ADD_CLIENT = '"protocol": "spice", "fdname": "qemu-userns.display"'


@pytest.mark.parametrize(
    ("protocol", "command"), [("vnc", own(3, "display-update", UPDATE)), ("spice", own(3, "add_client", ADD_CLIENT))]
)
def test_a_display_gets_its_socket_in_its_turn(protocol: str, command: bytes) -> None:
    session = start(1)
    assert session.receive_client(1, STATUS, ()) == [SendQemu(STATUS)]
    assert session.give_display(protocol, 5) == []
    assert session.receive_qemu(RUNNING) == [SendClient(1, RUNNING), SendQemu(TAKE, (5,))]
    assert session.receive_qemu(DONE) == [SendQemu(command)]
    assert session.receive_client(1, STATUS, ()) == []
    assert session.receive_qemu(DONE) == [SendQemu(STATUS)]


def test_a_display_that_takes_no_socket_is_logged_once_and_leaves_no_name() -> None:
    session = start()
    logged: list[Action] = [Log("spice: QEMU does not take a socket: no")]
    for number in (2, 5):
        session.give_display("spice", 5)
        session.receive_qemu(DONE)
        closed = SendQemu(own(number + 2, "closefd", '"fdname": "qemu-userns.display"'))
        assert session.receive_qemu(ERROR) == [*logged, closed]
        assert session.receive_qemu(DONE) == []
        logged = []


def test_clients_of_a_display_do_not_pile_up_while_qemu_is_busy() -> None:
    session = start(1)
    session.receive_client(1, STATUS, ())
    assert [session.give_display("spice", fd) for fd in range(100, 164)] == [[]] * 64
    turned_away: list[Action] = [CloseFds((164,)), Log("spice: a client is turned away: 64 wait for QEMU")]
    assert session.give_display("spice", 164) == turned_away
    assert session.give_display("spice", 165) == [CloseFds((165,))]
    assert session.receive_qemu(RUNNING) == [SendClient(1, RUNNING), SendQemu(TAKE, (100,))]
    assert session.give_display("spice", 166) == []


def test_a_socket_of_a_display_is_closed_when_qemu_has_gone() -> None:
    session = Session(TOKEN, False, RULES)
    assert session.give_display("vnc", 5) == []
    assert session.close_qemu() == [CloseFds((5,))]
    assert session.give_display("spice", 6) == [CloseFds((6,))]
