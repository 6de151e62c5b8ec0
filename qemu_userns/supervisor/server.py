"""All monitors of one VM: the fds that the launcher handed over, and our own socket in the run directory."""

import os
import stat
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket, socketpair

from qemu_userns.errors import HostError
from qemu_userns.host.leftovers import Leftover, hold
from qemu_userns.linux.sock_diag import find_bound_inode
from qemu_userns.plan.grants import CONNECT, FD
from qemu_userns.plan.rights import Rights
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.broker import Broker, Host
from qemu_userns.supervisor.log import Log
from qemu_userns.supervisor.opener import Opener
from qemu_userns.supervisor.peers import Peers
from qemu_userns.supervisor.registry import Entry
from qemu_userns.supervisor.rules import RULES
from qemu_userns.supervisor.worker import Failed, start_worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from qemu_userns.host.leftovers import Downscript
    from qemu_userns.plan.grants import Monitor
    from qemu_userns.qmp.actions import Owner
    from qemu_userns.record import Plain
    from qemu_userns.supervisor.handed import Held
    from qemu_userns.supervisor.poller import Poller
    from qemu_userns.supervisor.state import State

_BACKLOG = 16
_CONNECT_TIMEOUT_S = 60
_INODE_MASK = 0xFFFFFFFF  # what sock_diag tells of it; the device that it tells is not that of stat(2) on btrfs and overlayfs


