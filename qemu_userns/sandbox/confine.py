"""Confine this process before it becomes QEMU: namespaces, privileges, Landlock, capabilities, fds."""

import errno
import os

from qemu_userns.errors import SandboxError
from qemu_userns.linux import landlock, process
from qemu_userns.linux.seccomp import filter_calls, leave_session_keyring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.plan.plan import Confinement


def confine(confinement: "Confinement", reopened_fds: "Iterable[int]") -> None:
    """Give up everything that QEMU shall not have.

    Should: run inside the view, with all capabilities in the namespace, as the last step but for the fds.
    Must not: go on when any part of it fails.

    Args:
        confinement: from the plan.
        reopened_fds: fds whose files QEMU may open again by /proc/self/fd/N although they lie outside the view; borrowed.

    Raises:
        SandboxError: a step failed.
    """
    try:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        if confinement.landlock_abi:
            _restrict_files(confinement.landlock_abi, confinement.scoped, reopened_fds)
        if confinement.filter_calls:
            if not confinement.keys:
                leave_session_keyring()
            filter_calls(os.getpid() if confinement.filter_signals else None, confinement.keys)
        _drop_capabilities(confinement.capabilities)
    except OSError as err:
        raise SandboxError("cannot confine QEMU", err.strerror or str(err)) from err


def pass_fds(kept: "Iterable[int]") -> None:
    """Mark every fd close-on-exec but 0, 1, 2 and `kept`.

    Raises:
        SandboxError: an fd of `kept` is not open, or the kernel has no close_range(2).
    """
    try:
        process.close_range(3, process.FD_MAX, process.CLOSE_RANGE_CLOEXEC)
        for fd in kept:
            os.set_inheritable(fd, True)
    except OSError as err:
        raise SandboxError("cannot pass file descriptors to QEMU", err.strerror or str(err)) from err


def _restrict_files(abi: int, scoped: int, reopened_fds: "Iterable[int]") -> None:
    """Let Landlock allow the view's root and nothing else; the walk crosses mounts upwards, so later binds are covered."""
    ruleset = landlock.landlock_create_ruleset(abi, scoped)
    # The other end of a new pseudo terminal is opened where /dev/ptmx lies, on the host's own mount of the same devpts.
    places = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in ("/", "/dev/pts") if os.path.exists(path)]
    try:
        for place in places:
            landlock.landlock_add_rule(ruleset, place, landlock.all_rights(abi))
        for fd in reopened_fds:
            _allow_fd(ruleset, fd, abi)
        landlock.landlock_restrict_self(ruleset)
    finally:
        for fd in (*places, ruleset):
            os.close(fd)


def _allow_fd(ruleset: int, fd: int, abi: int) -> None:
    """Allow the file of an fd; pipes, sockets and memfds need no rule and take none (EBADFD)."""
    try:
        landlock.landlock_add_rule(ruleset, fd, landlock.file_rights(abi, fd))
    except OSError as err:
        if err.errno != errno.EBADFD:
            raise


def _drop_capabilities(kept: "frozenset[int]") -> None:
    """Keep `kept` only. QEMU is uid 0 inside, so execve would give it the whole bounding set (capabilities(7))."""
    process.prctl(process.PR_CAP_AMBIENT, process.PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        if capability in kept:
            continue
        try:
            process.prctl(process.PR_CAPBSET_DROP, capability)
        except OSError as err:
            if err.errno == errno.EINVAL:  # past the last one that this kernel knows
                break
            raise
    process.capset(kept)
