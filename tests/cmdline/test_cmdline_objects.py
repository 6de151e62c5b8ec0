"""Whole command lines: what they mean, and that edits change what they should and nothing else."""

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.cmdline.objects import CommandLine, Object, find_readconfigs, parse
from qemu_userns.cmdline.source import Edit, Member, append, apply_edits, drop, remove, replace
from qemu_userns.cmdline.table import BUILTIN
from qemu_userns.errors import CommandLineError

DRIVE = '[drive "d0"]\n  file = "/disk"\n  if = "none"\n'


def read(*argv: str, configs: Mapping[int, str] | None = None) -> CommandLine:
    return parse(argv, BUILTIN, configs or {})


def meaning(found: Object) -> tuple[str, str | None, list[tuple[str, str]]]:
    return found.kind, found.id, [(member.key, member.value) for member in found.members]


def written(line: CommandLine, *edits: Edit) -> list[str]:
    return line.print_words(edits)[0]


def find(found: Object, key: str) -> Member:
    member = found.find(key)
    assert member
    return member


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["disk.img"], [("disk", None, [("value", "disk.img")])]),
        ([""], [("disk", None, [("value", "")])]),
        (["-kernel", "/k,x=y"], [("kernel", None, [("value", "/k,x=y")])]),
        (["--kernel", "-odd"], [("kernel", None, [("value", "-odd")])]),
        (["-M", "q35"], [("machine", None, [("type", "q35")])]),
        (["-m", "1G,slots=2"], [("memory", None, [("size", "1G"), ("slots", "2")])]),
        (["-netdev", "tap,id=n0"], [("netdev", "n0", [("type", "tap"), ("id", "n0")])]),
        (["-netdev", '{"type":"tap","id":"n0"}'], [("netdev", "n0", [("type", "tap"), ("id", "n0")])]),
        (["-chardev", "null,id=a,id=b"], [("chardev", "a", [("backend", "null"), ("id", "a"), ("id", "b")])]),
        (["-vnc", "unix:/s,password=on"], [("vnc", None, [("vnc", "unix:/s"), ("password", "on")])]),
        (["-display", "vnc=unix:/s,password=on"], [("vnc", None, [("vnc", "unix:/s"), ("password", "on")])]),
        (["-display", "egl-headless,rendernode=/d"], [("display", None, [("type", "egl-headless"), ("rendernode", "/d")])]),
        (["-incoming", "unix:/a=b"], [("incoming", None, [("value", "unix:/a=b")])]),
        (["-incoming", "defer"], [("incoming", None, [("value", "defer")])]),
        (
            ["-incoming", "main,addr.transport=file"],
            [("incoming", None, [("channel-type", "main"), ("addr.transport", "file")])],
        ),
        (
            ["-incoming", '{"channel-type":"main","addr":{"path":"/s"}}'],
            [("incoming", None, [("channel-type", "main"), ("addr.path", "/s")])],
        ),
        (["-global", "a.b=c,d"], [("global", None, [("driver", "a"), ("property", "b"), ("value", "c,d")])]),
        (["-global", "driver=a,property=b"], [("global", None, [("driver", "a"), ("property", "b")])]),
        (["-drive", 'file=json:{"a":1,,"b":2}'], [("drive", None, [("file", 'json:{"a":1,"b":2}')])]),
        # No JSON for these.
        (["-M", "{}"], [("machine", None, [("type", "{}")])]),
        (["-chardev", '{"id":"c"}'], [("chardev", None, [("backend", '{"id":"c"}')])]),
        (["-userns", "identity=subordinate"], [("userns", None, [("identity", "subordinate")])]),
        # QEMU's to refuse.
        (["-blockdev", '{"driver":}'], []),
        (["-", "--", "-nodef", "-nodefaults=on"], []),
        (["-S", "-kernel"], []),
    ],
)
def test_meaning(argv: list[str], expected: list[tuple[str, str | None, list[tuple[str, str]]]]) -> None:
    line = read(*argv)
    assert [meaning(found) for found in line.objects] == expected
    assert written(line) == argv


