"""The stand-in for virtfs-proxy-helper: LXD's and Incus' way of sharing, on a QEMU with or without the proxy driver.

LXD's contract, 3.2 and 3.4, and points 13, 14 and 16 of its checklist.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.shares import Launch, SharedVm, dropin_words, launches, mount_options
from integration.stand_in import DEADLINE_S, LXD_MAP, Helper, helper
from integration.talk import REAL, running, wait_until
from integration.vm import running_guest
from qemu_userns.host.stand_ins import ANSWER, QUESTION
from qemu_userns.plan.identity import MapEntry
from tests.conftest import CHECKOUT, dropin_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap]

REAL_HELPER = "/usr/lib/qemu/virtfs-proxy-helper"
OVERFLOW = 65534


def lxd_config(folder: Path, fd: int, readonly: str = "off") -> list[str]:
    """Write the sections that LXD writes; return the option that reads them."""
    (folder / "qemu.conf").write_text(
        f'[fsdev "lxd_disk"]\nfsdriver = "proxy"\nsock_fd = "{fd}"\nreadonly = "{readonly}"\n\n'
        '[device "dev-lxd_disk-9p"]\ndriver = "virtio-9p-pci"\nmount_tag = "lxd_disk"\nfsdev = "lxd_disk"\n'
    )
    return ["-readconfig", str(folder / "qemu.conf")]


def make_share(folder: Path) -> Path:
    share = folder / "share"
    share.mkdir()
    for name, owner in (("user", 1000), ("hosts", 0), ("nobodys", 65534)):
        (share / name).write_text(name)
        if os.geteuid() == 0:
            os.chown(share / name, owner, owner)
    if os.geteuid() == 0:
        os.chown(share, 1000, 1000)
        share.chmod(0o775)
    return share


def start(helper: Helper | None, *words: str, program: str = "") -> subprocess.CompletedProcess[str]:
    """Start QEMU with nothing in it, and let it end."""
    fds = (helper.fd,) if helper is not None else ()
    command = [*([program] if program else dropin_words()), "-nodefaults", "-display", "none", "-monitor", "stdio", *words]
    return subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60, pass_fds=fds)


WAYS = [Launch("lease"), Launch("nobody", ("-runas", "nobody"), "nobody"), *(way for way in launches() if way.name == "runas")]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_share_of_lxds_has_the_ids_of_its_namespace(way: Launch, shared_tmp: Path) -> None:
    share = make_share(shared_tmp)
    with helper(share, LXD_MAP) as stand_in:
        words = [*lxd_config(shared_tmp, stand_in.fd), *way.options]
        with running_guest(dropin_words(), tmp=shared_tmp, extra=words, pass_fds=(stand_in.fd,)) as guest:
            SharedVm(way, shared_tmp, guest).mount("lxd_disk")
            answer = guest.check("""cd /lxd_disk; stat -c '%n %u %g' user hosts nobodys
                cp /bin/busybox shell; chown 0:0 shell; chmod 6755 shell
                echo data >users; chown 1000:1000 users; chown 1:1 users; chown 0:0 hosts; stat -c '%u %g %a' shell users""")
            assert "nosuid" in mount_options(guest.proc, share)
            assert stand_in.command.poll() is None
            assert stand_in.channel.recv(100) == b"", "nothing more comes out of it, whoever asks"
            stand_in.channel.close()
            assert stand_in.command.poll() is None
        assert stand_in.wait() == (0, "")
    assert answer.startswith(f"user 1000 1000\nhosts {OVERFLOW} {OVERFLOW}\nnobodys 0 0\n")
    assert answer.endswith("\n0 0 6755\n1000 1000 644\n")
    assert "chown: users: Value too large" in answer
    assert "chown: hosts: Operation not permitted" in answer
    found = {entry.name: (entry.lstat().st_uid, entry.lstat().st_gid) for entry in share.iterdir()}
    assert found == {
        "user": (1000, 1000),
        "hosts": (0, 0),
        "nobodys": (65534, 65534),
        "shell": (65534, 65534),
        "users": (1000, 1000),
    }


@pytest.mark.root
def test_a_read_only_share_is_so_on_the_host(shared_tmp: Path) -> None:
    share = make_share(shared_tmp)
    with helper(share, LXD_MAP) as stand_in:
        words = [*lxd_config(shared_tmp, stand_in.fd, "on"), "-runas", "nobody"]
        shown = explain(stand_in, *words)
        assert f"{share} (ro, guest's 0 is 65534, 1000 is 1000 on disk)" in shown
        done = start(stand_in, *words)  # explain has asked, and the launch may ask again
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_without_an_id_map_the_ids_are_qemus_own(shared_tmp: Path) -> None:
    """Never silent host root: the helper is host root, and what the guest makes is QEMU's."""
    share = make_share(shared_tmp)
    share.chmod(0o777)
    with helper(share) as stand_in:
        words = [*lxd_config(shared_tmp, stand_in.fd), "-runas", "nobody"]
        with running_guest(dropin_words(), tmp=shared_tmp, extra=words, pass_fds=(stand_in.fd,)) as guest:
            SharedVm(WAYS[1], shared_tmp, guest).mount("lxd_disk")
            guest.check("cd /lxd_disk; echo data >made; chmod 6755 made; ! chown 0:0 hosts")
            result = guest.power_off()
    assert result.stderr == (
        f"qemu-userns: warning: -fsdev fsdriver proxy {share}: its helper is host root without an id map; the share has QEMU's "
        "own ids (share.lxd_disk.idmap gives it a map)\n"
    )
    assert ((share / "made").stat().st_uid, (share / "hosts").stat().st_uid) == (65534, 0)


