"""The supervisor as a process of its own: waits for QEMU to end, then removes what must not stay.

Started by supervisor/process.py as `python3 -I -S main.py REQUEST_FD STATE_FD leased|own`.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from qemu_userns.host.leftovers import decode
from qemu_userns.supervisor.cleanup import clean_up


def main(request: int, state: int, leased: bool) -> None:
    """Wait for the end of the pipe whose other end QEMU holds; bytes in it are QEMU's and mean nothing."""
    os.lseek(state, 0, os.SEEK_SET)
    with os.fdopen(state, "rb") as file:
        leftovers = [decode(os.fsdecode(line)) for line in file.read().split(b"\0")[:-1]]
    while os.read(request, 4096):
        pass
    clean_up(leftovers, leased)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "leased")
