"""Huge pages that the host gives for a while, and a file system of them."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from integration.talk import unmount

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_BYTES = 2 << 20
HUGE_TOTAL = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_BYTES >> 10}kB/nr_hugepages")
PAGES = 160


@contextlib.contextmanager
def huge_pages(folder: Path, mode: str) -> Iterator[Path]:
    """Have some, in a new folder of an access mode."""
    add_pages(PAGES)
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", f"mode={mode},pagesize={HUGE_BYTES}", "hugetlbfs", folder], check=True)
    try:
        yield folder
    finally:
        unmount(folder)
        add_pages(-PAGES)


def add_pages(count: int) -> None:
    """Have more huge pages, or fewer: others may test with some at the same time."""
    with HUGE_TOTAL.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        total = int(file.read())
        HUGE_TOTAL.write_text(f"{max(0, total + count)}")
