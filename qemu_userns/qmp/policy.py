"""What one client may do: everything, only look, or what lists say.

* Full: everything that plain QEMU allows; text that is no command goes to QEMU too.
* Anything else is restricted. Only well-formed commands reach QEMU, printed anew from what was understood, so that QEMU cannot
  understand something else. `qmp_capabilities` is always allowed.
* `read_only`: the commands of READ_ONLY, but no secret: `qom-get` of a property `data`. Of human monitor commands: `info`.
* `allow`: only what it names. `deny`: not what it names. A name that ends in `*` stands for all that begin so.
* `human-monitor-command` can do nearly everything, so with lists it has to be named in `allow`, in full; the command in it has to
  be allowed by its own name or its QMP twin's, and neither may be denied. `info` is allowed, unless it or the query is denied.
* A `transaction` needs each of its actions to be allowed under its own name.
"""

import re

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qemu_userns.qmp.message import Command

READ_ONLY = frozenset(
    (
        "query-*",
        "x-query-*",
        "device-list-properties",
        "qom-get",
        "qom-list",
        "qom-list-properties",
        "qom-list-types",
        "trace-event-get-state",
    )
)
"""Not qom-list-get, which shows secrets among all else."""
_SECRET = "data"  # the property of a `secret` object that holds it
HMP = "human-monitor-command"
TWINS = {
    "c": ("cont",),
    "change": ("blockdev-change-medium", "change-vnc-password"),
    "commit": ("block-commit",),
    "delvm": ("snapshot-delete",),
    "drive_add": ("blockdev-add",),
    "drive_del": ("blockdev-del",),
    "exit_preconfig": ("x-exit-preconfig",),
    "hostfwd_add": ("netdev_add",),
    "hostfwd_remove": ("netdev_del",),
    "loadvm": ("snapshot-load",),
    "migrate_set_capability": ("migrate-set-capabilities",),
    "migrate_set_parameter": ("migrate-set-parameters",),
    "mouse_button": ("input-send-event",),
    "mouse_move": ("input-send-event",),
    "nmi": ("inject-nmi",),
    "q": ("quit",),
    "s": ("stop",),
    "savevm": ("snapshot-save",),
    "sendkey": ("send-key",),
    "snapshot_blkdev": ("blockdev-snapshot-sync",),
    "snapshot_blkdev_internal": ("blockdev-snapshot-internal-sync",),
    "snapshot_delete_blkdev_internal": ("blockdev-snapshot-delete-internal-sync",),
    "trace-event": ("trace-event-set-state",),
    "watchdog_action": ("set-action", "watchdog-set-action"),
}
"""HMP commands whose QMP twins have another name, not only "-" for "_". To be allowed by their names all of them have to be."""
_HMP_NAMES = re.compile(r"[ \t\n\v\f\r]*([^/ \t\n\v\f\r]*)[ \t\n\v\f\r]*([^/ \t\n\v\f\r]*)")


class Policy(Record):
    """The rights of one client."""

    read_only: bool = False
    allow: "frozenset[str] | None" = None
    deny: "frozenset[str]" = frozenset()

    @property
    def restricted(self) -> bool:
        """Whether anything is forbidden."""
        return self.read_only or self.allow is not None or bool(self.deny)

    def find_denied(self, command: "Command") -> "str | None":
        """Return the name of the command, in `command` or itself, that is not allowed; None if all are."""
        if command.name == "qmp_capabilities":
            return None
        if command.name == HMP:
            line = command.arguments.get("command-line")
            return self._find_denied_hmp(line if isinstance(line, str) else "")
        if self.read_only and command.name == "qom-get" and command.arguments.get("property") == _SECRET:
            return command.name
        names = [command.name, *list_actions(command.arguments)] if command.name == "transaction" else [command.name]
        return next((name for name in names if not self._allows(name)), None)

    def _allows(self, name: str) -> bool:
        if self.read_only and not _matches(name, READ_ONLY):
            return False
        return (self.allow is None or _matches(name, self.allow)) and not _matches(name, self.deny)

    def _has_lists(self) -> bool:
        return self.allow is not None or bool(self.deny)

    def _find_denied_hmp(self, line: str) -> "str | None":
        name, second = read_hmp_names(line)
        if not name or _matches(HMP, self.deny) or (self._has_lists() and HMP not in (self.allow or ())):
            return HMP
        twins = TWINS.get(name) or (name.replace("_", "-"),)
        if name == "info":
            twins = (f"query-{second.replace('_', '-')}",)
        elif self.read_only:
            return name
        denied = any(_matches(known, self.deny) for known in (name, *twins))
        allowed = self.allow is None or name == "info" or _matches(name, self.allow)
        return None if not denied and (allowed or all(_matches(twin, self.allow or ()) for twin in twins)) else name


FULL = Policy()


def list_actions(arguments: "dict[str, object]") -> "Iterator[str]":
    """Yield the names of a transaction's actions; what is none is one without a name, which no list allows."""
    actions = arguments.get("actions")
    for action in actions if isinstance(actions, list) else ():
        kind = action.get("type") if isinstance(action, dict) else None
        yield kind if isinstance(kind, str) else ""


def read_hmp_names(line: str) -> "tuple[str, str]":
    """Return the name of the human monitor command, and that of what `info` is asked for.

    QEMU ends them at white space or a slash, and knows no abbreviations.
    """
    match = _HMP_NAMES.match(line)
    return (match[1], match[2]) if match else ("", "")


def _matches(name: str, patterns: "Iterable[str]") -> bool:
    if name in patterns:
        return True
    return any(pattern.endswith("*") and name.startswith(pattern[:-1]) for pattern in patterns)
