"""The streams: any split gives the same items, and they are those of a lexer that goes byte by byte."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.qmp import lexer
from qemu_userns.qmp.stream import MAX_NESTING, MESSAGE_MAX_BYTES, TOO_LARGE, TOO_MANY, CommandStream, Item, ReplyStream

PIECES = [b'{"execute": "query-status"}', b'"key":', b"[1,2]", b"true", b"12", b"\xc3\xa9", b"\xff", b"\xfe", b"\x01"]
PIECES += [bytes([byte]) for byte in b"\"'\\{}[],: \n\t-0.exT"]
BYTES = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))


def cut(*pieces: bytes) -> list[Item]:
    stream = CommandStream()
    return [item for piece in pieces for item in stream.feed(piece)]


def cut_slowly(data: bytes) -> list[tuple[str, bytes]]:
    """Do by characters what QEMU's lexer and streamer do."""
    items: list[tuple[str, bytes]] = []
    state, braces, brackets, text = "start", 0, 0, b""
    index = 0
    while index < len(data):
        byte = data[index : index + 1]
        if state == "recovery":
            if byte >= b"\xfe" or (byte < b" " and byte != b"\t") or byte in b"{}[],:":
                state = "start"
            else:
                index += 1
            continue
        if state == "start" and byte in b" \t\r\n":
            text += byte if braces or brackets else b""
            index += 1
            continue
        event, state, consumed = step(state, byte)
        if consumed:
            text += byte
            index += 1
        if event == "error":
            items.append(("garbage", text))
            state, braces, brackets, text = "recovery", 0, 0, b""
        elif event == "token":
            braces += (byte == b"{") - (byte == b"}") if state == "start" and consumed and text[-1:] == byte else 0
            brackets += (byte == b"[") - (byte == b"]") if state == "start" and consumed and text[-1:] == byte else 0
            if braces + brackets > MAX_NESTING or braces < 0 or brackets < 0 or not (braces or brackets):
                items.append(("garbage" if braces + brackets > MAX_NESTING else "message", text))
                braces, brackets, text = 0, 0, b""
    return items


NUMBERS = {
    "minus": {"0": "zero", "1-9": "digits"},
    "zero": {"0-9": "error", ".": "point", "": "end"},
    "digits": {"0-9": "digits", ".": "point", "eE": "exponent", "": "end"},
    "point": {"0-9": "fraction"},
    "fraction": {"0-9": "fraction", "eE": "exponent", "": "end"},
    "exponent": {"+-": "sign", "0-9": "power"},
    "sign": {"0-9": "power"},
    "power": {"0-9": "power", "": "end"},
}
RANGES = {"0-9": b"0123456789", "1-9": b"123456789", "eE": b"eE", "+-": b"+-", ".": b".", "0": b"0"}


def step(state: str, byte: bytes) -> tuple[str, str, bool]:
    """Return what happens ("", "token" or "error"), the next state, and whether the byte is consumed."""
    ordinary = b" " <= byte < b"\xfe"
    if state == "start":
        starts = {b'"': "double", b"'": "single", b"-": "minus", b"0": "zero"}
        if byte in b"{}[],:":
            return "token", "start", True
        if byte in starts:
            return "", starts[byte], True
        if byte.isdigit():
            return "", "digits", True
        return ("", "word", True) if b"a" <= byte <= b"z" else ("error", "", True)
    if state in ("double", "single"):
        if byte == (b'"' if state == "double" else b"'"):
            return "token", "start", True
        return ("", state + "-escape" if byte == b"\\" else state, True) if ordinary else ("error", "", True)
    if state.endswith("-escape"):
        return ("", state.removesuffix("-escape"), True) if ordinary else ("error", "", True)
    if state == "word":
        return ("", "word", True) if b"a" <= byte <= b"z" else ("token", "start", False)
    rules = NUMBERS[state]
    for name, target in rules.items():
        if name and byte in RANGES[name]:
            return ("error", "", True) if target == "error" else ("", target, True)
    return ("token", "start", False) if "" in rules else ("error", "", True)


@given(BYTES)
@settings(max_examples=2000, deadline=None)
def test_items_are_those_of_the_slow_lexer(data: bytes) -> None:
    assert [(item.kind, item.text) for item in cut(data)] == cut_slowly(data)


