"""Network back ends and drives: slirp, passt, sockets, L2TPv3, VDE, vhost-user, NBD, HTTP, iSCSI, RBD; and what is refused."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import socketserver
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.networks import own_network
from integration.shares import Launch, dropin_words
from integration.talk import DEADLINE_S, IDLE, PLAIN, as_user, connected, outcome, running, started, wait_until
from integration.vhost_user import GET_FEATURES, BackEnd
from integration.vm import running_guest
from tests.conftest import unprivileged_user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.plugged import Compare, Vm
    from integration.vm import RunningGuest

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

MEMORY = ["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-machine", "memory-backend=ram"]
WORDS = b"from outside\n"
# Under TCG QEMU 7.2 takes irqfds of KVM for the vectors of a vhost-user nic, and ends by SIGSEGV; with the pin there are none.
NO_MSIX = ",vectors=0"
DISK = b"A" * 512 + bytes(65024)
CEPH = """[global]
mon_host = [v1:127.0.0.1:{port}]
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
"""


def nic(name: str, number: int) -> list[str]:
    """Return the options of a nic whose MAC address ends in a number."""
    return ["-device", f"virtio-net-pci,netdev={name},mac=52:54:00:00:00:{number:02x}"]


def interface(number: int) -> str:
    """Return shell words that find that nic in the guest."""
    return f"$(basename $(dirname $(grep -l 52:54:00:00:00:{number:02x} /sys/class/net/*/address)))"


@contextlib.contextmanager
def booted(launch: Launch, folder: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> Iterator[RunningGuest]:
    words = [*dropin_words(), *launch.options]
    with running_guest(words, tmp=folder, extra=list(options), timeout_s=60, pass_fds=pass_fds) as guest:
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


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """Listen on a port of this host's, for who comes within the time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("form", ["members", "json"])
def test_slirp_with_files_programs_and_sockets(launch: Launch, shared_tmp: Path, form: str) -> None:
    shared_tmp.chmod(0o755)
    (shared_tmp / "tftp").mkdir(mode=0o755)
    (shared_tmp / "tftp/boot").write_text("a boot file")
    program = shared_tmp / "program"
    program.write_text("#!/bin/sh\necho program\nid -u\n")
    program.chmod(0o755)
    path, port = shared_tmp / "socket", free_port()
    server = socketserver.UnixStreamServer(str(path), Speaker)
    path.chmod(0o666)
    forwards = [f"tcp:10.0.2.100:1-cmd:{program}", f"tcp:10.0.2.100:2-unix:{path}"]
    options = {"type": "user", "id": "n", "tftp": str(shared_tmp / "tftp"), "bootfile": "boot"}
    netdev = json.dumps(
        options
        | {"guestfwd": [{"str": forward} for forward in forwards], "hostfwd": [{"str": f"tcp:127.0.0.1:{port}-:7"}]}
    )
    if form == "members":
        rules = [*(f"guestfwd={forward}" for forward in forwards), f"hostfwd=tcp:127.0.0.1:{port}-:7"]
        netdev = ",".join([*(f"{key}={value}" for key, value in options.items()), *rules])
    with speaking(server), booted(launch, shared_tmp, "-netdev", netdev, *nic("n", 1)) as guest:
        guest.check(f"ip link set {interface(1)} up && ip addr add 10.0.2.15/24 dev {interface(1)}")
        assert guest.check("tftp -g -r boot -l /tmp/boot 10.0.2.2 && cat /tmp/boot") == "a boot file"
        assert ask(guest, "10.0.2.100 1")[:2] == ["program", "0"]
        assert ask(guest, "10.0.2.100 2")[0] == WORDS.decode().strip()
        guest.check("echo from the guest >/tmp/words; (nc -l -p 7 </tmp/words >/dev/null 2>&1 &) ; sleep 0.3")
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
            assert client.recv(64) == b"from the guest\n"


