"""What sets another program up to start the drop-in: steps that can be seen before, done, checked, and undone to the byte.

A file of ours begins with a line that has the digest of the rest. So whether it is as we left it can be told from itself, also by
a later version of this program; what somebody has changed since is reported, never overwritten or removed.
"""

import hashlib
import os
import subprocess

from qemu_userns.errors import HostError, QemuUsernsError, ResourceError
from qemu_userns.hooks.install import PROXY_HELPER, find_qemus, install, uninstall
from qemu_userns.host.qemu import DIVERTED, is_own_entry
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MARK = "# qemu-userns hook "
STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # systemd's
_CHANGED_HINT = "move it away, or remove what the hook wrote by hand, and run it again"
_ALONE, _ADDED = "# The rest of this file.\n", "# Added to this file.\n"
_TEXT_MAX = 1 << 20


class Fault(Record):
    """Something that is not as it has to be."""

    what: str
    why: str
    hint: "str | None" = None


class Setup(Record):
    """What was found, and what makes of it what it should be."""

    findings: "tuple[str, ...]"
    steps: "tuple[Step, ...]"
    faults: "tuple[Fault, ...]"
    by_hand: "tuple[str, ...]"  # what is left to do


class Step(Record):
    """One change of the host. Paths are those that the host has once it runs; `root` is the directory where it is now."""

    why: str

    def describe(self) -> str:
        """Say what it does, in one line."""
        raise NotImplementedError

    def apply(self, root: str) -> bool:
        """Do it; return whether anything has changed.

        Raises:
            ResourceError: a file is in the way, or cannot be written.
            HostError: a program is missing, or fails.
        """
        raise NotImplementedError

    def undo(self, root: str) -> bool:
        """Undo it; return whether anything has changed. What is not there is no error, so a step half done can be undone.

        Raises:
            ResourceError: it has been changed since, or cannot be removed.
            HostError: a program is missing, or fails.
        """
        raise NotImplementedError

    def find_fault(self, root: str) -> "Fault | None":
        """Return why it is not done."""
        raise NotImplementedError


class Entries(Step):
    """A directory with the drop-in entries."""

    directory: str

    def describe(self) -> str:
        """Say what it does."""
        return f"put an entry for each QEMU into {self.directory}: {self.why}"

    def apply(self, root: str) -> bool:
        """Install them, anew where they are there."""
        was_there = self.find_fault(root) is None
        made = _make_directories(root + self.directory)
        try:
            install(self.directory, STANDARD_PATH, root)
        except QemuUsernsError:
            if not was_there:
                uninstall(root + self.directory)
            _remove_directories(made)
            raise
        return not was_there

    def undo(self, root: str) -> bool:
        """Remove them, and the directory if that was all it had."""
        removed = uninstall(root + self.directory)
        _remove_directories([root + self.directory])
        return removed

    def find_fault(self, root: str) -> "Fault | None":
        """Look for an entry of each QEMU."""
        missing = [name for name in find_qemus(STANDARD_PATH, root) if not is_own_entry(f"{root}{self.directory}/{name}")]
        if not os.path.exists(f"{root}{self.directory}/{PROXY_HELPER}"):
            missing.append(PROXY_HELPER)
        return Fault(self.directory, f"has no entry {', '.join(missing)}") if missing else None


class File(Step):
    """A file of ours."""

    path: str
    text: str

    def describe(self) -> str:
        """Say what it does."""
        return f"write {self.path}: {self.why}"

    def apply(self, root: str) -> bool:
        """Write it, unless it is there."""
        path, data = root + self.path, _sign(self.text)
        found = read_text(path)
        if found == data:
            return False
        if found is not None and not _is_signed(found):
            raise ResourceError(path, "is there, and not as a hook has written it", _CHANGED_HINT)
        made = _make_directories(os.path.dirname(path))
        try:
            write_text(path, data)
        except ResourceError:
            _remove_directories(made)
            raise
        return True

    def undo(self, root: str) -> bool:
        """Remove it, and directories that it alone was in."""
        path = root + self.path
        found = read_text(path)
        if found is None:
            return False
        if not _is_signed(found):
            raise ResourceError(path, "has been changed since a hook wrote it, and is left alone", "remove it by hand")
        _act(os.unlink, path)
        _remove_directories([os.path.dirname(path)])
        return True

    def find_fault(self, root: str) -> "Fault | None":
        """Compare it."""
        found = read_text(root + self.path)
        if found is None:
            return Fault(self.path, "is not there")
        return None if found == _sign(self.text) else Fault(self.path, "is not as this version writes it")


class Block(Step):
    """Lines of ours at the end of somebody else's file."""

    path: str
    text: str

    def describe(self) -> str:
        """Say what it does."""
        return f"add to {self.path}: {self.why}"

    def apply(self, root: str) -> bool:
        """Add them, unless they are there; those of another version are replaced."""
        if self.find_fault(root) is None:
            return False
        before, _ = self._read(root)
        made = _make_directories(os.path.dirname(root + self.path))
        try:
            write_text(root + self.path, (before or "") + self._build(before is None))
        except ResourceError:
            _remove_directories(made)
            raise
        return True

    def undo(self, root: str) -> bool:
        """Take them away, and the file if it was made for them."""
        before, block = self._read(root)
        if block is None:
            return False
        if before is None:
            _act(os.unlink, root + self.path)
            _remove_directories([os.path.dirname(root + self.path)])
        else:
            write_text(root + self.path, before)
        return True

    def find_fault(self, root: str) -> "Fault | None":
        """Compare them."""
        before, block = self._read(root)
        if block is None:
            return Fault(self.path, "has no lines of the hook's")
        return None if block == self._build(before is None) else Fault(self.path, "has other lines than this version's")

    def _build(self, alone: bool) -> str:
        """Return the lines; the first says whether the file is there for them alone."""
        return _sign(f"{_ALONE if alone else _ADDED}{self.text}")

    def _read(self, root: str) -> "tuple[str | None, str | None]":
        """Return what others have in the file, None where it is not or would not be there, and the lines, None without any.

        Raises:
            ResourceError: the lines have been changed since, or the last line of the file has no end.
        """
        found = read_text(root + self.path)
        before, mark, block = (found or "").partition(MARK)
        if not mark:
            if before and not before.endswith("\n"):
                raise ResourceError(root + self.path, "its last line does not end", "end it with a newline")
            return found, None
        if not _is_signed(mark + block):
            raise ResourceError(root + self.path, "has lines of a hook's that have been changed since", _CHANGED_HINT)
        alone = block.partition("\n")[2].startswith(_ALONE) and not before
        return (None if alone else before), mark + block


