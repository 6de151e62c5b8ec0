"""One stream of bytes and fds: a client's, or QEMU's. Never blocks; what cannot be written at once is queued."""

import os
import stat
import sys
from _socket import (
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    SCM_CREDENTIALS,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOL_SOCKET,
    socket,
)
from collections import deque

from qemu_userns.supervisor.poller import ERR, HUP, IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.supervisor.poller import Poller

    Receiver = Callable[[bytes, tuple[int, ...]], None]

_CHUNK_BYTES = 16384
_PIPE_BYTES = 4096  # PIPE_BUF: a pipe that poll(2) calls writable takes as much without blocking
_MOST_FDS = 16  # as QEMU: io/channel-socket.c
_ANCILLARY_BYTES = CMSG_SPACE(4 * _MOST_FDS) + CMSG_SPACE(12)


class Connection:
    """A socket, or a pair of other fds (stdin and stdout)."""

    def __init__(self, poller: "Poller", read_fd: int, write_fd: int, receive: "Receiver", asks_pid: bool = False) -> None:
        """Take the fds over.

        Args:
            poller: calls back.
            read_fd: taken over.
            write_fd: the same for a socket; else taken over.
            receive: called with what comes in, whose fds it owns; with no bytes at the end of the stream.
            asks_pid: it is QEMU's, and SO_PASSCRED is set: the kernel shall tell its pid with the first bytes.
        """
        self._poller = poller
        self._read_fd, self._write_fd = read_fd, write_fd
        is_socket = read_fd == write_fd and stat.S_ISSOCK(os.fstat(read_fd).st_mode)
        self._socket = socket(fileno=read_fd) if is_socket else None
        self._receive = receive
        self._finished: "Callable[[], None] | None" = None
        self._queue: "deque[tuple[bytearray, tuple[int, ...]]]" = deque()
        self._reading = True
        self._watched: "int | None" = None  # what the poller was told last
        self.queued_bytes = 0
        self._asks_pid = asks_pid
        self.peer_pid = 0  # as the kernel told with the first bytes, where it was asked to (SO_PASSCRED)
        self.closed = False
        self.hung_up = False  # the peer reads no more either
        self._watch()

    def read(self, wanted: bool) -> None:
        """Go on reading, or stop until told to go on."""
        if wanted != self._reading and not self.closed and self._finished is None:
            self._reading = wanted
            self._watch()

    def send(self, data: bytes, fds: "tuple[int, ...]" = ()) -> None:
        """Write as soon as possible; the fds go with the first byte, and are taken over."""
        if self.closed:
            _close_all(fds)
            return
        if not self._queue and not fds and self._socket is not None:
            data = self._send_now(data)
            if not data:
                return
        self.queued_bytes += len(data)
        if self._queue and not fds and len(self._queue[-1][0]) < _CHUNK_BYTES:
            self._queue[-1][0].extend(data)  # many small messages would need many times their size
            return
        self._queue.append((bytearray(data), fds))
        if len(self._queue) == 1:
            if self._socket is not None:
                self._flush()
            else:
                self._watch()  # a pipe may block when poll(2) was not asked

    def _send_now(self, data: bytes) -> bytes:
        """Write what goes at once; return the rest."""
        assert self._socket is not None
        try:
            return data[self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # nobody reads it: that the peer has gone is told by reading

    def finish(self, done: "Callable[[], None]") -> None:
        """Read no more; close once the peer has got all that is queued, or is gone, and say so."""
        if self.closed or self.hung_up or not self._queue:
            self.close()
            done()
            return
        self._reading, self._finished = False, done
        self._watch()

    def fileno(self) -> int:
        """Return the fd that is read from, borrowed."""
        return self._read_fd

    def close(self) -> None:
        """Close the fds, and drop what is queued."""
        if self.closed:
            return
        self.closed = True
        for fd in {self._read_fd, self._write_fd}:
            self._poller.unwatch(fd)
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        self.queued_bytes = 0
        if self._socket is not None:
            self._socket.close()
        for fd in {self._read_fd, self._write_fd} if self._socket is None else ():
            os.close(fd)

    def _watch(self) -> None:
        """Tell the poller what is wanted."""
        into = IN if self._reading else 0
        out = OUT if self._queue else 0
        if self._watched == into | out:
            return
        self._watched = into | out
        if self._read_fd == self._write_fd:
            self._poller.watch(self._read_fd, into | out, self._happened, self._break)
            return
        # What happens to one of them says nothing of the other: reading would block.
        for fd, events, callback in ((self._read_fd, into, self._readable), (self._write_fd, out, self._writable)):
            if events:
                self._poller.watch(fd, events, callback, self._break)
            else:
                self._poller.unwatch(fd)

    def _happened(self, events: int) -> None:
        """Write, read or hear of the end: one fd."""
        if events == IN and self._reading:  # most often
            self._read()
            return
        self.hung_up = self.hung_up or bool(events & (HUP | ERR))
        if events & OUT and self._queue:
            self._flush()
        if events & ~OUT and not self.closed:
            if self._reading:
                self._read()
            elif events & ~(IN | OUT):  # the peer has gone, and nobody wants to hear what it said last
                self._end()

    def _readable(self, _: int) -> None:
        self._read()

    def _writable(self, _: int) -> None:
        self._flush()

    def _end(self) -> None:
        """Tell of the end of the stream."""
        if self._finished is not None:
            self.close()
            self._finished()
        else:
            self._receive(b"", ())

    def _break(self) -> None:
        """Be gone, since what came in cannot be dealt with."""
        self.hung_up = True
        self.close()
        self._end()

    def _read(self) -> None:
        """Read once, and hand it on."""
        try:
            data, fds = self._receive_message() if self._socket is not None else (os.read(self._read_fd, _CHUNK_BYTES), ())
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", ()  # reset, timed out, out of reach: whatever it is, nothing more comes
        self._receive(data, fds)

    def _receive_message(self) -> "tuple[bytes, tuple[int, ...]]":
        """Receive bytes, of which at most the last one ends a command where fds come with them.

        The kernel gives fds together with bytes that were sent before them, so of commands with an fd each the first would seem
        to have the second one's. QEMU reads byte by byte.
        """
        assert self._socket is not None
        size = _CHUNK_BYTES
        if self.peer_pid:  # QEMU, which sends no fds; without a place for them the kernel would close them
            return self._socket.recv(size, MSG_DONTWAIT), ()
        if not self._asks_pid:
            data, _, flags, _ = self._socket.recvmsg(size, 0, MSG_DONTWAIT | MSG_PEEK)
            if not flags & MSG_CTRUNC:  # no fds, then
                return self._socket.recv(len(data), MSG_DONTWAIT), ()
            size = data.find(b"}") + 1 or size
        data, ancillary, _, _ = self._socket.recvmsg(size, _ANCILLARY_BYTES, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        fds: "list[int]" = []
        for level, kind, item in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                fds += (int.from_bytes(item[i : i + 4], sys.byteorder) for i in range(0, len(item) // 4 * 4, 4))
            elif (level, kind) == (SOL_SOCKET, SCM_CREDENTIALS):
                self.peer_pid = int.from_bytes(item[:4], sys.byteorder)
                self._socket.setsockopt(SOL_SOCKET, SO_PASSCRED, 0)
        return data, tuple(fds)

    def _flush(self) -> None:
        """Write what goes without blocking."""
        while self._queue and not self.closed:
            data, fds = self._queue[0]
            try:
                count = self._write(data, fds)
            except BlockingIOError:
                break
            except OSError:
                # Nobody reads it: that the peer has gone is told by reading. Or the kernel does not let the fds pass
                # (ETOOMANYREFS, a security module): the command goes without, and QEMU says that it has got none.
                count = 0 if fds else len(data)
            if fds:
                _close_all(fds)
                self._queue[0] = (data, ())
            self.queued_bytes -= count
            if count == len(data):
                self._queue.popleft()
            else:
                del data[:count]
            if self._socket is None:
                break
        if not self._queue and self._finished is not None:
            self._end()
        if not self.closed:
            self._watch()

    def _write(self, data: bytearray, fds: "tuple[int, ...]") -> int:
        if self._socket is None:
            return os.write(self._write_fd, data[:_PIPE_BYTES])
        if not fds:
            return self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL)
        numbers = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        return self._socket.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, numbers)], MSG_DONTWAIT | MSG_NOSIGNAL)


def _close_all(fds: "tuple[int, ...]") -> None:
    for fd in fds:
        os.close(fd)
