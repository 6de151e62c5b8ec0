"""Diversions of hooks, by the real dpkg-divert: found from what is there, done and undone from wherever they were left."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from qemu_userns.hooks.steps import run
from tests.conftest import CHECKOUT
from tests.systems import PROGRAM, QEMU, directory_of, diverted, files, run_hook, tree

if TYPE_CHECKING:
    from pathlib import Path

NOTE = [f"/{QEMU}", f"/{QEMU}.distrib", ":"]
ENTRY = f"{directory_of('lxd')}/qemu-system-x86_64"


def note(system: Path) -> None:
    """Have dpkg note a diversion, and nothing else."""
    run(["dpkg-divert", "--root", str(system), "--local", "--no-rename", "--divert", NOTE[1], "--add", NOTE[0]])


@pytest.mark.parametrize("noted", [True, False], ids=["", "without the note"])
def test_remove_and_check_need_not_be_told(system: Path, noted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(system)
    assert run_hook(system, "lxd", "--apply", "--divert") == 0
    assert diverted(system) == NOTE
    if not noted:
        (system / "etc/qemu-userns/lxd.hook").unlink()
    (system / QEMU).with_suffix(".distrib").rename(system / "usr/bin/kept")
    assert run_hook(system, "lxd", "--check") == 1
    assert f"qemu-userns: /{QEMU}.distrib: is not there\n" in capsys.readouterr().err
    (system / "usr/bin/kept").rename(system / f"{QEMU}.distrib")
    assert run_hook(system, "lxd", "--remove") == 0
    assert files(system) == before
    assert diverted(system) == []


def test_a_diversion_stays_where_the_next_run_does_not_ask_for_it(system: Path) -> None:
    run_hook(system, "lxd", "--apply", "--divert")
    after = tree(system)
    assert run_hook(system, "lxd", "--apply") == 0
    assert tree(system) == after


def test_a_program_that_is_gone_leaves_no_link(system: Path) -> None:
    """Its package was removed, and dpkg has removed the file that it keeps."""
    run_hook(system, "lxd", "--apply", "--divert")
    (system / f"{QEMU}.distrib").unlink()
    assert run_hook(system, "lxd", "--remove") == 0
    assert (os.listdir(system / "usr/bin"), diverted(system)) == ([], [])


def test_a_link_that_is_gone_is_made_again_or_the_program_is_put_back(system: Path) -> None:
    before = files(system)
    run_hook(system, "lxd", "--apply", "--divert")
    after = tree(system)
    (system / QEMU).unlink()
    assert run_hook(system, "lxd", "--apply") == 0
    assert tree(system) == after
    (system / QEMU).unlink()
    assert run_hook(system, "lxd", "--remove") == 0
    assert (files(system), diverted(system)) == (before, [])


@pytest.mark.parametrize("link", [False, True], ids=["noted", "noted and kept"])
def test_a_diversion_that_is_half_done_is_finished_or_undone(system: Path, link: bool) -> None:
    """As a run leaves it that is killed between its steps."""
    before = files(system)
    run_hook(system, "lxd", "--apply", "--divert")
    after = files(system)

    def halve() -> None:
        (system / QEMU).unlink(missing_ok=True)
        (system / f"{QEMU}.distrib").rename(system / QEMU)
        if link:
            (system / f"{QEMU}.distrib").hardlink_to(system / QEMU)

    halve()
    assert run_hook(system, "lxd", "--apply") == 0
    assert (files(system), diverted(system)) == (after, NOTE)
    halve()
    assert run_hook(system, "lxd", "--remove") == 0
    assert (files(system), diverted(system)) == (before, [])


def test_a_failure_in_the_middle_undoes_the_step_that_failed(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that stands where the second QEMU is to be kept."""
    other = system / "usr/bin/qemu-system-xtensa"
    for path in (other, other.with_name(f"{other.name}.distrib")):
        path.write_text(f"#!/bin/sh\n# {path.name}\n")
        path.chmod(0o755)
    before = files(system)
    assert run_hook(system, "lxd", "--apply", "--divert") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qemu-userns: {other}: is not this hook's link, and {other}.distrib is there as well\nhint: ")
    assert said.count("\n") == 2
    assert (files(system), diverted(system)) == (before, [])


@pytest.mark.mount
def test_a_step_that_fails_half_way_is_undone(system: Path) -> None:
    """dpkg has noted the diversion, and then the program cannot be given its other name: it is a mount."""
    before = files(system)
    script = 'mount --bind "$1" "$1"; shift; exec "$@"'
    hook = [sys.executable, "-c", PROGRAM, str(CHECKOUT), "hook", "lxd", "--root", str(system), "--apply", "--divert"]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script, "sh", str(system / QEMU), *hook]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"qemu-userns: {system / QEMU}.distrib: Invalid cross-device link\n"
    assert (files(system), diverted(system)) == (before, [])


def test_an_administrators_own_diversion_stays(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note(system)
    (system / QEMU).rename(system / f"{QEMU}.distrib")
    (system / QEMU).write_text("#!/bin/sh\n# a wrapper\n")
    before = files(system)
    assert run_hook(system, "lxd", "--apply", "--divert") == 1
    assert "it is diverted already: leave out --divert" in capsys.readouterr().err
    assert (files(system), diverted(system)) == (before, NOTE)
    assert run_hook(system, "lxd", "--apply") == 0
    assert run_hook(system, "lxd", "--remove") == 0
    assert (files(system), diverted(system)) == (before, NOTE)


def test_another_hooks_diversion_stays(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_hook(system, "lxd", "--apply", "--divert")
    after = files(system)
    assert run_hook(system, "incus", "--apply", "--divert") == 1
    assert "is not this hook's link" in capsys.readouterr().err
    assert files(system) == after
    assert run_hook(system, "incus", "--apply") == 0
    assert run_hook(system, "incus", "--remove") == 0
    assert files(system) == after
    assert os.readlink(system / QEMU) == ENTRY
