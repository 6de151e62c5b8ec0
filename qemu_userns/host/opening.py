"""Open what a plan grants, with the caller's rights, before anything is unshared."""

import errno
import fcntl
import os
import stat
import sys

from qemu_userns.errors import ResourceError
from qemu_userns.host.idmap import map_mount
from qemu_userns.host.leftovers import STALE, Downscript, Leftover, remove
from qemu_userns.host.paths import find_fd
from qemu_userns.host.realpath import Parent, check_inode, open_real
from qemu_userns.linux import mount
from qemu_userns.plan.grants import (
    Bind,
    Connect,
    Create,
    CreateDir,
    Display,
    Grant,
    Helper,
    KeepFd,
    Listen,
    LockLimit,
    Monitor,
    Node,
    OpenFd,
    Passt,
    QmpSocket,
    Reserved,
    Run,
    Tap,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qemu_userns.plan.identity import Identity
    from qemu_userns.plan.layout import Placed

_COPY_SIZE_BYTES = 1 << 20
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60


class Opened:
    """What is open for a launch."""

    def __init__(self, layout: "tuple[Placed, ...]", tell: "Callable[..., None]") -> None:
        """Start with nothing.

        Args:
            layout: what is to be placed in the view.
            tell: told of each file that is created; and of each script to run at the end, with an fd that has to stay open
                until then, which is borrowed.
        """
        self.layout = layout
        self.sources: "dict[str, int]" = {}  # owned fds of detached mounts made outside, by path in the view
        self.inodes: "dict[str, tuple[int, int]]" = {}  # of what was created, by its path on the host
        self.places: "dict[str, str]" = {}  # where on the host a path of the view lies, if elsewhere
        self.nodes_fd: "int | None" = None  # owned: detached tmpfs with device nodes
        self.passed: "list[int]" = []  # numbers of fds that QEMU gets
        self.served: "list[int]" = []  # owned fds for the supervisor: public end and way in of each Monitor, QmpSockets, Displays
        self.leftovers: "list[Leftover]" = []
        self.downscripts: "list[Downscript]" = []
        self._tell = tell

    def created(self, path: str, status: os.stat_result, temporary: bool) -> None:
        """Note a file that was created, here and with the supervisor, which outlives this process."""
        leftover = Leftover(path, (status.st_dev, status.st_ino), temporary)
        self.leftovers.append(leftover)
        self.inodes[path] = leftover.inode
        self._tell(leftover)

    def intend(self, path: str) -> None:
        """Note a socket that is about to be made: its inode is known only when it has its name, which may be too late."""
        leftover = Leftover(path, STALE, False)
        self.leftovers.append(leftover)
        self._tell(leftover)

    def run_at_end(self, script: Downscript, fd: int) -> None:
        """Note a script, which needs that an fd stays open until it has run; the fd is borrowed."""
        self.downscripts.append(script)
        self._tell(script, fd)

    def take(self, fd: int, number: int) -> None:
        """Pass an fd to QEMU under the number that the plan gave it; take ownership.

        Raises:
            OSError: the number is another fd's of ours: they are more than the plan counted with.
        """
        if fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number) != number:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        os.close(fd)
        self.passed.append(number)

    def take_over(self, fd: int, number: int) -> None:
        """Do so where the number is still that of an fd which has done its service."""
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
        self.passed.append(number)

    def allow_locking(self, limit_bytes: "int | None") -> None:
        """Allow QEMU, which this process becomes, to lock so much memory."""
        from qemu_userns.host.memory import raise_lock_limit

        raise_lock_limit(0, limit_bytes)

    def undo(self) -> None:
        """Remove the files that were created; fds go with the process, and the scripts are run by who was told of them."""
        remove(self.leftovers)


def open_grants(grants: "Iterable[Grant]", identity: "Identity", lease_fd: "int | None", opened: Opened) -> None:
    """Open everything that a plan grants.

    Should: run with the caller's rights, root's if it is root.
    Must not: open what only an image's header or a guest names; the plan has no such grant.

    Args:
        grants: what to open.
        identity: QEMU's, who gets what is created.
        lease_fd: the lock of the leased ids, borrowed; None without a lease.
        opened: filled as things are opened, so that the caller can undo a part of it.

    Raises:
        ResourceError: something cannot be opened or is not what the plan saw.
    """
    for grant in grants:
        try:
            _open(grant, identity, lease_fd, opened)
        except OSError as err:
            raise ResourceError(f"{grant.why}: {getattr(grant, 'path', '')}", err.strerror or str(err)) from err
    if identity.switch:
        open_sources(identity, opened)


