"""Become the supervisor of a VM that has lost its own: by what the registry knows, and by what QEMU itself holds.

QEMU keeps an fd that is the way in to each of its private monitor sockets (plan/grants.py: Monitor.way_in); opened through
/proc/PID/fd it leads there again. The public sockets are bound anew. What had no name is lost with the process that had it: the
caller's stdio, and the connection that the caller passed in or QEMU's side had made without `reconnect`.
"""

import os
import stat

from qemu_userns.errors import HostError, SandboxError
from qemu_userns.host.leftovers import Leftover, is_stale, remove
from qemu_userns.host.network import join_network
from qemu_userns.host.realpath import Parent
from qemu_userns.host.sockets import BACKLOG, listen_unix, open_address
from qemu_userns.linux import process
from qemu_userns.plan.grants import LISTEN, VNC, Monitor
from qemu_userns.plan.identity import CALLERS_NETWORK, NO_NETWORK
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.supervisor.poller import Poller
    from qemu_userns.supervisor.state import State

_HINT = "qemu-userns adopt --replace puts a new one in its place"


def take_over(directory: str, pid: int, poller: "Poller") -> "tuple[State, int, Server]":
    """Serve the monitors of a VM from now on; return its state, an owned pidfd of QEMU, and the server.

    Should: run as the user who launched it.

    Raises:
        HostError: it has a supervisor, or has ended, or another version of this program wrote its state.
        SandboxError: QEMU does not hold its side any more.
        OSError: a socket cannot be bound.
    """
    for number in (process.SIGHUP, process.SIGINT, process.SIGTERM):
        process.ignore_signal(number)
    pidfd = os.pidfd_open(pid)  # before the lock: of a VM that is gone, nobody would remove its file
    if registry.lock_entry(directory, pid) is None:  # the fd stays open, so the lock lives as long as this process
        raise HostError(str(pid), "this VM has a supervisor", _HINT)
    try:
        entry = registry.read_entry(directory, pid)
    except (OSError, ValueError) as err:
        raise HostError(str(pid), f"its state cannot be read: {err}") from err
    if not registry.is_running(pid, entry.state):
        raise HostError(str(pid), "this VM has ended")
    if entry.state.network not in (CALLERS_NETWORK, NO_NETWORK):
        join_network(f"/proc/{pid}/ns/net")
    made: "dict[str, Leftover]" = {}
    try:
        os.umask(entry.state.caller.umask)
        state, fds = _open_all(entry.state, made)
        os.umask(0o077)
        server = Server(state, poller, lambda _: pidfd)
        server.serve(fds, entry.held)
    except BaseException:
        remove(made.values())
        raise
    return state, pidfd, server


def _open_all(state: "State", made: "dict[str, Leftover]") -> "tuple[State, list[int]]":
    """Open what a launcher hands over; return the state with the sockets as they are now, and owned fds.

    The ways in come first: a VM that does not hold its side any more gets no new sockets.
    """
    ways_in = [_open_way_in(state.pid, monitor.way_in) for monitor in state.monitors]
    fds: "list[int]" = []
    monitors = []
    for monitor, way_in in zip(state.monitors, ways_in, strict=True):
        found = _open_public(monitor, made)
        fds += [*found, way_in]
        monitors.append(monitor.replace(wait=False, lost=len(found) < monitor.public_count))
    for grant in state.sockets:
        fds.append(_bind_again(grant.path, grant.mode, made))
    displays = tuple(display for display in state.displays if display.protocol != VNC)  # QEMU has VNC's
    fds += (_bind_again(display.path, None, made) for display in displays)
    leftovers = {item.path: item for item in state.leftovers} | made
    return state.replace(monitors=tuple(monitors), displays=displays, leftovers=tuple(leftovers.values())), fds


def _open_public(monitor: Monitor, made: "dict[str, Leftover]") -> "list[int]":
    """Return owned fds of a monitor's public end, none where it cannot be had again."""
    if monitor.listens and monitor.path:  # also one that was inherited as an fd, if it has a name
        return [_bind_again(monitor.path, None, made)]
    if monitor.kind == LISTEN:
        return open_address(monitor)
    return []


def _bind_again(path: str, mode: "int | None", made: "dict[str, Leftover]") -> int:
    """Bind a socket where the VM's own was, and note it as made; return an owned fd.

    What nobody listens on gives way, whoever made it: it may be that of an adoption that was killed half way.

    Must not: take a path away from somebody who has put something else there since.
    """
    with Parent(path) as parent:
        try:
            if not is_stale(parent):
                raise HostError(path, "something else is there now", "move it away, and adopt again")
        except FileNotFoundError:
            pass
    fd, status = listen_unix(path, path, os.geteuid() == 0, BACKLOG, mode)
    made[path] = Leftover(path, (status.st_dev, status.st_ino), True)
    return fd


def _open_way_in(pid: int, number: int) -> int:
    """Return an owned fd by which to connect to a private socket of QEMU's."""
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
    except OSError as err:
        raise SandboxError(f"the monitor of QEMU {pid}", f"it is out of reach: {err.strerror}") from err
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise SandboxError(f"the monitor of QEMU {pid}", "QEMU has put something else in its place")
    return fd
