"""Tell the service manager of a VM's state: sd_notify(3), from what QMP says. A client of one of the VM's monitors."""

import json
import re
from _socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_DGRAM, socket

from qemu_userns.supervisor.poller import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.supervisor.poller import Poller

_CHUNK_BYTES = 65536
# After these events query-status says something else (qapi/run-state.json).
_CHANGES = frozenset(("STOP", "RESUME", "SHUTDOWN", "RESET", "SUSPEND", "WAKEUP", "GUEST_PANICKED", "MIGRATION"))
_RUN_STATE = re.compile("[a-z-]{1,40}")


class Notifier:
    """Says READY=1 with QEMU's pid when QEMU answers, and STATUS= with the guest's run state at each change."""

    def __init__(
        self, poller: "Poller", connection: socket, address: str, find_pid: "Callable[[], int]", log: "Callable[[str], None]"
    ) -> None:
        """Begin.

        Args:
            poller: calls back.
            connection: to a QMP monitor; taken over.
            address: of the service manager, as NOTIFY_SOCKET has it.
            find_pid: returns QEMU's pid, which is known once QEMU has spoken.
            log: takes a line.
        """
        self._poller, self._connection, self._find_pid, self._log = poller, connection, find_pid, log
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._heard = b""
        self._ready = False
        poller.watch(connection.fileno(), IN, self._hear, self._close)

    def _hear(self, _: int) -> None:
        """Take what QEMU says; there are no more answers after its end."""
        data = self._connection.recv(_CHUNK_BYTES, MSG_DONTWAIT)
        if not data:
            self._close()
            return
        *lines, self._heard = (self._heard + data).split(b"\n")
        try:
            for line in filter(bytes.strip, lines):
                self._take(json.loads(line))
        except (ValueError, RecursionError):
            self._log("QEMU says what is no JSON: the service manager is told no more")
            self._close()
        except BrokenPipeError:
            self._close()  # the broker has ended this client

    def _take(self, message: object) -> None:
        """Take a message: the greeting, the answer to a command, or an event; anything else says nothing."""
        if not isinstance(message, dict):
            return
        found = message.get("return")
        if "QMP" in message:
            self._ask("qmp_capabilities")
        elif str(message.get("event")) in _CHANGES or found == {}:
            self._ask("query-status")
        elif isinstance(found, dict):
            self._tell(found.get("status"))

    def _ask(self, command: str) -> None:
        self._connection.send(json.dumps({"execute": command}).encode() + b"\n", MSG_NOSIGNAL)

    def _tell(self, status: object) -> None:
        """Send a notification; that nobody takes it must not harm the VM. What QEMU says must not become lines of it."""
        word = status if isinstance(status, str) and _RUN_STATE.fullmatch(status) else "unknown"
        lines = [f"STATUS={word}"]
        if not self._ready:
            lines += ["READY=1", *([f"MAINPID={pid}"] if (pid := self._find_pid()) else [])]
            self._ready = True
        ours = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
        try:
            ours.sendto("\n".join(lines).encode(), MSG_DONTWAIT | MSG_NOSIGNAL, self._address)
        except OSError as err:
            self._log(f"the service manager cannot be told: {err.strerror}")
        finally:
            ours.close()

    def _close(self) -> None:
        self._poller.unwatch(self._connection.fileno())
        self._connection.close()
