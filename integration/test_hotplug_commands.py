"""Hot-plug by path: each command that names something of the host, compared with plain QEMU doing the same.

A test is a dialogue that returns what a client and the host saw. Both QEMUs start without what it names; in the end each
holds what it held before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.plugged import Vm
from integration.shares import Launch, launches
from integration.talk import DEADLINE_S, PLAIN, is_listening, running, wait_until

if TYPE_CHECKING:
    from integration.plugged import Compare

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "16", "-vga", "std"]
# Its processor does not run: the firmware looks for something to boot from, and moves the tray.
CDROM = ["-S", "-device", "ide-cd,id=cd"]
PATTERN = b"\x5a" * 512


def nodes(vm: Vm) -> list[Any]:
    """Return name and file of each block node, and what it thinks of its backing file."""
    found = vm.qmp.execute("query-named-block-nodes")
    keys = ("node-name", "drv", "file", "ro", "backing_file", "backing_file_depth")
    return [[*({key: node.get(key) for key in keys}.values()), names(node["image"])] for node in found]


def names(image: dict[str, Any]) -> list[Any]:
    """Return the file names in query-block's description of an image."""
    chain = [image["filename"], image.get("backing-filename"), image.get("full-backing-filename"), image["format"]]
    return [*chain, *(names(image["backing-image"]) if "backing-image" in image else ())]


def file(path: Path | str) -> dict[str, str]:
    return {"driver": "file", "filename": str(path)}


def add_node(vm: Vm, name: str, driver: str, path: Path | str, **more: object) -> dict[str, Any]:
    return vm.qmp.ask("blockdev-add", node_name=name, driver=driver, file=file(path), **more)


def del_node(vm: Vm, *found: str) -> None:
    for name in found:
        vm.qmp.execute("blockdev-del", node_name=name)


def write(vm: Vm, node: str) -> str:
    """Write to a node, and return what is said of that."""
    said = vm.qmp.hmp(f'qemu-io {node} "write -P 0x5a 0 64k"')
    return said.partition("\n")[0] + vm.qmp.hmp(f'qemu-io {node} "flush"')


# --- block devices ----------------------------------------------------------------------------------------------------


