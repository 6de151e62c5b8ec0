"""Wait for many fds at once, and call what each is for: poll(2)."""

import select
import time
from collections import deque

from qemu_userns.errors import describe_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, HUP, ERR = select.POLLIN, select.POLLOUT, select.POLLHUP, select.POLLERR

_MOST_CHILDREN = 4096


class Poller:
    """The main loop's fds and timers."""

    def __init__(self) -> None:
        """Start with none."""
        self.report: "Callable[[str], None] | None" = None  # told of what nobody expected; without one, that ends the process
        self.children: "deque[int]" = deque(maxlen=_MOST_CHILDREN)  # pids of workers (worker.py), also of those that have ended
        self._poll = select.poll()
        self._callbacks: "dict[int, tuple[Callable[[int], None], Callable[[], None] | None]]" = {}
        self._timers: "list[tuple[float, Callable[[], None]]]" = []

    def watch(self, fd: int, events: int, callback: "Callable[[int], None]", broken: "Callable[[], None] | None" = None) -> None:
        """Call back with what happened on an fd, from now on; HUP and ERR are always told. The fd is borrowed.

        Args:
            fd: what to watch.
            events: IN, OUT or both.
            callback: told of them.
            broken: called when that raises what nobody expected: closes what the fd is for.
        """
        self._poll.register(fd, events)
        self._callbacks[fd] = (callback, broken)

    def unwatch(self, fd: int) -> None:
        """Stop; must come before the fd is closed. One that is not watched is left alone."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call_later(self, delay_s: float, callback: "Callable[[], None]") -> None:
        """Call back once, after a while."""
        self._timers.append((time.monotonic() + delay_s, callback))

    def run_once(self, timeout_s: "float | None" = None) -> None:
        """Wait for something to happen, at most `timeout_s`, and call back for all of it."""
        events = self._poll.poll(self._find_timeout(timeout_s) if self._timers or timeout_s is not None else None)
        happened = [(fd, event, self._callbacks[fd]) for fd, event in events]
        for fd, event, watched in happened:
            # An earlier callback may have ended this one, and the fd's number may be another's by now.
            if self._callbacks.get(fd) == watched:
                self._call(watched[1], watched[0], event)
        if self._timers:
            now = time.monotonic()
            expired = [call for when, call in self._timers if when <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for call in expired:
                self._call(None, call)

    def _find_timeout(self, timeout_s: "float | None") -> "float | None":
        """Return for how many milliseconds to wait, None for ever."""
        if self._timers:
            due_s = max(0.0, min(due for due, _ in self._timers) - time.monotonic())
            timeout_s = due_s if timeout_s is None else min(due_s, timeout_s)
        return None if timeout_s is None else timeout_s * 1000

    def _call(self, broken: "Callable[[], None] | None", callback: "Callable[..., None]", *events: int) -> None:
        """Call back.

        This is the one place that catches everything: a mistake of ours that one client or one reply of QEMU's brings to light
        must cost that client, or that monitor, and not all monitors of a VM that goes on running.
        """
        try:
            callback(*events)
        except Exception as err:
            if self.report is None:
                raise
            self.report(describe_bug(err))
            if broken is not None:
                self._call(None, broken)
