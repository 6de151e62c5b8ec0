"""Shares that our own settings add: `-userns share=PATH,tag=T,driver=...,map=...`, mounted in a guest."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.leftovers import process_table
from integration.shares import Launch, SharedVm, dropin_words, launches, module_folder, mount_options, tree
from integration.talk import fds_of, is_alive, running, started, status_of, wait_until
from integration.test_hotplug_guest import wait_for
from integration.vm import running_guest
from qemu_userns.supervisor.registry import find_run_dir, read_entry
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.slow]

COMMAND = str(CHECKOUT / ".venv/bin/qemu-userns")
OVERFLOW = 65534
DRIVERS = ("9p", "virtiofs", "both")
LAUNCHES = [*launches(), *([Launch("nobody", ("-runas", "nobody"), "nobody")] if os.geteuid() == 0 else [])]
LXD = ("both 65534 0", "both 1000-1999 1000-1999", "uid 5000 5", "gid 6000 5")
MOUNTS = {
    "9p": "mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288",
    "virtiofs": "mount -t virtiofs",
    "both": "mount -t virtiofs",
}


def share(path: Path, tag: str, driver: str, *lines: str, more: str = "") -> list[str]:
    """Return the option that adds a share."""
    maps = "".join(f",map={line}" for line in lines)
    return ["-userns", f"share={path},tag={tag},driver={driver}{more}{maps}"]


def own_map(launch: Launch) -> tuple[str, ...]:
    """Return a map that the launch may have: root any, anybody else of own ids."""
    if os.geteuid() == 0:
        return LXD
    first = int(Path("/etc/subuid").read_text().split(f"{launch.user}:")[1].split(":")[0])
    return (f"both {first + 10}-{first + 1009} 1000-1999", f"both {first + 5} 5")


@pytest.fixture(
    scope="module", params=[(launch, driver) for launch in LAUNCHES for driver in DRIVERS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def vm(request: pytest.FixtureRequest) -> Iterator[tuple[SharedVm, str]]:
    """A guest with three shares: with a map, read-only with a map, and without one (where everybody has his own: for root)."""
    launch, driver = request.param
    with module_folder() as folder, contextlib.ExitStack() as stack:
        for name in ("mapped", "ro", "plain"):
            (folder / name).mkdir()
            launch.own(folder / name)
        if os.geteuid() == 0:
            for name in ("mapped", "ro"):
                os.chown(folder / name, 65534, 65534)
                (folder / name / "hosts").write_text("hosts")
                (folder / name / "user").write_text("user")
                os.chown(folder / name / "user", 1000, 1000)
        else:
            (folder / "ro" / "user").write_text("user")
        lines = own_map(launch)
        extra = share(folder / "mapped", "mapped", driver, *lines) + share(
            folder / "ro", "ro", driver, *lines, more=",readonly=on"
        )
        if os.geteuid() == 0:
            extra += share(folder / "plain", "plain", driver)
        guest = stack.enter_context(running_guest(dropin_words(), tmp=folder, extra=[*extra, *launch.options]))
        vm = SharedVm(launch, folder, guest)
        for tag in ("mapped", "ro", *(("plain",) if os.geteuid() == 0 else ())):
            vm.guest.check(f"mkdir -p /{tag}; {MOUNTS[driver]} {tag} /{tag}")
        yield vm, driver


def owners(folder: Path, *names: str) -> list[tuple[int, int]]:
    return [(found.st_uid, found.st_gid) for found in ((folder / name).lstat() for name in names)]


def test_what_the_guest_makes_belongs_to_whom_the_map_says(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check("""cd /mapped; echo data >roots; echo data >users; chown 1000:1001 users; mkdir folder
        chown 1999:5 folder; ln -s user link; chown -h 5:1500 link; chown 2000:2000 roots && echo bad
        stat -c '%n %u %g' roots users folder link; cat users""")
    assert answer.endswith("roots 0 0\nusers 1000 1001\nfolder 1999 5\nlink 5 1500\ndata\n")
    assert "bad" not in answer
    if os.geteuid() == 0:
        wanted = [(65534, 65534), (1000, 1001), (1999, 6000), (5000, 1500)]
    else:
        first = found.uid(1000) - 10
        root = (os.geteuid(), os.getegid())
        wanted = [root, (first + 10, first + 11), (first + 1009, first + 5), (first + 5, first + 510)]
    assert owners(found.folder / "mapped", "roots", "users", "folder", "link") == wanted


def test_a_set_uid_shell_of_guest_root_is_not_host_roots(vm: tuple[SharedVm, str]) -> None:
    """The attack of Incus' pull request 1547."""
    found, _ = vm
    found.guest.check("cd /mapped && cp /bin/busybox shell && chown 0:0 shell && chmod 6755 shell && ! mknod null c 1 3")
    status = (found.folder / "mapped" / "shell").stat()
    assert (status.st_uid, status.st_gid) == ((65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid()))
    for path, entry in tree(found.folder / "mapped"):
        assert path.name == "hosts" or 0 not in (entry.st_uid, entry.st_gid), path
        assert not stat.S_ISCHR(entry.st_mode), path


