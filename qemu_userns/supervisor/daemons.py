"""The programs that run beside QEMU for it: say when one has ended before QEMU, and end them with it."""

import os

from qemu_userns.linux import process
from qemu_userns.supervisor.poller import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qemu_userns.plan.grants import Virtiofsd
    from qemu_userns.supervisor.poller import Poller

_SAID_BYTES = 1 << 16
_PATIENCE_S = 1.0  # QEMU's end is seen after that of what ends with it


class Daemons:
    """The virtiofsds of one VM."""

    def __init__(
        self, grants: "Sequence[Virtiofsd]", fds: "Sequence[int]", poller: "Poller", tell: "Callable[[str], None]"
    ) -> None:
        """Watch them.

        Args:
            grants: what they are.
            fds: a pidfd and a memfd with what it says for each, taken over.
            poller: calls back.
            tell: told of one that has ended although QEMU has not.
        """
        self._poller, self._tell = poller, tell
        self._pidfds = list(fds[::2])
        for grant, pidfd, said in zip(grants, fds[::2], fds[1::2], strict=True):
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
            self._poller.call_later(_PATIENCE_S, tell)

        def tell() -> None:
            words = os.pread(said, _SAID_BYTES, 0).rstrip(b"\0").decode(errors="replace").strip().splitlines()
            last = f"; it said: {words[-1]}" if words else ""
            self._tell(
                f"{grant.why}: {grant.program} has ended, and the guest's mount of it hangs until the VM is restarted{last}"
            )

        return hear
