"""A 9p client of our own, which sends what no guest kernel would: `RawShare` drives virtio-9p over QEMU's qtest protocol.

The machine is microvm, whose virtio-mmio devices need no bus to be set up; its processor stays stopped. Nothing is retried
and nothing checked: the caller sees each answer as it comes, an `Rlerror` as `NineError`.

Source: virtio 1.2, 4.2.4 "Legacy interface"; QEMU's docs/devel/qtest.rst; the kernel's Documentation/filesystems/9p.rst and
github.com/chaos/diod, protocol.md, for 9P2000.L.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MMIO_BASE, MMIO_STEP, MMIO_COUNT = 0xFEB00000, 512, 24
DEVICE_ID, PAGE_SIZE, QUEUE_SELECT, QUEUE_SIZE, QUEUE_ALIGN, QUEUE_PAGE = 0x008, 0x028, 0x030, 0x038, 0x03C, 0x040
QUEUE_NOTIFY, STATUS, DRIVER_FEATURES = 0x050, 0x070, 0x020
VIRTIO_9P = 9
ENTRIES = 8
RING, REQUEST, ANSWER = 0x100000, 0x200000, 0x300000  # in the guest's memory
MESSAGE_SIZE = 65536
USED_ALIGN = 4096
DEADLINE_S = 30

TLERROR, TLOPEN, TLCREATE, TSYMLINK, TMKNOD, TGETATTR, TSETATTR, TXATTRWALK, TXATTRCREATE = 6, 12, 14, 16, 18, 24, 26, 30, 32
TLINK, TMKDIR, TRENAMEAT, TUNLINKAT = 70, 72, 74, 76
TVERSION, TATTACH, TWALK, TREAD, TWRITE, TCLUNK = 100, 104, 110, 116, 118, 120
NO_FID, NO_TAG = 0xFFFFFFFF, 0xFFFF
ROOT_FID = 0


class NineError(OSError):
    """The server's Rlerror."""


