"""The process beside the launcher: it works outside while the launcher plans, and beside QEMU afterwards.

Theory of operation. `fork_supervisor` starts it in a process group of its own and with no fd of the caller. At once it makes
QEMU's namespaces and has the id maps written, which takes newuidmap and newgidmap as long as the launcher needs to plan; then it
answers with the pid of the namespaces' holder, and leaves the launcher's family by another fork. Over a socket of messages the
launcher tells of each file that it creates (`note`), says when it is about to join the namespaces (`hand_over`), and sends COMMIT
last before execve. If the socket ends without COMMIT, the launcher has died, and if FAILED comes behind it, QEMU cannot be
executed: all those files are removed.

Where nothing is left to do once QEMU runs, the supervisor ends when execve has closed the socket. Else `hand_over` brings the
state of the VM and the fds to serve, and it goes on as life.py says, while the launcher builds the view. It executes nothing for
that: a fresh interpreter would take as long to start, and to import again what is here, as QEMU takes to greet. What /proc shows
of the caller's command line and environment is overwritten.
"""

import os
import sys

from qemu_userns.errors import HostError, SandboxError, describe_bug
from qemu_userns.host.leftovers import Downscript, Leftover, decode, encode
from qemu_userns.host.usernamespace import Holder, open_namespace, write_maps
from qemu_userns.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Iterable, Iterator
    from typing import NoReturn

    from qemu_userns.plan.identity import Identity

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY = "ready"
JOINED, COMMIT, FAILED = "joined", "commit", "failed"
_TOKEN_BYTES = 8
_SIZE_BYTES = 65536
_MOST_FDS = 253  # of one message: SCM_MAX_FD


class Supervisor:
    """The launcher's end."""

    def __init__(self, channel: "Socket", answer_fd: int, child: int) -> None:
        """Hold the channels.

        Args:
            channel: taken over; passed on to QEMU where the supervisor stays, for QEMU's end to be seen.
            answer_fd: taken over.
            child: the supervisor's first process, which ends when the maps are written, to be reaped.
        """
        self._channel = channel
        self._answer_fd = answer_fd
        self._child = child
        self._token = ""

    @property
    def channel_fd(self) -> int:
        """The channel, borrowed."""
        return self._channel.fileno()

    def open_namespaces(self) -> "tuple[int, ...]":
        """Wait for the namespaces and their maps; return owned fds of them, the user namespace first.

        Raises:
            HostError: user namespaces are forbidden; newuidmap or newgidmap is missing, or refuses.
            SandboxError: the kernel refuses the maps, or the supervisor has died.
        """
        answer = os.read(self._answer_fd, _SIZE_BYTES)
        if not answer:
            raise SandboxError("cannot make the user namespace", "the supervisor has died")
        kind, what, why, hint, rule = os.fsdecode(answer).split("\0", 4)
        if kind != READY:
            raise (HostError if kind == "HostError" else SandboxError)(what, why, hint or None, rule=rule or None)
        namespaces = tuple(open_namespace(int(what), kind) for kind in ("user", "mnt", "ipc"))
        os.close(self._answer_fd)
        return namespaces

    def note(self, item: "Leftover | Downscript", fd: "int | None" = None) -> None:
        """Tell of a file that was created, or of a script to run at the end.

        Args:
            item: what it is.
            fd: what has to stay open until then; borrowed.
        """
        self._send(encode(item), () if fd is None else (fd,))

    def hand_over(self, fds: "Iterable[int]", title: str = "") -> None:
        """Say that all is open, and that this process is about to join the namespaces.

        Args:
            fds: what the supervisor needs to stay: a memfd with the state of the VM, then what it serves (state.py); taken over.
                Empty where it shall end at COMMIT.
            title: what the supervisor's command line shall call the VM.

        Raises:
            SandboxError: they are too many.
        """
        given = tuple(fds)
        if len(given) > _MOST_FDS:
            raise SandboxError("cannot hand the monitors to the supervisor", f"they are more than {_MOST_FDS} sockets")
        self._send(f"{JOINED} {title}", given)
        for fd in given:
            os.close(fd)

    def commit(self) -> None:
        """Say that QEMU is about to run, and reap the supervisor's first process, which QEMU would never do."""
        self._token = os.urandom(_TOKEN_BYTES).hex()
        self._send(f"{COMMIT} {self._token}")
        process.reap(self._child)

    def fail(self) -> None:
        """Say that QEMU does not run after all: what was created goes; a supervisor that has died has taken nothing back.

        QEMU has the channel too, but not the token: it is gone with this process's memory.
        """
        try:
            self._send(f"{FAILED} {self._token}")
        except SandboxError:
            return

    def _send(self, message: str, fds: "tuple[int, ...]" = ()) -> None:
        """Send a message, and copies of fds.

        Raises:
            SandboxError: nobody is there to take it.
        """
        import _socket

        numbers = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        try:
            self._channel.sendmsg([os.fsencode(message)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)] if fds else [])
        except OSError as err:
            raise SandboxError("cannot talk to the supervisor", f"it has died: {err.strerror}") from err


