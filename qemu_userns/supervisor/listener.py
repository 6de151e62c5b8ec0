"""A socket on which clients come."""

import os
from _socket import socket

from qemu_userns.supervisor.poller import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from qemu_userns.supervisor.poller import Poller

_FULL_PAUSE_S = 0.25
_FDS_OF_CLIENT = 3  # its own, and two to find out who it is (peers.py)


class Listener:
    """Accepts one client after the other."""

    def __init__(
        self,
        poller: "Poller",
        fd: int,
        admits: "Callable[[int], bool]",
        take: "Callable[[int], None]",
        log: "Callable[[str], None]",
    ) -> None:
        """Begin to listen.

        Args:
            poller: calls back.
            fd: of the socket; taken over.
            admits: called with a borrowed fd of each client; tells whether it may be one.
            take: called with an owned fd of each client that may.
            log: takes a line.
        """
        os.set_blocking(fd, False)  # as QEMU does: another process may have it too, and take the client first
        self._poller, self._socket, self._admits, self._take, self._log = poller, socket(fileno=fd), admits, take, log
        self._closed = False
        self._full = False  # the last client could not be accepted
        self._watch()

    def close(self) -> None:
        """Take no more clients."""
        self._closed = True
        self._poller.unwatch(self._socket.fileno())
        self._socket.close()

    def _watch(self) -> None:
        if not self._closed:
            self._poller.watch(self._socket.fileno(), IN, self._accept)

    def _accept(self, _: int) -> None:
        try:
            _try_room(self._socket.fileno())
            client, _ = self._socket._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as err:  # no fds or no memory are left: it waits, as with plain QEMU a second client does
            if not self._full:
                self._log(f"no client can be accepted: {err.strerror}")
            self._full = True
            self._poller.unwatch(self._socket.fileno())
            self._poller.call_later(_FULL_PAUSE_S, self._watch)
            return
        self._full = False
        if admit((client,), self._admits):
            self._take(client)


def admit(fds: "Collection[int]", admits: "Callable[[int], bool]") -> bool:
    """Tell whether a client may be one, by the first of its fds; closes them where it may not, or that cannot be told."""
    admitted = False
    try:
        admitted = admits(next(iter(fds)))
    finally:
        if not admitted:
            for fd in set(fds):
                os.close(fd)
    return admitted


def _try_room(fd: int) -> None:
    """Raise OSError unless there is room for the fds that a client takes; any fd will do to try."""
    copies: "list[int]" = []
    try:
        for _ in range(_FDS_OF_CLIENT):
            copies.append(os.dup(fd))
    finally:
        for copy in copies:
            os.close(copy)
