"""What a client gets through a Session is, byte for byte, what QEMU itself answers to the same bytes."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from qemu_userns.qmp.actions import Prepare, Prepared, Release
from tests.qmp.dialogue import Brokered, Direct, run_qemu

pytestmark = pytest.mark.qemu

CAPS = b'{"execute":"qmp_capabilities"}'
OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
STATUS = b'{"execute":"query-status"}'
# Each is sent to a new client: its greeting and all that comes of it are compared.
DIALOGUES: list[list[bytes]] = [
    [STATUS, CAPS, STATUS, CAPS],
    [OOB, STATUS, b'{"exec-oob":"query-yank"}', b'{"exec-oob":"query-yank","id":{"b":[1,{}],"a":null}}'],
    [OOB, b'{"exec-oob":"query-status","id":1}', b'{"exec-oob":"nosuch","id":2}', b'{"exec-oob":5,"id":3}'],
    [OOB, b'{"exec-oob":"query-yank","arguments":{"a":1}}', b'{"exec-oob":"query-yank","execute":"query-status"}'],
    [b'{"exec-oob":"query-yank","id":5}', CAPS, b'{"exec-oob":"query-yank","id":[5]}', b'{"exec-oob":5,"id":"x"}'],
    [b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]},"id":1}', b'{"execute":"qmp_capabilities","id":1.5}'],
    [b'{"execute":"qmp_capabilities","arguments":{"enable":5}}', b'{"execute":"qmp_capabilities","arguments":{"enable":[5]}}'],
    [b'{"execute":"qmp_capabilities","arguments":{"x":5}}', b'{"execute":"qmp_capabilities","arguments":5}', STATUS],
    [b'{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":{"b":1,"a":{"c":2,"d":[],"e":{}}}}', STATUS],
    [b'{"execute":"nosuch","id":{"b":1,"a":{"c":2,"d":[],"e":{}},"":0}}', b'{"execute":"nosuch","arguments":{"a":1}}'],
    [CAPS, b'{"execute":"nosuch","id":{"b":1,"a":{"c":2,"d":[],"e":{}},"":0}}', b'{"execute":"stop","id":0}{"execute":"cont"}'],
    [CAPS + STATUS + b"{'execute':'query-name','id':'it''s'}" + STATUS],
    [b"{'execute':'qmp_capabilities'}{'execute': 'query-status', 'id': 'a\\'\"b'}"],
    [CAPS, b'{"execute":"getfd"}', b'{"execute":"getfd","arguments":{"fdname":"a"}}', b'{"execute":"add-fd"}'],
    [CAPS, b'{"execute":"closefd","arguments":{"fdname":"a"}}', b'{"execute":"closefd","arguments":{"fdname":5}}'],
    [CAPS, b'{"execute":"remove-fd","arguments":{"fdset-id":7}}', b'{"execute":"remove-fd","arguments":{"fdset-id":7,"fd":1}}'],
    [CAPS, b'{"execute":"add-fd","arguments":{"fdset-id":1.0}}', b'{"execute":"add-fd","arguments":{"fdset-id":-1}}'],
    [CAPS, b'{"execute":"query-fdsets","id":null}', b'{"execute":"query-fdsets","arguments":{"a":1}}'],
    [CAPS, b'{"execute":"human-monitor-command","arguments":{"command-line":"info version"}}'],
    [CAPS, b'{"execute":"transaction","arguments":{"actions":[]}}', b'{"execute":"blockdev-del","arguments":{"node-name":"x"}}'],
]
LEXICAL = [
    rb"12", rb"-0", rb"-01", rb"01", rb"0e5", rb"0.5e5", rb"1.", rb"1e", rb"1e+", rb"1x", rb"1.5.5", rb"foo", rb"true", rb"nullx",
    rb"T", rb"Ta:", rb"%d", rb"1%", b"\xff", b"\xfe", b"\x00", b"\x01", b"\x0b", b"\x7f", b"\x80", b"12\x80", b"12\xff", b"a\xc3",
    b'"x"', b"'y'", b'"x', b"'x", b'"\x01', b'"ab\\\x01', b'"\\q"', b'"\xff', b'a"b"', b'"a\tb"', b"[\xff1,2]", b'T"a"{}', b"T'[",
    b"{]", b"[}", b"[}]", b"{[}]", b"{{]", b"[[}", b",", b":", b"}", b"]", b"[]", b"{}", b"[1,]", b"{,}", b"[,]", b'["a" "b"]',
    b'{"a"}', b'{"a":}', b'{"a":1,}', b'{"a":1,"a":2}', b"{1:2}", b"{[]:1}", b"{{}:1}", b"[tru]", b"\xef\xbb\xbf" + STATUS,
    b'{"execute":"query-status","id":1,"id":2}', b'{"execute":"query-status","foo":1,"id":7}', b'{"foo":{"a":[]}}', b'{"id":1}',
    b'{"execute":5,"id":1}', b'{"execute":"a","arguments":[],"id":1}', b'{"execute":"query-status","arguments":null}',
    b'{"execute":"query-status","id":NaN}', b'{"execute":"query-status","id":Infinity}',
    b'{"execute":"query-status","id":-Infinity}',
    b"\x00" + STATUS, STATUS[:-1] + b"\xff" + STATUS, STATUS[:-3] + b"\n" + STATUS, b'{"execute":"query-sta\\u0074us"}',
    b'{"execute":"query-status\\u0000"}', b'{"\\u0065xecute":"query-status"}', b'{"exec-oob":5,"foo":1}',
    b"[" * 1024 + b"]" * 1024, b"[" * 1025 + b"]" * 1025, b"{" * 1025, b'{"a":' * 600 + b"[" * 500, b"[" * 3 + b"]" * 5,
    b'{"execute":"query-status","id":' + b"[" * 1023 + b"]" * 1023 + b"}", b'{"execute":"query-status","id":' + b"[" * 1024,
]  # fmt: skip
IDS = [
    b"[1e5,1e999,-0,-0.0,12345678901234567890123,18446744073709551615,18446744073709551616,-9223372036854775808,-1e999]",
    b"[-9223372036854775809,1.1,1e22,1e16,123456.0,0.1,1e-7,100000000000000000000.0,0.0,5e-324," + b"1" * 5000 + b"]",
    b'"\\u0000\x7f\xc3\xa9\\u00e9\\ud83d\\ude00\xf0\x9f\x98\x80/\\/\\b\\f\\n\\r\\t\\\\\\"\\u0001\\u001f\\u200b"',
    b'"\xc0\x80"', b'"\xc0\x81"', b'"\xc1\x80"', b'"\xe0\x80\x80"', b'"\xed\xa0\x80"', b'"\xef\xbf\xbe"', b'"\xef\xb7\x90"',
    b'"\xf0\x9f\xbf\xbf"', b'"\xf4\x90\x80\x80"', b'"\xc3"', b'"\\ufffe"', b'"\\ufdd0"', b'"\\ud800"', b'"\\ude00"',
    b'"\\ud800\\n"',
    b'"\\ud800\\u0041"', b'"\\ud83f\\udfff"', b'"\\u12"', b'"\\u12g4"', b'"\\x"', b'"\\U0041"', b"'a\\'b\"c'", b'"\\\'"', b"true",
    b"null", b"{}", b"[]", b"[[],{},[{}]]",
    b'{"z":1,"y":2,"x":3,"execute":1,"\xc3\xa9":2,"\\u0000":3,"":4,"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":5}',
]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["lines", "pretty"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Brokered]]:
    """Two QEMUs that are the same: one for clients of its own, one behind a session."""
    folder = tmp_path_factory.mktemp("qmp")
    with run_qemu(folder, pretty=request.param) as plain, run_qemu(folder, pretty=request.param) as behind:
        brokered = Brokered(behind, pretty=request.param)
        yield plain, brokered
        brokered.close()


def compare(pair: tuple[Path, Brokered], steps: list[bytes], seed: int = 0) -> bytes:
    """Send the steps to both, each after what the one before has caused, and compare what comes."""
    path, brokered = pair
    direct = Direct(path)
    brokered.open()
    rng = random.Random(seed)
    told = b""
    try:
        for number, step in enumerate(steps):
            mark = b"end-%d" % number
            data = step + b'\n\xff{"execute":"qmp_capabilities","arguments":{"x":1},"id":"%s"}' % mark
            direct.send(data)
            for piece in split(data, rng):
                brokered.send(piece)
            expected, found = direct.read_to(mark), brokered.read_to(mark)
            assert mask(found) == mask(expected), step
            told += expected
    finally:
        brokered.close_client()
        direct.close()
    return told


def split(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut the bytes: not at all, into single bytes, or at random."""
    pieces = rng.choice([1, 2, 5, len(data)])
    cuts = sorted(rng.sample(range(1, len(data)), min(pieces, len(data)) - 1)) if len(data) < 3000 else []
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def mask(data: bytes) -> bytes:
    """Leave out the numbers of time stamps."""
    return re.sub(rb'("(?:micro)?seconds": )\d+', rb"\1N", data)


