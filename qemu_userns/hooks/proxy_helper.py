"""The stand-in for virtfs-proxy-helper: the same command line, and no protocol but to hand its share over to the launcher.

LXD and Incus start one for each share with an id map, in a user namespace that has the map, and give QEMU the other end of its
socket (`-fsdev proxy,sock_fd=N`). Over that the launcher gets the namespace and the share's root (host/stand_ins.py), and QEMU
serves the share itself.

Source: docs/tools/virtfs-proxy-helper.rst of QEMU 7.2.
"""

import getopt
import os
import select
import socket
import sys

from qemu_userns.errors import ResourceError, UsageError
from qemu_userns.hooks.edge import run_at_edge
from qemu_userns.host.stand_ins import ANSWER, LENGTH_BYTES, QUESTION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NAME = "virtfs-proxy-helper"
_LONG = ("path=", "nodaemon", "fd=", "socket=", "uid=", "gid=", "help")
_USAGE = f"""usage: {NAME} --path PATH (--fd N | --socket SOCKET --uid UID --gid GID) [--nodaemon]

  -p, --path PATH      the directory that is shared
  -f, --fd N           a connected socket, whose other end QEMU has
  -s, --socket SOCKET  where to listen instead; -u and -g say whose the socket is
  -n, --nodaemon       stay in the foreground
"""
_CHUNK_BYTES = 4096


def main() -> "NoReturn":
    """Stand in, until nobody has the other end of the socket any more."""
    run_at_edge(lambda: _run(sys.argv[1:]))


def _run(words: "list[str]") -> int:
    """Return the exit status."""
    try:
        found, rest = getopt.gnu_getopt(words, "p:nf:s:u:g:h", list(_LONG))
    except getopt.GetoptError as err:
        raise UsageError(NAME, str(err), _USAGE.splitlines()[0]) from err
    short = {f"-{name[0]}": name.rstrip("=") for name in _LONG}
    options = {short.get(key, key[2:]): value for key, value in found}
    if "help" in options:
        print(_USAGE, end="")
        return 0
    if rest or "path" not in options or ("fd" in options) is ("socket" in options):
        raise UsageError(NAME, "takes --path, and either --fd or --socket", _USAGE.splitlines()[0])
    share = Share(options["path"])
    if "fd" in options:
        connections = [_take(options["fd"])]
        listener = None
    else:
        connections, listener = [], _listen(options)
    if "nodaemon" not in options:
        _daemonize()
    if listener is None:
        return share.serve(connections, None)
    made = os.lstat(options["socket"])
    try:
        return share.serve(connections, listener)
    finally:
        _remove(options["socket"], made)


class Share:
    """What is handed over."""

    def __init__(self, path: str) -> None:
        """Open it with the rights that this process has."""
        self._path = os.path.abspath(path)
        try:
            self._root = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise ResourceError(f"--path {path}", err.strerror or str(err)) from err
        self._namespace = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    def serve(self, connections: "list[socket.socket]", listener: "socket.socket | None") -> int:
        """Answer until the last connection ends; return the exit status: 1 if the first thing that was said made no sense."""
        asked = False
        heard = dict.fromkeys(connections, b"")
        poll = select.poll()
        sockets = {sock.fileno(): sock for sock in (*connections, *([listener] if listener else []))}
        for fd in sockets:
            poll.register(fd, select.POLLIN)
        while heard or (listener and not asked):
            for fd, _ in poll.poll():
                sock = sockets[fd]
                if sock is listener:
                    connection = sock.accept()[0]
                    sockets[connection.fileno()] = connection
                    heard[connection] = b""
                    poll.register(connection.fileno(), select.POLLIN)
                    continue
                data = _receive(sock)
                heard[sock] = (heard[sock] + data)[-len(QUESTION) :]
                if heard[sock] == QUESTION:
                    asked, heard[sock] = True, b""
                    self._hand_over(sock)
                elif not data or not (asked or QUESTION.startswith(heard[sock])):
                    poll.unregister(fd)
                    del heard[sock], sockets[fd]
                    sock.close()
                    if data:
                        raise ResourceError(
                            NAME,
                            "QEMU speaks the protocol of its proxy driver",
                            "start QEMU by qemu-userns, or put QEMU's own virtfs-proxy-helper first in PATH",
                        )
        return 0

    def _hand_over(self, connection: socket.socket) -> None:
        """Send the share; whoever asked may be gone."""
        path = os.fsencode(self._path)
        message = ANSWER + len(path).to_bytes(LENGTH_BYTES, "big") + path
        try:
            socket.send_fds(connection, [message], [self._namespace, self._root])
        except OSError:
            return


def _receive(connection: socket.socket) -> bytes:
    """Return what was said; nothing at the end."""
    try:
        return connection.recv(_CHUNK_BYTES)
    except OSError:
        return b""


def _take(number: str) -> socket.socket:
    """Return the connected socket that this process was started with."""
    try:
        return socket.socket(fileno=int(number))
    except (ValueError, OSError) as err:
        raise ResourceError(f"--fd {number}", "is no connected socket") from err


def _listen(options: "dict[str, str]") -> socket.socket:
    """Listen where the options say; the socket is theirs whom they name."""
    path = options["socket"] = os.path.abspath(options["socket"])
    try:
        uid, gid = int(options["uid"]), int(options["gid"])
    except (KeyError, ValueError):
        raise UsageError(NAME, "--socket takes --uid and --gid, as numbers", _USAGE.splitlines()[0]) from None
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o117)
    try:
        listener.bind(path)
        os.chown(path, uid, gid, follow_symlinks=False)
        listener.listen()
    except OSError as err:
        raise ResourceError(f"--socket {path}", err.strerror or str(err)) from err
    finally:
        os.umask(umask)
    return listener


def _remove(path: str, made: os.stat_result) -> None:
    """Remove the socket, unless another one is there by now."""
    try:
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)
    except OSError:
        return  # gone, or out of reach


def _daemonize() -> None:
    """Go on in the background: daemon(3)."""
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
