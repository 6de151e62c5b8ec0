"""A back end of vhost-user for network cards: docs/interop/vhost-user.rst of QEMU, and split queues of virtio 1.0."""

from __future__ import annotations

import array
import mmap
import os
import selectors
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

FEATURES = 1 << 32 | 1 << 30  # VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES
GET_FEATURES, SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 1, 5, 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES = 12, 13, 14, 15
ANSWERS = {GET_FEATURES: FEATURES, GET_PROTOCOL_FEATURES: 0}
REPLY = 5  # version 1, and the flag of a reply
NO_FD = 0x100
MOST_FDS = 8
GUEST_RECEIVES, GUEST_SENDS = 0, 1
NEXT, WRITABLE = 1, 2  # flags of a descriptor
HEADER = struct.pack("<10xH", 1)  # of a frame: nothing to compute, in one buffer
ONE_EVENT = struct.pack("=Q", 1)


class Memory:
    """The guest's memory, as SET_MEM_TABLE describes it."""

    def __init__(self, table: bytes, fds: Sequence[int]) -> None:
        """Take ownership of the fds."""
        self._regions = []
        for number, fd in enumerate(fds):
            guest, size, user, offset = struct.unpack_from("=4Q", table, 8 + 32 * number)
            self._regions.append((guest, user, size, offset, mmap.mmap(fd, size + offset)))
            os.close(fd)

    def close(self) -> None:
        for *_, memory in self._regions:
            memory.close()

    def at_guest(self, address: int, size: int) -> memoryview:
        """Return what lies at an address of the guest's."""
        return self._find(address, size, user=False)

    def at_user(self, address: int, size: int) -> memoryview:
        """Return what lies at an address of QEMU's."""
        return self._find(address, size, user=True)

    def _find(self, address: int, size: int, user: bool) -> memoryview:
        for at_guest, at_user, length, offset, memory in self._regions:
            start = address - (at_user if user else at_guest)
            if start >= 0 and start + size <= length:
                return memoryview(memory)[offset + start : offset + start + size]
        raise AssertionError(f"{address:#x} is in no region")


