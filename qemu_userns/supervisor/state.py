"""What the supervisor of a VM knows: handed over by the launcher, kept in the run directory for the next supervisor."""

import marshal
import os

from qemu_userns.host.leftovers import Downscript, Leftover
from qemu_userns.plan import grants
from qemu_userns.plan.draft import find_memory
from qemu_userns.plan.facts import Account, Caller
from qemu_userns.plan.identity import CALLERS_NETWORK, Identity, MapEntry, MountMap
from qemu_userns.plan.rights import Rights
from qemu_userns.record import Record, from_plain, to_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from qemu_userns.host.opening import Opened
    from qemu_userns.plan.layout import Placed
    from qemu_userns.plan.plan import Plan
    from qemu_userns.record import Plain
    from qemu_userns.request import Start


class Process(Record):
    """A virtiofsd that runs."""

    pid: int
    started: int  # as in State; 0 where it has ended by itself
    said: "tuple[int, int]"  # device and inode of the memfd with what it says


class State(Record):
    """One VM, as far as its supervisor has to know it."""

    pid: int  # of the launcher; with `daemonizes` QEMU's is another
    name: str
    uuid: str
    program: str
    version: "tuple[int, ...]"
    daemonizes: bool
    lease: str  # path of the lease of its ids, "" for none
    host_tree: str
    identity: Identity
    caller: Caller
    monitors: "tuple[grants.Monitor, ...]" = ()
    layout: "tuple[Placed, ...]" = ()  # what the view shows
    leftovers: "tuple[Leftover, ...]" = ()  # what the launch created: goes when it fails, and partly when QEMU ends
    downscripts: "tuple[Downscript, ...]" = ()  # to run when QEMU has ended
    sockets: "tuple[grants.QmpSocket, ...]" = ()  # of ours, besides those of the monitors
    network: str = CALLERS_NETWORK  # as in Plan
    memory: "tuple[str, str]" = ("", "")  # the values of -m: size and maxmem
    displays: "tuple[grants.Display, ...]" = ()
    taps: "tuple[grants.TapSettings, ...]" = ()  # for those that are plugged in
    daemons: "tuple[grants.Virtiofsd, ...]" = ()  # the last fds to serve are a pidfd of each, and a memfd with what it says
    notify: "tuple[grants.Notify, ...]" = ()
    warnings: "tuple[str, ...]" = ()  # for the log
    started: int = 0  # when QEMU's process was, in clock ticks after boot: a pid may be another process's later
    processes: "tuple[Process, ...]" = ()  # of `daemons`, once there is a supervisor

    @property
    def title(self) -> str:
        """What a process list may call the VM: LXD takes every process whose command line has the uuid for QEMU."""
        return self.name if self.name and (not self.uuid or self.uuid not in self.name) else str(self.pid)


_RECORDS = (
    Identity,
    MapEntry,
    MountMap,
    Caller,
    Account,
    Leftover,
    Downscript,
    Rights,
    grants.TapSettings,
    *grants.Grant.__subclasses__(),
)
CLASSES: "dict[str, type[Record]]" = {cls.__name__: cls for cls in (State, Process, *_RECORDS)}


def build_state(start: "Start", plan: "Plan", opened: "Opened") -> State:
    """Build the state of a VM that is about to run."""
    daemonizes = any(option.name == "daemonize" for option in start.asked.commandline.options)
    names = {obj.kind: obj for obj in start.asked.commandline.objects if obj.kind in ("name", "uuid")}
    return State(
        os.getpid(),
        (names["name"].get("guest") or "") if "name" in names else "",
        (names["uuid"].get("value") or "") if "uuid" in names else "",
        plan.program,
        start.asked.qemu.version,
        daemonizes,
        "" if start.lease is None else start.lease.path,
        plan.host_tree,
        plan.identity,
        start.caller.replace(open_fds=frozenset(), cwd="/" if daemonizes else start.caller.cwd),
        tuple(grant for grant in plan.grants if isinstance(grant, grants.Monitor)),
        opened.layout,
        tuple(opened.leftovers),
        tuple(opened.downscripts),
        tuple(grant for grant in plan.grants if isinstance(grant, grants.QmpSocket)),
        plan.network,
        find_memory(start.asked.commandline.objects),
        tuple(grant for grant in plan.grants if isinstance(grant, grants.Display)),
        start.asked.config.taps,
        tuple(grant for grant in plan.grants if isinstance(grant, grants.Virtiofsd)),
        tuple(grant for grant in plan.grants if isinstance(grant, grants.Notify)),
        plan.logged,
    )


def write_state(state: State) -> int:
    """Return an owned fd of a memfd that holds a state, to be read by the interpreter of the same version."""
    return write_memory(to_plain(state))


def read_state(fd: int) -> State:
    """Return the state in a memfd; takes ownership of it."""
    state = from_plain(read_memory(fd), CLASSES)
    assert isinstance(state, State)
    return state


def write_memory(value: "Plain") -> int:
    """Return an owned fd of a memfd that holds a value."""
    fd = os.memfd_create("qemu-userns-state", os.MFD_CLOEXEC)
    os.write(fd, marshal.dumps(value))
    return fd


def read_memory(fd: int) -> "Any":  # noqa: ANN401 (whoever wrote it knows the type)
    """Return the value in a memfd; takes ownership of it."""
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(fd, "rb") as file:
        return marshal.load(file)
