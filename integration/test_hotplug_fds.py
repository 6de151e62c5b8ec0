"""File descriptors that clients send, and what of ours they see, compared with plain QEMU; and the failures of hot-plug."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.plugged import PROBE_LIMIT_S, ROOT, Client, Vm, plugged
from integration.shares import Launch
from integration.talk import connected, fds_of, wait_until
from qemu_userns.catalogue.ways import OWN_FDSET_BASE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.plugged import Compare

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

SUPERVISOR_IS_QUIET = 20


@pytest.fixture
def vm(launch: Launch, shared_tmp: Path) -> Iterator[Vm]:
    """The drop-in's QEMU, which holds in the end what it did in the beginning."""
    with plugged(shared_tmp / "vm", launch) as found:
        assert found.other
        with found.balanced():
            yield found


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def raw(client: Client, data: bytes, *fds: int) -> dict[str, Any]:
    client.send(data, *fds)
    return client.reply()


def node(name: str, path: object, **more: object) -> dict[str, object]:
    return {"node_name": name, "driver": "raw", "file": {"driver": "file", "filename": str(path)}, **more}


# --- which fd goes with which command ---------------------------------------------------------------------------------


def dump(vm: Vm, client: Client, name: str, path: Path) -> list[Any]:
    """Have the guest's memory written to the fd of a name; say whether that came into a file, which is emptied."""
    reply = client.ask("dump-guest-memory", paging=False, protocol=f"fd:{name}")
    size = path.stat().st_size
    os.truncate(path, 0)
    return [reply, size > 0]


PC = ["-nodefaults", "-display", "none", "-M", "pc", "-m", "1"]


def test_an_fd_comes_with_its_command_early_on_a_blank_or_with_another(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        qmp, path, other = vm.qmp, vm.folder / "file", vm.folder / "other"
        getfd = b'{"execute": "getfd", "arguments": {"fdname": "x"}}'
        with opened(path) as fd, opened(other) as wrong:
            seen: list[Any] = [raw(qmp, getfd, fd), dump(vm, qmp, "x", path)]
            qmp.send(b" ", fd)
            seen += [raw(qmp, getfd), dump(vm, qmp, "x", path)]
            seen += [raw(qmp, b'{"execute": "query-status"}', fd), raw(qmp, getfd), dump(vm, qmp, "x", path)]
            # Of two that come one after the other the newer counts, of several at once the first.
            qmp.send(b" ", wrong)
            qmp.send(b" ", fd)
            seen += [raw(qmp, getfd), dump(vm, qmp, "x", path), raw(qmp, getfd)]
            qmp.send(b" ", fd, wrong, wrong)
            seen += [raw(qmp, getfd), dump(vm, qmp, "x", path), raw(qmp, getfd)]
            # On the second byte, and in the middle of the command.
            qmp.send(getfd[:1])
            seen += [raw(qmp, getfd[1:], fd), dump(vm, qmp, "x", path)]
            qmp.send(getfd[:20])
            seen += [raw(qmp, getfd[20:], fd), dump(vm, qmp, "x", path)]
            # One that a command that fails has not taken.
            seen += [raw(qmp, b'{"execute": "getfd", "arguments": {"fdname": "1"}}', fd), raw(qmp, getfd)]
            seen += [raw(qmp, b'{"execute": "add-fd", "arguments": {"fdset-id": -1}}', fd), raw(qmp, getfd)]
            seen += [raw(qmp, b'{"execute": "getfd"}', fd), raw(qmp, getfd), raw(qmp, b'{"execute": "closefd"}')]
            seen += [qmp.ask("closefd", fdname="x"), qmp.ask("closefd", fdname="x"), raw(qmp, b'{"execute": "getfd", ]', fd)]
            return [*seen, raw(qmp, getfd), qmp.ask("closefd", fdname="x")]

    compare(dialogue, machine=PC)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 253])
def test_many_fds_at_once(compare: Compare, count: int) -> None:
    """The kernel cuts off what exceeds 16, QEMU's buffer and ours; the first is the one that counts."""

    def dialogue(vm: Vm) -> list[Any]:
        with opened(vm.folder / "file") as fd:
            seen: list[Any] = [vm.qmp.ask("add-fd", *[fd] * count, fdset_id=3, opaque="file"), vm.qmp.ask("query-fdsets")]
            vm.qmp.send(b" ", *[fd] * count)
            seen += [vm.qmp.ask("getfd", fdname="x"), vm.qmp.ask("getfd", fdname="x"), vm.qmp.ask("closefd", fdname="x")]
        return [*seen, vm.qmp.ask("remove-fd", fdset_id=3)]

    compare(dialogue)


