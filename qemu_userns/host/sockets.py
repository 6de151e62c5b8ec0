"""Open the sockets of a plan with the caller's rights: QEMU's own, the two ends of its QMP monitors, and ours."""

import os
import stat

from qemu_userns.cmdline.objects import as_switch
from qemu_userns.errors import ResourceError
from qemu_userns.host.paths import find_fd
from qemu_userns.host.realpath import Parent, check_inode, is_trusted, open_real
from qemu_userns.plan.grants import CONNECT, FD, LISTEN, STDIO, Connect, Display, Listen, Monitor, QmpSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket

    from qemu_userns.host.opening import Opened

BACKLOG = 16  # of a monitor's public socket: several clients may come before the supervisor runs
_NAME_BYTES = 8
_PATH_MAX_BYTES = 108  # of sockaddr_un.sun_path
_PRIVATE_DIRS = ("/run/qemu-userns", "/tmp", "/var/tmp")


def open_socket(grant: "Listen | Connect | Monitor | QmpSocket | Display", privileged: bool, opened: "Opened") -> None:
    """Open what a socket's grant gives.

    Args:
        grant: what to open.
        privileged: whether this is root, which follows nothing that others may replace.
        opened: gets the fds for QEMU, and those for the supervisor.

    Raises:
        OSError: as bind(2) and connect(2).
        ResourceError: it is not what the plan saw.
    """
    match grant:
        case Listen():
            fd = _listen(grant.path, grant.given, privileged, 1, opened)
            os.set_blocking(fd, False)  # it may be a monitor's, see _open_monitor
            opened.take(fd, grant.number)
        case Connect():
            _connect(grant, opened)
        case Monitor():
            _open_monitor(grant, privileged, opened)
        case QmpSocket():
            # Behind those of the monitors, as in the plan.
            opened.served.append(_listen(grant.path, grant.given, privileged, BACKLOG, opened, grant.mode))
        case Display():
            opened.served.append(_listen(grant.path, grant.given, privileged, BACKLOG, opened))


def _new_socket() -> "Socket":
    """Return a unix stream socket."""
    import _socket

    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)


def _listen(path: str, given: str, privileged: bool, backlog: int, opened: "Opened", mode: "int | None" = None) -> int:
    """Listen at a path, and note that it was made; return an owned fd."""
    opened.intend(path)
    fd, status = listen_unix(path, given, privileged, backlog, mode)
    opened.created(path, status, True)
    return fd


def listen_unix(path: str, given: str, privileged: bool, backlog: int, mode: "int | None" = None) -> "tuple[int, os.stat_result]":
    """Bind and listen as QEMU does: what is at the path goes, mode and owner are the umask's and the caller's.

    A given `mode` is the socket's from the moment at which it has a name: unix_bind() of the kernel takes what the socket has,
    less the umask.

    The address is the caller's own spelling, since QEMU reports it, unless root would follow it through a directory in which
    somebody else could put a symlink meanwhile.

    Returns:
        An owned fd, and the status of the file.

    Raises:
        OSError: as bind(2).
    """
    socket = _new_socket()
    with Parent(path) as parent:
        _unlink(parent)
        address = os.fsencode(_address(parent, path, given, privileged))
        if mode is None:
            socket.bind(address)
        else:
            _bind_with_mode(socket, address, mode)
        status = parent.status()
    socket.listen(backlog)
    return socket.detach(), status


def _bind_with_mode(socket: "Socket", address: bytes, mode: int) -> None:
    """Bind a socket that has exactly this mode; nothing else runs in this process meanwhile."""
    os.fchmod(socket.fileno(), mode)
    umask = os.umask(0)
    try:
        socket.bind(address)
    finally:
        os.umask(umask)


def _unlink(parent: Parent) -> None:
    """Remove what is at a path, if anything is."""
    try:
        os.unlink(parent.name, dir_fd=parent.fd)
    except FileNotFoundError:
        pass


def _address(parent: Parent, path: str, given: str, privileged: bool) -> str:
    """Return the address by which a path is bound."""
    return given if not privileged or is_trusted(os.path.dirname(path)) else parent.path


def _connect(grant: Connect, opened: "Opened") -> None:
    """Connect to a socket that QEMU's id may not connect to."""
    socket = _new_socket()
    number = find_fd(grant.path)
    place = open_real(grant.path, os.O_PATH | os.O_NOFOLLOW) if number is None else os.dup(number)
    check_inode(os.fstat(place), grant.inode, grant.path)
    socket.connect(f"/proc/self/fd/{place}")
    os.close(place)
    opened.take(socket.detach(), grant.number)


