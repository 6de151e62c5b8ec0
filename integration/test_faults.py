"""Faults at every step between start and execve, injected with strace: killed there, or the system call fails.

The launch must stop: nothing runs, one line says why, and no file, lease or process stays.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from integration.leftovers import is_held
from integration.shares import dropin_words, module_folder
from integration.talk import IDLE, outcome, wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.userns,
    pytest.mark.newuidmap,
    pytest.mark.dropin,
    pytest.mark.strace,
    pytest.mark.slow,
]

CALLS = (
    "setns",
    "open_tree",
    "move_mount",
    "mount_setattr",
    "fsopen",
    "fsconfig",
    "fsmount",
    "pivot_root",
    "umount2",
    "chdir",
    "capset",
    "prctl",
    "write",
    "close_range",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "mkdirat",
    "openat2",
    "bind",
    "listen",
    "fchmod",
    "socketpair",
    "sendmsg",
    "memfd_create",
    "pipe2",
    "clone",
    "setresuid",
    "setresgid",
    "setgroups",
    "flock",
    "fchown",
)
ERRORS = ("EPERM", "ENOSPC", "ENOMEM", "EMFILE")
AS_ROOT_ONLY = ("setresuid", "setresgid", "setgroups", "flock", "fchown")
TRIED = [pytest.param(call, marks=[pytest.mark.root] if call in AS_ROOT_ONLY else []) for call in CALLS]
LEASES = Path("/run/qemu-userns/leases")
FORM = re.compile(r"qemu-userns: [^\n]+: [^\n]+\n(hint: [^\n]+\n)?")


def options(folder: Path) -> list[str]:
    """Return a command line that creates a pidfile, a log and a socket, and shares a folder."""
    share = folder / "share"
    share.mkdir(exist_ok=True)
    files = ["-pidfile", str(folder / "pid"), "-D", str(folder / "log"), "-d", "unimp"]
    sockets = ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
    return [*IDLE, *files, *sockets, "-fsdev", f"local,id=f,path={share},security_model=passthrough"]


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """How often a launch makes each system call in the launcher before it becomes QEMU."""
    with module_folder() as folder:
        trace = folder / "trace"
        words = ["strace", "-o", str(trace), "-e", f"trace={','.join(CALLS)},execve", *dropin_words(), *options(folder)]
        assert outcome(words, "-device", "nosuch")[0] == 1
        wait_until(lambda: not (folder / "pid").exists(), "the pidfile gone")
        found = dict.fromkeys(CALLS, 0)
        for line in trace.read_text().splitlines():
            name = line.partition("(")[0]
            if name == "execve" and '"/usr/bin/qemu-system' in line:
                break
            if name in found:
                found[name] += 1
    return found


def inject(entry: str, folder: Path, rule: str) -> tuple[int, str, str]:
    """Launch with a fault; a QEMU that runs all the same says so, by the device that it does not know."""
    call = rule.partition(":")[0]
    words = ["strace", "-o", "/dev/null", "-e", f"trace={call}", "-e", "signal=none", "-e", f"inject={rule}", entry]
    return outcome(words, *options(folder), "-device", "nosuch")


def assert_nothing_left(folder: Path, when: int) -> None:
    """Check that no file of the launch stays, and that no lease is held; its file may stay until the next launch sweeps it."""
    wait_until(lambda: {path.name for path in folder.iterdir()} <= {"share"}, f"all files gone after a fault at call {when}", 2)
    if os.geteuid() == 0:
        wait_until(lambda: not any(is_held(path) for path in LEASES.glob("*")), "the lease given back", 2)


def places(count: int) -> list[int]:
    """Return the first, a middle and the last call."""
    return sorted({1, (count + 1) // 2, count})


@pytest.mark.parametrize("call", TRIED)
def test_a_launcher_that_is_killed_leaves_nothing(dropin: list[str], shared_tmp: Path, counts: dict[str, int], call: str) -> None:
    assert counts[call] > 0
    for when in places(counts[call]):
        status, stdout, stderr = inject(dropin[0], shared_tmp, f"{call}:signal=SIGKILL:when={when}")
        assert (status, stdout, stderr) == (-signal.SIGKILL, "", ""), f"at call {when}"
        assert_nothing_left(shared_tmp, when)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", TRIED)
def test_a_system_call_that_fails_stops_the_launch_in_one_line(
    dropin: list[str], shared_tmp: Path, counts: dict[str, int], call: str, error: str
) -> None:
    count = counts[call]
    assert count > 0
    for when in places(count):
        status, stdout, stderr = inject(dropin[0], shared_tmp, f"{call}:error={error}:when={when}")
        assert (status, stdout) == (1, ""), f"at call {when} of {count}: {stderr}"
        assert FORM.fullmatch(stderr), f"at call {when} of {count}: {stderr}"
        assert "internal error" not in stderr
        assert_nothing_left(shared_tmp, when)
