"""A VM of LXD's with a guest in it, from its start to its end, in the shapes of LXD's versions.

contracts/lxd.md, points 3, 8, 9, 11 to 13, 15, 16 and 23 to 25 of its checklist.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.lxd import SETTINGS_BYTES, VIRTIOFSD, Disk, Instance, may_raise_limits
from integration.lxd_client import boot_as_lxd
from integration.lxd_conf import SHAPES, Shape
from integration.shares import MOUNT_OPTIONS
from integration.talk import DEADLINE_S, connected, map_of, status_of, supervisor_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from integration.libvirt import DomainGuest
    from integration.lxd_client import LxdClient

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.root, pytest.mark.slow]

OVERFLOW = 65534
SECCOMP_FILTER = "2"


def power_off(client: LxdClient, guest: DomainGuest, vm: Instance) -> str:
    guest.run_and_leave("poweroff -f")
    client.read_to_end()
    return "guest-shutdown"


def reboot(client: LxdClient, guest: DomainGuest, vm: Instance) -> str:
    guest.run_and_leave("reboot -f")
    client.read_to_end()
    return "guest-reset"


def quit_vm(client: LxdClient, guest: DomainGuest, vm: Instance) -> str:
    client.ask("quit")
    client.read_to_end()
    return "host-qmp-quit"


def kill(client: LxdClient, guest: DomainGuest, vm: Instance) -> str:
    vm.kill()
    with contextlib.suppress(ConnectionResetError):
        client.read_to_end()
    return ""


ENDS: dict[str, Callable[[LxdClient, DomainGuest, Instance], str]] = {
    "5.0.2": power_off,
    "5.21.4": reboot,
    "6.6": kill,
    "HEAD": quit_vm,
}


@pytest.fixture
def share(shared_tmp: Path) -> Path:
    """A directory of the user 1000 with files of others in it, on a file system of its own."""
    share = shared_tmp / "volume"
    share.mkdir()
    for name, owner in (("user", 1000), ("hosts", 0), ("nobodys", OVERFLOW)):
        (share / name).write_text(name)
        os.chown(share / name, owner, owner)
    os.chown(share, 1000, 1000)
    share.chmod(0o775)
    return share


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_vm_from_its_start_to_its_end(dropin: list[str], shared_tmp: Path, share: Path, shape: Shape) -> None:
    disks = [Disk("data", share), Disk("ro", share, readonly=True)]
    virtiofs = os.path.exists(VIRTIOFSD)
    with Instance(shape, dropin, shared_tmp, disks=disks, virtiofs=virtiofs, run_with=shape.numbered) as vm:
        pid = vm.start(*vm.guest_words())
        supervisor = supervisor_of(pid)
        with vm.connected() as client:
            boot_as_lxd(client, vm.path, pid)
            check_process(pid, vm)
            check_settings(client, vm)
            assert client.ask("cont") == {}
            with vm.talking_to_guest() as guest:
                check_config_drive(guest, vm, "9p", MOUNT_OPTIONS + ",access=0")
                if virtiofs:
                    check_config_drive(guest, vm, "virtiofs", "ro")
                if shape.proxy:
                    check_shares(guest, share)
                if virtiofs:
                    check_virtiofs_shares(guest, share)
                check_console(guest, vm)
                assert vm.status() == "RUNNING"
                reason = ENDS[shape.version](client, guest, vm)
        assert [event["data"]["reason"] for event in client.events() if event["event"] == "SHUTDOWN"] == [reason] * bool(reason)
        vm.wait_gone()
        assert vm.processes() == []
        wait_until(lambda: not os.path.exists(f"/proc/{supervisor}"), "the supervisor's end")
        assert vm.status() == "STOPPED"
        assert not any(vm.devices.iterdir())
        pid = vm.start()  # at once, at the same paths
        with vm.connected() as client:
            assert client.ask("query-status")["status"] == "prelaunch"
        assert vm.find_pid() == pid


def check_process(pid: int, vm: Instance) -> None:
    """What LXD, and who watches the host, can say of QEMU's process."""
    proc = Path(f"/proc/{pid}")
    for task in (proc / "task").iterdir():
        status = status_of(int(task.name))
        assert set(status["Uid"].split()) == {str(vm.user.pw_uid)}
        assert set(status["Gid"].split()) == {str(vm.user.pw_gid)}
        assert set(status["Groups"].split()) <= {str(vm.user.pw_gid)}
        assert status["Seccomp"] == SECCOMP_FILTER
    assert all(outside != 0 for kind in ("uid", "gid") for _, outside, _ in map_of(pid, kind))
    assert os.readlink(proc / "ns/user") != os.readlink("/proc/self/ns/user")
    for name in ("net", "pid"):
        assert os.readlink(proc / "ns" / name) == os.readlink(f"/proc/self/ns/{name}")
    limits, own = limits_of(pid), limits_of(os.getpid())
    files, (soft, hard) = limits.pop("Max open files"), own.pop("Max open files")
    assert files in ((soft, hard), (hard, hard))  # newer QEMUs raise the soft one themselves
    assert limits == own | ({"Max locked memory": ("unlimited", "unlimited")} if may_raise_limits() else {})
    assert status_of(pid)["Umask"] == "0027"  # what QEMU's -daemonize makes of any
    assert os.getsid(pid) != os.getsid(0)
    assert not str(vm.early_log())


