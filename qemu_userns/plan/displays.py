"""Hand over the unix sockets of displays: bound outside, where the caller may, and passed by the supervisor over QMP. Pure.

QEMU takes neither as an fd on its command line. VNC takes the listening socket by display-update (since QEMU 7.1), and reports it
as its own from then on. SPICE takes only clients, by add_client, so the supervisor accepts them. Both say nothing of which
display they mean: it is the first.
"""

from qemu_userns.cmdline.source import remove, replace
from qemu_userns.plan.grants import SPICE, VNC, Display
from qemu_userns.plan.monitors import find_plain_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.draft import Draft

# With these QEMU listens on the network besides, or says that they do not go with a path.
_NETWORK = {VNC: ("websocket", "to"), SPICE: ("port", "tls-port")}


def takes_socket(draft: "Draft", need: "Need", commandline: "CommandLine") -> bool:
    """Say whether a display can do without a socket of its own until it is passed one.

    With -preconfig there is no display before x-exit-preconfig, and nothing tells when that comes.
    """
    same = [obj for obj in draft.objects if obj.kind == need.obj.kind]
    return (
        same[:1] == [need.obj]
        and (need.obj.kind == VNC or len(same) == 1)
        and need.member is not None
        and len(need.obj.find_all(need.member.key)) == 1
        and not any(need.obj.get(key) for key in _NETWORK[need.obj.kind])
        and all(option.name != "preconfig" for option in commandline.options)
    )


def listen(draft: "Draft", need: "Need") -> None:
    """Have the socket bound outside, and start QEMU without it."""
    real, error = draft.find_entry(need.path)
    if error is not None or need.member is None:
        draft.refuse(f"{need.describe()} {need.path}", error or "", "the caller cannot make a socket there")
        return
    grant = Display(need.describe(), need.obj.kind, find_plain_label(draft), real, need.path)
    why = f"{need.path} is bound outside; the supervisor passes {'it' if grant.protocol == 'vnc' else 'its clients'} by QMP"
    draft.add(grant)
    if grant.protocol == VNC:
        draft.edits.append(replace(need.member, "none", why))
    else:  # QEMU goes on reporting addr, which means nothing to it without a port
        draft.edits += (remove(need.obj, member, why) for member in need.obj.find_all("unix"))