@pytest.mark.parametrize("steps", DIALOGUES, ids=str)
def test_dialogues_are_qemus(pair: tuple[Path, Brokered], steps: list[bytes]) -> None:
    assert b'"QMP"' in compare(pair, steps)


@pytest.mark.parametrize("text", LEXICAL, ids=lambda text: str(text[:50]))
def test_errors_are_qemus(pair: tuple[Path, Brokered], text: bytes) -> None:
    compare(pair, [text, CAPS, text, text + b"\n" + text])


@pytest.mark.parametrize("text", IDS, ids=lambda text: str(text[:50]))
def test_ids_come_back_as_from_qemu(pair: tuple[Path, Brokered], text: bytes) -> None:
    message = b'{"execute":"query-status","id":' + text + b"}"
    compare(pair, [message, b'{"exec-oob":"query-yank","id":' + text + b"}", OOB, message])
    compare(pair, [OOB, b'{"exec-oob":"query-yank","id":' + text + b"}"])


def test_random_messages_are_answered_as_by_qemu(pair: tuple[Path, Brokered]) -> None:
    rng = random.Random(7)
    atoms = [
        *LEXICAL[:70],
        STATUS,
        CAPS,
        *IDS,
        b" ",
        b"\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b",",
        b":",
        b"\\",
        b'{"execute":',
        b"\xff",
    ]
    atoms = [atom for atom in atoms if len(atom) < 200]
    for number in range(150):
        steps = [b"".join(rng.choices(atoms, k=rng.randrange(1, 6))) for _ in range(4)]
        compare(pair, [*steps[:2], CAPS, *steps[2:]], seed=number)


