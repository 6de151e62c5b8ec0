"""One QMP monitor of QEMU's and its clients: the sockets around a Session (qmp/session.py)."""

import os
from _socket import AF_UNIX, SO_PASSCRED, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET, socket
from collections import deque

from qemu_userns.plan.grants import CONNECT, FD, LISTEN, STDIO, VNC
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
from qemu_userns.supervisor.devices import describe_device
from qemu_userns.supervisor.listener import Listener, admit
from qemu_userns.supervisor.log import Seldom
from qemu_userns.supervisor.peers import find_stranger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from qemu_userns.plan.grants import Monitor
    from qemu_userns.plan.rights import Rights
    from qemu_userns.qmp.actions import Action, Owner, Rules
    from qemu_userns.supervisor.opener import Opener
    from qemu_userns.supervisor.peers import Peers
    from qemu_userns.supervisor.poller import Poller

_MOST_CLIENTS = 128
_TOKEN_BYTES = 12


class Host:
    """What a monitor needs of the rest of the supervisor."""

    def __init__(
        self,
        poller: "Poller",
        opener: "Opener",
        peers: "Peers",
        log: "Callable[[str], None]",
        tell_pid: "Callable[[int], None]",
        tell_removed: "Callable[[Broker, Owner], None]",
        find_device_names: "Callable[[], dict[str, str]]",
    ) -> None:
        """Collect it.

        Args:
            poller: calls back.
            opener: opens what commands name.
            peers: tells clients from QEMU.
            log: takes a line.
            tell_pid: told QEMU's pid, as the kernel says it, whenever QEMU speaks.
            tell_removed: told of an object that is gone, and that another monitor may have got something for.
            find_device_names: what QEMU would call the character devices of the monitors, by label.
        """
        self.poller, self.opener, self.peers, self.log = poller, opener, peers, log
        self.tell_pid, self.tell_removed, self.find_device_names = tell_pid, tell_removed, find_device_names


