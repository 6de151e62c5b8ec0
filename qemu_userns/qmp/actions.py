"""What a session asks of the supervisor, what the supervisor answers, and what a session asks the catalogue.

Fds: each one that comes in (with a client's bytes, in a `Prepared`) goes out again in exactly one `SendQemu` or `CloseFds`,
whoever carries it out closes it then: the supervisor after the sendmsg.
"""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qemu_userns.qmp.message import Command

    Owner = tuple[str, str]

OUTPUT_MAX_BYTES = 8 << 20
"""How many bytes may wait for a client; the supervisor keeps them, and closes a client with more."""


class Action(Record):
    """Something that the supervisor has to do; they are done in order."""


class SendQemu(Action):
    """Write to QEMU, the fds in one sendmsg with the first byte; then close them."""

    data: bytes
    fds: "tuple[int, ...]" = ()


class SendClient(Action):
    """Append to what waits for a client."""

    client: int
    data: bytes


class CloseClient(Action):
    """Close a client's connection after what waits for it; the session knows the client no more."""

    client: int
    reason: str
    """For the log; empty where nothing is wrong."""


class CloseFds(Action):
    """Close fds that nobody wants."""

    fds: "tuple[int, ...]"


class Prepare(Action):
    """Open and bind what a command names, then `Session.answer(ticket, ...)`."""

    ticket: int
    client: int
    name: str
    text: str
    """The command; a `Prepared.text` replaces it."""


class Release(Action):
    """Take back what was handed over under this number: it is not, or no more, in use."""

    handed: int
    failed: bool = False
    """The command failed, or never ran: also what was made for it to keep goes."""


class Keep(Action):
    """What was handed over under this number belongs to an object of QEMU's until `Release`; for the state of the VM.

    A later session of the same monitor is told so by `Session.keep`.
    """

    owner: "Owner"
    handed: int
    fdsets: "tuple[int, ...]"


class Removed(Action):
    """An object has gone that this session handed nothing to: another monitor's may have (`Session.remove_owner`)."""

    owner: "Owner"


class Log(Action):
    """A line for the log."""

    text: str


class Prepared(Record):
    """What a command names is open and bound."""

    text: bytes
    """The command for QEMU, with the client's id as it was."""
    fdsets: "tuple[tuple[int, int, str], ...]" = ()
    """(fdset-id, fd, opaque): for add-fd; several fds may go to one set."""
    names: "tuple[tuple[str, int], ...]" = ()
    """(name, fd): for getfd."""
    handed: int = 0
    """The supervisor's number for all of it, for `Release` and `Keep`; 0 is none."""
    twin: bool = False
    """The text is a QMP command in place of an HMP one: the reply is to be said as HMP says it."""


class Refused(Record):
    """It cannot be opened: the client gets this error instead of QEMU's reply."""

    error_class: str
    desc: str


class Rules(Record):
    """What the catalogue knows of commands."""

    needs_opening: "Callable[[Command], bool]"
    """Whether the command names host resources, so that it is handed out as `Prepare`."""
    owner_of: "Callable[[str, dict[str, object]], Owner | None]"
    """The object that holds what a command (name, arguments) was handed, None if nothing does after the reply."""
    removed_by: "Callable[[str, dict[str, object]], Owner | None]"
    """The object that is gone once a command has succeeded."""
    removed_by_event: "Callable[[str, dict[str, object]], Owner | None]"
    """The object that is gone by an event (name, data)."""
    fd_names: "Callable[[Command], Iterable[tuple[int, int, str]]]"
    """(start, end, name) in the command's text of each name that `getfd` gave, inside of the quotes."""
