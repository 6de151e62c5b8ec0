"""What `lxd forklimits` does: `forklimits.py [limit=memlock:SOFT:HARD] [fd=N...] -- PROGRAM [ARGUMENT...]`.

Limits are raised, the fds stay open, and the program takes this process over.
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys

LIMITS = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE}


def main(words: list[str]) -> None:
    """Become the program that the words behind `--` name."""
    end = words.index("--")
    for word in words[:end]:
        key, _, value = word.partition("=")
        if key == "fd":
            fcntl.fcntl(int(value), fcntl.F_SETFD, 0)
        else:
            name, *limits = value.split(":")
            soft, hard = (resource.RLIM_INFINITY if limit == "unlimited" else int(limit) for limit in limits)
            resource.setrlimit(LIMITS[name], (soft, hard))
    os.execv(words[end + 1], words[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