def test_random_ids_are_ordered_as_by_qemu(pair: tuple[Path, Brokered]) -> None:
    rng = random.Random(8)
    for number in range(20):
        keys = {"".join(rng.choices("abcxyz-_é0", k=rng.randrange(12))) for _ in range(60)}
        text = "{" + ",".join(f'"{key}":{rng.randrange(9)}' for key in keys) + "}"
        compare(pair, [b'{"execute":"nosuch","id":' + text.encode() + b"}"], seed=number)


def list_qemu_fds(brokered: Brokered) -> bytes:
    brokered.send(b'{"execute":"query-fdsets","id":"list"}')
    return brokered.read_to(b'"id": "list"')


def test_fds_go_where_qemu_would_put_them(pair: tuple[Path, Brokered]) -> None:
    """A blank first, more than one, an unrelated command between, wrong arguments first."""
    path, brokered = pair
    direct = Direct(path)
    brokered.open()
    mark = '{"execute":"qmp_capabilities","arguments":{"x":1},"id":"end"}'
    getfd = '{"execute":"getfd","arguments":{"fdname":"a"}}'
    script: list[tuple[str, int]] = [
        (f"{CAPS.decode()}", 0),
        (getfd, 1), (getfd, 0), (" ", 1), (getfd, 0), (getfd, 0),
        ('{"execute":"query-status"}', 1), ('{"execute":"getfd"}', 0), (getfd, 0),
        (getfd[:20], 1), (getfd[20:], 0), (getfd[:20], 0), (getfd[20:], 1),
        (" ", 1), (" ", 3), (getfd, 0), (getfd, 0), (getfd + getfd, 1),
        ('{"execute":"getfd","arguments":{"fdname":"0a"}}', 1), (getfd, 0),
        ('{"execute":"add-fd","arguments":{"fdset-id":-3}}', 1), (getfd, 0),
        ('{"execute":"add-fd","arguments":{"opaque":"x"}}', 1), ('{"execute":"add-fd","arguments":{"fdset-id":9}}', 1),
        ('{"execute":"query-fdsets"}', 0), ('{"execute":"remove-fd","arguments":{"fdset-id":0}}', 0),
        ('{"execute":"remove-fd","arguments":{"fdset-id":9}}', 0), ('{"execute":"closefd","arguments":{"fdname":"a"}}', 0),
        ('{"execute":"closefd","arguments":{"fdname":"a"}}', 0), ('{"execute":"netdev_add","arguments":{"fd":"a"}}', 1),
        (getfd, 0), ('{"execute":"query-fdsets"}', 0),
    ]  # fmt: skip
    try:
        for text, count in script:
            null = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
            direct.send(text.encode(), null)
            brokered.send(text.encode(), null)  # which closes them
            if text.endswith("}"):
                direct.send(mark.encode())
                brokered.send(mark.encode())
                assert mask_fd(brokered.read_to(b'"end"')) == mask_fd(direct.read_to(b'"end"')), text
    finally:
        brokered.close_client()
        direct.close()


def mask_fd(data: bytes) -> bytes:
    return re.sub(rb'"fd": \d+', b'"fd": N', data)


