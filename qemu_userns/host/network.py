"""Join the network namespace that the settings name."""

import errno
import os

from qemu_userns.errors import HostError
from qemu_userns.linux import process

_HINTS = {
    "ENOENT": "ip netns add NAME makes /run/netns/NAME",
    "EPERM": "to join it takes CAP_SYS_ADMIN; net=none takes nothing",
    "EACCES": "to join it takes CAP_SYS_ADMIN; net=none takes nothing",
}
_HINT = "name a network namespace: /run/netns/NAME, or /proc/PID/ns/net"


def join_network(path: str) -> None:
    """Move this process into a network namespace: what is opened from then on, and what it forks, is in it.

    Should: run with the caller's rights, before the supervisor is forked.

    Raises:
        HostError: there is none at the path, or the caller may not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            process.setns(fd, process.CLONE_NEWNET)
        finally:
            os.close(fd)
    except OSError as err:
        hint = _HINTS.get(errno.errorcode.get(err.errno or 0, ""), _HINT)
        raise HostError(f"net={path}", err.strerror or str(err), hint) from err
