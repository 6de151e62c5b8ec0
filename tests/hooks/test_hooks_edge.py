"""The edge: lines on stderr and an exit status, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable


def run(body: str, before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Run a main function of this body at the edge."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    program = f"""
import os, sys
sys.path.insert(0, {str(CHECKOUT)!r})
from qemu_userns.errors import *
from qemu_userns.hooks.edge import run_at_edge
def main():
{indented}
run_at_edge(main)
"""
    done = subprocess.run(
        [sys.executable, "-IS", "-c", program], capture_output=True, text=True, errors="replace", preexec_fn=before
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise HostError('what', 'why', 'remedy')", 1, "qemu-userns: what: why\nhint: remedy\n"),
        ("raise UsageError('what', 'why')", 1, "qemu-userns: what: why\n"),
        ("raise LaunchError('/bin/x', 'no', exit_status=127)", 127, "qemu-userns: /bin/x: no\n"),
        ("raise ResourceError('/a\\n\\x1b[1mb', 'why')", 1, "qemu-userns: /a\\n\\x1b[1mb: why\n"),
        ("raise ResourceError(os.fsdecode(b'\\xff'), 'why')", 1, "qemu-userns: \\udcff: why\n"),
        ("open('/nowhere')", 1, "qemu-userns: /nowhere: No such file or directory\n"),
        ("open(b'/no\\nwhere')", 1, None),
        ("os.kill(-1 << 40, 0)", 1, None),
        ("raise OSError(5, 'Input/output error')", 1, "qemu-userns: system call: Input/output error\n"),
    ],
)
def test_errors_become_lines(body: str, status: int, stderr: str | None) -> None:
    found = run(body)
    assert found[:2] == (status, "")
    if stderr is not None:
        assert found[2] == stderr
    assert "Traceback" not in found[2]
    assert found[2].count("\n") <= 2


@pytest.mark.parametrize(
    "body",
    [
        "1 / 0",
        "raise ValueError('a\\nb')",
        "raise RuntimeError",
        "{}['x']",
        "def f(): f()\nf()",
        "import no_such_module",
        "raise MemoryError",
    ],
)
def test_an_internal_error_is_one_line_and_a_request(body: str) -> None:
    status, stdout, stderr = run(body)
    assert (status, stdout) == (1, "")
    first, second, end = stderr.split("\n")
    assert first.startswith("qemu-userns: internal error: ")
    assert second == "hint: please report this line"
    assert end == ""


def test_stderr_may_be_closed() -> None:
    assert run("raise HostError('what', 'why')", before=lambda: os.close(2))[0] == 1
