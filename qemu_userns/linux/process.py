"""What a process is and may: unshare(2), prctl(2), capset(2), close_range(2)."""

import os
import struct
import sys

from qemu_userns.linux.syscall import IntResult, call, find_function, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CLOSE_RANGE_CLOEXEC = 4
FD_MAX = 0xFFFFFFFF
_ARG_START = 48 - 3  # of /proc/PID/stat's fields, counted from 1, behind the name
_CAPABILITY_VERSION_3 = 0x20080522

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID = 0, 1, 3, 4
CAP_SYS_ADMIN = 21

_prctl = find_function("prctl", 5)
_capset = find_function("capset", 2)
_setns = find_function("setns", 2)
_unshare = find_function("unshare", 1)


def unshare(flags: int) -> None:
    """Move this process into new namespaces.

    Raises:
        OSError: EPERM when user namespaces are forbidden; ENOSPC when a limit of /proc/sys/user is reached.
    """
    if sys.version_info >= (3, 12):
        os.unshare(flags)
    else:
        # The same binding for Python 3.11, but for the exception that it raises.
        try:
            from unshare import unshare as unshare_before_312
        except ImportError:  # the supervisor runs without site-packages
            call(_unshare, flags)
            return
        try:
            unshare_before_312(flags)
        except RuntimeError as err:
            code = int(err.args[0])
            raise OSError(code, os.strerror(code)) from err


def setns(fd: int, nstype: int) -> None:
    """Join a namespace; the fd is borrowed."""
    call(_setns, fd, nstype)


def set_ids(uid: int, gid: int, groups: "tuple[int, ...]") -> None:
    """Set all groups, gids and uids of this process, for good."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def reap(pid: int) -> None:
    """Wait for a child, which the kernel reaps itself where the caller ignores SIGCHLD (waitpid(2), ECHILD)."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


def read_environ() -> "dict[str, str]":
    """Return the environment as execve gave it to this process: os.environ has LC_CTYPE added in the C locale (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:
        words = os.fsdecode(file.read()).split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def set_title(name: str, title: str) -> None:
    """Show another name and command line of this process, and no environment: proc(5), comm, cmdline, environ.

    A title that is longer than the command line was is cut.
    """
    with open("/proc/self/comm", "wb", buffering=0) as comm:
        comm.write(os.fsencode(name))
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[_ARG_START : _ARG_START + 4])
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for start, end, text in ((arg_start, arg_end, os.fsencode(title)), (env_start, env_end, b"")):
            memory.seek(start)
            memory.write(text[: end - start - 1].ljust(end - start, b"\0"))


def prctl(option: int, *arguments: int) -> int:
    """Make the call with integer arguments."""
    return call(_prctl, option, *arguments, *(0,) * (4 - len(arguments)))


def get_pdeathsig() -> int:
    """Return the signal that this process gets when its parent dies, 0 if none."""
    result = IntResult(0)
    prctl(PR_GET_PDEATHSIG, result.address)
    return int(result.value)


def capset(permitted: "frozenset[int]") -> None:
    """Make `permitted` the permitted and effective set, and the inheritable set empty."""
    mask = sum(1 << capability for capability in permitted)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    call(_capset, struct.pack("Ii", _CAPABILITY_VERSION_3, 0), struct.pack("6I", low, low, 0, high, high, 0))


def close_range(first: int, last: int, flags: int) -> None:
    """Close a range of fds, or with CLOSE_RANGE_CLOEXEC mark them close-on-exec (Linux 5.11)."""
    syscall(436, first, last, flags)


def close_all_but(kept: "Iterable[int]") -> None:
    """Close every fd but 0, 1, 2 and `kept`."""
    first = 3
    for fd in (*sorted(kept), FD_MAX):
        if first < fd:
            close_range(first, fd - 1, 0)
        first = max(first, fd + 1)


SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 1, 2, 9, 13, 15, 17, 25
_sigaction = find_function("sigaction", 3)
_SIG_IGN = 1
_SIZE_OF_SIGACTION = 256  # more than any architecture's; all zero is SIG_DFL without flags


def reset_signal(number: int) -> None:
    """Give a signal its default action: sigaction(2)."""
    call(_sigaction, number, bytes(_SIZE_OF_SIGACTION), None)


def ignore_signal(number: int) -> None:
    """Ignore a signal from now on, over execve too: sigaction(2)."""
    handler = struct.pack("P", _SIG_IGN)
    call(_sigaction, number, handler + bytes(_SIZE_OF_SIGACTION - len(handler)), None)


def pidfd_getpid(pidfd: int) -> int:
    """Return the pid of a process, -1 when it has ended and been waited for (pidfd_getpid(3), which glibc has since 2.39).

    Raises:
        OSError: EBADF, or /proc is not there.
    """
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return int(file.read().split(b"\nPid:", 1)[1].split(None, 1)[0])


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """Signal a process that cannot be mistaken for another one, as a pid can.

    Raises:
        OSError: ESRCH when it has ended and been waited for; EPERM when it is somebody else's.
    """
    syscall(424, pidfd, number, None, 0)
