"""Convert a share from one 9p security model to another, in place.

For each entry, the directories after what they hold: first the target's attributes are written, then the host's file is changed,
then the source's attributes go. Before the second step the source's reading is right, after it the target's, and in between with
a mapped target the attributes, with passthrough those of the source. Where the host has another type of file (symlinks, devices,
pipes, sockets are regular files in the mapped models) a replacement is completed under a name of its own and changes places with
the old one in one step, renameat2(2).

So a run that is killed anywhere can be run again, and arrives at the same. Two steps are not covered by the kernel's calls: an
unprivileged caller has to add write permission to its own file before the file takes attributes, or loses them, and has to remove
it after; between those calls neither reading has the mode, the journal does. Names of one file are converted one by one, and
mapped-file keeps attributes for each: until the last has them, the others read as files of the owner; the journal knows what they
were.
A directory's time of modification is put back, but for a run that was killed within it.
"""

import os
import stat

from qemu_userns.errors import ResourceError
from qemu_userns.linux.files import exchange, open_beneath
from qemu_userns.shares import virtfs
from qemu_userns.shares.stores import (
    FILES,
    MAPPED_FILE,
    MAPPED_XATTR,
    NEW,
    NEW_METADATA,
    PASSTHROUGH,
    STORES,
    give,
    read_xattrs,
    write_xattrs,
)
from qemu_userns.shares.tree import Entry, walk
from qemu_userns.shares.wanted import ConvertedError, UnfitError, build_step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.shares.journal import Journal
    from qemu_userns.shares.virtfs import Seen
    from qemu_userns.shares.wanted import Job, Step


def scan(
    root: int, job: "Job", journal: "Journal", show: "Callable[[str, Step], None] | None" = None
) -> "tuple[int, int, list[tuple[str, str]]]":
    """Look at all entries, and change nothing.

    Args:
        root: fd of the directory; borrowed.
        job: the conversion.
        journal: of it, not started.
        show: is called with each path and what is to become of it.

    Returns:
        How many entries there are; how many of them are converted already, by a conversion that was finished; paths and reasons
        of those that cannot be converted, these with them.
    """
    problems: list[tuple[str, str]] = []
    names: dict[tuple[int, int], tuple[int, int, str]] = {}
    count = converted = 0
    for entry in walk(root, job.skip, fault=lambda path, why: problems.append((path, why))):
        if journal.resumed and entry.name.startswith(NEW):
            continue
        count += 1
        status = entry.status
        if entry.kind != stat.S_IFDIR and status.st_nlink > 1:
            known = names.get((status.st_dev, status.st_ino), (0, 0, ""))[0]
            names[status.st_dev, status.st_ino] = (known + 1, status.st_nlink, entry.path)
        try:
            step = build_step(entry, job, journal, journal.resumed)
        except UnfitError as err:
            converted += isinstance(err, ConvertedError)
            problems.append((entry.path, str(err)))
            continue
        if show is not None:
            show(entry.path, step)
    if not journal.resumed:
        problems += [(path, "has names outside of the share") for found, links, path in names.values() if found < links]
    return count, converted, problems


def convert(root: int, job: "Job", journal: "Journal", progress: "Callable[[int], None]") -> None:
    """Convert all entries.

    Args:
        root: fd of the directory; borrowed.
        job: the conversion, found possible by `scan`.
        journal: of it, started.
        progress: is called with the number of entries converted so far.

    Raises:
        ResourceError: an entry has changed meanwhile, or a step fails. What has been done stays, and is not done again.
    """
    _Conversion(root, job, journal).run(progress)