def fork_supervisor(identity: "Identity", lease: str) -> Supervisor:
    """Fork the supervisor.

    Should: be called with the caller's rights, as soon as the identity is known.
    Must not: leave it as a child of the process that becomes QEMU, which would never reap it.

    Args:
        identity: whose namespaces it will make.
        lease: path of the lease of its ids, which goes when the launch fails; "" for none.

    Raises:
        SandboxError: no process can be had.
    """
    import _socket

    try:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        answer_read, answer_write = os.pipe()
        child = os.fork()
    except OSError as err:
        raise SandboxError("cannot fork the supervisor", err.strerror or str(err)) from err
    if child == 0:
        ours.close()
        _run_child(theirs, answer_write, identity, lease)
    theirs.close()
    os.close(answer_write)
    return Supervisor(ours, answer_read, child)


def _run_child(channel: "Socket", answer: int, identity: "Identity", lease: str) -> "NoReturn":
    """Serve the launcher, leave its family, and end; nothing of the launcher's own code runs in here any more."""
    try:
        launcher = os.pidfd_open(os.getppid())
        # Out of reach of who kills the caller's process group. A session, which it gets later, is a group of the scheduler's as
        # well, and moving there costs the launcher 2 ms of waiting for the namespaces.
        os.setpgid(0, 0)
        for number in (process.SIGHUP, process.SIGINT, process.SIGTERM):
            # Who stops QEMU's whole control group still wants QEMU's files removed after it.
            process.ignore_signal(number)
        process.reset_signal(process.SIGCHLD)  # ignored, the exit status of newuidmap would be lost
        errors = _copy_stderr()
        _leave_caller(channel.fileno(), answer, launcher, errors)
        holder = _make_namespaces(identity, answer)
        notes: "list[Leftover | Downscript]" = []
        joined = _take_notes(channel, notes)
        if joined is None:
            _give_up(notes, lease)
        title, fds = joined
        if holder is not None:
            holder.let_go()
        if os.fork() == 0:  # only now, while the launcher builds the view: it waits for the maps, and QEMU must have no child
            os.setsid()
            if not (_stay(title, channel.fileno(), launcher, fds, errors) if fds else _wait_for_execve(channel)):
                _give_up(notes, lease)
    finally:
        os._exit(0)


def _copy_stderr() -> int:
    """Return an owned fd of the caller's stderr, -1 if there is none."""
    try:
        return os.dup(2)
    except OSError:
        return -1


def _wait_for_execve(channel: "Socket") -> bool:
    """Wait until the launcher is QEMU, which closes the channel; return False if it has failed."""
    said = os.fsdecode(channel.recv(_SIZE_BYTES))
    return said.startswith(COMMIT) and not channel.recv(_SIZE_BYTES)