def test_a_session_reads_what_clients_write_as_qemu_does_at_any_split(pair: tuple[Path, Brokered]) -> None:
    for number in range(30):
        compare(pair, [CAPS + STATUS + b"x" + STATUS + b"\xff" + STATUS], seed=number)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Brokered, int]]:
    """A QEMU behind a session, and its pid."""
    with run_qemu(tmp_path) as path:
        brokered = Brokered(path)
        yield brokered, int(path.with_suffix(".pid").read_text())
        brokered.close()


def count_fds(brokered: Brokered, pid: int) -> int:
    brokered.settle()
    return len(os.listdir(f"/proc/{pid}/fd"))


def ask(brokered: Brokered, command: bytes, client: int | None = None) -> bytes:
    """Send a command, preparing it if need be, and return the reply."""
    brokered.actions.clear()
    brokered.send(command, client=client)
    for action in [action for action in brokered.actions if isinstance(action, Prepare)]:
        fds = [os.open("/dev/null", flags) for flags in (os.O_RDONLY, os.O_RDWR)]
        fdsets = tuple((OWN_FDSET_BASE, fd, "disk") for fd in fds)
        name = os.open("/dev/null", os.O_RDWR)
        brokered.do(brokered.session.answer(action.ticket, Prepared(command, fdsets, (("ours", name),), 1)))
    return brokered.read(client or brokered.client)


def test_what_is_handed_over_is_gone_with_its_object_or_the_error(alone: tuple[Brokered, int]) -> None:
    brokered, pid = alone
    brokered.open()
    brokered.read(1)
    assert ask(brokered, CAPS) == b'{"return": {}}\r\n'
    before = count_fds(brokered, pid)
    wrong = b'{"execute":"blockdev-add","arguments":{"node-name":"n","driver":"nosuch"}}'
    assert b"nosuch" in ask(brokered, wrong)
    assert count_fds(brokered, pid) == before
    disk = b'{"execute":"blockdev-add","arguments":{"node-name":"n","driver":"host_device","filename":"/dev/fdset/%d"}}'
    assert b"GenericError" in ask(brokered, disk % (OWN_FDSET_BASE + 1))
    assert count_fds(brokered, pid) == before
    assert ask(brokered, disk % OWN_FDSET_BASE) == b'{"return": {}}\r\n'
    assert count_fds(brokered, pid) > before
    assert ask(brokered, b'{"execute":"query-fdsets"}') == b'{"return": []}\r\n'
    assert ask(brokered, b'{"execute":"closefd","arguments":{"fdname":"ours"}}') == b'{"return": {}}\r\n'
    assert ask(brokered, b'{"execute":"blockdev-del","arguments":{"node-name":"n"}}') == b'{"return": {}}\r\n'
    assert count_fds(brokered, pid) == before
    assert [action.handed for action in brokered.actions if isinstance(action, Release)] == [1]


def test_two_clients_have_an_fd_of_the_same_name_and_nobody_elses(alone: tuple[Brokered, int]) -> None:
    brokered, pid = alone
    before = count_fds(brokered, pid)
    clients = [brokered.open(), brokered.open(), brokered.open()]
    getfd = b'{"execute":"getfd","arguments":{"fdname":"a"}}'
    close = b'{"execute":"closefd","arguments":{"fdname":"a"}}'
    for client in clients:
        brokered.read(client)
        assert ask(brokered, CAPS, client) == b'{"return": {}}\r\n'
    for client in clients[:2]:
        brokered.send(getfd, [os.open("/dev/null", os.O_RDWR)], client)
        assert brokered.read(client) == b'{"return": {}}\r\n'
    assert count_fds(brokered, pid) == before + 2
    assert b"File descriptor named 'a' not found" in ask(brokered, close, clients[2])
    for left, client in enumerate(clients[1::-1]):
        assert ask(brokered, close, client) == b'{"return": {}}\r\n'
        assert count_fds(brokered, pid) == before + 1 - left
        assert b"File descriptor named 'a' not found" in ask(brokered, close, client)


def test_an_fd_whose_command_qemu_refuses_does_not_stay(alone: tuple[Brokered, int]) -> None:
    brokered, pid = alone
    before = count_fds(brokered, pid)
    brokered.open()
    brokered.read(1)
    ask(brokered, CAPS)
    for command in (b'{"execute":"getfd","arguments":{"fdname":"0"}}', b'{"execute":"add-fd","arguments":{"fdset-id":-5}}'):
        brokered.send(command, [os.open("/dev/null", os.O_RDWR)])
        assert b"GenericError" in brokered.read(1)
        assert count_fds(brokered, pid) == before