def test_the_program_of_a_forward_is_shown_by_a_command_and_taken_away(dropin: list[str], shared_tmp: Path) -> None:
    shared_tmp.chmod(0o755)
    program = shared_tmp / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with running(dropin) as qemu:
        seen = Path(f"/proc/{qemu.process.pid}/root{program}")
        assert not seen.exists()
        qemu.qmp.execute("netdev_add", type="user", id="n", guestfwd=[{"str": f"tcp:10.0.2.100:1-cmd:{program}"}])
        assert seen.read_text() == "#!/bin/sh\n"
        qemu.qmp.execute("netdev_del", id="n")
        wait_until(lambda: not seen.exists(), "the program out of the view")
        assert qemu.quit() == 0


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


class Ends:
    """Pairs of netdevs of one VM, what one end sends the other receives; the options and fds that they take."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.options: list[str] = []
        self.sockets: list[socket.socket] = []

    def add(self, name: str, first: str, second: str, device: str = "") -> None:
        """Add a pair; nics have numbers in the order of the pairs, from 1."""
        self.names.append(name)
        for end in (first, second):
            number = len(self.options) // 4 + 1
            model, nic_options = nic(f"n{number}", number)
            self.options += ["-netdev", end.format(f"id=n{number}"), model, nic_options + device]

    def add_sockets(self, name: str, kind: socket.SocketKind, words: str) -> None:
        """Add a pair with a connection between them that the caller has made."""
        ends = socket.socketpair(socket.AF_UNIX, kind)
        self.sockets += ends
        first, second = (words.replace("FD", str(end.fileno())) for end in ends)
        self.add(name, first, second)

    def check(self, guest: RunningGuest) -> None:
        """Have each first end ask by ARP for the second one's address, and that answer."""
        up = "; ".join(f"ip link set {interface(n)} up; ip addr add 10.{n}.0.1/24 dev {interface(n)}" for n in self.numbers)
        guest.check(f"for name in all default; do echo 1 >/proc/sys/net/ipv4/conf/$name/accept_local; done; set -e; {up}")
        for index, name in enumerate(self.names):
            first = 2 * index + 1
            status, said = guest.run(f"arping -f -c 20 -w 20 -I {interface(first)} 10.{first + 1}.0.1")
            assert status == 0, f"{name}: {said}"

    @property
    def numbers(self) -> range:
        return range(1, 2 * len(self.names) + 1)


@pytest.mark.vde
def test_back_ends_between_two_nics(launch: Launch, shared_tmp: Path) -> None:
    """TCP, UDP, unix sockets, fds of the caller, L2TPv3, a hub, vhost-user and VDE, all in one guest."""
    shared_tmp.chmod(0o755)
    folder, switch = shared_tmp / "own", shared_tmp / "switch"
    folder.mkdir()
    launch.own(folder)
    ends, ports = Ends(), [free_port() for _ in range(5)]
    ends.add_sockets("stream, fd", socket.SOCK_STREAM, "stream,{0},server=off,addr.type=fd,addr.str=FD")
    local, remote = f"type=unix,local.path={folder}", f"type=unix,remote.path={folder}"
    first, second = (f"dgram,{{0}},local.{local}/{a},remote.{remote}/{b}" for a, b in ("12", "21"))
    ends.add("dgram, unix", first, second)
    ends.add_sockets("dgram, fd", socket.SOCK_DGRAM, "dgram,{0},local.type=fd,local.str=FD")
    ends.add("socket, tcp", f"socket,{{0}},listen=127.0.0.1:{ports[0]}", f"socket,{{0}},connect=127.0.0.1:{ports[0]}")
    first, second = (f"socket,{{0}},localaddr=127.0.0.1:{ports[a]},udp=127.0.0.1:{ports[b]}" for a, b in ((1, 2), (2, 1)))
    ends.add("socket, udp", first, second)
    ends.add_sockets("socket, fd", socket.SOCK_STREAM, "socket,{0},fd=FD")
    tunnel = "l2tpv3,{0},src=127.0.0.1,dst=127.0.0.1,udp=on,rxsession=1,txsession=1"
    first, second = (f"{tunnel},srcport={ports[a]},dstport={ports[b]}" for a, b in ((3, 4), (4, 3)))
    ends.add("l2tpv3", first, second)
    ends.add("hub", "hubport,{0},hubid=7", "hubport,{0},hubid=7")
    ends.add("vhost-user", "vhost-user,{0},chardev=c1", "vhost-user,{0},chardev=c2", NO_MSIX)
    ends.add("vde", f"vde,{{0}},sock={switch}", f"vde,{{0}},sock={switch}")
    places = [shared_tmp / "c1", shared_tmp / "c2"]
    chardevs = [word for place in places for word in ("-chardev", f"socket,id={place.name},path={place}")]
    back_end = BackEnd(*places)
    for place in places:
        place.chmod(0o600)  # the caller's alone, and of a kind that takes no connection by fd
    words = ["vde_switch", "-s", str(switch), "-m", "0666", "--dirmode", "0777"]
    with started(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL), contextlib.ExitStack() as stack:
        wait_until((switch / "ctl").is_socket, "the switch")
        back_end.start()
        fds = tuple(stack.enter_context(end).fileno() for end in ends.sockets)
        with booted(launch, shared_tmp, *MEMORY, *chardevs, *ends.options, pass_fds=fds) as guest:
            ends.check(guest)
    back_end.join(DEADLINE_S)
    assert not back_end.is_alive()


