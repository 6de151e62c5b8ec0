"""The journal of a conversion: a file beside the share, out of its guests' reach, there from the first change to the last.

Its first line says which conversion it is; only the same one goes on with it. Each further line is on the disk before the step
that needs it: a mode that an unprivileged caller has to change before it can be kept, what the guest sees of a file with several
names, and where the replacement of a special file with several names is.
"""

import fcntl
import json
import os
import stat

from qemu_userns.errors import ResourceError, UsageError
from qemu_userns.shares.virtfs import Seen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def find_journal(root: str) -> str:
    """Return the path of a share's journal."""
    head, name = os.path.split(os.path.realpath(root))
    if not name:
        raise UsageError(root, "the whole host tree is no share")
    return os.path.join(head, f".{name}.share-convert")


class Journal:
    """What is written, and was written by a run that was killed."""

    def __init__(self, path: str, head: "Mapping[str, object]") -> None:
        """Read what there is, and write nothing yet.

        Args:
            path: from `find_journal`.
            head: which conversion it is.

        Raises:
            ResourceError: somebody else's, or unreadable.
            UsageError: another conversion has been begun.
        """
        self.path = path
        self.modes: dict[int, int] = {}
        self.seen: dict[int, Seen] = {}
        self.first: dict[int, str] = {}
        self.links: dict[int, tuple[str, int]] = {}
        self._head = dict(head)
        self._fd: int | None = None
        lines = self._read()
        self.resumed = bool(lines)
        if lines and lines[0] != self._head:
            begun = json.dumps(lines[0], sort_keys=True)
            raise UsageError(path, f"another conversion has been begun: {begun}", "run that one again, to its end, first")
        for line in lines[1:]:
            self._take(line)

    def start(self) -> None:
        """Open it for writing, and lock it.

        Raises:
            ResourceError: it cannot be made, or another process converts.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self.close(False)
            raise ResourceError(self.path, "another process converts this share") from err
        except OSError as err:
            raise ResourceError(self.path, f"the journal cannot be written: {err.strerror}") from err
        if self.resumed:
            size = os.fstat(self._fd).st_size
            data = os.pread(self._fd, size, 0)
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)  # the end of a line that a killed run had not finished
        else:
            os.ftruncate(self._fd, 0)
            self._write(self._head)
            _sync_dir(os.path.dirname(self.path))

    def note_mode(self, inode: int, mode: int) -> None:
        """Remember the mode of a file."""
        if self.modes.get(inode) != mode:
            self._note({"inode": inode, "mode": mode})

    def note_seen(self, inode: int, seen: Seen, path: str) -> None:
        """Remember what the guest sees of a file with several names, and the first of them."""
        if inode not in self.seen:
            values = [seen.uid, seen.gid, seen.mode, seen.rdev]
            self._note({"inode": inode, "seen": values, "path": os.fsencode(path).hex()})

    def note_link(self, inode: int, path: str, new: int) -> None:
        """Remember what replaces a file: the path that it will have within the share, and its inode number."""
        self._note({"inode": inode, "path": os.fsencode(path).hex(), "new": new})

    def close(self, done: bool) -> None:
        """Close it, and remove it when the conversion is done."""
        if self._fd is not None:
            if done:
                os.unlink(self.path)
            os.close(self._fd)
            self._fd = None

    def _note(self, line: "Mapping[str, object]") -> None:
        self._write(line)
        self._take(line)

    def _write(self, line: "Mapping[str, object]") -> None:
        if self._fd is None:
            raise ValueError("the journal is not open")
        os.write(self._fd, json.dumps(line).encode() + b"\n")
        os.fsync(self._fd)

    def _take(self, line: "Mapping[str, object]") -> None:
        inode = line["inode"]
        if not isinstance(inode, int):
            raise ResourceError(self.path, "no journal of this program")
        mode, seen, path, new = (line.get(key) for key in ("mode", "seen", "path", "new"))
        if isinstance(mode, int):
            self.modes[inode] = mode
        elif isinstance(seen, list) and isinstance(path, str):
            self.seen[inode] = Seen(*seen)
            self.first[inode] = os.fsdecode(bytes.fromhex(path))
        elif isinstance(path, str) and isinstance(new, int):
            self.links[inode] = (os.fsdecode(bytes.fromhex(path)), new)

    def _read(self) -> "list[dict[str, object]]":
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        except OSError as err:
            raise ResourceError(self.path, f"the journal cannot be read: {err.strerror}") from err
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ResourceError(self.path, "is in the way, and not a journal that only the caller could write")
            lines = file.read().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as err:
            raise ResourceError(self.path, "no journal of this program") from err


def _sync_dir(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
