"""Where the mapped security models keep what the guest sees, on the disk: read it, write it, remove it."""

import os
import stat

from qemu_userns.errors import ResourceError
from qemu_userns.linux.files import chown_fd, open_beneath
from qemu_userns.shares import virtfs
from qemu_userns.shares.tree import ROOT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.shares.tree import Entry
    from qemu_userns.shares.virtfs import Kept, Seen

PASSTHROUGH, MAPPED_XATTR, MAPPED_FILE = "passthrough", "mapped-xattr", "mapped-file"
MODELS = (PASSTHROUGH, MAPPED_XATTR, MAPPED_FILE)
NEW = ".virtfs_convert-"  # what the names of files begin with that are not complete yet
NEW_METADATA = f"{NEW}metadata"
_METADATA_MAX = 4096  # bytes


class NoStore:
    """passthrough and none: nothing is kept beside the file."""

    def read(self, entry: "Entry") -> "Kept":
        """Return what is kept."""
        return virtfs.Kept()

    def write(self, entry: "Entry", seen: "Seen", owner: "tuple[int, int]") -> None:
        """Keep it."""

    def remove(self, entry: "Entry") -> None:
        """Keep it no longer."""

    def finish(self, entry: "Entry") -> None:
        """Remove what was made for a directory's entries, after the last of them."""


class XattrStore(NoStore):
    """mapped-xattr. Symlinks, and what is no file of the disk's, have no user attributes: xattr(7)."""

    def read(self, entry: "Entry") -> "Kept":
        """Return what is kept."""
        return virtfs.parse_xattrs(read_xattrs(entry, virtfs.PREFIX))

    def write(self, entry: "Entry", seen: "Seen", owner: "tuple[int, int]") -> None:
        """Keep it; on a special file not at all, its replacement has it."""
        if entry.kind in (stat.S_IFREG, stat.S_IFDIR):
            write_xattrs(entry.fd, seen)

    def remove(self, entry: "Entry") -> None:
        """Keep it no longer; the mode goes last."""
        for name in sorted(read_xattrs(entry, virtfs.PREFIX), key=lambda name: name == virtfs.PREFIX + "mode"):
            os.removexattr(entry.link, name)


class FileStore(NoStore):
    """mapped-file."""

    def read(self, entry: "Entry") -> "Kept":
        """Return what is kept."""
        dirfd = self._open_dir(entry)
        if dirfd is None:
            return virtfs.Kept()
        try:
            fd = open_beneath(dirfd, _metadata_name(entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return virtfs.Kept()  # as QEMU, which takes what it cannot open for missing
        finally:
            os.close(dirfd)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return virtfs.Kept()
            return virtfs.parse_metadata(file.read(_METADATA_MAX))

    def write(self, entry: "Entry", seen: "Seen", owner: "tuple[int, int]") -> None:
        """Keep it, all or nothing."""
        data = virtfs.build_metadata(seen)
        dirfd = self._make_dir(entry, owner)
        try:
            fd = os.open(NEW_METADATA, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
            try:
                os.write(fd, data)
                give(fd, owner)
            finally:
                os.close(fd)
            os.rename(NEW_METADATA, _metadata_name(entry), src_dir_fd=dirfd, dst_dir_fd=dirfd)
        finally:
            os.close(dirfd)

    def link(self, entry: "Entry", root: int, path: str, owner: "tuple[int, int]") -> None:
        """Let an entry have the metadata file of another name of the same file, as QEMU does it.

        Args:
            entry: that has none.
            root: fd of the share's root; borrowed.
            path: of the other name, from there.
            owner: of a metadata directory that has to be made.

        Raises:
            OSError: the other name has none.
        """
        head, _, name = path.rpartition("/")
        other = open_beneath(root, f"{head or ROOT}/{virtfs.META_DIR}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            dirfd = self._make_dir(entry, owner)
            try:
                os.link(name, entry.name, src_dir_fd=other, dst_dir_fd=dirfd, follow_symlinks=False)
            finally:
                os.close(dirfd)
        finally:
            os.close(other)

    def remove(self, entry: "Entry") -> None:
        """Keep it no longer."""
        dirfd = self._open_dir(entry)
        if dirfd is None:
            return
        try:
            os.unlink(_metadata_name(entry), dir_fd=dirfd)
        except FileNotFoundError:
            pass
        finally:
            os.close(dirfd)

    def finish(self, entry: "Entry") -> None:
        """Remove the metadata directory; what is left in it describes nothing that is there."""
        try:
            fd = open_beneath(entry.fd, virtfs.META_DIR, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            for name in os.listdir(fd):
                os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(virtfs.META_DIR, dir_fd=entry.fd)

    def _make_dir(self, entry: "Entry", owner: "tuple[int, int]") -> int:
        """Return an owned fd of the directory for the metadata file, made if it is missing."""
        dirfd = self._open_dir(entry)
        if dirfd is None:
            os.mkdir(virtfs.META_DIR, 0o700, dir_fd=entry.dirfd)
            dirfd = open_beneath(entry.dirfd, virtfs.META_DIR, os.O_RDONLY | os.O_DIRECTORY)
        if entry.name != ROOT:
            give(dirfd, owner)
        return dirfd

    def _open_dir(self, entry: "Entry") -> "int | None":
        """Return an owned fd of the directory that has the metadata file; None if there is none."""
        name = ROOT if entry.name == ROOT else virtfs.META_DIR
        try:
            return open_beneath(entry.dirfd, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise ResourceError(f"{virtfs.META_DIR} beside {entry.path}", str(err.strerror)) from err


FILES = FileStore()
STORES = {PASSTHROUGH: NoStore(), MAPPED_XATTR: XattrStore(), MAPPED_FILE: FILES}


def read_xattrs(entry: "Entry", prefix: str) -> "dict[str, bytes]":
    """Return the extended attributes whose names begin with a prefix; none of what can have none."""
    if entry.kind not in (stat.S_IFREG, stat.S_IFDIR):
        return {}
    try:
        return {name: os.getxattr(entry.link, name) for name in os.listxattr(entry.link) if name.startswith(prefix)}
    except OSError as err:
        if err.errno == 95:  # EOPNOTSUPP: no attributes on this file system
            return {}
        raise


def write_xattrs(fd: int, seen: "Seen") -> None:
    """Write what mapped-xattr keeps; the mode, which completes it, last."""
    for name, value in virtfs.build_xattrs(seen).items():
        os.setxattr(f"/proc/self/fd/{fd}", name, value)


def give(fd: int, owner: "tuple[int, int]") -> None:
    """Change the owner of an open file, if it is another."""
    status = os.fstat(fd)
    if (status.st_uid, status.st_gid) != owner:
        chown_fd(fd, *owner)


def _metadata_name(entry: "Entry") -> str:
    return virtfs.META_ROOT if entry.name == ROOT else entry.name