def test_a_switch_of_vde_that_qemu_may_not_join_is_refused(dropin: list[str], shared_tmp: Path) -> None:
    """Plain QEMU goes on with a socket in /tmp, and hears nothing."""
    switch = shared_tmp / "switch"
    switch.mkdir(mode=0o555)
    status, _, stderr = outcome(dropin, *IDLE, "-netdev", f"vde,id=a,sock={switch}")
    assert status == 1
    assert f"-netdev sock {switch}: QEMU's id " in stderr
    assert "may not make its end of the connection in it\nhint: it belongs to" in stderr


SERVER = ["-m", "256", *MEMORY, "-chardev", "socket,id=c,server=on,path={}"]
VHOST_USER_NIC = ["-netdev", "vhost-user,id=n,chardev=c", *nic("n", 1)]
VHOST_USER_DISK = ["-device", "vhost-user-blk-pci,chardev=c"]


@pytest.mark.parametrize("device", [VHOST_USER_NIC, pytest.param(VHOST_USER_DISK, marks=pytest.mark.root)], ids=["nic", "disk"])
def test_a_back_end_connects_to_qemu(launch: Launch, shared_tmp: Path, device: list[str]) -> None:
    """For a nic QEMU makes the socket; for others it is made outside, in a directory of root's, where it goes at the end."""
    outside = device is VHOST_USER_DISK
    folder = shared_tmp / "folder"
    folder.mkdir(mode=0o700)
    if not outside:
        launch.own(folder)
    path = folder / "socket"
    options = [word.format(path) for word in SERVER] + device
    with started([*dropin_words(), *launch.options, "-nodefaults", "-display", "none", *options]), connected(path) as back_end:
        back_end.settimeout(DEADLINE_S)
        assert struct.unpack("=3I", back_end.recv(12)) == (GET_FEATURES, 1, 0)
    if outside:
        wait_until(lambda: not path.exists(), "the socket gone")


def test_a_nic_of_vhost_user_may_not_listen_where_qemu_may_not(launch: Launch, shared_tmp: Path) -> None:
    folder = shared_tmp / "folder"
    folder.mkdir(mode=0o555)
    options = [word.format(folder / "socket") for word in SERVER] + VHOST_USER_NIC
    status, stdout, stderr = outcome([*dropin_words(), *launch.options], *options)
    assert (status, stdout) == (1, "")
    reason = r"QEMU's id \d+ may not make anything in it" if os.geteuid() == 0 else "Permission denied"
    text = rf"qemu-userns: -chardev path {folder}: {reason}\nhint: it belongs to \d+:\d+ and has mode 0555"
    assert re.match(text, stderr), stderr


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


