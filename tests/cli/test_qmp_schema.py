"""Help and completion from a schema."""

from __future__ import annotations

import pytest

from qemu_userns.cli.qmp_schema import Schema, complete, describe_command

ENTRIES: list[object] = [
    {"name": "add", "meta-type": "command", "arg-type": "1"},
    {"name": "also", "meta-type": "command", "arg-type": "0"},
    {"name": "ADDED", "meta-type": "event", "arg-type": "1"},
    {"name": "0", "meta-type": "object", "members": []},
    {
        "name": "1",
        "meta-type": "object",
        "members": [
            {"name": "driver", "type": "2"},
            {"name": "read-only", "type": "bool", "default": None},
            {"name": "list", "type": "[str]", "default": None},
        ],
        "tag": "driver",
        "variants": [{"case": "raw", "type": "3"}, {"case": "nil", "type": "0"}],
    },
    {"name": "2", "meta-type": "enum", "values": ["raw", "nil"]},
    {"name": "3", "meta-type": "object", "members": [{"name": "file", "type": "4"}, {"name": "opts", "type": "5"}]},
    {"name": "4", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "1"}, {"type": "2"}]},
    {"name": "5", "meta-type": "object", "members": [{"name": "mode", "type": "6"}]},
    {"name": "6", "meta-type": "enum", "members": [{"name": "on"}, {"name": "off"}], "values": ["old"]},
    {"name": "[str]", "meta-type": "array", "element-type": "str"},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
]


@pytest.mark.parametrize(
    ("words", "text", "choices"),
    [
        ([], "a", ["add ", "also "]),
        ([], "h", ["help "]),
        ([], "x", []),
        (["nosuch"], "", []),
        (["also"], "", []),
        (["add"], "", ["driver=", "list=", "read-only="]),
        (["add"], "driver=", ["driver=raw ", "driver=nil "]),
        (["add"], "driver=r", ["driver=raw "]),
        (["add", "driver=nil"], "", ["list=", "read-only="]),
        (["add"], "read-only=t", ["read-only=true "]),
        (["add"], "list=", []),
        (["add", "driver=raw"], "f", ["file=", "file."]),
        (["add", "driver=raw"], "o", ["opts."]),
        (["add", "driver=raw"], "opts.", ["opts.mode="]),
        (["add", "driver=raw"], "opts.mode=o", ["opts.mode=on ", "opts.mode=off "]),
        (["add", "driver=raw"], "file=n", ["file=nil "]),
        (["add", "driver=raw", "file.driver=raw"], "file.o", ["file.opts."]),
        (["add", "driver=raw", "file.driver=nil"], "file.o", []),
        (["add", "driver=raw"], "nosuch.a", []),
        (["add", "driver=raw"], "read-only.a=", []),
    ],
)
def test_completion(words: list[str], text: str, choices: list[str]) -> None:
    assert complete(Schema(ENTRIES), words, text, ("help",)) == choices


def test_help() -> None:
    schema = Schema(ENTRIES)
    lines = [" ".join(line.split()) for line in describe_command(schema, "add", {"driver": "raw"})]
    assert lines == [
        "driver required raw | nil",
        "read-only optional bool",
        "list optional list of str",
        "file required str or object or raw | nil",
        "opts required object",
        "opts.mode on | off",
    ]
    assert describe_command(schema, "also", {}) == ["  takes no arguments"]


@pytest.mark.parametrize(
    "entries",
    [
        None,
        {},
        [None, 1, {}, {"name": 1}],
        [{"name": "add", "meta-type": "command"}],
        [{"name": "add", "meta-type": "command", "arg-type": "nosuch"}],
        [
            {"name": "add", "meta-type": "command", "arg-type": "1"},
            {
                "name": "1",
                "meta-type": "object",
                "members": [{"name": "a", "type": "[1]"}, {}, 7, {"name": "b", "type": "nosuch"}],
            },
            {"name": "[1]", "meta-type": "array", "element-type": "[1]"},
        ],
        [
            {"name": "add", "meta-type": "command", "arg-type": "1"},
            {"name": "1", "meta-type": "object", "tag": "a", "members": [{"name": "a", "type": "2"}]}
            | {"variants": [{"case": "x", "type": "1"}, 3]},
            {"name": "2", "meta-type": "alternate", "members": [{"type": "2"}, {"type": "1"}, {"type": "nosuch"}]},
        ],
    ],
)
def test_a_schema_that_is_not_as_it_should_be(entries: object) -> None:
    schema = Schema(entries)
    for words, text in (([], ""), (["add"], ""), (["add"], "a="), (["add", "a=x"], "a."), (["add", "a=x", "a.a=x"], "a.a.a=")):
        complete(schema, words, text)
    describe_command(schema, "add", {"a": "x", "a.a": "x"})
