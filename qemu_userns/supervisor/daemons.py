"""The programs that run beside QEMU for it: say when one has ended before QEMU, and end them with it."""

import os

from qemu_userns.linux import process
from qemu_userns.supervisor.poller import IN
from qemu_userns.supervisor.registry import find_start
from qemu_userns.supervisor.state import Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qemu_userns.plan.grants import Virtiofsd
    from qemu_userns.supervisor.poller import Poller

_SAID_BYTES = 1 << 16
_STDERR = 2
_PATIENCE_S = 1.0  # QEMU's end is seen after that of what ends with it


class Daemons:
    """The virtiofsds of one VM."""

    def __init__(
        self, grants: "Sequence[Virtiofsd]", fds: "Sequence[int]", poller: "Poller", tell: "Callable[[str], None]"
    ) -> None:
        """Watch them.

        Args:
            grants: what they are.
            fds: a pidfd and a memfd with what it says for each, taken over; -1 for what is gone.
            poller: calls back.
            tell: told of one that has ended although QEMU has not.
        """
        self._poller, self._tell = poller, tell
        self._pidfds = [pidfd for pidfd in fds[::2] if pidfd >= 0]
        for grant, pidfd, said in zip(grants, fds[::2], fds[1::2], strict=True):
            if pidfd < 0:
                self._tell_later(grant, said)
            else:
                poller.watch(pidfd, IN, self._make_callback(grant, pidfd, said))

    def end(self) -> None:
        """End those that have not ended by themselves."""
        for pidfd in self._pidfds:
            try:
                process.pidfd_send_signal(pidfd, process.SIGKILL)
            except ProcessLookupError:
                continue

    def _make_callback(self, grant: "Virtiofsd", pidfd: int, said: int) -> "Callable[[int], None]":
        def hear(_: int) -> None:
            self._poller.unwatch(pidfd)
            self._tell_later(grant, said)

        return hear

    def _tell_later(self, grant: "Virtiofsd", said: int) -> None:
        """Tell of the end of one, unless it is QEMU's as well."""

        def tell() -> None:
            words = b"" if said < 0 else os.pread(said, _SAID_BYTES, 0)
            lines = words.rstrip(b"\0").decode(errors="replace").strip().splitlines()
            last = f"; it said: {lines[-1]}" if lines else ""
            self._tell(
                f"{grant.why}: {grant.program} has ended, and the guest's mount of it hangs until the VM is restarted{last}"
            )

        self._poller.call_later(_PATIENCE_S, tell)


def describe(fds: "Sequence[int]") -> "tuple[Process, ...]":
    """Return what the next supervisor has to know of virtiofsds, by the fds that Daemons gets; they are borrowed."""
    found = []
    for pidfd, said in zip(fds[::2], fds[1::2], strict=True):
        pid, status = process.pidfd_getpid(pidfd), os.fstat(said)
        found.append(Process(pid, find_start(pid), (status.st_dev, status.st_ino)))
    return tuple(found)


def find(processes: "Sequence[Process]") -> "list[int]":
    """Return the owned fds that Daemons gets, of virtiofsds that an earlier supervisor has described."""
    fds = []
    for found in processes:
        pidfd = _open_pidfd(found)
        fds += [pidfd, -1 if pidfd < 0 else _open_said(found)]
    return fds


def _open_pidfd(found: Process) -> int:
    """Return an owned pidfd, -1 where the process has ended."""
    if found.started == 0:
        return -1
    try:
        pidfd = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return -1
    if find_start(found.pid) == found.started:
        return pidfd
    os.close(pidfd)
    return -1


def _open_said(found: Process) -> int:
    """Return an owned fd of the memfd that is still a virtiofsd's stderr, -1 where it has put something else there.

    It is opened only when it is known to be that: an open may wait, or do something to a device.
    """
    try:
        path = os.open(f"/proc/{found.pid}/fd/{_STDERR}", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        status = os.fstat(path)
        if (status.st_dev, status.st_ino) != found.said:
            return -1
        return os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    finally:
        os.close(path)