@pytest.mark.parametrize("way", ["QMP", "HMP"])
def test_a_nic_of_vhost_user_is_plugged_in(compare: Compare, way: str) -> None:
    """It takes no connection by fd: the chardev keeps the path, which in HMP it does also where QEMU's id may not connect.

    QEMU removes the chardev with the netdev and tells nobody, so that what is shown for it stays.
    """

    def dialogue(vm: Vm) -> list[Any]:
        place = vm.folder / "socket"
        back_end = BackEnd(place)
        place.chmod(0o666 if way == "QMP" else 0o600)
        back_end.start()
        address = {"type": "unix", "data": {"path": str(place)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        seen: list[Any] = [
            vm.qmp.ask("chardev-add", id="c", backend=backend)
            if way == "QMP"
            else vm.qmp.hmp(f"chardev-add socket,id=c,path={place}")
        ]
        seen += [vm.qmp.ask("netdev_add", type="vhost-user", id="n", chardev="c"), vm.qmp.hmp("info network")]
        seen += [vm.qmp.ask("netdev_del", id="n"), vm.qmp.ask("chardev-remove", id="c")]
        back_end.join(DEADLINE_S)
        assert not back_end.is_alive()
        return [*seen, back_end.ports[0].requests]

    compare(dialogue, kept="socket")


@contextlib.contextmanager
def by_http(_: Path) -> Iterator[str]:
    """Serve DISK; yield its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    with speaking(server):
        yield f"http://127.0.0.1:{server.server_address[1]}/disk"


@contextlib.contextmanager
def by_nbd(folder: Path) -> Iterator[str]:
    disk, port = folder / "disk", free_port()
    disk.write_bytes(DISK)
    file, export = f"driver=file,node-name=f,read-only=on,filename={disk}", "type=nbd,id=e,name=disk,node-name=f"
    words = ["--blockdev", file, "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}", "--export", export]
    pidfile = folder / "pid"
    with started(["qemu-storage-daemon", *words, "--pidfile", str(pidfile)]):
        wait_until(pidfile.exists, "the storage daemon")
        yield f"nbd://127.0.0.1:{port}/disk"


@pytest.mark.parametrize("served", [pytest.param(by_http, marks=pytest.mark.network_drives), by_nbd])
def test_a_drive_of_the_network(
    launch: Launch, shared_tmp: Path, served: Callable[[Path], contextlib.AbstractContextManager[str]]
) -> None:
    with served(shared_tmp) as url:
        drive = f"if=none,id=d,format=raw,readonly=on,file={url}"
        with running(dropin_words(), "-drive", drive, *launch.options, stdout=subprocess.PIPE) as qemu:
            assert url in qemu.qmp.hmp("info block")
            qemu.qmp.hmp('qemu-io d "read -P 0x41 0 512"')
            qemu.qmp.hmp('qemu-io d "read -P 0x41 512 512"')
            assert qemu.quit() == 0
            assert qemu.process.stdout is not None
            said = qemu.process.stdout.read().decode()
    assert "read 512/512 bytes at offset 0" in said
    assert said.index("Pattern verification failed") > said.index("read 512/512 bytes at offset 0")


@pytest.mark.network_drives
def test_a_drive_by_iscsi(launch: Launch) -> None:
    """The target reads who logs in, and hangs up."""
    with listening() as target:
        drive = f"if=none,format=raw,file=iscsi://127.0.0.1:{target.getsockname()[1]}/iqn.2000-01.org.example:disk/0"
        options = [*launch.options, *IDLE, "-iscsi", "initiator-name=iqn.2000-01.org.example:me", "-drive", drive]
        with started([*dropin_words(), *options], stderr=subprocess.PIPE) as qemu:
            connection, _ = target.accept()
            with connection, connection.makefile("rb") as reader:
                login = reader.read(48)  # RFC 7143, 11.12: the length of what follows is in the header
                assert login[0] == 0x43
                assert b"InitiatorName=iqn.2000-01.org.example:me" in reader.read(int.from_bytes(login[5:8], "big")).split(b"\0")
            assert qemu.stderr is not None
            assert b"iSCSI: Failed to connect to LUN" in qemu.stderr.read()
            assert qemu.wait(DEADLINE_S) == 1


@pytest.mark.network_drives
@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.root)], ids=["conf", "default"])
def test_a_drive_by_rbd_has_its_configuration(launch: Launch, shared_tmp: Path, tmp_path: Path, named: bool) -> None:
    """Only the file says where the monitor is to which QEMU connects; it would wait for its answer."""
    with contextlib.ExitStack() as stack:
        if not named:
            stack.enter_context(own_network(tmp_path))
        monitor = stack.enter_context(listening())
        file = shared_tmp / "my.conf" if named else Path("/etc/ceph/ceph.conf")
        file.parent.mkdir(exist_ok=True)
        file.write_text(CEPH.format(port=monitor.getsockname()[1]))
        drive = "if=none,format=raw,file=rbd:pool/image" + (f":conf={file}" if named else "")
        stack.enter_context(started([*dropin_words(), *launch.options, *IDLE, "-drive", drive]))
        connection, _ = monitor.accept()
        assert stack.enter_context(connection).recv(9) == b"ceph v027"


@pytest.mark.network_drives
def test_a_drive_by_ssh_takes_the_callers_home(dropin: list[str]) -> None:
    """QEMU's library would look in root's home: QEMU is root inside."""
    drive = ["-drive", "if=none,file=ssh://nobody@127.0.0.1:1/disk"]
    status, stdout, stderr = outcome(dropin, *IDLE, *drive)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("qemu-userns: -drive file: it takes known_hosts and keys from the caller's home, which QEMU does")
    assert "\nhint: run `nbdkit ssh` outside and give its socket (nbd:unix:PATH)" in stderr
    assert outcome([*dropin, "-userns", "fs=host"], *IDLE, *drive)[2] == outcome(PLAIN, *IDLE, *drive)[2] != ""

    with socket.create_server(("127.0.0.1", 0)) as server, running(dropin) as qemu:
        server.settimeout(0.2)
        address = {"host": "127.0.0.1", "port": str(server.getsockname()[1])}
        answer = qemu.qmp.ask("blockdev-add", driver="ssh", node_name="n", path="/disk", server=address)
        assert "it takes known_hosts and keys from the caller's home" in answer["error"]["desc"]
        with pytest.raises(TimeoutError):
            server.accept()
        assert qemu.quit() == 0


@pytest.mark.parametrize(
    ("netdev", "text"),
    [
        ("l2tpv3,id=n,src=::1,dst=::1,ipv6=on,txsession=1", "L2TPv3 without UDP opens a raw IP socket, which takes CAP_NET_RAW"),
        ("af-xdp,id=n,ifname=lo", "AF_XDP loads a BPF program onto the interface"),
        ("passt,id=n,vhost-user=on", "a nic of vhost-user takes no fd"),
    ],
)
def test_what_takes_rights_over_the_host_is_refused(dropin: list[str], netdev: str, text: str) -> None:
    status, stdout, stderr = outcome(dropin, *IDLE, "-netdev", netdev)
    assert (status, stdout) == (1, "")
    assert text in stderr
    assert "\nhint: " in stderr


def test_l2tpv3_over_udp_and_netdevs_of_the_network(dropin: list[str]) -> None:
    ports = [free_port() for _ in range(2)]
    l2tpv3 = f"l2tpv3,id=a,src=127.0.0.1,dst=127.0.0.1,udp=on,srcport={ports[0]},dstport={ports[0]},rxsession=1,txsession=1"
    stream = "stream,id=d,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port=0"
    others = ["hubport,id=b,hubid=0", "socket,id=c,listen=127.0.0.1:0", stream]
    with running(dropin, *(word for netdev in (l2tpv3, *others) for word in ("-netdev", netdev))) as qemu:
        listed = qemu.qmp.hmp("info network")
        assert all(word in listed for word in ("l2tpv3: connected", "hub 0", "type=socket", "type=stream")), listed
        qemu.qmp.execute("netdev_del", id="a")
        qemu.qmp.execute("netdev_add", type="user", id="e")
        assert qemu.quit() == 0
