"""Open taps with the caller's rights, as QEMU does, and run what belongs to them: scripts, and qemu-bridge-helper.

Source: net/tap.c and net/tap-linux.c of QEMU; Documentation/networking/tuntap.rst and drivers/net/tun.c of the kernel.
"""

import errno
import fcntl
import os
import stat
import struct
import sys
import time
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_STREAM,
    SOL_SOCKET,
    if_nametoindex,
    socketpair,
)

from qemu_userns.errors import ResourceError
from qemu_userns.host.leftovers import Downscript
from qemu_userns.host.scripts import describe_end, run_said, run_script
from qemu_userns.plan.grants import Helper, Tap
from qemu_userns.plan.taps import HELPERS, NAME_HELPER, is_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.host.opening import Opened
    from qemu_userns.plan.facts import Caller

_TUN = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF, _TUNGETFEATURES, _TUNGETIFF = 0x400454CA, 0x800454CF, 0x800454D2
_IFF_TAP, _IFF_NO_PI, _IFF_ONE_QUEUE, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x2000, 0x4000, 0x0100
_IFREQ = "16sH22x"
_ANY_NAME = "tap%d"
_CAP_NET_ADMIN = 12
_NOBODY = -1  # of a tap without an owner, or without a group
# The supervisor of a VM that has just ended holds its tap until the script has run.
_BUSY_TRIES, _BUSY_PAUSE_S = 100, 0.02


def find_refused(names: "Iterable[str]", caller: "Caller") -> "tuple[tuple[str, str], ...]":
    """Return which taps the caller may not open, "" for a new one, and why; what cannot be told is not among them."""
    if may_configure():
        return ()
    reasons = ((name, _find_reason(name, caller)) for name in names)
    return tuple((name, reason) for name, reason in reasons if reason)


def find_refused_helpers(wanted: "Iterable[tuple[str, str]]") -> "tuple[tuple[str, str, str, str], ...]":
    """Return which programs cannot make a tap for QEMU, their bridges, why, and a hint; a line for the shell may do anything."""
    reasons = [(*names, _find_helpers_reason(*names)) for names in wanted if names[0] and not is_command(names[0])]
    return tuple((helper, bridge, *reason) for helper, bridge, reason in reasons if reason is not None)


def _find_helpers_reason(helper: str, bridge: str) -> "tuple[str, str] | None":
    try:
        found = os.stat(helper)
    except OSError as err:
        return os.strerror(err.errno or 0), NAME_HELPER
    if not os.access(helper, os.X_OK):
        return "Permission denied", f"it belongs to {found.st_uid}:{found.st_gid} and has mode {found.st_mode & 0o7777:04o}"
    if os.path.basename(helper) != os.path.basename(HELPERS[0]):
        return None  # somebody's own: what it takes nobody knows
    if not may_configure() and os.statvfs(helper).f_flag & os.ST_NOSUID:
        return "to make a tap takes CAP_NET_ADMIN, and the helper is on a file system that is mounted nosuid", NAME_HELPER
    if not may_configure() and not _gives_rights(helper, found):
        hint = f"chmod u+s {helper}; on Debian, for updates too: dpkg-statoverride --update --add root root 4755 {helper}"
        return "to make a tap takes CAP_NET_ADMIN, and the helper is not set-uid root", hint
    try:
        if_nametoindex(bridge)
    except OSError:
        return f"there is no bridge {bridge}", f"ip link add {bridge} type bridge"
    return None


def _gives_rights(program: str, status: os.stat_result) -> bool:
    """Say whether who executes a program gets rights with it: by set-uid or by capabilities of the file."""
    if status.st_mode & stat.S_ISUID and status.st_uid == 0:
        return True
    try:
        return bool(os.getxattr(program, "security.capability"))
    except OSError:
        return False


def find_others(numbers: "Iterable[int]") -> "frozenset[int]":
    """Return which fds are open, and are no taps."""
    return frozenset(number for number in numbers if _is_other(number))


def _is_other(number: int) -> bool:
    try:
        fcntl.ioctl(number, _TUNGETIFF, bytes(struct.calcsize(_IFREQ)))
    except OSError as err:
        return err.errno != errno.EBADF  # QEMU says so itself
    return False


def open_tap(grant: "Tap | Helper", opened: "Opened") -> None:
    """Open what a grant gives, and run its script.

    Raises:
        ResourceError: it cannot be opened, the script or the helper fails.
    """
    if isinstance(grant, Helper):
        opened.take(_run_helper(grant), grant.number)
        return
    name = grant.name
    for number in grant.numbers:
        fd, name = open_queue(grant, name)
        if number == grant.numbers[0]:
            if grant.settings is not None:
                from qemu_userns.host.tap_settings import set_up

                set_up(grant, grant.settings, name, fd)
            _run_scripts(grant, name, fd, opened)
        opened.take(fd, number)