class RawShare:
    """A session with one share; fid 0 is its root."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        """Borrow the qtest channel."""
        self.pid = pid
        self._channel = channel
        self._received = b""
        self._asked = 0
        self._device = next(
            base
            for base in range(MMIO_BASE, MMIO_BASE + MMIO_STEP * MMIO_COUNT, MMIO_STEP)
            if self._number(f"readl {base + DEVICE_ID:#x}") == VIRTIO_9P
        )
        self._set_up_queue()
        self.call(TVERSION, struct.pack("<I", MESSAGE_SIZE) + text("9P2000.L"), tag=NO_TAG)
        self.attach(ROOT_FID, "")

    # --- 9P2000.L, one method per message; strings go out as they are ---

    def attach(self, fid: int, name: str) -> bytes:
        return self.call(TATTACH, struct.pack("<II", fid, NO_FID) + text("root") + text(name) + struct.pack("<I", 0))

    def walk(self, new_fid: int, *names: str, fid: int = ROOT_FID) -> int:
        """Walk; return how many of the names were walked."""
        answer = self.call(TWALK, struct.pack("<IIH", fid, new_fid, len(names)) + b"".join(map(text, names)))
        return int(struct.unpack_from("<H", answer)[0])

    def open(self, fid: int, flags: int = os.O_RDONLY) -> bytes:
        return self.call(TLOPEN, struct.pack("<II", fid, flags))

    def read(self, fid: int, count: int = 4096) -> bytes:
        return self.call(TREAD, struct.pack("<IQI", fid, 0, count))[4:]

    def create(self, fid: int, name: str, mode: int = 0o644, flags: int = os.O_RDWR) -> bytes:
        """Create and open a file; the fid becomes the file's."""
        return self.call(TLCREATE, struct.pack("<I", fid) + text(name) + struct.pack("<III", flags, mode, 0))

    def symlink(self, name: str, target: str) -> bytes:
        return self.call(TSYMLINK, struct.pack("<I", ROOT_FID) + text(name) + text(target) + struct.pack("<I", 0))

    def mknod(self, name: str, mode: int, major: int = 0, minor: int = 0) -> bytes:
        return self.call(TMKNOD, struct.pack("<I", ROOT_FID) + text(name) + struct.pack("<IIII", mode, major, minor, 0))

    def mkdir(self, name: str) -> bytes:
        return self.call(TMKDIR, struct.pack("<I", ROOT_FID) + text(name) + struct.pack("<II", 0o755, 0))

    def link(self, fid: int, name: str) -> bytes:
        return self.call(TLINK, struct.pack("<II", ROOT_FID, fid) + text(name))

    def rename(self, old: str, new: str) -> bytes:
        return self.call(TRENAMEAT, struct.pack("<I", ROOT_FID) + text(old) + struct.pack("<I", ROOT_FID) + text(new))

    def unlink(self, name: str, flags: int = 0) -> bytes:
        return self.call(TUNLINKAT, struct.pack("<I", ROOT_FID) + text(name) + struct.pack("<I", flags))

    def inode(self, fid: int) -> int:
        """Return the inode number that Tgetattr tells in its qid."""
        answer = self.call(TGETATTR, struct.pack("<IQ", fid, 0x7FF))
        return int(struct.unpack_from("<Q", answer, 13)[0])

    def set_attributes(self, fid: int, valid: int, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0) -> bytes:
        """Change what `valid` names: 1 mode, 2 uid, 4 gid, 8 size."""
        return self.call(TSETATTR, struct.pack("<IIIIIQQQQQ", fid, valid, mode, uid, gid, size, 0, 0, 0, 0))

    def get_xattr(self, fid: int, new_fid: int, name: str) -> bytes:
        return self.call(TXATTRWALK, struct.pack("<II", fid, new_fid) + text(name))

    def set_xattr(self, name: str, value: bytes, file: str) -> bytes:
        """Set an attribute: the server sets it when the fid is clunked."""
        self.walk(90, file)
        self.call(TXATTRCREATE, struct.pack("<I", 90) + text(name) + struct.pack("<QI", len(value), 0))
        self.call(TWRITE, struct.pack("<IQI", 90, 0, len(value)) + value)
        return self.clunk(90)

    def clunk(self, fid: int) -> bytes:
        return self.call(TCLUNK, struct.pack("<I", fid))

    def call(self, kind: int, body: bytes, tag: int = 1) -> bytes:
        """Send one message; return the body of its answer.

        Raises:
            NineError: the answer is an Rlerror.
            ConnectionError: QEMU has ended.
        """
        message = struct.pack("<IBH", 7 + len(body), kind, tag) + body
        self._write(REQUEST, message)
        self._submit(len(message))
        size, answered, _ = struct.unpack("<IBH", self._read(ANSWER, 7))
        body = self._read(ANSWER + 7, size - 7) if size > 7 else b""
        if answered == TLERROR + 1:
            number = int(struct.unpack("<I", body)[0])
            raise NineError(number, os.strerror(number))
        assert answered == kind + 1, f"answer {answered} to {kind}"
        return body

    # --- virtio-mmio, legacy, one request at a time ---

    def _set_up_queue(self) -> None:
        for register, value in (
            (STATUS, 0),
            (STATUS, 3),
            (DRIVER_FEATURES, 0),
            (PAGE_SIZE, 4096),
            (QUEUE_SELECT, 0),
            (QUEUE_SIZE, ENTRIES),
            (QUEUE_ALIGN, USED_ALIGN),
            (QUEUE_PAGE, RING // 4096),
            (STATUS, 7),
        ):
            self._ask(f"writel {self._device + register:#x} {value:#x}")

    def _submit(self, size: int) -> None:
        """Offer the message and a buffer for the answer, and wait until the device has used them."""
        descriptors = struct.pack("<QIHHQIHH", REQUEST, size, 1, 1, ANSWER, MESSAGE_SIZE, 2, 0)
        self._write(RING, descriptors)
        available = RING + 16 * ENTRIES
        self._write(available + 4 + 2 * (self._asked % ENTRIES), struct.pack("<H", 0))
        self._asked = (self._asked + 1) & 0xFFFF
        self._write(available + 2, struct.pack("<H", self._asked))
        self._ask(f"writel {self._device + QUEUE_NOTIFY:#x} 0")
        end = time.monotonic() + DEADLINE_S
        while self._number(f"readw {RING + USED_ALIGN + 2:#x}") != self._asked:
            if time.monotonic() > end:
                raise TimeoutError("QEMU does not answer a 9p message")

    # --- qtest ---

    def _write(self, address: int, data: bytes) -> None:
        self._ask(f"write {address:#x} {len(data)} 0x{data.hex()}")

    def _read(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self._ask(f"read {address:#x} {size}")[2:])

    def _number(self, line: str) -> int:
        return int(self._ask(line), 16)

    def _ask(self, line: str) -> str:
        """Send one line; return what its answer says after OK."""
        self._channel.sendall(line.encode() + b"\n")
        while True:
            while b"\n" not in self._received:
                data = self._channel.recv(1 << 20)
                if not data:
                    raise ConnectionError("QEMU has ended")
                self._received += data
            answer, _, self._received = self._received.partition(b"\n")
            status, _, rest = answer.decode().partition(" ")
            if status != "IRQ":
                assert status == "OK", (line, answer)
                return rest


def text(string: str) -> bytes:
    """Return a string of the protocol."""
    data = os.fsencode(string)
    return struct.pack("<H", len(data)) + data


@contextlib.contextmanager
def raw_share(qemu: Sequence[str], path: Path, model: str, options: Sequence[str] = (), more: str = "") -> Iterator[RawShare]:
    """Start QEMU with one share, its processor stopped, and open a session with it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    value = f"local,id=fs,path={path},security_model={model}{more}"
    words = [*qemu, "-M", "microvm,pit=off,pic=off,rtc=off", "-m", "64", "-nodefaults", "-display", "none", "-S"]
    words += ["-chardev", f"socket,id=qtest,fd={theirs.fileno()}", "-qtest", "chardev:qtest", "-qtest-log", "none"]
    words += ["-fsdev", value, "-device", "virtio-9p-device,fsdev=fs,mount_tag=fs", *options]
    null = subprocess.DEVNULL
    with ours, subprocess.Popen(words, pass_fds=(theirs.fileno(),), stdin=null, stderr=None) as process:
        theirs.close()
        try:
            yield RawShare(ours, process.pid)
            assert process.poll() is None, "QEMU has ended"
        finally:
            process.terminate()
