"""Place what a hot-plug grants into the view of a QEMU that runs, and take it back.

Theory of operation. Both functions run in a process that was forked for them and has nothing else to do: it becomes QEMU's
outside id, and ends up in QEMU's user and mount namespace with every capability in them. QEMU, which has not these capabilities,
can neither trace it nor take its fds, and as it is not dumpable, not even list them (ptrace(2), "Ptrace access mode checking").

1. Detached mounts of the sources are made in the host's tree: by root with root's rights (host/opening.py); by an ordinary user,
   who has no right to mount there, in a copy of it that belongs to QEMU's user namespace, made for the moment. So nothing is kept
   that would pin the host's mounts, and what the launch's view was made from need not be kept either.
2. `become`, where it is root; setns to the user namespace, which the id owns.
3. setns to the mount namespace, and chroot to QEMU's root: where the host's tree stays in sight (fs=host), setns alone leads to
   the tmpfs that view.py attached over it.
4. The places are found or made (places.py), and the mounts attached to them.

To the kernel a detached mount is a mount namespace, and the launch has set the limit of these in QEMU's user namespace to zero
(namespaces.py). It is raised for the moment and set back whatever happens, but for a process that is killed meanwhile. A limit
that stays raised gives QEMU nothing: without CAP_SYS_ADMIN it can make no mount namespace, and without a user namespace, whose
limit stays zero, it cannot come by that. The next hot-plug sets it back.
"""

import fcntl
import os
import select
import struct

from qemu_userns.errors import SandboxError
from qemu_userns.host.opening import open_sources
from qemu_userns.linux import mount, process
from qemu_userns.plan.grants import Bind, Create, CreateDir, Link, Node
from qemu_userns.record import Record
from qemu_userns.sandbox.namespaces import become
from qemu_userns.sandbox.places import RunningView, Shown, find_directories
from qemu_userns.sandbox.view import open_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qemu_userns.host.opening import Opened
    from qemu_userns.plan.identity import Identity

_NS_GET_USERNS, _NS_GET_OWNER_UID = 0xB701, 0xB704  # ioctl_nsfs(2)
_LIMIT = "/proc/sys/user/max_mnt_namespaces"
_ENOUGH = b"65536"


class Namespaces(Record):
    """QEMU's user and mount namespace, and its root in that: fds, which the functions here borrow.

    The root's, kept open, keeps the view's tmpfs beyond QEMU's end, and with fs=host a file system of the host.
    """

    user: int
    mnt: int
    root: int


