"""Start a virtiofsd for a share, beside QEMU and confined as it is.

Theory of operation. The launcher forks, before it becomes QEMU, a process that joins QEMU's user namespace and makes mount, pid,
network and IPC namespaces of its own there. So the ids of virtiofsd are those of QEMU, its view holds programs and the share, it
sees and signals nobody, and the capabilities that it keeps, to act for any user of the guest, reach no further than mapped ids.

QEMU gets the connected end of its socket. However QEMU ends, the kernel closes that, and virtiofsd ends; the supervisor kills one
that does not. Nobody else can connect: the socket has no name, and virtiofsd takes one connection.
"""

import fcntl
import os
import select
import struct

from qemu_userns.errors import HostError, QemuUsernsError, SandboxError
from qemu_userns.host.opening import Opened, open_sources
from qemu_userns.host.sockets import connect_pair
from qemu_userns.linux import process
from qemu_userns.linux.seccomp import hide_groups, knows_machine
from qemu_userns.plan.facts import LANDLOCK_ABI_WITH_SCOPES
from qemu_userns.plan.grants import Virtiofsd
from qemu_userns.plan.virtiofs import ROOT, build_argv, build_view
from qemu_userns.sandbox import view
from qemu_userns.sandbox.confine import confine, pass_fds
from qemu_userns.sandbox.namespaces import become, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qemu_userns.plan.plan import Plan

# chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap: to act for users of the guest. setpcap, sys_chroot: to
# confine itself further, which drops these two.
_CAPABILITIES = frozenset((0, 1, 3, 4, 6, 7, 8, 18, 27, 31))
_ALL_SCOPES = 3
_LISTENING = 3  # its fd
_SAID_BYTES = 1 << 16
_READY_S = 30
_GET_FEATURES = struct.pack("=III", 1, 1, 0)  # VHOST_USER_GET_FEATURES, version 1, no payload
_ANSWER_BYTES = 20


def start_daemons(plan: "Plan", namespaces: "tuple[int, ...]", lease_fd: "int | None", opened: Opened) -> None:
    """Start every virtiofsd of a plan, and wait until each answers.

    Should: run with the caller's rights, root's if it is root, before the launcher joins the namespaces and forbids others.
    Must not: leave a child behind that QEMU would have to reap.

    Args:
        plan: what to start.
        namespaces: QEMU's, the user namespace first; borrowed.
        lease_fd: the lock of the leased ids, which each keeps as well; borrowed, None without a lease.
        opened: gets QEMU's ends; and, for the supervisor, a pidfd of each and a memfd with what it said.

    Raises:
        HostError: a virtiofsd ended, or does not answer.
        SandboxError: it cannot be confined.
    """
    for grant in plan.grants:
        if isinstance(grant, Virtiofsd):
            _start(grant, plan, namespaces, lease_fd, opened)


def _start(grant: Virtiofsd, plan: "Plan", namespaces: "tuple[int, ...]", lease_fd: "int | None", opened: Opened) -> None:
    """Start one."""
    listening, connected = connect_pair()
    said = _make_log()
    own = Opened(build_view(grant, plan.grants), lambda *_: None)
    own.places[ROOT] = grant.path
    if plan.identity.switch:
        open_sources(plan.identity, own)
    pid_read, pid_write = os.pipe()
    hold_read, hold = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        _run_parent(plan, namespaces, own, build_argv(grant, _LISTENING), (listening, lease_fd, said), pid_write, hold_read)
    for fd in (listening, pid_write, hold_read, *own.sources.values()):
        os.close(fd)
    answer = os.read(pid_read, 16)
    pidfd = os.pidfd_open(int(answer)) if answer else -1
    os.close(hold)
    os.close(pid_read)
    process.reap(child)
    if pidfd < 0 or not _answers(connected, pidfd):
        words = read_said(said) or "it ends at once, and says nothing"
        raise HostError(f"{grant.why}: {grant.program}", words, "use driver=9p for this share")
    opened.take(connected, grant.number)
    opened.served += [pidfd, said]


def read_said(fd: int) -> str:
    """Return the last line of what a virtiofsd said."""
    lines = os.pread(fd, _SAID_BYTES, 0).rstrip(b"\0").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _make_log() -> int:
    """Return an owned fd of a memfd that can take so much and no more: a guest may have a virtiofsd say much."""
    fd = os.memfd_create("qemu-userns-virtiofsd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _SAID_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _answers(connected: int, pidfd: int) -> bool:
    """Say whether a virtiofsd answers; it does nothing for QEMU's own first question but answer it the same way."""
    os.write(connected, _GET_FEATURES)
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    answer = b""
    while len(answer) < _ANSWER_BYTES:  # head and payload come one by one
        happened = [fd for fd, _ in poll.poll(_READY_S * 1000)]
        data = _read(connected, _ANSWER_BYTES - len(answer)) if connected in happened else b""
        if not data:
            return False
        answer += data
    return True


def _read(connected: int, size: int) -> bytes:
    """Return a part of an answer, b"" at the end."""
    try:
        return os.read(connected, size)
    except ConnectionResetError:
        return b""


def _run_parent(
    plan: "Plan",
    namespaces: "tuple[int, ...]",
    own: Opened,
    argv: "tuple[str, ...]",
    kept: "tuple[int, int | None, int]",
    pid_write: int,
    hold: int,
) -> "NoReturn":
    """Make the namespaces, fork the first process of the pid namespace, tell its pid, and wait until that is known."""
    try:
        os.setsid()  # what the caller's terminal sends is for QEMU, whose end is this one's
        if plan.identity.switch:
            become(plan.identity.replace(groups=()))
        join(namespaces)
        process.unshare(process.CLONE_NEWNS | process.CLONE_NEWPID | process.CLONE_NEWNET | process.CLONE_NEWIPC)
        pid = os.fork()
        if pid == 0:
            _become_virtiofsd(plan, own, argv, *kept)
        os.write(pid_write, str(pid).encode())
        os.read(hold, 1)
    except (QemuUsernsError, OSError) as err:
        os.write(kept[2], f"{err}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _become_virtiofsd(
    plan: "Plan", own: Opened, argv: "tuple[str, ...]", listening: int, lease_fd: "int | None", said: int
) -> "NoReturn":
    """Build the view, confine this process, and become virtiofsd."""
    try:
        view.build_view(own, "/")
        _raise_fd_limit()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        lease = -1 if lease_fd is None else fcntl.fcntl(lease_fd, fcntl.F_DUPFD_CLOEXEC, 64)
        high = fcntl.fcntl(listening, fcntl.F_DUPFD_CLOEXEC, 64)
        for source, target in ((null, 0), (said, 1), (said, 2), (high, _LISTENING)):
            os.dup2(source, target)
        confinement = plan.confinement.replace(
            capabilities=_CAPABILITIES,
            scoped=_ALL_SCOPES if plan.confinement.landlock_abi >= LANDLOCK_ABI_WITH_SCOPES else 0,
            filter_signals=False,
            keys=False,
        )
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        if os.getgroups() and knows_machine():
            hide_groups()
        confine(confinement, ())
        pass_fds((_LISTENING,) if lease < 0 else (_LISTENING, lease))
        for number in (process.SIGPIPE, process.SIGXFSZ):
            process.reset_signal(number)
        os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    except (QemuUsernsError, OSError) as err:
        os.write(said, f"{err}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(1)


def _raise_fd_limit() -> None:
    """Allow as many open files as this process may have: a virtiofsd holds one for each that the guest knows of."""
    import resource

    try:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except OSError as err:
        raise SandboxError("cannot raise RLIMIT_NOFILE", err.strerror or str(err)) from err
