"""Meet the stand-in for virtfs-proxy-helper (hooks/proxy_helper.py) at the other end of a share's socket.

The launcher asks, and the stand-in answers with the path of its share and two fds: its user namespace, and the share's root as it
could open it itself. A real virtfs-proxy-helper takes the question for a request that makes no sense, and ends; QEMU's own
proxy driver never asks so, and the stand-in ends.
"""

import array
import fcntl
import os
import select
import stat
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RD, SOCK_STREAM, socket

from qemu_userns.errors import ResourceError
from qemu_userns.host.usernamespace import read_maps
from qemu_userns.plan.draft import LOWEST_OWN_FD
from qemu_userns.plan.facts import StandIn
from qemu_userns.plan.idmaps import ShareMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.cmdline.objects import Object

QUESTION = b"\x89qemu-userns: which share?\r\n\x1a\0"
ANSWER = b"\x89qemu-userns: this share\r\n\x1a\0"
LENGTH_BYTES = 4  # of the path's length behind ANSWER, big-endian
_PATH_MAX_BYTES = 4096
_TIMEOUT_S = 10
_HINT = "start the virtfs-proxy-helper that `qemu-userns install` puts beside the drop-in, or use fsdriver local with a path"


def meet(share: "Object", preview: bool) -> StandIn:
    """Have a share handed over.

    Should: run with the caller's rights.
    Must not: let QEMU have what the stand-in sends: the connection is closed for reading, but for a preview.

    Args:
        share: an fsdev of the driver `proxy`.
        preview: whether the launch itself is still to come, which asks again.

    Raises:
        ResourceError: nobody of ours is at the other end.
    """
    what = f"-{share.kind} {share.id or share.get('mount_tag') or ''}: proxy"
    try:
        connection = _connect(share, what)
        try:
            path, fds = _ask(connection, what)
            if not preview:
                connection.shutdown(SHUT_RD)
            given = share.get("sock_fd")
            # One that is inherited, as the caller's own is: QEMU keeps it.
            number = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD, LOWEST_OWN_FD) if given is None else int(given)
        finally:
            connection.close()
    except OSError as err:
        raise ResourceError(what, f"virtfs-proxy-helper cannot be asked for its share: {err.strerror}", _HINT) from err
    try:
        return _look(share, path, fds, number, what)
    finally:
        for fd in fds:
            os.close(fd)


def _connect(share: "Object", what: str) -> socket:
    """Return a socket of our own to the stand-in."""
    number, path = share.get("sock_fd"), share.get("socket")
    if number is not None and path is None:
        if not number.isdecimal():
            raise ResourceError(what, f"sock_fd={number} is no number")
        fd = fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, LOWEST_OWN_FD)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ResourceError(what, f"fd {number} is no socket")
        return socket(fileno=fd)
    if path is None or number is not None:
        raise ResourceError(what, "takes either sock_fd or socket")
    connection = socket(AF_UNIX, SOCK_STREAM)
    connection.connect(path)
    return connection


def _ask(connection: socket, what: str) -> "tuple[str, list[int]]":
    """Return the path that the stand-in names, and its fds, which are owned."""
    connection.send(QUESTION, MSG_DONTWAIT | MSG_NOSIGNAL)
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    data, fds = b"", array.array("i")
    head = end = len(ANSWER) + LENGTH_BYTES
    while len(data) < end:
        if not poll.poll(_TIMEOUT_S * 1000):
            raise ResourceError(what, f"virtfs-proxy-helper says nothing for {_TIMEOUT_S} s", _HINT)
        more, ancillary, _, _ = connection.recvmsg(head + _PATH_MAX_BYTES, CMSG_SPACE(8), MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        for _, _, item in ancillary:
            fds.frombytes(item[: len(item) // fds.itemsize * fds.itemsize])
        data += more
        if len(data) >= head:
            end = head + int.from_bytes(data[len(ANSWER) : head], "big")
        if not more or not data.startswith(ANSWER[: len(data)]) or max(end, len(data)) > head + _PATH_MAX_BYTES:
            raise ResourceError(what, "no virtfs-proxy-helper of ours is at the other end of its socket", _HINT)
    if len(fds) != 2:
        raise ResourceError(what, "virtfs-proxy-helper has handed nothing over", _HINT)
    return os.fsdecode(data[head:]), list(fds)


def _look(share: "Object", path: str, fds: "list[int]", number: int, what: str) -> StandIn:
    """Return what was handed over; the fds are borrowed."""
    namespace, root = fds
    found = os.fstat(root)
    if not stat.S_ISDIR(found.st_mode):
        raise ResourceError(f"{what} {path}", "is not a directory")
    real = os.readlink(f"/proc/self/fd/{root}")
    maps = read_maps(namespace)
    idmap = None if maps is None else ShareMap(share.id or share.get("mount_tag") or "", *maps)
    return StandIn(real, (found.st_dev, found.st_ino), number, idmap)
