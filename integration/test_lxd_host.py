"""Debian's LXD 5.0.2, and Incus 6.0 where it has it, start their VMs by the drop-in, with AppArmor on.

What the daemons do with VMs, and shares with id maps.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.daemons import (
    INCUS,
    LXD,
    Kind,
    Vm,
    apparmor_lines,
    guest_options,
    running_daemon,
    unmount_below,
    wait_gone,
    wait_state,
)
from integration.leftovers import process_table
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.daemons import Daemon

pytestmark = [pytest.mark.root, pytest.mark.host, pytest.mark.lxd, pytest.mark.kvm, pytest.mark.dropin, pytest.mark.slow]

NOBODY = 65534
USER = 1000
PASSTHROUGH_CAPABILITIES = 0x1B  # chown, dac_override, fowner and fsetid, over mapped ids only
NAME = "v1"
PROGRAM = str(CHECKOUT / ".venv/bin/qemu-userns")
LIMIT_S = 120
HELPER = Path("/usr/lib/qemu/virtfs-proxy-helper")
KINDS = [pytest.param(kind, id=kind.name) for kind in (LXD, INCUS) if Path(kind.server).exists()]


@pytest.fixture
def folder(shared_tmp: Path) -> Path:
    """What is shared."""
    path = shared_tmp / "share"
    path.mkdir()
    os.chown(path, USER, USER)
    return path


def disk(folder: Path, *more: str) -> str:
    return " ".join([f"source={folder}", f"path=/mnt/{folder.name}", *more])


@pytest.mark.parametrize("kind", KINDS)
def test_without_us_a_share_takes_the_old_helper(kind: Kind, folder: Path) -> None:
    """QEMU 9.2 and later have none: LXD's VM does not even start. Debian's Incus 6.0 goes on without."""
    with running_daemon(kind, with_dropin=False) as plain, plain.vm(NAME, {}, {"share": disk(folder)}) as vm:
        done = plain.run("start", NAME)
        if kind is INCUS or HELPER.exists():
            assert (done.returncode, vm.state) == (0, "RUNNING"), done.stderr
        else:
            assert (done.returncode, vm.state) == (1, "STOPPED")
            assert 'Required binary "virtfs-proxy-helper" couldn\'t be found' in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_hook_writes_is_what_the_daemon_needs(kind: Kind, folder: Path) -> None:
    """Its PATH, and the lines of the profile; applied, checked below the daemon that runs, and removed."""
    written = [Path(f"/etc/qemu-userns/{kind.name}.{suffix}") for suffix in ("env", "apparmor")]
    subprocess.run([PROGRAM, "hook", kind.name, "--apply"], check=True, timeout=LIMIT_S)
    try:
        lines = [line.partition("=") for line in written[0].read_text().splitlines()]
        variables = {name: value.strip('"') for name, _, value in lines}
        with running_daemon(kind, with_dropin=False, variables=variables) as daemon:
            with daemon.vm(NAME, {"raw.apparmor": written[1].read_text()}, {"share": disk(folder)}) as vm:
                vm.start()
                assert vm.status("Uid").split() == [str(NOBODY)] * 4
                assert (vm.proc / "attr/current").read_text().strip() == f"{profile_of(daemon)} (enforce)"
            checked = subprocess.run([PROGRAM, "hook", kind.name, "--check"], capture_output=True, text=True, timeout=LIMIT_S)
            assert "is not first in its PATH" not in checked.stdout + checked.stderr
    finally:
        subprocess.run([PROGRAM, "hook", kind.name, "--remove"], check=True, timeout=LIMIT_S)
    assert not any(path.exists() for path in written)


@pytest.fixture(scope="module", params=KINDS)
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    with running_daemon(request.param) as daemon:
        yield daemon


def profile_of(daemon: Daemon) -> str:
    return f"{daemon.kind.name}-{NAME}_<{daemon.kind.state}>"


def assert_nothing_left(vm: Vm, pid: int) -> None:
    """Check what LXD needs to unmount the instance's volume, and to tell that it has stopped."""
    wait_gone(pid)
    assert not [
        command for _, command in process_table().values() if "qemu-userns-supervisor" in command or "virtfs-proxy" in command
    ]
    assert not list(Path("/run/qemu-userns").glob("*/*"))
    devices = str(vm.daemon.kind.state / "devices" / vm.name)
    assert devices not in Path("/proc/self/mountinfo").read_text()


