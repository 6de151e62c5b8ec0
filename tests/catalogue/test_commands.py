"""QMP commands as the catalogue reads them: row by row, and against the schema of every QEMU that is installed."""

from __future__ import annotations

import glob
import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integration.talk import running
from qemu_userns.catalogue import ways
from qemu_userns.catalogue.command_rows import COMMAND_ROWS
from qemu_userns.catalogue.commands import HMP, fd_names, find_command_needs, read_command
from qemu_userns.catalogue.owners import owner_of, removed_by, removed_by_event
from qemu_userns.catalogue.rows import ROWS
from qemu_userns.cmdline.hmp import COMMANDS, parse_hmp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_userns.catalogue.needs import Need


def spell(name: str, arguments: object) -> str:
    return json.dumps({"execute": name, "arguments": arguments})


def hmp(line: str) -> tuple[str, dict[str, Any]]:
    return HMP, {"command-line": line}


def needs_of(name: str, arguments: object) -> tuple[Need, ...]:
    return find_command_needs(name, read_command(name, spell(name, arguments)))


def unix(path: str) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path}}


def chardev(backend: str, **data: Any) -> dict[str, Any]:
    return {"id": "c", "backend": {"type": backend, "data": data}}


def channel(**address: Any) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": address}]}


FILE = {"node-name": "n", "driver": "file", "filename": "/x"}
CASES: list[tuple[tuple[str, dict[str, Any]], list[tuple[str, str]]]] = [
    # Objects of the command line's
    (("blockdev-add", FILE), [(ways.IMAGE, "/x")]),
    (("blockdev-add", {"driver": "raw", "file": {"driver": "file", "filename": "/x:y"}}), [(ways.IMAGE, "/x:y")]),
    (("blockdev-add", {"driver": "nbd", "server": {"type": "unix", "path": "/x"}}), [(ways.SOCKET, "/x")]),
    (("blockdev-reopen", {"options": [FILE, {**FILE, "filename": "/y"}]}), [(ways.IMAGE, "/x"), (ways.IMAGE, "/y")]),
    (("x-blockdev-reopen", FILE), [(ways.IMAGE, "/x")]),
    (("netdev_add", {"type": "user", "id": "n", "smb": "/x"}), [(ways.WRITE_DIRECTORY, "/x")]),
    (
        (
            "netdev_add",
            {
                "type": "user",
                "id": "n",
                "hostfwd": [{"str": "unix:/x/s-:22"}],
                "guestfwd": [{"str": "tcp:10.0.2.100:1-cmd:/x/p a"}, {"str": "tcp:10.0.2.100:2-unix:/x/t"}],
            },
        ),
        [(ways.MADE, "/x/s"), (ways.READ, "/x/p"), (ways.SOCKET, "/x/t")],
    ),
    (("blockdev-add", {"driver": "nvme", "device": "1:2.3", "namespace": 1}), [(ways.VFIO, "/sys/bus/pci/devices/0000:01:02.3")]),
    (("netdev_add", {"type": "tap", "id": "n", "fds": "a:b"}), [(ways.FD, "a"), (ways.FD, "b")]),
    (("netdev_add", {"type": "passt", "id": "n", "path": "/x", "param": [{"str": "-d"}]}), [(ways.PASST, "/x")]),
    (("netdev_add", {"type": "passt", "id": "n", "vhost-user": True}), [(ways.REFUSE, "passt")]),
    (("object-add", {"qom-type": "secret", "id": "s", "file": "/x"}), [(ways.READ, "/x")]),
    (("object-add", {"qom-type": "iommufd", "id": "i", "fd": "n"}), [(ways.FD, "n")]),
    (("device_add", {"driver": "loader", "file": "/x"}), [(ways.READ, "/x")]),
    (("device_add", {"driver": "virtio-net-pci", "romfile": "/x"}), [(ways.FIRMWARE, "/x")]),
    (("device_add", {"driver": "vhost-vsock-pci", "guest-cid": 3}), [(ways.OPEN, "/dev/vhost-vsock")]),
    (("device_add", {"driver": "vhost-vsock-pci", "vhostfd": "n"}), [(ways.FD, "n")]),
    ((HMP, {"command-line": "device_add vhost-vsock-pci,guest-cid=3"}), [(ways.OPEN, "/dev/vhost-vsock")]),
    (("object-add", {"qom-type": "iommufd", "id": "i"}), [(ways.OPEN, "/dev/iommu")]),
    (("object-add", {"qom-type": "monitor-qmp", "id": "m", "chardev": "c"}), [(ways.REFUSE, "monitor-qmp")]),
    (("device_add", {"driver": "usb-host", "hostdevice": "/x"}), [(ways.DEVICE, "/x")]),
    (("device_add", {"driver": "usb-host", "hostdevice": "/dev/fdset/1"}), []),
    (("device_add", {"driver": "usb-host", "hostbus": 1, "hostaddr": 2}), [(ways.USB, "/dev/bus/usb/001/002")]),
    (("device_add", {"driver": "vfio-pci", "host": "02:00.0"}), [(ways.VFIO, "/sys/bus/pci/devices/0000:02:00.0")]),
    (("device_add", {"driver": "vfio-pci", "sysfsdev": "/x", "host": "02:00.0"}), [(ways.VFIO, "/x")]),
    # Character devices
    (("chardev-add", chardev("socket", addr=unix("/x"))), [(ways.SOCKET, "/x")]),
    (("chardev-add", chardev("socket", addr={"type": "fd", "data": {"str": "n"}})), [(ways.FD, "n")]),
    (("chardev-add", chardev("socket", addr={"type": "inet", "data": {"host": "h", "port": "1"}})), []),
    (("chardev-add", {"id": "c", "backend": {"type": "socket", "addr": {"type": "unix", "path": "/x"}}}), [(ways.SOCKET, "/x")]),
    (("chardev-add", chardev("file", out="/x")), [(ways.WRITE, "/x")]),
    (("chardev-add", chardev("file", out="/x", append=True)), [(ways.APPEND, "/x")]),
    (
        ("chardev-add", {"id": "c", "backend": {"type": "file", "data": {"out": "/x", "in": "/y"}}}),
        [("write", "/x"), ("read", "/y")],
    ),
    (("chardev-add", chardev("null", logfile="/x")), [(ways.WRITE, "/x")]),
    (("chardev-add", chardev("null", logfile="/x", logappend=True)), [(ways.APPEND, "/x")]),
    (("chardev-add", chardev("serial", device="/x")), [(ways.DEVICE, "/x")]),
    (("chardev-add", chardev("parallel", device="/x")), [(ways.DEVICE, "/x")]),
    (("chardev-add", chardev("pipe", device="/x")), [(ways.PIPE, "/x")]),
    (("chardev-add", chardev("pty", path="/x")), [(ways.MADE, "/x")]),
    (("chardev-add", chardev("spicevmc", type="vdagent")), []),
    (("chardev-change", chardev("file", out="/x")), [(ways.WRITE, "/x")]),
    # Block jobs, snapshots and media
    (("blockdev-snapshot-sync", {"device": "d", "snapshot-file": "/x"}), [(ways.WRITE, "/x")]),
    (("blockdev-snapshot-sync", {"snapshot-file": "/x", "mode": "absolute-paths"}), [(ways.WRITE, "/x")]),
    (("blockdev-snapshot-sync", {"snapshot-file": "/x", "mode": "existing"}), [(ways.IMAGE, "/x")]),
    (("drive-mirror", {"device": "d", "target": "/x", "sync": "full"}), [(ways.WRITE, "/x")]),
    (("drive-mirror", {"device": "d", "target": "nbd:unix:/x", "mode": "existing"}), [(ways.SOCKET, "/x")]),
    (("drive-mirror", {"device": "d", "target": "nbd:host:1"}), []),
    (("drive-mirror", {"device": "d", "target": "/x", "mode": "existing"}), [(ways.IMAGE, "/x")]),
    (("drive-backup", {"device": "d", "target": "/x"}), [(ways.WRITE, "/x")]),
    (("drive-backup", {"device": "d", "target": "/x", "mode": "existing"}), [(ways.IMAGE, "/x")]),
    (("blockdev-change-medium", {"id": "d", "filename": "/x"}), [(ways.IMAGE, "/x")]),
    (("blockdev-change-medium", {"id": "d", "filename": 'json:{"driver":"file","filename":"/x"}'}), [(ways.IMAGE, "/x")]),
    (("blockdev-create", {"job-id": "j", "options": {"driver": "file", "filename": "/x", "size": 1}}), [(ways.WRITE, "/x")]),
    (("blockdev-create", {"job-id": "j", "options": {"driver": "host_device", "filename": "/x"}}), [(ways.DEVICE, "/x")]),
    (
        ("blockdev-create", {"options": {"driver": "gluster", "location": {"server": [{"type": "unix", "path": "/x"}]}}}),
        [(ways.SOCKET, "/x")],
    ),
    (("blockdev-create", {"options": {"driver": "gluster", "location": {"logfile": "/x"}}}), [(ways.APPEND, "/x")]),
    (("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": FILE}}), [(ways.IMAGE, "/x")]),
    (("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": "n"}}), []),
    (
        (
            "transaction",
            {
                "actions": [
                    {"type": "blockdev-snapshot-sync", "data": {"node-name": "n", "snapshot-file": "/x"}},
                    {"type": "abort", "data": {}},
                    {"type": "drive-backup", "data": {"device": "d", "target": "/y", "mode": "existing"}},
                ]
            },
        ),
        [(ways.WRITE, "/x"), (ways.IMAGE, "/y")],
    ),
    # Exports
    (("nbd-server-start", {"addr": unix("/x")}), [(ways.LISTEN, "/x")]),
    (("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "n"}}}), [(ways.FD, "n")]),
    (("block-export-add", {"type": "vhost-user-blk", "addr": {"type": "unix", "path": "/x"}}), [(ways.LISTEN, "/x")]),
    (("block-export-add", {"type": "fuse", "mountpoint": "/x"}), [(ways.REFUSE, "/x")]),
    (("block-export-add", {"type": "nbd", "node-name": "n"}), []),
    # Migration
    (("migrate", {"uri": "unix:/x"}), [(ways.SOCKET, "/x")]),
    (("migrate", {"uri": "fd:n"}), [(ways.FD, "n")]),
    (("migrate", {"uri": "exec:cat >/x"}), [(ways.RUN, "cat >/x")]),
    (("migrate", {"uri": "file:/x"}), [(ways.WRITE, "/x")]),
    (("migrate", {"uri": "file:/x,offset=0x1000"}), [(ways.APPEND, "/x")]),
    (("migrate", {"uri": "tcp:host:1"}), []),
    (("migrate", {"uri": "defer"}), []),
    (("migrate", channel(transport="socket", type="unix", path="/x")), [(ways.SOCKET, "/x")]),
    (("migrate", channel(transport="socket", type="fd", str="n")), [(ways.FD, "n")]),
    (("migrate", channel(transport="exec", args=["/bin/cat", "-u"])), [(ways.RUN, "/bin/cat")]),
    (("migrate", channel(transport="file", filename="/x", offset=0)), [(ways.WRITE, "/x")]),
    (("migrate", channel(transport="file", filename="/x", offset=9)), [(ways.APPEND, "/x")]),
    (("migrate-incoming", {"uri": "unix:/x"}), [(ways.MADE, "/x")]),
    (("migrate-incoming", channel(transport="socket", type="unix", path="/x")), [(ways.MADE, "/x")]),
    (("migrate-incoming", channel(transport="file", filename="/x", offset=0)), [(ways.READ, "/x")]),
    (("migrate-incoming", channel(transport="exec", args=["cat"])), [(ways.RUN, "cat")]),
    (("migrate-recover", {"uri": "unix:/x"}), [(ways.MADE, "/x")]),
    (("migrate-set-parameters", {"cpr-exec-command": ["/x", "-S"]}), [(ways.READ, "/x")]),
    # Files
    (("dump-guest-memory", {"paging": False, "protocol": "file:/x"}), [(ways.WRITE, "/x")]),
    (("dump-guest-memory", {"paging": False, "protocol": "fd:n"}), [(ways.FD, "n")]),
    (("dump-guest-memory", {"paging": False, "protocol": "exec:cat"}), []),
    *[
        ((name, {"filename": "/x"}), [(ways.WRITE, "/x")])
        for name in ("screendump", "memsave", "pmemsave", "dump-skeys", "xen-save-devices-state")
    ],
    (("xen-load-devices-state", {"filename": "/x"}), [(ways.READ, "/x")]),
    (("qom-set", {"path": "/machine", "property": "kernel", "value": "/x"}), [(ways.READ, "/x")]),
    (("qom-set", {"path": "d", "property": "romfile", "value": "/x"}), [(ways.FIRMWARE, "/x")]),
    (("qom-set", {"path": "d", "property": "guest-stats-polling-interval", "value": 1}), []),
    # Displays, fds
    (("display-update", {"type": "vnc", "addresses": [{"type": "unix", "path": "/x"}]}), [(ways.LISTEN, "/x")]),
    *[((name, {"fdname": "n"}), [(ways.NAME, "n")]) for name in ("getfd", "closefd", "add_client")],
    (("query-status", {}), []),
    (("change-backing-file", {"device": "d", "image-node-name": "n", "backing-file": "/x"}), []),
    (("block-commit", {"device": "d", "backing-file": "/x"}), []),
    # HMP
    (hmp("screendump /x"), [(ways.WRITE, "/x")]),
    (hmp("dump-guest-memory /x"), [(ways.WRITE, "/x")]),
    (hmp('memsave 0 1 "/x"'), [(ways.WRITE, "/x")]),
    (hmp('pmemsave 0 1 "/x"'), [(ways.WRITE, "/x")]),
    (("dumpdtb", {"filename": "/x"}), [(ways.MADE, "/x")]),
    (hmp("dumpdtb /x"), [(ways.MADE, "/x")]),
    (hmp("dump-skeys /x"), [(ways.WRITE, "/x")]),
    (hmp("logfile /x"), [(ways.WRITE, "/x")]),
    (hmp("trace-file set /x"), [(ways.WRITE, "/x")]),
    (hmp("wavcapture /x a"), [(ways.WRITE, "/x")]),
    (hmp("change ide1-cd0 /x"), [(ways.IMAGE, "/x")]),
    (hmp("change vnc passwd"), []),
    (hmp("drive_add 0 file=/x,if=none"), [(ways.IMAGE, "/x")]),
    (hmp("drive_add -n 0 driver=file,filename=/x,node-name=n"), [(ways.IMAGE, "/x")]),
    (hmp("drive_mirror d /x"), [(ways.WRITE, "/x")]),
    (hmp("drive_mirror -n d /x"), [(ways.IMAGE, "/x")]),
    (hmp("drive_backup -n d /x"), [(ways.IMAGE, "/x")]),
    (hmp("snapshot_blkdev -n d /x"), [(ways.IMAGE, "/x")]),
    (hmp("snapshot_blkdev d /x"), [(ways.WRITE, "/x")]),
    (hmp("netdev_add user,id=n,tftp=/x"), [(ways.DIRECTORY, "/x")]),
    (hmp("object_add secret,id=s,file=/x"), [(ways.READ, "/x")]),
    (hmp('object_add {"qom-type":"secret","id":"s","file":"/x"}'), [(ways.READ, "/x")]),
    (hmp("device_add loader,file=/x"), [(ways.READ, "/x")]),
    (hmp("chardev-add file,id=c,path=/x"), [(ways.WRITE, "/x")]),
    (hmp("chardev-change c file,path=/x"), [(ways.WRITE, "/x")]),
    (hmp("migrate -d unix:/x"), [(ways.SOCKET, "/x")]),
    (hmp("migrate_incoming unix:/x"), [(ways.MADE, "/x")]),
    (hmp("migrate_recover unix:/x"), [(ways.MADE, "/x")]),
    (hmp("nbd_server_start -a unix:/x"), [(ways.MADE, "/x")]),
    (hmp("nbd_server_start localhost:1"), []),
    (hmp("qom-set /machine kernel /x"), [(ways.READ, "/x")]),
    (hmp("gdbserver unix:/x,server"), [(ways.SOCKET, "/x")]),
    (hmp("info block"), []),
    (hmp("savevm x"), []),
]


@pytest.mark.parametrize(
    ("command", "expected"), CASES, ids=lambda value: json.dumps(value[1]) if isinstance(value, tuple) else ""
)
def test_needs(command: tuple[str, dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    needs = needs_of(*command)
    assert [(need.way, need.path) for need in needs] == expected
    for need in needs:
        assert need.describe().startswith(f"{command[0]} ")


@pytest.mark.parametrize(
    ("command", "expected"), CASES, ids=lambda value: json.dumps(value[1]) if isinstance(value, tuple) else ""
)
def test_spans_point_at_the_values(command: tuple[str, dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    text = spell(*command)
    for obj in read_command(command[0], text):
        for member in obj.members:
            if not obj.source and member.end and command[0] != HMP and text[member.start] == '"':
                assert json.loads(text[member.start : member.end]) == member.value or member.key == "read-only"


def test_every_row_has_a_case() -> None:
    hit = {id(need.row) for command, _ in CASES for need in needs_of(*command)}
    # Such a need has the row of the -chardev that it stands for.
    mine = [row for row in COMMAND_ROWS if row not in ROWS and row.kind != "gdbserver"]
    assert [(row.kind, row.key) for row in mine if id(row) not in hit] == []


def test_what_qemu_refuses_gives_no_objects() -> None:
    for text in ("", "{", "[]", '{"execute":"blockdev-add","arguments":{"filename":"\\q"}}', '{"execute":1}{'):
        assert read_command("blockdev-add", text) == ()
    odd: list[object] = [[], "x", 1, {"options": 1}, {"actions": {"type": 1}}, {"backend": "x"}, {"backend": []}]
    for arguments in odd:
        for name in ("blockdev-add", "blockdev-reopen", "transaction", "chardev-add", HMP, "migrate"):
            needs_of(name, arguments)


# --- names of fds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("netdev_add", {"type": "tap", "id": "n", "fd": "a", "vhostfd": "b"}, ["a", "b"]),
        ("netdev_add", {"type": "tap", "id": "n", "fds": "a:b", "vhostfds": "c:7"}, ["a", "b", "c"]),
        ("netdev_add", {"type": "tap", "id": "n", "fd": "7"}, []),
        ("netdev_add", {"type": "stream", "id": "n", "addr": {"type": "fd", "str": "a"}}, ["a"]),
        ("device_add", {"driver": "vhost-vsock-pci", "vhostfd": "a"}, ["a"]),
        ("device_add", {"driver": "vfio-pci", "fd": "a"}, ["a"]),
        ("device_add", {"driver": "virtio-net-pci", "ebpf-rss-fds": "a:b"}, ["a", "b"]),
        ("object-add", {"qom-type": "iommufd", "id": "i", "fd": "a"}, ["a"]),
        ("chardev-add", chardev("socket", addr={"type": "fd", "data": {"str": "a"}}), ["a"]),
        ("blockdev-add", {"driver": "nbd", "server": {"type": "fd", "str": "a"}}, ["a"]),
        ("blockdev-add", {"driver": "nbd", "server": {"type": "inet", "str": "a"}}, []),
        ("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "a"}}}, ["a"]),
        ("block-export-add", {"addr": {"type": "fd", "str": "a"}}, ["a"]),
        ("display-update", {"addresses": [{"type": "fd", "str": "a"}, {"type": "fd", "str": "b"}]}, ["a", "b"]),
        ("migrate", {"uri": "fd:a"}, ["a"]),
        ("migrate", {"uri": "file:/a"}, []),
        ("migrate", channel(transport="socket", type="fd", str="a"), ["a"]),
        ("migrate-incoming", {"uri": "fd:a"}, ["a"]),
        ("dump-guest-memory", {"protocol": "fd:a"}, ["a"]),
        ("add_client", {"protocol": "vnc", "fdname": "a"}, ["a"]),
        ("getfd", {"fdname": "a"}, ["a"]),
        ("closefd", {"fdname": "a"}, ["a"]),
        ("closefd", {"fdname": 1}, []),
        ("query-status", {"fd": "a"}, []),
        (HMP, {"command-line": "closefd a"}, []),
    ],
)
def test_names_of_fds(name: str, arguments: dict[str, Any], names: list[str]) -> None:
    text = spell(name, arguments)
    found = fd_names(name, text)
    assert [fd for _, _, fd in found] == names
    assert [text[start:end] for start, end, _ in found] == names


def quote(text: str, style: int) -> str:
    """Spell a JSON string in one of several ways."""
    if style == 0:
        return json.dumps(text)
    if style == 1:
        return json.dumps(text, ensure_ascii=False)
    return "'" + "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in text) + "'"


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0:\ufffe\uffff"), min_size=1, max_size=4), min_size=1),
    st.integers(0, 2),
    st.sampled_from(["fds", "vhostfds"]),
)
def test_names_are_found_through_escapes(names: list[str], style: int, key: str) -> None:
    text = f"{{'execute':'netdev_add','arguments':{{'type':'tap', '{key}': {quote(':'.join(names), style)} }}}}"
    if not read_command("netdev_add", text):
        return  # a character that QEMU's JSON does not take
    found = fd_names("netdev_add", text)
    wanted = [name for name in names if name[0] not in "0123456789"]
    assert [name for _, _, name in found] == wanted
    for (start, end, _), name in zip(found, wanted, strict=True):
        mark = text[end] if text[end] in "\"'" else '"' if style < 2 else "'"
        (need,) = find_command_needs(
            "closefd", read_command("closefd", f"{{'arguments':{{'fdname':{mark}{text[start:end]}{mark}}}}}")
        )
        assert need.path == name


# --- owners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "owner", "removed"),
    [
        ("blockdev-add", FILE, ("blockdev", "n"), None),
        ("blockdev-reopen", {"options": [FILE]}, ("blockdev", "n"), None),
        ("blockdev-reopen", {"options": [FILE, FILE]}, ("blockdev", ""), None),
        ("x-blockdev-reopen", FILE, ("blockdev", "n"), None),
        ("blockdev-del", {"node-name": "n"}, None, ("blockdev", "n")),
        ("blockdev-del", {}, None, None),
        ("netdev_add", {"id": "n"}, ("netdev", "n"), None),
        ("netdev_del", {"id": "n"}, None, ("netdev", "n")),
        ("object-add", {"id": "n"}, ("object", "n"), None),
        ("object-del", {"id": "n"}, None, ("object", "n")),
        ("chardev-add", chardev("null"), ("chardev", "c"), None),
        ("chardev-change", chardev("null"), ("chardev", "c"), ("chardev", "c")),
        ("chardev-remove", {"id": "c"}, None, ("chardev", "c")),
        ("device_add", {"id": "d"}, ("device", "d"), None),
        ("device_add", {"driver": "d"}, ("device", ""), None),
        ("device_del", {"id": "d"}, None, None),
        ("blockdev-change-medium", {"id": "d"}, ("medium", "d"), ("medium", "d")),
        ("eject", {"device": "d"}, None, ("medium", "d")),
        ("blockdev-remove-medium", {"id": "d"}, None, ("medium", "d")),
        ("drive-backup", {"device": "d"}, ("job", "d"), None),
        ("drive-mirror", {"job-id": "j", "device": "d"}, ("mirror", "j"), None),
        ("blockdev-create", {"job-id": "j"}, ("job", "j"), None),
        ("nbd-server-start", {}, ("nbd-server", ""), None),
        ("nbd-server-stop", {}, None, ("nbd-server", "")),
        ("migrate", {"uri": "x"}, ("migration", ""), ("migration", "")),
        ("screendump", {"filename": "/x"}, None, None),
        ("query-status", {}, None, None),
        ("transaction", {"actions": [{"type": "drive-backup", "data": {"device": "d"}}, {"type": "abort"}]}, ("job", "d"), None),
        ("transaction", {"actions": [{"type": "drive-backup", "data": {"device": d}} for d in "ab"]}, ("transaction", ""), None),
        ("transaction", {"actions": 1}, None, None),
        (HMP, {"command-line": "netdev_add user,id=n"}, ("netdev", "n"), None),
        (HMP, {"command-line": "netdev_del n"}, None, ("netdev", "n")),
        (HMP, {"command-line": "object_del n"}, None, ("object", "n")),
        (HMP, {"command-line": "drive_add 0 if=none,id=x"}, ("drive", "x"), None),
        (HMP, {"command-line": "drive_del x"}, None, ("drive", "x")),
        (HMP, {"command-line": "change d /x"}, ("medium", "d"), ("medium", "d")),
        (HMP, {"command-line": "eject -f d"}, None, ("medium", "d")),
        (HMP, {"command-line": "chardev-change c null"}, ("chardev", "c"), ("chardev", "c")),
        (HMP, {"command-line": "info block"}, None, None),
        (HMP, {}, None, None),
    ],
)
def test_owners(name: str, arguments: dict[str, Any], owner: object, removed: object) -> None:
    assert owner_of(name, arguments) == owner
    assert removed_by(name, arguments) == removed


@pytest.mark.parametrize(
    ("name", "data", "owner"),
    [
        ("DEVICE_DELETED", {"device": "d", "path": "/x"}, ("device", "d")),
        ("DEVICE_DELETED", {"path": "/x"}, None),
        ("BLOCK_EXPORT_DELETED", {"id": "e"}, ("export", "e")),
        ("BLOCK_JOB_COMPLETED", {"type": "backup", "device": "j"}, ("job", "j")),
        ("BLOCK_JOB_COMPLETED", {"type": "mirror", "device": "j"}, None),
        ("BLOCK_JOB_CANCELLED", {"type": "mirror", "device": "j"}, ("mirror", "j")),
        ("JOB_STATUS_CHANGE", {"id": "j", "status": "concluded"}, ("job", "j")),
        ("JOB_STATUS_CHANGE", {"id": "j", "status": "running"}, None),
        ("MIGRATION", {"status": "completed"}, ("migration", "")),
        ("MIGRATION", {"status": "active"}, None),
        ("SHUTDOWN", {}, None),
    ],
)
def test_events_that_remove(name: str, data: dict[str, Any], owner: object) -> None:
    assert removed_by_event(name, data) == owner


# --- the schema of each QEMU that is here -----------------------------------------------------------------------------

PATH_LIKE = re.compile(
    r"file|path|fd|^dev$|devname|evdev|hostdev|vhostdev|device|uri$|url|^str$|^dir$|rootdir|target|mountpoint|^socket$|^sock$|cert|"
    r"helper|script$|protocol|^conf$|config|^log$|smb$|tftp$|command|^args$"
)
_NODE, _DEVICE = "the name of a node", "the name of a device inside QEMU"
_NETWORK = "an address of the network"
_TAP = "run outside with the tap"
# Command (or "*") and last word of the key -> why it is none of the host's resources, or whose work it is.
HARMLESS = {
    ("*", "device"): _DEVICE,
    ("*", "devices"): _DEVICE,
    ("blockdev-add", "file"): _NODE,
    ("blockdev-add", "target"): _NODE,
    ("blockdev-add", "data-file"): _NODE,
    ("blockdev-add", "log"): _NODE,
    ("blockdev-add", "url"): _NETWORK,
    ("blockdev-backup", "target"): _NODE,
    ("blockdev-mirror", "target"): _NODE,
    ("block-dirty-bitmap-merge", "target"): _NODE,
    ("block-commit", "backing-file"): "a string for the image's header",
    ("block-stream", "backing-file"): "a string for the image's header",
    ("change-backing-file", "backing-file"): "a string for the image's header",
    ("blockdev-create", "backing-file"): "a string for the image's header",
    ("client_migrate_info", "protocol"): "spice or vnc",
    ("client_migrate_info", "cert-subject"): "a certificate's subject",
    ("add_client", "protocol"): "spice, vnc, or a character device",
    ("qom-set", "path"): "a path of QEMU's object tree",
    ("qom-get", "path"): "a path of QEMU's object tree",
    ("qom-list", "path"): "a path of QEMU's object tree",
    ("qom-list-get", "paths"): "paths of QEMU's object tree",
    ("x-query-virtio", "path"): "a path of QEMU's object tree",
    ("cxl-*", "path"): "a path of QEMU's object tree",
    ("netdev_add", "bootfile"): "a name inside the tftp directory, for the guest",
    ("netdev_add", "tftp-server-name"): "a string for the guest",
    ("netdev_add", "devname"): "an interface (netmap)",
    ("netdev_add", "script"): _TAP,
    ("netdev_add", "downscript"): _TAP,
    ("netdev_add", "helper"): _TAP,
    ("object-add", "indev"): "a character device",
    ("object-add", "outdev"): "a character device",
    ("object-add", "notify_dev"): "a character device",
    ("object-add", "mrconfigid"): "tdx-guest: a digest of its configuration, in base64",
    ("object-add", "mrownerconfig"): "tdx-guest: a digest of its owner's configuration, in base64",
    ("input-send-event", "device"): _DEVICE,
    ("human-monitor-command", "command-line"): "read by cmdline/hmp.py",
}
# The last words of keys that are the same wherever they stand.
HARMLESS_KEYS = {
    "dnssearch.str": "a name for the guest",
}
# Block drivers, address families and object types with a member that only looks like a path of the host.
HARMLESS_TAGS = {
    ("ssh", "path"): "remote",
    ("nfs", "path"): "remote",
    ("gluster", "path"): "remote",
    ("sheepdog", "path"): "remote",
    ("iscsi", "target"): "remote",
    ("http", "filename"): "remote",
    ("x-vfio-user-server", "device"): _DEVICE,
    ("udp", "path"): "QEMU has no datagrams but of the network",
}


class Told(NamedTuple):
    """What a QEMU says of its commands."""

    schema: list[dict[str, Any]]
    help: str


@cache
def ask(binary: str) -> Told:
    """Start a QEMU without a machine, and ask it."""
    with running([binary]) as qemu:
        return Told(qemu.qmp.execute("query-qmp-schema"), qemu.qmp.hmp("help"))


BINARIES = sorted(path for path in glob.glob("/usr/bin/qemu-system-*") if not path.endswith("-microvm"))


class Schema:
    """query-qmp-schema, walked."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self.types = {entity["name"]: entity for entity in entities}

    def leaves(self) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """Yield each string that a command takes: command, arguments with it and the tags on its way, and its key."""
        for entity in self.types.values():
            if entity["meta-type"] == "command":
                yield from ((entity["name"], *leaf) for leaf in self._walk(entity["arg-type"], frozenset()))

    def _walk(self, name: str, above: frozenset[str]) -> Iterator[tuple[Any, list[str]]]:
        entity = self.types[name]
        match entity["meta-type"]:
            case "builtin" if entity["json-type"] == "string":
                yield "/probe", []
            case "array":
                yield from (([value], key) for value, key in self._walk(entity["element-type"], above))
            case "alternate":
                for member in entity["members"]:
                    yield from self._walk(member["type"], above)
            case "object" if name not in above:
                tag = entity.get("tag")
                for member in entity["members"]:
                    if member["name"] != tag:
                        for value, key in self._walk(member["type"], above | {name}):
                            yield {member["name"]: value}, [member["name"], *key]
                for variant in entity.get("variants", ()):
                    for value, key in self._walk(variant["type"], above | {name}):
                        yield {tag: variant["case"], **value}, key


def tags_of(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from tags_of(inner)
    elif isinstance(value, list):
        yield from tags_of(value[0])
    elif isinstance(value, str):
        yield value


# What a string of these commands may be but a path.
ADDRESSES = {
    **dict.fromkeys(
        ("migrate", "migrate-incoming", "migrate-recover", "dump-guest-memory"), ("/probe", "file:/probe", "fd:/probe")
    ),
    "netdev_add": ("/probe", "unix:/probe-:22", "tcp:10.0.2.100:1-unix:/probe"),
}


def is_harmless(command: str, key: list[str], value: object) -> bool:
    last = key[-1]
    if ".".join(key[-2:]) in HARMLESS_KEYS or (command == "transaction" and (str(value["actions"][0]["type"]), last) in HARMLESS):  # type: ignore[index]
        return True
    if key[-2:] == ["server", "path"]:
        return False
    name = "blockdev-add" if command in ("blockdev-reopen", "blockdev-create") and (command, last) not in HARMLESS else command
    name = "x-query-virtio" if command.startswith("x-query-virtio") else name
    name = "cxl-*" if command.startswith("cxl-") else name
    return (name, last) in HARMLESS or ("*", last) in HARMLESS or any((tag, last) in HARMLESS_TAGS for tag in tags_of(value))


def is_handled(command: str, value: dict[str, Any]) -> bool:
    def to_text(inner: object) -> object:
        if isinstance(inner, dict):
            return {key: to_text(item) for key, item in inner.items()}
        if isinstance(inner, list):
            return [to_text(item) for item in inner]
        return inner

    forms = ADDRESSES.get(command, ("/probe",))
    spelled = [json.loads(json.dumps(to_text(value)).replace("/probe", form)) for form in forms]
    return any(needs_of(command, arguments) for arguments in spelled)


@pytest.mark.parametrize("binary", BINARIES)
def test_every_command_that_names_the_host_is_in_the_table(binary: str) -> None:
    left = sorted(
        {
            f"{command} {'.'.join(key)} {[tag for tag in tags_of(value) if tag != '/probe']}"
            for command, value, key in Schema(ask(binary).schema).leaves()
            if key and PATH_LIKE.search(key[-1]) and not is_harmless(command, key, value) and not is_handled(command, value)
        }
    )
    assert left == []


# HMP commands whose help speaks of a file, a path, an address or an fd, and that name none of the host's.
HARMLESS_HMP = {
    "closefd": "a name",
    "getfd": "a name; a line has no fd with it",
    "hostfwd_add": _NETWORK,
    "hostfwd_remove": _NETWORK,
    "client_migrate_info": _NETWORK,
    "qom-get": "a path of QEMU's object tree",
    "qom-list": "a path of QEMU's object tree",
    "nbd_server_add": "NBD's own names",
    "nbd_server_remove": "NBD's own names",
    "qemu-io": "a device inside QEMU",
    "balloon": "an amount of memory",
    "commit": "a device inside QEMU",
    "snapshot_blkdev_internal": "a snapshot inside an image",
    "snapshot_delete_blkdev_internal": "a snapshot inside an image",
    **{f"block_job_{what}": _DEVICE for what in ("cancel", "complete", "pause", "resume", "set_speed")},
    **dict.fromkeys(("block_resize", "block_set_io_throttle", "block_stream", "device_del", "boot_set"), _DEVICE),
    **dict.fromkeys(("ringbuf_read", "ringbuf_write"), _DEVICE),
}


@pytest.mark.parametrize("binary", BINARIES)
def test_every_hmp_command_with_a_file_is_in_the_table(binary: str) -> None:
    entries = re.findall(r"^(\S+) (.*?) -- ", ask(binary).help.replace("\r", ""), re.MULTILINE | re.DOTALL)
    assert len(entries) > 50
    speaks = re.compile(r"file|path|\buri\b|device|args|prop=|host|fd\b|target|type=")
    left = {name for name, params in entries if speaks.search(params.rpartition("\n\n")[2])} - set(COMMANDS) - set(HARMLESS_HMP)
    assert left == set()


def test_hmp_has_no_grammar_that_cannot_be_read() -> None:
    for name in COMMANDS:
        parse_hmp(f"{name} a b c d")
