"""Start a supervisor that adopts a VM: `python3 -I -S main.py DIRECTORY PID READY [FOLDER...]`; see adoption.py, cli/adopt.py.

The folders are those that modules are imported from.
"""

import sys

sys.path.insert(0, __file__.rpartition("/qemu_userns/")[0])
sys.path += sys.argv[4:]
from qemu_userns.supervisor.life import adopt

adopt(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
