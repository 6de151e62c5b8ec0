"""The drop-in qemu-system-*: an entry in a directory before QEMU's own in PATH."""

import os
import sys

from qemu_userns.hooks.edge import run_at_edge
from qemu_userns.launch import launch
from qemu_userns.linux.process import read_environ
from qemu_userns.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main(entry: str) -> "NoReturn":
    """Become QEMU.

    Args:
        entry: path of the drop-in entry, whose name is that of the QEMU it stands for.
    """
    run_at_edge(lambda: launch(Request(tuple(sys.argv), read_environ(), os.path.abspath(entry))))
