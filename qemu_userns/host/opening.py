"""Open what a plan grants, with the caller's rights, before anything is unshared."""

import errno
import os
import stat

from qemu_userns.errors import ResourceError
from qemu_userns.host.idmap import map_mount
from qemu_userns.host.leftovers import Leftover, remove
from qemu_userns.host.paths import find_fd
from qemu_userns.host.realpath import Parent, is_trusted, open_real
from qemu_userns.linux import mount
from qemu_userns.plan.grants import Bind, Connect, Create, CreateDir, Grant, KeepFd, Listen, Node, OpenFd, Reserved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.plan.layout import Placed
    from qemu_userns.plan.plan import Plan

_COPY_SIZE_BYTES = 1 << 20


class Opened:
    """What is open for a launch."""

    def __init__(self, tell: "Callable[[Leftover], None]") -> None:
        """Start with nothing; `tell` is told of each file that is created."""
        self.layout: "tuple[Placed, ...]" = ()
        self.sources: "dict[str, int]" = {}  # owned fds of detached mounts made outside, by path in the view
        self.inodes: "dict[str, tuple[int, int]]" = {}  # of what was created, by its path on the host
        self.places: "dict[str, str]" = {}  # where on the host a path of the view lies, if elsewhere
        self.nodes_fd: "int | None" = None  # owned: detached tmpfs with device nodes
        self.passed: "list[int]" = []  # numbers of fds that QEMU gets
        self.leftovers: "list[Leftover]" = []
        self._tell = tell

    def created(self, path: str, status: os.stat_result, temporary: bool) -> None:
        """Note a file that was created, here and with the supervisor, which outlives this process."""
        leftover = Leftover(path, (status.st_dev, status.st_ino), temporary)
        self.leftovers.append(leftover)
        self.inodes[path] = leftover.inode
        self._tell(leftover)

    def take(self, fd: int, number: int) -> None:
        """Pass an fd to QEMU under the number that the plan gave it; take ownership."""
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
        self.passed.append(number)

    def undo(self) -> None:
        """Remove the files that were created; fds go with the process."""
        remove(self.leftovers)


def open_grants(plan: "Plan", lease_fd: "int | None", opened: Opened) -> None:
    """Open everything that the plan grants.

    Should: run with the caller's rights, root's if it is root.
    Must not: open what only an image's header or a guest names; the plan has no such grant.

    Args:
        plan: what to open.
        lease_fd: the lock of the leased ids, borrowed; None without a lease.
        opened: filled as things are opened, so that the caller can undo a part of it.

    Raises:
        ResourceError: something cannot be opened or is not what the plan saw.
    """
    opened.layout = plan.build_layout()
    for grant in plan.grants:
        try:
            _open(grant, plan, lease_fd, opened)
        except OSError as err:
            raise ResourceError(f"{grant.why}: {getattr(grant, 'path', '')}", err.strerror or str(err)) from err
    if plan.identity.switch:
        _make_nodes(plan, opened)
        for placed in opened.layout:
            if isinstance(placed, Bind | Create | CreateDir):
                path = opened.places.get(placed.path, placed.path)
                fd = clone_bind(path, placed.inode if isinstance(placed, Bind) else opened.inodes.get(path))
                if isinstance(placed, Bind) and placed.owner is not None:
                    map_mount(fd, placed.owner, (plan.identity.uid, plan.identity.gid), placed.path)
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
        raise ResourceError(f"cannot show {path} to QEMU", err.strerror or str(err)) from err
    if inode is not None:
        _check_inode(os.fstat(fd), inode, path)
    return fd


def _open(grant: Grant, plan: "Plan", lease_fd: "int | None", opened: Opened) -> None:
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
        case Reserved(what="copy"):
            opened.take(_copy_fd(grant.number), grant.number)
        case Reserved(content=str(text)):
            # QEMU opens it anew by its name, at the start; whoever reads the fd itself finds it at its end, as after a pipe.
            memory = os.memfd_create("qemu-userns-config", os.MFD_CLOEXEC)
            os.write(memory, os.fsencode(text))
            opened.take(memory, grant.number)
        case Create():
            _create(grant, plan, opened)
        case CreateDir():
            _create_directory(grant, plan, opened)
        case Listen():
            _listen(grant, plan, opened)
        case Connect():
            _connect(grant, opened)


