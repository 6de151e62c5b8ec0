"""Steps that put drop-in entries into a directory, and into the places of packaged programs."""

import os

from qemu_userns.errors import ResourceError
from qemu_userns.hooks.files import NEW, act, make_directories, read_text, remove_directories, save_files
from qemu_userns.hooks.install import PROXY_HELPER, find_qemus, install, list_own_files, uninstall
from qemu_userns.hooks.steps import STANDARD_PATH, Fault, Step, run
from qemu_userns.host.qemu import DIVERTED, is_own_entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Entries(Step):
    """A directory with the drop-in entries, of one hook alone."""

    directory: str

    def describe(self) -> str:
        """Say what it does."""
        return f"put an entry for each QEMU into {self.directory}: {self.why}"

    def list_files(self, root: str) -> "tuple[str, ...]":
        """Return those of ours that are there, and one that will be."""
        names = {PROXY_HELPER, *(name.removesuffix(NEW) for name in list_own_files(root + self.directory))}
        return tuple(f"{self.directory}/{name}" for name in sorted(names))

    def save(self, root: str) -> "Callable[[], None]":
        """Return what brings back the files that are there now, and removes others of ours."""
        directory = root + self.directory
        restore_files = save_files(root + path for path in self.list_files(root))
        before = list_own_files(directory)

        def restore() -> None:
            for name in list_own_files(directory):
                if name not in before:
                    act(os.unlink, os.path.join(directory, name))
            restore_files()

        return restore

    def apply(self, root: str) -> bool:
        """Install them, anew where they are there."""
        was_there = self.find_fault(root) is None
        make_directories(root + self.directory)
        install(self.directory, STANDARD_PATH, root)
        return not was_there

    def undo(self, root: str) -> bool:
        """Remove them, and the directory if that was all it had, and the one above."""
        removed = uninstall(root + self.directory)
        remove_directories([root + self.directory, os.path.dirname(root + self.directory)])
        return removed

    def find_fault(self, root: str) -> "Fault | None":
        """Look for an entry of each QEMU."""
        missing = [name for name in find_qemus(STANDARD_PATH, root) if not is_own_entry(f"{root}{self.directory}/{name}")]
        if not os.path.exists(f"{root}{self.directory}/{PROXY_HELPER}"):
            missing.append(PROXY_HELPER)
        return Fault(self.directory, f"has no entry {', '.join(missing)}") if missing else None


class Diversion(Step):
    """The entry in the place of a packaged program, which dpkg keeps under another name from then on: dpkg-divert(1).

    dpkg-divert only notes it. It would rename the program, and there would be none at its path until the link is; here, wherever
    this is killed, one of them is.
    """

    path: str
    entry: str

    def describe(self) -> str:
        """Say what it does."""
        return f"divert {self.path} to {self.path}{DIVERTED}, and link {self.entry} there: {self.why}"

    def list_files(self, _root: str) -> "tuple[str, ...]":
        """Return the program's path, and the one where it is kept."""
        return (self.path, self.path + DIVERTED)

    def save(self, root: str) -> "Callable[[], None]":
        """Return what undoes it, if there is nothing of it now."""
        plain = not self._is_noted(root) and not os.path.lexists(root + self.path + DIVERTED)

        def restore() -> None:
            if plain:
                self.undo(root)

        return restore

    def apply(self, root: str) -> bool:
        """Divert, and link."""
        if self.find_fault(root) is None:
            return False
        path, kept = root + self.path, root + self.path + DIVERTED
        if not self._is_linked(root):
            if os.path.lexists(path) and os.path.lexists(kept) and not _is_same(path, kept):
                hint = "it is diverted already: leave out --divert, or undo the diversion that there is"
                raise ResourceError(path, f"is not this hook's link, and {kept} is there as well", hint)
            self._note(root, "--add")
            if not os.path.lexists(kept):
                act(_link, path, kept)
            act(os.symlink, self.entry, path + NEW)
            act(os.rename, path + NEW, path)
        else:
            self._note(root, "--add")
        return True

    def undo(self, root: str) -> bool:
        """Put the program back where it was, if it is still there, and remove the diversion."""
        path, kept = root + self.path, root + self.path + DIVERTED
        linked, noted = self._is_linked(root), self._is_noted(root)
        if not linked and not noted:
            return False
        if linked or not os.path.lexists(path):
            if os.path.lexists(kept):
                act(os.rename, kept, path)
            elif linked:
                act(os.unlink, path)  # the package is gone, and the program with it
        elif _is_same(path, kept):
            act(os.unlink, kept)
        elif os.path.lexists(kept):
            raise ResourceError(path, f"is not this hook's link, and {kept} is there as well", "keep one of them, by hand")
        if noted:
            self._note(root, "--remove")
        return True

    def find_fault(self, root: str) -> "Fault | None":
        """Look for the link, for the program, and for dpkg's note."""
        kept = self.path + DIVERTED
        if not self._is_linked(root):
            return Fault(self.path, f"is no link to {self.entry}")
        if not os.path.lexists(root + kept):
            return Fault(kept, "is not there", "install its package again, or undo the hook")
        return None if self._is_noted(root) else Fault(self.path, "dpkg knows of no diversion")

    def _is_linked(self, root: str) -> bool:
        return find_link(root + self.path) == self.entry

    def _is_noted(self, root: str) -> bool:
        return self.path in list_diverted(root)

    def _note(self, root: str, action: str) -> None:
        """Have dpkg note the diversion, or forget it; it is no error if that is so already."""
        where = ["--root", root] if root else []
        run(["dpkg-divert", *where, "--local", "--no-rename", "--divert", self.path + DIVERTED, action, self.path])


def list_diverted(root: str) -> "list[str]":
    """Return the paths that somebody other than a package has diverted to where a hook does.

    Source: dpkg's list, of which three lines are for each: the path, where it is kept, and for which package (":", none).
    """
    lines = (read_text(f"{root}/var/lib/dpkg/diversions") or "").splitlines()
    noted = zip(lines[::3], lines[1::3], lines[2::3], strict=False)
    return [path for path, kept, package in noted if (kept, package) == (path + DIVERTED, ":")]


def find_link(path: str) -> "str | None":
    """Return where a symlink leads, None for what is none."""
    try:
        return os.readlink(path)
    except OSError:
        return None


def _link(path: str, other: str) -> None:
    """Give a file, or a symlink itself, another name."""
    os.link(path, other, follow_symlinks=False)


def _is_same(path: str, other: str) -> bool:
    """Say whether two names are those of one file, or symlink."""
    try:
        return os.path.samestat(os.lstat(path), os.lstat(other))
    except OSError:
        return False
