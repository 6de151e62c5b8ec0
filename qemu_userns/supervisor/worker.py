"""Do in a child what may take long or changes a process for good: opening on a dead NFS must not stop the monitors."""

import os
import signal
import sys
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socketpair,
)

from qemu_userns.errors import QemuUsernsError, describe_bug
from qemu_userns.linux.process import close_all_but
from qemu_userns.supervisor.poller import IN
from qemu_userns.supervisor.state import read_memory, write_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from qemu_userns.record import Plain
    from qemu_userns.supervisor.poller import Poller

    Tell = Callable[[Plain, Sequence[int]], None]
    Work = Callable[[Tell], tuple[Plain, list[int]]]
    Hear = Callable[[object, tuple[int, ...]], None]

_MOST_FDS = 253  # of one message: SCM_MAX_FD
_TOLD, _DONE, _FAILED = b"+", b"=", b"!"  # what a message is


class Failed:
    """What a worker answers when its work fails."""

    def __init__(self, text: str) -> None:
        """Keep the reason."""
        self.text = text


def start_worker(
    poller: "Poller",
    work: "Work",
    done: "Hear",
    timeout_s: float,
    kept: "tuple[int, ...]" = (),
    told: "Hear | None" = None,
) -> None:
    """Fork a child that works.

    Args:
        poller: calls back.
        work: runs in the child, and is given a function that tells something at once, with fds that it borrows: it reaches us
            even if the child is killed next. Returns what marshal takes, and fds.
        done: called here, later, with that and owned fds; or with `Failed`.
        timeout_s: after which the child is killed.
        kept: fds that it needs. No other stays open in it: a client or a path that the supervisor lets go of must not live on
            in a worker that takes long.
        told: called here, before `done`, with each thing that is told and owned fds; only where nothing is told it may be None.
    """
    ends: "tuple[Socket, ...]" = ()
    try:
        ours, theirs = ends = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        pid = os.fork()
    except OSError as err:
        for end in ends:
            end.close()
        failed = Failed(f"no process can be had for it: {err.strerror}")
        poller.call_later(0, lambda: done(failed, ()))
        return
    if pid == 0:
        _run_child(theirs, work, kept)
    theirs.close()
    poller.children.append(pid)
    over = False

    def hear(_: int) -> None:
        nonlocal over
        kind, said, fds = _read_message(ours)
        if kind == _TOLD and told is not None:
            told(said, fds)
            return
        over = True
        poller.unwatch(ours.fileno())
        ours.close()
        os.waitpid(pid, 0)
        done(said if kind == _DONE else Failed(str(said)), fds)

    def expire() -> None:
        if not over:
            os.kill(pid, signal.SIGKILL)  # its end is heard

    poller.watch(ours.fileno(), IN, hear)
    poller.call_later(timeout_s, expire)


def _run_child(channel: "Socket", work: "Work", kept: "tuple[int, ...]") -> "NoReturn":
    """Work, answer and end; where nobody listens any more too, lest a second supervisor goes on in here."""
    try:
        try:
            close_all_but((channel.fileno(), *kept))
            _work(channel, work)
        finally:
            _report_bug(channel)
    finally:
        os._exit(0)


def _work(channel: "Socket", work: "Work") -> None:
    """Work, and answer."""
    try:
        result, fds = work(lambda said, fds: _say(channel, _TOLD, said, fds))
    except QemuUsernsError as err:
        _say(channel, _FAILED, f"{err.what}: {err.why}" + (f" ({err.hint})" if err.hint else ""))
    except OSError as err:
        _say(channel, _FAILED, f"{err.filename or 'system call'}: {err.strerror or err}")
    else:
        _say(channel, _DONE, result, fds)


def _report_bug(channel: "Socket") -> None:
    """Answer with what nobody expected, if that is how the work ends."""
    error = sys.exc_info()[1]
    if error is not None:
        _say(channel, _FAILED, describe_bug(error))


def _say(channel: "Socket", kind: bytes, said: "Plain", fds: "Sequence[int]" = ()) -> None:
    """Send something and fds; it goes in a memfd, since a message has a limit, and a command of a client's hardly any."""
    memory = write_memory(said)
    numbers = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (memory, *fds))
    channel.sendmsg([kind], [(SOL_SOCKET, SCM_RIGHTS, numbers)])
    os.close(memory)


def _read_message(channel: "Socket") -> "tuple[bytes, object, tuple[int, ...]]":
    """Return what a message of a worker's is, says and brings; it is our own child, but it may be dead."""
    data, ancillary, flags, _ = channel.recvmsg(1, CMSG_SPACE(4 * _MOST_FDS), MSG_CMSG_CLOEXEC)
    numbers = b"".join(item for level, kind, item in ancillary if (level, kind) == (SOL_SOCKET, SCM_RIGHTS))
    fds = tuple(int.from_bytes(numbers[i : i + 4], sys.byteorder) for i in range(0, len(numbers), 4))
    if flags & MSG_CTRUNC or not data:
        for fd in fds:
            os.close(fd)
        return _FAILED, "too many files are open" if data else "it was given up, or took too long", ()
    return data, read_memory(fds[0]), fds[1:]
