"""One stream of bytes and fds: a client's, or QEMU's. Never blocks; what cannot be written at once is queued."""

import errno
import os
import stat
import sys
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_CREDENTIALS, SCM_RIGHTS, SOL_SOCKET, socket
from collections import deque

from qemu_userns.supervisor.poller import ERR, HUP, IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.supervisor.poller import Poller

    Receiver = Callable[[bytes, tuple[int, ...]], None]

_CHUNK_BYTES = 65536
_PIPE_BYTES = 4096  # PIPE_BUF: a pipe that poll(2) calls writable takes as much without blocking
_MOST_FDS = 16  # as QEMU: io/channel-socket.c
_ANCILLARY_BYTES = CMSG_SPACE(4 * _MOST_FDS) + CMSG_SPACE(12)
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EIO)


class Connection:
    """A socket, or a pair of other fds (stdin and stdout)."""

    def __init__(self, poller: "Poller", read_fd: int, write_fd: int, receive: "Receiver") -> None:
        """Take the fds over.

        Args:
            poller: calls back.
            read_fd: taken over.
            write_fd: the same for a socket; else taken over.
            receive: called with what comes in, whose fds it owns; with no bytes at the end of the stream.
        """
        self._poller = poller
        self._read_fd, self._write_fd = read_fd, write_fd
        self._socket = socket(fileno=read_fd) if stat.S_ISSOCK(os.fstat(read_fd).st_mode) else None
        self._receive = receive
        self._queue: "deque[tuple[memoryview, tuple[int, ...]]]" = deque()
        self._reading = True
        self.queued_bytes = 0
        self.peer_pid = 0  # as the kernel told with the last bytes, where it was asked to (SO_PASSCRED)
        self.closed = False
        self.hung_up = False  # the peer reads no more either
        self._watch()

    def read(self, wanted: bool) -> None:
        """Go on reading, or stop until told to go on."""
        if wanted != self._reading and not self.closed:
            self._reading = wanted
            self._watch()

    def send(self, data: bytes, fds: "tuple[int, ...]" = ()) -> None:
        """Write as soon as possible; the fds go with the first byte, and are taken over."""
        if self.closed:
            _close_all(fds)
            return
        self._queue.append((memoryview(data), fds))
        self.queued_bytes += len(data)
        if len(self._queue) == 1:
            if self._socket is not None:
                self._flush()
            else:
                self._watch()  # a pipe may block when poll(2) was not asked

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
        if self._socket is not None:
            self._socket.close()
        for fd in {self._read_fd, self._write_fd} if self._socket is None else ():
            os.close(fd)

    def _watch(self) -> None:
        """Tell the poller what is wanted."""
        into = IN if self._reading else 0
        out = OUT if self._queue else 0
        if self._read_fd == self._write_fd:
            self._poller.watch(self._read_fd, into | out, self._happened)
            return
        for fd, events in ((self._read_fd, into), (self._write_fd, out)):
            if events:
                self._poller.watch(fd, events, self._happened)
            else:
                self._poller.unwatch(fd)

    def _happened(self, events: int) -> None:
        self.hung_up = self.hung_up or bool(events & (HUP | ERR))
        if events & OUT and self._queue:
            self._flush()
        if events & ~OUT and not self.closed:
            if self._reading:
                self._read()
            elif events & ~(IN | OUT):  # the peer has gone, and nobody wants to hear what it said last
                self._receive(b"", ())

    def _read(self) -> None:
        """Read once, and hand it on."""
        try:
            data, fds = self._receive_message() if self._socket is not None else (os.read(self._read_fd, _CHUNK_BYTES), ())
        except BlockingIOError:
            return
        except OSError as err:
            if err.errno not in _GONE:
                raise
            data, fds = b"", ()
        self._receive(data, fds)

    def _receive_message(self) -> "tuple[bytes, tuple[int, ...]]":
        assert self._socket is not None
        data, ancillary, _, _ = self._socket.recvmsg(_CHUNK_BYTES, _ANCILLARY_BYTES, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        fds: "list[int]" = []
        for level, kind, item in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                fds += (int.from_bytes(item[i : i + 4], sys.byteorder) for i in range(0, len(item) // 4 * 4, 4))
            elif (level, kind) == (SOL_SOCKET, SCM_CREDENTIALS):
                self.peer_pid = int.from_bytes(item[:4], sys.byteorder)
        return data, tuple(fds)

    def _flush(self) -> None:
        """Write what goes without blocking."""
        while self._queue and not self.closed:
            data, fds = self._queue[0]
            try:
                count = self._write(data, fds)
            except BlockingIOError:
                break
            except OSError as err:
                if err.errno not in _GONE:
                    raise
                count = len(data)  # nobody reads it; that the peer has gone is told by reading
            _close_all(fds)
            self.queued_bytes -= count
            if count == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[count:], ())
            if self._socket is None:
                break
        if not self.closed:
            self._watch()

    def _write(self, data: memoryview, fds: "tuple[int, ...]") -> int:
        if self._socket is None:
            return os.write(self._write_fd, data[:_PIPE_BYTES])
        if not fds:
            return self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL)
        numbers = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        return self._socket.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, numbers)], MSG_DONTWAIT | MSG_NOSIGNAL)


def _close_all(fds: "tuple[int, ...]") -> None:
    for fd in fds:
        os.close(fd)
