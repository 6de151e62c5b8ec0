"""A process that stands in for QEMU: started as the launcher starts QEMU, it does what it is told inside its view."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qemu_userns.host.opening import Opened, open_sources
from qemu_userns.host.usernamespace import Holder, open_namespace, write_maps
from qemu_userns.linux.landlock import probe_landlock
from qemu_userns.plan.grants import Bind, Grant, Link
from qemu_userns.plan.identity import DIRECT, SELF, Identity, MapEntry
from qemu_userns.plan.layout import build_layout, build_overlay
from qemu_userns.plan.plan import Confinement
from qemu_userns.sandbox.confine import confine, pass_fds
from qemu_userns.sandbox.namespaces import NamespaceLimits, become, join
from qemu_userns.sandbox.running import Namespaces, bind_running, open_namespaces, unbind_running
from qemu_userns.sandbox.view import build_view, overlay_host
from tests.forked import in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qemu_userns.sandbox.places import Shown

ROOT = os.geteuid() == 0
LEASED = 1_800_000_000  # ids that nobody else has
PROGRAM = os.path.realpath(sys.executable)
SERVER = """
import json, os, stat, sys
kept = []
for line in sys.stdin:
    try:
        answer = [True, eval(json.loads(line))]
    except OSError as err:
        answer = [False, err.errno]
    print(json.dumps(answer, default=str), flush=True)
"""


def identity() -> Identity:
    """Return what QEMU is for this caller: a leased id for root, else the caller."""
    if ROOT:
        ids = (MapEntry(0, LEASED, 65536),)
        return Identity(LEASED, LEASED, (), True, DIRECT, ids, ids, "a test")
    uid, gid = os.getuid(), os.getgid()
    return Identity(uid, gid, (), False, SELF, (MapEntry(0, uid, 1),), (MapEntry(0, gid, 1),), "a test")


class StandIn:
    """It runs; `run` evaluates an expression inside, and `bind` and `unbind` are a hot-plug each."""

    def __init__(self, pid: int, requests: IO[str], answers: IO[str]) -> None:
        self.pid, self._requests, self._answers = pid, requests, answers
        self.identity = identity()
        self.proc = Path(f"/proc/{pid}")

    def run(self, expression: str) -> Any:
        """Return what an expression gives inside; raises the OSError that it raises."""
        self._requests.write(json.dumps(expression) + "\n")
        self._requests.flush()
        worked, answer = json.loads(self._answers.readline())
        if not worked:
            raise OSError(answer, os.strerror(answer))
        return answer

    def read(self, path: Path | str) -> str:
        return str(self.run(f"open({str(path)!r}).read()"))

    def bind(self, *grants: Grant, before: Callable[[], None] = lambda: None, opened: Opened | None = None) -> tuple[Shown, ...]:
        """Place grants, as a worker of the supervisor does; `before` runs in the worker, and what fails is an AssertionError."""

        def work() -> tuple[Shown, ...]:
            ready = opened or Opened((), lambda _: None)
            ready.layout = build_layout(grants)
            before()
            return bind_running(ready, self.identity, self.open())

        return tuple(in_child(work))

    def unbind(self, shown: Iterable[Shown]) -> tuple[Shown, ...]:
        return tuple(in_child(lambda: unbind_running(shown, self.identity, self.open())))

    def open(self) -> Namespaces:
        pidfd = os.pidfd_open(self.pid)
        try:
            return open_namespaces(self.pid, pidfd, self.identity)
        finally:
            os.close(pidfd)

    @property
    def mounts(self) -> list[str]:
        return (self.proc / "mountinfo").read_text().splitlines()

    def options(self, path: Path | str) -> set[str]:
        """Return the options of the last mount at a path."""
        lines = [line.split(" ") for line in self.mounts]
        return set([words for words in lines if words[4] == str(path)][-1][5].split(","))

    def limit(self) -> int:
        """Return user.max_mnt_namespaces of its user namespace, which only a process in it can read."""
        return int(self.read("/proc/sys/user/max_mnt_namespaces"))


@contextlib.contextmanager
def stand_in(*grants: Grant, read_only_host: bool = False) -> Iterator[StandIn]:
    """Start it with a view of the grants and of what Python needs, or with all of the host read-only; end it."""
    request_read, request_write = os.pipe()
    answer_read, answer_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for fd, number in ((request_read, 0), (answer_write, 1)):
                os.dup2(fd, number)
            _become_stand_in(grants, read_only_host)
        except BaseException as err:
            os.write(2, f"{type(err).__name__}: {err}\n".encode())
        finally:
            os._exit(1)
    os.close(request_read)
    os.close(answer_write)
    with os.fdopen(request_write, "w") as requests, os.fdopen(answer_read) as answers:
        started = StandIn(pid, requests, answers)
        try:
            assert started.run("1") == 1
            yield started
        finally:
            with contextlib.suppress(BrokenPipeError):
                requests.close()
            os.waitpid(pid, 0)


def _become_stand_in(grants: tuple[Grant, ...], read_only_host: bool) -> None:
    """Do what launch.py does."""
    who = identity()
    layout = build_overlay(grants, True) if read_only_host else build_layout([*_system(), *grants])
    opened = Opened(layout, lambda _: None)
    if who.switch:
        open_sources(who, opened)
    holder = Holder(who)
    write_maps(holder.pid, who)
    namespaces = tuple(open_namespace(holder.pid, kind) for kind in ("user", "mnt", "ipc"))
    holder.let_go()
    if who.switch:
        become(who)
    join(namespaces)
    limits = NamespaceLimits()
    if read_only_host:
        overlay_host(opened, "/", True)
    else:
        build_view(opened, "/")
    limits.forbid_all()
    confine(Confinement(frozenset(), probe_landlock(), 0, True, False, False, None), ())
    pass_fds(())
    os.execve(PROGRAM, [PROGRAM, "-I", "-S", "-c", SERVER], {})


def _system() -> Iterator[Grant]:
    """Yield what Python needs."""
    yield Bind("processes", "/proc")
    for path in ("/usr", "/lib", "/lib64"):
        yield Link("system", path, os.readlink(path)) if os.path.islink(path) else Bind("system", path)
