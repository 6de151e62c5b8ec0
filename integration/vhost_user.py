"""The side of a back end in the negotiation of vhost-user: docs/interop/vhost-user.rst of QEMU."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FEATURES = 1 << 32 | 1 << 30  # VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES
GET_FEATURES, GET_PROTOCOL_FEATURES = 1, 15
ANSWERS = {GET_FEATURES: FEATURES, GET_PROTOCOL_FEATURES: 0}
REPLY = 5  # version 1, and the flag of a reply


class BackEnd(threading.Thread):
    """Serves one QEMU on a unix socket, until that leaves; notes what it is asked, and how many fds come along."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.requests: list[tuple[int, int]] = []

    def run(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()
        with connection:
            while self._serve(connection):
                pass

    def _serve(self, connection: socket.socket) -> bool:
        """Answer one message; return whether there was one."""
        fds = array.array("i")
        try:
            header, ancillary, _, _ = connection.recvmsg(12, socket.CMSG_SPACE(32))
        except ConnectionResetError:
            return False
        if not header:
            return False
        for _, _, data in ancillary:
            fds.frombytes(data)
        for fd in fds:
            os.close(fd)
        request, _, size = struct.unpack("3I", header)
        if size:
            connection.recv(size, socket.MSG_WAITALL)
        self.requests.append((request, len(fds)))
        if request in ANSWERS:
            connection.sendall(struct.pack("=3IQ", request, REPLY, 8, ANSWERS[request]))
        return True
