"""Accelerators: a ROM that speaks and ends QEMU, under tcg and kvm, for each way of starting QEMU."""

from __future__ import annotations

import grp
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.rom import EXIT_DEVICE, build_rom, exit_status
from integration.shares import Launch, dropin_words
from integration.talk import fds_of, version_of
from tests.conftest import KVM, lacking, probe_kvm

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap]

PLAIN = ["qemu-system-x86_64"]
LINE = "hello from the firmware"
VALUE = 21


@pytest.fixture
def rom(shared_tmp: Path) -> Path:
    path = shared_tmp / "rom.bin"
    path.write_bytes(build_rom(LINE, VALUE))
    return path


@pytest.fixture(params=["tcg", "kvm", "kvm by -machine", "kvm by -enable-kvm", "kvm or tcg"])
def accelerator(request: pytest.FixtureRequest) -> list[str]:
    name: str = request.param
    if name.startswith("kvm") and "tcg" not in name and (reason := probe_kvm()):
        lacking("kvm", reason)
    return {
        "tcg": ["-accel", "tcg"],
        "kvm": ["-accel", "kvm"],
        "kvm by -machine": ["-M", "pc,accel=kvm"],
        "kvm by -enable-kvm": ["-enable-kvm"],
        "kvm or tcg": ["-M", "q35,accel=kvm:tcg"],
    }[name]


def run(qemu: Sequence[str], rom: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the ROM, its serial port on stdout."""
    words = [*qemu, "-nodefaults", "-display", "none", "-m", "16", "-bios", str(rom), "-serial", "stdio", *EXIT_DEVICE, *options]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def test_rom(rom: Path, launch: Launch, accelerator: list[str]) -> None:
    done = run(dropin_words(), rom, *accelerator, *launch.options)
    assert (done.returncode, done.stdout) == (exit_status(VALUE), f"{LINE}\n"), done.stderr
    plain = run(PLAIN, rom, *accelerator)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize("value", [0, 1, 127])
def test_exit_status_is_qemus(rom: Path, launch: Launch, value: int) -> None:
    rom.write_bytes(build_rom(LINE, value))
    assert run(dropin_words(), rom, "-accel", "tcg", *launch.options).returncode == exit_status(value)


@pytest.mark.kvm
@pytest.mark.parametrize("option", ["-accel kvm", "-M q35,accel=kvm:tcg", "-enable-kvm"])
def test_kvm_is_really_used(launch: Launch, option: str) -> None:
    words = [*dropin_words(), "-nodefaults", "-display", "none", *option.split(), "-S", "-monitor", "stdio", *launch.options]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdout is not None
        assert "QEMU" in qemu.stdout.readline()
        targets = set(fds_of(qemu.pid).values())
        proc = Path(f"/proc/{qemu.pid}")
        capabilities = (proc / "status").read_text().partition("CapEff:\t")[2].split()[0]
        by_fdset, shown = b"kvm,device=/dev/fdset/" in (proc / "cmdline").read_bytes(), (proc / "root/dev/kvm").exists()
        may_open = may_open_kvm(proc)
        output, _ = qemu.communicate("info kvm\nquit\n", timeout=60)
    assert "kvm support: enabled" in output
    assert "anon_inode:kvm-vm" in targets
    assert {target for target in targets if target.startswith("/dev/")} <= {"/dev/kvm", "/dev/null", "/dev/ptmx"}
    assert int(capabilities, 16) == 0
    has_key = version_of(*PLAIN) >= (9, 0) and option == "-accel kvm"
    assert (by_fdset, shown) == ((True, False) if has_key and not may_open else (False, True))


def may_open_kvm(proc: Path) -> bool:
    """Say whether a process could open /dev/kvm by itself."""
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    uids, gids = (set(map(int, fields[name].split())) for name in ("Uid", "Gid"))
    gids |= set(map(int, fields["Groups"].split()))
    found = KVM.stat()
    return found.st_mode & 0o006 == 0o006 or found.st_uid in uids or found.st_gid in gids


@pytest.mark.kvm
def test_kvm_reached_by_group_alone(rom: Path, launch: Launch) -> None:
    """The group that opens /dev/kvm has no name inside, and stays in force."""
    found = KVM.stat()
    if found.st_mode & 0o006:
        pytest.skip(f"kvm: {KVM} is open to everybody")
    assert run(dropin_words(), rom, "-accel", "kvm", *launch.options).returncode == exit_status(VALUE)


@pytest.mark.root
@pytest.mark.kvm
def test_kvm_that_the_caller_may_not_open(rom: Path) -> None:
    """Its group is named; or tcg is taken, where the command line allows it."""
    if KVM.stat().st_mode & 0o006:
        pytest.skip(f"kvm: {KVM} is open to everybody")
    nobody = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--", "env", "HOME=/nonexistent"]
    group = grp.getgrgid(KVM.stat().st_gid).gr_name
    for words in (["-accel", "kvm"], ["-M", "pc,accel=kvm"], ["-enable-kvm"]):
        done, plain = (run([*nobody, *qemu], rom, *words) for qemu in (dropin_words(), PLAIN))
        assert (done.returncode, plain.returncode) == (1, 1)
        assert "failed to initialize kvm" in plain.stderr
        error, hint = done.stderr.splitlines()
        assert error.endswith(" /dev/kvm: Permission denied")
        assert f"its group is {group}: usermod -aG {group} nobody" in hint
    done = run([*nobody, *dropin_words()], rom, "-M", "pc,accel=kvm:tcg")
    assert (done.returncode, done.stdout) == (exit_status(VALUE), f"{LINE}\n")
    done = run([*nobody, *dropin_words()], rom, "-accel", "kvm", "-accel", "tcg")
    assert (done.returncode, done.stdout) == (exit_status(VALUE), f"{LINE}\n")


@pytest.mark.kvm
@pytest.mark.skipif(shutil.which("qemu-system-x86_64-microvm") is None, reason="no qemu-system-x86_64-microvm, which has no tcg")
def test_a_qemu_that_has_only_kvm_takes_it_by_itself(launch: Launch) -> None:
    words = [f"{dropin_words()[0]}-microvm", "-M", "microvm", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    done = subprocess.run([*words, *launch.options], input="info kvm\nquit\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "kvm support: enabled" in done.stdout
