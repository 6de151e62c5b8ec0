"""Inherited file descriptors: those that the command line names arrive under their numbers, all others are closed."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from integration.talk import PLAIN, fds_of, qmp_over, running, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]


@contextlib.contextmanager
def content_fd(kind: str, content: bytes, folder: Path) -> Iterator[int]:
    """Give an fd from which `content` can be read: a regular file that has no other name, a pipe or a memfd."""
    if kind == "pipe":
        fd, write = os.pipe()
        os.write(write, content)
        os.close(write)
    elif kind == "memfd":
        fd = os.memfd_create("content")
        os.write(fd, content)
    else:
        file = folder / "unlinked"
        file.write_bytes(content)
        fd = os.open(file, os.O_RDONLY)
        file.unlink()
    if kind != "pipe":
        os.lseek(fd, 0, os.SEEK_SET)
    try:
        yield fd
    finally:
        os.close(fd)


def test_an_fd_that_no_option_names_is_closed(dropin: list[str], shared_tmp: Path) -> None:
    secret, read, write = os.open("/etc/hostname", os.O_RDONLY), *os.pipe()
    directory, end, other = os.open(shared_tmp, os.O_RDONLY), *socket.socketpair()
    fds = (secret, read, write, directory, end.fileno(), other.fileno())
    try:
        with end, other, running(dropin, pass_fds=fds) as qemu:
            left = fds_of(qemu.pid)
            ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
            assert not ours & set(left.values()), left
    finally:
        for fd in fds[:4]:
            os.close(fd)


def test_qemu_holds_no_file_or_directory_of_the_host_but_the_planned_ones(dropin: list[str], shared_tmp: Path) -> None:
    with running(dropin, "-qmp", f"unix:{shared_tmp / 'q'},server=on,wait=off", "-pidfile", str(shared_tmp / "pid")) as qemu:
        harmless = ("anon_inode:[event", "anon_inode:[signalfd]", "anon_inode:[io_uring]", "socket:[", "pipe:[")
        left = {number: target for number, target in fds_of(qemu.pid).items() if number > 2 and not target.startswith(harmless)}
        files = sorted(target.rstrip("0123456789") for target in left.values())
        lease = ["/run/qemu-userns/leases/"] if os.geteuid() == 0 else []
        ways_in = [file for file in files if file.endswith(" (deleted)")]  # to the two monitors' sockets, for the next supervisor
        assert len(ways_in) == 2
        assert f"{shared_tmp / 'q'} (deleted)" in ways_in
        assert [file for file in files if file not in ways_in] == sorted(["/dev/ptmx", str(shared_tmp / "pid"), *lease]), left
        maps = (qemu.proc / "maps").read_text()
        assert "python" not in maps
        assert "qemu_userns" not in maps


def test_a_chardev_on_an_inherited_socket_keeps_its_number(dropin: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = 87
        os.dup2(theirs.fileno(), number)
        try:
            options = ["-chardev", f"socket,id=c,fd={number}", "-mon", "c,mode=control"]
            with running(dropin, *options, pass_fds=(number,)) as qemu, qmp_over(ours) as qmp:
                # Under its number QEMU has the private socket that stands in for it; the caller's own is the supervisor's.
                assert fds_of(qemu.pid)[number].startswith("socket:")
                assert os.readlink(f"/proc/self/fd/{number}") not in fds_of(qemu.pid).values()
                listed = qmp.execute("query-chardev")
                assert {item["label"] for item in listed} == {"c", "talk"}
        finally:
            os.close(number)


def test_a_listening_socket_is_taken_over(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "listener"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen(1)
        options = ["-chardev", f"socket,id=c,fd={server.fileno()},server=on,wait=off", "-mon", "c,mode=control"]
        with running(dropin, *options, pass_fds=(server.fileno(),)):
            client.connect(str(path))
            with qmp_over(client) as qmp:
                assert qmp.execute("query-status")


def test_fds_travel_over_the_monitor_both_ways(dropin: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = ["-chardev", f"socket,id=c,fd={theirs.fileno()}", "-mon", "c,mode=control"]
        with running(dropin, *options, pass_fds=(theirs.fileno(),)) as qemu, qmp_over(ours) as qmp:
            read, write = os.pipe()
            try:
                target = os.readlink(f"/proc/self/fd/{read}")
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read]))]
                ours.sendmsg([b'{"execute": "getfd", "arguments": {"fdname": "f"}}\n'], rights)
                assert qmp.read() == {"return": {}}
                assert target in fds_of(qemu.pid).values()
            finally:
                os.close(read)
                os.close(write)


def test_add_fd_makes_an_fdset_of_an_inherited_file(dropin: list[str], shared_tmp: Path) -> None:
    image = shared_tmp / "image"
    image.write_bytes(bytes(65536))
    fd = os.open(image, os.O_RDWR)
    try:
        options = ["-add-fd", f"fd={fd},set=5,opaque=an image", "-blockdev", "driver=file,filename=/dev/fdset/5,node-name=a"]
        with running(dropin, *options, pass_fds=(fd,)) as qemu:
            assert qemu.qmp.execute("query-fdsets")[0]["fds"][0]["opaque"] == "an image"
            assert qemu.qmp.execute("query-named-block-nodes")[0]["image"]["virtual-size"] == 65536
    finally:
        os.close(fd)


def test_a_drive_in_an_fdset_is_written_though_qemu_could_not_open_it(dropin: list[str], shared_tmp: Path) -> None:
    image = shared_tmp / "image"
    image.write_bytes(bytes(65536))
    image.chmod(0o600)
    fd = os.open(image, os.O_RDWR)
    try:
        options = ["-add-fd", f"fd={fd},set=5", "-blockdev", "driver=file,filename=/dev/fdset/5,node-name=d"]
        with running(dropin, *options, pass_fds=(fd,)) as qemu:
            qemu.qmp.hmp('qemu-io d "write -q -P 7 0 512"')
        assert image.read_bytes()[:512] == b"\7" * 512
    finally:
        os.close(fd)


def test_a_migration_arrives_over_an_inherited_fd(dropin: list[str]) -> None:
    read, write = os.pipe()
    with running(dropin, "-incoming", f"fd:{read}", pass_fds=(read,)) as target:
        try:
            assert fds_of(target.pid)[read] == os.readlink(f"/proc/self/fd/{read}")
            ours, theirs = socket.socketpair()
            with ours, theirs:
                options = ["-chardev", f"socket,id=c,fd={theirs.fileno()}", "-mon", "c,mode=control"]
                with running(dropin, *options, pass_fds=(theirs.fileno(),)), qmp_over(ours) as qmp:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))]
                    ours.sendmsg([b'{"execute": "getfd", "arguments": {"fdname": "out"}}\n'], rights)
                    assert qmp.read() == {"return": {}}
                    qmp.execute("migrate", uri="fd:out")
                    done = ("completed", "failed")
                    state = wait_until(
                        lambda: (now := qmp.execute("query-migrate").get("status")) in done and now, "the end of the migration"
                    )
            arrived = wait_until(
                lambda: (now := target.qmp.execute("query-status")["status"]) != "inmigrate" and now, "the migrated state"
            )
            assert (state, arrived) == ("completed", "prelaunch")
        finally:
            os.close(read)
            os.close(write)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
@pytest.mark.parametrize(
    ("option", "kind"),
    [
        *(("-readconfig", kind) for kind in ("file", "memfd", "pipe")),
        *(("-fw_cfg", kind) for kind in ("file", "memfd")),  # QEMU seeks in these, so a pipe does not work without us either
        *(("-blockdev", kind) for kind in ("file", "memfd")),
    ],
)
def test_an_inherited_fd_is_read_by_its_path(dropin: list[str], shared_tmp: Path, option: str, kind: str, name: str) -> None:
    content = b'[name]\n  guest = "from the fd"\n' if option == "-readconfig" else bytes(1024)
    options = {
        "-readconfig": ["-M", "none", "-readconfig", "{}"],
        "-fw_cfg": ["-M", "q35", "-fw_cfg", "name=opt/a,file={}"],
        "-blockdev": ["-M", "none", "-blockdev", "driver=file,filename={},node-name=a,read-only=on"],
    }[option]
    with content_fd(kind, content, shared_tmp) as fd:
        filled = [word.format(name.format(fd)) for word in options]
        with running(dropin, "-nodefaults", "-display", "none", "-S", *filled, pass_fds=(fd,), idle=False) as qemu:
            if option == "-readconfig":
                assert qemu.qmp.execute("query-name") == {"name": "from the fd"}
            elif option == "-blockdev":
                assert qemu.qmp.execute("query-named-block-nodes")[0]["image"]["virtual-size"] == 1024
            assert qemu.quit() == 0


@pytest.mark.parametrize("kind", ["file", "memfd"])
def test_a_kernel_is_loaded_from_an_inherited_fd(dropin: list[str], shared_tmp: Path, kind: str) -> None:
    kernel = bytearray(2048)
    kernel[0x1F1] = 1  # setup sectors
    kernel[0x202:0x208] = b"HdrS\x00\x02"
    with content_fd(kind, bytes(kernel), shared_tmp) as fd:
        options = ["-nodefaults", "-display", "none", "-S", "-M", "pc", "-kernel", f"/dev/fd/{fd}"]
        with running(dropin, *options, pass_fds=(fd,), idle=False) as qemu:
            assert qemu.qmp.execute("query-status")["status"] == "prelaunch"


def test_a_netdev_takes_an_inherited_socket(dropin: list[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, running(dropin, "-netdev", f"socket,id=n,fd={theirs.fileno()}", pass_fds=(theirs.fileno(),)) as qemu:
        assert "type=socket" in qemu.qmp.hmp("info network")
        assert fds_of(qemu.pid)[theirs.fileno()] == os.readlink(f"/proc/self/fd/{theirs.fileno()}")


def test_a_high_number_of_the_callers_is_kept_apart_from_our_own(dropin: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        taken = (300, 301, 302)
        for number in taken:
            os.dup2(theirs.fileno(), number)
        try:
            options = ["-chardev", "socket,id=c,fd=300", "-mon", "c,mode=control"]
            with running(dropin, *options, pass_fds=taken) as qemu, qmp_over(ours) as qmp:
                assert qmp.execute("query-status")
                assert fds_of(qemu.pid)[300].startswith("socket:")
                assert os.readlink("/proc/self/fd/300") not in [fds_of(qemu.pid).get(number) for number in (301, 302)]
        finally:
            for number in taken:
                os.close(number)


@contextlib.contextmanager
def output_fds(kind: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Give an fd to read from without waiting, and one to write to, that only the tester may open again."""
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "terminal":
        reader, writer = os.openpty()
    else:
        writer = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        reader = os.open(folder / "output", os.O_RDONLY)
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("kind", ["file", "pipe", "terminal"])
@pytest.mark.parametrize(
    "options",
    [
        ["-chardev", "file,id=c,path=/proc/self/fd/{}", "-mon", "chardev=c,mode=readline"],
        ["-chardev", "file,id=c,path=/proc/self/fd/{},append=on", "-mon", "chardev=c,mode=readline"],
        ["-monitor", "file:/proc/self/fd/{}"],
    ],
    ids=["chardev", "append", "legacy"],
)
def test_output_goes_to_an_inherited_fd_that_is_named_by_its_path(
    dropin: list[str], shared_tmp: Path, options: list[str], kind: str
) -> None:
    """As virtme-ng names its standard streams, which may be root's alone."""
    seen = []
    for words in (PLAIN, dropin):
        with output_fds(kind, shared_tmp) as (reader, writer):
            os.write(writer, b"what was there\n")
            filled = [word.format(writer) for word in options]
            with running(words, *filled, pass_fds=(writer,)) as qemu:
                text = b""

                def has_greeted(reader: int = reader) -> bool:
                    nonlocal text
                    with contextlib.suppress(BlockingIOError):
                        text += os.read(reader, 4096)
                    return b"(qemu)" in text

                wait_until(has_greeted, "what the monitor says first")
                assert qemu.quit() == 0
            seen.append(text)
    assert seen[1] == seen[0]
    assert (b"what was there" in seen[0]) == (kind != "file" or "append=on" in options[1])
