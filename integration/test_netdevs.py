"""Network back ends and network drives in a guest: slirp, passt, streams, VDE, vhost-user-blk, NBD; and what is refused."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import socketserver
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from integration.shares import Launch, dropin_words
from integration.talk import DEADLINE_S, IDLE, PLAIN, as_user, connected, outcome, running, started, wait_until
from integration.vhost_user import GET_FEATURES, GET_PROTOCOL_FEATURES, BackEnd
from integration.vm import running_guest
from tests.conftest import unprivileged_user_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from integration.vm import RunningGuest

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

MEMORY = ["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-machine", "memory-backend=ram"]
WORDS = b"from outside\n"
DISK = b"A" * 512 + bytes(65024)


def nic(name: str, number: int) -> list[str]:
    """Return the options of a nic whose MAC address ends in a number."""
    return ["-device", f"virtio-net-pci,netdev={name},mac=52:54:00:00:00:{number:02x}"]


def interface(number: int) -> str:
    """Return shell words that find that nic in the guest."""
    return f"$(basename $(dirname $(grep -l 52:54:00:00:00:{number:02x} /sys/class/net/*/address)))"


@contextlib.contextmanager
def booted(launch: Launch, folder: Path, *options: str) -> Iterator[RunningGuest]:
    with running_guest([*dropin_words(), *launch.options], tmp=folder, extra=list(options), timeout_s=60) as guest:
        yield guest


class Speaker(socketserver.BaseRequestHandler):
    """Says WORDS to who says something, and closes."""

    def handle(self) -> None:
        if self.request.recv(64):
            self.request.sendall(WORDS)


@contextlib.contextmanager
def speaking(server: socketserver.BaseServer) -> Iterator[None]:
    """Serve in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(guest: RunningGuest, address: str) -> list[str]:
    """Say something to an address and a port from the guest; return the lines that come back within a few seconds."""
    return guest.run(f"(echo hello; sleep 2) | timeout 5 nc {address}")[1].splitlines()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_slirp_with_files_programs_and_sockets(launch: Launch, shared_tmp: Path) -> None:
    shared_tmp.chmod(0o755)
    (shared_tmp / "tftp").mkdir(mode=0o755)
    (shared_tmp / "tftp/boot").write_text("a boot file")
    program = shared_tmp / "program"
    program.write_text("#!/bin/sh\necho program\nid -u\n")
    program.chmod(0o755)
    path, port = shared_tmp / "socket", free_port()
    server = socketserver.UnixStreamServer(str(path), Speaker)
    path.chmod(0o666)
    rules = f"guestfwd=tcp:10.0.2.100:1-cmd:{program},guestfwd=tcp:10.0.2.100:2-unix:{path},hostfwd=tcp:127.0.0.1:{port}-:7"
    netdev = f"user,id=n,tftp={shared_tmp / 'tftp'},bootfile=boot,{rules}"
    with speaking(server), booted(launch, shared_tmp, "-netdev", netdev, *nic("n", 1)) as guest:
        guest.check(f"ip link set {interface(1)} up && ip addr add 10.0.2.15/24 dev {interface(1)}")
        assert guest.check("tftp -g -r boot -l /tmp/boot 10.0.2.2 && cat /tmp/boot") == "a boot file"
        assert ask(guest, "10.0.2.100 1")[:2] == ["program", "0"]
        assert ask(guest, "10.0.2.100 2")[0] == WORDS.decode().strip()
        guest.check("echo from the guest >/tmp/words; (nc -l -p 7 </tmp/words >/dev/null 2>&1 &) ; sleep 0.3")
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
            assert client.recv(64) == b"from the guest\n"


@pytest.mark.passt
@pytest.mark.parametrize("form", ["members", "json"])
def test_passt_over_a_stream(launch: Launch, shared_tmp: Path, form: str) -> None:
    shared_tmp.chmod(0o777)
    path = shared_tmp / "passt"
    user = unprivileged_user_name()
    assert user is not None
    passt = ["passt", "--foreground", "--socket", str(path), "--address", "10.9.0.2", "--netmask", "24", "--gateway", "10.9.0.1"]
    members = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
    in_json = f'{{"type":"stream","id":"n","server":false,"addr":{{"type":"unix","path":"{path}"}}}}'
    server = socketserver.TCPServer(("127.0.0.1", 0), Speaker)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with speaking(server), started(as_user(user, *passt), **quiet):
        wait_until(path.is_socket, "passt")
        netdev = members if form == "members" else in_json
        with booted(launch, shared_tmp, "-netdev", netdev, *nic("n", 1)) as guest:
            guest.check(f"ip link set {interface(1)} up")
            assert "lease of 10.9.0.2 obtained" in guest.check(f"udhcpc -n -q -f -s /bin/true -i {interface(1)}")
            guest.check(f"ip addr add 10.9.0.2/24 dev {interface(1)}")
            assert ask(guest, f"10.9.0.1 {server.server_address[1]}")[0] == WORDS.decode().strip()


