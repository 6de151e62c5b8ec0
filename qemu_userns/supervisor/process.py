"""The process beside the launcher: forked before the namespaces, it does from outside what cannot be done inside.

Theory of operation. `fork_supervisor` leaves a grandchild of the launcher in a session of its own, with no fd of the caller.
Two pipes join them. The launcher's byte MAP asks for the id maps and the idmapped mounts and is answered; its byte COMMIT,
sent last before execve, says that the launch has succeeded. If the pipe ends without it, the launcher has died, and every
file that the launch created is removed again. After COMMIT the supervisor ends, unless files have to be removed when
QEMU ends: then it becomes a clean interpreter (main.py), so that nothing of the caller's command line is left in
its own, and waits for the same pipe to end, whose other end is QEMU's by then.
"""

import os
import sys

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.linux import process
from qemu_userns.record import Record
from qemu_userns.supervisor.cleanup import clean_up
from qemu_userns.supervisor.idmaps import map_mount, write_maps
from qemu_userns.host.leftovers import Leftover, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from qemu_userns.plan.identity import Identity

MAP = b"m"
COMMIT = b"c"
_ANSWER_SIZE_BYTES = 65536


class Supervisor(Record):
    """The launcher's end of the pipes."""

    request_fd: int  # owned; passed on to QEMU when `waits`, for its end to be seen
    answer_fd: int  # owned
    waits: bool  # whether the supervisor stays until QEMU has ended

    def write_maps(self) -> None:
        """Have the id maps and idmapped mounts made.

        Should: be called inside the new user namespace, before it is used.

        Raises:
            HostError: newuidmap or newgidmap is missing, or does not allow the ranges.
            SandboxError: the kernel refuses, or the supervisor has died.
        """
        os.write(self.request_fd, MAP)
        answer = os.read(self.answer_fd, _ANSWER_SIZE_BYTES)
        if answer == MAP:
            return
        if not answer:
            raise SandboxError("cannot write the id maps", "the supervisor has died")
        kind, what, why, hint = os.fsdecode(answer).split("\0", 3)
        raise (HostError if kind == "HostError" else SandboxError)(what, why, hint or None)

    def commit(self) -> None:
        """Say that QEMU is about to run."""
        os.write(self.request_fd, COMMIT)


class IdmappedMount(Record):
    """A detached mount that shall show its owner as QEMU's id."""

    fd: int
    owner: "tuple[int, int]"
    path: str


def fork_supervisor(
    identity: "Identity", mounts: "Sequence[IdmappedMount]", leftovers: "Sequence[Leftover]", leased: bool
) -> Supervisor:
    """Fork the supervisor.

    Should: be called with the caller's rights, before the identity is switched and anything is unshared.
    Must not: leave it as a child of the process that becomes QEMU, which would never reap it.

    Args:
        identity: whose maps it will write.
        mounts: detached mounts that it will idmap; their fds are borrowed.
        leftovers: files that this launch has created.
        leased: whether it holds leased ids, whose file goes at QEMU's end.

    Returns:
        The launcher's end; its fds are owned.

    Raises:
        SandboxError: no process can be had.
    """
    try:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        launcher = os.getpid()
        child = os.fork()
    except OSError as err:
        raise SandboxError("cannot fork the supervisor", err.strerror or str(err)) from err
    if child == 0:
        _run_child(_Duty(launcher, request_read, answer_write, identity, tuple(mounts), tuple(leftovers), leased))
    os.close(request_read)
    os.close(answer_write)
    os.waitpid(child, 0)
    return Supervisor(request_write, answer_read, leased or any(item.temporary for item in leftovers))


class _Duty(Record):
    """What the supervisor is there for."""

    launcher: int
    request_fd: int
    answer_fd: int
    identity: "Identity"
    mounts: "tuple[IdmappedMount, ...]"
    leftovers: "tuple[Leftover, ...]"
    leased: bool


def _run_child(duty: _Duty) -> "NoReturn":
    """Leave the launcher's family, serve it, and end; nothing of the launcher's own code runs in here any more."""
    status = 1
    try:
        os.setsid()
        if os.fork() == 0:
            _leave_caller({duty.request_fd, duty.answer_fd, *(item.fd for item in duty.mounts)})
            _serve(duty)
        status = 0
    finally:
        os._exit(status)


def _leave_caller(kept: "set[int]") -> None:
    """Close every fd of the caller but `kept`, with the standard ones on /dev/null, and stand in "/"."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        if fd not in kept:
            os.dup2(null, fd)
    first = 3
    for fd in sorted(kept | {process.FD_MAX}):
        if first < fd:
            process.close_range(first, fd - 1, 0)
        first = max(first, fd + 1)
    os.chdir("/")


def _serve(duty: _Duty) -> None:
    """Do what the launcher asks for, up to its COMMIT or its death."""
    message = os.read(duty.request_fd, 1)
    while message == MAP:
        os.write(duty.answer_fd, _map(duty))
        message = os.read(duty.request_fd, 1)
    if message != COMMIT:
        clean_up(duty.leftovers, duty.leased)
    elif duty.leased or any(item.temporary for item in duty.leftovers):
        _become_clean(duty)


def _map(duty: _Duty) -> bytes:
    """Write the maps and idmap the mounts; return the answer for the launcher."""
    identity = duty.identity
    try:
        write_maps(duty.launcher, identity)
        for item in duty.mounts:
            map_mount(item.fd, item.owner, (identity.uid, identity.gid), item.path)
    except (HostError, SandboxError) as err:
        return os.fsencode("\0".join((type(err).__name__, err.what, err.why, err.hint or "")))
    return MAP


def _become_clean(duty: _Duty) -> None:
    """Execute main.py in a fresh interpreter; what it has to remove goes in by a memfd, not by its command line."""
    state = os.memfd_create("qemu-userns-supervisor", 0)
    os.write(state, encode(duty.leftovers))
    os.set_inheritable(duty.request_fd, True)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
    words = ["qemu-userns-supervisor", "-I", "-S", script, str(duty.request_fd), str(state), "leased" if duty.leased else "own"]
    os.execve(sys.executable, words, {"PATH": os.defpath})
