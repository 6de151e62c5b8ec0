"""Take back what a launch left on the host."""

import os
import time

from qemu_userns.errors import HostError
from qemu_userns.host.identity import RUN_DIR
from qemu_userns.host.leases import sweep_leases
from qemu_userns.host.leftovers import remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qemu_userns.host.leftovers import Downscript, Leftover

_SWEEPS, _PAUSE_S = 10, 0.02


def clean_up(leftovers: "Iterable[Leftover]", downscripts: "Sequence[Downscript]", lease: str) -> None:
    """Remove the files, run the scripts, and remove the lease's file (its path, "" for none) once its last holder is gone.

    The pipe's end and the lock's end are two fds of one dying process, and either may be seen first: hence a few tries. A lease
    file that stays all the same is unlocked, so free, and the next launch takes or sweeps it.
    """
    remove(leftovers)
    if downscripts:
        from qemu_userns.host.scripts import run_downscripts

        run_downscripts(downscripts)
    if not lease:
        return
    for _ in range(_SWEEPS):
        try:
            sweep_leases(RUN_DIR)
            if not os.path.exists(lease):
                return
        except (HostError, OSError):
            return
        time.sleep(_PAUSE_S)