class _Conversion:
    """One run."""

    def __init__(self, root: int, job: "Job", journal: "Journal") -> None:
        self._root = root
        self._job = job
        self._journal = journal
        self._times: dict[str, tuple[int, int]] = {}

    def run(self, progress: "Callable[[int], None]") -> None:
        """Convert all entries."""
        for count, entry in enumerate(walk(self._root, self._job.skip, self._enter), 1):
            try:
                if not entry.name.startswith(NEW):
                    self._convert(entry)
            except UnfitError as err:
                raise ResourceError(entry.path, str(err), "it has changed meanwhile; run it again") from err
            except OSError as err:
                raise ResourceError(entry.path, f"cannot be converted: {err.strerror}", "mend that, and run it again") from err
            progress(count)

    def _enter(self, entry: Entry) -> None:
        """Prepare a directory: its times, its permissions, what a killed run left in it."""
        self._times[entry.path] = (entry.status.st_atime_ns, entry.status.st_mtime_ns)
        self._loosen(entry)
        fd = os.open(entry.link, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._clean(fd, entry.path)
        finally:
            os.close(fd)

    def _clean(self, fd: int, path: str) -> None:
        """Remove what a killed run left: the new file that has not taken its place yet, or the old one that has lost it.

        Raises:
            ResourceError: it is neither.
        """
        names = os.listdir(fd)
        for name in (name for name in names if name.startswith(NEW)):
            number = name.removeprefix(NEW)
            inodes = {other: os.stat(other, dir_fd=fd, follow_symlinks=False).st_ino for other in names if other != name}
            is_old = str(os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino) == number
            if name != NEW_METADATA and not is_old and number not in map(str, inodes.values()):
                raise ResourceError(f"{path}/{name}", "was left by a conversion, and what it belongs to has changed meanwhile")
            os.unlink(name, dir_fd=fd)
        if virtfs.META_DIR in names and self._job.target == MAPPED_FILE:
            metadata = open_beneath(fd, virtfs.META_DIR, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name in (name for name in os.listdir(metadata) if name.startswith(NEW)):
                    os.unlink(name, dir_fd=metadata)
            finally:
                os.close(metadata)

    def _loosen(self, entry: Entry) -> None:
        """Let an unprivileged caller write to its own file, or directory, and its attributes."""
        needed = 0o700 if entry.kind == stat.S_IFDIR else 0o600
        mode = entry.status.st_mode
        if self._job.caller != 0 and entry.kind in (stat.S_IFREG, stat.S_IFDIR) and mode & needed != needed:
            if entry.status.st_ino not in self._journal.modes:
                self._journal.note_mode(entry.status.st_ino, mode)
            os.chmod(entry.link, stat.S_IMODE(mode) | needed)
            entry.refresh()

    def _convert(self, entry: Entry) -> None:
        """Convert one entry."""
        job, source, target = self._job, STORES[self._job.source], STORES[self._job.target]
        self._loosen(entry)
        step = build_step(entry, job, self._journal, True)
        if job.target == MAPPED_FILE and entry.kind != stat.S_IFDIR and entry.status.st_nlink > 1:
            self._journal.note_seen(entry.status.st_ino, step.seen, entry.path)
        if job.target != PASSTHROUGH:
            for name, value in step.acls:
                os.setxattr(entry.link, name, value)
            if not target.read(entry).complete and not self._link_metadata(entry, step):
                target.write(entry, step.seen, step.owner)
        if entry.kind == step.kind:
            self._settle(entry, step)
        else:
            self._replace(entry, step)
            if job.source == MAPPED_XATTR:
                return  # with the old file; another name of it still needs its attributes
        source.remove(entry)
        if job.target == PASSTHROUGH and entry.kind == step.kind and entry.kind in (stat.S_IFREG, stat.S_IFDIR):
            self._set_mode(entry, step.mode)
        if entry.kind == stat.S_IFDIR:
            source.finish(entry)
            os.utime(entry.fd, ns=self._times.pop(entry.path))

    def _link_metadata(self, entry: Entry, step: "Step") -> bool:
        """Let a further name of a file have the metadata file of the first; say whether there was such, and it is right."""
        first = self._journal.first.get(entry.status.st_ino, entry.path)
        if self._job.target != MAPPED_FILE or first == entry.path:
            return False
        try:
            FILES.link(entry, self._root, first, step.owner)
        except OSError:
            return False
        kept = FILES.read(entry)
        if (kept.uid, kept.gid, kept.mode) == (step.seen.uid, step.seen.gid, step.seen.mode):
            return True
        FILES.remove(entry)
        return False

    def _settle(self, entry: Entry, step: "Step") -> None:
        """Give a file that stays the owner and the mode that it is to have."""
        if entry.kind not in (stat.S_IFREG, stat.S_IFDIR):
            give(entry.fd, step.owner)
        elif self._job.target != PASSTHROUGH:
            # The mode first: no file is set-uid of its new owner in between.
            self._set_mode(entry, step.mode)
            for name in read_xattrs(entry, "system.posix_acl_"):
                os.removexattr(entry.link, name)
            give(entry.fd, step.owner)
        else:
            give(entry.fd, step.owner)
            for name, value in step.acls:
                os.setxattr(entry.link, name, value)
            mode = step.mode
            if self._job.caller != 0 and mode & 0o600 != 0o600:
                self._journal.note_mode(entry.status.st_ino, entry.kind | mode)
                mode |= 0o600  # until its attributes are gone
            self._set_mode(entry, mode)

    def _set_mode(self, entry: Entry, mode: int) -> None:
        """Change the mode of a file if it is another; chown(2) may have cleared bits of it."""
        if stat.S_IMODE(os.fstat(entry.fd).st_mode) != mode:
            os.chmod(entry.link, mode)

    def _replace(self, entry: Entry, step: "Step") -> None:
        """Put a file of another type in the place of an entry.

        Raises:
            ResourceError: somebody else has put another file there; it is there again.
        """
        new = f"{NEW}{entry.status.st_ino}"
        if not self._link(entry, new):
            fd = _make_regular(entry, step.seen, new, self._job) if step.kind == stat.S_IFREG else _make_special(entry, step, new)
            try:
                number = os.fstat(fd).st_ino
            finally:
                os.close(fd)
            if entry.status.st_nlink > 1:
                self._journal.note_link(entry.status.st_ino, entry.path, number)
        exchange(entry.dirfd, new, entry.name)
        found = os.stat(new, dir_fd=entry.dirfd, follow_symlinks=False)
        if (found.st_dev, found.st_ino) != (entry.status.st_dev, entry.status.st_ino):
            exchange(entry.dirfd, new, entry.name)
            os.unlink(new, dir_fd=entry.dirfd)
            raise ResourceError(entry.path, "has been replaced meanwhile", "nothing else may change the share; run it again")
        os.unlink(new, dir_fd=entry.dirfd)

    def _link(self, entry: Entry, new: str) -> bool:
        """Make a further name of what has replaced another name of an entry; say whether there was such."""
        path, number = self._journal.links.get(entry.status.st_ino, ("", 0))
        if entry.status.st_ino not in self._journal.links:
            return False
        head, _, name = path.rpartition("/")
        try:
            dirfd = open_beneath(self._root, head or ".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            if os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_ino != number:
                return False
            os.link(name, new, src_dir_fd=dirfd, dst_dir_fd=entry.dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.close(dirfd)
        return os.stat(new, dir_fd=entry.dirfd, follow_symlinks=False).st_ino == number


def _make_regular(entry: Entry, seen: "Seen", new: str, job: "Job") -> int:
    """Make the regular file that stands for a special one; return an owned fd."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600, dir_fd=entry.dirfd)
    if seen.kind == stat.S_IFLNK:
        os.write(fd, os.fsencode(os.readlink("", dir_fd=entry.fd)))
    if job.target == MAPPED_XATTR:
        write_xattrs(fd, seen)
    os.fchmod(fd, 0o600)
    give(fd, job.owner)
    os.utime(fd, ns=(entry.status.st_atime_ns, entry.status.st_mtime_ns))
    os.fsync(fd)
    return fd


def _make_special(entry: Entry, step: "Step", new: str) -> int:
    """Make the special file that a regular one stands for; return an owned O_PATH fd.

    Raises:
        UnfitError: the target of a symlink is none.
        ResourceError: somebody else has put another file in its place.
    """
    if step.kind == stat.S_IFLNK:
        os.symlink(_read_target(entry), new, dir_fd=entry.dirfd)
    else:
        os.mknod(new, step.kind | 0o600, step.seen.rdev, dir_fd=entry.dirfd)
    fd = open_beneath(entry.dirfd, new, os.O_PATH | os.O_NOFOLLOW)
    made = Entry(entry.dirfd, new, fd, new)
    if made.kind != step.kind or made.status.st_nlink != 1 or made.status.st_uid != os.geteuid():
        os.close(fd)
        raise ResourceError(entry.path, "has been replaced meanwhile", "nothing else may change the share; run it again")
    give(fd, step.owner)
    if step.kind != stat.S_IFLNK:
        os.chmod(made.link, step.mode)
    times = (entry.status.st_atime_ns, entry.status.st_mtime_ns)
    os.utime(new, ns=times, dir_fd=entry.dirfd, follow_symlinks=False)
    return fd


def _read_target(entry: Entry) -> bytes:
    """Return the target of a symlink that is a regular file."""
    fd = os.open(entry.link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.read(fd, 4096)
    finally:
        os.close(fd)
    if not target or b"\0" in target or len(target) > 4095:
        raise UnfitError("is no target of a symlink")
    return target
