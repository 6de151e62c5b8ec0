"""What hooks find, what of it stops them, and what they say to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_userns.cli.hook import hook
from qemu_userns.hooks.host import Options, find_processes
from qemu_userns.hooks.limits import describe_lock_limit, find_sysctl_faults, read_sysctls
from qemu_userns.hooks.lxd import DAEMONS, build_setup
from tests.conftest import CHECKOUT
from tests.forked import in_namespaces
from tests.systems import PROGRAM, directory_of, files, run_hook, write

if TYPE_CHECKING:
    from collections.abc import Iterator

SLEEP = "/usr/bin/sleep"


# --- obstacles --------------------------------------------------------------------------------------------------------


def test_a_snap_is_not_set_up_by_files_that_it_does_not_read(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(system / "snap/lxd/29999/meta/snap.yaml", "name: lxd\nversion: '5.21.3-75def3c'\n")
    (system / "snap/lxd/current").symlink_to("29999")
    (system / "var/lib/dpkg/status").write_text("")
    before = files(system)
    assert run_hook(system, "lxd", "--apply") == 1
    said = capsys.readouterr().err
    assert said.startswith("qemu-userns: the snap lxd: has a PATH of its own, that no unit file changes\n")
    assert "\nhint: qemu-userns hook lxd --snap DIR makes a snap with the drop-in for it; or remove the snap\n" in said
    assert files(system) == before
    run_hook(system, "lxd")
    assert "lxd: snap 5.21.3-75def3c, revision 29999\n" in capsys.readouterr().out


def test_a_daemon_without_a_unit_is_not_set_up(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (system / "usr/lib/systemd/system/lxd.service").unlink()
    before = files(system)
    assert run_hook(system, "lxd", "--apply") == 1
    assert "qemu-userns: lxd: has no unit file\nhint: install lxd; " in capsys.readouterr().err
    assert files(system) == before


def test_libvirts_own_setting_stops_it(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(system / "etc/libvirt/qemu.conf", 'namespaces = [ "mount" ]\n')
    before = files(system)
    assert run_hook(system, "libvirt", "--apply") == 1
    assert "hint: remove that line: the first one counts\n" in capsys.readouterr().err
    assert files(system) == before


# --- daemons ----------------------------------------------------------------------------------------------------------


@contextmanager
def running(program: Path, *argv: str, path: str = "/bin") -> Iterator[int]:
    """Run a program under a name, with words and a PATH, for as long as the block."""
    with subprocess.Popen(argv, executable=program, env={"PATH": path}) as process:
        try:
            while not Path(f"/proc/{process.pid}/environ").read_bytes():
                pass  # Popen returns before the kernel has set it up
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A daemon, whose name no daemon has here."""
    path = tmp_path / "test-lxd"
    path.write_bytes(Path(SLEEP).read_bytes())
    path.chmod(0o755)
    return path


def found(program: Path) -> list[int]:
    return [process.pid for process in find_processes([program.name], os.geteuid())]


def test_a_daemon_is_told_from_its_helpers(program: Path) -> None:
    """`lxd forkproxy ...` is one, and `[lxc monitor] ...` is another, that runs the same program."""
    with (
        running(program, program.name, "60"),
        running(program, f"[lxc monitor] /var/lib/{program.name}/c1", "60"),
        running(program, str(program), "--", "60", path="/first:/bin") as daemon,
    ):
        assert found(program) == [daemon]
        process, *_ = find_processes([program.name], os.geteuid())
        assert process.environ == {"PATH": "/first:/bin"}


def test_a_daemon_whose_program_was_replaced_is_one(program: Path) -> None:
    with running(program, program.name, "--", "60") as daemon:
        program.unlink()
        assert os.readlink(f"/proc/{daemon}/exe").endswith(f"{program.name} (deleted)")
        assert found(program) == [daemon]


@pytest.mark.root
def test_the_daemons_path_does_not_depend_on_who_asks_and_whether_it_runs(program: Path) -> None:
    daemon = DAEMONS["lxd"].replace(processes=(program.name,))
    options = Options("lxd", "/entries", "", sys.executable)
    without = build_setup(daemon, options)
    with running(program, program.name, "--", "60", path="/weird") as pid:
        beside = build_setup(daemon, options)
        assert f"daemon: runs, pid {pid}" in beside.findings
        assert beside.steps == without.steps
        fault = next(fault for fault in beside.faults if str(pid) in fault.what)
        assert (fault.why, fault.hint) == ("/entries is not first in its PATH", "systemctl restart lxd")