def limits_of(pid: int) -> dict[str, tuple[str, str]]:
    """Return the soft and the hard limits of /proc/PID/limits."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): (line[26:46].strip(), line[47:67].strip()) for line in lines}


def check_settings(client: LxdClient, vm: Instance) -> None:
    """The NVRAM is opened for reading by LXD, and written by QEMU, by its number."""
    blocks = {block["device"]: block for block in client.ask("query-block")}
    assert (blocks["pflash0"]["inserted"]["ro"], blocks["pflash1"]["inserted"]["ro"]) == (True, False)
    line = {"command-line": 'qemu-io pflash1 "write -q -P 7 512 512"'}
    assert client.ask("human-monitor-command", **line) == ""
    assert vm.settings.read_bytes() == bytes(512) + b"\7" * 512 + bytes(SETTINGS_BYTES - 1024)


def check_config_drive(guest: DomainGuest, vm: Instance, kind: str, options: str) -> None:
    """The agent's files have the owner that they have on the host, and are read-only."""
    answer = guest.check(f"""set -e; mkdir -p /{kind}; [ {kind} = 9p ] || modprobe virtiofs
        mount -t {kind} -o {options} config /{kind}; cd /{kind}
        stat -c '%n %u %g %a' . *; cat agent.conf
        mount -o remount,rw /{kind} || true
        for do in 'touch new' 'chmod 777 agent.conf' 'echo x >agent.conf' 'rm agent.conf'; do sh -c "$do" 2>&1 && exit 1; done
        cd /; umount /{kind}""")
    owner = "0 65534" if kind == "9p" else f"{vm.user.pw_uid} 0"
    files = "".join(f"{name} {owner} {mode}\n" for name, mode in (("agent.conf", 400), ("install.sh", 500), ("server.key", 400)))
    assert answer.startswith(f". {owner} 500\n{files}agent.conf of {vm.name}\n")
    assert answer.count("Read-only file system") >= 4
    for path in (vm.path / "config").iterdir():
        assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode) & 0o266) == (vm.user.pw_uid, 0, 0)


def check_console(guest: DomainGuest, vm: Instance) -> None:
    """Whoever attaches to the console sees what comes then, and is heard."""
    with connected(vm.logs / "qemu.console") as console, console.makefile("rb") as reader:
        console.settimeout(DEADLINE_S)
        console.sendall(b"typed\n")
        assert guest.check("stty -F /dev/ttyS0 raw -echo; head -n 1 /dev/ttyS0; echo said >/dev/ttyS0") == "typed\n"
        assert any(b"said" in line for line in reader)


def check_shares(guest: DomainGuest, share: Path) -> None:
    """The map is {0->65534, 1000->1000}."""
    answer = guest.check(f"""cd /; mkdir data ro; mount -t 9p -o {MOUNT_OPTIONS} lxd_data /data
        mount -t 9p -o {MOUNT_OPTIONS} lxd_ro /ro; cd /data
        stat -c '%n %u %g' user hosts nobodys
        cp /bin/busybox shell; chown 0:0 shell; chmod 6755 shell
        echo data >users; chown 1000:1000 users; chown 1:1 users; chown 0:0 hosts; mknod null c 1 3
        stat -c '%u %g %a' shell users; mount -o remount,rw /ro; touch /ro/new; stat -c '%u' /ro/user""")
    assert answer.startswith(f"user 1000 1000\nhosts {OVERFLOW} {OVERFLOW}\nnobodys 0 0\n")
    assert "\n0 0 6755\n1000 1000 644\n" in answer
    assert answer.endswith("touch: /ro/new: Read-only file system\n1000\n")
    found = {entry.name: (entry.lstat().st_uid, entry.lstat().st_gid) for entry in share.iterdir()}
    nobody = (OVERFLOW, OVERFLOW)
    assert found == {"user": (1000, 1000), "hosts": (0, 0), "nobodys": nobody, "shell": nobody, "users": (1000, 1000)}


def check_virtiofs_shares(guest: DomainGuest, share: Path) -> None:
    """The same tags over virtiofs, which LXD's agent takes first: the owners of virtiofsd's own namespace, which is the map's."""
    answer = guest.check("""cd /; mkdir vdata vro; mount -t virtiofs lxd_data /vdata; mount -t virtiofs lxd_ro /vro
        stat -c '%n %u %g' /vdata/user /vdata/hosts /vdata/nobodys; cp /bin/busybox /vdata/other; chmod 6755 /vdata/other
        stat -c '%u %g %a' /vdata/other; touch /vro/new; stat -c '%u' /vro/user""")
    assert answer.startswith(f"/vdata/user 1000 1000\n/vdata/hosts {OVERFLOW} {OVERFLOW}\n/vdata/nobodys 0 0\n0 0 6755\n")
    assert answer.endswith("touch: /vro/new: Read-only file system\n1000\n")
    assert ((share / "other").stat().st_uid, (share / "other").stat().st_gid) == (OVERFLOW, OVERFLOW)