def open_namespaces(pid: int, pidfd: int, identity: "Identity") -> Namespaces:
    """Open the namespaces of a QEMU that runs.

    Must not: open those of another process that got the pid since (`pidfd` tells), or of one that does not run confined.

    Args:
        pid: QEMU's.
        pidfd: of the same process; borrowed.
        identity: whose the user namespace has to be.

    Returns:
        Owned fds.

    Raises:
        SandboxError: QEMU has ended, or is not in the namespaces that were made for it.
    """
    fds: "list[int]" = []
    try:
        for kind in ("user", "mnt"):
            fds.append(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
        fds.append(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if ended.poll(0):  # pidfd_open(2): readable when the process has ended
            raise SandboxError("cannot open QEMU's namespaces", "QEMU has ended")
        owner = fcntl.ioctl(fds[1], _NS_GET_USERNS)
        same = os.path.sameopenfile(owner, fds[0])
        os.close(owner)
        if not same or struct.unpack("I", fcntl.ioctl(fds[0], _NS_GET_OWNER_UID, bytes(4)))[0] != identity.uid:
            raise SandboxError("cannot open QEMU's namespaces", "they are not the ones that were made for it")
    except (OSError, SandboxError) as err:
        for fd in fds:
            os.close(fd)
        if isinstance(err, SandboxError):
            raise
        raise SandboxError("cannot open QEMU's namespaces", err.strerror or str(err)) from err
    return Namespaces(*fds)


def bind_running(opened: "Opened", identity: "Identity", namespaces: Namespaces) -> "tuple[Shown, ...]":
    """Place a layout into the view of a QEMU that runs: Bind, Create, CreateDir, Link, and as root Node.

    Should: run in a process of its own without threads, with the caller's rights, one at a time for a QEMU; be given no path that
        the view shows already (plan/layout.py: `find_shown`), since a second mount would cover the first; and with a directory
        also be given what the view has below it (`find_covered`), which it would hide.
    Must not: follow what QEMU put into its view; make anything on the host; or leave a part of the layout behind when it fails.
        The process is good for nothing afterwards but to hand on the result and to end: its ids, namespaces, root, working
        directory and umask are changed for good.

    Args:
        opened: the layout, and what `open_grants` made for it; root's detached mounts are made here where they are missing.
        identity: QEMU's.
        namespaces: QEMU's.

    Returns:
        What was placed, for `unbind_running`. A symlink that was there already has no place of its own, and stays then.

    Raises:
        ResourceError: a source is not what the plan saw.
        HostError: a file system cannot be idmapped.
        SandboxError: a place cannot be had, or the kernel refuses.
    """
    host = find_directories(grant.path for grant in opened.layout)
    own = _prepare()
    mounts: "dict[str, int]" = {}
    if identity.switch:
        mounts = _open_as_root(opened, identity)
        become(identity)
    _join(namespaces.user)
    with _RaisedLimit():
        if not identity.switch:
            mounts = _open_as_user(opened)
        _enter(namespaces)
        return _place(RunningView(own, host), opened, mounts)


def unbind_running(shown: "Iterable[Shown]", identity: "Identity", namespaces: Namespaces) -> "tuple[Shown, ...]":
    """Take back what `bind_running` placed, the last one first; what QEMU has open stays open.

    Should: run as `bind_running`, and be called when nothing needs the path any more: the caller counts. What was placed later
        below a directory goes with it.
    Must not: take away a mount that is not the very one.

    Returns:
        What is left, since something else has been attached over it: to be tried again when that is gone.

    Raises:
        SandboxError: the kernel refuses.
    """
    placed = tuple(shown)
    host = find_directories(item.path for item in placed)
    own = _prepare()
    if identity.switch:
        become(identity)
    _join(namespaces.user)
    with _RaisedLimit():
        _enter(namespaces)
        view = RunningView(own, host)
        try:
            count = 0
            while len(placed) != count:  # what covered another one has gone now
                count = len(placed)
                placed = tuple(item for item in reversed(placed) if not view.detach(item))[::-1]
            return placed
        except OSError as err:
            raise SandboxError("cannot take back what QEMU was shown", err.strerror or str(err)) from err


class _RaisedLimit:
    """user.max_mnt_namespaces of the user namespace that this process is in, raised while it is needed."""

    def __enter__(self) -> None:
        """Raise it; must be called in the host's tree, since the view shows /proc read-only."""
        try:
            self._fd = os.open(_LIMIT, os.O_WRONLY | os.O_CLOEXEC)
            os.pwrite(self._fd, _ENOUGH, 0)
        except OSError as err:
            raise SandboxError("cannot make mounts for QEMU", f"{_LIMIT}: {err.strerror}") from err

    def __exit__(self, *_: object) -> None:
        """Set it back to zero."""
        try:
            os.pwrite(self._fd, b"0", 0)
        except OSError as err:
            raise SandboxError("cannot forbid namespaces inside QEMU's", err.strerror or str(err)) from err
        os.close(self._fd)


def _prepare() -> int:
    """Return an owned fd of /proc/self, which is out of reach later; hide this process from others of its id; set the umask."""
    process.prctl(process.PR_SET_DUMPABLE, 0)
    os.umask(0o022)
    return os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _join(namespace: int) -> None:
    """Join one of QEMU's namespaces."""
    try:
        process.setns(namespace, 0)
    except OSError as err:
        raise SandboxError("cannot enter QEMU's namespaces", err.strerror or str(err)) from err


def _enter(namespaces: Namespaces) -> None:
    """Join QEMU's mount namespace, with its root as this process's."""
    _join(namespaces.mnt)
    try:
        os.fchdir(namespaces.root)
        os.chroot(".")
    except OSError as err:
        raise SandboxError("cannot enter QEMU's view", err.strerror or str(err)) from err


def _open_as_root(opened: "Opened", identity: "Identity") -> "dict[str, int]":
    """Return owned fds of detached mounts of the layout's sources, by path, made with root's rights in the host's tree."""
    try:
        if not opened.sources and opened.nodes_fd is None:
            open_sources(identity, opened)
        mounts = _open_sources(opened)
        if opened.nodes_fd is not None:
            # A file of a mount can be copied only where the mount is attached: in a copy of the host's tree, for the moment.
            process.unshare(process.CLONE_NEWNS)
            mount.set_propagation("/", mount.MS_REC | mount.MS_SLAVE)
            mount.move_mount(opened.nodes_fd, "", mount.AT_FDCWD, "/", mount.MOVE_MOUNT_F_EMPTY_PATH)
            for grant in opened.layout:
                if isinstance(grant, Node):
                    name = grant.path.replace("/", "!")
                    mounts[grant.path] = mount.open_tree(opened.nodes_fd, name, mount.OPEN_TREE_CLONE)
    except OSError as err:
        raise SandboxError("cannot make mounts for QEMU", err.strerror or str(err)) from err
    return mounts


def _open_as_user(opened: "Opened") -> "dict[str, int]":
    """Return the same, made in a copy of the host's tree that belongs to QEMU's user namespace."""
    try:
        process.unshare(process.CLONE_NEWNS)
        mount.set_propagation("/", mount.MS_REC | mount.MS_SLAVE)
        return _open_sources(opened)
    except OSError as err:
        raise SandboxError("cannot make mounts for QEMU", err.strerror or str(err)) from err


def _open_sources(opened: "Opened") -> "dict[str, int]":
    """Return owned fds of detached mounts, with the attributes that they have in the view."""
    return {grant.path: open_source(grant, opened) for grant in opened.layout if isinstance(grant, Bind | Create | CreateDir)}


def _place(view: RunningView, opened: "Opened", mounts: "dict[str, int]") -> "tuple[Shown, ...]":
    """Place the layout, all of it or nothing."""
    shown: "list[Shown]" = []
    for grant in opened.layout:
        try:
            if isinstance(grant, Link):
                shown.append(view.link(grant.path, grant.target))
            elif grant.path in mounts:
                shown.append(view.attach(grant.path, mounts.pop(grant.path)))
            else:
                raise SandboxError(f"cannot place {grant.path} in QEMU's view", "not while it runs")
        except (OSError, SandboxError) as err:
            _undo(view, shown)
            if isinstance(err, SandboxError):
                raise
            raise SandboxError(f"cannot place {grant.path} in QEMU's view", err.strerror or str(err)) from err
    return tuple(shown)


def _undo(view: RunningView, shown: "Sequence[Shown]") -> None:
    """Take back a part of a layout."""
    for item in reversed(shown):
        try:
            view.detach(item)
        except OSError:
            continue  # the error that led here is the one to tell