def test_a_stream_that_is_listened_on_where_only_the_caller_may(launch: Launch, shared_tmp: Path) -> None:
    """A frame, with its length before it as QEMU has it, comes from the guest to who connects."""
    folder = shared_tmp / "private"
    folder.mkdir(mode=0o700)
    path = folder / "stream"
    netdev = f"stream,id=n,server=on,addr.type=unix,addr.path={path}"
    with booted(launch, shared_tmp, "-netdev", netdev, *nic("n", 1)) as guest, connected(path) as peer:
        assert not (guest.proc / f"root{folder}").exists()
        guest.check(f"ip link set {interface(1)} up && ip addr add 10.0.0.1/24 dev {interface(1)}")
        guest.run(f"arping -c 1 -w 1 -I {interface(1)} 10.0.0.2")
        peer.settimeout(DEADLINE_S)
        with peer.makefile("rb") as reader:
            frame = b""
            while frame[12:14] != b"\x08\x06":  # ARP
                frame = reader.read(int.from_bytes(reader.read(4), "big"))
        assert frame[6:12] == bytes.fromhex("525400000001")
    wait_until(lambda: not path.exists(), "the socket gone")


@pytest.mark.vde
def test_vde(launch: Launch, shared_tmp: Path) -> None:
    shared_tmp.chmod(0o755)
    path = shared_tmp / "switch"
    switch = ["vde_switch", "-s", str(path), "-m", "0666", "--dirmode", "0777"]
    with started(switch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        wait_until((path / "ctl").is_socket, "the switch")
        netdevs = ["-netdev", f"vde,id=a,sock={path}", "-netdev", f"vde,id=b,sock={path}"]
        with booted(launch, shared_tmp, *netdevs, *nic("a", 1), *nic("b", 2)) as guest:
            guest.check(f"ip link set {interface(1)} up; ip link set {interface(2)} up")
            guest.check(f"ip addr add 10.0.0.1/24 dev {interface(1)}")
            guest.run(f"arping -c 3 -w 3 -I {interface(1)} 10.0.0.2")
            assert int(guest.check(f"cat /sys/class/net/{interface(2)}/statistics/rx_packets")) > 0
        path.chmod(0o700)
        if os.geteuid() == 0:
            status, _, stderr = outcome(dropin_words(), *launch.options, *IDLE, "-netdev", f"vde,id=a,sock={path}")
            assert status == 1
            assert "may not make its end of the connection in it" in stderr


@pytest.mark.parametrize("backend", ["vhost-user-blk", "nbd members", "nbd json"])
def test_a_drive_behind_a_socket_of_the_callers_alone(launch: Launch, shared_tmp: Path, backend: str) -> None:
    folder = shared_tmp / "private"
    folder.mkdir(mode=0o700)
    disk, path = folder / "disk", folder / "socket"
    disk.write_bytes(WORDS.ljust(1 << 20, b"\0"))
    daemon = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={disk}"]
    export = "writable=on,node-name=f"
    if backend == "vhost-user-blk":
        daemon += ["--export", f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},{export}"]
        options = [*MEMORY, "-chardev", f"socket,id=c,path={path}", "-device", "vhost-user-blk-pci,chardev=c"]
    else:
        daemon += ["--nbd-server", f"addr.type=unix,addr.path={path}", "--export", f"type=nbd,id=e,name=disk,{export}"]
        address = f"driver=nbd,export=disk,server.type=unix,server.path={path}"
        in_json = f'{{"driver":"nbd","export":"disk","node-name":"d","server":{{"path":"{path}","type":"unix"}}}}'
        member = ["-drive", f"if=none,id=d,format=raw,{','.join(f'file.{item}' for item in address.split(','))}"]
        options = [*(member if backend == "nbd members" else ["-blockdev", in_json]), "-device", "virtio-blk-pci,drive=d"]
    with started(daemon):
        wait_until(path.is_socket, "the storage daemon")
        with booted(launch, shared_tmp, *options) as guest:
            assert guest.check(f"head -c {len(WORDS)} /dev/vda").encode() == WORDS
            guest.check("echo from the guest | dd of=/dev/vda bs=512 seek=1 conv=fsync 2>/dev/null")
    assert disk.read_bytes()[512:527] == b"from the guest\n"


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves DISK, also in parts, which QEMU's curl driver asks for."""

    def do_HEAD(self) -> None:
        self._answer(200, DISK, send=False)

    def do_GET(self) -> None:
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        self._answer(206, DISK[first : last + 1], send=True)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: bytes, send: bool) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.mark.network_drives
def test_a_nic_of_vhost_user_meets_its_back_end(launch: Launch, shared_tmp: Path) -> None:
    """They negotiate as with plain QEMU. No guest runs: QEMU 7.2 as such ends by SIGSEGV with a back end that can no more."""
    found = []
    for name, words in (("plain", list(PLAIN)), ("ours", [*dropin_words(), *launch.options])):
        place = shared_tmp / name
        back_end = BackEnd(place)
        place.chmod(0o666)
        back_end.start()
        netdev = ["-chardev", f"socket,id=c,path={place}", "-netdev", "vhost-user,id=n,chardev=c", *nic("n", 9)]
        with running(words, *MEMORY[:2], "-M", "q35,memory-backend=ram", "-m", "256", "-S", *netdev) as vm:
            shown = str(vm.qmp.hmp("info network")).replace(str(place), "PLACE")
            vm.quit()
        back_end.join()
        found.append((shown, back_end.requests))
    assert "vhost-user" in found[0][0]
    assert [request for request, _ in found[0][1]][:2] == [GET_FEATURES, GET_PROTOCOL_FEATURES]
    assert found[0] == found[1]


