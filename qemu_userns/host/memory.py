"""Look at what the host allows and has of memory."""

import os
import resource

from qemu_userns.errors import ResourceError
from qemu_userns.plan.facts import PagesFact

_CAP_SYS_RESOURCE = 24
_HUGE_PAGES = "/sys/kernel/mm/hugepages"


def find_lock_limit() -> "tuple[int, int]":
    """Return how much memory this process may lock now, and how much it may allow itself: in bytes, -1 for no limit.

    Source: getrlimit(2), RLIMIT_MEMLOCK; capabilities(7), CAP_SYS_RESOURCE.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return soft, resource.RLIM_INFINITY if effective >> _CAP_SYS_RESOURCE & 1 else hard


def raise_lock_limit(pid: int, limit_bytes: "int | None") -> None:
    """Raise RLIMIT_MEMLOCK of a process, if it is lower: the hard limit too, as only root can, if it is lower as well.

    Args:
        pid: of the process, 0 for this one.
        limit_bytes: what is needed, None for no limit.

    Raises:
        ResourceError: it may not be raised.
    """
    wanted = resource.RLIM_INFINITY if limit_bytes is None else limit_bytes
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
        if not _covers(soft, wanted):
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (wanted, hard if _covers(hard, wanted) else wanted))
    except OSError as err:
        raise ResourceError("QEMU's RLIMIT_MEMLOCK", err.strerror or str(err), "raising it takes CAP_SYS_RESOURCE") from err


def look_at_pages(path: str) -> "PagesFact | None":
    """Return what there is of the huge pages that files of a hugetlbfs are made of, None for any other file system.

    Source: the kernel's Documentation/admin-guide/mm/hugetlbpage.rst; statfs(2): its block size is that of its pages.
    """
    size_bytes = os.statvfs(path).f_bsize
    try:
        free, reserved, more, surplus, total = (
            _read_number(f"{_HUGE_PAGES}/hugepages-{size_bytes >> 10}kB/{name}_hugepages")
            for name in ("free", "resv", "nr_overcommit", "surplus", "nr")
        )
    except FileNotFoundError:
        return None
    return PagesFact(size_bytes, free - reserved + max(0, more - surplus), total)


def _covers(limit: int, wanted: int) -> bool:
    """Say whether a limit is as high as another one."""
    infinite = resource.RLIM_INFINITY
    return limit == infinite or (wanted != infinite and limit >= wanted)


def _read_number(path: str) -> int:
    with open(path) as file:
        return int(file.read())