def test_options() -> None:
    options = read("--M", "q35", "-S", "disk", "-nope", "-kernel").options
    assert [(o.name, o.spelled, o.index, o.value_index, o.known) for o in options] == [
        ("machine", "--M", 0, 1, True),
        ("S", "-S", 2, None, True),
        ("", "disk", 3, None, True),
        ("-nope", "-nope", 4, None, False),
        ("kernel", "-kernel", 5, None, False),
    ]


def test_learned_option_takes_its_value() -> None:
    line = parse(["-new", "-x", "-flag", "disk"], BUILTIN.with_learned({"new": True, "flag": False, "S": True}), {})
    assert [meaning(found) for found in line.objects] == [("new", None, [("value", "-x")]), ("disk", None, [("value", "disk")])]
    assert BUILTIN.find("new") is None


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("tap,id=a", "opts"),
        ("stream,id=a,addr.path=/x", "keyval"),
        ("id=a,type=dgram", "keyval"),
        ('{"type":"tap"}', "json"),
    ],
)
def test_netdev_form(spec: str, form: str) -> None:
    assert read("-netdev", spec).objects[0].form == form


def test_get_takes_the_last_and_find_all_keeps_all() -> None:
    found = read("-netdev", "user,id=n,hostfwd=a,hostfwd=b").objects[0]
    assert found.get("hostfwd") == "b"
    assert [member.value for member in found.find_all("hostfwd")] == ["a", "b"]
    assert found.get("nothing") is None
    assert found.get("nothing", "x") == "x"


def test_readconfig_sections_stand_where_the_option_stands() -> None:
    argv = ["-kernel", "k", "-readconfig", "vm.conf", "-S"]
    assert find_readconfigs(argv, BUILTIN) == ((3, "vm.conf"),)
    line = read(*argv, configs={3: DRIVE + '[smp-opts]\n  cpus = "2"\n'})
    assert [found.kind for found in line.objects] == ["kernel", "readconfig", "drive", "smp"]
    drive = line.objects[2]
    assert meaning(drive) == ("drive", "d0", [("file", "/disk"), ("if", "none")])
    assert line.options[drive.option].name == "readconfig"
    assert (line.sources[drive.source].where, line.sources[drive.source].argument) == ("vm.conf", 3)
    assert [found.kind for found in read(*argv).objects] == ["kernel", "readconfig"]


def test_malformed_readconfig_is_an_error() -> None:
    with pytest.raises(CommandLineError, match=r"vm\.conf:1"):
        read("-readconfig", "vm.conf", configs={1: "x = 1\n"})


@pytest.mark.parametrize(
    ("before", "setting", "reached"),
    [
        (["-drive", "id=d0,file=/a"], "drive.d0.file=/b", True),
        (["-readconfig", "vm.conf"], "drive.d0.file=/b=,c", True),
        (["-fsdev", "local,id=f"], "fsdev.f.path=/b", True),
        (["-virtfs", "local,mount_tag=t"], "fsdev.t.path=/b", True),
        (["-virtfs", "local,mount_tag=t,id=f"], "fsdev.f.path=/b", True),
        (["-virtfs", "local,mount_tag=t,id=f"], "virtfs.f.path=/b", False),
        (["-device", '{"driver":"e1000","id":"e"}'], "device.e.romfile=/b", False),
        (["-netdev", "stream,id=n"], "netdev.n.fd=3", False),
        (["-object", "secret,id=s"], "object.s.file=/b", False),
        (["-drive", "id=d1"], "drive.d0.file=/b", False),
        (["-drive", "id=d0"], "chardev.d0.file=/b", False),
        (["-drive", "id=d0"], "drive.d0", False),
        (["-drive", "id=d0"], "drive.d0.=x", False),
    ],
)
def test_set(before: list[str], setting: str, reached: bool) -> None:
    line = read(*before, "-set", setting, configs={1: DRIVE} if before[0] == "-readconfig" else {})
    last = line.objects[-1].members[-1]
    assert (last.form == "set") == reached
    if reached:
        assert line.objects[-1].get(last.key) == setting.partition("=")[2]
        assert written(line, replace(last, "/new", "test"))[-1] == setting.partition("=")[0] + "=/new"
        assert written(line, remove(line.objects[-1], last, "test")) == before