class Server:
    """Everything that a VM's supervisor serves."""

    def __init__(self, state: "State", poller: "Poller", learn_pid: "Callable[[int], int]") -> None:
        """Prepare.

        Args:
            state: the VM's.
            poller: calls back.
            learn_pid: told QEMU's pid when QEMU speaks; returns a pidfd, which it keeps.
        """
        self._state, self._poller, self._learn_pid = state, poller, learn_pid
        self._directory = ""  # of the registry, once the VM is there
        self._log = Log()
        poller.report = self._log.write
        self._opener = Opener(state, poller, self._log.write, self._save)
        peers = Peers(state.identity, state.pid, poller.children)
        self._host = Host(poller, self._opener, peers, self._log.write, self._hear_pid, self._tell_removed, self._find_names)
        self._brokers: "list[Broker]" = []
        self._pid = 0

    def tell(self, text: str) -> None:
        """Write a line to the VM's log."""
        self._log.write(text)

    def serve(self, fds: "Sequence[int]", held: "Iterable[Held]" = ()) -> None:
        """Serve the monitors.

        Args:
            fds: of each monitor its public end and the way in, then our own sockets, then displays'; taken over.
            held: what an earlier supervisor has handed out.
        """
        left = list(fds)
        for monitor in self._name_sockets(left):
            public = [left.pop(0) for _ in range(monitor.public_count)]
            broker = Broker(self._host, monitor, left.pop(0), RULES)
            self._brokers.append(broker)
            self._serve(broker, public)
        by_label = {broker.monitor.label: broker for broker in self._brokers}
        for grant in self._state.sockets:
            by_label[grant.label].listen(left.pop(0), grant.rights)
        for display in self._state.displays:
            by_label[display.label].show(display.protocol, left.pop(0))
        for told in self._state.notify:
            self._notify(by_label[told.label], told.address)
        self._restore(tuple(held))
        if not self._state.daemonizes:
            self._hear_pid(self._state.pid)  # which writes down what is held, so that must be known

    def _notify(self, broker: Broker, address: str) -> None:
        """Tell the service manager of QEMU's state, as one more client of a monitor."""
        from qemu_userns.supervisor.notifier import Notifier

        client, served = socketpair(AF_UNIX, SOCK_STREAM)
        fd = served.detach()
        broker.add_client(fd, fd, Rights())
        Notifier(self._poller, client, address, lambda: self._pid, self._log.write)

    def has_more(self) -> bool:
        """Say whether QEMU's last words are still to be read, or to be passed on."""
        return any(not broker.ended or broker.has_unsent() for broker in self._brokers)

    def stop_listening(self) -> None:
        """Take no more clients."""
        for broker in self._brokers:
            broker.stop_listening()

    def close(self) -> "tuple[Leftover, ...]":
        """Close all, and forget the VM; return what was made for it and has to go."""
        for broker in self._brokers:
            broker.close()
        if self._directory:
            registry.remove_entry(self._directory, self._pid)
        return (*self._state.leftovers, *self._opener.find_leftovers())

    def find_downscripts(self) -> "tuple[Downscript, ...]":
        """Return the scripts of what was plugged in and is there still."""
        return self._opener.find_downscripts()

    def _restore(self, held: "tuple[Held, ...]") -> None:
        """Take over what an earlier supervisor has handed out."""
        self._opener.restore(held)
        for item in held:
            for broker in self._brokers:
                if broker.monitor.label == item.label:
                    broker.restore(item.owner, item.number, item.fdsets)

    def _name_sockets(self, fds: "list[int]") -> "tuple[Monitor, ...]":
        """Return the monitors; a listening socket that was inherited may have a path too, which QEMU would remove at its end."""
        monitors, leftovers = [], list(self._state.leftovers)
        position = 0
        for monitor in self._state.monitors:
            inherited = monitor.kind == FD and monitor.listens and not monitor.path
            file = find_socket_file(fds[position]) if inherited else None
            position += monitor.public_count + 1
            if file is not None:
                hold(file)
                leftovers.append(file)
            monitors.append(monitor if file is None else monitor.replace(path=file.path))
        self._state = self._state.replace(monitors=tuple(monitors), leftovers=tuple(leftovers))
        return self._state.monitors

    def _serve(self, broker: Broker, public: "list[int]") -> None:
        """Serve one monitor; one that connects out does so again and again, as QEMU's `reconnect`."""
        monitor = broker.monitor
        again = monitor.kind == CONNECT and monitor.reconnect_s

        def lost() -> None:
            if again:
                self._poller.call_later(monitor.reconnect_s, lambda: self._connect_out(broker, lost))

        broker.serve(public, lost)
        if again:
            self._connect_out(broker, lost)

    def _connect_out(self, broker: Broker, lost: "Callable[[], None]") -> None:
        """Connect a monitor to its client; a host that does not answer must not stop the others, so in a worker."""
        monitor = broker.monitor

        def connect(_: object) -> "tuple[Plain, list[int]]":
            from qemu_userns.host.sockets import open_address

            return None, open_address(_without_reconnect(monitor))

        def done(answer: object, fds: "tuple[int, ...]") -> None:
            if isinstance(answer, Failed) or not fds:
                lost()
            else:
                broker.join(fds, lost)

        if not broker.ended:
            start_worker(self._poller, connect, done, _CONNECT_TIMEOUT_S)

    def _tell_removed(self, teller: Broker, owner: "Owner") -> None:
        for broker in self._brokers:
            if broker is not teller:
                broker.remove_owner(owner)

    def _find_names(self) -> "dict[str, str]":
        """Return what QEMU would call the monitors' character devices, by label."""
        names = {broker.monitor.label: broker.describe_device() for broker in self._brokers}
        return {label: name for label, name in names.items() if name is not None}

    def _hear_pid(self, pid: int) -> None:
        """Register the VM, once its pid is known; that of a launcher that daemonizes is not."""
        if self._pid or (self._state.daemonizes and pid == self._state.pid):
            return
        try:
            self._opener.pidfd = self._learn_pid(pid)
        except OSError as err:
            self._log.write(f"QEMU's process cannot be watched: {err.strerror}")
            return  # until QEMU speaks again
        self._pid = self._opener.pid = pid
        self._state = self._state.replace(pid=pid, daemonizes=False, started=registry.find_start(pid))
        try:
            self._register()
        except (HostError, OSError) as err:
            why = err.strerror if isinstance(err, OSError) else err
            self._log.write(f"the VM {pid} is not registered, qmp and adopt do not know it: {why}")
            self._log.give_up_file()

    def _register(self) -> None:
        """Make the VM known to others of our programs, on a socket of its own."""
        directory, pid = registry.open_registry(os.geteuid()), self._pid
        registry.sweep(directory, [item.path for item in self._state.leftovers])
        self._lock = registry.lock_entry(directory, pid)
        if self._lock is None:
            raise HostError(f"{directory}/{pid}.lock", "another process holds the lock")
        self._directory = directory
        self._log.open(f"{directory}/{pid}.log")
        self._brokers[0].listen(_listen(f"{directory}/{pid}.qmp"), Rights())
        self._save()

    def _save(self) -> None:
        """Write down what the next supervisor has to know."""
        if not self._directory:
            return
        try:
            registry.write_entry(self._directory, self._pid, Entry(self._state, os.getpid(), self._opener.list_held()))
        except OSError as err:
            self._log.write(f"the state of the VM cannot be written: {err.strerror}")


def find_socket_file(fd: int) -> "Leftover | None":
    """Return the file of a unix socket, None where its name is no path from / on, or leads to something else by now."""
    bound = socket(fileno=fd)
    try:
        name = bound.getsockname()
    finally:
        bound.detach()
    if not isinstance(name, str) or not name.startswith("/"):
        return None
    path = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode) or found.st_ino & _INODE_MASK != find_bound_inode(fd):
        return None
    return Leftover(path, (found.st_dev, found.st_ino), True)


def _listen(path: str) -> int:
    """Return an owned fd of our own socket."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    ours = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    os.fchmod(ours.fileno(), 0o600)
    ours.bind(path)
    ours.listen(_BACKLOG)
    return ours.detach()


def _without_reconnect(monitor: "Monitor") -> "Monitor":
    """Return the grant of a connection that is to be made now."""
    return monitor.replace(options=tuple(pair for pair in monitor.options if not pair[0].startswith("reconnect")))