@given(BYTES, st.lists(st.integers(0, 200)))
@settings(max_examples=1000, deadline=None)
def test_any_split_gives_the_same_items(data: bytes, cuts: list[int]) -> None:
    whole = cut(data)
    assert cut(*(data[i : i + 1] for i in range(len(data)))) == whole
    places = [0, *sorted(min(place, len(data)) for place in cuts), len(data)]
    assert cut(*(data[a:b] for a, b in itertools.pairwise(places))) == whole


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (b'{"execute": "x"}', [("message", b'{"execute": "x"}')]),
        (b' {"a":1}{"b":2}\n', [("message", b'{"a":1}'), ("message", b'{"b":2}')]),
        (b"{'a':'}'}", [("message", b"{'a':'}'}")]),
        (b'{"a":"}\\"}"}', [("message", b'{"a":"}\\"}"}')]),
        (b'{"a', []),
        (b"\n \t", []),
        (b"1 foo ,", [("message", b"1"), ("message", b"foo"), ("message", b",")]),
        (b'{"a": "b\n"}', [("garbage", b'{"a": "b\n'), ("message", b"}")]),
        (b'{"a": \xff{}', [("garbage", b'{"a": \xff'), ("message", b"{}")]),
        (b"T rest {}", [("garbage", b"T"), ("message", b"{}")]),
        (b"[" * 1025 + b"]", [("garbage", b"[" * 1025), ("message", b"]")]),
        (b"[" * 1024 + b"]" * 1024, [("message", b"[" * 1024 + b"]" * 1024)]),
        (b"{" * 512 + b"[" * 513, [("garbage", b"{" * 512 + b"[" * 513)]),
    ],
)
def test_messages_and_garbage(data: bytes, items: list[tuple[str, bytes]]) -> None:
    assert [(item.kind, item.text) for item in cut(data)] == items


@pytest.mark.parametrize("size", [100_000, 1 << 20, 20 << 20])
def test_a_message_that_is_too_large_is_one_error_and_not_kept(size: int) -> None:
    stream = CommandStream()
    data = b'{"execute":"x","arguments":{"a":"' + b"x" * MESSAGE_MAX_BYTES * 2 + b'"}}{}'
    items: list[Item] = []
    for begin in range(0, len(data), size):
        items += stream.feed(data[begin : begin + size])
        assert len(stream._buffer) <= MESSAGE_MAX_BYTES
    assert items == [Item("excess", TOO_LARGE.encode()), Item("message", b"{}")]


def test_a_message_of_too_many_tokens_is_one_error() -> None:
    assert cut(b"[" + b"1," * (2 << 20) + b"1]", b"{}") == [Item("excess", TOO_MANY.encode()), Item("message", b"{}")]


@pytest.mark.parametrize("filler", [b"x", b"\\n", b"9", b"1,", b'"a":', b" ", b"a", b"[],"])
def test_large_messages_in_small_pieces_cost_linear_time(filler: bytes) -> None:
    """Ten times the bytes must not cost a hundred times as much."""
    quoted = filler in (b"x", b"\\n")

    def measure(count: int) -> float:
        data = (b'{"a":"' if quoted else b"[") + filler * (count // len(filler)) + (b'"}' if quoted else b"1]")
        before = time.process_time()
        stream = CommandStream()
        items = [item for begin in range(0, len(data), 64) for item in stream.feed(data[begin : begin + 64])]
        assert [item.text for item in items] == [data]
        return time.process_time() - before

    small = min(measure(100_000) for _ in range(3))
    assert measure(1_000_000) < 40 * small + 0.2


def test_the_short_cut_agrees_with_the_table() -> None:
    for data in [
        b'{"a":[1,{"b":[]}]}',
        b'{"a":{"b":{"c":1}}}',
        b"{]",
        b"{[}]",
        b'{"a":"\x01"}',
        b"{01}",
        b'{"a":tru}',
        b"{}{}",
        b"{}]",
    ]:
        assert [(item.kind, item.text) for item in cut(data)] == cut_slowly(data)
    assert lexer.compile_message().fullmatch(b' {"execute": "a", "arguments": {"b": [1]}, "id": 5}\r\n')


@pytest.mark.parametrize(
    ("pretty", "messages"), [(False, [b'{"a": 1}\r\n', b'{"b": "}"}\r\n']), (True, [b'{\r\n    "a": 1\r\n}\r\n'] * 2)]
)
def test_replies_end_with_their_line_or_brace(pretty: bool, messages: list[bytes]) -> None:
    data = b"".join(messages)
    for size in range(1, len(data) + 1):
        stream = ReplyStream(pretty)
        assert [m for i in range(0, len(data), size) for m in stream.feed(data[i : i + size])] == messages


def test_a_reply_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_userns.qmp.stream.REPLY_MAX_BYTES", 1000)
    stream = ReplyStream(False)
    for _ in range(20):
        assert stream.feed(b"x" * 100) == []
    assert stream.overflowed
    assert stream.feed(b"\n{}\n") == []