@pytest.mark.root
def test_who_is_not_in_the_map_is_nobody_in_the_guest(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check(
        "cd /mapped; stat -c '%n %u %g' . hosts user; chown 1000 hosts; chmod 777 hosts; rm -f hosts; ls hosts"
    )
    assert answer.startswith(f". 0 0\nhosts {OVERFLOW} {OVERFLOW}\nuser 1000 1000\n")
    assert (found.folder / "mapped" / "hosts").stat().st_mode & 0o777 == 0o644


@pytest.mark.root
def test_a_share_without_a_map_has_qemus_ids(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    found.guest.check("cd /plain; echo data >made; echo data >users; chown 9:9 users")
    assert owners(found.folder / "plain", "made", "users") == [(found.uid(0), found.gid(0)), (found.uid(9), found.gid(9))]


def test_read_only_holds_against_a_guest_that_remounts(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check("mount -o remount,rw /ro; cd /ro; touch new; chmod 777 user; rm -f user; cat user")
    assert answer.count("Read-only file system") == 3
    assert answer.endswith("user")
    assert sorted(path.name for path in (found.folder / "ro").iterdir()) == (["hosts", "user"] if os.geteuid() == 0 else ["user"])


def test_the_view_has_the_shares_without_set_uid_and_devices(vm: tuple[SharedVm, str]) -> None:
    found, driver = vm
    if driver == "virtiofs":
        assert str(found.folder / "mapped") not in (found.guest.proc / "mountinfo").read_text()
    else:
        assert {"nosuid", "nodev", "rw"} <= mount_options(found.guest.proc, found.folder / "mapped")
        assert {"nosuid", "nodev", "ro"} <= mount_options(found.guest.proc, found.folder / "ro")


def test_both_are_the_same_directory_with_the_same_owners(vm: tuple[SharedVm, str]) -> None:
    found, driver = vm
    if driver != "both":
        assert found.guest.run(f"mkdir -p /other; {MOUNTS['9p' if driver == 'virtiofs' else 'virtiofs']} mapped /other")[0] != 0
        return
    answer = found.guest.check(f"""mkdir -p /by9p; {MOUNTS["9p"]} mapped /by9p; cd /mapped; echo one >there; chown 1000:1001 there
        cat /by9p/there; stat -c '%u %g' /by9p/there; echo two >/by9p/here; chown 1001:1000 /by9p/here; stat -c '%u %g' here
        cat here""")
    assert answer == "one\n1000 1001\n1001 1000\ntwo\n"
    (there, here) = owners(found.folder / "mapped", "there", "here")
    assert (there[0], here[1]) == ((1000, 1000) if os.geteuid() == 0 else (found.uid(1000), found.gid(1000)))


def test_what_a_guest_sees_when_a_virtiofsd_dies(vm: tuple[SharedVm, str]) -> None:
    """Who touches its mount hangs; the other shares, and the same directory by 9p, go on.

    The last test of this VM: such a guest cannot power off by itself.
    """
    found, driver = vm
    guest, shared = found.guest, found.folder / "ro"
    daemons = [daemon for daemon in find_daemons(guest.pid) if os.path.samefile(f"/proc/{daemon}/root", shared)]
    assert len(daemons) == (driver != "9p")
    for daemon in daemons:
        os.kill(daemon, signal.SIGKILL)
        wait_until(functools.partial(lambda pid: not is_alive(pid), daemon), "virtiofsd's end")
        try:
            answer = guest.check(f"""cat /ro/user >/tmp/answer 2>&1 & pid=$!
                {wait_for("grep -q request_wait_answer /proc/$pid/wchan")}; cat /tmp/answer; cat /proc/$pid/comm
                cd /mapped; echo on >goes; cat goes""")
            assert answer == "cat\non\n"
            if driver == "both":  # not from /, where mount would look at the tag as a path, and hang
                assert guest.check(f"mkdir /twin; cd /tmp; {MOUNTS['9p']} ro /twin; cat /twin/user") == "user"
            assert guest.process.poll() is None
        finally:
            guest.process.kill()
            guest.process.wait()


# --- virtiofsd, the process ------------------------------------------------------------------------------------------


IDLE_VIRTIOFS = ("-nodefaults", "-display", "none", "-M", "q35", "-m", "64", "-S")


def find_daemons(pid: int) -> list[int]:
    """Return the pids of the virtiofsds in the user namespace of a QEMU; other VMs may have some, also of other users."""
    namespace = os.readlink(f"/proc/{pid}/ns/user")
    found = []
    for other, (_, command) in process_table().items():
        if "virtiofsd --fd=" in command:
            with contextlib.suppress(PermissionError, FileNotFoundError, ProcessLookupError):
                found += [other] if os.readlink(f"/proc/{other}/ns/user") == namespace else []
    return found


def test_a_virtiofsd_is_confined_and_ends_with_qemu(launch: Launch, shared_tmp: Path) -> None:
    folder = launch.own(shared_tmp)
    words = [*dropin_words(), *launch.options, *share(folder, "tag", "virtiofs")]
    with running(words, *IDLE_VIRTIOFS, idle=False) as qemu:
        (daemon,) = find_daemons(qemu.process.pid)
        status = status_of(daemon)
        assert status["NSpid"].split()[1:] == ["1"]
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) & ~0x8804_01DB == 0  # chown to setpcap, sys_chroot, mknod, setfcap
        assert set(status["Uid"].split()) == set(status_of(qemu.process.pid)["Uid"].split())
        for kind in ("mnt", "net", "ipc", "pid"):
            assert os.readlink(f"/proc/{daemon}/ns/{kind}") not in (os.readlink(f"/proc/self/ns/{kind}"),), kind
        mounts = Path(f"/proc/{daemon}/mountinfo").read_text().splitlines()
        assert [line.split()[4] for line in mounts] == ["/"]  # behind its chroot there is the share alone
        assert {"nosuid", "nodev"} <= set(mounts[0].split()[5].split(","))
        opened = {target for number, target in fds_of(daemon).items() if int(number) > 2}
        assert not [target for target in opened if target.startswith(("/dev", str(shared_tmp)))], opened
        qemu.process.kill()
        qemu.process.wait()
        wait_until(lambda: not is_alive(daemon), "virtiofsd's end")


def test_a_virtiofsd_that_dies_is_told_of_and_qemu_lives(launch: Launch, shared_tmp: Path) -> None:
    words = [*dropin_words(), *launch.options, *share(launch.own(shared_tmp), "tag", "virtiofs")]
    with running(words, *IDLE_VIRTIOFS, idle=False) as qemu:
        pid = qemu.process.pid
        (daemon,) = find_daemons(pid)
        os.kill(daemon, signal.SIGKILL)
        log = Path(find_run_dir(os.geteuid())) / "vms" / f"{pid}.log"
        wait_until(lambda: "share tag: /usr/" in log.read_text(), "a line in the log")
        assert "virtiofsd has ended, and the guest's mount of it hangs" in log.read_text()
        assert qemu.qmp.execute("query-status")["status"] == "prelaunch"
        qemu.quit()


def test_a_stopped_virtiofsd_is_ended_by_the_supervisor(launch: Launch, shared_tmp: Path) -> None:
    """It hears nothing of QEMU's end; without a monitor there is a supervisor all the same."""
    words = [*dropin_words(), *launch.options, *share(launch.own(shared_tmp), "tag", "virtiofs"), *IDLE_VIRTIOFS]
    pidfile = shared_tmp / "pid"
    with started([*words, "-pidfile", str(pidfile)]) as process:
        wait_until(lambda: pidfile.read_text().strip(), "QEMU's pidfile")
        (daemon,) = find_daemons(process.pid)
        os.kill(daemon, signal.SIGSTOP)
        process.terminate()
        process.wait()
        wait_until(lambda: not is_alive(daemon), "virtiofsd's end")


def test_an_adopted_supervisor_tells_of_a_virtiofsd_and_ends_the_others(launch: Launch, shared_tmp: Path) -> None:
    """It tells of one that died while there was none to see it, too; what they say is known to it as to the first."""
    folder = launch.own(shared_tmp)
    words = [*dropin_words(), *launch.options]
    for tag in ("early", "late", "stopped"):
        words += share(folder, tag, "virtiofs")
    with running(words, *IDLE_VIRTIOFS, idle=False) as qemu:
        pid = qemu.process.pid
        log = Path(find_run_dir(os.geteuid())) / "vms" / f"{pid}.log"
        wait_until(lambda: log.with_suffix(".json").exists(), "the VM's entry")
        first = read_entry(str(log.parent), pid)
        early, late, stopped = (process.pid for process in first.state.processes)
        assert sorted(find_daemons(pid)) == sorted((early, late, stopped))
        os.kill(first.supervisor, signal.SIGKILL)
        wait_until(lambda: not is_alive(first.supervisor), "the supervisor's end")
        os.kill(early, signal.SIGKILL)
        wait_until(lambda: not is_alive(early), "the end of one virtiofsd")
        subprocess.run([COMMAND, "adopt", str(pid)], check=True, stdout=subprocess.DEVNULL, timeout=60)
        wait_until(lambda: "share early: /usr/" in log.read_text(), "a line in the log")
        with Path(f"/proc/{late}/fd/2").open("r+b") as said:
            said.write(b"last words\n")
        os.kill(late, signal.SIGKILL)
        wait_until(lambda: "share late: /usr/" in log.read_text(), "another line in the log")
        assert log.read_text().endswith("the guest's mount of it hangs until the VM is restarted; it said: last words\n")
        os.kill(stopped, signal.SIGSTOP)
        qemu.process.kill()
        qemu.process.wait()
        wait_until(lambda: not is_alive(stopped), "virtiofsd's end")


def test_a_daemonized_qemu_lets_go_of_the_caller(launch: Launch, shared_tmp: Path) -> None:
    """No process that stays holds the pipes of who started it."""
    folder = launch.own(shared_tmp)
    words = [*dropin_words(), *launch.options, *share(folder, "tag", "virtiofs"), *IDLE_VIRTIOFS]
    pidfile = shared_tmp / "pid"
    done = subprocess.run([*words, "-daemonize", "-pidfile", str(pidfile)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pidfile.read_text())
    try:
        (daemon,) = find_daemons(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(daemon) and not is_alive(pid), "the end of both")


def test_a_launch_that_fails_leaves_no_virtiofsd(launch: Launch, shared_tmp: Path) -> None:
    words = [*dropin_words(), *launch.options, *share(launch.own(shared_tmp), "tag", "virtiofs"), *IDLE_VIRTIOFS]
    done = subprocess.run([*words, "-device", "no-such-device"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no-such-device" in done.stderr


# --- set-uid files of the caller -------------------------------------------------------------------------------------


@pytest.mark.ordinary
def test_a_share_that_others_reach_is_warned_of(shared_tmp: Path) -> None:
    """In explain and in the VM's log; behind a directory that is shut to others there is nothing to warn of."""
    places = {name: shared_tmp / name / "share" for name in ("open", "shut")}
    for name, path in places.items():
        path.mkdir(parents=True)
        path.parent.chmod(0o755 if name == "open" else 0o700)
        words = share(path, "tag", "9p")
        found = [row["warning"] for row in explain("qemu-system-x86_64", *words)["warnings"]]
        assert any("a guest can leave a set-uid program" in warning for warning in found) == (name == "open"), found
    with running([*dropin_words(), *share(places["open"], "tag", "9p")], *IDLE_VIRTIOFS, idle=False) as qemu:
        log = Path(find_run_dir(os.geteuid())) / "vms" / f"{qemu.process.pid}.log"
        wait_until(lambda: "others on this host can reach the share" in log.read_text(), "a line in the log")
        qemu.quit()


# --- where it is said ------------------------------------------------------------------------------------------------


def explain(*words: str, env: dict[str, str] | None = None) -> dict[str, list[dict[str, str]]]:
    done = subprocess.run([COMMAND, "explain", "--json", *words], capture_output=True, text=True, check=True, env=env)
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return found


def test_by_run_and_by_the_configuration_too(shared_tmp: Path) -> None:
    path, config = shared_tmp / "a,b", shared_tmp / "qemu-userns"
    for folder in (path, config):
        folder.mkdir()
    (config / "config.toml").write_text(f'[share.src]\npath = "{path}"\nreadonly = true\nsecurity_model = "mapped-xattr"\n')
    by_file = explain("qemu-system-x86_64", env={**os.environ, "XDG_CONFIG_HOME": str(shared_tmp)})
    by_run = explain(f"--share={shared_tmp}/a,,b,tag=src,readonly=on,security_model=mapped-xattr", "qemu-system-x86_64")
    option = f"share={shared_tmp}/a,,b,tag=src,readonly=on,security_model=mapped-xattr"
    by_option = explain("qemu-system-x86_64", "-userns", option)
    wanted = [
        f"-fsdev local,id=userns-share0,path={shared_tmp}/a,,b,security_model=mapped-xattr,readonly=on",
        "-device virtio-9p-pci,id=userns-share0,fsdev=userns-share0,mount_tag=src",
    ]
    for found in (by_file, by_run, by_option):
        assert [row["after"] for row in found["rewritten"] if row["where"] == "added"][-2:] == wanted
        assert any(row["what"] == f"{path} (ro)" for row in found["view"])


def test_off_adds_nothing(shared_tmp: Path) -> None:
    words = [*dropin_words(), "-userns", f"share={shared_tmp},tag=src,off=on", "-M", "none", "-version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("share={}/absent,tag=t", "absent: No such file or directory"),
        ("share={}", "has no tag"),
        ("share={},tag=t,driver=nfs", "'nfs' is not a choice"),
        ("share={},tag=t,map=both 0 1000", "maps host root"),
        ("share={}/absent,tag=t,driver=virtiofs", "absent: No such file or directory"),
        ("share={},tag=t,driver=both,security_model=mapped-xattr", "virtiofsd has no security_model=mapped-xattr"),
        ("share={},tag=t,security_model=mapped-xattr,map=both 65534 0", "keeps the guest's ids beside the files"),
    ],
)
def test_refusals(option: str, error: str, shared_tmp: Path) -> None:
    done = subprocess.run(
        [*dropin_words(), "-S", "-userns", option.format(shared_tmp)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr
    assert "\nhint: " in done.stderr
