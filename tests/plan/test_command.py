"""Plans of QMP commands on made-up hosts: what is granted, and what QEMU gets to read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.catalogue.commands import HMP, find_command_needs, read_command
from qemu_userns.catalogue.ways import FDS_PER_COMMAND, OWN_FDSET_BASE
from qemu_userns.plan.command import CommandPlan, build_command_plan
from qemu_userns.plan.facts import ImageFact
from qemu_userns.plan.grants import Bind, Run
from qemu_userns.plan.plan import READ_ONLY_HOST, WHOLE_HOST
from tests.plans import LEASED, USER, MadeUpPaths, brief, make_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST = 7
FDSET = f"/dev/fdset/{OWN_FDSET_BASE + FIRST}"
NAME = f"qemu-userns.{FIRST}"


def plan_text(name: str, text: str, root: bool = False, images: Mapping[str, Any] | None = None, **options: Any) -> CommandPlan:
    objects = read_command(name, text)
    needs = find_command_needs(name, objects)
    facts = make_facts(root, images=images).replace(paths=MadeUpPaths(root))
    return build_command_plan(name, text, objects, needs, facts, LEASED if root else USER, FIRST, **options)


def plan(name: str, arguments: object, root: bool = False, **options: Any) -> CommandPlan:
    return plan_text(name, json.dumps({"execute": name, "arguments": arguments, "id": 1}), root, **options)


def asked(found: CommandPlan) -> list[str]:
    return [" ".join(("run", *grant.argv)) if isinstance(grant, Run) else brief(grant) for grant in found.grants]


def refused(found: CommandPlan) -> str:
    (refusal, *_) = found.find_refusals()
    return f"{refusal.why}: {refusal.reason} ({refusal.hint})"


def arguments_of(found: CommandPlan) -> Any:
    message = json.loads(found.text)
    assert (message["execute"], message["id"]) == (found.name, 1)
    return message["arguments"]


def node(path: str, **more: object) -> dict[str, object]:
    return {"node-name": "n", "driver": "file", "filename": path, **more}


def unix(path: str, **more: object) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path, **more}}


def chardev(addr: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {"id": "c", "backend": {"type": "socket", "data": {"addr": addr, **data}}}


def channel(**address: Any) -> dict[str, Any]:
    return {"channels": [{"channel-type": "main", "addr": address}]}


# --- path first -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "grants"),
    [
        ("blockdev-add", node("/x/file"), ["rw /x/file"]),
        ("blockdev-add", node("/x/file", **{"read-only": True}), ["ro /x/file"]),
        ("blockdev-add", node("/x/new"), []),
        ("blockdev-add", node("/dev/fdset/4"), []),
        ("blockdev-add", node("/dev/fd/4"), []),
        ("blockdev-add", node("/x/block"), ["device /x/block"]),
        ("netdev_add", {"type": "user", "id": "n", "tftp": "/x/dir"}, ["ro /x/dir"]),
        ("object-add", {"qom-type": "memory-backend-file", "id": "m", "mem-path": "/x/new"}, ["create /x/new"]),
        ("object-add", {"qom-type": "rng-random", "id": "r", "filename": "/x/char"}, ["device /x/char"]),
        ("device_add", {"driver": "loader", "file": "/x/file"}, ["ro /x/file"]),
        ("device_add", {"driver": "vhost-vsock-pci", "vhostfd": "9"}, []),
        ("chardev-add", chardev(unix("/x/sock"), server=False), ["rw /x/sock"]),
        ("chardev-add", {"id": "c", "backend": {"type": "file", "data": {"out": "/x/new"}}}, ["create /x/new"]),
        ("blockdev-snapshot-sync", {"device": "d", "snapshot-file": "/x/new"}, ["create /x/new"]),
        ("drive-mirror", {"device": "d", "target": "/x/file", "mode": "existing"}, ["rw /x/file"]),
        ("blockdev-create", {"job-id": "j", "options": {"driver": "file", "filename": "/x/new"}}, ["create /x/new"]),
        ("screendump", {"filename": "/x/new"}, ["create /x/new"]),
        ("screendump", {"filename": "/x/file"}, ["rw /x/file"]),
        ("migrate", {"uri": "unix:/x/sock"}, ["rw /x/sock"]),
        ("migrate", {"uri": "fd:n"}, []),
        ("migrate", {"uri": "tcp:host:1"}, []),
        ("migrate-incoming", {"uri": "unix:/x/new"}, ["rw /x"]),
        ("closefd", {"fdname": "n"}, []),
        ("block-export-add", {"type": "nbd", "node-name": "n"}, []),
        (HMP, {"command-line": "screendump /x/new"}, ["create /x/new"]),
        (HMP, {"command-line": "change ide1-cd0 /x/file"}, ["rw /x/file"]),
        (HMP, {"command-line": "migrate -d unix:/x/sock"}, ["rw /x/sock"]),
        (HMP, {"command-line": "gdbserver unix:/x/new,server"}, ["rw /x"]),
        (HMP, {"command-line": "info block"}, []),
    ],
)
def test_what_qemu_may_open_is_shown_at_its_path(name: str, arguments: dict[str, Any], grants: list[str]) -> None:
    found = plan(name, arguments)
    assert asked(found) == grants
    assert found.text == json.dumps({"execute": name, "arguments": arguments, "id": 1})
    assert not found.find_refusals()
    assert (found.find_fdsets(), found.find_names()) == ((), ())


def test_a_file_of_the_chain_is_shown() -> None:
    images = {"/x/file": (ImageFact("/x/file-base", "qcow2", "backing", "/x/file", True),)}
    assert asked(plan("blockdev-add", {"driver": "qcow2", "file": node("/x/file")}, images=images)) == [
        "rw /x/file",
        "rw /x/file-base",
    ]


# --- fdsets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "after"),
    [
        ("blockdev-add", node("/x/file-root"), node(FDSET)),
        ("blockdev-reopen", {"options": [node("/x/file-root")]}, {"options": [node(FDSET)]}),
        ("blockdev-change-medium", {"id": "d", "filename": "/x/file-root"}, {"id": "d", "filename": FDSET}),
        ("drive-mirror", {"target": "file:/x/file-root", "mode": "existing"}, {"target": f"file:{FDSET}", "mode": "existing"}),
        (
            "transaction",
            {"actions": [{"type": "drive-backup", "data": {"target": "/x/file-root", "mode": "existing"}}]},
            {"actions": [{"type": "drive-backup", "data": {"target": FDSET, "mode": "existing"}}]},
        ),
        (HMP, {"command-line": 'change ide1-cd0  "/x/file-root" raw'}, {"command-line": f"change ide1-cd0  {FDSET} raw"}),
        (
            HMP,
            {"command-line": "drive_add 0 if=none,file=/x/file-root,id=d"},
            {"command-line": f"drive_add 0 if=none,file={FDSET},id=d"},
        ),
        (
            HMP,
            {"command-line": 'drive_add -n 0 "driver=file,filename=/x/file-root é,node-name=n"'},
            {"command-line": f"drive_add -n 0 driver=file,filename={FDSET},node-name=n"},
        ),
    ],
)
def test_a_root_owned_disk_comes_in_an_fdset(name: str, arguments: dict[str, Any], after: object) -> None:
    found = plan(name, arguments, root=True)
    path = "/x/file-root é" if "é" in str(arguments) else "/x/file-root"
    assert asked(found) == [f"open {path} r", f"open {path} rw"]
    assert arguments_of(found) == after
    assert found.find_fdsets() == tuple((OWN_FDSET_BASE + FIRST, number, path) for number in (0, 1))


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        (node("/x/file-root", **{"auto-read-only": True}), node(FDSET, **{"auto-read-only": False})),
        (
            {"driver": "raw", "file": node("/x/file-root", **{"auto-read-only": True}), "auto-read-only": True},
            {"driver": "raw", "file": node(FDSET, **{"auto-read-only": False}), "auto-read-only": True},
        ),
        (node("/x/file", **{"auto-read-only": True}), node("/x/file", **{"auto-read-only": True})),
    ],
)
def test_a_disk_in_an_fdset_is_opened_read_write_at_once(arguments: dict[str, Any], after: object) -> None:
    assert arguments_of(plan("blockdev-add", arguments, root="-root" in str(arguments))) == after


def test_two_disks_have_two_fdsets() -> None:
    found = plan("blockdev-reopen", {"options": [node("/x/file-root1"), node("/x/file-root2")]}, root=True)
    assert [fdset - OWN_FDSET_BASE - FIRST for fdset, _, _ in found.find_fdsets()] == [0, 0, 1, 1]
    assert [number for _, number, _ in found.find_fdsets()] == [0, 1, 2, 3]


def test_a_command_takes_no_number_of_the_next_one() -> None:
    def refusals(count: int) -> int:
        nodes = [node(f"/x/file-root{number}") for number in range(count)]
        return len(plan("blockdev-reopen", {"options": nodes}, root=True).find_refusals())

    assert (refusals(FDS_PER_COMMAND // 2), refusals(FDS_PER_COMMAND // 2 + 1)) == (0, 1)


def test_the_backing_file_of_a_disk_in_an_fdset_is_named() -> None:
    images = {"/x/file-root": (ImageFact("/x/file-base", "qcow2", "backing", "/x/file-root", True),)}
    disk = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/x/file-root"}}
    after = arguments_of(plan("blockdev-add", disk, root=True, images=images))
    assert after["file"]["filename"] == FDSET
    assert after["backing"] == {"driver": "qcow2", "file": {"driver": "file", "filename": "/x/file-base"}}
    medium = {"id": "d", "filename": "/x/file-root"}
    assert arguments_of(plan("blockdev-change-medium", medium, root=True, images=images)) == {"id": "d", "filename": FDSET}


# --- sockets and programs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "grants", "after"),
    [
        (
            "chardev-add",
            chardev(unix("/x/new"), server=True, wait=False),
            ["listen /x/new"],
            chardev({"type": "fd", "data": {"str": NAME}}, server=True, wait=False),
        ),
        (
            "chardev-add",
            chardev(unix("/x/new", tight=True, abstract=False)),
            ["listen /x/new"],
            chardev({"type": "fd", "data": {"str": NAME}}),
        ),
        (
            "chardev-add",
            chardev(unix("/x/sock-root"), server=False),
            ["connect /x/sock-root"],
            chardev({"type": "fd", "data": {"str": NAME}}, server=False),
        ),
        ("nbd-server-start", {"addr": unix("/x/new")}, ["listen /x/new"], {"addr": {"type": "fd", "data": {"str": NAME}}}),
        (
            "block-export-add",
            {"type": "vhost-user-blk", "addr": {"path": "/x/new", "type": "unix"}},
            ["listen /x/new"],
            {"type": "vhost-user-blk", "addr": {"str": NAME, "type": "fd"}},
        ),
        (
            "blockdev-add",
            {"driver": "nbd", "server": {"type": "unix", "path": "/x/sock-root"}},
            ["connect /x/sock-root"],
            {"driver": "nbd", "server": {"type": "fd", "str": NAME}},
        ),
        ("migrate", {"uri": "unix:/x/sock-root"}, ["connect /x/sock-root"], {"uri": f"fd:{NAME}"}),
        (
            "migrate",
            channel(transport="socket", type="unix", path="/x/sock-root"),
            ["connect /x/sock-root"],
            channel(transport="socket", type="fd", str=NAME),
        ),
        ("migrate", {"uri": "exec:cat >/x"}, ["run /bin/sh -c cat >/x"], {"uri": f"fd:{NAME}"}),
        ("migrate-incoming", {"uri": "exec:cat /x"}, ["run /bin/sh -c cat /x"], {"uri": f"fd:{NAME}"}),
        (
            "migrate",
            channel(transport="exec", args=["/bin/tee", "a]b", "c"]),
            ["run /bin/tee a]b c"],
            channel(transport="socket", type="fd", str=NAME),
        ),
    ],
)
def test_a_socket_is_passed_by_name(name: str, arguments: dict[str, Any], grants: list[str], after: object) -> None:
    found = plan(name, arguments, root=True)
    assert asked(found) == grants
    assert arguments_of(found) == after
    assert found.find_names() == ((NAME, 0),)


def test_an_address_may_be_spelled_anyhow() -> None:
    text = "{ 'execute' : 'x',\n 'arguments':{'addr':{'data' : { 'abstract':false , 'path':'/x/new' } ,'type': 'unix'}}}"
    after = "{ 'execute' : 'x',\n 'arguments':{'addr':{'data' : { \"str\":\"%s\" } ,'type': \"fd\"}}}"
    found = plan_text("nbd-server-start", text, root=True)
    assert found.text.replace(" ", "") == (after % NAME).replace(" ", "")
    text = "{'execute':'migrate','arguments':{'channels':[{'addr':{ 'args' : [ 'cat' ] , 'transport':'exec'}}]}}"
    assert f'"type":"fd","str":"{NAME}" , ' in plan_text("migrate", text).text


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "node", "key"),
    [
        ("device_add", {"driver": "vhost-vsock-pci", "guest-cid": 3}, "/dev/vhost-vsock", "vhostfd"),
        ("device_add", {"guest-cid": 3, "driver": "vhost-vsock-ccw"}, "/dev/vhost-vsock", "vhostfd"),
        ("object-add", {"qom-type": "iommufd", "id": "i"}, "/dev/iommu", "fd"),
    ],
)
def test_a_device_node_is_passed_by_name(name: str, arguments: dict[str, Any], node: str, key: str) -> None:
    for root in (True, False):
        found = plan(name, arguments, root)
        assert asked(found) == [f"open {node} rw alone"]
        assert arguments_of(found) == {**arguments, key: NAME}
        assert (found.find_fdsets(), found.find_names()) == ((), ((NAME, 0),))


def test_a_vdpa_node_is_passed_by_name_in_place_of_its_path() -> None:
    found = plan("netdev_add", {"type": "vhost-vdpa", "id": "n", "vhostdev": "/dev/vhost-vdpa-0"})
    assert asked(found) == ["open /dev/vhost-vdpa-0 rw alone"]
    assert arguments_of(found) == {"type": "vhost-vdpa", "id": "n", "vhostfd": NAME}


def test_hmp_has_no_names_so_the_node_is_shown() -> None:
    arguments = {"command-line": "device_add vhost-vsock-pci,guest-cid=3"}
    found = plan(HMP, arguments)
    assert (asked(found), arguments_of(found), found.find_names()) == (["device /dev/vhost-vsock"], arguments, ())


def test_a_usb_device_is_named_by_its_node() -> None:
    after = {"driver": "usb-host", "id": "u", "hostdevice": "/dev/bus/usb/001/002"}
    for arguments in (
        {"driver": "usb-host", "hostbus": 1, "hostaddr": 2, "id": "u"},
        {"hostaddr": 2, "hostbus": 1, "driver": "usb-host", "id": "u"},
        {"driver": "usb-host", "id": "u", "hostaddr": 2, "hostbus": 1},
    ):
        found = plan("device_add", arguments)
        assert (asked(found), arguments_of(found)) == (["device /dev/bus/usb/001/002"], after)
    found = plan(HMP, {"command-line": "device_add usb-host,hostbus=1,hostaddr=2,id=u"})
    assert arguments_of(found) == {"command-line": "device_add usb-host,id=u,hostdevice=/dev/bus/usb/001/002"}


@pytest.mark.parametrize(
    ("more", "grants"),
    [
        ({"sysfsdev": "/sys/x"}, ["ro /sys/x", "device /dev/vfio/vfio", "device /dev/vfio/01"]),
        ({"sysfsdev": "/nowhere"}, []),
    ],
)
def test_the_nodes_of_vfio(more: dict[str, Any], grants: list[str]) -> None:
    found = plan("device_add", {"driver": "vfio-pci", **more})
    assert (asked(found), found.text) == (
        grants,
        json.dumps({"execute": "device_add", "arguments": arguments_of(found), "id": 1}),
    )


def test_for_iommufd_the_devices_own_node_is_passed_by_name() -> None:
    arguments = {"driver": "vfio-pci", "sysfsdev": "/sys/x", "iommufd": "i"}
    found = plan("device_add", arguments)
    assert asked(found) == ["ro /sys/x", "open /dev/vfio/devices/vfio0 rw alone"]
    assert arguments_of(found) == {**arguments, "fd": NAME}
    hmp = {"command-line": "device_add vfio-pci,sysfsdev=/sys/x,iommufd=i"}
    found = plan(HMP, hmp)
    assert (asked(found), arguments_of(found)) == (["ro /sys/x", "device /dev/vfio/devices/vfio0"], hmp)


def test_root_makes_the_nodes_that_qemu_may_not_open_anew() -> None:
    found = plan("device_add", {"driver": "vfio-pci", "sysfsdev": "/sys/x"}, root=True)
    assert asked(found) == ["ro /sys/x", "device /dev/vfio/vfio", "node /dev/vfio/01"]


def test_of_a_mediated_device_its_bus_is_shown_too() -> None:
    found = plan("device_add", {"driver": "vfio-pci", "sysfsdev": "/sys/x-mdev"})
    assert asked(found)[:2] == ["ro /sys/x-mdev", "ro /sys/x-mdev/subsystem"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("blockdev-add", node("/x/file-deny"), "Could not open '/x/file-deny': Permission denied"),
        ("device_add", {"driver": "loader", "file": "/x/file-deny"}, "Could not open '/x/file-deny': Permission denied"),
        (
            "device_add",
            {"driver": "vfio-pci", "sysfsdev": "/sys/other"},
            "device_add sysfsdev /sys/other: the device is driven by other, not by vfio-pci (bind it: driverctl",
        ),
        (
            "device_add",
            {"driver": "vfio-pci", "sysfsdev": "/sys/other-old", "iommufd": "i"},
            "device_add sysfsdev /sys/other-old: the device is driven by other, not by vfio-pci (bind it: driverctl",
        ),
        (
            "device_add",
            {"driver": "vfio-pci", "sysfsdev": "/sys/old", "iommufd": "i"},
            "device_add sysfsdev /sys/old: the device has no node of its own, by which iommufd takes it (load vfio-pci",
        ),
        (
            "device_add",
            {"driver": "vfio-pci", "sysfsdev": "/sys/alone"},
            "device_add sysfsdev /sys/alone: the device is in no iommu group (switch the IOMMU on",
        ),
        (
            "device_add",
            {"driver": "vfio-pci", "sysfsdev": "/sys/mates"},
            "device_add sysfsdev /sys/mates: iommu group 01 is not viable: e1000e drives 0000:01:00.1, which is in it too",
        ),
        ("device_add", {"driver": "usb-host", "vendorid": 1}, "device_add usb-host: QEMU would look for the USB device in /sys"),
        ("screendump", {"filename": "/x/dir"}, "screendump filename /x/dir: Is a directory"),
        ("screendump", {"filename": "/x-root/new-root"}, "screendump filename /x-root/new-root: Permission denied"),
        ("block-export-add", {"type": "fuse", "mountpoint": "/x"}, "block-export-add mountpoint: a FUSE export would be mounted"),
        (
            HMP,
            {"command-line": "migrate exec:cat"},
            "human-monitor-command uri: a program is run outside for the QMP command only",
        ),
    ],
)
def test_refusals(name: str, arguments: dict[str, Any], error: str) -> None:
    assert refused(plan(name, arguments)).startswith(error)


@pytest.mark.parametrize("name", ["blockdev-add", "device_add", "object-add", "migrate-incoming", "chardev-add", "screendump"])
def test_what_is_not_there_qemu_says_itself(name: str) -> None:
    arguments = {
        "device_add": {"driver": "loader", "file": "/x/new"},
        "object-add": {"qom-type": "secret", "id": "s", "file": "/x/new"},
        "chardev-add": chardev(unix("/x/new"), server=False),
    }.get(name, {"filename": "/x/new", "driver": "file"})
    found = plan(name, arguments)
    assert not found.find_refusals()
    assert [grant for grant in found.grants if isinstance(grant, Bind)] == []


def test_a_root_owned_socket_is_qemus_own_for_hmp() -> None:
    line = "chardev-add socket,id=c,path=/x/sock-root"
    found = plan(HMP, {"command-line": line}, root=True)
    assert asked(found) == ["ro /x/sock-root as owner"]
    assert "may not connect to it" in refused(plan(HMP, {"command-line": line}))


# --- the plan itself --------------------------------------------------------------------------------------------------


def test_a_plan_describes_itself_and_its_layout() -> None:
    found = plan("blockdev-add", node("/x/file"))
    assert found.describe() == "blockdev-add: /x/file (rw)"
    assert [placed.path for placed in found.build_layout()] == ["/x/file"]
    assert [placed.path for placed in plan("blockdev-add", node("/x/file"), host_tree=READ_ONLY_HOST).build_layout()] == [
        "/x/file"
    ]
    assert plan("blockdev-add", node("/x/file"), host_tree=WHOLE_HOST).build_layout() == ()
    assert "run outside" in plan("migrate", {"uri": "exec:cat"}).describe()


PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0/:\ufffe\uffff"), min_size=1, max_size=8)


@settings(deadline=None)
@given(PATHS)
def test_any_name_is_replaced_in_any_place(name: str) -> None:
    path = f"/x-root/{name}/file-root"
    for ensure_ascii in (True, False):
        text = json.dumps({"execute": "x", "arguments": node(path)}, ensure_ascii=ensure_ascii)
        if read_command("blockdev-add", text):
            assert json.loads(plan_text("blockdev-add", text, root=True).text)["arguments"]["filename"] == FDSET
        quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
        line = f'drive_add 0 "file.filename={quoted.replace(",", ",,")},if=none"'
        text = json.dumps({"execute": HMP, "arguments": {"command-line": line}}, ensure_ascii=ensure_ascii)
        if read_command(HMP, text):
            after = json.loads(plan_text(HMP, text, root=True).text)["arguments"]["command-line"]
            assert after == f"drive_add 0 file.filename={FDSET},if=none"
