"""QEMU without us: when it can be talked to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.machine import PATIENCE

if TYPE_CHECKING:
    import subprocess

_LIMIT_S = 30 * PATIENCE


def wait_main_loop(process: subprocess.Popen[bytes]) -> None:
    """Wait until a plain QEMU that has a monitor serves it, or has ended.

    QEMU 7.2 looks at a new monitor's socket in two threads for a moment: who connects just then may be greeted twice, or stop
    its main thread, which then waits in accept(2). The moment is over when both wait for events: the main thread, which may
    wait so for other things before, and the monitors' own, which there is only then.
    """
    end = time.monotonic() + _LIMIT_S
    while process.poll() is None and not _serves(process.pid):
        assert time.monotonic() < end, "QEMU's main loop does not begin"
        time.sleep(0.005)


def _serves(pid: int) -> bool:
    """Say whether both threads wait."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        others = [task for task in tasks.iterdir() if task.name != str(pid)]
        return any(map(_is_waiting, others)) and _is_waiting(tasks / str(pid)) and any(map(_is_waiting, others))
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread has ended


def _is_waiting(task: Path) -> bool:
    return "poll" in (task / "wchan").read_text()
