"""The state of the caller's process arrives at QEMU: parent-death signal, session, signals, limits, environment."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.talk import DEADLINE_S, IDLE, PLAIN, is_alive, running, started, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

PR_SET_PDEATHSIG = 1
PYTHON_IGNORES = "the interpreter ignores both before a line of ours runs, so what the caller wished is lost"


def in_child(function: Callable[[], object]) -> Callable[[], None]:
    """Return `function` as what Popen calls in the child."""

    def call() -> None:
        function()

    return call


def test_pdeathsig_of_the_caller_survives(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    command = [*dropin, *IDLE, "-pidfile", str(pidfile)]
    program = (
        "import ctypes, subprocess, sys, signal\n"
        f"subprocess.Popen(sys.argv[1:], preexec_fn=lambda: ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL))\n"
        "signal.pause()\n"
    )
    with started([sys.executable, "-c", program, *command]) as middle:
        pid = int(wait_until(lambda: pidfile.read_text().strip(), "the pidfile"))
        wait_until(lambda: os.readlink(f"/proc/{pid}/exe").endswith("qemu-system-x86_64"), "QEMU")
        middle.kill()
        middle.wait(DEADLINE_S)
    wait_until(lambda: not is_alive(pid), "the end of QEMU")
    wait_until(lambda: not pidfile.exists(), "the pidfile gone")


def test_without_pdeathsig_it_outlives_its_parent(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    command = [*dropin, *IDLE, "-pidfile", str(pidfile)]
    program = "import subprocess, sys, signal\nsubprocess.Popen(sys.argv[1:])\nsignal.pause()\n"
    with started([sys.executable, "-c", program, *command]) as middle:
        pid = int(wait_until(lambda: pidfile.read_text().strip(), "the pidfile"))
        middle.kill()
        middle.wait(DEADLINE_S)
    assert is_alive(pid)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid), "the end of QEMU")


def ignore(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        lambda: ignore(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGWINCH),
        lambda: ignore(signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGXCPU),
        lambda: signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGHUP, signal.SIGUSR2, signal.SIGRTMIN]),
        lambda: signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD, signal.SIGCONT, signal.SIGPIPE]),
        pytest.param(
            lambda: ignore(signal.SIGPIPE, signal.SIGXFSZ),
            marks=pytest.mark.xfail(reason=PYTHON_IGNORES),
        ),
    ],
    ids=["nothing", "ignored", "others ignored", "blocked", "SIGCHLD blocked", "SIGPIPE and SIGXFSZ ignored"],
)
def test_signal_mask_and_dispositions_are_those_under_plain_qemu(dropin: list[str], prepare: Callable[[], object]) -> None:
    seen = []
    for words in (dropin, PLAIN):
        with running(words, preexec_fn=in_child(prepare)) as qemu:
            seen.append({key: qemu.status[key] for key in ("SigBlk", "SigIgn", "SigCgt")})
    assert seen[0] == seen[1]


def test_session_group_umask_nice_and_limits_arrive(dropin: list[str], shared_tmp: Path) -> None:
    def prepare() -> None:
        os.setsid()
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, 900))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
        resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 16 << 20))
        Path("/proc/self/oom_score_adj").write_text("321")

    seen = []
    for words in (dropin, PLAIN):
        with running(words, preexec_fn=prepare, umask=0o037, cwd=shared_tmp) as qemu:
            assert os.getsid(qemu.pid) == os.getpgid(qemu.pid) == qemu.pid
            seen.append(
                {
                    "limits": (qemu.proc / "limits").read_text(),
                    "umask": qemu.status["Umask"],
                    "nice": os.getpriority(os.PRIO_PROCESS, qemu.pid),
                    "oom": (qemu.proc / "oom_score_adj").read_text(),
                    "affinity": os.sched_getaffinity(qemu.pid),
                    "cgroup": (qemu.proc / "cgroup").read_text(),
                    "personality": personality(qemu.proc),
                }
            )
    assert seen[0] == seen[1]


def personality(proc: Path) -> str:
    """Return a process's personality; only its owner may read it."""
    try:
        return (proc / "personality").read_text()
    except PermissionError:
        return "00000000\n"


def test_the_environment_is_byte_for_byte_the_callers(dropin: list[str]) -> None:
    python = {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": "/nowhere"}
    environ = {**os.environ, "A": "b=c\nd", "EMPTY": "", "BYTES": os.fsdecode(b"\xff\xfe"), **python}
    seen = []
    for words in (dropin, PLAIN):
        with running(words, env=environ) as qemu:
            seen.append(sorted((qemu.proc / "environ").read_bytes().split(b"\0")))
    assert seen[0] == seen[1]


def test_an_empty_environment_stays_empty(dropin: list[str]) -> None:
    with running(dropin, env={}) as qemu:
        assert (qemu.proc / "environ").read_bytes() == b""


def test_the_c_locale_brings_no_variable_of_the_interpreters(dropin: list[str]) -> None:
    with running(dropin, env={"PATH": "/usr/bin:/bin", "LC_ALL": "", "LANG": "C"}) as qemu:
        assert sorted((qemu.proc / "environ").read_bytes().split(b"\0")) == [b"", b"LANG=C", b"LC_ALL=", b"PATH=/usr/bin:/bin"]
