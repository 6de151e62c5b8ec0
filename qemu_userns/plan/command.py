"""The plan of one QMP command while QEMU runs, a value: grants, and the text that QEMU gets in place of the client's. Pure.

The handovers are those of a launch: what QEMU may open is shown at its path, what it may not is opened outside. What is not
there QEMU says itself, in its own words.
"""

import re

from qemu_userns.catalogue.commands import find_hmp_line
from qemu_userns.catalogue.ways import FDS_PER_COMMAND, OWN_FDSET_BASE
from qemu_userns.cmdline.hmp import parse_hmp
from qemu_userns.cmdline.json import parse_json
from qemu_userns.cmdline.objects import CommandLine
from qemu_userns.cmdline.source import Edit, Source, append, apply_edits, remove, replace
from qemu_userns.errors import CommandLineError
from qemu_userns.plan.draft import Draft
from qemu_userns.plan.facts import MISSING
from qemu_userns.plan.grants import Connect, Helper, Listen, OpenFd, Passt, Run, Tap
from qemu_userns.plan.handover import hand_over
from qemu_userns.plan.plan import NO_HOST, Granted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import Object
    from qemu_userns.cmdline.source import Member
    from qemu_userns.plan.facts import HostFacts
    from qemu_userns.plan.grants import TapSettings
    from qemu_userns.plan.identity import Identity

# Getfd names of our own; those of clients may be anything else that begins with no digit.
NAME_PREFIX = "qemu-userns."
_NAMED = (Connect, Listen, Run, Helper, Passt)  # each is one fd, which QEMU has by its getfd name
_SHELL = ("/bin/sh", "-c")
_KEY_BEFORE_LIST = re.compile(r"""(["'])\w+\1\s*:\s*\[\s*\Z""")


class CommandPlan(Granted):
    """Everything that one command takes; who is refused something is told so instead of an answer of QEMU's."""

    name: str
    text: str  # what QEMU gets
    first_number: int
    notes: "tuple[str, ...]" = ()

    def describe(self) -> str:
        """Say in a few lines what the command is given."""
        grants = [f"{self.name}: {grant.describe()}" for grant in self.grants]
        return "\n".join([*grants, *self.notes])

    def find_fdsets(self) -> "tuple[tuple[int, int, str], ...]":
        """Return fdset, number of the fd, and what query-fdsets shall call it, of each file that is passed."""
        opened = (grant for grant in self.grants if isinstance(grant, OpenFd))
        return tuple((grant.fdset, grant.number, grant.given) for grant in opened if grant.fdset is not None)

    def find_names(self) -> "tuple[tuple[str, int], ...]":
        """Return getfd name and number of the fd of each socket, device and tap's queue that is passed."""
        numbers: "list[int]" = []
        for grant in self.grants:
            if isinstance(grant, Tap):
                numbers += grant.numbers
            elif isinstance(grant, _NAMED) or (isinstance(grant, OpenFd) and grant.fdset is None):
                numbers.append(grant.number)
        return tuple((_name(self.first_number, number), number) for number in numbers)


