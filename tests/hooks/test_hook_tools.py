"""What hooks write, read by the programs that it is for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from qemu_userns.cli.hook import hook
from qemu_userns.errors import HostError
from qemu_userns.hooks.apparmor import build_profile, escape_path, find_restriction
from qemu_userns.hooks.install import install
from qemu_userns.hooks.systemd import build_units
from tests.systems import QEMU, run_hook, write

if TYPE_CHECKING:
    from pathlib import Path

AWKWARD = ["/a b", '/a"b', "/a*b", "/a?b", "/a[b]", "/a{b,c}", "/a\\b", "/a^b", "/a@{HOME}b", "/a,b", "/a'b", "/a#b", "/é"]
"""Directories with what means something else in a profile."""


def parse(profile: str) -> str:
    """Compile a profile; return how the parser reads its rules."""
    command = ["/usr/sbin/apparmor_parser", "--skip-kernel-load", "--skip-cache", "--skip-read-cache", "--dump=rule-exprs"]
    done = subprocess.run(command, input=profile, capture_output=True, text=True)
    assert done.returncode == 0, (profile, done.stderr)
    return done.stdout + done.stderr


@pytest.mark.apparmor_parser
@pytest.mark.parametrize("directory", ["/usr/local/lib/qemu-userns/lxd", *AWKWARD])
def test_the_lines_for_a_profile_compile_and_mean_those_paths(directory: str) -> None:
    lines = build_profile(escape_path(directory), escape_path(f"{directory}/python3"), "")
    said = parse(f"profile test flags=(attach_disconnected, mediate_deleted) {{\n{lines}}}\n")
    read = [line.partition("->")[2].strip().rpartition(" (")[0] for line in said.splitlines() if line.startswith("rule:")]
    read = [re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text.encode()).decode() for text in read]
    unescaped = [text.replace("\\", "") for text in read]
    plain = directory.replace("\\", "")
    assert f"{plain}/python3" in unescaped, said
    assert any(text.startswith(f"{plain}/qemu-system-(") for text in unescaped), said


@pytest.mark.apparmor_parser
def test_the_lines_for_a_snap_name_its_entries_and_both_interpreters(tmp_path: Path) -> None:
    assert hook(["lxd", "--snap", str(tmp_path / "snap")]) == 0
    said = parse(f"profile test {{\n{(tmp_path / 'snap/raw.apparmor').read_text()}}}\n")
    read = said.replace("[^/\\x00]", "").splitlines()
    assert any(line.startswith("rule: /snap/lxd/*/external/qemu/bin/qemu-system-*  ->") for line in read), said
    assert any(line.startswith("rule: /(usr|snap/lxd/*/external/qemu/python)/bin/python3*  ->") for line in read), said


@pytest.mark.apparmor_parser
@pytest.mark.parametrize("directory", ["/usr/local/lib/qemu-userns/lxd", *AWKWARD])
def test_the_profile_for_ubuntu_compiles(directory: str, system: Path) -> None:
    """But for what a parser before 4.0 knows nothing of."""
    write(system / "etc/apparmor.d/unprivileged_userns", "")
    fault = find_restriction("lxd", f"{directory}/qemu-system-*", str(system))
    assert fault is not None
    assert fault.hint is not None
    _, _, abi, rule, *_ = shlex.split(fault.hint.partition(" > ")[0])
    assert abi == "abi <abi/4.0>,"
    parse(rule.replace("userns,", "file,").replace("flags=(unconfined)", ""))


def verify(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.systemd
@pytest.mark.parametrize("folder", ["plain", "with blanks", "with 100%"])
def test_systemd_takes_the_units(tmp_path: Path, folder: str) -> None:
    program = write(tmp_path / folder / "qemu-userns", "#!/bin/sh\n")
    program.chmod(0o755)
    for name, text in build_units(str(program)).items():
        verify(write(tmp_path / "units" / name, text))


@pytest.mark.systemd
def test_systemd_takes_what_is_added_to_the_daemons_unit(system: Path) -> None:
    run_hook(system, "lxd", "--apply")
    unit = write(system / "etc/systemd/system/lxd.service", "[Service]\nExecStart=/bin/true\n")
    verify(unit)
    added = system / "etc/systemd/system/lxd.service.d/qemu-userns.conf"
    added.write_text(added.read_text() + "Environmentfile=/x\n")
    with pytest.raises(AssertionError, match="Environmentfile"):
        verify(unit)  # so it has read the file


@pytest.mark.systemd
def test_a_vm_can_be_enabled_in_another_system(system: Path) -> None:
    run_hook(system, "systemd", "--apply")
    for verb, said in (("enable", ""), ("is-enabled", "enabled\n")):
        command = ["systemctl", f"--root={system}", verb, "qemu-userns@web.service"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, said), done.stderr
    link = system / "etc/systemd/system/multi-user.target.wants/qemu-userns@web.service"
    assert os.readlink(link) == "/etc/systemd/system/qemu-userns@.service"


def test_an_interpreter_that_no_script_can_name_is_refused(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python3")
    with pytest.raises(HostError, match="/opt/my python/bin/python3: has a blank"):
        install("/entries", f"/{QEMU.rpartition('/')[0]}", str(system))


def test_a_path_in_the_environment_file_is_quoted(system: Path) -> None:
    """systemd.exec(5): within double quotes a backslash comes before these four."""
    run_hook(system, "lxd", "--apply", "--dir", '/a b"c\\d$e`f')
    lines = (system / "etc/qemu-userns/lxd.env").read_text().splitlines()
    assert lines[1] == 'PATH="/a b\\"c\\\\d\\$e\\`f:/usr/bin:/bin"'