@pytest.mark.root
def test_the_settings_give_a_share_without_an_id_map_one(shared_tmp: Path) -> None:
    share = make_share(shared_tmp)
    with helper(share) as stand_in:
        words = [*lxd_config(shared_tmp, stand_in.fd), "-runas", "nobody", "-userns", "share.lxd_disk.idmap=both 1000 0"]
        assert f"{share} (rw, guest's 0 is 1000 on disk)" in explain(stand_in, *words)


@pytest.mark.root
def test_host_root_in_the_namespace_of_the_helper_is_refused(shared_tmp: Path) -> None:
    share = make_share(shared_tmp)
    with helper(share, (MapEntry(0, 0, 1000),)) as stand_in:
        done = start(stand_in, *lxd_config(shared_tmp, stand_in.fd), "-runas", "nobody")
    assert done.returncode == 1
    assert "host root is in its id map" in done.stderr


def explain(stand_in: Helper, *words: str) -> str:
    command = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", "qemu-system-x86_64", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, pass_fds=(stand_in.fd,)).stdout


@pytest.mark.parametrize("option", ["fsdev", "virtfs"])
def test_a_socket_by_its_path(option: str, shared_tmp: Path) -> None:
    """By --socket, for whoever starts QEMU; in the background, until QEMU ends. The device is as it was asked for."""
    share, path = shared_tmp / "share", shared_tmp / "socket"
    share.mkdir()
    owner = ["--uid", str(os.getuid()), "--gid", str(os.getgid())]
    words = [str(dropin_folder() / "virtfs-proxy-helper"), "--path", str(share), "-s", str(path), *owner]
    assert subprocess.run(words, timeout=DEADLINE_S).returncode == 0
    (pid,) = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and str(path).encode() in cmdline(entry)]
    tag = "mount_tag=tag" if option == "virtfs" else "id=tag"
    idle = ("-nodefaults", "-display", "none", "-S")
    device = ["-device", "virtio-9p-pci,id=nine,fsdev=tag,mount_tag=name,addr=5.0"] if option == "fsdev" else []
    proxy = [f"-{option}", f"proxy,{tag},socket={path},writeout=immediate", *device]
    with running(dropin_words(), *idle, *proxy, idle=False) as qemu:
        assert cmdline(str(pid)), "it stays as long as QEMU"
        if device:
            (bus,) = qemu.qmp.execute("query-pci")
            assert [found["slot"] for found in bus["devices"] if found["qdev_id"] == "nine"] == [5]
            get = {"path": "/machine/peripheral/nine"}
            assert [qemu.qmp.execute("qom-get", **get, property=name) for name in ("fsdev", "mount_tag")] == ["tag", "name"]
        assert qemu.quit() == 0
    wait_until(lambda: not os.path.exists(f"/proc/{pid}") or not cmdline(str(pid)), "the helper ends")
    assert not path.exists()


def cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# --- whoever else is at the other end --------------------------------------------------------------------------------


