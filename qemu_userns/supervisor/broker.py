"""One QMP monitor of QEMU's and its clients: the sockets around a Session (qmp/session.py)."""

import os
from _socket import AF_UNIX, SO_DOMAIN, SO_PASSCRED, SO_PEERCRED, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket

from qemu_userns.plan.grants import FD, LISTEN, STDIO
from qemu_userns.plan.rights import READ_ONLY
from qemu_userns.qmp.actions import (
    OUTPUT_MAX_BYTES,
    CloseClient,
    CloseFds,
    Keep,
    Log,
    Prepare,
    Release,
    Removed,
    SendClient,
    SendQemu,
)
from qemu_userns.qmp.policy import Policy
from qemu_userns.qmp.session import Session
from qemu_userns.supervisor.connection import Connection
from qemu_userns.supervisor.poller import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qemu_userns.plan.grants import Monitor
    from qemu_userns.plan.rights import Rights
    from qemu_userns.qmp.actions import Action, Owner, Rules
    from qemu_userns.supervisor.opener import Opener
    from qemu_userns.supervisor.poller import Poller

_MOST_CLIENTS = 128
_TOKEN_BYTES = 12
_SIZE_OF_UCRED = 12


class Host:
    """What a monitor needs of the rest of the supervisor."""

    def __init__(
        self,
        poller: "Poller",
        opener: "Opener",
        log: "Callable[[str], None]",
        tell_pid: "Callable[[int], None]",
        tell_removed: "Callable[[Broker, Owner], None]",
    ) -> None:
        """Collect it.

        Args:
            poller: calls back.
            opener: opens what commands name.
            log: takes a line.
            tell_pid: told QEMU's pid, as the kernel says it, whenever QEMU speaks.
            tell_removed: told of an object that is gone, and that another monitor may have got something for.
        """
        self.poller, self.opener, self.log, self.tell_pid, self.tell_removed = poller, opener, log, tell_pid, tell_removed


