"""The process beside the launcher: it works outside while the launcher plans, and after QEMU has ended.

Theory of operation. `fork_supervisor` starts it in a session of its own and with no fd of the caller. At once it makes the user
namespace and has its maps written, which takes newuidmap and newgidmap as long as the launcher needs to plan; then it answers
with the pid of the namespace's holder, and leaves the launcher's family by another fork. The launcher sends one message for
each file that it creates (`note`), says when it has joined, and sends COMMIT last before execve. If the pipe ends without
COMMIT, the launcher has died, and all those files are removed. After it the supervisor ends, unless files have to be removed
when QEMU ends: then it becomes a clean interpreter (main.py), so that nothing of the caller's command line is left in its own,
and waits for the same pipe to end, whose other end is QEMU's by then.
"""

import os
import sys

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.host.leftovers import Leftover, decode, encode, hold
from qemu_userns.host.usernamespace import Holder, open_namespace, write_maps
from qemu_userns.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from qemu_userns.plan.identity import Identity

READY = "ready"
JOINED, COMMIT = "joined", "commit"
_SIZE_BYTES = 65536


class Supervisor:
    """The launcher's end."""

    def __init__(self, request_fd: int, answer_fd: int, child: int, leased: bool) -> None:
        """Hold the pipes.

        Args:
            request_fd: taken over; passed on to QEMU when the supervisor stays, for QEMU's end to be seen.
            answer_fd: taken over.
            child: the supervisor's first process, which ends when the maps are written, to be reaped.
            leased: whether ids are leased, whose file goes at QEMU's end.
        """
        self.request_fd = request_fd
        self.stays = leased
        self._answer_fd = answer_fd
        self._child = child

    def open_namespaces(self) -> "tuple[int, ...]":
        """Wait for the namespaces and their maps; return owned fds of them, the user namespace first.

        Raises:
            HostError: user namespaces are forbidden; newuidmap or newgidmap is missing, or refuses.
            SandboxError: the kernel refuses the maps, or the supervisor has died.
        """
        answer = os.read(self._answer_fd, _SIZE_BYTES)
        if not answer:
            raise SandboxError("cannot make the user namespace", "the supervisor has died")
        kind, what, why, hint = os.fsdecode(answer).split("\0", 3)
        if kind != READY:
            raise (HostError if kind == "HostError" else SandboxError)(what, why, hint or None)
        namespaces = tuple(open_namespace(int(what), kind) for kind in ("user", "mnt", "ipc"))
        os.close(self._answer_fd)
        self._send(JOINED)
        return namespaces

    def note(self, leftover: Leftover) -> None:
        """Tell of a file that was created."""
        self.stays = self.stays or leftover.temporary
        self._send(encode(leftover))

    def commit(self) -> None:
        """Say that QEMU is about to run, and reap the supervisor's first process, which QEMU would never do."""
        self._send(COMMIT)
        process.reap(self._child)

    def _send(self, message: str) -> None:
        """Send a message; they end with a NUL."""
        os.write(self.request_fd, os.fsencode(f"{message}\0"))


def fork_supervisor(identity: "Identity", leased: bool) -> Supervisor:
    """Fork the supervisor.

    Should: be called with the caller's rights, as soon as the identity is known.
    Must not: leave it as a child of the process that becomes QEMU, which would never reap it.

    Args:
        identity: whose namespace it will make.
        leased: whether its ids are leased.

    Raises:
        SandboxError: no process can be had.
    """
    try:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        child = os.fork()
    except OSError as err:
        raise SandboxError("cannot fork the supervisor", err.strerror or str(err)) from err
    if child == 0:
        _run_child(request_read, answer_write, identity, leased)
    os.close(request_read)
    os.close(answer_write)
    return Supervisor(request_write, answer_read, child, leased)