def test_strange_fds(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        seen: list[Any] = []
        reader, writer = os.pipe()
        ours, theirs = socket.socketpair()
        directory, place = os.open(vm.folder, os.O_RDONLY | os.O_DIRECTORY), os.open(vm.folder, os.O_PATH)
        fds = (reader, writer, ours.fileno(), theirs.fileno(), directory, place)
        for number, fd in enumerate(fds):
            seen += [vm.qmp.ask("getfd", fd, fdname="strange"), vm.qmp.ask("add-fd", fd, fdset_id=number)]
        ours.close()
        theirs.close()
        for fd in (reader, writer, directory, place):
            os.close(fd)
        seen += [vm.qmp.ask("query-fdsets")]
        seen += [vm.qmp.ask("blockdev-add", node_name="n", driver="file", filename="/dev/fdset/4")]
        seen += [vm.qmp.ask("remove-fd", fdset_id=number) for number in range(len(fds))]
        return [*seen, vm.qmp.ask("closefd", fdname="strange")]

    compare(dialogue)


# --- fdsets -----------------------------------------------------------------------------------------------------------


def test_fdsets_as_without_a_broker(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        qmp = vm.qmp
        with opened(vm.folder / "file") as fd:
            strange = "dev\u00e9 'x' \"y\""
            seen: list[Any] = [qmp.ask("add-fd", fd), qmp.ask("add-fd", fd, opaque=strange), qmp.ask("add-fd", fd, fdset_id=7)]
            numbers = [seen[-1]["return"]["fd"]]
            seen += [qmp.ask("add-fd", fd, fdset_id=7, opaque="second"), qmp.ask("add-fd"), qmp.ask("query-fdsets")]
            seen += [qmp.ask("remove-fd", fdset_id=7, fd=numbers[0]), qmp.ask("query-fdsets"), qmp.ask("remove-fd", fdset_id=7)]
            seen += [qmp.ask("remove-fd", fdset_id=7), qmp.ask("remove-fd", fdset_id=0, fd=9999), qmp.ask("remove-fd")]
            seen += [qmp.ask("add-fd", fd, fdset_id="x"), qmp.ask("query-fdsets")]
            seen += [qmp.ask("remove-fd", fdset_id=0), qmp.ask("remove-fd", fdset_id=1), qmp.ask("query-fdsets")]
            # What the wrong arguments left.
            seen += [qmp.ask("getfd", fdname="x"), qmp.ask("closefd", fdname="x")]
        return seen

    compare(dialogue)


@pytest.mark.root
def test_our_own_fdsets_are_nobodys_business(vm: Vm) -> None:
    image = vm.image("a/disk", own=False)
    image.chmod(0o600)
    vm.qmp.execute("blockdev-add", **node("disk", image))
    files = {item["file"] for item in vm.qmp.execute("query-named-block-nodes")}
    (name,) = files
    number = int(name.removeprefix("/dev/fdset/"))
    assert number >= OWN_FDSET_BASE
    for client in (vm.qmp, vm.other):
        assert client.execute("query-fdsets") == []
        assert client.refused("remove-fd", fdset_id=number) == f"File descriptor named 'fdset-id:{number}' not found"
        with opened(vm.folder / "file") as fd:
            assert "error" in client.ask("add-fd", fd, fdset_id=number)
    assert "query-fdsets" not in vm.qmp.hmp("info block")
    vm.qmp.hmp('qemu-io disk "write -P 0x5a 0 512"')
    assert image.read_bytes()[:512] == b"\x5a" * 512
    vm.qmp.execute("blockdev-del", node_name="disk")


# --- several clients --------------------------------------------------------------------------------------------------


def test_fds_of_two_clients_do_not_mix(vm: Vm) -> None:
    """Each sends many on a monitor of both, commands and fds interleaved; each image gets what its client writes."""
    images = [[vm.image(f"{name}/{number}") for number in range(6)] for name in "ab"]
    clients = (vm.qmp, vm.other)
    with contextlib.ExitStack() as stack:
        for number in range(6):
            for client, paths, first in zip(clients, images, (10, 50), strict=True):
                fd = stack.enter_context(opened(paths[number], os.O_RDWR))
                client.send(b" ", fd)
                client.post("add-fd", fdset_id=first + number, opaque=str(paths[number]))
        for _ in range(6):
            for client in clients:
                assert "return" in client.reply()
                client.post("query-status")
        for _ in range(6):
            for client in clients:
                assert "return" in client.reply()
    found = {item["fdset-id"]: item["fds"][0]["fd"] for item in vm.qmp.execute("query-fdsets")}
    for first, paths in ((10, images[0]), (50, images[1])):
        for number, path in enumerate(paths):
            assert os.readlink(vm.proc / f"fd/{found[first + number]}") == str(path)
            vm.other.execute("remove-fd", fdset_id=first + number)


def test_getfd_names_that_collide(vm: Vm) -> None:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    clients = (vm.qmp, vm.other)
    for client, (_, theirs) in zip(clients, pairs, strict=True):
        client.execute("getfd", theirs.fileno(), fdname="net")
    inodes = [os.fstat(theirs.fileno()).st_ino for _, theirs in pairs]
    held = list(fds_of(vm.process.pid).values())
    assert [held.count(f"socket:[{inode}]") for inode in inodes] == [1, 1]
    for number, client in enumerate(clients):
        client.execute("netdev_add", type="socket", id=f"n{number}", fd="net")
    for number, client in enumerate(clients):
        assert client.refused("closefd", fdname="net") == "File descriptor named 'net' not found"
        client.execute("netdev_del", id=f"n{number}")
        assert f"socket:[{inodes[number]}]" not in fds_of(vm.process.pid).values()
    for pair in pairs:
        pair[0].close()
        pair[1].close()


def test_names_that_a_client_leaves_are_the_monitors(vm: Vm) -> None:
    with opened(vm.folder / "file") as fd, connected(vm.monitors[0]) as connection:
        Client(connection).execute("getfd", fd, fdname="left")
    assert wait_until(lambda: str(vm.folder / "file") in fds_of(vm.process.pid).values(), "the fd")
    wait_until(lambda: "return" in vm.qmp.ask("closefd", fdname="left"), "the name given up")


def test_a_client_that_leaves_with_fds_under_way(vm: Vm) -> None:
    with opened(vm.folder / "file") as fd:
        for data in (b" ", b'{"execute": "getfd", "argu', b'{"execute": "getfd"}', b'{"execute": "query-status"}' * 20):
            with connected(vm.monitors[0]) as connection:
                Client(connection, negotiate=False).send(data, fd)
            with connected(vm.monitors[0]) as connection:
                Client(connection).send(data, fd, fd, fd)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_what_is_not_there_qemu_says_itself(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        gone, qmp = vm.folder / "gone/file", vm.qmp
        seen: list[Any] = [qmp.ask("blockdev-add", **node("n", gone)), qmp.ask("blockdev-add", **node("n", "gone"))]
        seen += [qmp.ask("object-add", qom_type="secret", id="s", file=str(gone))]
        seen += [qmp.ask("chardev-add", id="c", backend={"type": "file", "data": {"out": str(gone)}})]
        seen += [qmp.ask("chardev-add", id="c", backend={"type": "pipe", "data": {"device": str(gone)}})]
        seen += [qmp.ask("chardev-add", id="c", backend={"type": "serial", "data": {"device": str(gone)}})]
        address = {"type": "unix", "data": {"path": str(gone)}}
        seen += [qmp.ask("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "server": False}})]
        seen += [qmp.ask("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "wait": False}})]
        seen += [qmp.ask("nbd-server-start", addr=address)]
        seen += [qmp.ask("pmemsave", val=0, size=1, filename=str(gone)), qmp.ask("screendump", filename=str(gone))]
        seen += [qmp.ask("object-add", qom_type="memory-backend-file", id="m", size=4096, mem_path=str(gone))]
        server = {"type": "unix", "path": str(gone)}
        seen += [qmp.ask("blockdev-add", node_name="n", driver="nbd", server=server)]
        return seen

    compare(dialogue)


def test_what_the_caller_may_not_open(vm: Vm) -> None:
    """QEMU's words; as root nothing is out of reach, but for what the kernel guards."""
    path = Path("/proc/self/mem/x") if ROOT else Path("/root/secret")
    why = vm.qmp.refused("blockdev-add", **node("n", path))
    assert "Could not open" in why
    assert str(path) in why
    if not ROOT:
        secret = vm.text("mine", "x")
        secret.chmod(0)
        why = vm.qmp.refused("blockdev-add", **node("n", secret))
        assert f"Could not open '{secret}': Permission denied" in why


def test_what_qemu_refuses_is_taken_back(vm: Vm) -> None:
    """What was made for a command, shown or passed goes again, files of the host's as well."""
    image = vm.image("a/disk", own=False)
    new, qmp = vm.folder / "new/file", vm.qmp
    new.parent.mkdir()
    qmp.refused("blockdev-add", **node("1 is no name", image))
    qmp.refused("blockdev-add", node_name="n", driver="qcow2", file={"driver": "file", "filename": str(image)})
    qmp.execute("chardev-add", id="taken", backend={"type": "null", "data": {}})
    qmp.refused("chardev-add", id="taken", backend={"type": "file", "data": {"out": str(new)}})
    address = {"addr": {"type": "unix", "data": {"path": str(new.parent / "socket")}}, "wait": False}
    qmp.refused("chardev-add", id="taken", backend={"type": "socket", "data": address})
    qmp.refused("object-add", qom_type="memory-backend-file", id="m", size=0, mem_path=str(new))
    qmp.refused("dump-guest-memory", paging=True, protocol=f"file:{new}", format="kdump-zlib")
    qmp.refused("object-add", qom_type="secret", id="0 is no id", file=str(image))
    qmp.refused("transaction", actions=[snapshot("none", new), snapshot("none", new.parent / "other")])
    qmp.execute("chardev-remove", id="taken")
    wait_until(lambda: not list(new.parent.iterdir()), "files gone again")


def test_what_cannot_be_placed_is_taken_back(vm: Vm) -> None:
    """From the host, which the process that made it has left for QEMU's view; before the client is answered."""
    new = vm.folder / "new/file"
    new.parent.mkdir()
    pid = str(vm.process.pid)  # in whose user namespace a file of the view has its owner
    kept = [] if ROOT else ["--preserve-credentials"]
    subprocess.run(["nsenter", "-t", pid, "-U", *kept, "touch", f"/proc/{pid}/root{new.parent}"], check=True)
    for _ in range(2):
        why = vm.qmp.refused("chardev-add", id="c", backend={"type": "file", "data": {"out": str(new)}})
        assert f"cannot place {new} in QEMU's view: Not a directory" in why
        assert list(new.parent.iterdir()) == []


def snapshot(name: str, path: Path) -> dict[str, object]:
    return {"type": "blockdev-snapshot-sync", "data": {"node-name": name, "snapshot-file": str(path), "format": "qcow2"}}


def test_a_client_that_leaves_in_the_middle_of_its_command(vm: Vm) -> None:
    """What it asked for is either not there, or QEMU's, who is asked to remove it."""
    images = [vm.image(f"a/{number}") for number in range(8)]
    for number, image in enumerate(images):
        with connected(vm.monitors[0]) as connection:
            client = Client(connection)
            client.post("blockdev-add", **node(f"n{number}", image))
            if number % 2:
                client.reply()
    for number in range(len(images)):
        vm.qmp.ask("blockdev-del", node_name=f"n{number}")
    wait_until(lambda: not [item for item in vm.qmp.execute("query-named-block-nodes") if delete(vm, item)], "no node left")


def delete(vm: Vm, item: dict[str, Any]) -> bool:
    """Delete a node that a command made in the meantime."""
    return "error" in vm.qmp.ask("blockdev-del", node_name=item["node-name"]) or True


def test_a_path_that_two_objects_use(vm: Vm) -> None:
    image = vm.image("a/disk", own=True)
    read_only = {"read_only": True}
    for name, client in (("one", vm.qmp), ("two", vm.other), ("three", vm.qmp)):
        client.execute("blockdev-add", **node(name, image, **read_only))
    for name in ("one", "three", "two"):
        assert opens(vm, image)
        vm.other.execute("blockdev-del", node_name=name)
    wait_until(lambda: not opens(vm, image), "the path out of view")


def opens(vm: Vm, path: Path) -> bool:
    """Say whether a path is in QEMU's view."""
    return (vm.proc / f"root{path}").exists()


def test_paths_of_all_kinds(compare: Compare) -> None:
    def dialogue(vm: Vm) -> list[Any]:
        target = vm.image("real/disk")
        (vm.folder / "link").symlink_to(target)
        (vm.folder / "folder").symlink_to(vm.folder / "real")
        (vm.folder / "relative").symlink_to("real/disk")
        vm.image("odd/a, b:'\u00e9\u4e2d\" %x")
        seen: list[Any] = []
        odd = list((vm.folder / "odd").iterdir())
        names = ["link", "folder/disk", "relative", "./real/../real/disk", *map(str, odd)]
        for number, name in enumerate([*names, *(str(vm.folder / name) for name in names)]):
            seen += [vm.qmp.ask("blockdev-add", node_name=f"n{number}", driver="file", filename=name, read_only=True)]
            seen += [[item["file"] for item in vm.qmp.execute("query-named-block-nodes")]]
            seen += [vm.qmp.ask("blockdev-del", node_name=f"n{number}")]
        return seen

    compare(dialogue)


def test_a_file_below_a_directory_that_is_shown(vm: Vm) -> None:
    """The directory comes first, then a file in it; then the other way round."""
    vm.own(vm.folder)
    folder = vm.folder / "shared"
    folder.mkdir()
    vm.own(folder)
    image = vm.image("shared/disk")
    for order in (("dir", "file"), ("file", "dir")):
        for last in (("dir", "file"), ("file", "dir")):
            for kind in order:
                if kind == "dir":
                    vm.qmp.execute("object-add", qom_type="tls-creds-anon", id="d", endpoint="client", dir=str(folder))
                else:
                    vm.qmp.execute("blockdev-add", **node("f", image))
            assert vm.qmp.hmp('qemu-io f "write -P 0x5a 0 512"') == ""
            assert image.read_bytes()[:512] == b"\x5a" * 512
            image.write_bytes(bytes(1 << 20))
            for kind in last:
                assert opens(vm, image)
                if kind == "dir":
                    vm.other.execute("object-del", id="d")
                else:
                    vm.other.execute("blockdev-del", node_name="f")
                vm.settle()
            wait_until(lambda: not opens(vm, image), "the path out of view")


def test_after_daemonizing_a_relative_path_is_relative_to_the_root(launch: Launch, shared_tmp: Path) -> None:
    folder = shared_tmp / "vm"
    pidfile = shared_tmp / "pid"
    with contextlib.ExitStack() as stack:
        vm = stack.enter_context(plugged(folder, launch, "-daemonize", "-pidfile", str(pidfile)))
        vm.process.wait(PROBE_LIMIT_S)
        image = vm.folder / "disk"
        image.write_bytes(bytes(1 << 20))
        relative = str(image).lstrip("/")
        assert "return" in vm.qmp.ask("blockdev-add", **node("n", relative, read_only=True))
        assert "Could not open 'disk'" in vm.qmp.refused("blockdev-add", **node("m", "disk", read_only=True))
        vm.qmp.execute("quit")
        wait_until(lambda: not pidfile.exists(), "QEMU's end")


def test_two_monitors(vm: Vm) -> None:
    """What one monitor's client plugs in another's unplugs; fdsets of ours are hidden on both."""
    image = vm.image("a/disk", own=False)
    with connected(vm.monitors[1]) as connection:
        second = Client(connection)
        vm.qmp.execute("blockdev-add", **node("n", image))
        assert second.execute("query-fdsets") == []
        second.execute("blockdev-del", node_name="n")
        second.execute("chardev-add", id="c", backend={"type": "file", "data": {"out": str(vm.folder / "out")}})
        vm.other.execute("chardev-remove", id="c")


def test_a_rewritten_command_keeps_its_id_and_what_else_it_says(vm: Vm) -> None:
    image = vm.image("a/disk", own=False)
    arguments = {"node-name": "n", "driver": "raw", "file": {"driver": "file", "filename": str(image)}}
    for id_ in ('{"a": [1, null]}', "null", "1e3", '"x"'):
        vm.qmp.send(f'{{"id": {id_}, "arguments": {json.dumps(arguments)}, "execute": "blockdev-add"}}'.encode())
        assert vm.qmp.reply() == {"return": {}, "id": json.loads(id_)}
        vm.qmp.send(f"{{'execute': 'blockdev-del', 'arguments': {{'node-name': 'n'}}, 'id': {id_}}}".encode())
        assert vm.qmp.reply() == {"return": {}, "id": json.loads(id_)}
