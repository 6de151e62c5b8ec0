"""What the supervisor keeps of what commands got, with a stand-in for what a worker opens."""

from __future__ import annotations

import marshal
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.errors import ResourceError
from qemu_userns.host.leftovers import Leftover
from qemu_userns.plan.grants import Bind, Link
from qemu_userns.plan.identity import build_owner_map
from qemu_userns.qmp.actions import Prepare, Prepared, Refused, Release
from qemu_userns.record import from_plain, to_plain
from qemu_userns.supervisor import hotplug
from qemu_userns.supervisor.handed import CLASSES, Handed, Held
from qemu_userns.supervisor.opener import Opener
from qemu_userns.supervisor.poller import Poller
from tests.forked import in_child
from tests.plans import LEASED

if TYPE_CHECKING:
    from qemu_userns.record import Plain
    from qemu_userns.supervisor.worker import Tell

NO_STATE: Any = None


def opens(path: Path) -> bool:
    """Say whether this process has a file open."""
    files = {(found.st_dev, found.st_ino) for fd in os.listdir("/proc/self/fd") if (found := stat_of(f"/proc/self/fd/{fd}"))}
    found = path.lstat()
    return (found.st_dev, found.st_ino) in files


def stat_of(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def test_what_a_command_got_comes_back_from_the_worker() -> None:
    """With the id map by which root's file is shown."""
    shown = Bind("object-add file", "/srv/secret", inode=(1, 2), idmap=build_owner_map(0, 0, LEASED))
    handed = Handed((shown, Link("why", "/a", "b")), (), (Leftover("/srv/made", (1, 3), True),), (4,))
    assert from_plain(marshal.loads(marshal.dumps(to_plain(handed))), CLASSES) == handed


@pytest.mark.parametrize("adopted", [False, True])
def test_the_inode_of_what_was_made_is_no_other_files_until_it_is_taken_back(
    adopted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the socket of the VM that comes next could be taken for the one that goes."""
    path, moved = tmp_path.resolve() / "socket", tmp_path.resolve() / "moved"
    path.touch()
    found = path.lstat()
    made = Leftover(str(path), (found.st_dev, found.st_ino), True)
    handed = Handed((), (), (made,), ())

    def open_command(_: object, tell: Tell) -> tuple[Plain, list[int]]:
        tell(to_plain(made), ())
        return {"text": b"", "fdsets": [], "names": [], "handed": to_plain(Handed((), (), (), ())), "twin": False}, []

    def inside() -> list[bool]:
        poller, answers = Poller(), []
        opener = Opener(NO_STATE, poller, lambda _: None, lambda: None)
        if adopted:
            opener.restore([Held(1, "m", ("chardev", "c"), (), handed)])
        else:
            opener.prepare(Prepare(1, 1, "chardev-add", "{}"), lambda _, answer: answers.append(answer))
            poller.run_once(10)
            poller.run_once(10)
            assert isinstance(answers[0], Prepared)
        path.rename(moved)
        seen = [opens(moved)]
        opener.release(Release(1))
        poller.run_once(10)
        return [*seen, opens(moved)]

    monkeypatch.setattr(hotplug, "open_command", open_command)
    assert in_child(inside) == [True, False]


@pytest.mark.parametrize("end", ["fails", "is killed"])
def test_what_a_command_had_made_goes_before_its_failure_is_told_and_before_another_looks(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path.resolve() / "socket"

    def open_command(_: object, tell: Tell) -> tuple[Plain, list[int]]:
        path.touch(exist_ok=False)
        found = path.lstat()
        tell(to_plain(Leftover(str(path), (found.st_dev, found.st_ino), False)), ())
        if end == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ResourceError("command", "fails")

    def inside() -> list[tuple[str, bool]]:
        poller, seen = Poller(), []

        def answer(_: int, said: Prepared | Refused) -> None:
            assert isinstance(said, Refused)
            seen.append((said.desc, path.exists()))

        opener = Opener(NO_STATE, poller, lambda _: None, lambda: None)
        opener.prepare(Prepare(1, 1, "chardev-add", "{}"), answer)
        poller.run_once(10)  # what was made
        poller.run_once(10)  # the failure: it is about to be removed
        opener.prepare(Prepare(1, 2, "chardev-add", "{}"), answer)
        while len(seen) < 2:
            poller.run_once(10)
        return seen

    monkeypatch.setattr(hotplug, "open_command", open_command)
    why = "command: fails" if end == "fails" else "it was given up, or took too long"
    assert in_child(inside) == [(why, False)] * 2