def _open_monitor(grant: Monitor, privileged: bool, opened: "Opened") -> None:
    """Open both ends of a monitor: the public one for the supervisor, the private one for QEMU.

    The private socket has the caller's address, which is what QEMU reports, but its inode has no name any more when the public
    one gets it: only who holds the way in, an fd of that inode, can connect to it.
    """
    if grant.kind == FD:
        opened.served.append(os.dup(int(grant.given)))
    elif grant.kind == STDIO:
        opened.served += [os.dup(0), os.dup(1)]
    private = _new_socket()
    os.fchmod(private.fileno(), 0o600)
    if grant.kind == LISTEN and grant.path:
        opened.intend(grant.path)
        with Parent(grant.path) as parent:
            _unlink(parent)
            way_in = _bind_nameless(private, parent, _address(parent, grant.path, grant.given, privileged))
        opened.served.append(_listen(grant.path, grant.given, privileged, BACKLOG, opened))
    else:
        way_in = _bind_anywhere(private)
        if grant.kind in (LISTEN, CONNECT):
            opened.served += open_address(grant)
    private.listen(1)
    # QEMU 7.2 looks at a new monitor's socket in two threads for a moment (monitor_qmp_setup_handlers_bh). Who listens for it
    # has clients that connect just then: one thread gets that, and the main thread would wait for another connection for ever.
    private.setblocking(False)
    opened.served.append(way_in)
    (opened.take_over if grant.kind == FD else opened.take)(private.detach(), grant.number)
    opened.take(os.dup(way_in), grant.way_in)


def _bind_nameless(socket: "Socket", parent: Parent, address: str) -> int:
    """Bind a socket and take its name away again; return an owned fd that is a path to its inode."""
    socket.bind(os.fsencode(address))
    way_in = os.open(parent.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
    found = os.fstat(way_in)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise ResourceError(address, "it was replaced while QEMU was being started")
    os.unlink(parent.name, dir_fd=parent.fd)
    return way_in


def connect_pair() -> "tuple[int, int]":
    """Return owned fds of a socket that listens and has no name any more, and of the one connection to it.

    Raises:
        OSError: as bind(2) and connect(2).
        ResourceError: no directory for it can be written.
    """
    listening, connected = _new_socket(), _new_socket()
    os.fchmod(listening.fileno(), 0o600)
    place = _bind_anywhere(listening)
    listening.listen(1)
    connected.connect(f"/proc/self/fd/{place}")
    os.close(place)
    return listening.detach(), connected.detach()


def _bind_anywhere(socket: "Socket") -> int:
    """Bind a socket in any directory of temporary files."""
    error: "OSError | None" = None
    for directory in (*filter(None, (os.environ.get("XDG_RUNTIME_DIR"),)), *_PRIVATE_DIRS):
        try:
            with Parent(f"{os.path.realpath(directory)}/.qemu-userns.{os.urandom(_NAME_BYTES).hex()}") as parent:
                return _bind_nameless(socket, parent, parent.path)
        except OSError as err:
            error = err
    raise ResourceError("a private socket for QEMU's monitor", f"cannot be made: {error}")


def open_address(grant: Monitor) -> "list[int]":
    """Bind or connect a TCP or abstract socket; return owned fds, none where the supervisor shall connect later."""
    options = dict(grant.options)
    if not grant.listens and grant.reconnect_s:
        return []
    if "port" not in options:
        return [open_unix(grant)]
    from qemu_userns.host.tcp import connect_tcp, listen_tcp

    return [listen_tcp(options) if grant.listens else connect_tcp(options)]


def open_unix(grant: Monitor) -> int:
    """Bind an abstract socket, or connect to a unix socket; return an owned fd.

    Raises:
        OSError: as bind(2) and connect(2).
    """
    socket = _new_socket()
    if grant.path:
        place = open_real(grant.path, os.O_PATH | os.O_NOFOLLOW)
        try:
            socket.connect(f"/proc/self/fd/{place}")
        finally:
            os.close(place)
        return socket.detach()
    # An abstract name is as long as it is, or fills the address with zeros.
    address = b"\0" + os.fsencode(grant.given)
    tight = as_switch(dict(grant.options).get("tight", "on")) == "on"
    address = address if tight else address.ljust(_PATH_MAX_BYTES, b"\0")
    if grant.listens:
        socket.bind(address)
        socket.listen(BACKLOG)
    else:
        socket.connect(address)
    return socket.detach()