def test_a_drive_of_the_network(launch: Launch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    url = f"http://127.0.0.1:{server.server_address[1]}/disk"
    drive = f"if=none,id=d,format=raw,readonly=on,file={url}"
    with speaking(server), running(dropin_words(), "-drive", drive, *launch.options, stdout=subprocess.PIPE) as qemu:
        assert url in qemu.qmp.hmp("info block")
        qemu.qmp.hmp('qemu-io d "read -P 0x41 0 512"')
        qemu.qmp.hmp('qemu-io d "read -P 0x41 512 512"')
        assert qemu.quit() == 0
        assert qemu.process.stdout is not None
        said = qemu.process.stdout.read().decode()
    assert "read 512/512 bytes at offset 0" in said
    assert said.index("Pattern verification failed") > said.index("read 512/512 bytes at offset 0")


@pytest.mark.parametrize(
    ("netdev", "text"),
    [
        ("l2tpv3,id=n,src=::1,dst=::1,ipv6=on,txsession=1", "L2TPv3 without UDP opens a raw IP socket, which takes CAP_NET_RAW"),
        ("af-xdp,id=n,ifname=lo", "AF_XDP loads a BPF program onto the interface"),
        ("passt,id=n", "QEMU would start passt, which makes namespaces of its own"),
    ],
)
def test_what_takes_rights_over_the_host_is_refused(dropin: list[str], netdev: str, text: str) -> None:
    status, stdout, stderr = outcome(dropin, *IDLE, "-netdev", netdev)
    assert (status, stdout) == (1, "")
    assert text in stderr
    assert "\nhint: " in stderr


def test_l2tpv3_over_udp_and_netdevs_of_the_network(dropin: list[str]) -> None:
    ports = [free_port() for _ in range(2)]
    l2tpv3 = f"l2tpv3,id=a,src=127.0.0.1,dst=127.0.0.1,udp=on,srcport={ports[0]},dstport={ports[1]},rxsession=1,txsession=1"
    stream = "stream,id=d,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port=0"
    others = ["hubport,id=b,hubid=0", "socket,id=c,listen=127.0.0.1:0", stream]
    with running(dropin, *(word for netdev in (l2tpv3, *others) for word in ("-netdev", netdev))) as qemu:
        listed = qemu.qmp.hmp("info network")
        assert all(word in listed for word in ("l2tpv3: connected", "hub 0", "type=socket", "type=stream")), listed
        qemu.qmp.execute("netdev_del", id="a")
        qemu.qmp.execute("netdev_add", type="user", id="e")
        assert qemu.quit() == 0
