"""What a supervisor writes down."""

from __future__ import annotations

import pytest

from qemu_userns.supervisor import log
from qemu_userns.supervisor.log import Seldom


def test_lines_that_differ_in_numbers_are_written_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    seldom = Seldom(lines.append)
    for pid in range(5):
        seldom.tell(f"process {pid} again")
    seldom.tell("something else")
    assert lines == ["process 0 again", "something else"]
    monkeypatch.setattr(log, "_QUIET_S", 0.0)
    seldom.tell("process 9 again")
    assert lines[2:] == ["process 9 again (and 4 before it)"]
