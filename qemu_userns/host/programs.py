"""Run a program outside for QEMU: it talks to the other end of the socket that is its stdin and stdout."""

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socketpair

from qemu_userns.errors import ResourceError
from qemu_userns.linux.process import reap

_CANNOT_EXECUTE = b"?"


def open_program(argv: "tuple[str, ...]") -> int:
    """Start a program with the caller's rights, as nobody's child, and return QEMU's end of the socket, which is owned.

    Raises:
        ResourceError: it cannot be executed.
    """
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    failed_read, failed_write = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            _execute(argv, theirs.fileno(), failed_write)
        os._exit(0)
    reap(child)
    theirs.close()
    os.close(failed_write)
    failed = os.read(failed_read, 1)  # its end is execve's, which closes it
    os.close(failed_read)
    if failed:
        raise ResourceError(argv[0], "cannot be executed")
    return ours.detach()


def _execute(argv: "tuple[str, ...]", stream: int, failed: int) -> None:
    """Become the program; all fds but the standard ones are close-on-exec."""
    os.setsid()
    os.dup2(stream, 0)
    os.dup2(stream, 1)
    try:
        os.execvp(argv[0], argv)
    except OSError:
        os.write(failed, _CANNOT_EXECUTE)
    os._exit(127)
