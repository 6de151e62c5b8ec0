"""Helpers for tests of sessions: short spellings, and a Session between a real QEMU and clients."""

import contextlib
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qemu_userns.qmp.actions import Action, CloseFds, Rules, SendClient, SendQemu
from qemu_userns.qmp.message import Command
from qemu_userns.qmp.policy import FULL, Policy
from qemu_userns.qmp.session import Session
from tests.plain import wait_main_loop

TOKEN = "token"
GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
NEGOTIATED = (
    b'{"error": {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}}\r\n'
)
DONE = b'{"return": {}}\r\n'


def find_fd_names(command: Command) -> Iterator[tuple[int, int, str]]:
    """Find what stands behind `fd:` and `"fd": "` up to the next quote."""
    for mark in ('"fd":"', "fd:"):
        start = command.text.find(mark)
        if start >= 0:
            start += len(mark)
            end = command.text.index('"', start)
            yield start, end, command.text[start:end]


def find_owner(name: str, arguments: dict[str, object]) -> tuple[str, str] | None:
    return ("blockdev", str(arguments.get("node-name"))) if name == "blockdev-add" else None


def find_removed(name: str, arguments: dict[str, object]) -> tuple[str, str] | None:
    return ("blockdev", str(arguments.get("node-name"))) if name == "blockdev-del" else None


def find_gone(name: str, data: dict[str, object]) -> tuple[str, str] | None:
    return ("blockdev", str(data.get("device"))) if name == "DEVICE_DELETED" else None


RULES = Rules(lambda command: command.name in ("blockdev-add", "screendump"), find_owner, find_removed, find_gone, find_fd_names)


def start(*clients: int, policy: Policy = FULL, pretty: bool = False, rules: Rules = RULES) -> Session:
    """Return a session that is ready, with clients that have negotiated."""
    session = Session(TOKEN, pretty, rules)
    assert session.receive_qemu(GREETING)
    assert session.receive_qemu(b'{"return": {}, "id": "token-1"}\r\n') == []
    for client in clients:
        session.open_client(client, policy)
        negotiate(session, client)
    return session


def negotiate(session: Session, client: int, oob: bool = False) -> None:
    text = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}' if oob else b'{"execute":"qmp_capabilities"}'
    assert session.receive_client(client, text, ()) == [SendQemu(text)]
    assert session.receive_qemu(NEGOTIATED) == [SendClient(client, DONE)]


def sent(actions: Sequence[Action], client: int) -> bytes:
    """Return what a client is sent."""
    return b"".join(action.data for action in actions if isinstance(action, SendClient) and action.client == client)


@contextlib.contextmanager
def run_qemu(folder: Path, *options: str, pretty: bool = False) -> Iterator[Path]:
    """Run a QEMU whose monitor listens on the path that this yields; its pid is in the file PATH.pid."""
    path = folder / f"qmp{len(list(folder.iterdir()))}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(5)
        mon = f"chardev=m,mode=control{',pretty=on' if pretty else ''}"
        command = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
        process = subprocess.Popen(
            [*command, "-chardev", f"socket,id=m,fd={listener.fileno()},server=on,wait=off", "-mon", mon, *options],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
        )
    path.with_suffix(".pid").write_text(str(process.pid))
    try:
        wait_main_loop(process)
        yield path
    finally:
        process.kill()
        process.wait()


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(path))
    return connection


class Direct:
    """A client of QEMU itself."""

    def __init__(self, path: Path) -> None:
        self._socket = connect(path)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self._socket, [data], list(fds))

    def read_to(self, mark: bytes) -> bytes:
        """Read up to the message with `mark`, which is left out."""
        return read_to(mark, self.read)

    def read(self) -> bytes:
        return self._socket.recv(65536)

    def close(self) -> None:
        self._socket.close()


class Brokered:
    """QEMU behind a Session, and one client at a time."""

    def __init__(self, path: Path, pretty: bool = False, rules: Rules = RULES) -> None:
        self._socket = connect(path)
        self.session = Session(os.urandom(8).hex(), pretty, rules)
        self.client = 0
        self.output: dict[int, bytes] = {}
        self.actions: list[Action] = []

    def open(self, policy: Policy = FULL) -> int:
        self.client += 1
        self.output[self.client] = b""
        self.do(self.session.open_client(self.client, policy))
        return self.client

    def close_client(self) -> None:
        self.do(self.session.close_client(self.client))

    def send(self, data: bytes, fds: Sequence[int] = (), client: int | None = None) -> None:
        """Send a client's bytes; takes the fds."""
        self.do(self.session.receive_client(client or self.client, data, tuple(fds)))

    def read_to(self, mark: bytes, client: int | None = None) -> bytes:
        return read_to(mark, lambda: self.read(client or self.client))

    def read(self, client: int) -> bytes:
        while not self.output[client]:
            self.do(self.session.receive_qemu(self._socket.recv(65536)))
        data, self.output[client] = self.output[client], b""
        return data

    def settle(self) -> None:
        """Read what QEMU says until it says nothing."""
        while select.select([self._socket], [], [], 0.2)[0]:
            self.do(self.session.receive_qemu(self._socket.recv(65536)))

    def do(self, actions: Sequence[Action]) -> None:
        self.actions += actions
        for action in actions:
            if isinstance(action, SendQemu):
                self._send_qemu(action)
            elif isinstance(action, SendClient):
                self.output[action.client] += action.data
            elif isinstance(action, CloseFds):
                for fd in action.fds:
                    os.close(fd)

    def _send_qemu(self, action: SendQemu) -> None:
        count = socket.send_fds(self._socket, [action.data], list(action.fds))
        self._socket.sendall(action.data[count:])
        for fd in action.fds:
            os.close(fd)

    def close(self) -> None:
        self.do(self.session.close_qemu())
        self._socket.close()


def read_to(mark: bytes, read: Callable[[], bytes]) -> bytes:
    """Read until the message with `mark` is whole, and return what came before it."""
    data = b""
    while mark not in data or not data.endswith(b"\n}\r\n" if b"{\r\n" in data else b"}\r\n"):
        piece = read()
        assert piece, f"EOF after {data!r}"
        data += piece
    before = data[: data.index(mark)]
    return before[: before.rfind(b"\r\n{") + 2] if b"\r\n{" in before else b""