def _run_child(request: int, answer: int, identity: "Identity", leased: bool) -> "NoReturn":
    """Serve the launcher, leave its family, and end; nothing of the launcher's own code runs in here any more."""
    try:
        os.setsid()
        for number in (process.SIGHUP, process.SIGINT, process.SIGTERM):
            # Who stops QEMU's whole control group still wants QEMU's files removed after it.
            process.ignore_signal(number)
        process.reset_signal(process.SIGCHLD)  # ignored, the exit status of newuidmap would be lost
        _leave_caller(request, answer)
        holder = _make_namespace(identity, answer)
        messages = _read_messages(request)
        leftovers = _take_notes(messages, leased)
        if holder is not None:
            holder.let_go()
        if os.fork() == 0:  # only now, while the launcher builds the view: it waits for the maps, and QEMU must have no child
            _wait_for_commit(messages, leftovers, leased)
            temporary = [item for item in leftovers if item.temporary]
            if temporary or leased:
                _become_clean(request, temporary, leased)
    finally:
        os._exit(0)


def _leave_caller(request: int, answer: int) -> None:
    """Close every fd of the caller, with the standard ones on /dev/null, and stand in "/"."""
    null = os.open("/dev/null", os.O_RDWR)
    kept = sorted((request, answer))
    for fd in {0, 1, 2}.difference(kept):
        os.dup2(null, fd)
    first = 3
    for fd in (*kept, process.FD_MAX):
        if first < fd:
            process.close_range(first, fd - 1, 0)
        first = max(first, fd + 1)
    os.chdir("/")


def _make_namespace(identity: "Identity", answer: int) -> "Holder | None":
    """Make the user namespace and answer; return its holder."""
    holder = None
    try:
        holder = Holder(identity)
        write_maps(holder.pid, identity)
        words = (READY, str(holder.pid), "", "")
    except (HostError, SandboxError) as err:
        words = (type(err).__name__, err.what, err.why, err.hint or "")
    try:
        os.write(answer, os.fsencode("\0".join(words)))
    except BrokenPipeError:
        pass  # the launcher has died, which the other pipe tells
    os.close(answer)
    return holder


def _take_notes(messages: "Iterator[str]", leased: bool) -> "list[Leftover]":
    """Return the files that the launcher creates before it joins the namespace; when it dies, remove them, and end."""
    leftovers: "list[Leftover]" = []
    for message in messages:
        if message == JOINED:
            return leftovers
        leftovers.append(decode(message))
    return _give_up(leftovers, leased)


def _wait_for_commit(messages: "Iterator[str]", leftovers: "list[Leftover]", leased: bool) -> None:
    """Wait for COMMIT; when the launcher dies without, remove what it created, and end. No other message counts any more."""
    if COMMIT not in messages:
        _give_up(leftovers, leased)


def _give_up(leftovers: "list[Leftover]", leased: bool) -> "NoReturn":
    """Remove what a launch that failed has created, and end."""
    from qemu_userns.supervisor.cleanup import clean_up

    clean_up(leftovers, leased)
    os._exit(0)


def _read_messages(request: int) -> "Iterator[str]":
    """Yield the messages of a pipe up to its end."""
    data = b""
    while True:
        chunk = os.read(request, _SIZE_BYTES)
        if not chunk:
            return
        *messages, data = (data + chunk).split(b"\0")
        for message in messages:
            yield os.fsdecode(message)


def _become_clean(request: int, leftovers: "list[Leftover]", leased: bool) -> None:
    """Execute main.py in a fresh interpreter; what it has to remove goes in by a memfd, not by its command line."""
    for item in leftovers:
        hold(item)
    state = os.memfd_create("qemu-userns-supervisor", 0)
    os.write(state, os.fsencode("".join(f"{encode(item)}\0" for item in leftovers)))
    os.set_inheritable(request, True)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
    words = ["qemu-userns-supervisor", "-I", "-S", script, str(request), str(state), "leased" if leased else "own"]
    os.execve(sys.executable, words, {"PATH": os.defpath})
