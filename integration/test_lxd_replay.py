"""LXD's part replayed without a guest: its checks at the start, failures, restarts, and whatever else it lives with.

contracts/lxd.md, points 1, 5 to 7, 9, 10, 19, 20, 23 to 27, 29 and 30 of its checklist.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.huge_pages import huge_pages
from integration.lxd import FIRMWARE, UNPRIVILEGED, Instance, LxdError
from integration.lxd_client import IMAGE_SIZE, LxdClient, migrate_from, migrate_to_pipe
from integration.lxd_conf import MEMORY_MIB, SHAPES, Shape
from integration.talk import (
    DEADLINE_S,
    PLAIN,
    UUID,
    connected,
    fds_of,
    is_alive,
    map_of,
    started,
    status_of,
    supervisor_of,
    wait_until,
    words_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.dropin, pytest.mark.newuidmap]

OLD, NEW = SHAPES[0], SHAPES[-1]
CHECK_S = 5.0
STALL_S = 3.0
VERSION_S = 1.0
AT_ONCE = 10
SECRET = "HUSH-1234567"


def uuid_of(number: int) -> str:
    return f"{UUID[:-2]}{number:02}"


# --- LXD starts (1.7) -------------------------------------------------------------------------------------------------


def test_the_version_is_qemus_own(dropin: list[str]) -> None:
    began = time.monotonic()
    ours = subprocess.run([*dropin, "--version"], capture_output=True, check=True)
    took_s = time.monotonic() - began
    plain = subprocess.run([*PLAIN, "--version"], capture_output=True, check=True)
    assert (ours.stdout, ours.stderr) == (plain.stdout, b"")
    assert ours.stdout.split()[3][:1].isdigit()
    assert took_s < VERSION_S


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_lxd_checks_what_qemu_can(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """A regular file is where the monitor shall be, the disk is its owner's alone; LXD waits five seconds, and kills."""
    monitor, image = shared_tmp / "monitor", shared_tmp / "image"
    monitor.write_bytes(b"")
    image.write_bytes(bytes(IMAGE_SIZE))
    image.chmod(0o600)
    options = [
        "-S",
        "-nographic",
        "-nodefaults",
        "-no-user-config",
        "-chardev",
        f"socket,id=monitor,path={monitor},server=on,wait=off",
    ]
    options += ["-mon", "chardev=monitor,mode=control", "-machine", "q35"]
    flash = ["-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE}"]
    options += ["-accel", "tcg", *flash] if shape.accel_checked else ["-bios", str(FIRMWARE)]
    replies = {}
    for name, words in (("plain", PLAIN), ("dropin", dropin)):
        began = time.monotonic()
        with started([*words, *options]) as process, connected_socket(monitor) as connection:
            client = LxdClient(connection, shape)
            with contextlib.closing(client):
                node = {"node-name": "feature-check", "filename": str(image)}
                added = client.ask("blockdev-add", driver="file", aio="io_uring", **node)
                taken = time.monotonic() - began
                cpus = client.ask("query-hotpluggable-cpus")
                sev = client.reply("query-sev-capabilities")["error"]
                replies[name] = (added, cpus, sev)
                process.kill()
                with contextlib.suppress(ConnectionResetError):
                    client.read_to_end()
            assert process.wait(DEADLINE_S) == -signal.SIGKILL
        assert taken < CHECK_S
        monitor.unlink(missing_ok=True)
        monitor.write_bytes(b"")
    assert replies["dropin"] == replies["plain"]
    added, cpus, _ = replies["dropin"]
    assert added == {}
    assert [cpu["type"] for cpu in cpus] == ["qemu64-x86_64-cpu"]


@contextlib.contextmanager
def connected_socket(path: Path) -> Iterator[socket.socket]:
    """Connect as soon as there is a socket in place of the regular file."""
    wait_until(path.is_socket, f"the socket {path}")
    with connected(path) as connection:
        yield connection


# --- a VM starts, or does not -----------------------------------------------------------------------------------------


def test_all_sockets_take_connections_when_the_start_has_succeeded(dropin: list[str], shared_tmp: Path) -> None:
    with Instance(NEW, dropin, shared_tmp) as vm:
        pid = vm.start()
        for name in ("monitor", "console", "spice"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(vm.logs / f"qemu.{name}"))  # at once: no retry
        assert vm.logs.joinpath("qemu.log").read_text() == ""
        assert vm.early_log() == ""
        assert [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and has_uuid(entry, vm)] == [pid]


