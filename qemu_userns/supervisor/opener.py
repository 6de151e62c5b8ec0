"""What commands get from the host while QEMU runs: workers open it (hotplug.py), here is kept who holds what.

Everything that a command got has one number. It belongs to an object of QEMU's, and is taken back when that goes.
"""

import os
from collections import deque

from qemu_userns.catalogue.ways import FDS_PER_COMMAND
from qemu_userns.host.leftovers import Downscript, hold
from qemu_userns.qmp.actions import Prepared, Refused
from qemu_userns.record import from_plain, to_plain
from qemu_userns.supervisor.handed import CLASSES, Handed, Held
from qemu_userns.supervisor.worker import Failed, start_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qemu_userns.host.leftovers import Leftover
    from qemu_userns.qmp.actions import Keep, Prepare, Release
    from qemu_userns.record import Plain
    from qemu_userns.sandbox.places import Shown
    from qemu_userns.supervisor.poller import Poller
    from qemu_userns.supervisor.state import State
    from qemu_userns.supervisor.worker import Tell

    Answer = Callable[[int, Prepared | Refused], None]

_TIMEOUT_S = 60.0
_FIRST_NUMBER = 100_000  # of fdsets and names, out of the way of the launch
_ERROR_CLASS = "GenericError"


class Opener:
    """The host's side of hot-plug."""

    def __init__(self, state: "State", poller: "Poller", log: "Callable[[str], None]", changed: "Callable[[], None]") -> None:
        """Start with what the launch placed.

        Args:
            state: the VM's.
            poller: calls back.
            log: takes a line.
            changed: called when an object has got or lost something.
        """
        self._changed = changed
        self._held: "dict[int, Held]" = {}
        self.pid = 0  # QEMU's, once it is known
        self.pidfd = -1  # of the same process; borrowed
        self._state, self._poller, self._log = state, poller, log
        self._last = 0
        self._handed: "dict[int, Handed]" = {}
        self._holding: "dict[int, list[int]]" = {}  # owned fds: of temporary files, and of taps whose scripts have to run
        self._released: "dict[int, bool]" = {}  # numbers that are given back, and whether their command failed
        self._covered: "tuple[Shown, ...]" = ()  # could not be taken back yet: something else is attached over it
        self._seen: "dict[int, frozenset[int]]" = {}  # commands being prepared: the numbers that they may come to use too
        self._sweeping = False
        self._removing = False  # files of the host's, as a part of it
        self._waiting: "deque[Callable[[], None]]" = deque()  # until that is done
        self._lock = os.memfd_create("qemu-userns-lock", os.MFD_CLOEXEC)

    def prepare(self, action: "Prepare", answer: "Answer") -> None:
        """Open what a command names; answers later."""
        self._when_removed(lambda: self._start(action, answer))

    def _start(self, action: "Prepare", answer: "Answer") -> None:
        """Have a worker open what a command names."""
        self._last += 1
        number = self._last
        placed = tuple((grant, handed) for handed, item in self._handed.items() for grant in item.grants)
        self._seen[number] = frozenset(self._handed)
        self._handed[number], self._holding[number] = Handed((), (), (), ()), []

        def work(tell: "Tell") -> "tuple[Plain, list[int]]":
            from qemu_userns.supervisor.hotplug import Job, open_command

            first = _FIRST_NUMBER + number * FDS_PER_COMMAND
            return open_command(Job(self._state, self.pid, self.pidfd, action.name, action.text, placed, first, self._lock), tell)

        def told(said: object, fds: "tuple[int, ...]") -> None:
            item, handed = from_plain(said, CLASSES), self._handed[number]
            if isinstance(item, Downscript):
                self._handed[number] = handed.replace(downscripts=(*handed.downscripts, item))
            else:
                self._handed[number] = handed.replace(created=(*handed.created, item))
            self._holding[number] += fds

        def done(result: object, fds: "tuple[int, ...]") -> None:
            del self._seen[number]
            if isinstance(result, Failed) or not isinstance(result, dict):
                text = result.text if isinstance(result, Failed) else "no answer"
                self._log(f"{action.name}: {text}")
                self._released[number] = True
                self._sweep()
                self._when_removed(lambda: answer(action.ticket, Refused(_ERROR_CLASS, text)))
                return
            noted = self._handed[number]
            handed = from_plain(result["handed"], CLASSES)
            self._take(number, handed.replace(created=noted.created, downscripts=noted.downscripts))
            fdsets = tuple((fdset, fd, opaque) for (fdset, opaque), fd in zip(result["fdsets"], fds, strict=False))
            names = tuple(zip(result["names"], fds[len(fdsets) :], strict=True))
            answer(action.ticket, Prepared(result["text"], fdsets, names, number, result["twin"]))
            self._sweep()

        start_worker(self._poller, work, done, _TIMEOUT_S, (self._lock, self.pidfd), told)

    def _when_removed(self, go: "Callable[[], None]") -> None:
        """Go on, but not while files are removed: a command could count on one of them, and a refused one must have left none."""
        self._waiting.append(go)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and not self._removing:
            self._waiting.popleft()()

    def keep(self, label: str, action: "Keep") -> None:
        """Note which object of QEMU's holds what a client of a monitor got."""
        self._held[action.handed] = Held(action.handed, label, action.owner, action.fdsets, self._handed[action.handed])
        self._changed()

    def release(self, action: "Release") -> None:
        """Take back what was handed over, but for what others use too."""
        self._released[action.handed] = action.failed
        self._sweep()
        if self._held.pop(action.handed, None) is not None:
            self._changed()

    def list_held(self) -> "tuple[Held, ...]":
        """Return what objects of QEMU's hold."""
        return tuple(self._held.values())

    def restore(self, held: "Iterable[Held]") -> None:
        """Take over what an earlier supervisor has handed out."""
        for item in held:
            self._held[item.number] = item
            self._holding[item.number] = []
            self._take(item.number, item.handed)
            self._last = max(self._last, item.number)

    def find_leftovers(self) -> "tuple[Leftover, ...]":
        """Return what was made on the host and goes when QEMU ends."""
        return tuple(item for handed in self._handed.values() for item in handed.created if item.temporary)

    def _take(self, number: int, handed: Handed) -> None:
        """Note what a command got."""
        self._handed[number] = handed
        held = [hold(item) for item in handed.created if item.temporary]
        self._holding[number] += [fd for fd in held if fd is not None]

    def find_downscripts(self) -> "tuple[Downscript, ...]":
        """Return the scripts to run when QEMU ends."""
        return tuple(item for handed in self._handed.values() for item in handed.downscripts)

    def _sweep(self) -> None:
        """Take back what nobody uses any more: one worker at a time, since what is attached over something goes before it."""
        if self._sweeping:
            return
        used = {number for handed, item in self._handed.items() if handed not in self._released for number in item.reused}
        used.update(*self._seen.values())
        free = [number for number in self._released if number in self._handed and number not in used]
        items = [(self._handed.pop(number), self._released.pop(number)) for number in free]
        places = tuple(place for item, _ in items for place in item.shown)
        created = tuple(file for item, failed in items for file in item.created if failed or file.temporary)
        downscripts = tuple(script for item, _ in items for script in item.downscripts)
        holding = [fd for number in free for fd in self._holding.pop(number)]
        if not places and not created and not downscripts:
            return
        shown = self._covered + places

        def work(_: object) -> "tuple[Plain, list[int]]":
            from qemu_userns.supervisor.hotplug import take_back

            return to_plain(take_back(self._state, self.pid, self.pidfd, shown, created, downscripts, self._lock)), []

        def done(result: object, _: "tuple[int, ...]") -> None:
            self._sweeping = self._removing = False
            for fd in holding:
                os.close(fd)
            if isinstance(result, Failed):
                self._log(f"what was shown to QEMU cannot be taken back: {result.text}")
                self._covered = shown
            else:
                self._covered = from_plain(result, CLASSES)
            self._sweep()
            self._go_on()

        self._sweeping, self._removing = True, bool(created)
        start_worker(self._poller, work, done, _TIMEOUT_S, (self._lock, self.pidfd))
