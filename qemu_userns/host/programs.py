"""Run programs outside for QEMU, which has one end of a socket, and they the other."""

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socketpair

from qemu_userns.errors import ResourceError
from qemu_userns.host.scripts import describe_end, run_said
from qemu_userns.linux.process import SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGXFSZ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.grants import Passt

# What the supervisor ignores. A program that QEMU starts does not: QEMU has handlers of its own for the first three, and GLib
# gives SIGPIPE back. Whether the caller ignored SIGXFSZ cannot be told any more. All others are the caller's, as with QEMU's own.
_RESET = (SIGHUP, SIGINT, SIGTERM, SIGPIPE, SIGXFSZ)


def open_program(argv: "tuple[str, ...]") -> int:
    """Start a program with the caller's rights, the socket its stdin and stdout; return QEMU's end, which is owned.

    Should: run in a worker, at whose end the program is nobody's child.

    Raises:
        ResourceError: it cannot be executed.
    """
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), fd) for fd in (0, 1)]  # all others are close-on-exec
    try:
        os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_RESET)
    except OSError as err:
        ours.close()
        raise ResourceError(argv[0], f"cannot be executed: {err.strerror}") from err
    finally:
        theirs.close()
    return ours.detach()


def open_passt(grant: "Passt") -> int:
    """Start passt with the caller's rights, and wait until it serves; return QEMU's end of the socket, which is owned.

    What is started ends at once, and leaves the one in the background that serves, and that ends with the socket: passt(1), --fd.

    Raises:
        ResourceError: it cannot be executed, or fails.
    """
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    status, text = run_said(grant.argv, theirs.fileno())
    theirs.close()
    if status:
        ours.close()
        raise ResourceError(grant.why, f"passt failed: {text or describe_end(grant.argv, status)}")
    return ours.detach()
