"""Run the scripts and helpers of networks to their end, as QEMU would, but outside."""

import os

from qemu_userns.linux.process import SIGCHLD, SIGPIPE, SIGXFSZ, close_all_but, reap, reset_signal
from qemu_userns.plan.grants import HELPER_FD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.host.leftovers import Downscript

_EXITED_1 = 1 << 8  # wait status of what cannot be executed: wait(2)
_STATUS_MAX_BYTES = 16
_ERROR_MAX_BYTES = 2000


def run_script(path: str, interface: str) -> int:
    """Run a network script; return its wait status."""
    return run_to_end((path, interface))


def run_downscripts(downscripts: "Iterable[Downscript]") -> None:
    """Run each; what one that fails leaves stays, as there is nobody to tell."""
    for item in downscripts:
        run_script(item.path, item.interface)


def run_said(argv: "tuple[str, ...]", helper_fd: int) -> "tuple[int, str]":
    """Run a helper to its end; return its wait status, and what it said on stderr, which the supervisor has not.

    Args:
        argv: the helper and its words.
        helper_fd: what it has as HELPER_FD, which is borrowed.
    """
    said = os.memfd_create("qemu-userns-helper", os.MFD_CLOEXEC)
    status = run_to_end(argv, ((said, 2), (helper_fd, HELPER_FD)))
    text = os.pread(said, _ERROR_MAX_BYTES, 0).decode(errors="replace").strip()
    os.close(said)
    return status, text


def describe_end(argv: "tuple[str, ...]", status: int) -> str:
    """Say how a helper ended that said nothing."""
    if not os.access(argv[0], os.X_OK):
        return f"{argv[0]} cannot be executed"
    return f"{argv[0]} ended with status {status}"


def run_to_end(argv: "tuple[str, ...]", fds: "tuple[tuple[int, int], ...]" = ()) -> int:
    """Run a program with the caller's rights and standard streams, and return its wait status.

    A child waits for it: this process's caller may have had SIGCHLD ignored, and then nobody learns how it ended.

    Args:
        argv: the program, which is not looked for, and its words.
        fds: fd here, which is borrowed, and number there, of what it is given.
    """
    status_read, status_write = os.pipe()
    child = os.fork()
    if child == 0:
        status = _EXITED_1
        try:
            close_all_but((status_write, *(fd for fd, _ in fds)))
            for number in (SIGCHLD, SIGPIPE, SIGXFSZ):
                reset_signal(number)
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in fds]
            status = os.waitpid(os.posix_spawn(argv[0], argv, os.environ, file_actions=actions), 0)[1]
        finally:
            os.write(status_write, b"%d" % status)
            os._exit(0)
    os.close(status_write)
    answer = os.read(status_read, _STATUS_MAX_BYTES)
    os.close(status_read)
    reap(child)
    return int(answer or _EXITED_1)