def has_uuid(entry: str, vm: Instance) -> bool:
    with contextlib.suppress(OSError):
        return vm.uuid.encode() in Path(f"/proc/{entry}/cmdline").read_bytes()
    return False


@pytest.mark.parametrize("raw", [("-device", "nosuch"), ("-drive", "file=/nonexistent"), ("-nosuch",)], ids=" ".join)
def test_a_start_that_fails_says_why_and_leaves_nothing(dropin: list[str], shared_tmp: Path, raw: tuple[str, ...]) -> None:
    said = {}
    for name, words in (("plain", PLAIN), ("dropin", dropin)):
        with Instance(NEW, words, shared_tmp / name) as vm:
            with pytest.raises(LxdError, match="Failed running: "):
                vm.start(*raw)
            log = vm.logs / "qemu.log"  # QEMU's stderr from where it has opened it
            said[name] = vm.early_log() + (log.read_text() if log.exists() else "")
            wait_until(lambda vm=vm: vm.processes() == [], "the end of its processes")  # type: ignore[misc]
            if name == "dropin":
                wait_until(lambda vm=vm: not vm.sockets(), "the end of its sockets")  # type: ignore[misc]
            assert vm.status() == "STOPPED"
    assert said["dropin"] == said["plain"] != ""


def test_our_own_words_are_in_the_early_log_and_have_a_prefix(dropin: list[str], shared_tmp: Path) -> None:
    with Instance(NEW, dropin, shared_tmp) as vm:
        with pytest.raises(LxdError):
            vm.start("-fsdev", f"local,id=x,security_model=none,path={shared_tmp}/nonexistent")
        error, *hints = vm.early_log().splitlines()
        assert error.startswith("qemu-userns: -fsdev path ")
        assert all(line.startswith("hint: ") for line in hints)


def test_the_configuration_file_stays_as_it_is(dropin: list[str], shared_tmp: Path) -> None:
    """What QEMU reads in its place is another one, of the same name."""
    with Instance(NEW, dropin, shared_tmp) as vm:
        vm.start()
        conf = vm.logs / "qemu.conf"
        status = conf.stat()
        assert conf.read_text() == vm.conf
        assert f'path = "{vm.monitor}"' in vm.conf
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), os.getegid(), 0o640)