class Queue:
    """One queue: where its three parts lie, and how far it has been read."""

    def __init__(self) -> None:
        self.size = self.read = self.used_index = 0
        self.addresses = (0, 0, 0)
        self.kick = self.call = -1

    def chains(self, memory: Memory) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield the first descriptor of what the guest has made available, with addresses and sizes of its buffers."""
        descriptors, _, available = self.addresses
        while self.read != struct.unpack("<H", memory.at_user(available + 2, 2))[0]:
            (first,) = struct.unpack("<H", memory.at_user(available + 4 + 2 * (self.read % self.size), 2))
            buffers, flags, number = [], NEXT, first
            while flags & NEXT:
                address, size, flags, following = struct.unpack("<QIHH", memory.at_user(descriptors + 16 * number, 16))
                buffers.append((address, size))
                number = following
            self.read = (self.read + 1) % 0x10000
            yield first, buffers

    def give_back(self, memory: Memory, first: int, size: int) -> None:
        """Tell the guest that a chain has been used, and how many bytes were written to it."""
        _, used, _ = self.addresses
        memory.at_user(used + 4 + 8 * (self.used_index % self.size), 8)[:] = struct.pack("<II", first, size)
        self.used_index = (self.used_index + 1) % 0x10000
        memory.at_user(used + 2, 2)[:] = struct.pack("<H", self.used_index)
        if self.call >= 0:
            os.write(self.call, ONE_EVENT)


class Port:
    """One card: its socket, and what QEMU has said of it. A card that is stopped has no memory."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(1)
        self.memory: Memory | None = None
        self.queues = (Queue(), Queue())
        self.requests: list[tuple[int, int]] = []

    def accept(self) -> None:
        """Serve one QEMU in place of the listener."""
        listener, self.socket = self.socket, self.socket.accept()[0]
        listener.close()

    def close(self) -> None:
        self.socket.close()
        for queue in self.queues:
            for fd in (queue.kick, queue.call):
                if fd >= 0:
                    os.close(fd)
        if self.memory is not None:
            self.memory.close()

    def serve(self) -> bool:
        """Answer one message; return whether there was one."""
        fds = array.array("i")
        try:
            header, ancillary, _, _ = self.socket.recvmsg(12, socket.CMSG_SPACE(MOST_FDS * fds.itemsize))
        except ConnectionResetError:
            return False
        if not header:
            return False
        for _, _, data in ancillary:
            fds.frombytes(data)
        request, _, size = struct.unpack("=3I", header)
        payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
        self.requests.append((request, len(fds)))
        answer = self._take(request, payload, list(fds))
        if answer:
            self.socket.sendall(struct.pack("=3I", request, REPLY, len(answer)) + answer)
        return True

    def _take(self, request: int, payload: bytes, fds: list[int]) -> bytes:
        """Do what one message says; return the answer, if it has one. Takes ownership of the fds."""
        if request in ANSWERS:
            return struct.pack("=Q", ANSWERS[request])
        if request == SET_MEM_TABLE:
            if self.memory is not None:
                self.memory.close()
            self.memory = Memory(payload, fds)
        elif request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            self._set_event(request, payload[0], -1 if payload[1] << 8 & NO_FD else fds[0])
        elif request in (SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE):
            index, number = struct.unpack_from("=II", payload)
            queue = self.queues[index]
            if request == SET_VRING_NUM:
                queue.size = number
            elif request == SET_VRING_BASE:
                queue.read = queue.used_index = number
            elif request == SET_VRING_ADDR:
                queue.addresses = struct.unpack_from("=3Q", payload, 8)
            else:
                self._set_event(SET_VRING_KICK, index, -1)
                return struct.pack("=II", index, queue.read)
        return b""

    def _set_event(self, request: int, index: int, fd: int) -> None:
        """Keep an eventfd in place of the one before."""
        if request == SET_VRING_ERR:
            os.close(fd)
            return
        queue, name = self.queues[index], "kick" if request == SET_VRING_KICK else "call"
        before = getattr(queue, name)
        if before >= 0:
            os.close(before)
        setattr(queue, name, fd)

    def take_frames(self) -> Iterator[bytes]:
        """Yield what the guest sends."""
        queue = self.queues[GUEST_SENDS]
        os.read(queue.kick, 8)
        assert self.memory is not None
        for first, buffers in queue.chains(self.memory):
            data = b"".join(bytes(self.memory.at_guest(*buffer)) for buffer in buffers)
            queue.give_back(self.memory, first, 0)
            yield data[len(HEADER) :]

    def give_frame(self, frame: bytes) -> None:
        """Let the guest receive a frame, which is lost where it has no room for it."""
        queue = self.queues[GUEST_RECEIVES]
        if self.memory is None or queue.kick < 0:
            return
        for first, buffers in queue.chains(self.memory):
            rest = data = HEADER + frame
            for address, size in buffers:
                part, rest = rest[:size], rest[size:]
                self.memory.at_guest(address, len(part))[:] = part
            queue.give_back(self.memory, first, len(data))
            return


class BackEnd(threading.Thread):
    """Serves the cards of one QEMU, each on a unix socket of its own, until that leaves; what one sends, the others receive."""

    def __init__(self, *paths: Path) -> None:
        super().__init__(daemon=True)
        self.ports = [Port(path) for path in paths]

    def run(self) -> None:
        left = list(self.ports)
        for port in left:
            port.accept()
        while left:
            for port, kicked in self._wait(left):
                if kicked:
                    for frame in port.take_frames():
                        for other in left:
                            if other is not port:
                                other.give_frame(frame)
                elif not port.serve():
                    port.close()
                    left.remove(port)

    def _wait(self, ports: Sequence[Port]) -> list[tuple[Port, bool]]:
        """Wait for a message or for frames; return whose, and which of both. One at a time: the fds may change meanwhile."""
        with selectors.DefaultSelector() as selector:
            for port in ports:
                selector.register(port.socket, selectors.EVENT_READ, (port, False))
                if port.queues[GUEST_SENDS].kick >= 0:
                    selector.register(port.queues[GUEST_SENDS].kick, selectors.EVENT_READ, (port, True))
            return [key.data for key, _ in selector.select()][:1]
