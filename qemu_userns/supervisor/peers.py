"""Who is at the other end of a monitor's socket: it must not be QEMU.

A QEMU that was taken over reaches the sockets that its view or the network shows it, those of its own monitors too. As a client
it would have the supervisor open for it what it names; so would the QEMU of another VM. What the kernel says of a peer tells:

1. A uid that QEMU has not: it is not QEMU.
2. Else its process has to be in the supervisor's own user namespace, which nobody gets back to who is in QEMU's or below it.
3. Nor may it be a process of ours, also one that has ended since. These connect and listen with the caller's rights at paths that
   QEMU may have replaced, and QEMU gets the socket: the launcher, which becomes QEMU, and the workers, which are the supervisor's
   children.

A unix socket tells both, of who called connect(2), or listen(2) where the monitor connects. TCP tells of a peer on this host only
the uid, in /proc/net/tcp: processes have to be found that hold the socket. A peer elsewhere is not known to anybody.
"""

import os
import select
import stat
import sys
from _socket import AF_INET, AF_INET6, AF_UNIX, SO_PEERCRED, SOL_SOCKET, inet_pton, socket
from errno import EINVAL, ENOPROTOOPT

from qemu_userns.linux.route import leads_elsewhere

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from qemu_userns.plan.identity import Identity

    Endpoint = tuple[bytes, int]
    """Address, of 4 bytes also where it is in an IPv6 one, and port."""

_SO_PEERPIDFD = 77
_SIZE_OF_UCRED = 12
_IPV4_BYTES, _IPV6_BYTES = 4, 16
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
_IS_QEMU = "is QEMU, or works for it"
_IS_INSIDE = "is in another user namespace, and may be QEMU"
_ALL_IDS = ["0", "0", "4294967295"]


class Peers:
    """Tells clients from QEMU."""

    def __init__(self, identity: "Identity", launcher: int, children: "Collection[int]" = ()) -> None:
        """Know QEMU.

        Args:
            identity: who it is.
            launcher: pid of the process that becomes QEMU, or of QEMU.
            children: pids of the supervisor's latest children, also of those that have ended; others may be put in later.
        """
        self._uid_map, self._launcher, self._children = identity.uid_map, launcher, children

    def find_fault(self, fd: int) -> str:
        """Return why the peer of a connected socket, which is borrowed, may not be a client; "" if it may."""
        peer = socket(fileno=fd)
        try:
            fault = self._judge_unix(peer) if peer.family == AF_UNIX else self._judge_tcp(peer)
        except OSError as err:
            fault = f"who it is cannot be found: {err.strerror}"
        finally:
            peer.detach()
        return fault and f"is turned away: {fault}"

    def _judge_unix(self, peer: socket) -> str:
        pid, uid = _read_credentials(peer)
        if not self._is_mapped(uid) and (uid != os.geteuid() or not pid):
            return ""
        if not pid:
            return f"its process, of uid {uid}, is out of sight"
        try:
            fault = self._judge_process(peer, pid, uid)
        except (FileNotFoundError, ProcessLookupError):
            fault = self._judge_ended(pid, uid)
        return fault and f"process {pid} of uid {uid} {fault}"

    def _judge_process(self, peer: socket, pid: int, uid: int) -> str:
        """Judge the process that a peer's credentials name.

        Raises:
            ProcessLookupError, FileNotFoundError: it has ended.
        """
        pidfd = _open_process(peer, pid)
        try:
            if pid == self._launcher or _find_parent(pid) == os.getpid():
                return _IS_QEMU
            fault = _IS_INSIDE if self._is_mapped(uid) and not _is_beside(pid) else ""
            if _has_ended(pidfd):  # else the pid has been its own all the time
                raise ProcessLookupError
            return fault
        finally:
            os.close(pidfd)

    def _judge_ended(self, pid: int, uid: int) -> str:
        """Judge a process that is there no more: one with a uid that QEMU has may have been in any namespace."""
        if pid == self._launcher or pid in self._children:
            return _IS_QEMU
        return "has ended, and may have been QEMU" if self._is_mapped(uid) else ""

    def _judge_tcp(self, peer: socket) -> str:
        if peer.family not in (AF_INET, AF_INET6):
            return f"a socket of family {peer.family} does not tell who it is"
        name = peer.getpeername()
        local, remote = (_parse_endpoint(peer.family, found) for found in (peer.getsockname(), name))
        found = find_tcp_owner((_read_table("tcp"), _read_table("tcp6")), remote, local)
        if found is None and leads_elsewhere(AF_INET if len(remote[0]) == _IPV4_BYTES else AF_INET6, remote[0]):
            return ""
        # One that was reset is in no table any more, and of one that was closed the uid means nothing; what it has sent is there.
        uid, inode = found or (0, 0)
        if not inode:
            return f"{name[0]} port {name[1]} is closed"
        if not self._is_mapped(uid) or _is_held_beside(inode):
            return ""
        return f"the process of uid {uid} at {name[0]} port {name[1]} may be QEMU"

    def _is_mapped(self, uid: int) -> bool:
        return any(entry.outside <= uid < entry.outside + entry.count for entry in self._uid_map)


