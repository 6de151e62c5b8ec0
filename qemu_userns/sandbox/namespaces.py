"""Become the outside identity and enter the new user and mount namespace.

Theory of operation. A root caller first gives up being root (`become`), so that the user namespace belongs to the id that
QEMU is outside; an unprivileged caller is that id already. Then `enter` unshares, and the maps are written: one single id
by this process itself (`map_self`), anything else by the supervisor, which stayed outside.
"""

import errno
import os

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.identity import Identity

_EPERM_HINT = (
    "allow unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 on Debian kernels before 12, "
    "kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile on Ubuntu; in a container, its seccomp profile"
)
_ENOSPC_HINT = "raise user.max_user_namespaces and user.max_mnt_namespaces with sysctl; 0 switches them off"


def become(identity: "Identity") -> None:
    """Switch from root to the outside identity.

    Should: run as root, after everything that needs root's rights was opened.
    Must not: keep a root id anywhere, or lose PR_SET_PDEATHSIG, which the kernel clears when a uid changes (prctl(2)).

    Raises:
        SandboxError: a uid, gid or group cannot be set.
    """
    signal, parent = process.get_pdeathsig(), os.getppid()
    try:
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
        # Not dumpable, this process's /proc/PID/uid_map would belong to root outside.
        process.prctl(process.PR_SET_DUMPABLE, 1)
        if signal:
            process.prctl(process.PR_SET_PDEATHSIG, signal)
            if os.getppid() != parent:  # it died while the signal was cleared
                os.kill(os.getpid(), signal)
    except OSError as err:
        raise SandboxError(f"cannot become {identity.uid}:{identity.gid}", err.strerror or str(err)) from err


def enter() -> None:
    """Unshare the user and the mount namespace.

    Should: run as the outside identity.
    Must not: be called with threads running (unshare(2), CLONE_NEWUSER).

    Raises:
        HostError: user namespaces are forbidden or used up here.
    """
    try:
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
    except OSError as err:
        hint = {errno.EPERM: _EPERM_HINT, errno.EACCES: _EPERM_HINT, errno.ENOSPC: _ENOSPC_HINT}.get(err.errno or 0)
        why = "limit reached" if err.errno == errno.ENOSPC else err.strerror or str(err)
        raise HostError("cannot make a user namespace", why, hint) from err
    try:
        # Forbidden before any gid map is written, also where newgidmap would leave it allowed: a process that can drop a
        # group can read what the group is denied (CVE-2014-8989). QEMU's groups are set already.
        _write("/proc/self/setgroups", "deny")
    except OSError as err:
        raise SandboxError("cannot forbid setgroups", err.strerror or str(err)) from err


def map_self(identity: "Identity") -> None:
    """Write the maps of a single id: user_namespaces(7) lets a process map its own ids.

    Raises:
        SandboxError: the kernel refuses.
    """
    try:
        _write("/proc/self/uid_map", f"0 {identity.uid} 1")
        _write("/proc/self/gid_map", f"0 {identity.gid} 1")
    except OSError as err:
        raise SandboxError("cannot map the caller's id", err.strerror or str(err)) from err


def limit_namespaces() -> None:
    """Forbid further namespaces inside: what a user namespace opens of the kernel is not for QEMU (namespaces(7)).

    Raises:
        SandboxError: /proc/sys/user cannot be written.
    """
    for kind in ("user", "mnt", "net"):
        path = f"/proc/sys/user/max_{kind}_namespaces"
        try:
            _write(path, "0")
        except OSError as err:
            raise SandboxError(
                "cannot forbid namespaces inside QEMU's", f"{path}: {err.strerror}", "make /proc/sys writable; containers often hide it"
            ) from err


def _write(path: str, text: str) -> None:
    """Write a kernel file in one write(2)."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