def open_sources(identity: "Identity", opened: Opened) -> None:
    """Make root's detached mounts of what the layout shows: QEMU's id may not be able to walk there, nor make device nodes.

    Should: run as root, outside.
    Must not: leave a mount in a peer group of the host's, where what is mounted below it in the view would show up.

    Raises:
        ResourceError: a path cannot be copied, or is no longer what the plan saw.
        HostError: a file system cannot be idmapped.
    """
    _make_nodes(identity, opened)
    for placed in opened.layout:
        if isinstance(placed, Bind | Create | CreateDir):
            path = opened.places.get(placed.path, placed.path)
            fd = clone_bind(path, placed.inode if isinstance(placed, Bind) else opened.inodes.get(path))
            mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH | mount.AT_RECURSIVE, 0, propagation=mount.MS_SLAVE)
            if isinstance(placed, Bind) and placed.idmap is not None:
                map_mount(fd, placed.idmap, placed.writable, placed.path)
            opened.sources[placed.path] = fd


def clone_bind(path: str, inode: "tuple[int, int] | None") -> int:
    """Make a detached copy of what is mounted at a path.

    Should: run with the rights that the operator gave, root's before the identity is switched.
    Must not: follow a symlink; the plan resolved them.

    Returns:
        An owned fd.

    Raises:
        ResourceError: the path cannot be copied, or is no longer what the plan saw.
    """
    try:
        place = open_real(path, os.O_PATH)
        try:
            fd = mount.open_tree(place, "", mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE | mount.AT_EMPTY_PATH)
        finally:
            os.close(place)
    except OSError as err:
        rule = "capability sys_admin, mount,"
        raise ResourceError(f"cannot show {path} to QEMU", err.strerror or str(err), rule=rule) from err
    if inode is not None:
        check_inode(os.fstat(fd), inode, path)
    return fd


def _open(grant: Grant, identity: "Identity", lease_fd: "int | None", opened: Opened) -> None:
    """Open what one grant gives, if it is not a matter of the view alone."""
    match grant:
        case KeepFd():
            opened.passed.append(grant.number)
        case OpenFd():
            opened.take(_open_checked(grant), grant.number)
        case Reserved(what="lease") if lease_fd is not None:
            opened.take(os.dup(lease_fd), grant.number)
        case Reserved(what="ptmx"):
            opened.take(os.open("/dev/ptmx", os.O_PATH | os.O_CLOEXEC), grant.number)
        case Reserved(what="copy", content=None):
            opened.take_over(_copy_fd(grant.number), grant.number)
        case Reserved(content=str(text)):
            # QEMU opens it anew by its name, at the start; whoever reads the fd itself finds it at its end, as after a pipe.
            memory = os.memfd_create("qemu-userns-config", os.MFD_CLOEXEC)
            os.write(memory, os.fsencode(text))
            (opened.take_over if grant.what == "copy" else opened.take)(memory, grant.number)
        case Create():
            _create(grant, identity, opened)
        case CreateDir():
            _create_directory(grant, identity, opened)
        case LockLimit():
            opened.allow_locking(grant.limit_bytes)
        case Run():
            from qemu_userns.host.programs import open_program

            opened.take(open_program(grant.argv), grant.number)
        case Passt():
            from qemu_userns.host.programs import open_passt

            opened.take(open_passt(grant), grant.number)
        case Tap() | Helper():
            from qemu_userns.host.taps import open_tap

            open_tap(grant, opened)
        case Listen() | Connect() | Monitor() | QmpSocket() | Display():
            from qemu_userns.host.sockets import open_socket

            open_socket(grant, identity.switch, opened)


