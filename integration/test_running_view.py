"""Hot-plug by path into the view of a real QEMU: what sandbox/running.py places, QEMU opens, and after unbind it does not.

What the command line did not name is asked for on a human monitor too, which no broker stands before.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.talk import Qmp, Running, connected, fds_of, map_of, qmp_over, started, wait_until
from qemu_userns.host.opening import Opened
from qemu_userns.plan.grants import Bind, Grant, Node
from qemu_userns.plan.identity import DIRECT, SELF, Identity, MapEntry, MountMap, build_owner_map
from qemu_userns.plan.layout import build_layout
from qemu_userns.sandbox.places import Shown
from qemu_userns.sandbox.running import Namespaces, bind_running, open_namespaces, unbind_running
from tests.conftest import TEST_USER
from tests.forked import in_child

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

ROOT = os.geteuid() == 0
MACHINE = ["-S", "-nodefaults", "-display", "none", "-M", "pc", "-m", "16"]
PROMPT = b"(qemu) "
SIZE_BYTES = 1 << 20


@dataclass(frozen=True)
class HotPlug:
    """A QEMU, and what a worker of its supervisor does for it."""

    qemu: Running
    hmp: socket.socket

    @property
    def identity(self) -> Identity:
        (_, uid, _), (_, gid, _) = map_of(self.qemu.pid, "uid")[0], map_of(self.qemu.pid, "gid")[0]
        groups = tuple(int(word) for word in self.qemu.status["Groups"].split())
        uids, gids = (tuple(MapEntry(*entry) for entry in map_of(self.qemu.pid, kind)) for kind in ("uid", "gid"))
        return Identity(uid, gid, groups, ROOT, DIRECT if ROOT else SELF, uids, gids, "a test")

    def open(self) -> Namespaces:
        pidfd = os.pidfd_open(self.qemu.pid)
        try:
            return open_namespaces(self.qemu.pid, pidfd, self.identity)
        finally:
            os.close(pidfd)

    def bind(self, *grants: Grant) -> tuple[Shown, ...]:
        def work() -> tuple[Shown, ...]:
            opened = Opened(build_layout(grants), lambda _: None)
            return bind_running(opened, self.identity, self.open())

        return tuple(in_child(work))

    def unbind(self, shown: tuple[Shown, ...]) -> None:
        assert in_child(lambda: unbind_running(shown, self.identity, self.open())) == ()

    def ask(self, line: str) -> str:
        """Return what QEMU's human monitor answers to a command."""
        self.hmp.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(PROMPT) or b"\r\n" not in answer:
            data = self.hmp.recv(65536)
            assert data, "QEMU has closed its monitor"
            answer += data
        return answer.decode(errors="replace")

    def opens(self, path: Path, read_only: str = "on") -> bool:
        """Say whether QEMU can open an image by its path."""
        answer = self.ask(f"drive_add 0 if=none,id=probe,file={path},format=raw,read-only={read_only},auto-read-only=off")
        if "OK" in answer:
            self.ask("drive_del probe")
            return True
        assert "Could not open" in answer, answer
        return False


@pytest.fixture(params=["root", "-runas"] if ROOT else ["ordinary user"])
def plug(request: pytest.FixtureRequest, dropin: list[str], shared_tmp: Path) -> Iterator[HotPlug]:
    """A QEMU with a leased id, one that runs as a user, or, for an ordinary user, that user's own."""
    options = ["-runas", TEST_USER] if request.param == "-runas" else []
    ours, theirs = socket.socketpair()
    monitors = shared_tmp / "monitors"
    monitors.mkdir()
    with ours, contextlib.ExitStack() as stack:
        with theirs:
            fd = theirs.fileno()
            words = ["-chardev", f"socket,id=human,fd={fd}", "-mon", "chardev=human,mode=readline"]
            words += ["-qmp", f"unix:{monitors / 'qmp'},server=on,wait=off", *options]
            process = stack.enter_context(started([*dropin, *MACHINE, *words], pass_fds=(fd,)))
        qmp = stack.enter_context(qmp_over(stack.enter_context(connected(monitors / "qmp"))))
        ours.settimeout(30)
        ours.recv(65536)
        yield HotPlug(Running(process, qmp), ours)


