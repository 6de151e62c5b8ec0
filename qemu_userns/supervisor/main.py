"""Start a supervisor that adopts a VM: `python3 -I -S main.py DIRECTORY PID READY`; see adoption.py, `qemu-userns adopt`."""

import sys

sys.path.insert(0, __file__.rpartition("/qemu_userns/")[0])
from qemu_userns.supervisor.life import adopt

adopt(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