def test_a_vm_with_shares_starts_pauses_restarts_and_stops(daemon: Daemon, folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    shares = {"share": disk(folder), "other": disk(other, "readonly=true")}
    with daemon.vm(NAME, {"raw.apparmor": apparmor_lines()}, shares) as vm:
        vm.start()
        first = vm.pid
        assert vm.status("Uid").split() == [str(NOBODY)] * 4
        assert int(vm.status("CapEff"), 16) & ~PASSTHROUGH_CAPABILITIES == 0
        assert (vm.status("Seccomp"), vm.status("NoNewPrivs")) == ("2", "1")
        assert (vm.proc / "limits").read_text().split("Max locked memory")[1].split()[:2] == ["unlimited", "unlimited"]
        assert [int(word) for word in (vm.proc / "uid_map").read_text().split()[:3]] == [0, NOBODY, 1]
        assert (vm.proc / "attr/current").read_text().strip() == f"{profile_of(daemon)} (enforce)"
        # Debian's Incus has QEMU serve shares itself.
        assert ("helper is host root without an id map" in vm.early_log) == (daemon.kind is LXD)
        daemon.check("pause", NAME)
        assert vm.state == "FROZEN"
        daemon.check("start", NAME)
        assert vm.state == "RUNNING"
        daemon.check("restart", "--force", NAME)
        second = vm.pid
        assert (vm.state, second != first) == ("RUNNING", True)
        wait_gone(first)
        daemon.check("stop", "--force", NAME)
        assert vm.state == "STOPPED"
        assert_nothing_left(vm, second)


def test_a_vm_without_shares_has_no_capability(daemon: Daemon) -> None:
    with daemon.vm(NAME, {"raw.apparmor": apparmor_lines()}, {}) as vm:
        vm.start()
        assert (vm.status("CapEff"), vm.status("Uid").split()) == ("0" * 16, [str(NOBODY)] * 4)


def test_a_vm_that_is_killed_leaves_nothing(daemon: Daemon, folder: Path) -> None:
    with daemon.vm(NAME, {"raw.apparmor": apparmor_lines()}, {"share": disk(folder)}) as vm:
        vm.start()
        pid = vm.pid
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        daemon.run("stop", "--force", NAME)  # LXD 5.0 notices only when it is asked
        wait_state(vm, "STOPPED")
        unmount_below(vm.daemon.kind.state / "devices" / vm.name)
        assert_nothing_left(vm, pid)
        vm.start()


def test_the_profile_must_allow_it(daemon: Daemon) -> None:
    """The error says which profile it is."""
    lines = "".join(line for line in apparmor_lines().splitlines(keepends=True) if line not in ("mount,\n", "userns,\n"))
    with daemon.vm(NAME, {"raw.apparmor": lines}, {}) as vm:
        done = daemon.run("start", NAME)
        assert (done.returncode, vm.state) == (1, "STOPPED")
        assert f"its profile {profile_of(daemon)} lacks `userns, capability sys_admin, mount,`" in done.stderr
        kind = daemon.kind
        assert f'{kind.client} config set {NAME} raw.apparmor "$(cat /etc/qemu-userns/{kind.name}.apparmor)"' in done.stderr


def test_a_share_shows_and_gets_the_owners_of_its_map(daemon: Daemon, folder: Path) -> None:
    """As LXD's multi-user mode sets it up. The attack of the Incus thread: guest root leaves a set-uid shell on the host.

    Incus 6.0.4 and later refuse raw.idmap for a share by 9p: there raw.qemu brings the share's map.
    """
    (folder / "users").write_text("text")
    os.chown(folder / "users", USER, USER)
    (folder / "roots").write_text("text")
    folder.chmod(0o777)
    config = {"raw.apparmor": apparmor_lines(), "raw.qemu": guest_options(daemon.kind, NAME)}
    if daemon.kind is LXD:
        config["raw.idmap"] = f"both {USER} {USER}"
    else:
        maps = (f"both {NOBODY} 0", f"both {USER} {USER}")
        config["raw.qemu"] += "".join(f" -userns 'share.incus_share.idmap={entry}'" for entry in maps)
    # First in the order of boot, which the share does not use: QEMU 7.2's -kernel has that place, which would be the disk's.
    with daemon.vm(NAME, config, {"share": disk(folder, "boot.priority=10")}) as vm:
        vm.start()
        with vm.guest() as guest:
            guest.check("mkdir -p /config /share; mount -t 9p -o trans=virtio,version=9p2000.L,access=0,ro config /config")
            guest.check(f"mount -t 9p -o trans=virtio,version=9p2000.L {daemon.kind.name}_share /share")
            assert "metadata" in guest.check("ls -R /config") or "install.sh" in guest.check("ls /config")
            assert guest.check("stat -c %u:%g /share/users /share/roots").split() == [f"{USER}:{USER}", f"{NOBODY}:{NOBODY}"]
            guest.check(f"touch /share/mine && chown {USER}:{USER} /share/mine")
            guest.check("cp /bin/busybox /share/shell && chmod 6755 /share/shell")
            guest.check("! chown 5:5 /share/shell && ! chown 0:0 /share/roots")
        mine, shell, roots = (os.stat(folder / name) for name in ("mine", "shell", "roots"))
        assert (mine.st_uid, mine.st_gid) == (USER, USER)
        assert (shell.st_uid, shell.st_gid) == (NOBODY, NOBODY)
        assert stat.S_ISREG(shell.st_mode)
        assert (roots.st_uid, roots.st_gid, roots.st_mode & 0o7000) == (0, 0, 0)
