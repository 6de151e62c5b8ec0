"""Build what QEMU sees: a new root, and in it only what the plan grants.

Theory of operation. `build_view` runs in the launcher, inside the new user and mount namespace, where it holds every
capability and the host's tree is still its root:

1. The copies of the host's mounts are slaves (host/usernamespace.py): what is mounted on the host later still arrives in
   them, nothing of ours goes back.
2. A tmpfs is attached over "/", and a directory of it once more over itself: the new root. The process's root stays the
   host's, so paths still mean the host's files, while the new root is reached through its fd alone. To AppArmor what is made
   there has the path that it has in the tmpfs: libvirt's profiles deny to write what QEMU may only read by the path of that.
3. Each grant of the layout is placed below that fd. A bind is a detached copy of a host mount (open_tree), made
   read-only, nosuid and nodev while nobody can see it, and then attached (move_mount). A root caller's copies were
   made while it was still root (host/opening.py), because QEMU's id may not be able to walk to them.
4. The new root itself becomes read-only, pivot_root swaps it in, and the old one is detached.

A target is resolved below the new root with openat2 and no symlinks, so that a bound directory whose contents somebody
else controls cannot lead a mount elsewhere (bubblewrap CVE-2026-87766, runc CVE-2021-30465). A source is compared with
what the plan saw, by device and inode.
"""

import os

from qemu_userns.errors import SandboxError
from qemu_userns.host.opening import clone_bind
from qemu_userns.linux import mount
from qemu_userns.plan.grants import Bind, Copy, Create, CreateDir, Link, Node, Private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.host.opening import Opened
    from qemu_userns.plan.layout import Placed

_TARGET = mount.RESOLVE_IN_ROOT | mount.RESOLVE_NO_SYMLINKS | mount.RESOLVE_NO_MAGICLINKS
_PLACE_RULE = "mount, / r, /** rwlk,"
# In the tmpfs: where files and nodes of our own lie before they are bound to their places, and the new root.
_FILES, _NODES, _VIEW = "qemu-userns.files", "qemu-userns.nodes", "qemu-userns.view"


def build_view(opened: "Opened", cwd: str) -> None:
    """Build the view, and make it this process's root.

    Should: run as the launcher, with all capabilities in the new namespaces, before anything confines it.
    Must not: be retried; a view that failed half way is left to die with the process.

    Args:
        opened: the layout, and what was opened for it; binds without a detached mount of root's are copied here.
        cwd: working directory, inside the view.

    Raises:
        SandboxError: a step failed.
    """
    staging = _cover_root(opened.nodes_fd)
    root = mount.open_tree(staging, _VIEW, mount.OPEN_TREE_CLONE)
    mount.move_mount(root, "", staging, _VIEW, mount.MOVE_MOUNT_F_EMPTY_PATH)
    made: "set[str]" = set()
    for grant in opened.layout:
        try:
            _place(root, grant, opened, made, staging)
        except OSError as err:
            raise SandboxError(f"cannot place {grant.path} in QEMU's view", err.strerror or str(err), rule=_PLACE_RULE) from err
    os.close(staging)
    _enter(root, cwd)


def overlay_host(opened: "Opened", cwd: str, read_only: bool) -> None:
    """Leave the host's tree in sight (fs=host, a share of /), and place what the layout has over it.

    Should and must not: as `build_view`.

    Args:
        opened: as in `build_view`.
        cwd: working directory.
        read_only: whether nothing but what is placed may be written.

    Raises:
        SandboxError: a step failed.
    """
    staging = _cover_root(opened.nodes_fd)
    try:
        placed = [(grant.path, _open_placed(staging, grant, opened)) for grant in opened.layout]
        if read_only:
            mount.mount_setattr(mount.AT_FDCWD, "/", mount.AT_RECURSIVE, mount.MOUNT_ATTR_RDONLY)
        for path, fd in placed:
            mount.move_mount(fd, "", mount.AT_FDCWD, path, mount.MOVE_MOUNT_F_EMPTY_PATH)
            os.close(fd)
        os.close(staging)
        os.chdir(cwd)
    except OSError as err:
        raise SandboxError("cannot place our files over the host's", err.strerror or str(err), rule="mount, umount,") from err


def _open_placed(staging: int, grant: "Placed", opened: "Opened") -> int:
    """Return an owned fd of a detached mount of what a grant places."""
    match grant:
        case Copy() | Node():
            return _stage(staging, grant)
        case Bind() | Create() | CreateDir():
            return open_source(grant, opened)
        case Link() | Private():
            raise SandboxError(grant.path, "has no place over the host's tree")


def _cover_root(nodes_fd: "int | None") -> int:
    """Attach a tmpfs over "/", with the directories that it has; return an owned fd of it."""
    try:
        staging = _mount_tmpfs({"mode": "755", "size": "16m", "nr_inodes": "10k"})
        mount.move_mount(staging, "", mount.AT_FDCWD, "/", mount.MOVE_MOUNT_F_EMPTY_PATH)
        for name in (_FILES, _NODES, _VIEW):
            os.mkdir(name, 0o755, dir_fd=staging)
        if nodes_fd is not None:
            _attach(staging, _NODES, nodes_fd)
    except OSError as err:
        raise SandboxError("cannot make a root for QEMU", err.strerror or str(err), rule="mount,") from err
    return staging


