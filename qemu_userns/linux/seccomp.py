"""A seccomp filter that keeps signals inside one process: seccomp(2), SECCOMP_SET_MODE_FILTER, through prctl(2).

For kernels whose Landlock does not scope signals (before Linux 6.12). It looks at the target that a system call names, so it
needs the pid of the process that will run under it, which execve keeps and fork does not.
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

# AUDIT_ARCH; kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, which name a process first; tkill; fcntl
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (62, 234, 129, 297), 200, 72),
    "aarch64": (0xC00000B7, (129, 131, 138, 240), 130, 25),
    "riscv64": (0xC00000F3, (129, 131, 138, 240), 130, 25),
    "loongarch64": (0xC0000102, (129, 131, 138, 240), 130, 25),
    "ppc64le": (0xC0000015, (37, 250, 177, 322), 208, 55),
    "s390x": (0x80000016, (37, 241, 178, 330), 237, 55),
}
_PIDFD_SEND_SIGNAL = 424

_prctl = find_function("prctl", 5)


def knows_machine() -> bool:
    """Say whether the numbers of this machine's system calls are known."""
    return os.uname().machine in _ARCHITECTURES


def confine_signals(pid: int) -> None:
    """Let this process, and what it becomes by execve, send signals to process `pid` alone.

    Should: be called after PR_SET_NO_NEW_PRIVS.
    Must not: be used where the process forks before it runs (-daemonize): its child could not signal its own threads.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    program = build_filter(os.uname().machine, pid, sys.byteorder == "little")
    memory = pin(program)
    call(_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HxxxxxxQ", len(program) // 8, memory.address), 0, 0)


def build_filter(machine: str, pid: int, little_endian: bool = True) -> bytes:
    """Return the filter as an array of struct sock_filter. Pure.

    F_SETOWN is in it because the owner of an fd can be sent any signal by the kernel (fcntl(2), F_SETSIG).
    """
    architecture, by_process, tkill, fcntl = _ARCHITECTURES[machine]
    first = _OFFSET_ARGUMENTS + (0 if little_endian else 4)  # the low half of a 64-bit argument
    second = first + 8
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        lines += [(_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _EPERM)]
    for number in (tkill, _PIDFD_SEND_SIGNAL):
        lines += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    for number in by_process:
        lines += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, first),
            (_JUMP_EQUAL, 0, 1, pid),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _EPERM),
        ]
    lines += [
        (_JUMP_EQUAL, 0, 4, fcntl),
        (_LOAD, 0, 0, second),
        (_JUMP_EQUAL, 1, 0, _F_SETOWN),
        (_JUMP_EQUAL, 0, 1, _F_SETOWN_EX),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