def image_at(path: Path, form: str, plug: HotPlug | None = None) -> Path:
    """Make an image of one MiB; QEMU's own if it is given, else readable for everybody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(path), str(SIZE_BYTES)], check=True)
    path.chmod(0o644)
    if plug is not None and ROOT:
        os.chown(path, plug.identity.uid, plug.identity.gid)
    return path


def bind(path: Path, **options: bool | MountMap) -> Bind:
    status = path.lstat()
    return Bind("test", str(path), inode=(status.st_dev, status.st_ino), **options)  # type: ignore[arg-type]


def add(qmp: Qmp, path: Path, form: str, *, read_only: bool) -> None:
    file = {"driver": "file", "filename": str(path)}
    qmp.execute("blockdev-add", **{"driver": form, "node-name": "disk", "read-only": read_only, "file": file})


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_blockdev_add_opens_what_was_bound_and_nothing_after_unbind(plug: HotPlug, shared_tmp: Path, form: str) -> None:
    image = image_at(shared_tmp / "images/disk", form)
    mounts, fds = (plug.qemu.proc / "mountinfo").read_text(), fds_of(plug.qemu.pid)
    assert not plug.opens(image)
    shown = plug.bind(bind(image))
    assert plug.opens(image)
    plug.unbind(shown)
    assert not plug.opens(image)
    assert (plug.qemu.proc / "mountinfo").read_text() == mounts
    assert {number: target for number, target in fds_of(plug.qemu.pid).items() if number not in fds} == {}
    # Last, since a broker places it too.
    plug.bind(bind(image))
    add(plug.qemu.qmp, image, form, read_only=True)
    assert {node["file"] for node in plug.qemu.qmp.execute("query-named-block-nodes")} == {str(image)}


def test_a_writable_image_is_written(plug: HotPlug, shared_tmp: Path) -> None:
    image = image_at(shared_tmp / "images/disk", "raw", plug)
    plug.bind(bind(image, writable=True))
    add(plug.qemu.qmp, image, "raw", read_only=False)
    plug.ask('qemu-io disk "write -P 0x5a 0 64k"')
    plug.ask('qemu-io disk "flush"')
    assert image.read_bytes()[:65536] == b"\x5a" * 65536


def test_a_read_only_bind_cannot_be_written(plug: HotPlug, shared_tmp: Path) -> None:
    image = image_at(shared_tmp / "images/disk", "raw", plug)
    plug.bind(bind(image))
    assert plug.opens(image)
    assert not plug.opens(image, read_only="off")


def test_a_backing_file_by_a_relative_name_is_found_beside_its_image(plug: HotPlug, shared_tmp: Path) -> None:
    base = image_at(shared_tmp / "images/base", "raw")
    top = shared_tmp / "images/top"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", str(top)], check=True)
    plug.bind(bind(base), bind(top))
    add(plug.qemu.qmp, top, "qcow2", read_only=True)
    assert str(base) in {node["file"] for node in plug.qemu.qmp.execute("query-named-block-nodes")}


def test_in_the_private_tmp(plug: HotPlug) -> None:
    """A file of the host's /tmp is shown in the VM's own /tmp, as which QEMU may have put anything at the place."""
    image = image_at(Path(f"/tmp/qemu-userns-test-{os.getpid()}/disk"), "raw")
    try:
        shown = plug.bind(bind(image))
        assert plug.opens(image)
        plug.unbind(shown)
        assert not (plug.qemu.proc / f"root{image.parent}").exists()
    finally:
        image.unlink()
        image.parent.rmdir()


@pytest.mark.root
def test_an_image_that_only_root_may_read(plug: HotPlug, shared_tmp: Path) -> None:
    image = image_at(shared_tmp / "images/disk", "raw")
    image.chmod(0o600)
    image.parent.chmod(0o700)
    shown = plug.bind(bind(image))
    assert not plug.opens(image)
    plug.unbind(shown)
    shown = plug.bind(bind(image, idmap=build_owner_map(0, 0, plug.identity)))
    assert plug.opens(image)
    assert not plug.opens(image, read_only="off")
    plug.unbind(shown)
    assert image.stat().st_uid == 0


@pytest.mark.root
def test_a_block_device_node(plug: HotPlug, shared_tmp: Path) -> None:
    image = image_at(shared_tmp / "images/disk", "raw")
    command = ["losetup", "--find", "--show", str(image)]
    loop = subprocess.run(command, capture_output=True, text=True)
    if loop.returncode:
        pytest.skip(f"losetup: {loop.stderr}")
    device = Path(loop.stdout.strip())
    try:
        plug.bind(Node("test", str(device), device.stat().st_rdev, block=True))
        disk = {"driver": "host_device", "node-name": "disk", "filename": str(device)}
        plug.qemu.qmp.execute("blockdev-add", **disk)
        plug.ask('qemu-io disk "write -P 0x77 0 4k"')
        plug.ask('qemu-io disk "flush"')
        plug.qemu.qmp.execute("blockdev-del", **{"node-name": "disk"})
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)
    assert image.read_bytes()[:4096] == b"\x77" * 4096


def test_qemu_holds_nothing_of_the_worker(plug: HotPlug, shared_tmp: Path) -> None:
    image = image_at(shared_tmp / "images/disk", "raw")
    fds = fds_of(plug.qemu.pid)
    plug.bind(bind(image))
    assert fds_of(plug.qemu.pid) == fds
    assert wait_until(lambda: plug.qemu.status["NoNewPrivs"], "its status") == "1"
    assert int(plug.qemu.status["CapEff"], 16) == 0
