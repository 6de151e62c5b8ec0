"""What the parts of a session share: the actions so far, names, and what was handed to which object."""

from collections import deque

from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from qemu_userns.qmp.actions import CloseFds, Keep, Log, Release, Removed, SendClient
from qemu_userns.qmp.dialect import format_string
from qemu_userns.qmp.message import build_command, build_error
from qemu_userns.qmp.names import FdNames
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from qemu_userns.qmp.actions import Action, Owner, Prepared, Rules
    from qemu_userns.qmp.clients import Client
    from qemu_userns.qmp.message import Command, Reply

    DeviceNames = Callable[[], Mapping[str, str]]
    """What query-chardev shows as the file names of monitors, by label."""

    Job = Generator[tuple[bytes, tuple[int, ...]], Reply, None]
    """A dialogue with QEMU: yields bytes (or none, to wait on) and fds, is sent the reply."""

_DISPLAYS_MAX = 64  # sockets that wait for QEMU to take them; a viewer of SPICE comes with some 20


class Held(Record):
    """What was handed over for an object."""

    handed: int
    fdsets: "tuple[int, ...]"


class Rewritten(Record):
    """A command with its getfd names as they are at QEMU."""

    text: str
    renamed: "tuple[tuple[str, str], ...]" = ()
    """(at QEMU, the client's) of each that is another."""
    names: "tuple[str, ...]" = ()
    """All of the client's that it refers to."""


class Chore(Record):
    """What is to be taken back from QEMU."""

    fdsets: "tuple[int, ...]"
    names: "tuple[str, ...]"
    handed: int
    failed: bool = False


class DisplaySocket(Record):
    """A socket that a display shall have."""

    protocol: str
    fd: int


