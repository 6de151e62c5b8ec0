"""A seccomp filter for what Landlock and namespaces leave open: seccomp(2), through prctl(2).

It keeps QEMU from typing into the caller's terminal, which they share (TIOCSTI, as in bubblewrap CVE-2017-5226; TIOCLINUX
pastes). Where Landlock does not scope signals (before Linux 6.12) it also keeps those inside the process: it looks at the
target that a system call names, so it needs the pid of the process that will run under it, which execve keeps and fork
does not.
"""

import os
import struct
import sys

from qemu_userns.linux.syscall import call, find_function, pin

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000
_F_SETOWN, _F_SETOWN_EX = 8, 15

_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

# AUDIT_ARCH; kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, which name a process first; tkill; fcntl; ioctl
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (62, 234, 129, 297), 200, 72, 16),
    "aarch64": (0xC00000B7, (129, 131, 138, 240), 130, 25, 29),
    "riscv64": (0xC00000F3, (129, 131, 138, 240), 130, 25, 29),
    "loongarch64": (0xC0000102, (129, 131, 138, 240), 130, 25, 29),
    "ppc64le": (0xC0000015, (37, 250, 177, 322), 208, 55, 54),
    "s390x": (0x80000016, (37, 241, 178, 330), 237, 55, 54),
}
_PIDFD_SEND_SIGNAL = 424

_prctl = find_function("prctl", 5)


def knows_machine() -> bool:
    """Say whether the numbers of this machine's system calls are known."""
    return os.uname().machine in _ARCHITECTURES


def filter_calls(pid: "int | None") -> None:
    """Filter the system calls of this process and of what it becomes by execve.

    Should: be called after PR_SET_NO_NEW_PRIVS.
    Must not: be given a pid where the process forks before it runs (-daemonize): its child could not signal its own threads.

    Args:
        pid: the one process that signals may go to; None to leave signals alone.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    program = build_filter(os.uname().machine, pid, sys.byteorder == "little")
    memory = pin(program)
    call(_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HxxxxxxQ", len(program) // 8, memory.address), 0, 0)


def build_filter(machine: str, pid: "int | None", little_endian: bool = True) -> bytes:
    """Return the filter as an array of struct sock_filter. Pure."""
    architecture, *_, ioctl = _ARCHITECTURES[machine]
    low_half = _OFFSET_ARGUMENTS + (0 if little_endian else 4)  # of a 64-bit argument
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        lines += [(_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _EPERM)]
    if pid is not None:
        lines += _signal_rules(machine, pid, low_half)
    lines += _refuse_second_argument(ioctl, _TIOCSTI, _TIOCLINUX, low_half)
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _signal_rules(machine: str, pid: int, low_half: int) -> "list[tuple[int, int, int, int]]":
    """Return the rules for signals; F_SETOWN is one, as the kernel sends any signal to an fd's owner (fcntl(2), F_SETSIG)."""
    _, by_process, tkill, fcntl, _ = _ARCHITECTURES[machine]
    lines = []
    for number in (tkill, _PIDFD_SEND_SIGNAL):
        lines += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    for number in by_process:
        lines += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, low_half),
            (_JUMP_EQUAL, 0, 1, pid),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EPERM),
        ]
    return lines + _refuse_second_argument(fcntl, _F_SETOWN, _F_SETOWN_EX, low_half)


def _refuse_second_argument(number: int, first: int, second: int, low_half: int) -> "list[tuple[int, int, int, int]]":
    """Return rules that refuse a system call with one of two second arguments, and allow it otherwise."""
    return [
        (_JUMP_EQUAL, 0, 5, number),
        (_LOAD, 0, 0, low_half + 8),
        (_JUMP_EQUAL, 1, 0, first),
        (_JUMP_EQUAL, 0, 1, second),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
