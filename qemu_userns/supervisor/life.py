"""What the supervisor does beside QEMU: it serves its monitors, and when QEMU has ended removes what must not stay."""

import gc
import os
import sys
import time

from qemu_userns.host.leftovers import hold
from qemu_userns.supervisor.cleanup import clean_up
from qemu_userns.supervisor.poller import IN, Poller
from qemu_userns.supervisor.process import COMMIT, FAILED, show
from qemu_userns.supervisor.state import read_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.supervisor.server import Server
    from qemu_userns.supervisor.state import State

_DRAIN_S = 0.08
_MESSAGE_BYTES = 4096
# What the supervisor and its workers import when they need it.
LATER = (
    "qemu_userns.cmdline.json",
    "qemu_userns.cmdline.readconfig",
    "qemu_userns.host.images",
    "qemu_userns.host.leases",
    "qemu_userns.host.memory",
    "qemu_userns.host.newidmap",
    "qemu_userns.host.programs",
    "qemu_userns.host.realpath",
    "qemu_userns.host.scripts",
    "qemu_userns.host.sockets",
    "qemu_userns.host.taps",
    "qemu_userns.host.tcp",
    "qemu_userns.host.vfio",
    "qemu_userns.plan.displays",
    "qemu_userns.plan.idmaps",
    "qemu_userns.plan.memory",
    "qemu_userns.plan.passt",
    "qemu_userns.plan.refusals",
    "qemu_userns.plan.taps",
    "qemu_userns.plan.vfio",
    "qemu_userns.supervisor.cleanup",
    "qemu_userns.supervisor.hotplug",
)


class Watch:
    """Whether the VM still lives: by the launcher's channel before QEMU runs, by QEMU's pidfd afterwards."""

    def __init__(self, poller: Poller, channel: "int | None", pidfd: int, daemonizes: bool) -> None:
        """Watch; the fds are taken over.

        Args:
            poller: calls back.
            channel: to the launcher, None where QEMU runs already.
            pidfd: of the process that becomes QEMU.
            daemonizes: that process ends, and a child of it is QEMU; its end is the channel's until its pid is known.
        """
        self.committed = channel is None
        self._token = ""
        self._channel = -1 if channel is None else channel
        self.ended = False
        self.at_end: "Callable[[], None] | None" = None  # called when QEMU has ended, before what it left is removed
        self._poller, self._daemonizes, self._pidfd = poller, daemonizes, pidfd
        if channel is not None:
            os.set_blocking(channel, False)
            poller.watch(channel, IN, self._hear)
        if not daemonizes:
            self._watch_process()

    def learn_pid(self, pid: int) -> int:
        """Take note of the pid of QEMU; return a pidfd of it, which stays this object's; raises OSError."""
        if self._daemonizes:
            pidfd = os.pidfd_open(pid)
            os.close(self._pidfd)
            self._daemonizes, self._pidfd = False, pidfd
            self._watch_process()
        return self._pidfd

    def _watch_process(self) -> None:
        self._poller.watch(self._pidfd, IN, lambda _: self._end())

    def _hear(self, events: int) -> None:
        """Wait for COMMIT, then for FAILED, or the end; what QEMU may say here means nothing."""
        if events & IN and (said := self._read()):
            self._note(said)
        elif not self.committed or self._daemonizes:
            self._end()
        else:
            self._poller.unwatch(self._channel)  # closed, but QEMU's process is there

    def _note(self, said: str) -> None:
        """Take a message."""
        kind, _, token = said.partition(" ")
        if kind == COMMIT and not self._token:
            self.committed, self._token = True, token
        else:
            self.committed = self.committed and (kind, token) != (FAILED, self._token)
            self._poller.watch(self._channel, 0, self._hear)

    def _read(self) -> str:
        """Return a message, "" at the end or where there is none."""
        try:
            return os.read(self._channel, _MESSAGE_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def _end(self) -> None:
        """Take the end, and what the launcher said last, of which its process's end may be seen first."""
        self.ended = True
        while self._channel >= 0 and (said := self._read()):
            self._note(said)


def hold_code() -> None:
    """Have the code of later steps at hand: by then this program may be updated, moved or removed, and versions do not mix."""
    for finder in sys.meta_path:
        if hasattr(finder, "hold"):
            finder.hold()  # the bundle's (hooks/loader.py)
            return
    for name in LATER:
        __import__(name)


def run(state: "State", watch: Watch, poller: Poller, server: "Server | None") -> None:
    """Serve until QEMU ends, then remove what must not stay."""
    leftovers = state.leftovers
    for item in leftovers:
        if item.temporary:
            hold(item)
    while not watch.ended:
        poller.run_once()
    if watch.at_end is not None:
        watch.at_end()
    if server is not None:
        server.stop_listening()  # who comes now wants the VM that is started next on the same path
        deadline = time.monotonic() + _DRAIN_S
        while server.has_more() and time.monotonic() < deadline:
            poller.run_once(deadline - time.monotonic())
        leftovers = server.close()
    downscripts = (*state.downscripts, *(() if server is None else server.find_downscripts()))
    clean_up([item for item in leftovers if item.temporary or not watch.committed], downscripts, state.lease)


def begin(channel: int, launcher: int, state_fd: int, *served: int) -> "tuple[State, Watch, Poller, Server | None]":
    """Begin to be the supervisor of one VM at its launch; return what `run` goes on with.

    Args:
        channel: the socket to the launcher, whose other end QEMU keeps.
        launcher: a pidfd of it.
        state_fd: a memfd with the state of the VM.
        served: the fds to serve (state.py).
    """
    state = read_state(state_fd)
    poller = Poller()
    watch = Watch(poller, channel, launcher, state.daemonizes)
    server = None
    count = len(served) - 2 * len(state.daemons)
    if state.daemons:
        from qemu_userns.supervisor import daemons

        state = state.replace(processes=daemons.describe(served[count:]))
    if state.monitors:
        from qemu_userns.supervisor.server import Server

        server = Server(state, poller, watch.learn_pid)
        for warning in state.warnings:
            server.tell(f"warning: {warning}")
        server.serve(list(served[:count]))
    if state.daemons:
        tell = tell_system if server is None else server.tell
        watch.at_end = daemons.Daemons(state.daemons, served[count:], poller, tell).end
    gc.freeze()  # what was imported stays
    gc.enable()  # the launcher switched it off
    return state, watch, poller, server


def tell_system(text: str) -> None:
    """Tell the system's log: without a monitor there is no directory for one of our own."""
    import syslog

    syslog.openlog("qemu-userns")
    syslog.syslog(syslog.LOG_WARNING, text)


def adopt(directory: str, pid: int, ready: int) -> None:
    """Be the supervisor of a VM that has lost its own; say over a pipe what is wrong, and by its end that all is well."""
    from qemu_userns.errors import QemuUsernsError, format_error
    from qemu_userns.supervisor.adoption import take_over

    poller = Poller()
    try:
        state, pidfd, server = take_over(directory, pid, poller)
    except (QemuUsernsError, OSError) as err:
        text = format_error(err) if isinstance(err, QemuUsernsError) else f"qemu-userns: {pid}: {err}\n"
        os.write(ready, text.encode(errors="backslashreplace"))
        return
    watch = Watch(poller, None, pidfd, daemonizes=False)
    if state.processes:
        from qemu_userns.supervisor.daemons import Daemons, find

        watch.at_end = Daemons(state.daemons, find(state.processes), poller, server.tell).end
    show(state.title)
    hold_code()
    os.close(ready)
    run(state, watch, poller, server)