def test_set_before_the_object_reaches_nothing() -> None:
    assert read("-set", "drive.d0.file=/b", "-drive", "id=d0").objects[0].get("file") is None


@pytest.mark.parametrize(
    ("option", "value", "key", "new", "expected"),
    [
        ("-kernel", "/a", "value", "/b,c", "/b,c"),
        ("-drive", "file=/a,if=none", "file", "/b,c", "file=/b,,c,if=none"),
        ("-chardev", "socket,id=c,server", "server", False, "socket,id=c,server=off"),
        ("-chardev", "socket,id=c,nowait", "wait", "on", "socket,id=c,wait=on"),
        ("-name", "a,process=b", "guest", "c,d", "guest=c,,d,process=b"),
        ("-device", "e1000,id=e", "driver", "a=b", "driver=a=b,id=e"),
        ("-device", "e1000,id=e", "driver", "virtio", "virtio,id=e"),
        ("-blockdev", '{ "filename" : "a" }', "filename", 'b"\\\n', '{ "filename" : "b\\"\\\\\\u000a" }'),
        ("-blockdev", '{"read-only":true}', "read-only", False, '{"read-only":false}'),
        ("-netdev", '{"fd":"3"}', "fd", "4", '{"fd":"4"}'),
        ("-netdev", '{"n":3}', "n", 4, '{"n":4}'),
        ("-global", "a.b=c,d", "value", "e,f", "a.b=e,f"),
        ("-display", "vnc=unix:/a,sasl=on", "vnc", "unix:/b", "vnc=unix:/b,sasl=on"),
    ],
)
def test_replace(option: str, value: str, key: str, new: str | bool | int, expected: str) -> None:
    line = read(option, value)
    assert written(line, replace(find(line.objects[0], key), new, "test")) == [option, expected]


@pytest.mark.parametrize(
    ("option", "value", "gone", "added", "expected"),
    [
        (
            "-netdev",
            "tap,id=n,ifname=t,script=no",
            ["ifname", "script"],
            [("fd", "3"), ("vhostfd", "4")],
            "tap,id=n,fd=3,vhostfd=4",
        ),
        ("-netdev", "tap,ifname=t,id=n,", ["ifname"], [("fd", "3")], "tap,id=n,fd=3,"),
        ("-drive", "file=a,,,if=none", ["if"], [("x", "1")], "file=a,,,x=1"),
        ("-drive", "file=a,if=none,x=y", ["file", "if"], [], "x=y"),
        ("-drive", "file=a,if=none", ["file", "if"], [("x", "1")], "x=1"),
        ("-drive", "file=a,", ["file"], [("x", "1")], "x=1,"),
        ("-drive", "file=a", [], [("x", "1,2")], "file=a,x=1,,2"),
        ("-drive", "file=", [], [("x", True)], "file=,x=on"),
        ("-drive", "a,b,c=d", ["a", "b"], [], "c=d"),
        ("-netdev", "ifname=t,vhost,type=tap", ["ifname"], [], "vhost=on,type=tap"),
        ("-netdev", '{"type":"tap", "a": 1 ,"b":[{}]}', ["a"], [("fd", "3")], '{"type":"tap" ,"b":[{}],"fd":"3"}'),
        ("-netdev", '{"type":"tap","a":1}', ["type"], [], '{"a":1}'),
        ("-netdev", '{ "type" : "tap" , "a":1}', ["type", "a"], [("x", True)], '{  "x":true}'),
        ("-netdev", "{}", [], [("x", "1"), ("y", 2)], '{"x":"1","y":2}'),
        ("-blockdev", '{"a":{}}', [], [("backing.file.x", "1")], '{"a":{},"backing":{"file":{"x":"1"}}}'),
        (
            "-blockdev",
            '{"file":{"driver":"file","cache":{"direct":true}}}',
            [],
            [("file.locking", "on"), ("file.cache.no-flush", False), ("file.new.x", "y")],
            '{"file":{"driver":"file","locking":"on","new":{"x":"y"},"cache":{"direct":true,"no-flush":false}}}',
        ),
        (
            "-blockdev",
            '{"driver":"qcow2"}',
            ["driver"],
            [("backing.driver", "raw"), ("backing.file.driver", "file"), ("backing.file.filename", "/b")],
            '{"backing":{"driver":"raw","file":{"driver":"file","filename":"/b"}}}',
        ),
        ("-blockdev", '{"c":["a","b"]}', ["c.0"], [], '{"c":["b"]}'),
    ],
)
def test_remove_and_append(
    option: str, value: str, gone: list[str], added: list[tuple[str, str | bool | int]], expected: str
) -> None:
    line = read(option, value)
    found = line.objects[0]
    edits = [remove(found, find(found, key), "test") for key in gone] + [append(found, key, new, "test") for key, new in added]
    assert written(line, *edits) == [option, expected]


