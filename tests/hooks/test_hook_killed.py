"""Hooks that are killed, that fail, that may not, and that run at once."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_userns.hooks.files import Lock
from tests.conftest import CHECKOUT
from tests.systems import PROGRAM, QEMU, build_system, directory_of, diverted, files, run_hook, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHANGES = ("open", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
"""Audit events of what changes a file, or may."""


def changes(event: str, arguments: tuple[object, ...]) -> bool:
    """Say whether something is about to be changed, or a program to be run."""
    if event == "open":
        return bool(int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in (*CHANGES, "subprocess.Popen")


def run_killed(function: Callable[[], object], count: int) -> bool:
    """Run a function in a fork that is killed before its change number `count`; return whether it came so far."""
    pid = os.fork()
    if pid == 0:
        left = count

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            left -= changes(event, arguments)
            if left == 0 and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(watch)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def copies(system: Path) -> Iterator[Path]:
    """Yield copies of a system."""
    while True:
        copy = system.parent / "copy"
        shutil.copytree(system, copy, symlinks=True)
        yield copy
        shutil.rmtree(copy)


@pytest.mark.parametrize("action", ["--apply", "--remove"])
def test_a_hook_that_is_killed_at_any_line_is_finished_or_undone_by_the_next(system: Path, action: str) -> None:
    """Wherever it is, there is a QEMU, and what starts it."""
    before = files(system)
    run_hook(system, "lxd", "--apply", "--divert")
    applied = files(system)
    if action == "--apply":
        run_hook(system, "lxd", "--remove")
    was_killed, count = True, 0
    for copy in copies(system):
        count += 1
        was_killed = run_killed(functools.partial(run_hook, copy, "lxd", action, *(["--divert"] * (action == "--apply"))), count)
        target = os.readlink(copy / QEMU)[1:] if (copy / QEMU).is_symlink() else QEMU
        assert (copy / target).read_text().startswith("#!"), f"change {count}"
        if target != QEMU:
            assert (copy / f"{QEMU}.distrib").exists(), f"change {count}"
        if count % 2:
            assert run_hook(copy, "lxd", "--remove") == 0, f"change {count}"
            assert (files(copy), diverted(copy)) == (before, []), f"change {count}"
        else:
            assert run_hook(copy, "lxd", "--apply", "--divert") == 0, f"change {count}"
            assert files(copy) == applied, f"change {count}"
        if not was_killed:
            break
    assert count > 15


def test_what_there_was_is_back_when_an_update_fails(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later version writes another text, and cannot do its last step."""
    run_hook(system, "lxd", "--apply")
    (system / "etc/environment").write_text('PATH="/opt/bin:/usr/bin"\n')  # so the hook's own file is another one
    (system / "usr/bin/qemu-system-xtensa").write_text("#!/bin/sh\n")
    (system / "usr/bin/qemu-system-xtensa").chmod(0o755)  # and there is one entry more
    changed = system / "etc/qemu-userns/lxd.apparmor"
    changed.write_text("changed\n")
    before = files(system)
    assert run_hook(system, "lxd", "--apply") == 1
    assert capsys.readouterr().err.count("\n") == 2
    assert files(system) == before


@pytest.mark.mount
def test_an_error_while_undoing_does_not_hide_the_first(system: Path, tmp_path: Path) -> None:
    """The entries' directory can be written no more when it is the step after them that fails."""
    other = system / "etc/systemd/system/lxd.service.d/qemu-userns.conf"
    other.parent.mkdir(parents=True)
    other.write_text("[Service]\n")
    entries = system / directory_of("lxd")[1:]
    entries.mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(f"""
import subprocess, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from qemu_userns.cli.main import main
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith("lxd.env.qemu-userns-new"):
        subprocess.run(["mount", "-o", "remount,ro,bind", {str(entries)!r}], check=True)
sys.addaudithook(watch)
main()
""")
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-euc",
        'mount --bind "$1" "$1"; shift; exec "$@"',
        "sh",
        str(entries),
    ]
    words = [sys.executable, str(script), "hook", "lxd", "--root", str(system), "--apply"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, ""), done
    assert lines[0] == f"qemu-userns: {other}: is there, and not as a hook has written it"
    assert [line for line in lines[1:] if line.endswith(": Read-only file system")], lines


def run_as(user: str | None, system: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a hook as somebody else."""
    command = [sys.executable, "-c", PROGRAM, str(CHECKOUT), "hook", "lxd", "--root", str(system), *words]
    return subprocess.run(command, capture_output=True, text=True, user=user, extra_groups=[] if user else None)


def test_without_rights_it_is_one_line_and_a_hint(shared_tmp: Path, unprivileged_user: str) -> None:
    """Root's system, or one that its owner has closed; what it does is said all the same."""
    system = build_system(shared_tmp / "system")
    for path in (system, *system.rglob("*")):
        path.chmod(0o555)
    before = tree(system)
    user = unprivileged_user if os.geteuid() == 0 else None
    for action in ("--apply", "--remove"):
        done = run_as(user, system, action)
        lines = done.stderr.splitlines()
        assert (done.returncode, done.stdout, len(lines)) == (1, "", 2), done
        assert (lines[0][-19:], lines[1]) == (": Permission denied", "hint: run it as root")
    assert run_as(user, system).returncode == 0
    assert run_as(user, system, "--check").returncode == 1
    assert tree(system) == before
    for path in (system, *system.rglob("*")):
        path.chmod(0o755)


def blocked_on_a_lock(pid: int) -> bool:
    """Say whether a process waits for a file lock: proc_locks(5)."""
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_a_hook_waits_for_another_one(system: Path) -> None:
    lock = Lock(str(system))
    command = [sys.executable, "-c", PROGRAM, str(CHECKOUT), "hook", "incus", "--root", str(system), "--apply"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as other:
        while not blocked_on_a_lock(other.pid):
            assert other.poll() is None
        assert not (system / "etc/qemu-userns").exists()
        lock.release()
        assert other.wait() == 0
    assert run_hook(system, "incus", "--check") == 0


def test_hooks_at_once(system: Path) -> None:
    """Each as if it had been alone."""
    names = ("lxd", "incus", "libvirt")
    before = files(system)
    for action in ("--apply", "--remove"):
        commands: list[list[str]] = [
            [sys.executable, "-c", PROGRAM, str(CHECKOUT), "hook", name, "--root", str(system), action]
            for name in (*names, "lxd")
        ]
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        assert [process.wait() for process in running] == [0] * len(running)
        if action == "--apply":
            assert [run_hook(system, name, "--check") for name in names] == [0] * len(names)
    assert files(system) == before