class Broker:
    """A monitor, from the first client to QEMU's end."""

    def __init__(self, host: Host, monitor: "Monitor", way_in: int, rules: "Rules") -> None:
        """Prepare to serve a monitor.

        Args:
            host: the rest of the supervisor.
            monitor: what to serve.
            way_in: fd of the private socket's inode; taken over.
            rules: which commands are the opener's.
        """
        self.monitor = monitor
        self.ended = False  # QEMU has closed its end
        self._host, self._way_in = host, way_in
        token = os.urandom(_TOKEN_BYTES).hex()
        self._session = Session(token, monitor.pretty, rules, host.find_device_names)
        self._qemu: "Connection | None" = None
        self._clients: "dict[int, Connection]" = {}
        self._listeners: "list[Listener]" = []
        self._own_clients: "set[int]" = set()  # on the monitor's own socket, not on another of ours
        self._paused: "set[int]" = set()  # clients that are not read from for now
        self._ending: "set[int]" = set()  # clients that say no more, and still have answers to come
        self._leaving: "set[Connection]" = set()  # of clients that are forgotten but for what they have to read
        self._lost: "dict[int, Callable[[], None]]" = {}
        self._todo: "deque[Action]" = deque()
        self._at_work = False
        self._last_client = 0
        self._faults = Seldom(self._log)  # QEMU may come again and again

    def serve(self, public: "list[int]", lost: "Callable[[], None]") -> None:
        """Serve what the monitor's grant says.

        Args:
            public: fds of the clients' side; taken over.
            lost: called when the client that the monitor connected to has gone.
        """
        monitor = self.monitor
        if public and (monitor.kind == LISTEN or (monitor.kind == FD and monitor.listens)):
            self.listen(public[0], monitor.rights, own=True)
        elif public:  # one socket, or stdin and stdout
            self.join(public, lost)
        if not monitor.wait:
            self.connect_qemu()

    def connect_qemu(self) -> None:
        """Connect to QEMU's private socket; it answers once it runs."""
        ours = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)  # QEMU may never accept
        ours.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)  # what QEMU sends comes with its pid
        try:
            ours.connect(f"/proc/self/fd/{self._way_in}")
        except OSError as err:
            self._log(f"QEMU's side of the monitor is gone: {err.strerror}")
            self._end()
            return
        fd = ours.detach()
        self._qemu = Connection(self._host.poller, fd, fd, self._hear_qemu, asks_pid=True)

    def join(self, public: "Sequence[int]", lost: "Callable[[], None]") -> None:
        """Take the one client of a monitor that does not listen, if it may be one; see `serve`."""
        rights = self.monitor.rights
        if admit(public, lambda fd: self._admits(fd, rights, known=self.monitor.kind != CONNECT)):
            self.add_client(public[0], public[-1], rights, lost)
        else:
            lost()

    def listen(self, fd: int, rights: "Rights", own: bool = False) -> None:
        """Take the clients of a listening socket, which may be the monitor's own; takes it over."""

        def admits(client: int) -> bool:
            return self._admits(client, rights, known=False) and self._has_room()

        def take(client: int) -> None:
            self._take(client, rights, own)

        self._listeners.append(Listener(self._host.poller, fd, admits, take, self._log))

    def show(self, protocol: str, fd: int) -> None:
        """Pass QEMU the listening socket of a display, or each client that comes there; takes it over."""

        def give(found: int) -> None:
            self._carry_out(self._session.give_display(protocol, found))

        if protocol == VNC:
            give(fd)
        else:
            self._listeners.append(Listener(self._host.poller, fd, lambda _: True, give, self._log))

    def add_client(self, read_fd: int, write_fd: int, rights: "Rights", lost: "Callable[[], None] | None" = None) -> None:
        """Take a client; its fds are taken over."""
        self._last_client += 1
        number = self._last_client

        def hear(data: bytes, fds: "tuple[int, ...]") -> None:
            self._hear_client(number, data, fds)

        if lost is not None:  # the monitor's own connection
            self._lost[number] = lost
            self._own_clients.add(number)
        self._clients[number] = Connection(self._host.poller, read_fd, write_fd, hear)
        self._carry_out(self._session.open_client(number, _build_policy(rights)))

    def describe_device(self) -> "str | None":
        """Return what QEMU would call the monitor's character device, None for one of our own."""
        own = next((self._clients[number].fileno() for number in self._own_clients if number in self._clients), None)
        return describe_device(self.monitor, own)

    def restore(self, owner: "Owner", handed: int, fdsets: "tuple[int, ...]") -> None:
        """Note what an object holds that an earlier supervisor has handed over."""
        self._session.keep(owner, handed, fdsets)

    def remove_owner(self, owner: "Owner") -> None:
        """Take back what an object got that another monitor has seen go."""
        self._carry_out(self._session.remove_owner(owner))

    def has_unsent(self) -> bool:
        """Say whether clients still have to read what was sent to them."""
        return any(client.queued_bytes for client in (*self._clients.values(), *self._leaving))

    def stop_listening(self) -> None:
        """Take no more clients."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def close(self) -> None:
        """Close everything."""
        self.stop_listening()
        for client in (*self._clients.values(), *self._leaving):
            client.close()
        self._clients.clear()
        self._leaving.clear()
        if self._qemu is not None:
            self._qemu.close()

    def _take(self, client: int, rights: "Rights", own: bool) -> None:
        """Take a client of a listening socket."""
        if own and self._qemu is None and not self.ended:  # another socket's client is not the one that QEMU waits for
            self.connect_qemu()
        self.add_client(client, client, rights)
        if own:
            self._own_clients.add(self._last_client)

    def _admits(self, fd: int, rights: "Rights", known: bool) -> bool:
        """Tell whether who is at the other end may be a client.

        Args:
            fd: of the connection; borrowed.
            rights: of the socket that it has come to.
            known: the caller had the connection before there was a QEMU.
        """
        fault = find_stranger(fd, rights.users) or ("" if known else self._host.peers.find_fault(fd))
        if fault:
            self._faults.tell(f"a client {fault}")
        return not fault

    def _has_room(self) -> bool:
        """Tell whether one more client can be served."""
        full = len(self._clients) + len(self._leaving) >= _MOST_CLIENTS
        if full:
            self._faults.tell(f"a client is turned away: {_MOST_CLIENTS} are there")
        return not full

    def _hear_client(self, number: int, data: bytes, fds: "tuple[int, ...]") -> None:
        if data:
            self._carry_out(self._session.receive_client(number, data, fds))
            if number in self._clients and not self._session.wants_input(number):
                self._clients[number].read(False)
                self._paused.add(number)
            return
        if self._clients[number].hung_up:
            self._end_client(number, deliver=False)
            return
        # It says no more, but reads the answers to what it said; QEMU goes on telling its stdout of events to the end.
        self._clients[number].read(False)
        self._ending.add(number)
        self._carry_out(())

    def _end_client(self, number: int, deliver: bool) -> None:
        """Forget a client.

        Args:
            number: of the client.
            deliver: it still gets what waits for it; else its connection is closed at once.
        """
        connection = self._clients.pop(number, None)
        if connection is None:
            return
        self._ending.discard(number)
        self._paused.discard(number)
        self._own_clients.discard(number)

        def gone() -> None:
            self._leaving.discard(connection)
            if number in self._lost:
                self._lost.pop(number)()

        self._carry_out(self._session.close_client(number))
        if not deliver:
            connection.close()
        self._leaving.add(connection)
        connection.finish(gone)

    def _steer(self) -> None:
        """Read on from the clients that their session wants more of; end those that say no more and have all their answers."""
        for number in [number for number in self._paused if self._session.wants_input(number)]:
            self._paused.discard(number)
            if number not in self._ending:
                self._clients[number].read(True)
        if self._ending and self.monitor.kind != STDIO:
            for number in [number for number in self._ending if self._session.is_idle(number)]:
                self._end_client(number, deliver=True)

    def _hear_qemu(self, data: bytes, fds: "tuple[int, ...]") -> None:
        assert self._qemu is not None
        for fd in fds:
            os.close(fd)  # QEMU sends none
        if self._qemu.peer_pid:
            self._host.tell_pid(self._qemu.peer_pid)
        if data:
            self._carry_out(self._session.receive_qemu(data))
        else:
            self._end()

    def _end(self) -> None:
        """Take the end of QEMU's side."""
        self.ended = True
        if self._qemu is not None:
            self._qemu.close()
        self._carry_out(self._session.close_qemu())

    def _carry_out(self, actions: "Iterable[Action]") -> None:
        """Do what the session says, in order; what follows from doing it comes behind."""
        self._todo.extend(actions)
        if self._at_work:
            return
        self._at_work = True
        try:
            while True:
                while self._todo:
                    self._do(self._todo.popleft())
                if self._paused or self._ending:
                    self._steer()
                if not self._todo:
                    break
        finally:
            self._at_work = False

    def _do(self, action: "Action") -> None:
        opener = self._host.opener
        match action:
            case SendClient():
                self._send_client(action)
            case SendQemu():
                if self._qemu is not None:
                    self._qemu.send(action.data, action.fds)
            case CloseClient():
                if action.reason:
                    self._log(f"client {action.client}: {action.reason}")
                self._end_client(action.client, deliver=True)
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
            self._end_client(action.client, deliver=False)

    def _log(self, text: str) -> None:
        self._host.log(f"{self.monitor.label}: {text}")


def _build_policy(rights: "Rights") -> Policy:
    """Return what a session knows of rights."""
    allow = frozenset(rights.allow) if rights.allow else None
    return Policy(rights.access == READ_ONLY, allow, frozenset(rights.deny))
