"""What sessions ask the catalogue."""

from qemu_userns.catalogue.commands import fd_names, find_command_needs, read_command
from qemu_userns.catalogue.owners import owner_of, removed_by, removed_by_event
from qemu_userns.qmp.actions import Rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.qmp.message import Command


def _needs_opening(command: "Command") -> bool:
    from qemu_userns.catalogue import ways

    needs = find_command_needs(command.name, read_command(command.name, command.text))
    return any(need.way not in (ways.FD, ways.FDS, ways.NAME) for need in needs)


RULES = Rules(
    _needs_opening,
    owner_of,
    removed_by,
    removed_by_event,
    lambda command: fd_names(command.name, command.text),
)
