"""What sets another program up to start the drop-in: steps that can be seen before, done, checked, and undone to the byte.

A hook may be killed at any line. So each step is one that can be done, or undone, again from wherever it was left, and the next
run does.
"""

import os
import subprocess

from qemu_userns.errors import HostError, QemuUsernsError, ResourceError
from qemu_userns.hooks.files import check_place, remove_leftover, save_files
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # systemd's


class Fault(Record):
    """Something that is not as it has to be."""

    what: str
    why: str
    hint: "str | None" = None


class Setup(Record):
    """What was found, and what makes of it what it should be."""

    findings: "tuple[str, ...]"
    steps: "tuple[Step, ...]"
    obstacles: "tuple[Fault, ...]"  # with which no step is of any use
    faults: "tuple[Fault, ...]"  # what the steps do not mend
    by_hand: "tuple[str, ...]"  # what is left to do


class Step(Record):
    """One change of the host. Paths are those that the host has once it runs; `root` is the directory where it is now."""

    why: str

    def describe(self) -> str:
        """Say what it does, in one line."""
        raise NotImplementedError

    def list_files(self, root: str) -> "tuple[str, ...]":
        """Return the files that it writes or removes, without `root`."""
        raise NotImplementedError

    def save(self, root: str) -> "Callable[[], None]":
        """Return what brings back the state that there is now.

        Raises:
            ResourceError, HostError: as `apply`; from the function, what it changes back cannot be changed.
        """
        return save_files(root + path for path in self.list_files(root))

    def apply(self, root: str) -> bool:
        """Do it; return whether anything has changed.

        Raises:
            ResourceError: a file is in the way, or cannot be written.
            HostError: a program is missing, or fails.
        """
        raise NotImplementedError

    def undo(self, root: str) -> bool:
        """Undo it, also if it was half done; return whether anything has changed. What is not there is no error.

        Raises:
            ResourceError: it has been changed since, or cannot be removed.
            HostError: a program is missing, or fails.
        """
        raise NotImplementedError

    def find_fault(self, root: str) -> "Fault | None":
        """Return why it is not done."""
        raise NotImplementedError


class Command(Step):
    """A program that has to be run when files have changed; on the running host only.

    It is run each time: who was killed before it had changed them.
    """

    argv: "tuple[str, ...]"

    def describe(self) -> str:
        """Say what it does."""
        return f"run {' '.join(self.argv)}: {self.why}"

    def list_files(self, _root: str) -> "tuple[str, ...]":
        """Return none."""
        return ()

    def apply(self, root: str) -> bool:
        """Run it."""
        if not root:
            run(list(self.argv))
        return False

    undo = apply

    def find_fault(self, _root: str) -> "Fault | None":
        """Return none: what it does cannot be seen."""
        return None


def apply(steps: "Sequence[Step]", root: str) -> "tuple[list[Step], list[QemuUsernsError]]":
    """Do all steps, or none: where one fails, what there was before is brought back.

    Returns:
        Those that have changed something; why none was done, and then what could not be brought back.
    """
    done: list[Step] = []
    saved: "list[Callable[[], None]]" = []
    try:
        for step in steps:
            _prepare(step, root)
            saved.append(step.save(root))
            if step.apply(root):
                done.append(step)
    except QemuUsernsError as err:
        return [], [err, *_restore(saved)]
    except BaseException:
        _restore(saved)
        raise
    return done, []


def undo(steps: "Sequence[Step]", root: str) -> "tuple[list[Step], list[QemuUsernsError]]":
    """Undo all steps, the last first but for commands; return those that have changed something, and what could not be undone."""
    done: list[Step] = []
    faults: list[QemuUsernsError] = []
    commands = [step for step in steps if isinstance(step, Command)]
    for step in [*(step for step in reversed(steps) if step not in commands), *commands]:
        try:
            _prepare(step, root)
            if step.undo(root):
                done.append(step)
        except (ResourceError, HostError) as err:
            faults.append(err)
    return done, faults


def _prepare(step: Step, root: str) -> None:
    """Check where a step writes, and remove what one that was killed has left there; raises ResourceError."""
    for path in step.list_files(root):
        check_place(path, root)
        remove_leftover(root + path)


def _restore(saved: "list[Callable[[], None]]") -> "list[QemuUsernsError]":
    """Bring back what was before, the last first; return what could not be."""
    faults: list[QemuUsernsError] = []
    for restore in reversed(saved):
        try:
            restore()
        except QemuUsernsError as err:
            faults.append(err)
    return faults


def run(argv: "list[str]") -> str:
    """Run a program; return what it writes.

    Raises:
        HostError: it is missing, or fails; its words are the reason.
    """
    try:
        environ = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=environ)
    except OSError as err:
        raise HostError(argv[0], err.strerror or str(err)) from err
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(" ".join(argv), lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout
