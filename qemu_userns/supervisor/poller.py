"""Wait for many fds at once, and call what each is for: poll(2)."""

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, HUP, ERR = select.POLLIN, select.POLLOUT, select.POLLHUP, select.POLLERR


class Poller:
    """The main loop's fds and timers."""

    def __init__(self) -> None:
        """Start with none."""
        self._poll = select.poll()
        self._callbacks: "dict[int, Callable[[int], None]]" = {}
        self._timers: "list[tuple[float, Callable[[], None]]]" = []

    def watch(self, fd: int, events: int, callback: "Callable[[int], None]") -> None:
        """Call back with what happened on an fd, from now on; HUP and ERR are always told. The fd is borrowed."""
        self._poll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Stop; must come before the fd is closed. One that is not watched is left alone."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call_later(self, delay_s: float, callback: "Callable[[], None]") -> None:
        """Call back once, after a while."""
        self._timers.append((time.monotonic() + delay_s, callback))

    def run_once(self, timeout_s: "float | None" = None) -> None:
        """Wait for something to happen, at most `timeout_s`, and call back for all of it."""
        now = time.monotonic()
        waits = [max(0.0, due - now) for due, _ in self._timers] + ([] if timeout_s is None else [timeout_s])
        for fd, events in self._poll.poll(min(waits) * 1000 if waits else None):
            callback = self._callbacks.get(fd)  # an earlier callback may have ended this one
            if callback is not None:
                callback(events)
        if self._timers:
            now = time.monotonic()
            expired = [call for when, call in self._timers if when <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for call in expired:
                call()