def test_edit_readconfig() -> None:
    line = read("-readconfig", "vm.conf", configs={1: DRIVE + "\n# end\n"})
    drive = line.objects[1]
    words, files = line.print_words(
        [
            replace(find(drive, "file"), "/b,c", "test"),
            remove(drive, find(drive, "if"), "test"),
            append(drive, "format", "raw", "test"),
            replace(find(line.objects[0], "value"), "/dev/fd/9", "test"),
        ]
    )
    assert words == ["-readconfig", "/dev/fd/9"]
    text = '[drive "d0"]\n  file = "/b,c"\n#\n  format = "raw"\n\n# end\n'
    assert files == {2: text}
    again = read("-readconfig", "vm.conf", configs={1: text}).objects[1]
    assert meaning(again) == ("drive", "d0", [("file", "/b,c"), ("format", "raw")])


@pytest.mark.parametrize("value", ['a"b', "a\nb", "x" * 1020, "é" * 510])
def test_what_a_configuration_file_cannot_hold(value: str) -> None:
    drive = read("-readconfig", "vm.conf", configs={1: DRIVE}).objects[1]
    with pytest.raises(CommandLineError):
        replace(find(drive, "file"), value, "test")
    with pytest.raises(CommandLineError):
        append(drive, "file", value, "test")


@pytest.mark.parametrize("value", ["\udcff", "\0"])
def test_what_json_cannot_hold(value: str) -> None:
    found = read("-blockdev", '{"filename":"x"}').objects[0]
    with pytest.raises(CommandLineError):
        replace(found.members[0], value, "test")


def test_a_plain_word_has_no_members_to_add_or_remove() -> None:
    found = read("-kernel", "x").objects[0]
    with pytest.raises(ValueError, match="plain word"):
        append(found, "a", "b", "test")
    with pytest.raises(ValueError, match="whole word"):
        remove(found, found.members[0], "test")


def test_drop() -> None:
    line = read("-S", "-runas", "lxd", "disk", "-kernel", "k")
    edits = [drop(line.options[0], "test"), drop(line.options[1], "test"), drop(line.options[2], "test")]
    assert written(line, *edits) == ["-kernel", "k"]


def test_a_value_cannot_be_an_object_too() -> None:
    found = read("-blockdev", "{}").objects[0]
    for keys in (["a", "a.b"], ["a.b", "a"]):
        with pytest.raises(ValueError, match="both"):
            apply_edits("{}", [append(found, key, "x", "test") for key in keys])


