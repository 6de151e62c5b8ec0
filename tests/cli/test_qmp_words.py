"""QMP commands as people type them, and the words before them."""

from __future__ import annotations

import json

import pytest

from qemu_userns.cli.qmp import Asked, parse_words
from qemu_userns.cli.qmp_words import build_command, parse_arguments, split_line
from qemu_userns.errors import UsageError

# --- our options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["vm"], Asked("vm", "", False, False, None, ())),
        (["vm", "stop"], Asked("vm", "", False, False, None, ("stop",))),
        (["--compact", "vm", "stop", "--x=1"], Asked("vm", "", True, False, None, ("stop", "--x=1"))),
        (["vm", "--events"], Asked("vm", "", False, True, None, ())),
        (["vm", "--pass-fd", "0", "getfd", "fdname=a"], Asked("vm", "", False, False, 0, ("getfd", "fdname=a"))),
        (["--pass-fd=0", "vm", "getfd"], Asked("vm", "", False, False, 0, ("getfd",))),
        (["--socket", "p", "stop", "a=1"], Asked("", "p", False, False, None, ("stop", "a=1"))),
        (["--socket=p", "--compact"], Asked("", "p", True, False, None, ())),
        (["--", "--events", "stop"], Asked("--events", "", False, False, None, ("stop",))),
        (["vm", "--", "--odd"], Asked("vm", "", False, False, None, ("--odd",))),
    ],
)
def test_options_stand_before_the_command(words: list[str], asked: Asked) -> None:
    assert parse_words(words) == asked


@pytest.mark.parametrize(
    "words",
    [
        ["--socket"],
        ["--socket="],
        ["--compact=1", "vm"],
        ["--compact", "--compact", "vm"],
        ["--bogus", "vm"],
        ["-x", "vm"],
        ["vm", "--events", "stop"],
        ["vm", "--socket", "p"],
        ["vm", "--pass-fd", "0"],
        ["vm", "--pass-fd", "x", "getfd"],
        ["vm", "--pass-fd", "-1x", "getfd"],
        ["vm", "--pass-fd", "9" * 30, "getfd"],
    ],
)
def test_options_that_are_not_understood(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_words(words)


# --- KEY=VALUE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["a=1", "b=-2.5", "c=true", "d=null"], {"a": 1, "b": -2.5, "c": True, "d": None}),
        (
            ["a=text", "b=", "c=a=b", "d=/x/y", "e=0x10", "f=01"],
            {"a": "text", "b": "", "c": "a=b", "d": "/x/y", "e": "0x10", "f": "01"},
        ),
        (['a="1"', "b='two words'"], {"a": "1", "b": "two words"}),
        (['a={"b": [1, {}]}', "c=[]", "d={'e': 'f'}"], {"a": {"b": [1, {}]}, "c": [], "d": {"e": "f"}}),
        (["a.b=1", "a.c.d=x"], {"a": {"b": 1, "c": {"d": "x"}}}),
        (["a={}", "a.b=1"], {"a": {"b": 1}}),
        (["a=NaN", "b=Infinity", "c=1e999", "d=[1e999]"], {"a": "NaN", "b": "Infinity", "c": "1e999", "d": "[1e999]"}),
        (["a={", "b=[1", "c=True"], {"a": "{", "b": "[1", "c": "True"}),
        (["a:=1", 'b:="1"'], {"a": 1, "b": "1"}),
    ],
)
def test_values_are_json_or_text(words: list[str], arguments: dict[str, object]) -> None:
    assert parse_arguments(words) == arguments


@pytest.mark.parametrize(
    "words", [["a"], ["=1"], [":=1"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["a.b=1", "a=2"], ["a:=x"], ["a:={"]]
)
def test_arguments_that_are_not_understood(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(words)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_carries_its_id_and_only_arguments_that_there_are() -> None:
    command = build_command(["stop"], "i")
    assert json.loads(command.text) == {"execute": "stop", "id": "i"}
    assert json.loads(build_command(["x", "a=1"], "i").text)["arguments"] == {"a": 1}
    assert command.text.endswith(b"\n")


def test_hmp_is_one_line() -> None:
    command = build_command(["hmp", "info", "block", "-v"], 1)
    assert json.loads(command.text)["arguments"] == {"command-line": "info block -v"}
    assert command.plain


@pytest.mark.parametrize("words", [["hmp"], ["{}", "a=1"], ["{"], ["{}}"], ["{}{}"], ["{'a}"], ["x", "a=\udcff"]])
def test_commands_that_are_not_understood(words: list[str]) -> None:
    with pytest.raises(UsageError):
        build_command(words, 1)


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["quit"], True),
        (["hmp", "quit"], True),
        (["hmp", " q "], True),
        (["human-monitor-command", "command-line=q"], True),
        (["{'execute': 'quit'}"], True),
        (['{"exec-oob": "quit"}'], True),
        (['{"execute": "human-monitor-command", "arguments": {"command-line": "quit"}}'], True),
        (["stop"], False),
        (["hmp", "info", "quit"], False),
        (["{'execute': 'stop', 'arguments': 7}"], False),
        (["{'execute': bogus}"], False),
    ],
)
def test_what_ends_the_vm(words: list[str], ends: bool) -> None:
    assert build_command(words, 1).ends_vm is ends


@pytest.mark.parametrize(
    ("message", "ours"),
    [
        ({"return": {}, "id": "i"}, True),
        ({"error": {}, "id": "i"}, True),
        ({"error": {}}, True),
        ({"return": {}, "id": "j"}, False),
        ({"return": {}}, False),
        ({"event": "STOP", "id": "i"}, False),
        ({}, False),
    ],
)
def test_which_message_is_the_reply(message: dict[str, object], ours: bool) -> None:
    assert build_command(["stop"], "i").is_answered_by(message) is ours


# --- lines of the shell -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        ("  a  b=1\t", ["a", "b=1"]),
        ("a b=\"two words\" c='x y'", ["a", 'b="two words"', "c='x y'"]),
        ('a b={"c": [1, 2], "d": "}"} e=1', ["a", 'b={"c": [1, 2], "d": "}"}', "e=1"]),
        (r'a b="\" x" c', ["a", r'b="\" x"', "c"]),
        ("a b=it's c=x[1", ["a", "b=it's", "c=x[1"]),
        ("a b=[] c={}", ["a", "b=[]", "c={}"]),
    ],
)
def test_lines_are_split_outside_of_quotes_and_braces(line: str, words: list[str]) -> None:
    assert split_line(line) == words


@pytest.mark.parametrize("line", ['a b="x', "a b={", "a b=[{]", "a b='\\'"])
def test_what_is_not_closed(line: str) -> None:
    with pytest.raises(UsageError):
        split_line(line)
