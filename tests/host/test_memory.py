"""What the host allows of memory, asked of this kernel."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_userns.errors import ResourceError
from qemu_userns.host.memory import find_lock_limit, look_at_pages, raise_lock_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMLOCK = resource.RLIMIT_MEMLOCK
KIB = 1024


@pytest.fixture
def sleeper() -> Iterator[int]:
    """Start a process that may lock 64 KiB, and may allow itself 128; return its pid."""
    words = ["prlimit", f"--memlock={64 * KIB}:{128 * KIB}", "--", sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while Path(f"/proc/{process.pid}/limits").read_text().split("Max locked memory")[1].split()[0] != str(64 * KIB):
            pass
        yield process.pid
        process.kill()


def limits_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/limits").read_text().split("Max locked memory")[1].split()[:2]


def test_a_soft_limit_is_raised_as_far_as_the_hard_one(sleeper: int) -> None:
    raise_lock_limit(sleeper, 100 * KIB)
    assert limits_of(sleeper) == [str(100 * KIB), str(128 * KIB)]


def test_a_limit_is_never_lowered(sleeper: int) -> None:
    raise_lock_limit(sleeper, 10 * KIB)
    assert limits_of(sleeper) == [str(64 * KIB), str(128 * KIB)]


def test_a_hard_limit_is_raised_by_who_may(sleeper: int) -> None:
    if find_lock_limit()[1] == resource.RLIM_INFINITY:
        raise_lock_limit(sleeper, None)
        assert limits_of(sleeper) == ["unlimited", "unlimited"]
    else:
        with pytest.raises(ResourceError, match="RLIMIT_MEMLOCK: Operation not permitted"):
            raise_lock_limit(sleeper, None)


def test_this_processs_limit_is_told() -> None:
    assert find_lock_limit()[0] == resource.getrlimit(MEMLOCK)[0]


def test_an_ordinary_directory_has_no_huge_pages(tmp_path: Path) -> None:
    assert look_at_pages(str(tmp_path)) is None