class CommandDraft(Draft):
    """The draft of a command: fds are numbered from 0, in the order in which they are opened."""

    most_queues = 64  # two fds for each fit into one message of a worker's

    def __init__(
        self, text: str, objects: "Sequence[Object]", facts: "HostFacts", identity: "Identity", first_number: int
    ) -> None:
        """Start with nothing."""
        super().__init__(objects, facts, identity, frozenset())
        self._raw = parse_json(text)[0]
        self._text = text
        self._first_number = first_number
        self._fds = 0

    def next_fd(self) -> int:
        """Return the number of the next fd, or refuse the command if it has too many."""
        if self._fds == FDS_PER_COMMAND:
            self.refuse("the command", f"more than {FDS_PER_COMMAND} files would be opened outside", "use several commands")
        self._fds += 1
        return self._fds - 1

    def next_fdset(self) -> int:
        """Return a number for an fdset that no command had before."""
        self._fdset += 1
        return OWN_FDSET_BASE + self._first_number + self._fdset - 1

    def refuse(self, why: str, reason: str, hint: "str | None" = None) -> None:
        """Add a refusal, but leave to QEMU what is not there."""
        if reason != MISSING:
            super().refuse(why, reason, hint)

    def refuse_open(self, need: "Need", reason: str, hint: "str | None" = None) -> None:
        """Refuse a path that leads nowhere in QEMU's manner; what would open a device is said too."""
        self.refuse(f"Could not open '{need.path}'", reason, hint if self.path(need.path).group else None)

    def keep_fd(self, number: int, why: str, reopened: bool = False) -> None:
        """Leave numbers to QEMU: its fds are its own by now."""

    def pass_file(self, grant: OpenFd) -> None:
        """Add a file to its fdset."""
        self.add(grant)

    def name_fd(self, number: int) -> str:
        """Return the getfd name of an fd."""
        return _name(self._first_number, number)

    def pass_node(self, need: "Need", grant: OpenFd) -> bool:
        """Name the fd by its name, for which HMP has no place (contracts/qemu.md 2.2)."""
        if need.member is None or need.member.source:
            return False
        name = _name(self._first_number, grant.number)
        self.edits.append(append(need.obj, need.row.fd_key, name, f"{grant.path} is opened outside and passed as {name}"))
        return True

    def takes_fd(self, need: "Need") -> bool:
        """Say whether the command has a place for a socket by its name; HMP has no names (contracts/qemu.md 2.2)."""
        return self._is_address(need) or self._find_family(need) is not None

    def pass_socket(self, need: "Need", number: int) -> None:
        """Write {"type": "fd", "str": NAME} in place of {"type": "unix", "path": PATH}, or fd:NAME."""
        member, name = need.member, _name(self._first_number, number)
        why = f"{need.path} is made outside and passed as {name}"
        family = self._find_family(need)
        if member is None:
            return
        if family is None:
            self.edits.append(replace(member, f"fd:{name}", why))
            return
        path = self._find_raw(member)
        parent = path.key.removesuffix("path")
        unix_only = [other for other in self._raw if other.key in (f"{parent}abstract", f"{parent}tight")]
        self.edits += [
            replace(family, "fd", why),
            Edit(0, path.item, path.end, f'"str":"{name}"', why),
            *(remove(need.obj, other, why) for other in unix_only),
        ]

    def run(self, need: "Need") -> None:
        """Run a program outside, and have QEMU talk to it by a socket."""
        member, name = need.member, _name(self._first_number, self._fds)
        if member is None or member.source:
            self.refuse(need.describe(), "a program is run outside for the QMP command only", "use migrate of QMP, or a socket")
            return
        if need.part is not None:
            argv: "tuple[str, ...]" = (*_SHELL, need.path)
            self.edits.append(replace(member, f"fd:{name}", f"{need.path} runs outside"))
        else:
            argv = self._replace_program(member, name)
        self.add(Run(need.describe(), argv, self.next_fd()))

    def _replace_program(self, first: "Member", name: str) -> "tuple[str, ...]":
        """Rewrite {"transport": "exec", "args": [...]} to a socket's address; return the program's words."""
        why = f"{first.value} runs outside"
        address = self._find_raw(first).key.removesuffix("args.0")
        words = [other for other in self._raw if other.key.startswith(f"{address}args.")]
        key = _KEY_BEFORE_LIST.search(self._text[: first.start])
        if key is None:
            raise CommandLineError("args", "its key is spelled with escapes")
        self.edits += [replace(other, "socket", why) for other in self._raw if other.key == f"{address}transport"]
        end = self._text.index("]", words[-1].end) + 1
        self.edits.append(Edit(0, key.start(), end, f'"type":"fd","str":"{name}"', why))
        return tuple(word.value for word in words)

    def _is_address(self, need: "Need") -> bool:
        """Say whether a socket is the whole of a migration's address, which may be fd:NAME as well."""
        return need.part is not None and need.obj.kind == "migrate" and need.obj.source == 0 and need.obj.form == "json"

    def _find_family(self, need: "Need") -> "Member | None":
        """Return the "type" beside a "path", if they are a QAPI socket address that may be an fd of a stream as well."""
        if need.member is None or need.part is not None or need.member.source or need.obj.form != "json":
            return None
        if need.obj.kind == "netdev":  # QEMU opens a stream's in a thread of its own, which knows no names of getfd
            return None
        parent = self._find_raw(need.member).key.rpartition(".")[0]
        kinds = (f"{parent}.type", f"{parent.removesuffix('.data')}.type")
        return next((member for member in self._raw if member.key in kinds and member.value == "unix"), None)

    def _find_raw(self, member: "Member") -> "Member":
        """Return a member as the text spells its key."""
        return next(other for other in self._raw if other.start == member.start)

    def print_text(self) -> str:
        """Return the text with everything replaced: HMP's in its words, these in the line, the line in the text."""
        self.join_parts()
        line = find_hmp_line(self._text)
        words = parse_hmp(line.value) if line is not None else None
        edits = [edit for edit in self.edits if edit.source == 0]
        if line is not None and words is not None:
            numbers = {edit.source for edit in self.edits} - {0}
            values = {
                number: apply_edits(words.words[number - 1].value, [edit for edit in self.edits if edit.source == number])
                for number in numbers
            }
            edits += [replace(line, words.replace_words(values), "")] if values else []
        return apply_edits(self._text, edits)


def build_command_plan(
    name: str,
    text: str,
    objects: "Sequence[Object]",
    needs: "Sequence[Need]",
    facts: "HostFacts",
    identity: "Identity",
    first_number: int,
    host_tree: str = NO_HOST,
    version: "tuple[int, ...]" = (),
    memory: "tuple[str, str]" = ("", ""),
    taps: "tuple[TapSettings, ...]" = (),
) -> CommandPlan:
    """Build the plan of a command.

    Args:
        name: the command.
        text: all of its JSON, which the catalogue has read.
        objects: what it names or makes.
        needs: what the catalogue found in them.
        facts: the host, with everything looked up that the needs name, relative paths from where QEMU stands.
        identity: who QEMU is.
        first_number: from here on the VM has given no number to an fdset or a name of its own; FDS_PER_COMMAND may be taken.
        host_tree: which tree QEMU sees, as in the plan of its launch.
        version: QEMU's.
        memory: the values of its -m: size and maxmem.
        taps: what the settings say of taps.
    """
    draft = CommandDraft(text, objects, facts, identity, first_number)
    draft.host_tree, draft.version, draft.memory, draft.taps = host_tree, version, memory, taps
    commandline = CommandLine((), (), (Source(text, name, 0),), tuple(objects))
    after = text
    try:
        for need in needs:
            # /dev/fd/N is QEMU's own; it has been opened by now.
            if not need.path.startswith(("/dev/fd/", "/proc/self/fd/")):
                hand_over(draft, need, commandline)
        if taps:
            from qemu_userns.plan.taps import refuse_unused

            refuse_unused(draft)
        after = draft.print_text()
    except CommandLineError as err:
        draft.refuse(name, str(err))
    return CommandPlan(tuple(draft.grants), host_tree, name, after, first_number, tuple(draft.notes))


def _name(first_number: int, number: int) -> str:
    return f"{NAME_PREFIX}{first_number + number}"