def test_raw_images(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        mine, readable = vm.image("a/mine"), vm.image("b/readable", own=False)
        seen: list[Any] = [add_node(vm, "mine", "raw", mine), write(vm, "mine"), vm.state_of(mine)]
        seen += [add_node(vm, "readable", "raw", readable, read_only=True), nodes(vm)]
        seen += [vm.qmp.execute("query-fdsets")]
        del_node(vm, "mine", "readable")
        return seen

    compare(dialogue)


@pytest.mark.root
def test_an_image_of_the_callers_is_written_by_fd(compare: Compare) -> None:
    """No id map reaches it: it is opened outside, in both access modes, and QEMU reopens it as it likes."""

    def dialogue(vm: Vm) -> list[Any]:
        image = vm.image("a/disk", own=False)
        image.chmod(0o600)
        seen: list[Any] = [add_node(vm, "disk", "raw", image, auto_read_only=True), write(vm, "disk"), vm.state_of(image)[2:]]
        # QEMU opens it anew by the name that it knows.
        options = {"driver": "raw", "node-name": "disk", "read-only": True, "file": "back"}
        seen += [vm.qmp.execute("query-fdsets")]
        del_node(vm, "disk")
        back = {"node_name": "back", "driver": "file", "filename": str(image), "auto_read_only": True}
        seen += [vm.qmp.ask("blockdev-add", **back)]
        seen += [vm.qmp.ask("blockdev-add", node_name="disk", driver="raw", file="back"), write(vm, "disk")]
        seen += [vm.qmp.ask("blockdev-reopen", options=[options]), vm.qmp.hmp('qemu-io disk "read -P 0x5a 0 64k"')[:20]]
        seen += [vm.qmp.ask("blockdev-reopen", options=[{**options, "read-only": False}]), write(vm, "disk")]
        del_node(vm, "disk", "back")
        return [*seen, vm.state_of(image)[2:]]

    compare(dialogue)


def test_a_chain_of_relative_backing_files(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        vm.image("images/base", own=False)
        vm.image("images/middle", "qcow2", "-b", "base", "-F", "raw", own=False)
        top = vm.image("images/top", "qcow2", "-b", "middle", "-F", "qcow2")
        seen: list[Any] = [add_node(vm, "top", "qcow2", top), write(vm, "top"), nodes(vm)]
        del_node(vm, "top")
        return seen

    compare(dialogue)


def test_a_long_command(compare: Compare) -> None:
    """JSON may have as many blanks as a client likes."""

    def dialogue(vm: Vm) -> list[Any]:
        arguments = json.dumps({"node-name": "disk", "driver": "raw", "file": file(vm.image("a/disk"))})
        vm.qmp.socket.sendall(f'{{"execute": "blockdev-add",{" " * 300_000}"arguments": {arguments}}}'.encode())
        seen: list[Any] = [vm.qmp.reply(), nodes(vm)]
        del_node(vm, "disk")
        return seen

    compare(dialogue)


def test_names_in_json_and_relative_names(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        vm.image("a/one")
        base = "json:" + json.dumps({"driver": "raw", "file": file(vm.image("a/base", own=False))})
        top = vm.image("b/top", "qcow2", "-b", base, "-F", "raw")
        seen: list[Any] = [add_node(vm, "one", "raw", "a/one"), add_node(vm, "top", "qcow2", top, read_only=True)]
        seen += [
            vm.qmp.hmp("drive_add 0 if=none,id=d,file.driver=raw,file.file.driver=file,file.file.filename=a/base,read-only=on")
        ]
        name = "json:" + json.dumps({"driver": "raw", "file": file(vm.folder / "a/base")})
        seen += [vm.qmp.hmp(f"drive_add 0 if=none,id=e,read-only=on,file={name.replace(',', ',,')}".replace('"', "'"))]
        seen += [nodes(vm), vm.qmp.hmp("drive_del d"), vm.qmp.hmp("drive_del e")]
        del_node(vm, "one", "top")
        return seen

    compare(dialogue)


def test_an_nbd_server(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        image = vm.image("a/disk", own=False)
        path = vm.folder / "servers/nbd"
        path.parent.mkdir()
        server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-x", "export", "-k", str(path), str(image), "-e", "2"])
        try:
            wait_until(lambda: is_listening(path), "qemu-nbd")
            path.chmod(0o666)
            node = {"node_name": "n", "driver": "nbd", "export": "export", "server": {"type": "unix", "path": str(path)}}
            seen: list[Any] = [vm.qmp.ask("blockdev-add", **node), write(vm, "n"), nodes(vm)]
            del_node(vm, "n")
            path.chmod(0o600)
            seen += [vm.qmp.ask("blockdev-add", **node), write(vm, "n")]
            del_node(vm, "n")
            return seen
        finally:
            server.terminate()
            server.wait(DEADLINE_S)

    compare(dialogue)


def test_blockdev_reopen_names_another_file(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        first, second = vm.image("a/first", "qcow2"), vm.image("b/second")
        seen: list[Any] = [add_node(vm, "disk", "qcow2", first)]
        options = {"driver": "qcow2", "node-name": "disk", "read-only": True, "file": file(first)}
        seen += [vm.qmp.ask("blockdev-reopen", options=[options])]
        seen += [vm.qmp.ask("blockdev-add", node_name="extra", driver="file", filename=str(second))]
        seen += [vm.qmp.ask("blockdev-reopen", options=[{"driver": "file", "node-name": "extra", "filename": str(second)}])]
        seen += [nodes(vm)]
        del_node(vm, "disk", "extra")
        return seen

    compare(dialogue)


def test_blockdev_create(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        path = vm.folder / "made/new.qcow2"
        path.parent.mkdir(mode=0o755)
        seen: list[Any] = [vm.qmp.ask("blockdev-create", job_id="j", options={**file(path), "size": 0})]
        seen += [vm.qmp.wait_job("j"), vm.state_of(path)]
        seen += [vm.qmp.ask("blockdev-add", node_name="file", driver="file", filename=str(path))]
        seen += [vm.qmp.ask("blockdev-create", job_id="k", options={"driver": "qcow2", "file": "file", "size": 1 << 20})]
        seen += [vm.qmp.wait_job("k"), vm.state_of(path)]
        del_node(vm, "file")
        seen += [add_node(vm, "disk", "qcow2", path), write(vm, "disk"), nodes(vm)]
        del_node(vm, "disk")
        missing = {"driver": "file", "filename": str(vm.folder / "nowhere/new"), "size": 0}
        return [*seen, vm.qmp.ask("blockdev-create", job_id="l", options=missing), vm.qmp.wait_job("l")]

    compare(dialogue)


@pytest.mark.parametrize("how", ["command", "transaction", "hmp"])
def test_a_snapshot(compare: Compare, how: str) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        base = vm.image("base/disk")
        top = vm.folder / "tops/top"
        top.parent.mkdir()
        if how == "hmp":
            seen: list[Any] = [vm.qmp.hmp(f"drive_add 0 if=none,id=disk,node-name=node,driver=raw,file.filename={base}")]
            seen += [vm.qmp.hmp(f"snapshot_blkdev disk {top} qcow2")]
        else:
            seen = [vm.qmp.hmp(f"drive_add 0 if=none,id=disk,node-name=node,driver=raw,file.filename={base}")]
            snapshot = {"node-name": "node", "snapshot-file": str(top), "snapshot-node-name": "top", "format": "qcow2"}
            if how == "command":
                seen += [vm.qmp.ask("blockdev-snapshot-sync", **snapshot)]
            else:
                seen += [vm.qmp.ask("transaction", actions=[{"type": "blockdev-snapshot-sync", "data": snapshot}])]
        seen += [vm.state_of(top), nodes(vm)]
        seen += [write(vm, "disk"), vm.qmp.hmp("drive_del disk")]
        return [*seen, json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output=json", top]))["backing-filename"]]

    compare(dialogue, kept="tops/top")


@pytest.mark.parametrize("hmp", [False, True], ids=["qmp", "hmp"])
@pytest.mark.parametrize("command", ["drive-mirror", "drive-backup"])
def test_copying_a_disk(compare: Compare, command: str, hmp: bool) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        base = vm.image("base/disk")
        target = vm.folder / "targets/copy"
        target.parent.mkdir()
        vm.qmp.hmp(f"drive_add 0 if=none,id=disk,file={base},format=raw")
        write(vm, "disk")
        if hmp:
            seen: list[Any] = [vm.qmp.hmp(f"{command.replace('-', '_')} -f disk {target} raw")]
        else:
            seen = [vm.qmp.ask(command, device="disk", target=str(target), format="raw", sync="full")]
        if command == "drive-mirror":
            vm.qmp.wait_event("BLOCK_JOB_READY")
            seen += [vm.qmp.ask("block-job-complete", device="disk")]
        seen += [vm.qmp.wait_event("BLOCK_JOB_COMPLETED")["data"], vm.state_of(target), nodes(vm)]
        seen += [vm.qmp.hmp("drive_del disk")]
        assert target.read_bytes()[:512] == PATTERN
        return seen

    compare(dialogue, kept="targets/copy")


@pytest.mark.parametrize("hmp", [False, True], ids=["qmp", "hmp"])
def test_changing_a_medium(compare: Compare, hmp: bool) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        first, second = vm.image("isos/first"), vm.image("isos/second")
        seen: list[Any] = []
        for path in (first, second, vm.folder / "isos/missing"):
            if hmp:
                seen += [vm.qmp.hmp(f"change cd {path} raw")]
            else:
                seen += [vm.qmp.ask("blockdev-change-medium", id="cd", filename=str(path), format="raw", force=True)]
            seen += [[item.get("inserted", {}).get("file") for item in vm.qmp.execute("query-block")]]
        seen += [vm.qmp.hmp("eject -f cd") if hmp else vm.qmp.ask("eject", id="cd", force=True)]
        return [*seen, vm.qmp.execute("query-block")]

    compare(dialogue, *CDROM, machine=PC)


# --- networks and character devices -----------------------------------------------------------------------------------


def test_netdevs_on_unix_sockets(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        folder = vm.folder / "sockets"
        folder.mkdir()
        vm.own(folder)  # where QEMU makes the socket itself: it takes none by name
        with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
            listener.bind(str(folder / "theirs"))
            listener.listen()
            vm.own(folder / "theirs")
            addresses = {"c": (False, folder / "theirs"), "s": (True, folder / "ours")}
            seen: list[Any] = []
            for name, (server, path) in addresses.items():
                address = {"type": "unix", "path": str(path)}
                seen += [vm.qmp.ask("netdev_add", id=name, type="stream", server=server, addr=address)]
            listener.settimeout(DEADLINE_S)
            stack.enter_context(listener.accept()[0])
            # QEMU 7.2 sees this connection in another thread, and dies of it where the netdev has gone by then.
            seen += [vm.qmp.wait_event("NETDEV_STREAM_CONNECTED", **{"netdev-id": "c"})["event"]]
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            wait_until(lambda: client.connect_ex(str(folder / "ours")) == 0, "a listener")
            seen += [
                vm.qmp.wait_event("NETDEV_STREAM_CONNECTED", **{"netdev-id": "s"})["event"],
                vm.state_of(folder / "ours")[:2],
            ]
            seen += [vm.qmp.ask("netdev_del", id=name) for name in addresses]
        return seen

    compare(dialogue)


def test_a_character_device_on_a_file(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        (vm.folder / "logs").mkdir()
        out, log = vm.folder / "logs/out", vm.folder / "logs/log"
        old = vm.text("old/out", "before\n", own=True)
        backend = {"type": "file", "data": {"out": str(out), "logfile": str(log)}}
        seen: list[Any] = [vm.qmp.ask("chardev-add", id="c", backend=backend)]
        seen += [vm.qmp.ask("chardev-add", id="d", backend={"type": "file", "data": {"out": str(old), "append": True}})]
        seen += [vm.qmp.ask("chardev-add", id="e", backend={"type": "file", "data": {"out": str(old)}}), chardevs(vm)]
        seen += [vm.state_of(path) for path in (out, log, old)]
        seen += [vm.qmp.hmp(f"chardev-add file,id=f,path={vm.folder / 'logs/hmp'}"), vm.state_of(vm.folder / "logs/hmp")]
        return [*seen, *(vm.qmp.ask("chardev-remove", id=name) for name in "cdef")]

    compare(dialogue)


def test_a_character_device_on_pipes(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        (vm.folder / "pipes").mkdir()
        for name in ("p.in", "p.out", "single"):
            os.mkfifo(vm.folder / "pipes" / name)
            vm.own(vm.folder / "pipes" / name)
        seen: list[Any] = []
        for name, path in (("c", vm.folder / "pipes/p"), ("d", vm.folder / "pipes/single")):
            backend = {"type": "pipe", "data": {"device": str(path)}}
            seen += [vm.qmp.ask("chardev-add", id=name, backend=backend)]
        return [*seen, chardevs(vm), *(vm.qmp.ask("chardev-remove", id=name) for name in "cd")]

    compare(dialogue)


def test_a_wrong_id_costs_no_socket_and_no_file(compare: Compare) -> None:
    """QEMU looks at the id before it puts a socket in the place of what is at its path."""

    def dialogue(vm: Vm) -> list[Any]:
        live, kept = vm.folder / "live", vm.folder / "kept"
        kept.write_text("text")
        server = {"server": True, "wait": False}
        backends = [
            {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": str(path)}}, **server}} for path in (live, kept)
        ]
        seen: list[Any] = [vm.qmp.ask("chardev-add", id="taken", backend=backends[0])]
        inode = live.stat().st_ino
        seen += [vm.qmp.ask("chardev-add", id="taken", backend=backend) for backend in backends]
        seen += [vm.qmp.ask("chardev-change", id="free", backend=backend) for backend in backends]
        for path in (live, kept):
            seen += [vm.qmp.hmp(f"chardev-add socket,id=taken,server=on,wait=off,path={path}")]
            seen += [vm.qmp.hmp(f"chardev-change free socket,server=on,wait=off,path={path}")]
        seen += [live.stat().st_ino == inode, is_listening(live), kept.read_text()]
        return [*seen, vm.qmp.ask("chardev-remove", id="taken")]

    compare(dialogue)


def test_a_second_nbd_server_costs_no_socket_and_no_file(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        live, kept = vm.folder / "nbd", vm.folder / "kept"
        kept.write_text("text")
        seen: list[Any] = []
        for path in (live, live, kept):
            seen += [vm.qmp.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}), is_listening(live)]
        return [*seen, kept.read_text(), vm.qmp.ask("nbd-server-stop")]

    compare(dialogue)


@pytest.mark.parametrize("how", ["qmp", "hmp", "change"])
def test_character_devices_on_unix_sockets(compare: Compare, how: str) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        folder = vm.folder / "sockets"
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind(str(folder / "theirs"))
            listener.listen()
            vm.own(folder / "theirs")
            if how == "hmp":
                vm.own(folder)
                seen: list[Any] = [vm.qmp.hmp(f"chardev-add socket,id=c,path={folder / 'theirs'}")]
                seen += [vm.qmp.hmp(f"chardev-add socket,id=s,path={folder / 'ours'},server=on,wait=off")]
            else:
                client_end = {"addr": {"type": "unix", "data": {"path": str(folder / "theirs")}}, "server": False}
                server_end = {"addr": {"type": "unix", "data": {"path": str(folder / "ours")}}, "wait": False}
                seen = []
                for name, data in (("c", client_end), ("s", server_end)):
                    if how == "change":
                        vm.qmp.execute("chardev-add", id=name, backend={"type": "null", "data": {}})
                    command = "chardev-change" if how == "change" else "chardev-add"
                    seen += [vm.qmp.ask(command, id=name, backend={"type": "socket", "data": data})]
            listener.settimeout(DEADLINE_S)
            with listener.accept()[0]:
                client.connect(str(folder / "ours"))
                # A peer of a socket that we made looks the same, but its path is an fd's.
                seen += [vm.state_of(folder / "ours")[:1], chardevs(vm)]
                seen += [vm.qmp.ask("chardev-remove", id=name) for name in "cs"]
        return seen

    compare(dialogue)


def test_pseudo_terminals(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        ours, theirs = os.openpty()
        try:
            path = Path(os.ttyname(theirs))
            vm.own(path)
            backend = {"type": "serial", "data": {"device": str(path)}}
            seen: list[Any] = [vm.qmp.ask("chardev-add", id="s", backend=backend)]
            seen += [vm.qmp.ask("chardev-add", id="p", backend={"type": "pty", "data": {}}), chardevs(vm)]
            seen += [vm.qmp.ask("chardev-remove", id=name) for name in "sp"]
            wait_until(lambda: f" {path} " not in (vm.proc / "mountinfo").read_text(), "the terminal out of view")
            return seen
        finally:
            os.close(ours)
            os.close(theirs)

    compare(dialogue)


def chardevs(vm: Vm) -> list[Any]:
    """Return the character devices that are no monitors."""
    found = {item["label"]: item["filename"].removeprefix("disconnected:") for item in vm.qmp.execute("query-chardev")}
    return sorted(item for item in found.items() if not item[0].startswith("compat"))


# --- objects and devices ----------------------------------------------------------------------------------------------


def test_memory_in_a_file(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        (vm.folder / "memory").mkdir()
        new, old = vm.folder / "memory/new", vm.text("other/old", bytes(1 << 20), own=True)
        seen: list[Any] = []
        for name, path in (("a", new), ("b", old)):
            properties = {"size": 1 << 20, "mem_path": str(path), "share": True}
            seen += [vm.qmp.ask("object-add", qom_type="memory-backend-file", id=name, **properties)]
        seen += [vm.state_of(new), vm.state_of(old), *(vm.qmp.ask("object-del", id=name) for name in "ab")]
        seen += [vm.qmp.hmp(f"object_add memory-backend-file,id=c,size=1M,mem-path={old},share=on"), vm.qmp.hmp("object_del c")]
        return seen

    compare(dialogue)


def test_secrets_and_randomness(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        secret = vm.text("secrets/s", "geheim", 0o600)
        seen: list[Any] = [vm.qmp.ask("object-add", qom_type="secret", id="a", file=str(secret))]
        seen += [
            vm.qmp.hmp(f"object_add secret,id=b,file={secret}"),
            vm.qmp.ask("object-add", qom_type="secret", id="c", file="x"),
        ]
        random = vm.text("random/r", bytes(4096))
        seen += [vm.qmp.ask("object-add", qom_type="rng-random", id="r", filename=str(random))]
        users = vm.text("acl/list", json.dumps({"rules": [], "policy": "deny"}))
        seen += [vm.qmp.ask("object-add", qom_type="authz-list-file", id="z", filename=str(users), refresh=False)]
        return [*seen, *(vm.qmp.ask("object-del", id=name) for name in "abrz")]

    compare(dialogue)


def test_credentials(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        keys = vm.text("psk/keys.psk", "qemu:0123456789abcdef0123456789abcdef\n", 0o600)
        seen: list[Any] = [vm.qmp.ask("object-add", qom_type="tls-creds-psk", id="p", endpoint="server", dir=str(keys.parent))]
        seen += [vm.qmp.ask("object-add", qom_type="tls-creds-psk", id="q", endpoint="server", dir=str(vm.folder / "none"))]
        seen += [vm.qmp.ask("object-add", qom_type="tls-creds-x509", id="x", endpoint="server", dir=str(keys.parent))]
        return [*seen, vm.qmp.ask("object-del", id="p")]

    compare(dialogue)


def test_a_dump_of_a_network(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        (vm.folder / "dumps").mkdir()
        path = vm.folder / "dumps/pcap"
        seen: list[Any] = [vm.qmp.ask("netdev_add", type="hubport", id="n", hubid=0)]
        seen += [vm.qmp.ask("object-add", qom_type="filter-dump", id="f", netdev="n", file=str(path)), vm.state_of(path)]
        return [*seen, vm.qmp.ask("object-del", id="f"), vm.qmp.ask("netdev_del", id="n"), vm.state_of(path)]

    compare(dialogue)


def test_an_option_rom(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        rom = vm.text("roms/rom", bytes(2048), own=False)
        seen: list[Any] = [vm.qmp.ask("device_add", driver="virtio-rng-pci", id="r", romfile=str(rom))]
        seen += [vm.qmp.ask("device_add", driver="virtio-rng-pci", id="s", romfile=str(vm.folder / "none"))]
        return [*seen, vm.qmp.ask("qom-get", path="/machine/peripheral/r", property="romfile")]

    compare(dialogue, machine=PC, kept="roms/rom")


# --- migration, dumps and other files ---------------------------------------------------------------------------------


def migrated(vm: Vm) -> dict[str, Any]:
    """Wait until the migration has ended; return what is said of it."""
    ends = ("completed", "failed")
    found: dict[str, Any] = wait_until(
        lambda: ((info := vm.qmp.execute("query-migrate")).get("status") in ends and info) or {}, "a migration's end"
    )
    return {key: found[key] for key in ("status", "error-desc", "socket-address") if key in found}


@pytest.mark.parametrize("hmp", [False, True], ids=["qmp", "hmp"])
def test_migration_to_a_unix_socket(compare: Compare, hmp: bool) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        path = vm.folder / "sockets/m"
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            vm.own(path)
            received = [b""]
            reader = threading.Thread(target=lambda: receive(listener, received))
            reader.start()
            seen: list[Any] = [vm.qmp.hmp(f"migrate -d unix:{path}") if hmp else vm.qmp.ask("migrate", uri=f"unix:{path}")]
            seen += [migrated(vm)]
            reader.join(DEADLINE_S)
        return [*seen, received[0][:4].decode(), vm.qmp.ask("migrate", uri=f"unix:{vm.folder / 'sockets/none'}")]

    compare(dialogue, kept="sockets/m")


@pytest.mark.root
def test_migration_to_a_socket_of_roots(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        path = vm.folder / "sockets/m"
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen()
            received = [b""]
            reader = threading.Thread(target=lambda: receive(listener, received))
            reader.start()
            seen: list[Any] = [vm.qmp.ask("migrate", uri=f"unix:{path}"), migrated(vm)]
            reader.join(DEADLINE_S)
        return [*seen, received[0][:4].decode()]

    compare(dialogue)


def receive(listener: socket.socket, received: list[bytes]) -> None:
    listener.settimeout(DEADLINE_S)
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(65536):
            received[0] += data


def test_migration_to_a_program_that_runs_outside(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        (vm.folder / "secret").mkdir()
        target = vm.folder / "secret/stream"
        seen: list[Any] = [vm.qmp.ask("migrate", uri=f"exec:cat > {target}.part && mv {target}.part {target}"), migrated(vm)]
        wait_until(target.exists, "what the program writes")
        return [*seen, target.read_bytes()[:4].decode(), vm.state_of(target)[:2] if not vm.confined else owned_by_caller(target)]

    compare(dialogue)


def owned_by_caller(path: Path) -> list[Any]:
    assert path.stat().st_uid == os.geteuid()
    return ["-rw-r--r--", "QEMU"]


@pytest.mark.parametrize("scheme", ["unix", "exec", "tcp", "fd"])
def test_incoming_migration(compare: Compare, shared_tmp: Path, scheme: str) -> None:
    saved = migration_stream(shared_tmp)

    def dialogue(vm: Vm) -> list[Any]:
        folder = vm.folder / "in"
        folder.mkdir()
        seen: list[Any] = []
        if scheme == "exec":
            # Where QEMU does not see it.
            shutil.copy(saved, folder / "stream")
            seen += [vm.qmp.ask("migrate-incoming", uri=f"exec:cat {folder / 'stream'}")]
        elif scheme == "fd":
            ours, theirs = socket.socketpair()
            with ours, theirs:
                seen += [vm.qmp.ask("getfd", theirs.fileno(), fdname="in")]
                seen += [vm.qmp.ask("migrate-incoming", uri="fd:in")]
                ours.sendall(saved.read_bytes())
        else:
            uri = f"unix:{folder / 's'}" if scheme == "unix" else "tcp:127.0.0.1:0"
            vm.own(folder)
            seen += [vm.qmp.ask("migrate-incoming", uri=uri)]
            info = vm.qmp.execute("query-migrate")["socket-address"][0]
            kind = socket.AF_UNIX if scheme == "unix" else socket.AF_INET
            with socket.socket(kind) as client:
                client.connect(str(folder / "s") if scheme == "unix" else (info["host"], int(info["port"])))
                client.sendall(saved.read_bytes())
        wait_until(lambda: vm.qmp.execute("query-status")["status"] != "inmigrate", "the incoming stream's end")
        return [*seen, vm.qmp.execute("query-status"), migrated(vm)]

    compare(dialogue, "-incoming", "defer", kept="/in ")


def migration_stream(folder: Path) -> Path:
    """Make a migration stream of a machine without anything."""
    path = folder / "stream"
    with running(PLAIN) as qemu:
        qemu.qmp.execute("migrate", uri=f"exec:cat > {path}")
        wait_until(lambda: qemu.qmp.execute("query-migrate").get("status") == "completed", "the stream")
        assert qemu.quit() == 0
    return path


@pytest.mark.parametrize("hmp", [False, True], ids=["qmp", "hmp"])
def test_dumps(compare: Compare, hmp: bool) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        folder = vm.folder / "dumps"
        folder.mkdir()
        lines: dict[str, tuple[str, dict[str, Any]]] = {
            "guest": ("dump-guest-memory", {"paging": False, "protocol": f"file:{folder / 'guest'}"}),
            "memory": ("memsave", {"val": 0, "size": 4096, "filename": str(folder / "memory"), "cpu-index": 0}),
            "physical": ("pmemsave", {"val": 0, "size": 4096, "filename": str(folder / "physical")}),
            "screen": ("screendump", {"filename": str(folder / "screen")}),
        }
        seen: list[Any] = []
        for name, (command, arguments) in lines.items():
            words = {"guest": "", "screen": ""}.get(name, "0 4096 ")
            quoted = f'"{folder / name}"' if words else str(folder / name)
            for _ in range(1 if name == "guest" else 2):  # the second time it is there
                seen += [vm.qmp.hmp(f"{command} {words}{quoted}") if hmp else vm.qmp.ask(command, **arguments)]
                # QEMU's own dumps of the guest have mode 0400, ours 0600, since its id has to open them.
                mode, owner, size, _ = vm.state_of(folder / name)
                seen += [mode[4:] if name == "guest" else mode, owner, size > 0]
        if hmp:
            seen += [vm.qmp.hmp(f"logfile {folder / 'log'}"), vm.qmp.hmp("log guest_errors"), vm.state_of(folder / "log")]
            seen += [vm.qmp.hmp(f"logfile {folder / 'log2'}"), vm.qmp.hmp("log none")]
        return seen

    compare(dialogue, machine=PC, kept="log")


def test_dump_to_an_fd(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        path = vm.folder / "dump"
        with path.open("wb") as target:
            seen: list[Any] = [vm.qmp.ask("getfd", target.fileno(), fdname="d")]
            seen += [vm.qmp.ask("dump-guest-memory", paging=False, protocol="fd:d")]
        return [*seen, path.read_bytes()[:4].hex()]

    compare(dialogue, machine=PC)


# --- exports, displays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hmp", [False, True], ids=["qmp", "hmp"])
def test_an_nbd_server_of_qemus(compare: Compare, hmp: bool) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        folder = vm.folder / "exports"
        folder.mkdir()
        path = folder / "nbd"
        add_node(vm, "disk", "raw", vm.image("disks/disk"))
        seen: list[Any] = []
        if hmp:
            vm.own(folder)
            seen += [vm.qmp.hmp(f"nbd_server_start unix:{path}")]
        else:
            seen += [vm.qmp.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})]
        seen += [vm.qmp.ask("block-export-add", id="e", type="nbd", node_name="disk", name="x", writable=True)]
        seen += [vm.state_of(path)[:1]]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 512", f"nbd+unix:///x?socket={path}"], capture_output=True, text=True
        )
        seen += [done.returncode, done.stderr, vm.qmp.ask("nbd-server-stop")]
        wait_until(lambda: not vm.qmp.execute("query-block-exports"), "the export's end")
        del_node(vm, "disk")
        assert (vm.folder / "disks/disk").read_bytes()[:512] == PATTERN
        wait_until(lambda: not path.exists(), "the socket's end")
        return seen

    compare(dialogue)


@pytest.mark.parametrize("launch", launches(), ids=str)
def test_a_fuse_export_is_refused_with_the_reason(launch: Launch, shared_tmp: Path) -> None:
    from integration.plugged import plugged

    with plugged(shared_tmp / "vm", launch) as vm, vm.balanced():
        add_node(vm, "disk", "raw", vm.image("disks/disk"))
        mountpoint = vm.text("mountpoint")
        why = vm.qmp.refused("block-export-add", id="e", type="fuse", node_name="disk", mountpoint=str(mountpoint))
        assert "a FUSE export would be mounted where only this QEMU sees it" in why
        del_node(vm, "disk")


def test_a_vnc_client_by_fd(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                seen: list[Any] = [vm.qmp.ask("getfd", theirs.fileno(), fdname="v")]
            seen += [vm.qmp.ask("add_client", protocol="vnc", fdname="v"), vm.qmp.ask("closefd", fdname="v")]
            ours.settimeout(DEADLINE_S)
            return [*seen, ours.recv(12).decode()]

    compare(dialogue, "-vnc", "none", machine=PC)


def test_what_is_no_file_stays_as_it_is(compare: Compare) -> None:
    """Names in fdsets of the client's, of devices, and in commands that QEMU refuses."""

    def dialogue(vm: Vm) -> list[Any]:
        seen: list[Any] = [vm.qmp.ask("blockdev-add", driver="file", node_name="x", filename="/dev/fdset/7")]
        seen += [vm.qmp.ask("blockdev-add", driver="nosuch", node_name="x", filename="/etc/passwd")]
        seen += [vm.qmp.ask("blockdev-add", driver="file", node_name="x", filename=5)]
        seen += [vm.qmp.ask("blockdev-add", driver="file", node_name="x")]
        seen += [vm.qmp.ask("netdev_add", type="user", id="u"), vm.qmp.ask("netdev_del", id="u")]
        seen += [vm.qmp.ask("migrate", uri="nonsense"), vm.qmp.ask("migrate", uri="fd:none")]
        return [*seen, vm.qmp.hmp("drive_add 0 if=none,id=d,file=/dev/fdset/9"), vm.qmp.hmp("nosuch /etc/passwd")]

    compare(dialogue)