def _open_checked(grant: OpenFd) -> int:
    """Open a file that QEMU shall have; return an owned fd."""
    flags = grant.flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(grant.path, flags) if find_fd(grant.path) is not None else open_real(grant.path, flags)
    found = os.fstat(fd)
    check_inode(found, grant.inode, grant.path)
    if grant.device is None and not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
        raise ResourceError(grant.path, "is not a regular file or a pipe")
    if grant.device is not None and (not stat.S_ISCHR(found.st_mode) or found.st_rdev != grant.device):
        raise ResourceError(grant.path, "is not the device that was planned for")
    os.set_blocking(fd, True)
    if grant.guest_cid is not None:
        _take_cid(fd, grant.guest_cid, grant.why)
    return fd


def _take_cid(fd: int, cid: int, why: str) -> None:
    """Give vhost-vsock the guest's number, which QEMU does too; the kernel takes the same one again, but not of another VM."""
    try:
        fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, cid.to_bytes(8, sys.byteorder))
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            hint = "choose another guest-cid; `qemu-userns ps` lists the VMs that there are"
            raise ResourceError(f"{why} guest-cid={cid}", "another VM has this number", hint) from err


def _copy_fd(number: int) -> int:
    """Return an owned fd of a copy in memory of the file that an fd of the caller is open on."""
    source = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    copy = os.memfd_create("qemu-userns-copy", os.MFD_CLOEXEC)
    while os.sendfile(copy, source, None, _COPY_SIZE_BYTES):
        pass
    os.close(source)
    return copy


def _create(grant: Create, identity: "Identity", opened: Opened) -> None:
    """Create an empty file for QEMU, or note that the one that is there stays."""
    with Parent(grant.path) as parent:
        if grant.overwrites is not None:
            check_inode(parent.status(), grant.overwrites, grant.path)
            os.unlink(parent.name, dir_fd=parent.fd)
        try:
            _link_new_file(parent, grant, identity, opened)
        except FileExistsError:
            found = parent.status()
            if not stat.S_ISREG(found.st_mode):
                raise
            if grant.temporary:
                opened.created(grant.path, found, True)


def _link_new_file(parent: Parent, grant: Create, identity: "Identity", opened: Opened) -> None:
    """Make a file without a name, tell the supervisor of it, and only then give it its name: open(2), O_TMPFILE.

    So a launch that is killed at any point leaves no file that nobody knows of. Where the file system has no such files (NFS)
    the file has its name from the start.
    """
    try:
        fd = os.open(f"/proc/self/fd/{parent.fd}", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, grant.mode)
        named = False
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(parent.name, flags, grant.mode, dir_fd=parent.fd)
        named = True
    opened.created(grant.path, os.fstat(fd), grant.temporary)
    if identity.switch:
        os.fchown(fd, identity.uid, identity.gid)
    if not named:
        os.link(f"/proc/self/fd/{fd}", parent.name, dst_dir_fd=parent.fd, follow_symlinks=True)
    os.close(fd)


def _create_directory(grant: CreateDir, identity: "Identity", opened: Opened) -> None:
    """Create a directory of the VM's own below one of the host's."""
    place = f"{grant.path}/qemu-userns.{os.urandom(8).hex()}"
    with Parent(place) as parent:
        os.mkdir(parent.name, 0o700, dir_fd=parent.fd)
        opened.created(place, parent.status(), True)
        if identity.switch:
            os.chown(parent.name, identity.uid, identity.gid, dir_fd=parent.fd, follow_symlinks=False)
    opened.places[grant.path] = place


def _make_nodes(identity: "Identity", opened: Opened) -> None:
    """Make the device nodes of the plan on a tmpfs that root mounts, where devices work inside the namespace too."""
    nodes = [placed for placed in opened.layout if isinstance(placed, Node)]
    if not nodes:
        return
    context = mount.fsopen("tmpfs", mount.FSOPEN_CLOEXEC)
    mount.fsconfig(context, mount.FSCONFIG_SET_STRING, "mode", "755")
    mount.fsconfig(context, mount.FSCONFIG_CMD_CREATE)
    opened.nodes_fd = mount.fsmount(context, mount.FSMOUNT_CLOEXEC, mount.MOUNT_ATTR_NOSUID)
    os.close(context)
    for node in nodes:
        name = node.path.replace("/", "!")
        os.mknod(name, (stat.S_IFBLK if node.block else stat.S_IFCHR) | 0o600, node.device, dir_fd=opened.nodes_fd)
        os.chown(name, identity.uid, identity.gid, dir_fd=opened.nodes_fd)