def find_stranger(fd: int, users: "Sequence[int]") -> str:
    """Return why the peer at an fd, which is borrowed, is none of the users who may be clients, "" if it is one.

    None are named where everybody may be one. Else who has no uid, by TCP or at another kind of fd, is turned away.
    """
    if not users:
        return ""
    uid = _find_uid(fd)
    if uid in users:
        return ""
    return f"{'without a uid' if uid is None else f'of uid {uid}'} is turned away, as the settings say"


def find_tcp_owner(tables: "tuple[str, str]", local: "Endpoint", remote: "Endpoint") -> "tuple[int, int] | None":
    """Find a TCP socket.

    Args:
        tables: the texts of /proc/net/tcp and /proc/net/tcp6.
        local: where it is.
        remote: where it is connected to.

    Returns:
        Its uid and inode, None if it is not there.
    """
    for table, size in zip(tables, (_IPV4_BYTES, _IPV6_BYTES), strict=True):
        wanted = f" {_spell(local, size)} {_spell(remote, size)} "
        for line in table.splitlines():
            if wanted in line:
                words = line.split()
                return int(words[7]), int(words[9])
    return None


def _find_uid(fd: int) -> "int | None":
    """Return whose process is at the other end of a unix socket, None for any other kind of fd."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    peer = socket(fileno=fd)
    try:
        return _read_credentials(peer)[1] if peer.family == AF_UNIX else None
    finally:
        peer.detach()


def _read_credentials(peer: socket) -> "tuple[int, int]":
    """Return pid and uid of a unix socket's peer (unix(7), SO_PEERCRED); the pid is 0 where /proc does not show it."""
    found = peer.getsockopt(SOL_SOCKET, SO_PEERCRED, _SIZE_OF_UCRED)
    return int.from_bytes(found[:4], sys.byteorder), int.from_bytes(found[4:8], sys.byteorder)


def _open_process(peer: socket, pid: int) -> int:
    """Return an owned pidfd of a unix socket's peer.

    Raises:
        ProcessLookupError: it has ended.
        OSError: there are too many fds.
    """
    try:
        return peer.getsockopt(SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as err:
        if err.errno == EINVAL:  # net/core/sock.c, kernel/pid.c: pidfd_prepare() of one that is reaped
            raise ProcessLookupError from err
        if err.errno != ENOPROTOOPT:
            raise
    # Before Linux 6.5 another process may have the pid by now. For that QEMU would have to use up all pids before the supervisor,
    # which is told of the client at once, gets here.
    return os.pidfd_open(pid)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _find_parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read()
    return int(text[text.rindex(b")") + 2 :].split()[1])


def _is_beside(pid: int) -> bool:
    """Tell whether a process is in the supervisor's own user namespace."""
    try:
        return os.path.samefile("/proc/self/ns/user", f"/proc/{pid}/ns/user")
    except PermissionError:
        # It has another group (newgrp), or is not dumpable. A namespace that maps every id is none of QEMU's, which lack root's.
        with open(f"/proc/{pid}/uid_map") as file:
            return file.read().split() == _ALL_IDS


def _is_held_beside(inode: int) -> bool:
    """Tell whether processes hold a socket, and all of them are in the supervisor's own user namespace."""
    target = f"socket:[{inode}]"
    # The supervisor has none of a client's sockets, and at most for a moment one that QEMU has sent.
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    holders = [pid for pid in pids if _holds(pid, target)]
    return bool(holders) and all(map(_is_beside, holders))


def _holds(pid: int, target: str) -> bool:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False  # it has ended, or is another user's
    return any(_read_link(f"/proc/{pid}/fd/{number}") == target for number in numbers)


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read_table(name: str) -> str:
    """Return the text of /proc/net/tcp or tcp6; there is none of a protocol that the kernel has not."""
    try:
        with open(f"/proc/self/net/{name}") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _parse_endpoint(family: int, name: "tuple[str, int]") -> "Endpoint":
    """Return what getsockname(2) or getpeername(2) say as bytes."""
    return inet_pton(family, name[0]).removeprefix(_MAPPED), name[1]


def _spell(endpoint: "Endpoint", size: int) -> str:
    """Return an endpoint as /proc/net/tcp or tcp6 has it, whose addresses have so many bytes: in words, as the processor does."""
    address, port = endpoint
    address = (_MAPPED if len(address) < size else b"") + address
    words = (int.from_bytes(address[i : i + 4], sys.byteorder) for i in range(0, len(address), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
