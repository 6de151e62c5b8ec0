"""What a unix socket is bound to: sock_diag(7).

A socket knows only the name that it was bound by, where something else may be by now, or in another mount namespace. Its inode in
the file system is told by nothing else that needs no capability.
"""

import os
import struct

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
UDIAG_SHOW_VFS = 2
UNIX_DIAG_VFS = 1

_REQUEST = struct.Struct("=IHHII BBHIIIII")  # nlmsghdr, unix_diag_req
_ANSWER = struct.Struct("=IHHII BBBBIII HHII")  # nlmsghdr, unix_diag_msg, one attribute: unix_diag_vfs
_TYPE, _ATTRIBUTE, _INODE = 1, 13, 14  # indices of _ANSWER's members
_ANY = 0xFFFFFFFF  # each state, whichever cookie


def find_bound_inode(fd: int) -> "int | None":
    """Return the lower 32 bits of the number of the inode that a unix socket is bound to.

    None is returned where there is no such inode, where the socket is of another network namespace, and where the kernel has no
    sock_diag for unix sockets.
    """
    import _socket

    words = (_REQUEST.size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0)
    body = (_socket.AF_UNIX, 0, 0, _ANY, os.fstat(fd).st_ino, UDIAG_SHOW_VFS, _ANY, _ANY)
    try:
        netlink = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
    except OSError:
        return None
    try:
        netlink.send(_REQUEST.pack(*words, *body))
        data = netlink.recv(_ANSWER.size)
    finally:
        netlink.close()
    if len(data) < _ANSWER.size:
        return None
    found = _ANSWER.unpack(data)
    return int(found[_INODE]) if (found[_TYPE], found[_ATTRIBUTE]) == (SOCK_DIAG_BY_FAMILY, UNIX_DIAG_VFS) else None
