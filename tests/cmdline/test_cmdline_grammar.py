"""One table per grammar of QEMU's command line; most rows were tried on QEMU 7.2."""

import pytest

from qemu_userns.cmdline.chardev import LegacyChardev, parse_legacy
from qemu_userns.cmdline.json import JsonError, parse_json
from qemu_userns.cmdline.opts import parse_keyval, parse_opts
from qemu_userns.cmdline.readconfig import parse_readconfig
from qemu_userns.cmdline.source import Member, Source
from qemu_userns.errors import CommandLineError


def pairs(members: tuple[Member, ...]) -> list[tuple[str, str]]:
    return [(member.key, member.value) for member in members]


@pytest.mark.parametrize(
    ("text", "implied", "expected"),
    [
        ("", None, []),
        ("a=1,b=2", None, [("a", "1"), ("b", "2")]),
        ("a=1,", None, [("a", "1")]),
        ("a=x,,y,b=2", None, [("a", "x,y"), ("b", "2")]),
        ("a=x,,", None, [("a", "x,")]),
        ("a=x,,,b=2", None, [("a", "x,"), ("b", "2")]),
        ("a=x=y", None, [("a", "x=y")]),
        ("a=,b=", None, [("a", ""), ("b", "")]),
        ("a=1,a=2", None, [("a", "1"), ("a", "2")]),
        ("foo,nobar", None, [("foo", "on"), ("bar", "off")]),
        ("server,nowait", None, [("server", "on"), ("wait", "off")]),
        ("node", None, [("de", "off")]),
        ("tap,id=n0", "type", [("type", "tap"), ("id", "n0")]),
        ("no,id=n0", "type", [("type", "no"), ("id", "n0")]),
        ("a,,b=c,d=e", "guest", [("guest", "a,b=c"), ("d", "e")]),
        ("a=b,tap", "type", [("a", "b"), ("tap", "on")]),
        (",a=b", "type", [("type", ""), ("a", "b")]),
        ("x,,y", None, [("x", "on"), ("", "on"), ("y", "on")]),
        ('path="x y"', None, [("path", '"x y"')]),
    ],
)
def test_opts(text: str, implied: str | None, expected: list[tuple[str, str]]) -> None:
    assert pairs(parse_opts(text, implied=implied)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,filename=/a,,b", [("driver", "file"), ("filename", "/a,b")]),
        ("driver=qcow2,file.driver=file,children.0.x=y", [("driver", "qcow2"), ("file.driver", "file"), ("children.0.x", "y")]),
        ("file", [("driver", "file")]),
        ("file,", [("driver", "file")]),
        # QEMU refuses the empty key that follows.
        ("a,,b=c", [("driver", "a"), ("", "on"), ("b", "c")]),
    ],
)
def test_keyval(text: str, expected: list[tuple[str, str]]) -> None:
    assert pairs(parse_keyval(text, implied="driver")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", []),
        ('{"a":"b"}', [("a", "b")]),
        ("{'a':'\"'} ", [("a", '"')]),
        (' { "a" : { "b" : [ "x", {"c": 1} ] } , "d":true, "e":false, "f":null, "g":-1.5e3 }', None),
        ('{"a":[],"b":{}}', []),
        (r'{"a":"\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00\'"}', [("a", "\"\\/\b\f\n\r\té😀'")]),
        ('{"a":"%s"}', [("a", "%s")]),
        ('{"a":"\x7f"}', [("a", "\x7f")]),
    ],
)
def test_json(text: str, expected: list[tuple[str, str]] | None) -> None:
    members, end = parse_json(text)
    assert end == len(text.rstrip())
    if expected is None:
        expected = [("a.b.0", "x"), ("a.b.1.c", "1"), ("d", "on"), ("e", "off"), ("f", ""), ("g", "-1.5e3")]
    assert pairs(members) == expected


def test_json_spans() -> None:
    text = """{ "a": {'b': "x\\"y" }, "c": [1, true] }"""
    members, _ = parse_json(text)
    assert [text[m.start : m.end] for m in members] == ['"x\\"y"', "1", "true"]
    assert [text[m.item : m.end] for m in members] == ["""'b': "x\\"y\"""", "1", "true"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '"a"',
        "{",
        '{"a"',
        '{"a":',
        '{"a":1',
        '{"a":1,}',
        '{,"a":1}',
        '{"a" 1}',
        '{"a":1 "b":2}',
        '{"a":1,"a":2}',
        '{"a":[1,]}',
        '{"a":[1}}',
        "{'a\":1}",
        '{"a":1}x',
        '{"a":01}',
        '{"a":1.}',
        '{"a":.5}',
        '{"a":-}',
        '{"a":1e}',
        '{"a":True}',
        '{"a":nul}',
        '{"a":"\n"}',
        '{"a":"\udc80"}',
        r'{"a":"\q"}',
        r'{"a":"\u12"}',
        r'{"a":"\u0000"}',
        r'{"a":"\ud800"}',
        r'{"a":"\ud800\u0041"}',
        r'{"a":"\uffff"}',
        '{"a":"x',
        '{"a":"x\\',
        '{"a":' + "[" * 1024 + "]" * 1024 + "}",
    ],
)
def test_json_refused(text: str) -> None:
    with pytest.raises(JsonError):
        parse_json(text)