@pytest.mark.root
def test_a_stateful_start_has_the_user_of_any_other(dropin: list[str], shared_tmp: Path) -> None:
    """LXD names no user then, and plain QEMU stays root; the variable is what the hook has the daemon set."""
    with Instance(NEW, dropin, shared_tmp, stateful=True) as vm:
        pid = vm.start(env={"QEMU_USERNS": f"user={UNPRIVILEGED}"})
        with vm.connected() as client:
            assert client.ask("query-status")["status"] == "inmigrate"
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = status_of(int(task.name))
            assert (set(status["Uid"].split()), set(status["Gid"].split())) == ({str(vm.user.pw_uid)}, {str(vm.user.pw_gid)})


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_a_state_that_is_saved_is_loaded_by_the_next_start(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """What LXD says then is 2.2 of the contract. As root both have one user: the first by -runas, the other by the hook."""
    env = {"QEMU_USERNS": f"user={UNPRIVILEGED}"} if os.geteuid() == 0 else {}
    with Instance(shape, dropin, shared_tmp / "first") as vm:
        pid = vm.start(env=env)
        maps = [map_of(pid, kind) for kind in ("uid", "gid")]
        with vm.connected() as client:
            (shared_tmp / "state").write_bytes(migrate_to_pipe(client))
            client.ask("quit")
            client.read_to_end()
    with Instance(shape, dropin, shared_tmp / "second", stateful=True) as vm:
        pid = vm.start(env=env)
        assert [map_of(pid, kind) for kind in ("uid", "gid")] == maps
        with vm.connected() as client, (shared_tmp / "state").open("rb") as state:
            migrate_from(client, state.fileno())
            assert client.ask("query-status")["status"] == "prelaunch"


def test_a_stateful_start_is_not_root_without_the_hook_either(dropin: list[str], shared_tmp: Path) -> None:
    with Instance(NEW, dropin, shared_tmp, stateful=True) as vm:
        pid = vm.start()
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = status_of(int(task.name))
            assert "0" not in (*status["Uid"].split(), *status["Gid"].split())
        assert os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_a_tpm(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """The emulator's socket by its path, which only the caller may connect to, or by the number of an O_PATH fd."""
    with Instance(shape, dropin, shared_tmp, tpm=True) as vm:
        vm.start()
        with vm.connected() as client:
            (found,) = client.ask("query-tpm")
            assert (found["id"], found["model"], found["options"]["type"]) == ("qemu_tpm-tpmdev_tpm", "tpm-crb", "emulator")


@pytest.mark.root
@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_memory_in_huge_pages_of_a_node(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """Where only root may make files, and QEMU is somebody else."""
    pages = huge_pages(shared_tmp / "huge", "755")
    with pages as place, Instance(shape, dropin, shared_tmp, huge_pages=place) as vm:
        pid = vm.start()
        with vm.connected() as client:
            (found,) = client.ask("query-memdev")
            assert (found["id"], found["policy"], found["host-nodes"]) == ("mem0", "bind", [0])
        assert f"HugetlbPages:\t  {MEMORY_MIB << 10} kB" in Path(f"/proc/{pid}/status").read_text()


def test_without_a_limit_on_memory(dropin: list[str], shared_tmp: Path) -> None:
    """In a container LXD raises none."""
    with Instance(NEW, dropin, shared_tmp, memlock=False) as vm:
        pid = vm.start()
        own, its = (Path(f"/proc/{who}/limits").read_text() for who in ("self", pid))
        assert its == own


def test_a_snaps_environment(dropin: list[str], shared_tmp: Path) -> None:
    """Its HOME, and search paths on which somebody else's modules are; with another libpython no interpreter would start."""
    foreign = shared_tmp / "foreign"
    foreign.mkdir()
    for module in ("os", "site", "sitecustomize", "encodings", "qemu_userns"):
        (foreign / f"{module}.py").write_text("raise SystemExit('not this one')\n")
    env = {"HOME": "/tmp", "PYTHONPATH": str(foreign), "PYTHONHOME": "", "PYTHONSTARTUP": "/x", "SNAP": "/snap/lxd/current"}
    with Instance(NEW, dropin, shared_tmp) as vm:
        pid = vm.start(env={**env, "LD_LIBRARY_PATH": f"{foreign}:/usr/lib/x86_64-linux-gnu"})
        kept = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert f"PYTHONPATH={foreign}" in kept
        with vm.connected() as client:
            assert client.ask("query-status")["status"] == "prelaunch"


# --- names and numbers ------------------------------------------------------------------------------------------------


def test_no_secret_is_told(dropin: list[str], shared_tmp: Path) -> None:
    """Contract, 27: nothing of what an object keeps is in a log, in what we say, or in what `ps` says of the supervisor."""
    with Instance(NEW, dropin, shared_tmp) as vm:
        pid = vm.start("-object", f"secret,id=s0,data={SECRET}")
        supervisor = supervisor_of(pid)
        with vm.connected() as client:
            assert client.ask("object-add", **{"qom-type": "secret", "id": "s1", "data": SECRET}) == {}
            assert "error" in client.reply("object-add", **{"qom-type": "secret", "id": "s1", "data": SECRET})
            node = {"node-name": "n", "driver": "file", "filename": "/nowhere", "key-secret": SECRET}
            assert "error" in client.reply("blockdev-add", **node)
        told = Path(f"/proc/{supervisor}/cmdline").read_bytes() + Path(f"/proc/{supervisor}/environ").read_bytes()
        for log in (*vm.logs.iterdir(), *Path("/run/qemu-userns").rglob("*")):
            if log.is_file() and log.name != "qemu.conf":
                told += log.read_bytes()
        assert SECRET.encode() not in told
    with Instance(NEW, dropin, shared_tmp / "refused") as vm:
        with pytest.raises(LxdError):
            vm.start("-object", f"secret,id=s,data={SECRET},file=/nowhere")
        said = vm.early_log()
        assert "qemu-userns: -object file" in said
        assert SECRET not in said


def test_names_with_blanks_and_long_paths(dropin: list[str], shared_tmp: Path) -> None:
    """A disk and a config drive far down; sockets cannot have such paths."""
    with Instance(NEW, dropin, shared_tmp, name="a  b") as vm:
        deep = vm.path / ("x" * 100) / "y z"
        deep.mkdir(parents=True)
        image = deep / "root, of.img"
        image.write_bytes(bytes(IMAGE_SIZE))
        image.chmod(0o666)
        pid = vm.start("-fsdev", f"local,id=x,security_model=none,path={quoted(deep)}")
        with vm.connected() as client:
            assert client.ask("query-name") == {"name": "a  b"}
            found = client.reply("blockdev-add", driver="file", filename=str(image), **{"node-name": "deep"})
            assert found["return"] == {}
        assert vm.find_pid() == pid


def quoted(path: Path) -> str:
    return str(path).replace(",", ",,")


def test_ten_start_at_the_same_time(dropin: list[str], shared_tmp: Path) -> None:
    with contextlib.ExitStack() as stack:
        vms = [
            stack.enter_context(Instance(NEW, dropin, shared_tmp, name=f"v{number}", uuid=uuid_of(number)))
            for number in range(AT_ONCE)
        ]
        pids: dict[str, int] = {}

        def start(vm: Instance) -> None:
            pids[vm.name] = vm.start()

        threads = [threading.Thread(target=start, args=(vm,)) for vm in vms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S * 2)
        assert len(set(pids.values())) == AT_ONCE
        for vm in vms:
            with vm.connected() as client:
                assert client.ask("query-name") == {"name": vm.name}
                assert client.ask("query-uuid") == {"UUID": vm.uuid}


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_it_outlives_lxd(dropin: list[str], shared_tmp: Path) -> None:
    """LXD is killed with everything in its process group; a new one finds the VM."""
    with Instance(NEW, dropin, shared_tmp) as vm:
        lxd = os.fork()
        if lxd == 0:
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                vm.start()
                signal.pause()
            os._exit(1)
        try:
            wait_until(lambda: vm.status() == "RUNNING", "the VM")
            pid = vm.find_pid()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(lxd, signal.SIGKILL)
            os.waitpid(lxd, 0)
        supervisor = supervisor_of(pid)
        assert all(os.getsid(other) not in (os.getsid(0), lxd) for other in (pid, supervisor))
        with vm.connected() as client:
            assert client.ask("query-status")["status"] == "prelaunch"
        mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds_of(os.getpid())} - {"/dev/null"}
        assert not {target for target in fds_of(supervisor).values() if target.startswith("pipe:")} & mine


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_a_qemu_that_stalls_is_waited_for(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """For as long as three seconds; another client is served after that too, and more than 64 KiB arrive in one piece."""
    with Instance(shape, dropin, shared_tmp) as vm:
        pid = vm.start()
        with vm.connected() as client:
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            timer = threading.Timer(STALL_S, os.kill, (pid, signal.SIGCONT))
            timer.start()
            try:
                assert client.ask("query-status")["status"] == "prelaunch"
                assert time.monotonic() - began >= STALL_S - 0.1
                with vm.connected() as other:
                    assert len(str(other.ask("query-qmp-schema"))) > 1 << 16
                client.send("query-qmp-schema")
                time.sleep(STALL_S)  # in which nobody reads
                with vm.connected() as other:
                    assert other.ask("query-status")["status"] == "prelaunch"
                assert len(str(client.read_reply())) > 1 << 16
            finally:
                timer.join()
        with vm.connected() as client:
            assert client.ask("query-status")["status"] == "prelaunch"


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_what_cannot_be_plugged_is_an_error_of_qmp(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    fdset: dict[str, object] = {"driver": "usb-host", "id": "usb", "bus": "qemu_usb.0", "hostdevice": "/dev/fdset/99"}
    rbd: dict[str, object] = {"driver": "rbd", "node-name": "r", "pool": "p", "image": "i", "conf": "/etc/ceph/none.conf"}
    wanted: list[tuple[str, dict[str, object]]] = [
        ("device_add", {"driver": "vfio-pci", "id": "pci", "bus": "qemu_pcie11", "host": "0000:ff:1f.7"}),
        ("device_add", fdset),
        ("netdev_add", {"type": "tap", "id": "n", "fds": "none", "vhost": True, "vhostfds": "none"}),
        ("netdev_add", {"type": "vhost-vdpa", "id": "n", "vhostfd": "none"}),
        ("chardev-add", {"id": "c", "backend": fd_backend("none")}),
        ("blockdev-add", {"driver": "file", "filename": "/dev/fdset/99", "node-name": "f"}),
        ("blockdev-add", {"driver": "file", "filename": f"{shared_tmp}/none", "node-name": "f"}),
        ("blockdev-add", rbd),
        ("migrate", {"uri": "fd:none"}),
        ("getfd", {"fdname": "none"}),
    ]
    with Instance(shape, dropin, shared_tmp) as vm:
        vm.start()
        with vm.connected() as client:
            for command, arguments in wanted:
                error = client.reply(command, **arguments)["error"]
                assert set(error) == {"class", "desc"}, error
                assert error["desc"]
            assert client.ask("query-status")["status"] == "prelaunch"


def fd_backend(name: str) -> dict[str, object]:
    return {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": name}}, "server": False}}


def test_a_live_migration_server_has_an_abstract_address(dropin: list[str], shared_tmp: Path) -> None:
    """LXD dials it: QEMU is in the same network namespace, and what it serves is reachable."""
    name = f"lxd-test-{os.getpid()}"
    address = {"type": "unix", "data": {"path": name, "abstract": True}}
    with Instance(NEW, dropin, shared_tmp) as vm:
        vm.start()
        with vm.connected() as client:
            assert client.ask("nbd-server-start", addr=address) == {}
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(f"\0{name}")
                assert connection.recv(8) == b"NBDMAGIC"
            assert client.ask("nbd-server-stop") == {}


def test_a_monitor_that_is_removed(dropin: list[str], shared_tmp: Path) -> None:
    """The VM goes on, LXD shows an error, and a forced stop ends it."""
    with Instance(NEW, dropin, shared_tmp) as vm:
        pid = vm.start()
        vm.monitor.unlink()
        assert vm.status() == "ERROR"
        assert is_alive(pid)
        supervisor = supervisor_of(pid)
        vm.kill()
        wait_until(lambda: not os.path.exists(f"/proc/{supervisor}"), "the supervisor's end")
        assert vm.status() == "STOPPED"


# --- its end, and again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_started_again_and_again_on_the_same_paths(dropin: list[str], shared_tmp: Path, shape: Shape) -> None:
    """Killed and ended in turn, each time started again as soon as LXD sees that the pid is gone."""
    supervisors = []
    with Instance(shape, dropin, shared_tmp) as vm:
        for number in range(6):
            pid = vm.start()
            supervisors.append(supervisor_of(pid))
            with vm.connected() as client:
                assert client.ask("query-status")["status"] == "prelaunch"
                if number % 2:
                    client.ask("quit")
                    client.read_to_end()
                    assert client.events()[-1]["event"] == "SHUTDOWN"
                else:
                    os.kill(pid, signal.SIGKILL)
            vm.wait_gone()
            assert vm.processes() == []
        vm.start()
        for old in supervisors:
            wait_until(lambda old=old: not os.path.exists(f"/proc/{old}"), "the old supervisors' end")  # type: ignore[misc]
        for name in ("monitor", "console", "spice"):
            with socket.socket(socket.AF_UNIX) as client_socket:
                client_socket.connect(str(vm.logs / f"qemu.{name}"))
        assert vm.status() == "RUNNING"
        assert (vm.logs / "qemu.log.old").exists()


# --- the way out ------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("switch", ["environment", "configuration"])
@pytest.mark.parametrize("shape", [OLD, NEW], ids=str)
def test_switched_off_it_is_plain_qemu_to_the_bit(dropin: list[str], shared_tmp: Path, switch: str, shape: Shape) -> None:
    seen = []
    env = {"QEMU_USERNS": "off"}
    if switch == "configuration":
        config = shared_tmp / "config/qemu-userns/config.toml"
        config.parent.mkdir(parents=True)
        config.write_text("off = true\n")
        env = {"XDG_CONFIG_HOME": str(config.parent.parent)}
    for name, words in (("plain", PLAIN), ("dropin", dropin)):
        with Instance(shape, words, shared_tmp / name) as vm:
            pid = vm.start(env=env)
            argv = [word.replace(str(shared_tmp / name), "FOLDER") for word in words_of(pid)]
            fds = {fd: kind_of(target, shared_tmp / name) for fd, target in fds_of(pid).items()}
            environ = set(Path(f"/proc/{pid}/environ").read_text().split("\0")) - {"QEMU_USERNS=off"}
            namespaces = {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("user", "mnt", "net", "pid", "ipc")}
            assert vm.processes() != []
            seen.append((os.readlink(f"/proc/{pid}/exe"), [os.path.basename(argv[0]), *argv[1:]], fds, environ, namespaces))
    assert seen[0] == seen[1]


def kind_of(target: str, folder: Path) -> str:
    """Return what an fd is open on; sockets and pipes have other numbers each time."""
    return target.partition("[")[0].replace(str(folder), "FOLDER")
