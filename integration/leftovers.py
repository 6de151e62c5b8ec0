"""What a launch could leave behind on the host, seen from a test."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from qemu_userns.host.identity import RUN_DIR
from qemu_userns.host.leases import sweep_leases
from qemu_userns.supervisor.registry import find_run_dir

ALONE = "QEMU_USERNS_ALONE"  # scripts/alone sets it
OURS = ("qemu-system", "qemu_userns", "qemu-userns")


@dataclass(frozen=True)
class HostState:
    """Processes, mounts and run-time files that are ours; a test must leave them as they were."""

    processes: frozenset[tuple[int, str]]
    mounts: frozenset[str]
    run_files: frozenset[str]

    def added_since(self, before: HostState) -> list[str]:
        """Return a line for each thing that `before` did not have."""
        return sorted(
            [f"process {pid}: {command}" for pid, command in self.processes - before.processes]
            + [f"mount: {line}" for line in self.mounts - before.mounts]
            + [f"mount gone: {line}" for line in before.mounts - self.mounts]
            + [f"file: {path}" for path in self.run_files - before.run_files]
        )


def host_state() -> HostState:
    return HostState(processes(), frozenset(Path("/proc/self/mountinfo").read_text().splitlines()), run_files())


def processes() -> frozenset[tuple[int, str]]:
    """Return pid and command line of the processes that this test run started, orphans too.

    Where scripts/alone has started it, that is every process there is. Else it is those of ours: an orphan's parent is an
    ancestor of ours (init or a subreaper), and a process below somebody else's parent is the work of another test run.
    """
    table = process_table()
    ancestors = set(parents(os.getpid(), table))
    if ALONE in os.environ:
        return frozenset((pid, command) for pid, (_, command) in table.items() if command and pid not in ancestors)
    found = set()
    for pid, (_, command) in table.items():
        if pid in ancestors or not is_ours(command):
            continue
        outside = next((parent for parent in parents(pid, table) if not is_ours(table[parent][1]) or parent in ancestors), 0)
        if outside == 0 or outside in ancestors or os.getpid() in (outside, *parents(outside, table)):
            found.add((pid, command))
    return frozenset(found)


def process_table() -> dict[int, tuple[int, str]]:
    """Return parent and command line of every process that has not ended; zombies have no command line."""
    table = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, IndexError):
            continue
        table[int(entry.name)] = (parent, command)
    return table


def parents(pid: int, table: dict[int, tuple[int, str]]) -> list[int]:
    found: list[int] = []
    while pid in table and (pid := table[pid][0]) in table:
        found.append(pid)
    return found


def is_ours(command: str) -> bool:
    return any(word in command for word in OURS)


def run_files() -> frozenset[str]:
    folders = [Path(RUN_DIR), Path(find_run_dir(os.getuid()))]
    return frozenset(str(path) for folder in folders for path in folder.glob("**/*") if not path.is_dir())


def is_held(lease: Path) -> bool:
    """Tell whether somebody holds a lease."""
    with lease.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sweep_unheld_leases() -> None:
    """Do as the next launch: without a supervisor the file of a lease stays, and nobody holds it."""
    if os.geteuid() == 0:
        sweep_leases(RUN_DIR)