def test_json_depth() -> None:
    members, _ = parse_json('{"a":' + "[" * 1023 + "1" + "]" * 1023 + "}")
    assert members[0].value == "1"


CONFIG = """# comment
[drive "d0"]
  file = "/a,b"  trailing
\tif =\t"none"

[machine] junk
  type = "q35"
[chardev "c 0" ]
  path = ""
  path="odd" = "y"
"""


def test_readconfig() -> None:
    sections = parse_readconfig(Source(CONFIG, "vm.conf", 1), 7)
    assert [(s.group, s.id, pairs(s.members)) for s in sections] == [
        ("drive", "d0", [("file", "/a,b"), ("if", "none")]),
        ("machine", None, [("type", "q35")]),
        ("chardev", "c 0", [("path", ""), ('path="odd"', "y")]),
    ]
    member = sections[0].members[0]
    assert (CONFIG[member.start : member.end], member.line, member.source) == ("/a,b", 3, 7)
    assert CONFIG[sections[0].start : sections[0].end].endswith('"none"')


def test_readconfig_without_last_newline() -> None:
    assert pairs(parse_readconfig(Source('[a]\nb = "c"', "f", 0), 0)[0].members) == [("b", "c")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path = "x"\n', 1),
        (' [drive "d"]\n', 1),
        ('[drive "d"]\n \n', 2),
        ('[drive "d"]\r\n\r\n', 2),
        ('[drive "d"]\npath="x"\n', 2),
        ('[drive "d"]\npath = x\n', 2),
        ('[drive "d"]\npath = "x\n', 2),
        ('[drive "d"]\n # no comment\n', 2),
        ('[drive "d"]\npath\n', 2),
        ("[]\n", 1),
        ("[\n", 1),
        (f"[{'x' * 64}]\n", 1),
        (f'[drive]\n{"k" * 64} = "v"\n', 2),
        (f'[drive]\nfile = "{"v" * 1020}"\n', 2),
        ('[drive]\nfile = "\0"\n', 2),
    ],
)
def test_readconfig_refused(text: str, line: int) -> None:
    with pytest.raises(CommandLineError) as caught:
        parse_readconfig(Source(text, "vm.conf", 1), 0)
    assert caught.value.what == f"vm.conf:{line}"


def device(backend: str, *members: tuple[str, str], mux: bool = False) -> LegacyChardev:
    return LegacyChardev(backend, members, mux)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("null", device("null")),
        ("none", device("none")),
        ("stdio", device("stdio")),
        ("pty", device("pty")),
        ("pty:/run/p,x", device("pty", ("path", "/run/p,x"))),
        ("vc", device("vc")),
        ("vc:800x600", device("vc", ("width", "800"), ("height", "600"))),
        ("vc:80Cx24C", device("vc", ("cols", "80"), ("rows", "24"))),
        ("vc:x", None),
        ("con:", device("console")),
        ("COM1", device("serial", ("path", "COM1"))),
        ("/dev/ttyS0", device("serial", ("path", "/dev/ttyS0"))),
        ("/dev/parport0", device("parallel", ("path", "/dev/parport0"))),
        ("file:/a,b,,c", device("file", ("path", "/a,b,,c"))),
        ("pipe:/p", device("pipe", ("path", "/p"))),
        ("chardev:c0", device("chardev", ("id", "c0"))),
        ("unix:/s", device("socket", ("path", "/s"))),
        ("unix:/s,,t,server,nowait", device("socket", ("path", "/s,t"), ("server", "on"), ("wait", "off"))),
        ("unix:/s,server=on,wait=off", device("socket", ("path", "/s"), ("server", "on"), ("wait", "off"))),
        ("unix:fd=3,server", device("socket", ("fd", "3"), ("server", "on"))),
        ("tcp:h:1,server,nowait", device("socket", ("host", "h"), ("port", "1"), ("server", "on"), ("wait", "off"))),
        ("tcp::1", device("socket", ("host", ""), ("port", "1"))),
        ("tcp:1", None),
        ("tcp:h:", None),
        ("telnet::1,server", device("socket", ("host", ""), ("port", "1"), ("server", "on"), ("telnet", "on"))),
        ("websocket:h:1", device("socket", ("host", "h"), ("port", "1"), ("websocket", "on"))),
        ("udp:h:1", device("udp", ("host", "h"), ("port", "1"))),
        ("udp:h:1@l:2", device("udp", ("host", "h"), ("port", "1"), ("localaddr", "l"), ("localport", "2"))),
        ("udp::1@:2", device("udp", ("host", ""), ("port", "1"), ("localaddr", ""), ("localport", "2"))),
        ("udp:h:1@x", None),
        ("mon:stdio", device("stdio", ("signal", "off"), mux=True)),
        ("mon:unix:/s", device("socket", ("path", "/s"), mux=True)),
        ("mon:nonsense", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_legacy_chardev(text: str, expected: LegacyChardev | None) -> None:
    assert parse_legacy(text) == expected
