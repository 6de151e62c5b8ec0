"""One client of a session: what it has sent and what is waiting of it.

QEMU runs one command of a monitor at a time and does not read on meanwhile, so what a client sends has its effect in order: also
fds, which become the pending ones when their turn comes, and are taken by the first `getfd` or `add-fd` behind them
(contracts/qemu.md 2.2). Each message with fds replaces the pending one; of several only the first is ever taken.
"""

from collections import deque

from qemu_userns.qmp.stream import CommandStream
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.qmp.actions import Prepared
    from qemu_userns.qmp.message import Command
    from qemu_userns.qmp.policy import Policy

WAITING_MAX = 64
"""Entries that may wait before the session stops reading; QEMU itself takes 1, or 8 with out-of-band."""
WAITING_MAX_BYTES = 1 << 20


class Turn(Record):
    """Something of a client that waits for its turn: exactly one of the first four fields is set."""

    command: "Command | None" = None
    raw: "bytes | None" = None
    """A message that is no command."""
    answer: "bytes | None" = None
    """What the client is told."""
    fd: "int | None" = None
    """An fd that becomes the pending one."""
    free: bool = False
    """QEMU has said that the id of what the command makes is free."""


class Opening(Record):
    """A command that names host resources, on its way through `Prepare`."""

    client: "Client"
    command: "Command"
    renamed: "tuple[tuple[str, str], ...]"
    """(at QEMU, the client's) of each getfd name that was replaced in it."""
    names: "tuple[str, ...]"
    """The client's getfd names that it refers to."""


class Client:
    """The state of one client."""

    def __init__(self, number: int, policy: "Policy") -> None:
        """Begin before the greeting."""
        self.number = number
        self.policy = policy
        self.restricted = policy.restricted
        self.stream = CommandStream()
        self.gone = False
        self.greeted = False
        self.negotiated = False
        self.oob = False
        """It has negotiated out-of-band execution."""
        self.busy = False
        """A command of it is being prepared or is at QEMU."""
        self.listed = False
        """It is in line."""
        self.prepared: tuple[Opening, Prepared] | None = None
        """A command that is prepared and waits for QEMU."""
        self.pending: int | None = None
        """The fd that the next getfd or add-fd takes."""
        self._turns: deque[Turn] = deque()
        self.waiting_bytes = 0
        self.oob_waiting: deque[Command] = deque()
        self.oob_running = 0

    def wants_input(self) -> bool:
        """Tell whether little enough waits to read on."""
        waiting = len(self._turns) + len(self.oob_waiting)
        return waiting < WAITING_MAX and self.waiting_bytes < WAITING_MAX_BYTES

    def has_work(self) -> bool:
        """Tell whether the client can be served now."""
        return not self.busy and not self.gone and (self.prepared is not None or bool(self._turns))

    def is_idle(self) -> bool:
        """Tell whether nothing of the client waits or is at QEMU."""
        return not (self.busy or self._turns or self.prepared or self.oob_waiting or self.oob_running)

    def push(self, turn: Turn) -> None:
        """Append what waits."""
        self._turns.append(turn)
        self.waiting_bytes += measure(turn)

    def push_first(self, turn: Turn) -> None:
        """Put something before all that waits."""
        self._turns.appendleft(turn)
        self.waiting_bytes += measure(turn)

    def pop(self) -> Turn:
        """Take what waited longest."""
        turn = self._turns.popleft()
        self.waiting_bytes -= measure(turn)
        return turn

    def take_oob(self) -> "list[Command]":
        """Take the out-of-band commands out of what waits, once they need not wait for their turn."""
        found = [turn for turn in self._turns if turn.command and turn.command.oob]
        if found:
            self._turns = deque(turn for turn in self._turns if not (turn.command and turn.command.oob))
            self.waiting_bytes -= sum(map(measure, found))
        return [turn.command for turn in found if turn.command]

    def replace_pending(self, fd: "int | None") -> "tuple[int, ...]":
        """Set the pending fd, and return the one before, which has to be closed."""
        before, self.pending = self.pending, fd
        return () if before is None else (before,)

    def leave(self) -> "tuple[int, ...]":
        """Forget everything and return all fds, which have to be closed."""
        self.gone = True
        fds = [turn.fd for turn in self._turns if turn.fd is not None]
        if self.pending is not None:
            fds.append(self.pending)
        if self.prepared:
            fds += list_fds(self.prepared[1])
        self.pending = self.prepared = None
        self._turns.clear()
        self.oob_waiting.clear()
        return tuple(fds)


class Line:
    """Clients that can be served, each once, in the order of their turns."""

    def __init__(self) -> None:
        """Begin with none."""
        self._clients: deque[Client] = deque()

    def __bool__(self) -> bool:
        """Tell whether anybody is there."""
        return bool(self._clients)

    def add(self, client: Client) -> None:
        """Put a client that can be served at the end."""
        if not client.listed and client.has_work():
            client.listed = True
            self._clients.append(client)

    def pop(self) -> Client:
        """Take the first one out."""
        client = self._clients.popleft()
        client.listed = False
        return client

    def remove(self, client: Client) -> None:
        """Take out a client that leaves, if it is there."""
        if client.listed:
            self._clients.remove(client)


def measure(turn: Turn) -> int:
    """Return how many bytes something that waits holds."""
    return len(turn.command.text) if turn.command else len(turn.raw or turn.answer or b"")


def list_fds(prepared: "Prepared") -> "tuple[int, ...]":
    """Return every fd of what was prepared, in the order in which they are sent."""
    return (*(fd for _, fd, _ in prepared.fdsets), *(fd for _, fd in prepared.names))