def _open_checked(grant: OpenFd) -> int:
    """Open a file that QEMU shall have; return an owned fd."""
    flags = grant.flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(grant.path, flags) if find_fd(grant.path) is not None else open_real(grant.path, flags)
    found = os.fstat(fd)
    _check_inode(found, grant.inode, grant.path)
    if not stat.S_ISREG(found.st_mode):
        raise ResourceError(grant.path, "is not a regular file")
    os.set_blocking(fd, True)
    return fd


def _copy_fd(number: int) -> int:
    """Return an owned fd of a copy in memory of the file that an fd of the caller is open on."""
    source = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    copy = os.memfd_create("qemu-userns-copy", os.MFD_CLOEXEC)
    while os.sendfile(copy, source, None, _COPY_SIZE_BYTES):
        pass
    os.close(source)
    return copy


def _create(grant: Create, plan: "Plan", opened: Opened) -> None:
    """Create an empty file for QEMU, or note that the one that is there stays."""
    with Parent(grant.path) as parent:
        if grant.overwrites is not None:
            _check_inode(parent.status(), grant.overwrites, grant.path)
            os.unlink(parent.name, dir_fd=parent.fd)
        try:
            _link_new_file(parent, grant, plan, opened)
        except FileExistsError:
            found = parent.status()
            if not stat.S_ISREG(found.st_mode):
                raise
            if grant.temporary:
                opened.created(grant.path, found, True)


def _link_new_file(parent: Parent, grant: Create, plan: "Plan", opened: Opened) -> None:
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
    if plan.identity.switch:
        os.fchown(fd, plan.identity.uid, plan.identity.gid)
    if not named:
        os.link(f"/proc/self/fd/{fd}", parent.name, dst_dir_fd=parent.fd, follow_symlinks=True)
    os.close(fd)


def _create_directory(grant: CreateDir, plan: "Plan", opened: Opened) -> None:
    """Create a directory of the VM's own below one of the host's."""
    place = f"{grant.path}/qemu-userns.{os.urandom(8).hex()}"
    with Parent(place) as parent:
        os.mkdir(parent.name, 0o700, dir_fd=parent.fd)
        opened.created(place, parent.status(), True)
        if plan.identity.switch:
            os.chown(parent.name, plan.identity.uid, plan.identity.gid, dir_fd=parent.fd, follow_symlinks=False)
    opened.places[grant.path] = place


def _listen(grant: Listen, plan: "Plan", opened: Opened) -> None:
    """Bind and listen as QEMU does: what is at the path goes, mode and owner are the umask's and the caller's.

    The address is the caller's own spelling, since QEMU reports it, unless root would follow it through a directory in which
    somebody else could put a symlink meanwhile.
    """
    import _socket

    socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    with Parent(grant.path) as parent:
        try:
            os.unlink(parent.name, dir_fd=parent.fd)
        except FileNotFoundError:
            pass
        trusted = not plan.identity.switch or is_trusted(os.path.dirname(grant.path))
        socket.bind(os.fsencode(grant.given if trusted else parent.path))
        opened.created(grant.path, parent.status(), True)
    socket.listen(1)
    opened.take(socket.detach(), grant.number)


def _connect(grant: Connect, opened: Opened) -> None:
    """Connect to a socket that QEMU's id may not connect to."""
    import _socket

    socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    place = open_real(grant.path, os.O_PATH | os.O_NOFOLLOW)
    _check_inode(os.fstat(place), grant.inode, grant.path)
    socket.connect(f"/proc/self/fd/{place}")
    os.close(place)
    opened.take(socket.detach(), grant.number)


def _check_inode(found: os.stat_result, planned: "tuple[int, int]", path: str) -> None:
    """Stop when something else is at a path than what the plan saw."""
    if (found.st_dev, found.st_ino) != planned:
        raise ResourceError(path, "it was replaced while QEMU was being started")


def _make_nodes(plan: "Plan", opened: Opened) -> None:
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
        os.chown(name, plan.identity.uid, plan.identity.gid, dir_fd=opened.nodes_fd)
