"""Commands, replies and the dialect of JSON; what QEMU itself says is in test_qmp_real.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.qmp.dialect import DialectError, format_value, order_keys, parse_value
from qemu_userns.qmp.message import (
    build_command,
    build_error,
    build_return,
    find_fault,
    mentions_oob,
    parse_command,
    read_object,
    read_reply,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_-é", max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"execute": "a"}', ("a", False, None, {})),
        (b"{'execute': 'a', 'id': 5}", ("a", False, "5", {})),
        (b'{"exec-oob": "a", "id": null}', ("a", True, "null", {})),
        (b'{"execute": "a", "id": "x\\u00e9"}', ("a", False, '"x\\u00E9"', {})),
        (b'{"execute": "a", "arguments": {"b": [1, \'c\']}}', ("a", False, None, {"b": [1, "c"]})),
        (b'{"execute": "a", "id": {"b": 1.0, "a": true}}', ("a", False, '{"a": true, "b": 1}', {})),
    ],
)
def test_commands(text: bytes, expected: tuple[object, ...]) -> None:
    command = parse_command(text)
    assert command
    assert (command.name, command.oob, command.id, command.arguments) == expected
    assert command.encode() == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute": 5}', "QMP input member 'execute' must be a string"),
        (b'{"execute": "a", "x": 1}', "QMP input member 'x' is unexpected"),
        (b'{"execute": "a", "arguments": []}', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "a", "exec-oob": "a"}', "QMP input member 'exec-oob' clashes with 'execute'"),
        (b'{"execute": "a", "execute": "a"}', "JSON parse error, duplicate key"),
        (b'{"execute": "a", "id": NaN}', "JSON parse error, stray character"),
        (b'{"execute": "a", "id": -Infinity}', "JSON parse error, stray character"),
        (b'{"execute": "a\xff"}', "JSON parse error, invalid character in string"),
        (b'{"execute": "a", "id": 0e1}', "JSON parse error, stray character"),
    ],
)
def test_what_is_no_command(text: bytes, fault: str) -> None:
    assert parse_command(text) is None
    assert find_fault(text, allow_oob=True)[0] == fault


def test_what_is_asked_again_is_read_once_but_for_arguments() -> None:
    query = b'{"execute": "query-status", "id": 7}'
    assert parse_command(query) is parse_command(bytes(bytearray(query)))
    secrets = (b'{"execute": "a", "arguments": {"data": "b"}}', b'{"execute": "a", "argument\\u0073": {"data": "b"}}')
    for text in secrets:
        command = parse_command(text)
        assert command is not None
        assert command.arguments == {"data": "b"}
        assert parse_command(text) is not command


def test_exec_oob_is_found_in_what_is_no_command() -> None:
    assert mentions_oob(b'{"exec\\u002doob": 5}')
    assert mentions_oob(b'{"exec-oob": "a", "foo": 1}')
    assert not mentions_oob(b'["exec-oob"]')
    assert not mentions_oob(b'{"exec-oob": ')
    assert find_fault(b'{"exec-oob": 5, "id": 6}', allow_oob=False) == ("QMP input member 'exec-oob' is unexpected", "6")


@given(JSON)
@settings(deadline=None)
def test_what_is_printed_is_read_back(value: object) -> None:
    assert parse_value(format_value(value)) == value
    assert parse_value(format_value(value, True)) == value
    assert json.loads(format_value(value)) == value


@given(JSON)
@settings(deadline=None)
def test_ids_are_indented_as_printed(value: object) -> None:
    command = parse_command(b'{"execute":"a","id":' + json.dumps(value).encode() + b"}")
    assert command
    assert build_return([], command.id, True).decode() == format_value({"return": [], "id": value}, True) + "\r\n"
    error = {"class": "C", "desc": "d"}
    assert build_error("C", "d", command.id, True).decode() == format_value({"error": error, "id": value}, True) + "\r\n"
    assert build_error("C", "d", command.id, False).decode() == format_value({"error": error, "id": value}) + "\r\n"
    again = parse_command(build_command("a", {}, command.id))
    assert again
    assert json.loads(again.id or "") == value  # two keys of one bucket may have changed places


@given(st.one_of(st.text(), st.text("{}[]:,'\"\\ue0dD8 1.-tf\n")))
@settings(max_examples=1000, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value = parse_value(text)
    except DialectError:
        return
    assert parse_value(format_value(value)) == value or "inf" in format_value(value)


def test_depth_is_no_matter() -> None:
    text = "[" * 1024 + "]" * 1024
    assert format_value(parse_value(text)) == text
    assert parse_command(b'{"execute":"a","id":' + text.encode() + b"}")


def test_members_stand_in_qemus_order() -> None:
    assert order_keys(["data", "error", "id", "return", "event", "timestamp"]) == [
        "timestamp",
        "event",
        "return",
        "id",
        "error",
        "data",
    ]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"return": {}}\r\n', "return"),
        (b'{"return": {}, "id": 1}\r\n', "return"),
        (b'{\r\n    "return": {\r\n    }\r\n}\r\n', "return"),
        (b'{"error": {}}\r\n', "error"),
        (b'{"id": 1, "error": {}}\r\n', "error"),
        (b'{"timestamp": {}, "event": "STOP"}\r\n', "event"),
        (b'{"QMP": {}}\r\n', "QMP"),
        (b"{}\r\n", ""),
        (b"garbage\r\n", ""),
        (b"\r\n", ""),
    ],
)
def test_replies_are_told_by_their_first_member(line: bytes, kind: str) -> None:
    assert read_reply(line).kind == kind


def test_what_cannot_be_read_of_qemus_is_empty() -> None:
    for line in (b"x", b"[1]", b"[" * 5000, b"\xff", b'{"a": ', b""):
        assert read_object(line) == {}
    assert read_object(b'{"a": inf}') == {}


def test_what_qemu_has_printed_keeps_its_order() -> None:
    value = {"____-": 1, "_____": 2}
    assert order_keys(list(value)) == ["_____", "____-"]
    assert build_return(value, None, False) == b'{"return": {"____-": 1, "_____": 2}}\r\n'
