"""Make user namespaces with maps: for QEMU to join, and for idmapped mounts (idmap.py).

Theory of operation. A user namespace needs a process to be born in. That is the holder, a child that unshares, says so, and
waits to be let go; meanwhile its maps are written from outside, and whoever opens /proc/HOLDER/ns/user keeps the namespace.

The holder for QEMU takes a mount and an IPC namespace along: copying the host's mounts costs the more the more there are, and
so it happens beside the launcher, not in it.
"""

import os

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.linux import mount, process
from qemu_userns.plan.identity import NEWIDMAP, MapEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.plan.identity import Identity

_EPERM, _EACCES, _ENOSPC, _EINVAL = 1, 13, 28, 22
_EPERM_HINT = (
    "allow unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 on older Debian kernels, "
    "kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile on Ubuntu; in a container, its seccomp profile"
)
_MAP_RULE = "@{PROC}/@{pid}/{uid_map,gid_map,setgroups} rw,"
_ENOSPC_HINT = (
    "raise user.max_user_namespaces, user.max_mnt_namespaces or user.max_ipc_namespaces with sysctl; 0 switches them off"
)


class Holder:
    """A process in a user namespace of its own that waits to be let go."""

    def __init__(self, owner: "Identity | None") -> None:
        """Start it.

        Args:
            owner: whom the namespace shall belong to, where this process is root and has to become it first; None for itself.

        Raises:
            HostError: user namespaces are forbidden or used up here.
        """
        self._ready, ready_write = os.pipe()
        hold_read, self._hold = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _hold(owner, ready_write, hold_read, self._hold)
        os.close(ready_write)
        os.close(hold_read)
        if owner is not None and owner.method == NEWIDMAP:
            import qemu_userns.host.newidmap  # noqa: F401  # loaded while the holder unshares
        code = os.read(self._ready, 16)
        if code != b"0":
            self.let_go()
            raise _explain_refusal(int(code or b"0"))

    def let_go(self) -> None:
        """End the holder and wait for it."""
        os.close(self._hold)
        os.close(self._ready)
        process.reap(self.pid)


def _hold(owner: "Identity | None", ready: int, hold: int, other_end: int) -> None:
    """Be the holder: unshare, say 0 or the errno, and wait for the pipe to end."""
    code = 0
    try:
        os.close(other_end)
        if owner is not None and owner.switch:
            # From here on not dumpable (prctl(2)), so that no other process of that id can look into what was root's.
            process.set_ids(owner.uid, owner.gid, owner.groups)
        # Its own IPC namespace as well, since System V shared memory is open to every process of the same uid.
        process.unshare(process.CLONE_NEWUSER | (0 if owner is None else process.CLONE_NEWNS | process.CLONE_NEWIPC))
        if owner is not None:
            # What is mounted on the host later still arrives in the copies, nothing of ours goes back.
            mount.set_propagation("/", mount.MS_REC | mount.MS_SLAVE)
    except OSError as err:
        code = err.errno or _EINVAL
    os.write(ready, str(code).encode())
    if code == 0:
        os.read(hold, 1)
    os._exit(0)


def write_maps(pid: int, identity: "Identity") -> None:
    """Write the maps of a holder.

    Should: run outside, as root or as the holder's own user.

    Raises:
        HostError: newuidmap or newgidmap is missing or refuses.
        SandboxError: the kernel refuses.
    """
    try:
        # Forbidden before any gid map is written, also where newgidmap would leave it allowed: a process that can drop a
        # group can read what the group is denied (CVE-2014-8989). QEMU's groups are set already.
        write_file(f"/proc/{pid}/setgroups", "deny")
    except OSError as err:
        raise SandboxError("cannot forbid setgroups", err.strerror or str(err), rule=_MAP_RULE) from err
    if identity.method == NEWIDMAP:
        from qemu_userns.host.newidmap import run_newidmap

        run_newidmap(pid, identity.uid_map, identity.gid_map)
        return
    try:
        write_map(f"/proc/{pid}/uid_map", identity.uid_map)
        write_map(f"/proc/{pid}/gid_map", identity.gid_map)
    except OSError as err:
        raise SandboxError("cannot write the id maps", err.strerror or str(err), _map_hint(err.errno), rule=_MAP_RULE) from err


def read_maps(namespace: int) -> "tuple[tuple[MapEntry, ...], tuple[MapEntry, ...]] | None":
    """Return the id maps of a user namespace as this process's own namespace sees them, None if it is that one.

    Should: have CAP_SYS_ADMIN in the namespace, as its owner and root have.

    Args:
        namespace: fd of it; borrowed.

    Raises:
        HostError: it cannot be entered.
    """
    own, found = os.stat("/proc/self/ns/user"), os.fstat(namespace)
    if (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino):
        return None
    ready, ready_write = os.pipe()
    hold_read, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        code = 0
        try:
            process.setns(namespace, process.CLONE_NEWUSER)
        except OSError as err:
            code = err.errno or _EINVAL
        os.write(ready_write, str(code).encode())
        os.read(hold_read, 1)
        os._exit(0)
    os.close(ready_write)
    os.close(hold_read)
    try:
        code = int(os.read(ready, 16) or b"0")
        if code:
            raise HostError("the user namespace of a share", f"cannot be entered: {os.strerror(code)}")
        return _read_map(f"/proc/{pid}/uid_map"), _read_map(f"/proc/{pid}/gid_map")
    finally:
        os.close(hold)
        os.close(ready)
        process.reap(pid)


def _read_map(path: str) -> "tuple[MapEntry, ...]":
    """Read a uid_map or gid_map."""
    with open(path) as file:
        return tuple(MapEntry(*map(int, line.split())) for line in file)


def open_namespace(pid: int, kind: str) -> int:
    """Return an owned fd of a process's namespace; `kind` as in /proc/PID/ns."""
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def write_file(path: str, text: str) -> None:
    """Write a kernel file in the one write(2) that it takes."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def write_map(path: str, entries: "Sequence[MapEntry]") -> None:
    """Write a uid_map or gid_map: user_namespaces(7)."""
    write_file(path, "\n".join(f"{entry.inside} {entry.outside} {entry.count}" for entry in entries))


def _explain_refusal(code: int) -> HostError:
    """Say why there is no user namespace, and what to do about it."""
    what = "cannot make a user namespace"
    if code == _ENOSPC:
        return HostError(what, "the limit is reached", _ENOSPC_HINT)
    return HostError(
        what,
        os.strerror(code) if code else "the process that makes it was killed",
        _EPERM_HINT if code in (_EPERM, _EACCES) else None,
        rule="userns, capability sys_admin, mount,",
    )


def _map_hint(code: "int | None") -> "str | None":
    """Say what an errno of a map write means: user_namespaces(7)."""
    if code == _EINVAL:
        return "the entries overlap or are more than 340"
    return "these ids are not this process's to map; in a container, only the ids that it has itself" if code == _EPERM else None