class Diversion(Step):
    """The entry in the place of a packaged program, which dpkg keeps under another name from then on: dpkg-divert(1)."""

    path: str
    entry: str

    def describe(self) -> str:
        """Say what it does."""
        return f"divert {self.path} to {self.path}{DIVERTED}, and link {self.entry} there: {self.why}"

    def apply(self, root: str) -> bool:
        """Divert, and link."""
        if self.find_fault(root) is None:
            return False
        run(self._divert(root, "--add"))
        if not os.path.lexists(root + self.path):
            _act(os.symlink, self.entry, root + self.path)
        return True

    def undo(self, root: str) -> bool:
        """Remove the link, and the diversion."""
        path = root + self.path
        if not os.path.lexists(path + DIVERTED):
            return False
        if os.path.islink(path) and os.readlink(path) == self.entry:
            _act(os.unlink, path)
        run(self._divert(root, "--remove"))
        return True

    def find_fault(self, root: str) -> "Fault | None":
        """Look for the link, and for the program."""
        path = root + self.path
        if not os.path.islink(path) or os.readlink(path) != self.entry:
            return Fault(self.path, f"is no link to {self.entry}")
        return None if os.path.lexists(path + DIVERTED) else Fault(path + DIVERTED, "is not there")

    def _divert(self, root: str, action: str) -> "list[str]":
        return [
            "dpkg-divert",
            *(["--root", root] if root else []),
            *("--local", "--rename", "--divert", self.path + DIVERTED, action, self.path),
        ]


class Command(Step):
    """A program that has to be run when files have changed; on the running host only."""

    argv: "tuple[str, ...]"

    def describe(self) -> str:
        """Say what it does."""
        return f"run {' '.join(self.argv)}: {self.why}"

    def apply(self, root: str) -> bool:
        """Run it."""
        if not root:
            run(list(self.argv))
        return False

    undo = apply

    def find_fault(self, root: str) -> "Fault | None":
        """Return none: what it does cannot be seen."""
        return None


def apply(steps: "Sequence[Step]", root: str) -> "list[Step]":
    """Do all steps, or none: where one fails, those that this call has done are undone.

    Returns:
        Those that have changed something.

    Raises:
        ResourceError, HostError: a step fails.
    """
    done: list[Step] = []
    try:
        for step in steps:
            if isinstance(step, Command) and not done:
                continue
            if step.apply(root):
                done.append(step)
    except QemuUsernsError:
        for step in reversed(done):
            step.undo(root)
        raise
    return done


def undo(steps: "Sequence[Step]", root: str) -> "tuple[list[Step], list[QemuUsernsError]]":
    """Undo all steps, the last first but for commands; return those that have changed something, and what could not be undone."""
    done: list[Step] = []
    faults: list[QemuUsernsError] = []
    commands = [step for step in steps if isinstance(step, Command)]
    for step in [*(step for step in reversed(steps) if step not in commands), *commands]:
        if step in commands and not done:
            continue
        try:
            if step.undo(root):
                done.append(step)
        except (ResourceError, HostError) as err:
            faults.append(err)
    return done, faults


def run(argv: "list[str]") -> None:
    """Run a program.

    Raises:
        HostError: it is missing, or fails; its words are the reason.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as err:
        raise HostError(argv[0], err.strerror or str(err)) from err
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(" ".join(argv), lines[-1] if lines else f"exit status {done.returncode}")


def read_text(path: str, size: "int | None" = _TEXT_MAX) -> "str | None":
    """Return what a file has; None if there is none.

    Raises:
        ResourceError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise ResourceError(path, err.strerror or str(err)) from err


def write_text(path: str, text: str, mode: int = 0o644) -> None:
    """Write a file beside its place and move it there.

    Raises:
        ResourceError: it cannot be written; nothing is left.
    """
    temporary = f"{path}.qemu-userns-new"
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
                os.fchmod(fd, mode)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as err:
        raise ResourceError(path, err.strerror or str(err)) from err


def _sign(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _is_signed(text: str) -> bool:
    """Say whether a file is as a hook of any version has written it."""
    return text == _sign(text.partition("\n")[2])


def _make_directories(path: str) -> "list[str]":
    """Make a directory and those above it; return the ones that were missing, the deepest first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        _act(os.mkdir, directory)
    return missing


def _remove_directories(paths: "list[str]") -> None:
    """Remove directories that are empty, the first first."""
    for path in paths:
        try:
            os.rmdir(path)
        except OSError:
            return


def _act(function: "Callable[..., None]", *arguments: str) -> None:
    """Call a function of os; the path of its error is the last argument."""
    try:
        function(*arguments)
    except OSError as err:
        raise ResourceError(arguments[-1], err.strerror or str(err)) from err