# --- what the host allows ---------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["lxd", "incus", "libvirt", "systemd"])
def test_looking_says_what_there_is_and_what_it_allows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On this host."""
    assert hook([name]) == 0
    said = capsys.readouterr().out
    assert "user namespaces: user.max_user_namespaces = " in said
    assert "\nids for VMs of root's: " in said
    assert "\nmemory that VMs may lock: " in said
    if name != "systemd":
        version = subprocess.run(["qemu-system-x86_64", "-version"], capture_output=True, text=True).stdout.splitlines()[0]
        assert f": {version}\n" in said


def test_the_limit_of_locked_memory_is_the_daemons(program: Path) -> None:
    with running(program, program.name, "--", "60") as pid:
        subprocess.run(["prlimit", f"--pid={pid}", "--memlock=65536:65536"], check=True)
        assert describe_lock_limit(pid).startswith("memory that VMs may lock: 65536 bytes; ")
    assert describe_lock_limit(None).startswith("memory that VMs may lock: LimitMEMLOCK= of the unit; ")


def copied_program(folder: Path, *words: str) -> str:
    """Run a hook of a copy of this program; return what it says."""
    shutil.copytree(CHECKOUT / "qemu_userns", folder / "qemu_userns", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder, "hook", *words], capture_output=True, text=True)
    return done.stdout


@pytest.mark.root
@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o755, 1234)], ids=["mode", "owner"])
def test_a_program_that_others_than_root_may_change_is_a_fault(shared_tmp: Path, mode: int, owner: int) -> None:
    """A root daemon would run it: one of a user's own, installed in the home directory, say."""
    folder = shared_tmp / "home"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, owner, owner)
    assert f"fault: {folder}: " in copied_program(folder, "lxd")


@pytest.mark.userns
def test_a_kernel_that_allows_no_user_namespace_is_said_with_what_to_set() -> None:
    def look() -> list[str]:
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        return [f"{fault.what}|{fault.why}|{fault.hint}" for fault in find_sysctl_faults(read_sysctls())]

    hint = "sysctl user.max_user_namespaces=65536 && echo user.max_user_namespaces=65536 > /etc/sysctl.d/60-qemu-userns.conf"
    assert in_namespaces(look) == [f"user.max_user_namespaces|is 0: QEMU can have no user namespace|{hint}"]


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"user.max_user_namespaces": "1"}, []),
        ({"user.max_user_namespaces": "1", "kernel.unprivileged_userns_clone": "1"}, []),
        ({"user.max_user_namespaces": "1", "kernel.unprivileged_userns_clone": "0"}, ["kernel.unprivileged_userns_clone"]),
        ({}, ["user namespaces"]),
    ],
)
def test_settings_of_other_kernels(values: dict[str, str], faults: list[str]) -> None:
    """Debian's of old, and one without user namespaces."""
    assert [fault.what for fault in find_sysctl_faults(values)] == faults


def test_ids_that_are_all_given_away_are_said(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_hook(system, "lxd")
    assert "ids for VMs of root's: 524288-1879048191, enough for 28664 at once\n" in capsys.readouterr().out
    write(system / "etc/qemu-userns/config.toml", 'pool = "600000-731071"\n')
    write(system / "etc/subuid", "somebody:600000:65536\n")
    run_hook(system, "lxd")
    assert "ids for VMs of root's: 600000-731071, enough for 1 at once\n" in capsys.readouterr().out
    write(system / "etc/subgid", "somebody:665536:65536\n")
    assert run_hook(system, "lxd", "--apply") == 0
    assert run_hook(system, "lxd", "--check") == 1
    said = capsys.readouterr().err
    assert (
        "ids 600000-731071: no 65536 ids in a row that /etc/subuid and /etc/subgid do not give to others\nhint: set a larger"
        in said
    )


@pytest.mark.parametrize("name", ["lxd", "incus", "libvirt", "systemd"])
def test_ubuntus_restriction_is_found_with_what_to_do_until_it_is_done(
    system: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has no profile gets this one there, and has no capability in a user namespace."""
    write(system / "etc/apparmor.d/unprivileged_userns", "")
    write(system / "etc/libvirt/qemu.conf", "")
    run_hook(system, name, "--apply")
    capsys.readouterr()
    assert run_hook(system, name, "--check") == 1
    error, hint = capsys.readouterr().err.splitlines()
    setting = "kernel.apparmor_restrict_unprivileged_userns"
    assert error == f"qemu-userns: {setting}: is 1, and QEMU's launcher has no profile that allows user namespaces"
    command, _, other = hint.removeprefix("hint: ").partition("; or, for all programs: ")
    assert other == f"sysctl {setting}=0"
    write_it, _, load_it = command.partition(" && ")
    profile = f"/etc/apparmor.d/qemu-userns-{name}"
    assert load_it == f"apparmor_parser --replace {profile}"
    subprocess.run(["sh", "-euc", write_it.replace(f"> {profile}", f"> {system}{profile}")], check=True)
    abi, rule = Path(f"{system}{profile}").read_text().splitlines()
    start = f'"{directory_of(name)}/qemu-system-*"' if name != "systemd" else '"'
    assert abi == "abi <abi/4.0>,"
    assert rule.startswith(f"profile qemu-userns-{name} {start}")
    assert rule.endswith(" flags=(unconfined) { userns, }")
    assert run_hook(system, name, "--check") == 0
