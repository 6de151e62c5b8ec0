"""Programs that run outside for QEMU."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from qemu_userns.errors import ResourceError
from qemu_userns.host.programs import open_program
from tests.forked import in_child

IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ)
STANDARD = (1 << 31) - 1  # the mask of those below the C library's own
NOBODY = 65534


def said_by(*argv: str) -> str:
    """Return all that a program says."""
    with os.fdopen(open_program(argv)) as file:
        return file.read()


def test_it_has_the_signals_of_a_program_that_qemu_starts() -> None:
    """Not those of the supervisor: who does not end by SIGPIPE writes for ever."""

    def inside() -> dict[str, str]:
        for number in (*IGNORED, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        lines = said_by("cat", "/proc/self/status").splitlines()
        return dict(line.split(":\t") for line in lines if line.startswith("Sig"))

    found = in_child(inside)
    assert int(found["SigBlk"], 16) == 0
    assert int(found["SigIgn"], 16) & STANDARD == 1 << signal.SIGQUIT - 1


def test_it_has_a_session_of_its_own() -> None:
    pid, session = in_child(lambda: said_by("sh", "-c", "cut -d ' ' -f 1,6 /proc/$$/stat")).split()
    assert pid == session


@pytest.mark.parametrize("program", ["/nowhere", "qemu-userns-nowhere", "/dev/null"])
def test_one_that_cannot_be_executed(program: str) -> None:
    with pytest.raises(ResourceError, match=f"^{program}: cannot be executed: "):
        open_program((program,))


def test_no_process_can_be_had() -> None:
    def inside() -> str:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)  # root has no limit
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with pytest.raises(ResourceError) as caught:
            open_program(("true",))
        return str(caught.value)

    assert in_child(inside) == f"true: cannot be executed: {os.strerror(errno.EAGAIN)}"
