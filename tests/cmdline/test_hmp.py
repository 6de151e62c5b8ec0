"""The lines of the human monitor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.cmdline.hmp import COMMANDS, HmpLine, Word, parse_hmp

FILE = "filename"


def words(line: str) -> dict[str, str] | None:
    parsed = parse_hmp(line)
    return None if parsed is None else {word.key: word.value for word in parsed.words}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("screendump /x", {FILE: "/x"}),
        ("  screendump\t/x  ", {FILE: "/x"}),
        ('screendump "/x y"', {FILE: "/x y"}),
        (r'screendump "a\"b\\c\n\'"', {FILE: "a\"b\\c\n'"}),
        ("screendump /x -f png vga0 1", {FILE: "/x", "device": "vga0"}),
        ("dumpdtb x", {FILE: "x"}),
        ("dump-guest-memory -p -d /x 0 10", {"paging": "on", "detach": "on", FILE: "/x"}),
        ("dump-guest-memory -z /x", {"zlib": "on", FILE: "/x"}),
        ('memsave 0 10 "/x"', {FILE: "/x"}),
        ('memsave (1+2)*0x10 ~1 "/x"', {FILE: "/x"}),
        ('pmemsave $eip 10 + 2 "/x"', {FILE: "/x"}),
        ("pmemsave 'a' 10 x", {FILE: "x"}),
        (
            "change ide1-cd0 /x raw read-only",
            {"device": "ide1-cd0", "file": "/x", "format": "raw", "read-only-mode": "read-only"},
        ),
        ("screendump/x", {FILE: "/x"}),
        ("change -f ide1-cd0 /x", {"device": "-f", "file": "ide1-cd0", "format": "/x"}),
        ("change ide1-cd0 -f /x", {"device": "ide1-cd0", "force": "on", "file": "/x"}),
        ("drive_mirror -n disk0 /x", {"mode": "existing", "device": "disk0", "target": "/x"}),
        ("snapshot_blkdev disk0", {"device": "disk0"}),
        ("snapshot_blkdev -n disk0 /x qcow2", {"mode": "existing", "device": "disk0", "snapshot-file": "/x", "format": "qcow2"}),
        ("migrate -d tcp:x:1", {"detach": "on", "uri": "tcp:x:1"}),
        ('migrate "exec:cat >/x"', {"uri": "exec:cat >/x"}),
        ("gdbserver", {}),
        ("object_add secret,id=s,file=/a b", {"object": "secret,id=s,file=/a b"}),
        ("netdev_add", {}),
        ("trace-file set /x", {"op": "set", FILE: "/x"}),
    ],
)
def test_words(line: str, expected: dict[str, str] | None) -> None:
    assert words(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "info block",
        "screendumps /x",
        "screendump",
        "screendump /x /y /z q",
        'screendump "/x',
        r'screendump "\q"',
        "screendump /x vga0 0 more",
        "memsave 0 10 /x",  # 10 divided by something
        "memsave (1 2 /x",
        "memsave 0",
        "dump-guest-memory -q /x",
        "screendump " + "x" * 1024,
        "screendump \0",
    ],
)
def test_what_names_nothing_or_is_refused_is_qemus(line: str) -> None:
    assert words(line) is None


def test_the_objects_of_lines() -> None:
    line = parse_hmp("drive_add -n 0 driver=qcow2,node-name=n,file.driver=file,file.filename=/x,,y")
    assert line is not None
    obj = line.find_object()
    assert (obj.kind, obj.get("node-name"), obj.get("file.filename"), obj.form) == ("blockdev", "n", "/x,y", "opts")
    other = parse_hmp('object_add {"qom-type":"secret","id":"s","file":"/x"}')
    assert other is not None
    assert (other.find_object().get("file"), other.find_object().form, other.find_object().id) == ("/x", "json", "s")
    chardev = parse_hmp("chardev-change c file,path=/x")
    assert chardev is not None
    assert (chardev.find_object().id, chardev.find_object().get("backend")) == ("c", "file")
    bad = parse_hmp("object_add {")
    assert bad is not None
    assert bad.find_object().members == ()


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAMES = st.text(st.sampled_from("ab/ \t\n\"'\\-,=é"), min_size=1, max_size=12)


@settings(deadline=None)
@given(NAMES, NAMES)
def test_a_word_can_be_replaced_by_any_other(value: str, other: str) -> None:
    word = Word("x", "", 0, 0, "F")
    # An unquoted word may have any character but white space, and not begin with a quote.
    line = parse_hmp(f"drive_backup disk0 {word.print(value)} raw")
    assert line is not None or value.startswith("-")
    if line is not None:
        assert [(w.key, w.value) for w in line.words] == [("device", "disk0"), ("target", value), ("format", "raw")]
        again = parse_hmp(line.replace_words({2: other}))
        assert again is not None
        assert again.words[1].value == other


@settings(deadline=None)
@given(st.sampled_from(sorted(COMMANDS)), TEXT)
def test_any_line_is_understood_or_not(name: str, rest: str) -> None:
    line = parse_hmp(f"{name} {rest}")
    if line is not None:
        assert isinstance(line, HmpLine)
        assert line.replace_words({}) == line.line
        for word in line.words:
            assert 0 <= word.start <= word.end <= len(line.line)
        for member in line.find_object().members:
            text = line.words[member.source - 1].value
            assert member.end <= len(text)
