"""Become the outside identity, and join the namespaces that were made for QEMU."""

import os

from qemu_userns.errors import SandboxError
from qemu_userns.linux import mount, process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.identity import Identity


def become(identity: "Identity") -> None:
    """Switch from root to the outside identity.

    Should: run as root, after everything that needs root's rights was opened.
    Must not: keep a root id anywhere; lose PR_SET_PDEATHSIG, which the kernel clears when a uid changes (prctl(2)); or become
        dumpable again before execve: other processes of that id could take what was opened as root (CVE-2026-41163).

    Raises:
        SandboxError: a uid, gid or group cannot be set.
    """
    signal, parent = process.get_pdeathsig(), os.getppid()
    try:
        process.set_ids(identity.uid, identity.gid, identity.groups)
        if signal:
            process.prctl(process.PR_SET_PDEATHSIG, signal)
            if os.getppid() != parent:  # it died while the signal was cleared
                os.kill(os.getpid(), signal)
    except OSError as err:
        raise SandboxError(
            f"cannot become {identity.uid}:{identity.gid}", err.strerror or str(err), rule="capability setuid, capability setgid,"
        ) from err


def join(namespaces: "tuple[int, ...]") -> None:
    """Join the user namespace, and the mount and the IPC namespace that it owns.

    Should: run as the id that owns the user namespace, which has every capability in it (user_namespaces(7), "Capabilities").
    Must not: be called with threads running (setns(2), CLONE_NEWUSER).

    Args:
        namespaces: fds, the user namespace's first; takes ownership.

    Raises:
        SandboxError: the kernel refuses.
    """
    try:
        for fd in namespaces:
            process.setns(fd, 0)
            os.close(fd)
    except OSError as err:
        rule = "capability sys_admin, capability sys_chroot,"
        raise SandboxError("cannot enter QEMU's namespaces", err.strerror or str(err), rule=rule) from err


def leave_network() -> None:
    """Move into a network namespace of QEMU's own, which has nothing but a loopback device that is down.

    Raises:
        SandboxError: the kernel refuses.
    """
    try:
        process.unshare(process.CLONE_NEWNET)
    except OSError as err:
        raise SandboxError("cannot leave the caller's network", err.strerror or str(err), rule="capability sys_admin,") from err


class NamespaceLimits:
    """The limits of further namespaces inside: what a user namespace opens of the kernel is not for QEMU (namespaces(7)).

    They are opened while /proc can be written, since the view shows it read-only, and set to zero once the view is built,
    since each detached mount is a mount namespace to the kernel.
    """

    def __init__(self) -> None:
        """Open them; must be called in the new user namespace, whose limits they are.

        Raises:
            SandboxError: /proc/sys/user cannot be written.
        """
        try:
            # On a copy of the mount, since a mount that is open for writing could not become read-only.
            proc = mount.open_tree(mount.AT_FDCWD, "/proc", mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE)
            self._fds = [
                os.open(f"sys/user/max_{kind}_namespaces", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
                for kind in ("user", "mnt", "net")
            ]
            os.close(proc)
        except OSError as err:
            hint = "make /proc/sys writable; containers often hide it"
            raise SandboxError(
                "cannot forbid namespaces inside QEMU's",
                f"/proc/sys/user: {err.strerror}",
                hint,
                rule="capability sys_resource,",
            ) from err

    def forbid_all(self) -> None:
        """Set them to zero, and close them.

        Raises:
            SandboxError: the kernel refuses.
        """
        for fd in self._fds:
            try:
                os.write(fd, b"0")
            except OSError as err:
                raise SandboxError("cannot forbid namespaces inside QEMU's", err.strerror or str(err)) from err
            os.close(fd)