@contextlib.contextmanager
def stranger(answer: bytes | None, fds: Sequence[int] = ()) -> Iterator[int]:
    """Answer what a launcher asks, with something else, or end the connection; yield QEMU's end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if answer is None:
            ours.shutdown(socket.SHUT_RDWR)
        elif answer:
            socket.send_fds(ours, [answer], list(fds))
        yield theirs.fileno()


PATH = len(b"/etc").to_bytes(4, "big") + b"/etc"


@pytest.mark.parametrize(
    ("answer", "count", "reason"),
    [
        (None, 0, "cannot be asked for its share: Broken pipe"),
        (b"HTTP/1.0 400 Bad Request", 0, "no virtfs-proxy-helper of ours is at the other end"),
        (ANSWER + PATH, 0, "virtfs-proxy-helper has handed nothing over"),
        (ANSWER + PATH, 1, "virtfs-proxy-helper has handed nothing over"),
        (ANSWER + PATH, 2, "is not a directory"),
        (ANSWER + b"\xff\xff\xff\xff", 2, "no virtfs-proxy-helper of ours is at the other end"),
    ],
)
def test_a_stranger_is_refused(answer: bytes | None, count: int, reason: str) -> None:
    with open("/dev/null") as null, stranger(answer, [null.fileno()] * count) as fd:
        command = [*dropin_words(), "-S", "-fsdev", f"proxy,id=tag,sock_fd={fd}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, pass_fds=(fd,))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-userns: -fsdev tag: proxy")
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("sock_fd=1000", "cannot be asked for its share: Bad file descriptor"),
        ("sock_fd=x", "sock_fd=x is no number"),
        ("sock_fd=0", "fd 0 is no socket"),
        ("socket=/nonexistent", "cannot be asked for its share: No such file or directory"),
        ("readonly=on", "takes either sock_fd or socket"),
    ],
)
def test_what_is_no_socket_is_refused_with_what_to_use(option: str, reason: str) -> None:
    done = start(None, "-fsdev", f"proxy,id=tag,{option}")
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr


@pytest.mark.root
def test_qemus_own_helper_is_refused(shared_tmp: Path) -> None:
    with helper(shared_tmp, program=REAL_HELPER) as real:
        done = start(real, *lxd_config(shared_tmp, real.fd), "-runas", "nobody")
    assert done.returncode == 1
    assert "start the virtfs-proxy-helper that `qemu-userns install` puts beside the drop-in" in done.stderr


@pytest.mark.slow
def test_a_qemu_that_is_not_wrapped_is_told_at_once(shared_tmp: Path) -> None:
    """QEMU 7.2 has the proxy driver: what it asks for makes no sense to the stand-in."""
    share = shared_tmp / "share"
    share.mkdir()
    with helper(share) as stand_in:
        done = start(stand_in, *lxd_config(shared_tmp, stand_in.fd), program=REAL)
        status, said = stand_in.wait()
    assert (done.returncode, status) == (1, 1)
    assert said.startswith("qemu-userns: virtfs-proxy-helper: QEMU speaks the protocol of its proxy driver\nhint: ")


def test_it_ends_with_the_connection_and_no_sooner(shared_tmp: Path) -> None:
    with helper(shared_tmp) as stand_in:
        for _ in range(2):
            stand_in.channel.sendall(QUESTION[:5])
            stand_in.channel.sendall(QUESTION[5:])
            data, fds, _, _ = socket.recv_fds(stand_in.channel, 4096, 8)
            assert data == ANSWER + len(str(shared_tmp)).to_bytes(4, "big") + str(shared_tmp).encode()
            assert os.path.samestat(os.fstat(fds[1]), shared_tmp.stat())
            assert len(fds) == 2
            for fd in fds:
                os.close(fd)
        stand_in.channel.sendall(b"anything else" * 1000)
        assert stand_in.command.poll() is None
        stand_in.channel.close()
        assert stand_in.wait() == (0, "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "takes --path"),
        (("--path", "/"), "takes --path, and either --fd or --socket"),
        (("--path", "/", "--fd", "3", "--socket", "/x"), "either --fd or --socket"),
        (("--path", "/", "--fd", "77"), "is no connected socket"),
        (("--path", "/nonexistent", "--fd", "0"), "No such file or directory"),
        (("--path", "/", "--socket", "/nonexistent/x"), "--socket takes --uid and --gid"),
        (("--path", "/", "-s", "/nonexistent/x", "-u", "0", "-g", "0"), "No such file or directory"),
        (("--colour",), "not recognized"),
    ],
)
def test_wrong_words(words: tuple[str, ...], reason: str) -> None:
    command = [str(dropin_folder() / "virtfs-proxy-helper"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-userns: ")
    assert reason in done.stderr
