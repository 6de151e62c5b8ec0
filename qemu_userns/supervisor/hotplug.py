"""What a worker does for one command: look, plan, open, place in the running view; and take that back.

Runs in a child of the supervisor, whose ids and namespaces it changes; nothing of it stays but fds and the answer.
"""

import fcntl
import os

from qemu_userns.catalogue.commands import HMP, find_command_needs, read_command
from qemu_userns.catalogue.twins import NETDEV_ADD, find_twin
from qemu_userns.errors import ResourceError
from qemu_userns.host.facts import look_at_host
from qemu_userns.host.leftovers import remove
from qemu_userns.host.memory import raise_lock_limit
from qemu_userns.host.opening import Opened, open_grants
from qemu_userns.plan.command import build_command_plan
from qemu_userns.plan.grants import Bind, Create, CreateDir, Link, Node
from qemu_userns.plan.layout import build_layout, find_covered, find_shown
from qemu_userns.record import Record, to_plain
from qemu_userns.sandbox.running import bind_running, open_namespaces, unbind_running
from qemu_userns.supervisor.handed import Handed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.host.leftovers import Downscript, Leftover
    from qemu_userns.plan.command import CommandPlan
    from qemu_userns.plan.layout import Placed
    from qemu_userns.record import Plain
    from qemu_userns.sandbox.places import Shown
    from qemu_userns.supervisor.state import State
    from qemu_userns.supervisor.worker import Tell


class Job(Record):
    """One command to open for."""

    state: "State"
    pid: int  # QEMU's
    pidfd: int  # of the same process; borrowed
    name: str
    text: str
    placed: "tuple[tuple[Placed, int], ...]"  # what other commands got, and the number of each
    first_number: int  # of fdsets and names
    lock: int  # fd of a file whose lock says who changes the view; borrowed


class _Collected(Opened):
    """What is open for a command: its fds go to QEMU by a socket, not under numbers."""

    def __init__(self, layout: "tuple[Placed, ...]", pid: int, tell: "Tell") -> None:
        def note(item: "Leftover | Downscript", fd: "int | None" = None) -> None:
            tell(to_plain(item), () if fd is None else (fd,))

        super().__init__(layout, note)
        self._pid = pid  # QEMU's
        self.fds: "dict[int, int]" = {}

    def take(self, fd: int, number: int) -> None:
        """Collect an fd; take ownership."""
        self.fds[number] = fd

    def allow_locking(self, limit_bytes: "int | None") -> None:
        """Allow the running QEMU to lock so much memory."""
        raise_lock_limit(self._pid, limit_bytes)


def open_command(job: Job, tell: "Tell") -> "tuple[Plain, list[int]]":
    """Open what a command names; return the answer, and the fds that go with it.

    Should: run with the caller's rights, in a process of its own.

    Args:
        job: the command.
        tell: told of each file before it is created, and of each script to run at the end, with an fd to hold until then.
            They are the supervisor's to take back when this fails: where the host's tree has been left for QEMU's view, or the
            process is killed, nobody else can.

    Raises:
        QemuUsernsError: it cannot be opened or placed; nothing is left in the view.
    """
    os.umask(job.state.caller.umask)
    plan = _plan(job)
    for refusal in plan.find_refusals():
        raise ResourceError(refusal.why, refusal.reason, refusal.hint)
    layout, reused = _build_layout(job, plan)
    opened = _Collected(layout, job.pid, tell)
    open_grants(plan.grants, job.state.identity, None, opened)
    shown = _place(job, opened)
    fdsets, names = plan.find_fdsets(), plan.find_names()
    answer: "Plain" = {
        "text": plan.text.encode(errors="surrogateescape"),
        "fdsets": [[fdset, opaque] for fdset, _, opaque in fdsets],
        "names": [name for name, _ in names],
        "handed": to_plain(Handed(layout, shown, (), reused)),
        "twin": plan.name != job.name,
    }
    given = [*(number for _, number, _ in fdsets), *(number for _, number in names)]
    return answer, [opened.fds[number] for number in given]


def take_back(
    state: "State",
    pid: int,
    pidfd: int,
    shown: "Sequence[Shown]",
    created: "Sequence[Leftover]",
    downscripts: "Sequence[Downscript]",
    lock: int,
) -> "tuple[Shown, ...]":
    """Take back what a command got; return what is left of it in the view, since something else is attached over it.

    Should: run as `open_command`.

    Raises:
        QemuUsernsError: it cannot be taken back.
    """
    remove(created)
    if downscripts:
        from qemu_userns.host.scripts import run_downscripts

        run_downscripts(downscripts)
    if not shown:
        return ()
    namespaces = open_namespaces(pid, pidfd, state.identity)
    _lock(lock)
    return unbind_running(shown, state.identity, namespaces)


def _plan(job: Job) -> "CommandPlan":
    """Look at what the command names, and plan.

    A relative path is one from where QEMU was started, or from "/" for a daemon. Where QEMU stands now is not asked for: a QEMU
    that a guest has taken over could choose the directory in which the caller's rights are used.
    """
    name, text = job.name, job.text
    objects = read_command(name, text)
    twin = find_twin(objects) if name == HMP else None
    if twin is not None:
        name, text = NETDEV_ADD, twin
        objects = read_command(name, text)
    needs = find_command_needs(name, objects)
    state = job.state
    try:
        os.chdir(state.caller.cwd)
    except OSError as err:
        raise ResourceError("QEMU's working directory", err.strerror or str(err)) from err
    caller = state.caller.replace(open_fds=frozenset())
    facts = look_at_host(needs, objects, caller, state.identity, {}, state.program, (), state.taps)
    launched = (state.host_tree, state.version, state.memory, state.taps)
    return build_command_plan(name, text, objects, needs, facts, state.identity, job.first_number, *launched)


def _build_layout(job: Job, plan: "CommandPlan") -> "tuple[tuple[Placed, ...], tuple[int, ...]]":
    """Return what is to be placed, without what the view shows already, and the commands whose places that uses.

    A place below a directory uses that: taken back, the directory would take with it what is attached below it.
    """
    before = (*job.state.layout, *(grant for grant, _ in job.placed))
    numbers = {id(grant): number for grant, number in job.placed}
    missing: "list[Placed]" = []
    reused: "set[int]" = set()
    for grant in plan.build_layout():
        shown = find_shown(before, grant)
        if shown is None:
            missing.append(grant)
            reused.update(number for placed, number in job.placed if find_covered([grant], placed.path))
        elif id(shown) in numbers:
            reused.add(numbers[id(shown)])
    covered = [other for grant in missing for other in find_covered(before, grant.path) if isinstance(other, Bind | Link)]
    layout = build_layout([*missing, *covered])
    kinds = (Bind, Create, CreateDir, Link, Node)
    return tuple(grant for grant in layout if isinstance(grant, kinds)), tuple(sorted(reused))


def _place(job: Job, opened: Opened) -> "tuple[Shown, ...]":
    """Place the layout in the view, if there is anything to place."""
    if not opened.layout:
        return ()
    namespaces = open_namespaces(job.pid, job.pidfd, job.state.identity)
    _lock(job.lock)
    return bind_running(opened, job.state.identity, namespaces)


def _lock(fd: int) -> None:
    """Wait until no other worker changes the view; this process's end lets go."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(own, fcntl.LOCK_EX)