class Shared:
    """See the module."""

    def __init__(self, token: str, pretty: bool, rules: "Rules", device_names: "DeviceNames") -> None:
        """Begin with nothing known of QEMU."""
        self.device_names = device_names
        self.token = token
        self.pretty = pretty
        self.rules = rules
        self.names = FdNames()
        self.actions: list[Action] = []
        self.offered: frozenset[str] = frozenset()
        """The capabilities in QEMU's greeting."""
        self.ready = False
        """QEMU has agreed to our capabilities."""
        self.chores: deque[Chore | DisplaySocket] = deque()
        """What waits for its turn."""
        self.unsent: deque[int] = deque()
        """Fds of the command being handed over that are still ours."""
        self.handed = 0
        """What is being handed over, as long as that may fail, or taken back."""
        self.failed = False
        """Whether the command that needs it can have had no success, if QEMU goes now."""
        self.awaited: Owner | None = None
        """Whose making is at QEMU; an event may say that it has gone before the reply says that it was made: a short job."""
        self._owners: dict[Owner, list[Held]] = {}
        self._number = 0
        self._logged: set[str] = set()

    def next_id(self) -> str:
        """Return an id of ours, as JSON text: nobody but us and QEMU knows the token in it."""
        self._number += 1
        return f'"{self.token}-{self._number}"'

    def ask(self, name: str, **arguments: object) -> bytes:
        """Return the bytes of a command of our own; `_` stands for `-` in the arguments' names."""
        return build_command(name, {key.replace("_", "-"): value for key, value in arguments.items()}, self.next_id())

    def tell(self, client: "Client", data: bytes) -> None:
        """Send something to a client that is still there."""
        if not client.gone:
            self.actions.append(SendClient(client.number, data))

    def tell_error(self, client: "Client", error_class: str, desc: str, echo: "str | None") -> None:
        """Send an error of our own to a client."""
        self.tell(client, build_error(error_class, desc, echo, self.pretty))

    def log_once(self, text: str) -> None:
        """Log something that QEMU may do as often as it likes."""
        if text not in self._logged:
            self._logged.add(text)
            self.actions.append(Log(text))

    def close(self, fds: "tuple[int, ...]") -> None:
        """Have fds closed."""
        if fds:
            self.actions.append(CloseFds(fds))

    def release(self, handed: int, failed: bool) -> None:
        """Have something taken back, after a command that failed or with the object that had it."""
        if handed:
            self.actions.append(Release(handed, failed))

    def add_display(self, protocol: str, fd: int) -> None:
        """Have QEMU given a socket of a display; takes ownership of the fd.

        Whoever may connect could come without end while QEMU answers nothing: beyond some they are turned away.
        """
        waiting = sum(isinstance(chore, DisplaySocket) for chore in self.chores)
        if waiting < _DISPLAYS_MAX:
            self.chores.append(DisplaySocket(protocol, fd))
        else:
            self.close((fd,))
            self.log_once(f"{protocol}: a client is turned away: {waiting} wait for QEMU")

    def give_up(self) -> None:
        """Close and release what is being handed over or taken back: QEMU has gone."""
        self.close(tuple(self.unsent))
        self.unsent.clear()
        self.release(self.handed, self.failed)
        for chore in self.chores:
            if isinstance(chore, DisplaySocket):
                self.close((chore.fd,))
            else:
                self.release(chore.handed, chore.failed)
        self.handed = 0
        self.chores.clear()

    def get_holder(self, client: "Client") -> "int | None":
        """Return whose the client's fd names are by now."""
        return None if client.gone else client.number

    def rewrite(self, client: "Client", command: "Command") -> Rewritten:
        """Return a command's text with the getfd names as they are at QEMU."""
        text = command.text
        if not takes_rules(command):
            return Rewritten(text)
        renamed: list[tuple[str, str]] = []
        spans = sorted(self.rules.fd_names(command), reverse=True)
        for _, end, name in spans:
            suffix = self.names.find(client.number, name).suffix
            if suffix:
                text = text[:end] + suffix + text[end:]
                renamed.append((name + suffix, name))
        return Rewritten(text, tuple(renamed), tuple(name for _, _, name in spans))

    def conclude(self, client: "Client", command: "Command", names: "tuple[str, ...]") -> None:
        """Note what the success of a command means."""
        for name in names:
            self.names.forget(self.get_holder(client), name)
        if not command.name.startswith("query-"):  # nbd-server-stop has no arguments
            removed = self.rules.removed_by(command.name, command.arguments)
            if removed:
                self.remove(removed)

    def keep(self, owner: "Owner", prepared: "Prepared") -> None:
        """Note that what was handed over is in use by an object."""
        fdsets = tuple(dict.fromkeys(fdset for fdset, _, _ in prepared.fdsets))
        if fdsets or prepared.handed:
            self.restore(owner, prepared.handed, fdsets)
            self.actions.append(Keep(owner, prepared.handed, fdsets))

    def restore(self, owner: "Owner", handed: int, fdsets: "tuple[int, ...]") -> None:
        """Note what belongs to an object."""
        self._owners.setdefault(owner, []).append(Held(handed, fdsets))

    def remove_by_event(self, name: object, data: "dict[str, object]") -> None:
        """Take back what belongs to an object that is gone by an event, which other sessions see too."""
        owner = self.rules.removed_by_event(name, data) if isinstance(name, str) else None
        if owner:
            if owner == self.awaited:
                self.awaited = None
            self.remove(owner, elsewhere=False)

    def has_owners(self) -> bool:
        """Tell whether anything was handed over that may be taken back."""
        return bool(self._owners) or self.awaited is not None

    def remove(self, owner: "Owner", elsewhere: bool = True) -> None:
        """Take back what belongs to an object that has gone; if that is nothing, another session's may (`elsewhere`)."""
        found = self._owners.pop(owner, None)
        if found is None and elsewhere:
            self.actions.append(Removed(owner))
        for held in found or ():
            self.chores.append(Chore(held.fdsets, (), held.handed))


def is_own(fdset: object) -> bool:
    """Tell whether a number is that of an fdset of ours."""
    return isinstance(fdset, int) and fdset >= OWN_FDSET_BASE


def takes_rules(command: "Command") -> bool:
    """Tell whether the catalogue can have anything to say of a command."""
    return bool(command.arguments) and not command.name.startswith("query-")


def restore_names(line: bytes, renamed: "tuple[tuple[str, str], ...]") -> bytes:
    """Return QEMU's error with the client's getfd names, given those at QEMU and the client's."""
    for real, name in renamed:
        line = line.replace(format_string(real)[1:-1].encode(), format_string(name)[1:-1].encode())
    return line
