"""Users of the host, and who the caller is."""

import os
import pwd

from qemu_userns.errors import HostError
from qemu_userns.plan.facts import Account, Caller


def look_at_caller() -> Caller:
    """Return who starts QEMU, from where, and with which fds."""
    umask = os.umask(0)
    os.umask(umask)
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        cwd = "/"
    uid, gid = os.geteuid(), os.getegid()
    account = Account(_find_name(uid), uid, gid, tuple(os.getgroups()))
    return Caller(account, uid == 0, cwd, umask, os.sysconf("SC_OPEN_MAX"), find_open_fds())


def find_open_fds() -> "frozenset[int]":
    """Return the fds that this process inherited: those without close-on-exec."""
    return frozenset(fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inherited(fd))


def find_account(text: str) -> Account:
    """Look up the user of -runas or -run-with user=: a name, or UID:GID.

    Returns:
        The account, with the groups that QEMU's initgroups(3) would set: those of the group database, or none for UID:GID.

    Raises:
        HostError: there is no such user, or it is root.
    """
    uid, colon, gid = text.partition(":")
    if colon and uid.isdecimal() and gid.isdecimal():
        account = Account(_find_name(int(uid)), int(uid), int(gid), (int(gid),))
    else:
        try:
            entry = pwd.getpwnam(text)
        except KeyError:
            raise HostError(
                f"user {text}", "there is no such user", "name one that `getent passwd` lists, or give UID:GID"
            ) from None
        account = Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    if account.uid == 0 or account.gid == 0:
        raise HostError(f"user {text}", "QEMU never runs as host root", "name an ordinary user, or leave the option out")
    return account


def _find_name(uid: int) -> str:
    """Return the name of a uid, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_inherited(fd: int) -> bool:
    """Say whether an fd is open and survives execve."""
    try:
        return os.get_inheritable(fd)
    except OSError:  # the directory's own fd, closed by now
        return False