def _leave_caller(*own: int) -> None:
    """Close every fd of the caller, with the standard ones on /dev/null, and stand in "/"."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in {0, 1, 2}.difference(own):
        os.dup2(null, fd)
    process.close_all_but(own)
    os.chdir("/")


def _make_namespaces(identity: "Identity", answer: int) -> "Holder | None":
    """Make the namespaces and answer; return their holder."""
    holder = None
    try:
        holder = Holder(identity)
        write_maps(holder.pid, identity)
        words = (READY, str(holder.pid), "", "", "")
    except (HostError, SandboxError) as err:
        words = (type(err).__name__, err.what, err.why, err.hint or "", err.find_rule() or "")
    try:
        os.write(answer, os.fsencode("\0".join(words)))
    except BrokenPipeError:
        pass  # the launcher has died, which the other pipe tells
    os.close(answer)
    return holder


def _take_notes(channel: "Socket", notes: "list[Leftover | Downscript]") -> "tuple[str, list[int]] | None":
    """Collect what the launcher tells of before it joins; return what it then hands over, None when it dies first.

    The fds that come with a note stay open for good: without them, a tap could be gone before its script runs.
    """
    for message, fds in _read_messages(channel):
        kind, _, title = message.partition(" ")
        if kind == JOINED:
            return title, fds
        notes.append(decode(message))
    return None


def _give_up(notes: "list[Leftover | Downscript]", lease: str) -> "NoReturn":
    """Take back what a launch that failed has done, and end."""
    from qemu_userns.supervisor.cleanup import clean_up

    leftovers = [item for item in notes if isinstance(item, Leftover)]
    clean_up(leftovers, [item for item in notes if isinstance(item, Downscript)], lease)
    os._exit(0)


def _read_messages(channel: "Socket") -> "Iterator[tuple[str, list[int]]]":
    """Yield the messages of a socket up to its end, each with the fds that came with it, which are owned."""
    import _socket

    while True:
        data, ancillary, _, _ = channel.recvmsg(_SIZE_BYTES, _socket.CMSG_SPACE(4 * _MOST_FDS), _socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        numbers = b"".join(item for level, kind, item in ancillary if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS))
        yield os.fsdecode(data), [int.from_bytes(numbers[i : i + 4], sys.byteorder) for i in range(0, len(numbers), 4)]


def show(title: str) -> None:
    """Show this process as the supervisor of a VM."""
    process.set_title("qemu-userns-sup", f"qemu-userns-supervisor: {title}")  # a name has 15 bytes


def _stay(title: str, channel: int, launcher: int, fds: "list[int]", errors: int) -> bool:
    """Be the supervisor of the VM that is handed over, until it ends; takes over the fds.

    A VM that nobody could serve, and whose files nobody would remove, is ended before it has begun: then this returns False. The
    launcher does not wait for that: it takes as long as half of a launch. One that daemonizes by then leaves a child, which ends
    when it cannot say any more that it is ready (QEMU's os_setup_post).
    """
    show(title)
    os.environ.clear()
    os.environ["PATH"] = STANDARD_PATH  # for what it runs (host/programs.py, host/scripts.py)
    try:
        from qemu_userns.supervisor.life import begin, hold_code, run

        vm = begin(channel, launcher, *fds)
    except Exception as err:  # whatever it is, nobody else would tell
        _end_launch(launcher, errors, f"qemu-userns: the supervisor cannot begin: {describe_bug(err)}\n")
        return False
    if errors >= 0:
        os.close(errors)
    hold_code()
    run(*vm)
    return True


def _end_launch(launcher: int, errors: int, why: str) -> None:
    """Kill the launcher, or the QEMU that it is by now, and tell the caller, whether or not either is there."""
    try:
        process.pidfd_send_signal(launcher, process.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        os.write(errors, why.encode(errors="backslashreplace"))
    except OSError:
        return