def test_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="overlapping"):
        apply_edits("abc", [Edit(0, 0, 2, "x", "one"), Edit(0, 1, 3, "y", "two")])


# Words near enough to QEMU's to reach every branch.
TEXT = st.text(st.sampled_from("ab no=,.{}[]:\"'\\\n1-/\udc80é"), max_size=12)
OPTION = st.sampled_from([*(f"-{name}" for name in BUILTIN.entries), "--M", "-nope", "-", "--"])
OBJECT = st.dictionaries(st.text("abc", min_size=1), st.recursive(TEXT | st.booleans(), st.lists), max_size=3)
WORD = OPTION | TEXT | st.sampled_from(["drive.a.file=b", "vnc=a,b", '{"a":{"b":["c",true]},"id":"a"}', "id=a,file=x,,y,noz"])


@settings(deadline=None)
@given(st.lists(WORD, max_size=8))
def test_any_argv_is_printed_as_it_was(argv: list[str]) -> None:
    line = read(*argv)
    assert written(line) == argv
    for found in line.objects:
        for member in found.members:
            text = line.sources[member.source].text
            assert 0 <= member.item <= member.start <= member.end <= len(text)


@settings(deadline=None)
@given(st.lists(WORD, max_size=6), st.text(st.sampled_from('ab,="\\ né'), max_size=6), st.data())
def test_replacing_one_member_changes_nothing_else(argv: list[str], value: str, data: st.DataObject) -> None:
    line = read(*argv)
    spots = [
        (index, number)
        for index, found in enumerate(line.objects)
        for number, member in enumerate(found.members)
        # The other words of an option decide how it is parsed at all.
        if found.form != "word" and found.kind not in ("netdev", "global") and member.key not in ("id", "mount_tag")
    ]
    if not spots:
        return
    at, number = data.draw(st.sampled_from(spots))
    edit = replace(line.objects[at].members[number], value, "test")
    again = read(*written(line, edit))
    expected = [meaning(found) for found in line.objects]
    expected[at][2][number] = (expected[at][2][number][0], value)
    assert [meaning(found) for found in again.objects] == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab,", max_size=3), st.booleans()), min_size=1), st.booleans(), st.booleans())
def test_removing_any_members_leaves_the_others(items: list[tuple[str, bool]], trailing: bool, added: bool) -> None:
    text = ",".join(f"k{i}={value.replace(',', ',,')}" for i, (value, _) in enumerate(items)) + "," * trailing
    found = read("-drive", text).objects[0]
    edits = [remove(found, member, "test") for member, (_, gone) in zip(found.members, items, strict=True) if gone]
    edits += [append(found, "new", ",x,", "test")] * added
    kept = [(f"k{i}", value) for i, (value, gone) in enumerate(items) if not gone] + [("new", ",x,")] * added
    assert meaning(read("-drive", apply_edits(text, edits)).objects[0])[2] == kept


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.booleans(), st.sampled_from(["", " ", "\n\t"]))
def test_removing_any_json_members_leaves_the_others(gone: list[bool], added: bool, space: str) -> None:
    items = f"{space},{space}".join(f'"k{i}"{space}:{space}"}},"' for i in range(len(gone)))
    text = f"{{{space}{items}{space}}}"
    found = read("-device", text).objects[0]
    edits = [remove(found, member, "test") for member, out in zip(found.members, gone, strict=True) if out]
    edits += [append(found, "new", "x", "test")] * added
    kept = [(f"k{i}", "},") for i, out in enumerate(gone) if not out] + [("new", "x")] * added
    assert meaning(read("-device", apply_edits(text, edits)).objects[0])[2] == kept


@settings(deadline=None)
@given(st.text(st.sampled_from('[]"= \ta#\n\r'), max_size=40))
def test_a_configuration_file_is_kept_or_refused(text: str) -> None:
    try:
        line = read("-readconfig", "f", configs={1: text})
    except CommandLineError:
        return
    assert line.print_words([]) == (["-readconfig", "f"], {2: text})
