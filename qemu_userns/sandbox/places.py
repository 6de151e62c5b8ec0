"""Places in the view of a QEMU that runs: find them, make them, attach mounts to them, take both away again.

Theory of operation. Everything here happens in QEMU's mount namespace, with capabilities in its user namespace, while QEMU runs.
There are three kinds of directories in a view:

* The root, a tmpfs that is mounted read-only.
* Private file systems in memory (/tmp, /run, /var/tmp), in which QEMU may put what it likes, at any time. What it put at a place
  is covered by the mount, or the place is refused; it is never followed.
* Binds of the host. What is there on the host is there in the view, and nothing is ever made in them.

Places are made through a detached mount of the directory, which alone is writable: QEMU's own mount of the root never is. And to
AppArmor they have no other path then but their name: libvirt's profiles deny to write what QEMU may only read by its path.

Every path is resolved below the view's root with openat2 and no symlinks, and a mount is attached to an fd that was looked at.
Directories that are made carry the sticky bit, which means nothing in them, and tells them from those of the launch later.
"""

import errno
import os
import stat

from qemu_userns.linux import mount
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Inode = tuple[int, int]

_TARGET = mount.RESOLVE_IN_ROOT | mount.RESOLVE_NO_SYMLINKS | mount.RESOLVE_NO_MAGICLINKS
_MADE_DIRECTORY = stat.S_ISVTX | 0o755
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class Shown(Record):
    """One thing that was placed, as it has to be told from others to be taken back."""

    path: str
    mount: "int | None"  # id of the mount, as in mountinfo; None: a symlink
    inode: "Inode"  # of what is shown
    place: "Inode | None"  # of the mount point or symlink that was made; None: it was there


