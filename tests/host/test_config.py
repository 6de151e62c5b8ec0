"""The settings."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_userns.cmdline.objects import parse
from qemu_userns.cmdline.table import BUILTIN
from qemu_userns.errors import UsageError
from qemu_userns.host.config import Config, config_paths, configured_qemu, load_config, parse_userns_option
from qemu_userns.host.settings import ABOUT_MONITORS
from qemu_userns.host.settings_shares import check_shares, split_option
from qemu_userns.host.subids import IdMapEntry, IdRange
from qemu_userns.plan.added_shares import AddedShare
from qemu_userns.plan.grants import TapSettings
from qemu_userns.plan.identity import MapEntry
from qemu_userns.plan.idmaps import ShareMap
from qemu_userns.plan.rights import READ_ONLY, MonitorRights, Rights, SocketRights

WHOLE = """
fs = "host"
pool = "600000-799999"
idmap = ["both 1000 1000", "uid 5 2000\\ngid 6 2001"]
sandbox = "on,spawn=allow"
require = ["landlock"]
off = true
[qemu]
qemu-system-x86_64 = "/opt/qemu/bin/qemu-system-x86_64"
"""

QMP = """
passthrough = "/run/%n.raw"
[[qmp.socket]]
path = "/run/a,b/%u=%n,"
access = "read-only"
allow = ["query-*", "qom-get"]
deny = ["query-fdsets"]
users = ["root", 1000, "1001", 1000]
mode = "0660"
[[qmp.socket]]
path = "/run/x"
[[qmp.monitor]]
name = "*"
deny = ["quit"]
[[qmp.monitor]]
name = "compat_monitor0"
"""
SOCKETS = (
    SocketRights("/run/a,b/%u=%n,", Rights(READ_ONLY, ("query-*", "qom-get"), ("query-fdsets",), (0, 1000, 1001)), 0o660),
    SocketRights("/run/x"),
)
MONITORS = (MonitorRights("*", Rights(deny=("quit",))), MonitorRights("compat_monitor0", Rights()))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_whole(file: Path) -> None:
    assert load_config([write(file, WHOLE)], None) == Config(
        qemu=(("qemu-system-x86_64", "/opt/qemu/bin/qemu-system-x86_64"),),
        fs="host",
        pool=IdRange(600000, 200000),
        idmap=(IdMapEntry("both", 1000, 1000, 1), IdMapEntry("uid", 2000, 5, 1), IdMapEntry("gid", 2001, 6, 1)),
        sandbox="on,spawn=allow",
        require=("landlock",),
        off=True,
    )


def test_absent_files_say_nothing(tmp_path: Path) -> None:
    assert load_config([f"{tmp_path}/a", f"{tmp_path}/a/b"], None) == Config()


def test_the_later_file_has_the_last_word(tmp_path: Path) -> None:
    first = write(tmp_path / "1", 'fs = "host"\nrequire = ["landlock"]\n[qemu]\na = "/a"\nb = "/b"\n')
    second = write(tmp_path / "2", 'fs = "view"\nrequire = []\nsandbox = "off"\n[qemu]\nb = "/c"\n')
    assert load_config([first, second], None) == Config(qemu=(("a", "/a"), ("b", "/c")), sandbox="off")


def test_the_cache_saves_parsing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"{tmp_path}/cache"
    first = load_config([write(file, WHOLE)], cache)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tomllib", None)  # an import would fail
        assert load_config([str(file)], cache) == first
    os.utime(file, (1_700_000_001, 1_700_000_001))
    write(file, 'fs = "view"')
    assert load_config([str(file)], cache) == Config()


def test_monitors_come_whole_out_of_a_file_and_out_of_the_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Config(sockets=SOCKETS, monitors=MONITORS, passthrough="/run/%n.raw")
    assert load_config([write(file, QMP)], f"{tmp_path}/cache") == expected
    monkeypatch.setitem(sys.modules, "tomllib", None)  # an import would fail
    assert load_config([str(file)], f"{tmp_path}/cache") == expected


def test_a_later_list_of_tables_replaces_the_earlier(tmp_path: Path) -> None:
    first = write(tmp_path / "1", QMP)
    assert load_config([first, write(tmp_path / "2", "qmp.socket = []")], None).sockets == ()
    assert load_config([first, write(tmp_path / "3", "qmp.socket = []")], None).monitors == MONITORS


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ('qmp = ["/x"]', "qmp", "is not a table"),
        ('"qmp.socket" = []', "qmp.socket", "no such setting"),
        ("qmp.sockets = []", "qmp.sockets", "no such setting"),
        ("[qmp.socket]\npath = '/x'", "qmp.socket", "is not a list of tables"),
        ("qmp.socket = ['/x']", "qmp.socket", "is not a list of tables"),
        ("qmp.socket = [{}]", "qmp.socket", "has no path"),
        ("qmp.socket = [{path = 5}]", "qmp.socket.path", "is not a str"),
        ("qmp.socket = [{path = 'x'}]", "qmp.socket.path", "is not an absolute path"),
        ("qmp.socket = [{path = '/x/'}]", "qmp.socket.path", "is not an absolute path"),
        ("qmp.socket = [{path = '/%p'}]", "qmp.socket.path", "means nothing"),
        ("qmp.socket = [{path = '/x', colour = 'red'}]", "qmp.socket.colour", "no such setting"),
        ("qmp.socket = [{path = '/x', access = 'none'}]", "qmp.socket.access", "not a choice"),
        ("qmp.socket = [{path = '/x', allow = 'quit'}]", "qmp.socket.allow", "is not a list"),
        ("qmp.socket = [{path = '/x', allow = []}]", "qmp.socket.allow", "is an empty list"),
        ("qmp.socket = [{path = '/x', allow = [1]}]", "qmp.socket.allow", "is not a list of str"),
        ("qmp.socket = [{path = '/x', deny = ['a b']}]", "qmp.socket.deny", "is no QMP command"),
        ("qmp.socket = [{path = '/x', deny = ['']}]", "qmp.socket.deny", "is no QMP command"),
        ("qmp.socket = [{path = '/x', users = [true]}]", "qmp.socket.users", "is not a list of str"),
        ("qmp.socket = [{path = '/x', users = ['no such user']}]", "qmp.socket.users", "there is no user"),
        ("qmp.socket = [{path = '/x', users = [4294967295]}]", "qmp.socket.users", "there is no user"),
        ("qmp.socket = [{path = '/x', users = [-1]}]", "qmp.socket.users", "there is no user"),
        ("qmp.socket = [{path = '/x', mode = 0o600}]", "qmp.socket.mode", "is not a str"),
        ("qmp.socket = [{path = '/x', mode = '0o600'}]", "qmp.socket.mode", "is no mode"),
        ("qmp.socket = [{path = '/x', mode = '4755'}]", "qmp.socket.mode", "is no mode"),
        ("qmp.socket = [{path = '/x', mode = '09'}]", "qmp.socket.mode", "is no mode"),
        ("qmp.monitor = [{}]", "qmp.monitor", "has no name"),
        ("qmp.monitor = [{name = 'a', path = '/x'}]", "qmp.monitor.path", "no such setting"),
        ("passthrough = 1", "passthrough", "is not a str"),
        ("passthrough = 'x'", "passthrough", "is not an absolute path"),
        ('colour = "red"', "colour", "no such setting"),
        ('"qemu.x" = "/x"', "qemu.x", "no such setting"),
        ("share = 1", "share", "is not a table of tables"),
        ("[share]\nidmap = []", "share", "is not a table of tables"),
        ("[share.a]\nplace = '/x'", "share.a.place", "no such setting"),
        ("[share.a]\npath = 'x'", "share.a.path", "not an absolute path"),
        ("[share.a]\ndriver = 'nfs'", "share.a.driver", "not a choice"),
        ("[share.a]\nreadonly = 'on'", "share.a.readonly", "is not a bool"),
        ("[share.a]\nidmap = 'both 1 1'", "share.a.idmap", "is not a list"),
        ("[share.a]\nidmap = ['both 0 0']", "share.a.idmap", "host root"),
        ("[share.a]\nidmap = ['gid 1 1']", "share.a.idmap", "uids or gids alone"),
        ("[share.'']\nidmap = ['both 1 1']", "share..idmap", "no such setting"),
        ("tap = 1", "tap", "is not a table of tables"),
        ("[tap]\nbridge = 'b'", "tap", "is not a table of tables"),
        ("[tap.n]\nspeed = 1", "tap.n.speed", "there is no such setting"),
        ("[tap.n]\nspeed = 'x'", "tap.n.speed", "no such setting"),
        ("[tap.n]\nmtu = '1500'", "tap.n.mtu", "is not a int"),
        ("[tap.n]\nmtu = 67", "tap.n.mtu", "'67' is no mtu"),
        ("[tap.n]\nmtu = true", "tap.n.mtu", "is not a int"),
        ("[tap.n]\nmac = '52:54:00:12:34'", "tap.n.mac", "is no MAC address"),
        ("[tap.n]\nmac = '53:54:00:12:34:56'", "tap.n.mac", "no address of one interface"),
        ("[tap.n]\nmac = '00:00:00:00:00:00'", "tap.n.mac", "no address of one interface"),
        ("[tap.n]\nbridge = 'a/b'", "tap.n.bridge", "is no name of an interface"),
        ("[tap.n]\nbridge = 'longer-than-it-is'", "tap.n.bridge", "is no name of an interface"),
        ("[tap.n]\nowner = 'nobody-of-that-name'", "tap.n.owner", "there is no user"),
        ("[tap.n]\nup = 'on'", "tap.n.up", "is not a bool"),
        ("[tap.'']\nup = true", "tap..up", "no such setting"),
        ("net = 1", "net", "is not a str"),
        ("net = 'some'", "net", "not a choice"),
        ("net = 'run/netns/a'", "net", "not a choice"),
        ("fs = 1", "fs", "is not a str"),
        ('fs = "all"', "fs", "not a choice"),
        ('pool = "5"', "pool", "not a range"),
        ('pool = "0-99999"', "pool", "not a range"),
        ('pool = "900000-600000"', "pool", "not a range"),
        ('idmap = "both 1 1"', "idmap", "is not a list"),
        ("idmap = [1]", "idmap", "is not a str"),
        ('idmap = ["both 0 0"]', "idmap", "host root"),
        ('sandbox = "maybe"', "sandbox", "no value for -sandbox"),
        ('sandbox = ""', "sandbox", "no value for -sandbox"),
        ('require = ["selinux"]', "require", "not a choice"),
        ("off = 1", "off", "is not a bool"),
        ('qemu = "bin"', "qemu", "not an absolute path"),
        ("qemu = 1", "qemu", "is not a str"),
        ('[qemu]\na = "b"', "qemu.a", "not an absolute path"),
        ("[qemu.a]\nb = 1", "qemu.a", "is not a str"),
    ],
)
def test_the_wrong_key_is_named(file: Path, text: str, key: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        load_config([write(file, text)], None)
    assert caught.value.what == f"{file}: {key}"
    assert caught.value.hint


def test_no_toml(file: Path) -> None:
    for data in (b"fs =", b"\xff"):
        file.write_bytes(data)
        with pytest.raises(UsageError, match="is not TOML"):
            load_config([str(file)], None)


def test_file_that_everybody_may_write(file: Path) -> None:
    write(file, "")
    file.chmod(0o646)
    with pytest.raises(UsageError, match="everybody may write it"):
        load_config([str(file)], None)


def test_file_of_somebody_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "")
    if os.geteuid() == 0:
        os.chown(file, 1000, 1000)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    with pytest.raises(UsageError, match="belongs to uid"):
        load_config([str(file)], None)


def test_no_regular_file(file: Path, tmp_path: Path) -> None:
    os.mkfifo(file)
    for path in (file, tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            load_config([str(path)], None)


def test_huge_file(file: Path) -> None:
    with pytest.raises(UsageError, match="larger than"):
        load_config([write(file, "#" * (1 << 20))], None)


def test_linked_dotfiles_work(file: Path, tmp_path: Path) -> None:
    write(tmp_path / "real", 'fs = "host"')
    file.symlink_to("real")
    assert load_config([str(file)], None).fs == "host"


def test_options_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(qemu=(("a", "/a"),), fs="host", require=("landlock",))
    pairs = [("fs", "host"), ("fs", "view"), ("idmap", "both 1 1"), ("idmap", "both 2 2"), ("off", ""), ("qemu", "build/qemu")]
    assert parse_userns_option(pairs, config) == Config(
        qemu=(("a", "/a"), ("", f"{tmp_path}/build/qemu")),
        idmap=(IdMapEntry("both", 1, 1, 1), IdMapEntry("both", 2, 2, 1)),
        require=("landlock",),
        off=True,
    )
    assert parse_userns_option([], config) == config
    assert parse_userns_option([("qemu.b", "/b")], config).qemu == (("a", "/a"), ("b", "/b"))


def test_sockets_on_the_command_line_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(sockets=SOCKETS)
    found = parse_userns_option([("qmp", "a"), ("qmp", "/b"), ("passthrough", "c"), ("passthrough", "d")], config)
    assert found.sockets == (*SOCKETS, SocketRights(f"{tmp_path}/a"), SocketRights("/b"))
    assert found.passthrough == f"{tmp_path}/d"


def test_the_id_map_of_a_share(file: Path) -> None:
    config = load_config([write(file, '[share."a.b"]\nidmap = ["both 5 0", "uid 1000-1001 1-2", "gid 7 1"]')], None)
    ours = ShareMap("a.b", (MapEntry(0, 5, 1), MapEntry(1, 1000, 2)), (MapEntry(0, 5, 1), MapEntry(1, 7, 1)))
    assert config.share_maps == (ours,)
    changed = parse_userns_option([("share.b.idmap", "uid 1 1"), ("share.b.idmap", "gid 2 2")], config)
    assert changed.share_maps == (ours, ShareMap("b", (MapEntry(1, 1, 1),), (MapEntry(2, 2, 1),)))


def test_the_settings_of_a_tap(file: Path) -> None:
    """A later place overrides key by key."""
    text = '[tap."a.b"]\nbridge = "br0"\nmtu = 9000\nowner = 1000\n[tap.c]\nup = false\nowner = "root"'
    config = load_config([write(file, text)], None)
    assert config.taps == (TapSettings("a.b", "br0", 9000, owner=1000), TapSettings("c", owner=0, up=False))
    changed = parse_userns_option([("tap.a.b.mac", "52:54:00:AB:cd:ef"), ("tap.a.b.mtu", "1"), ("tap.a.b.mtu", "1400")], config)
    assert changed.taps[1] == TapSettings("a.b", "br0", 1400, "52:54:00:ab:cd:ef", 1000)


def test_a_table_on_the_command_line_is_a_list_of_members() -> None:
    pairs = [("qmp.socket", "path=/a,access=read-only,allow=query-status,allow=stop"), ("qmp.socket", "path=/b"), ("qmp", "/c")]
    read_only = SocketRights("/a", Rights(READ_ONLY, ("query-status", "stop")))
    assert parse_userns_option(pairs, Config(sockets=SOCKETS)).sockets == (read_only, SocketRights("/b"), SocketRights("/c"))


@pytest.mark.parametrize(
    ("word", "value"), [("on", True), ("yes", True), ("true", True), ("off", False), ("no", False), ("false", False)]
)
def test_switch(word: str, value: bool) -> None:
    assert parse_userns_option([("off", word)], Config()).off is value


def test_wrong_option_is_named() -> None:
    for pair in (("colour", "red"), ("fs", "all"), ("off", "maybe"), ("qemu", ""), ("qmp", ""), ("passthrough", "")):
        with pytest.raises(UsageError) as caught:
            parse_userns_option([pair], Config(), "run")
        assert caught.value.what == f"run: {pair[0]}"


def test_configured_qemu() -> None:
    config = Config(qemu=(("a", "/a"), ("", "/dir")))
    assert configured_qemu(config, "a") == "/a"
    assert configured_qemu(config, "b") == "/dir"
    assert configured_qemu(Config(), "b") is None


@pytest.mark.parametrize(
    ("environ", "user"),
    [
        ({"HOME": "/h"}, ["/h/.config/qemu-userns/config.toml"]),
        ({"HOME": "/h", "XDG_CONFIG_HOME": "/x"}, ["/x/qemu-userns/config.toml"]),
        ({"HOME": "/h", "XDG_CONFIG_HOME": "x"}, ["/h/.config/qemu-userns/config.toml"]),
        ({}, []),
    ],
)
def test_paths(environ: "dict[str, str]", user: "list[str]") -> None:
    assert list(config_paths(environ)) == ["/etc/qemu-userns/config.toml", *user]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_file_is_parsed_or_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    with contextlib.suppress(UsageError):
        load_config([str(file)], None)


@given(
    st.lists(
        st.tuples(st.sampled_from(["fs", "pool", "idmap", "sandbox", "off", "qemu", "require", "x", *ABOUT_MONITORS]), st.text())
    )
)
def test_any_option_is_parsed_or_refused(pairs: "list[tuple[str, str]]") -> None:
    with contextlib.suppress(UsageError):
        parse_userns_option(pairs, Config())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["qmp.socket", "qmp.monitor"]),
            st.lists(
                st.tuples(st.sampled_from(["path", "name", "access", "allow", "deny", "users", "mode", "x"]), st.text()),
                max_size=5,
            ),
        )
    )
)
def test_any_table_is_parsed_or_refused(tables: "list[tuple[str, list[tuple[str, str]]]]") -> None:
    pairs = [(kind, ",".join(f"{key}={value}" for key, value in members)) for kind, members in tables]
    with contextlib.suppress(UsageError):
        parse_userns_option(pairs, Config())


def test_shares_of_a_file_and_of_the_command_line(file: Path) -> None:
    text = '[share.src]\npath = "/srv/src"\nreadonly = true\nidmap = ["both 5 0"]\n[share.b]\nidmap = ["both 6 0"]'
    config = load_config([write(file, text)], None)
    assert config.shares == (AddedShare("src", "/srv/src", readonly=True),)
    assert [found.name for found in config.share_maps] == ["src", "b"]
    pairs = [
        ("share", "x,y"),
        ("tag", "a.b"),
        ("map", "both 1 1"),
        ("map", "both 2 2"),
        ("security_model", "none"),
        ("fs", "host"),
    ]
    changed = parse_userns_option([*pairs, ("share.src.readonly", "off")], config)
    assert changed.shares == (AddedShare("src", "/srv/src"), AddedShare("a.b", f"{os.getcwd()}/x,y", model="none"))
    ids = (MapEntry(1, 1, 1), MapEntry(2, 2, 1))
    assert (changed.fs, changed.share_maps[-1]) == ("host", ShareMap("a.b", ids, ids))


def test_several_shares_in_one_option() -> None:
    pairs = [("share", "/a"), ("tag", "a"), ("share", "/b"), ("readonly", "on"), ("tag", "b")]
    assert parse_userns_option(pairs, Config()).shares == (AddedShare("a", "/a"), AddedShare("b", "/b", readonly=True))
    assert split_option("/a,,b,tag=t,readonly") == (("share", "/a,b"), ("tag", "t"), ("readonly", "on"))


@pytest.mark.parametrize(
    ("pairs", "error"),
    [
        ([("share", "/a")], "has no tag"),
        ([("share", "/a"), ("tag", "t"), ("driver", "nfs")], "'nfs' is not a choice"),
        ([("share", "/a"), ("tag", "t"), ("readonly", "2")], "neither on nor off"),
        ([("tag", "t"), ("share", "/a"), ("tag", "t")], "there is no such setting"),
        ([("share", ""), ("tag", "t")], "is not an absolute path"),
    ],
)
def test_a_share_that_cannot_be(pairs: list[tuple[str, str]], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        parse_userns_option(pairs, Config())


@pytest.mark.parametrize(
    ("words", "share", "error"),
    [
        ((), AddedShare("t"), "has no path"),
        ((), AddedShare("t" * 32, "/a"), "longer than the 31 bytes"),
        (("-virtfs", "local,path=/b,mount_tag=t,security_model=none"), AddedShare("t", "/a"), "has a share of that name already"),
        (("-fsdev", "local,path=/b,id=f", "-device", "virtio-9p-pci,fsdev=f,mount_tag=t"), AddedShare("t", "/a"), "already"),
    ],
)
def test_a_share_that_does_not_go_with_the_command_line(words: tuple[str, ...], share: AddedShare, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        check_shares(Config(shares=(share,)), parse(words, BUILTIN, {}).objects)
