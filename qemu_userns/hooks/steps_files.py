"""Steps that write files of ours, and lines of ours in others' files.

What is ours begins with a line that has the digest of the rest. So whether it is as we left it can be told from itself, also by
a later version of this program; what somebody has changed since is reported, never overwritten or removed.
"""

import hashlib
import os

from qemu_userns.errors import ResourceError
from qemu_userns.hooks.files import act, make_directories, read_text, remove_directories, write_text
from qemu_userns.hooks.steps import Fault, Step

MARK = "# qemu-userns hook "
_CHANGED_HINT = "move it away, or remove what the hook wrote by hand, and run it again"
_ALONE, _ADDED = "# The rest of this file.\n", "# Added to this file.\n"


class File(Step):
    """A file of ours."""

    path: str
    text: str

    def describe(self) -> str:
        """Say what it does."""
        return f"write {self.path}: {self.why}"

    def list_files(self, _root: str) -> "tuple[str, ...]":
        """Return its path."""
        return (self.path,)

    def apply(self, root: str) -> bool:
        """Write it, unless it is there."""
        path, data = root + self.path, _sign(self.text)
        found = _read(path)
        if found == data:
            return False
        if found is not None and not _is_signed(found):
            raise ResourceError(path, "is there, and not as a hook has written it", _CHANGED_HINT)
        make_directories(os.path.dirname(path))
        write_text(path, data)
        return True

    def undo(self, root: str) -> bool:
        """Remove it, and the directory if it alone was in it."""
        path = root + self.path
        found = _read(path)
        if found is not None:
            if not _is_signed(found):
                raise ResourceError(path, "has been changed since a hook wrote it, and is left alone", "remove it by hand")
            act(os.unlink, path)
        remove_directories([os.path.dirname(path)])
        return found is not None

    def find_fault(self, root: str) -> "Fault | None":
        """Compare it."""
        found = _read(root + self.path)
        if found is None:
            return Fault(self.path, "is not there")
        return None if found == _sign(self.text) else Fault(self.path, "is not as this version writes it")


class Block(Step):
    """Lines of ours at the end of somebody else's file, whose mode and owner stay."""

    path: str
    text: str

    def describe(self) -> str:
        """Say what it does."""
        return f"add to {self.path}: {self.why}"

    def list_files(self, _root: str) -> "tuple[str, ...]":
        """Return its path."""
        return (self.path,)

    def apply(self, root: str) -> bool:
        """Add them, unless they are there; those of another version are replaced."""
        if self.find_fault(root) is None:
            return False
        before, _ = self._split(root)
        make_directories(os.path.dirname(root + self.path))
        write_text(root + self.path, (before or "") + self._build(before is None))
        return True

    def undo(self, root: str) -> bool:
        """Take them away, and the file if it was made for them."""
        before, block = self._split(root)
        if block is None:
            return False
        if before is None:
            act(os.unlink, root + self.path)
            remove_directories([os.path.dirname(root + self.path)])
        else:
            write_text(root + self.path, before)
        return True

    def find_fault(self, root: str) -> "Fault | None":
        """Compare them."""
        before, block = self._split(root)
        if block is None:
            return Fault(self.path, "has no lines of the hook's")
        return None if block == self._build(before is None) else Fault(self.path, "has other lines than this version's")

    def _build(self, alone: bool) -> str:
        """Return the lines; the first says whether the file is there for them alone."""
        return _sign(f"{_ALONE if alone else _ADDED}{self.text}")

    def _split(self, root: str) -> "tuple[str | None, str | None]":
        """Return what others have in the file, None where it is not or would not be there, and the lines, None without any.

        Raises:
            ResourceError: the lines have been changed since, or the last line of the file has no end.
        """
        found = _read(root + self.path)
        before, mark, block = (found or "").partition(MARK)
        if not mark:
            if before and not before.endswith("\n"):
                raise ResourceError(root + self.path, "its last line does not end", "end it with a newline")
            return found, None
        if not _is_signed(mark + block):
            raise ResourceError(root + self.path, "has lines of a hook's that have been changed since", _CHANGED_HINT)
        alone = block.partition("\n")[2].startswith(_ALONE) and not before
        return (None if alone else before), mark + block


def _read(path: str) -> "str | None":
    """Return what a file has that is no symlink, None if there is none; raises ResourceError."""
    if os.path.islink(path):
        raise ResourceError(path, "is a symlink, and is left alone", "put a file in its place")
    return read_text(path)


def _sign(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()}\n{text}"


def _is_signed(text: str) -> bool:
    """Say whether a file is as a hook of any version has written it."""
    return text == _sign(text.partition("\n")[2])