class RunningView:
    """The view, from inside its mount namespace."""

    def __init__(self, process: int, host: "Mapping[str, Inode]") -> None:
        """Open its root.

        Args:
            process: fd of /proc/self of the host's /proc; borrowed.
            host: inodes of the host's directories on the way to the places, from `find_directories`.
        """
        self._process = process
        self._host = host
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def attach(self, path: str, fd: int) -> Shown:
        """Attach a detached mount at a path; take ownership of `fd`.

        Must not: follow a symlink, or make a place in a directory of the host's.

        Raises:
            OSError: ENOENT when a directory of the host's has no such entry; ELOOP when a symlink is there or on the way; ENOTDIR
                when a file is where a directory has to be, or the other way round; EEXIST when QEMU made one meanwhile.
        """
        place = None
        try:
            target = self._find(path)
            if target is None:
                place = self._make(path, stat.S_ISDIR(os.fstat(fd).st_mode))
                target = self._find(path)
            if target is None or stat.S_ISLNK(os.fstat(target).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            # To the fd, not the path, so that what was looked at is what is covered.
            mount.move_mount(fd, "", target, "", mount.MOVE_MOUNT_F_EMPTY_PATH | mount.MOVE_MOUNT_T_EMPTY_PATH)
            os.close(target)
            return Shown(path, self._find_mount_id(fd), _inode(os.fstat(fd)), place)
        except OSError:
            self._remove(path, place)
            raise
        finally:
            os.close(fd)

    def link(self, path: str, target: str) -> Shown:
        """Make a symlink, or find the same one there.

        Raises:
            OSError: EEXIST when something else is there; and as `attach`.
        """
        found = self._find(path)
        if found is None:
            try:
                made = self._make(path, target)
            except OSError:
                self._remove(path, None)
                raise
            return Shown(path, None, made, made)
        try:
            status = os.fstat(found)
            if not stat.S_ISLNK(status.st_mode) or os.readlink("", dir_fd=found) != target:
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            return Shown(path, None, _inode(status), None)
        finally:
            os.close(found)

    def detach(self, shown: Shown) -> bool:
        """Take back what was placed, and the place if it was made for it.

        QEMU can rename the directories of its private file systems, with the mount points in them, so a mount is looked up by its
        id and not by its path.

        Returns:
            Whether nothing of it is left; False when something else was attached over it since, which stays, as does it, or when
            QEMU renames a directory on the way at this very moment.

        Raises:
            OSError: the kernel refuses.
        """
        path: "str | None" = shown.path
        if shown.mount is not None:
            path = self._find_mount_point(shown.mount)
            if path is None:
                return True
            if not self._unmount(path, shown):
                return False
        if shown.place is not None:
            self._remove(path or shown.path, shown.place)
        return True

    def _unmount(self, path: str, shown: Shown) -> bool:
        """Detach the mount at a path if it is the one that was placed there; say whether it was."""
        directory, last = os.path.split(path)
        try:
            parent = mount.openat2(self._root, directory[1:] or ".", os.O_PATH | os.O_DIRECTORY, _TARGET)
            target = mount.openat2(parent, last, os.O_PATH | os.O_NOFOLLOW, _TARGET)
        except OSError as err:
            if err.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                return False
            raise
        found = self._find_mount_id(target), _inode(os.fstat(target))
        os.close(target)
        if found == (shown.mount, shown.inode):
            # By the last component alone, which cannot be renamed while it is a mount point: rename(2), EBUSY.
            os.fchdir(parent)
            mount.umount2(last, mount.MNT_DETACH | mount.UMOUNT_NOFOLLOW)
            os.chdir("/")
        os.close(parent)
        return found == (shown.mount, shown.inode)

    def _find(self, path: str) -> "int | None":
        """Return an owned fd (O_PATH) of what is at a path, of a symlink itself; None if nothing is."""
        try:
            return mount.openat2(self._root, path[1:] or ".", os.O_PATH | os.O_NOFOLLOW, _TARGET)
        except FileNotFoundError:
            return None

    def _make(self, path: str, content: "bool | str") -> "Inode":
        """Make a directory (True), an empty file (False) or a symlink, and the directories on the way; return its inode."""
        directory, last = os.path.split(path)
        found = self._find(directory)
        if found is None:
            self._make(directory, True)
        else:
            os.close(found)
        parent = self._open_writable(directory)
        try:
            if isinstance(content, str):
                os.symlink(content, last, dir_fd=parent)
            elif content:
                os.mkdir(last, _MADE_DIRECTORY, dir_fd=parent)
            else:
                os.close(os.open(last, _NEW_FILE, 0o644, dir_fd=parent))
            return _inode(os.stat(last, dir_fd=parent, follow_symlinks=False))
        finally:
            os.close(parent)

    def _remove(self, path: str, place: "Inode | None") -> None:
        """Remove a place that was made, and the directories that were made for it, as far as nothing else needs them.

        What cannot be removed stays: an empty entry in a file system that is the VM's alone.
        """
        directory, last = os.path.split(path)
        try:
            if place is not None:
                parent = self._open_writable(directory)
                status = os.stat(last, dir_fd=parent, follow_symlinks=False)
                if _inode(status) == place:
                    (os.rmdir if stat.S_ISDIR(status.st_mode) else os.unlink)(last, dir_fd=parent)
                os.close(parent)
            while directory != "/":
                directory, last = os.path.split(directory)
                parent = self._open_writable(directory)
                if not os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode & stat.S_ISVTX:
                    return
                os.rmdir(last, dir_fd=parent)
                os.close(parent)
        except OSError:
            return

    def _open_writable(self, directory: str) -> int:
        """Return an owned fd of a directory of the VM's own, in which entries can be made.

        Raises:
            OSError: ENOENT when the directory is the host's.
        """
        parent = mount.openat2(self._root, directory[1:] or ".", os.O_PATH | os.O_DIRECTORY, _TARGET)
        try:
            if _inode(os.fstat(parent)) == self._host.get(directory):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
            copy = mount.open_tree(parent, "", mount.OPEN_TREE_CLONE | mount.AT_EMPTY_PATH)
        finally:
            os.close(parent)
        mount.mount_setattr(copy, "", mount.AT_EMPTY_PATH, 0, attr_clr=mount.MOUNT_ATTR_RDONLY)
        return copy

    def _find_mount_id(self, fd: int) -> int:
        """Return the id of the mount that an fd is on."""
        text = self._read(f"fdinfo/{fd}")
        return int(next(line for line in text.splitlines() if line.startswith("mnt_id:")).partition(":")[2])

    def _find_mount_point(self, mount_id: int) -> "str | None":
        """Return where a mount is attached; None if it is not."""
        for line in self._read("mountinfo").splitlines():
            words = line.split(" ")
            if words[0] == str(mount_id):
                # Space, tab, newline and backslash are in octal: proc_pid_mountinfo(5).
                first, *rest = words[4].split("\\")
                return first + "".join(chr(int(word[:3], 8)) + word[3:] for word in rest)
        return None

    def _read(self, name: str) -> str:
        """Return a file of /proc/self."""
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._process), "rb") as file:
            return os.fsdecode(file.read())


def find_directories(paths: "Iterable[str]") -> "dict[str, Inode]":
    """Return the inode of every directory of the host on the way to real paths; must be called outside."""
    found: "dict[str, Inode]" = {}
    for path in paths:
        while path != "/":
            path = os.path.dirname(path)
            if path in found:
                break
            try:
                found[path] = _inode(os.lstat(path))
            except OSError:
                continue
    return found


def _inode(status: os.stat_result) -> "Inode":
    """Return what tells a file from others."""
    return status.st_dev, status.st_ino
