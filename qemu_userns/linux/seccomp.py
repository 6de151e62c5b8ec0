"""A seccomp filter for what Landlock and namespaces leave open: seccomp(2), through prctl(2).

It keeps QEMU from the caller's keyrings; from limits and priorities of the caller's other processes, which Landlock's scope of
signals does not cover; and from typing into the terminal that they share (TIOCSTI, as in bubblewrap CVE-2017-5226; TIOCLINUX
pastes). Where Landlock does not scope signals (before Linux 6.12) it also keeps those inside the process: it looks at the
target that a system call names, so it needs the pid of the process that will run under it, which execve keeps and fork
does not.
"""

import os
import struct
import sys

from qemu_userns.linux.syscall import call, find_function, pin, syscall
from qemu_userns.record import Record

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_ZERO = 0x00050000  # the call does nothing and returns 0
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000
_F_SETOWN, _F_SETOWN_EX = 8, 15

_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902
_ARGUMENT_SIZE = 8


class _Machine(Record):
    """AUDIT_ARCH of a machine, and the numbers of its older system calls."""

    architecture: int
    by_process: "tuple[int, ...]"  # kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, which name a process first
    tkill: int
    fcntl: int
    ioctl: int
    prlimit64: int
    ioprio_set: int
    keys: "tuple[int, ...]"  # add_key, request_key, keyctl
    getgroups: int


_GENERIC = _Machine(0, (129, 131, 138, 240), 130, 25, 29, 261, 30, (217, 218, 219), 158)
_MACHINES = {
    "x86_64": _Machine(0xC000003E, (62, 234, 129, 297), 200, 72, 16, 302, 251, (248, 249, 250), 115),
    "aarch64": _GENERIC.replace(architecture=0xC00000B7),
    "riscv64": _GENERIC.replace(architecture=0xC00000F3),
    "loongarch64": _GENERIC.replace(architecture=0xC0000102),
    "ppc64le": _Machine(0xC0000015, (37, 250, 177, 322), 208, 55, 54, 325, 273, (269, 270, 271), 80),
    "s390x": _Machine(0x80000016, (37, 241, 178, 330), 237, 55, 54, 334, 282, (278, 279, 280), 205),
}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_ENOSYS = 38
_PIDFD_SEND_SIGNAL = 424

_prctl = find_function("prctl", 5)


def knows_machine() -> bool:
    """Say whether the numbers of this machine's system calls are known."""
    return os.uname().machine in _MACHINES


def leave_session_keyring() -> None:
    """Join a new, empty session keyring: keyctl(2), KEYCTL_JOIN_SESSION_KEYRING. Without keyrings in the kernel there is none.

    Raises:
        OSError: the quota of keys is used up.
    """
    try:
        syscall(_MACHINES[os.uname().machine].keys[-1], _KEYCTL_JOIN_SESSION_KEYRING, 0)
    except OSError as err:
        if err.errno != _ENOSYS:
            raise


def filter_calls(pid: "int | None", keys: bool) -> None:
    """Filter the system calls of this process and of what it becomes by execve.

    Should: be called after PR_SET_NO_NEW_PRIVS.
    Must not: be given a pid where the process forks before it runs (-daemonize): its child could not signal its own threads.

    Args:
        pid: the one process that signals may go to; None to leave signals alone.
        keys: whether it may use keyrings.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    _install(build_filter(os.uname().machine, pid, keys, sys.byteorder == "little"))


def hide_groups() -> None:
    """Have getgroups(2) say that there are no supplementary groups, to this process and to what it becomes by execve.

    For a program that would drop them, and ends because it cannot: where setgroups(2) is denied they stay (user_namespaces(7)).

    Should: be called after PR_SET_NO_NEW_PRIVS.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    numbers = _MACHINES[os.uname().machine]
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 0, 3, numbers.architecture),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_JUMP_EQUAL, 0, 1, numbers.getgroups),
        (_RETURN, 0, 0, _ZERO),
        (_RETURN, 0, 0, _ALLOW),
    ]
    _install(b"".join(struct.pack("HBBI", *line) for line in lines))


def _install(program: bytes) -> None:
    """Install a filter, an array of struct sock_filter."""
    memory = pin(program)
    call(_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HxxxxxxQ", len(program) // 8, memory.address), 0, 0)


def build_filter(machine: str, pid: "int | None", keys: bool, little_endian: bool = True) -> bytes:
    """Return the filter as an array of struct sock_filter. Pure."""
    numbers = _MACHINES[machine]
    low_half = _OFFSET_ARGUMENTS + (0 if little_endian else 4)  # of a 64-bit argument
    lines = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, numbers.architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        lines += [(_JUMP_GREATER_OR_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _EPERM)]
    refused = [numbers.ioprio_set, *(() if keys else numbers.keys)]
    ioctls = [_TIOCSTI, _TIOCLINUX]
    if pid is not None:
        refused += [numbers.tkill, _PIDFD_SEND_SIGNAL]
        ioctls += [_FIOSETOWN, _SIOCSPGRP]
        for number in numbers.by_process:
            lines += _only_with(number, low_half, pid)
        # The kernel sends any signal to an fd's owner (fcntl(2), F_SETSIG).
        lines += _never_with(numbers.fcntl, low_half + _ARGUMENT_SIZE, _F_SETOWN, _F_SETOWN_EX)
    lines += [line for number in refused for line in ((_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM))]
    lines += _only_with(numbers.prlimit64, low_half, 0)  # pid 0: the process itself
    lines += _never_with(numbers.ioctl, low_half + _ARGUMENT_SIZE, *ioctls)
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _only_with(number: int, offset: int, value: int) -> "list[tuple[int, int, int, int]]":
    """Return rules that allow a system call with one value of an argument."""
    return [
        (_JUMP_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, offset),
        (_JUMP_EQUAL, 0, 1, value),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
    ]


def _never_with(number: int, offset: int, *values: int) -> "list[tuple[int, int, int, int]]":
    """Return rules that refuse a system call with some values of an argument, and allow it otherwise."""
    checks = [line for value in values for line in ((_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _EPERM))]
    return [(_JUMP_EQUAL, 0, len(checks) + 2, number), (_LOAD, 0, 0, offset), *checks, (_RETURN, 0, 0, _ALLOW)]
