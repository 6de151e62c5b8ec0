"""Out-of-band commands: they pass the line, so their replies are told apart by ids of ours, which only we and QEMU know."""

from collections import deque

from qemu_userns.qmp.actions import SendQemu
from qemu_userns.qmp.message import build_command, build_error, build_return, get_dict, read_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.qmp.clients import Client
    from qemu_userns.qmp.message import Command
    from qemu_userns.qmp.shared import Shared

RUNNING_MAX = 256
"""At QEMU at a time, those of clients that have left too."""
CLIENT_MAX = 8


class OutOfBand:
    """The out-of-band commands of a session."""

    def __init__(self, shared: "Shared") -> None:
        """Begin with none."""
        self._shared = shared
        self._waiting: deque[Client] = deque()
        """A client for each command in its `oob_waiting`, in order."""
        self._running: dict[str, tuple[Client, str | None, int]] = {}
        """By our id, who waits for the reply, its own id, and how large the command was."""

    def push(self, client: "Client", command: "Command") -> None:
        """Take a command that its client may run, and send it if not too many are at QEMU."""
        client.oob_waiting.append(command)
        client.waiting_bytes += len(command.text)  # until the reply: QEMU may not read, either
        self._waiting.append(client)
        self._send()

    def forget(self, client: "Client") -> None:
        """Give up what a client that leaves has not had sent."""
        if client.oob_waiting:
            self._waiting = deque(waiting for waiting in self._waiting if waiting is not client)

    def _send(self) -> None:
        for _ in range(len(self._waiting)):
            client = self._waiting.popleft()
            if client.oob_running >= CLIENT_MAX or len(self._running) >= RUNNING_MAX:
                self._waiting.append(client)
                continue
            command = client.oob_waiting.popleft()
            client.oob_running += 1
            echo = self._shared.next_id()
            self._running[echo[1:-1]] = (client, command.id, len(command.text))
            self._shared.actions.append(SendQemu(build_command(command.name, command.arguments, echo, oob=True)))

    def receive(self, line: bytes) -> bool:
        """Pass a reply on with the client's id; return False if it is to no out-of-band command."""
        if not self._running or self._shared.token.encode() not in line:
            return False
        value = read_object(line)
        echo = value.get("id")
        if not isinstance(echo, str) or echo not in self._running:
            return False
        client, before, size_bytes = self._running.pop(echo)
        client.oob_running -= 1
        client.waiting_bytes -= size_bytes
        error = get_dict(value, "error")
        if "return" in value:
            data = build_return(value["return"], before, self._shared.pretty)
        else:
            data = build_error(str(error.get("class")), str(error.get("desc")), before, self._shared.pretty)
        self._shared.tell(client, data)
        self._send()
        return True