def _run_scripts(grant: Tap, name: str, fd: int, opened: "Opened") -> None:
    """Run the script of a tap that is open, and note the one for its end."""
    status = run_script(grant.script, name) if grant.script else 0
    if status:
        hint = None if os.path.exists(grant.script) else "script=no is for none"
        raise ResourceError(grant.why, f"network script {grant.script} failed with status {status}", hint)
    if grant.downscript:
        opened.run_at_end(Downscript(grant.downscript, name), fd)


def open_queue(grant: Tap, name: str) -> "tuple[int, str]":
    """Open a queue of a tap; return an owned fd, and the name that the tap has."""
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise ResourceError(grant.why, f"could not open {_TUN}: {err.strerror}") from err
    flags = _choose_flags(grant, struct.unpack("I", fcntl.ioctl(fd, _TUNGETFEATURES, bytes(4)))[0])
    request = struct.pack(_IFREQ, os.fsencode(name or _ANY_NAME), flags)
    try:
        answer = _configure(fd, request)
    except OSError as err:
        which = f" ({name})" if name else ""
        hint = f"it takes CAP_NET_ADMIN, or a tap of the caller's: ip tuntap add dev {name or 'tap0'} mode tap user ..."
        raise ResourceError(
            grant.why, f"could not configure {_TUN}{which}: {err.strerror}", hint if err.errno == errno.EPERM else None
        ) from err
    return fd, os.fsdecode(struct.unpack(_IFREQ, answer)[0].rstrip(b"\0"))


def _configure(fd: int, request: bytes) -> bytes:
    """Make an fd a queue of a tap, which may be in use for another moment; return the kernel's answer; raises OSError."""
    for _ in range(_BUSY_TRIES):
        try:
            return fcntl.ioctl(fd, _TUNSETIFF, request)
        except OSError as err:
            if err.errno != errno.EBUSY:
                raise
        time.sleep(_BUSY_PAUSE_S)
    return fcntl.ioctl(fd, _TUNSETIFF, request)


def _choose_flags(grant: Tap, features: int) -> int:
    """Return the flags that QEMU would ask for."""
    flags = _IFF_TAP | _IFF_NO_PI | (features & _IFF_ONE_QUEUE)
    if grant.vnet_hdr and not features & _IFF_VNET_HDR:
        raise ResourceError(grant.why, "vnet_hdr=1 requested, but no kernel support for IFF_VNET_HDR available")
    if grant.vnet_hdr is not False:
        flags |= features & _IFF_VNET_HDR
    if len(grant.numbers) > 1:
        if not features & _IFF_MULTI_QUEUE:
            raise ResourceError(grant.why, "multiqueue required, but no kernel support for IFF_MULTI_QUEUE available")
        flags |= _IFF_MULTI_QUEUE
    return flags


def _run_helper(grant: Helper) -> int:
    """Run qemu-bridge-helper; return the tap that it opens, an owned fd."""
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    status, text = run_said(grant.argv, theirs.fileno())
    theirs.close()
    try:
        _, ancillary, _, _ = ours.recvmsg(1, CMSG_SPACE(4), MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
    except OSError:
        ancillary = []
    ours.close()
    rights = [data for level, kind, data in ancillary if (level, kind) == (SOL_SOCKET, SCM_RIGHTS)]
    fds = [int.from_bytes(data[:4], sys.byteorder) for data in rights]
    if status or not fds:
        for fd in fds:
            os.close(fd)
        what = "bridge helper failed" if fds else "failed to recv file descriptor"
        raise ResourceError(grant.why, f"{what}: {text or describe_end(grant.argv, status)}")
    return fds[0]


def may_configure() -> bool:
    """Say whether this process has CAP_NET_ADMIN: proc_pid_status(5)."""
    with open("/proc/self/status", "rb") as file:
        line = next(line for line in file if line.startswith(b"CapEff:"))
    return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)


def _find_reason(name: str, caller: "Caller") -> str:
    """Return why the caller, who may not configure networks, may not open a tap; "" if it may, or if that cannot be told."""
    if not name:
        return "to make a new tap takes CAP_NET_ADMIN"
    try:
        index = if_nametoindex(name)
    except OSError:
        return "there is no such interface, and to make it takes CAP_NET_ADMIN"
    # /sys may be of another network namespace.
    if _read_number(name, "ifindex") != index:
        return ""
    owner, group = _read_number(name, "owner"), _read_number(name, "group")
    if owner not in (None, _NOBODY, caller.account.uid):
        return f"it belongs to uid {owner}, and to open it takes that or CAP_NET_ADMIN"
    if group not in (None, _NOBODY, caller.account.gid, *caller.account.groups):
        return f"it belongs to group {group}, and to open it takes that or CAP_NET_ADMIN"
    return ""


def _read_number(name: str, attribute: str) -> "int | None":
    """Return what /sys says of an interface, None if it does not."""
    try:
        with open(f"/sys/class/net/{name}/{attribute}", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