class Broker:
    """A monitor, from the first client to QEMU's end."""

    def __init__(self, host: Host, monitor: "Monitor", way_in: int, rules: "Rules", own_fdsets: "frozenset[int]") -> None:
        """Prepare to serve a monitor.

        Args:
            host: the rest of the supervisor.
            monitor: what to serve.
            way_in: fd of the private socket's inode; taken over.
            rules: which commands are the opener's.
            own_fdsets: which no client shall see.
        """
        self.monitor = monitor
        self.ended = False  # QEMU has closed its end
        self._host, self._way_in = host, way_in
        self._session = Session(os.urandom(_TOKEN_BYTES).hex(), own_fdsets, monitor.pretty, rules)
        self._qemu: "Connection | None" = None
        self._clients: "dict[int, Connection]" = {}
        self._listeners: "list[int]" = []
        self._ending: "set[int]" = set()  # clients that say no more, and still have answers to come
        self._last_client = 0

    def serve(self, public: "list[int]", lost: "Callable[[], None]") -> None:
        """Serve what the monitor's grant says.

        Args:
            public: fds of the clients' side; taken over.
            lost: called when the client that the monitor connected to has gone.
        """
        monitor = self.monitor
        if public and (monitor.kind == LISTEN or (monitor.kind == FD and monitor.listens)):
            self.listen(public[0], monitor.rights)
        elif public:  # one socket, or stdin and stdout
            self.add_client(public[0], public[-1], monitor.rights, lost)
        if not monitor.wait:
            self.connect_qemu()

    def connect_qemu(self) -> None:
        """Connect to QEMU's private socket; it answers once it runs."""
        ours = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        ours.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)  # what QEMU sends comes with its pid
        ours.connect(f"/proc/self/fd/{self._way_in}")
        fd = ours.detach()
        self._qemu = Connection(self._host.poller, fd, fd, self._hear_qemu)

    def listen(self, fd: int, rights: "Rights") -> None:
        """Take the clients of a listening socket; takes it over."""
        self._listeners.append(fd)
        self._host.poller.watch(fd, IN, lambda _: self._accept(fd, rights))

    def add_client(self, read_fd: int, write_fd: int, rights: "Rights", lost: "Callable[[], None] | None" = None) -> None:
        """Take a client; its fds are taken over."""
        self._last_client += 1
        number = self._last_client

        def hear(data: bytes, fds: "tuple[int, ...]") -> None:
            self._hear_client(number, data, fds)
            if lost is not None and number not in self._clients:
                lost()

        self._clients[number] = Connection(self._host.poller, read_fd, write_fd, hear)
        self._carry_out(self._session.open_client(number, _build_policy(rights)))

    def restore(self, owner: "Owner", handed: int, fdsets: "tuple[int, ...]") -> None:
        """Note what an object holds that an earlier supervisor has handed over."""
        self._session.keep(owner, handed, fdsets)

    def remove_owner(self, owner: "Owner") -> None:
        """Take back what an object got that another monitor has seen go."""
        self._carry_out(self._session.remove_owner(owner))

    def has_unsent(self) -> bool:
        """Say whether clients still have to read what was sent to them."""
        return any(client.queued_bytes for client in self._clients.values())

    def close(self) -> None:
        """Close everything."""
        for fd in self._listeners:
            self._host.poller.unwatch(fd)
            os.close(fd)
        self._listeners.clear()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        if self._qemu is not None:
            self._qemu.close()

    def _accept(self, fd: int, rights: "Rights") -> None:
        listener = socket(fileno=fd)
        try:
            client, _ = listener._accept()  # type: ignore[attr-defined]
        except OSError as err:
            self._log(f"a client cannot be accepted: {err.strerror}")
            return
        finally:
            listener.detach()
        uid = find_peer_uid(client)
        if rights.users and uid is not None and uid not in rights.users:
            os.close(client)
            self._log(f"a client of uid {uid} is turned away, as the settings say")
            return
        if len(self._clients) >= _MOST_CLIENTS:
            os.close(client)
            self._log(f"a client is turned away: {_MOST_CLIENTS} are there")
            return
        if self._qemu is None and not self.ended:
            self.connect_qemu()
        self.add_client(client, client, rights)

    def _hear_client(self, number: int, data: bytes, fds: "tuple[int, ...]") -> None:
        if data:
            self._carry_out(self._session.receive_client(number, data, fds))
            self._steer(number)
            return
        connection = self._clients[number]
        if connection.hung_up:
            self._end_client(number)
            return
        # It says no more, but reads the answers to what it said; QEMU goes on telling its stdout of events to the end.
        connection.read(False)
        self._ending.add(number)
        self._end_quiet_clients()

    def _end_quiet_clients(self) -> None:
        """End the clients that say no more and have got all their answers."""
        for number in tuple(self._ending):
            if self._session.is_idle(number) and self.monitor.kind != STDIO:
                self._end_client(number)

    def _end_client(self, number: int) -> None:
        connection = self._clients.pop(number, None)
        self._ending.discard(number)
        if connection is not None:
            connection.close()
            self._carry_out(self._session.close_client(number))

    def _steer(self, number: int) -> None:
        """Read on from a client, or not, as its session wants."""
        connection = self._clients.get(number)
        if connection is not None and number not in self._ending:
            connection.read(self._session.wants_input(number))

    def _hear_qemu(self, data: bytes, fds: "tuple[int, ...]") -> None:
        assert self._qemu is not None
        for fd in fds:
            os.close(fd)  # QEMU sends none
        if self._qemu.peer_pid:
            self._host.tell_pid(self._qemu.peer_pid)
        if data:
            self._carry_out(self._session.receive_qemu(data))
        else:
            self.ended = True
            self._qemu.close()
            self._carry_out(self._session.close_qemu())
        for number in tuple(self._clients):
            self._steer(number)
        self._end_quiet_clients()

    def _carry_out(self, actions: "Iterable[Action]") -> None:
        opener = self._host.opener
        for action in actions:
            match action:
                case SendClient():
                    self._send_client(action)
                case SendQemu():
                    if self._qemu is not None:
                        self._qemu.send(action.data, action.fds)
                case CloseClient():
                    self._close_client(action)
                case CloseFds():
                    for fd in action.fds:
                        os.close(fd)
                case Prepare():
                    opener.prepare(action, lambda ticket, answer: self._carry_out(self._session.answer(ticket, answer)))
                case Release():
                    opener.release(action)
                case Keep():
                    opener.keep(self.monitor.label, action)
                case Removed():
                    self._host.tell_removed(self, action.owner)
                case Log():
                    self._log(action.text)

    def _send_client(self, action: SendClient) -> None:
        client = self._clients.get(action.client)
        if client is None:
            return
        client.send(action.data)
        if client.queued_bytes > OUTPUT_MAX_BYTES:
            self._log(f"client {action.client} reads too slowly and is disconnected")
            self._end_client(action.client)

    def _close_client(self, action: CloseClient) -> None:
        """Close a client; what it has not read yet it gets before the supervisor ends."""
        client = self._clients.get(action.client)
        if action.reason:
            self._log(f"client {action.client}: {action.reason}")
        if client is not None and not client.queued_bytes:
            self._end_client(action.client)

    def _log(self, text: str) -> None:
        self._host.log(f"{self.monitor.label}: {text}")


def _build_policy(rights: "Rights") -> Policy:
    """Return what a session knows of rights."""
    allow = frozenset(rights.allow) if rights.allow else None
    return Policy(rights.access == READ_ONLY, allow, frozenset(rights.deny))


def find_peer_uid(fd: int) -> "int | None":
    """Return whose process is at the other end of a unix socket (unix(7), SO_PEERCRED), None for another kind of socket."""
    peer = socket(fileno=fd)
    try:
        if peer.getsockopt(SOL_SOCKET, SO_DOMAIN) != AF_UNIX:
            return None
        found = peer.getsockopt(SOL_SOCKET, SO_PEERCRED, _SIZE_OF_UCRED)
    finally:
        peer.detach()
    return int.from_bytes(found[4:8], "little")