def _stage(staging: int, grant: "Copy | Node") -> int:
    """Make a file of our own in the tmpfs; return an owned fd of a detached mount of it."""
    name = f"{_FILES if isinstance(grant, Copy) else _NODES}/{grant.path.replace('/', '!')}"
    if isinstance(grant, Copy):
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644, dir_fd=staging)
        with os.fdopen(fd, "wb") as file:
            file.write(os.fsencode(grant.content))
    fd = mount.open_tree(staging, name, mount.OPEN_TREE_CLONE)
    if isinstance(grant, Copy):
        mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH, mount.MOUNT_ATTR_RDONLY)
    return fd


def _place(root: int, grant: "Placed", opened: "Opened", made: "set[str]", staging: int) -> None:
    """Put one grant into the new root."""
    name = grant.path[1:]
    if name:
        _make_directories(root, os.path.dirname(name), made)
    match grant:
        case Link():
            parent, last = _open_parent(root, name)
            os.symlink(grant.target, last, dir_fd=parent)
            os.close(parent)
        case Private(tmpfs=False):
            _make_directories(root, name, made)
        case Private():
            _attach(root, name, _mount_tmpfs({"mode": f"{grant.mode:o}"}))
        case Copy() | Node():
            _attach(root, name, _stage(staging, grant))
        case Bind() | Create() | CreateDir():
            _attach(root, name, open_source(grant, opened))


def open_source(grant: "Bind | Create | CreateDir", opened: "Opened") -> int:
    """Return an owned fd of a detached mount of what the grant shows, with no more access than it gives."""
    source = opened.sources.get(grant.path)
    if source is not None:
        fd = os.dup(source)
    else:
        path = opened.places.get(grant.path, grant.path)
        fd = clone_bind(path, grant.inode if isinstance(grant, Bind) else opened.inodes.get(path))
    attributes = mount.MOUNT_ATTR_NOSUID
    if isinstance(grant, Bind) and not grant.writable:
        attributes |= mount.MOUNT_ATTR_RDONLY
    if not (isinstance(grant, Bind) and grant.device):
        attributes |= mount.MOUNT_ATTR_NODEV
    mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH | mount.AT_RECURSIVE, attributes)
    return fd


def _attach(root: int, name: str, fd: int) -> None:
    """Attach a detached mount at a path of the new root, made there unless a bind above shows it; take ownership of `fd`.

    move_mount(2) follows no symlink at the end of its path unless it is told to.
    """
    parent, last = _open_parent(root, name)
    try:
        if os.fstat(fd).st_mode & 0o170000 == 0o040000:
            os.mkdir(last, 0o755, dir_fd=parent)
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(last, flags, 0o644, dir_fd=parent))
    except FileExistsError:
        pass
    try:
        mount.move_mount(fd, "", parent, last, mount.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(parent)
        os.close(fd)


def _make_directories(root: int, name: str, made: "set[str]") -> None:
    """Make a directory of the new root and its parents, but for those that are there."""
    if not name or name in made:
        return
    _make_directories(root, os.path.dirname(name), made)
    made.add(name)
    parent, last = _open_parent(root, name)
    try:
        os.mkdir(last, 0o755, dir_fd=parent)
    except FileExistsError:
        return
    finally:
        os.close(parent)


def _open_parent(root: int, name: str) -> "tuple[int, str]":
    """Return an owned fd of the directory of a path of the new root, and the path's last component."""
    directory, last = os.path.split(name)
    return mount.openat2(root, directory or ".", os.O_PATH | os.O_DIRECTORY, _TARGET), last


def _mount_tmpfs(options: "Mapping[str, str]") -> int:
    """Make a tmpfs; return an owned fd of its detached mount."""
    context = mount.fsopen("tmpfs", mount.FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            mount.fsconfig(context, mount.FSCONFIG_SET_STRING, key, value)
        mount.fsconfig(context, mount.FSCONFIG_CMD_CREATE)
        return mount.fsmount(context, mount.FSMOUNT_CLOEXEC, mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)


def _enter(root: int, cwd: str) -> None:
    """Make the new root this process's root and let go of the old one.

    Source: pivot_root(2), "pivot_root(".", ".")": the old root is stacked on the new one, at "." , and detached from there, after
    the tmpfs that lies over it.
    """
    try:
        mount.mount_setattr(root, "", mount.AT_EMPTY_PATH, mount.MOUNT_ATTR_RDONLY)
        os.fchdir(root)
        mount.pivot_root(".", ".")
        for _ in ("tmpfs", "old root"):
            mount.umount2(".", mount.MNT_DETACH)
        os.close(root)
        os.chdir(cwd)
    except OSError as err:
        raise SandboxError("cannot enter QEMU's view", err.strerror or str(err), rule="pivot_root, umount,") from err
