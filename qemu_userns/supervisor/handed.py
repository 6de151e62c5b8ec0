"""What one command got from the host."""

from qemu_userns.host.leftovers import Downscript, Leftover
from qemu_userns.plan import grants
from qemu_userns.plan.identity import MapEntry, MountMap
from qemu_userns.record import Record
from qemu_userns.sandbox.places import Shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.layout import Placed


class Handed(Record):
    """Everything that was opened for a command, or made, and is to be taken back with the object that it built."""

    grants: "tuple[Placed, ...]"  # placed in the view
    shown: "tuple[Shown, ...]"  # the same, as it is told from others
    created: "tuple[Leftover, ...]"  # files and sockets that were made
    reused: "tuple[int, ...]"  # numbers of the commands whose places it uses too
    downscripts: "tuple[Downscript, ...]" = ()  # to run when it is taken back


class Held(Record):
    """What an object of QEMU's holds, for the next supervisor to know."""

    number: int
    label: str  # of the monitor whose client built the object
    owner: "tuple[str, str]"
    fdsets: "tuple[int, ...]"
    handed: Handed


_RECORDS = (Held, Handed, Leftover, Downscript, MapEntry, MountMap, Shown, *grants.Grant.__subclasses__())
CLASSES: "dict[str, type[Record]]" = {cls.__name__: cls for cls in _RECORDS}
