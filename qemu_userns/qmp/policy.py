"""What one client may do: everything, only look, or what lists say.

* Full: everything that plain QEMU allows; text that is no command goes to QEMU too.
* Anything else is restricted. Only well-formed commands reach QEMU, printed anew from what was understood, so that QEMU cannot
  understand something else. `qmp_capabilities` is always allowed.
* `read_only`: the commands of READ_ONLY. Of human monitor commands: `info`.
* `allow`: only what it names. `deny`: not what it names. A name that ends in `*` stands for all that begin so.
* `human-monitor-command` can do nearly everything, so with lists it has to be named in `allow`, in full; the command in it has to
  be allowed by the name of its QMP twin (or its own), and `info` is allowed.
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
        "qom-list-get",
        "qom-list-properties",
        "qom-list-types",
        "trace-event-get-state",
    )
)
HMP = "human-monitor-command"
TWINS = {
    "announce_self": "announce-self",
    "block_job_cancel": "block-job-cancel",
    "block_job_complete": "block-job-complete",
    "block_job_pause": "block-job-pause",
    "block_job_resume": "block-job-resume",
    "block_job_set_speed": "block-job-set-speed",
    "block_stream": "block-stream",
    "c": "cont",
    "change": "blockdev-change-medium",
    "delvm": "snapshot-delete",
    "drive_add": "blockdev-add",
    "drive_backup": "drive-backup",
    "drive_del": "blockdev-del",
    "drive_mirror": "drive-mirror",
    "exit_preconfig": "x-exit-preconfig",
    "hostfwd_add": "netdev_add",
    "hostfwd_remove": "netdev_del",
    "loadvm": "snapshot-load",
    "migrate_continue": "migrate-continue",
    "migrate_incoming": "migrate-incoming",
    "migrate_pause": "migrate-pause",
    "migrate_recover": "migrate-recover",
    "migrate_set_capability": "migrate-set-capabilities",
    "migrate_set_parameter": "migrate-set-parameters",
    "migrate_start_postcopy": "migrate-start-postcopy",
    "nbd_server_add": "nbd-server-add",
    "nbd_server_remove": "nbd-server-remove",
    "nbd_server_start": "nbd-server-start",
    "nbd_server_stop": "nbd-server-stop",
    "nmi": "inject-nmi",
    "object_add": "object-add",
    "object_del": "object-del",
    "q": "quit",
    "ringbuf_read": "ringbuf-read",
    "ringbuf_write": "ringbuf-write",
    "s": "stop",
    "savevm": "snapshot-save",
    "sendkey": "send-key",
    "snapshot_blkdev": "blockdev-snapshot-sync",
    "snapshot_blkdev_internal": "blockdev-snapshot-internal-sync",
    "snapshot_delete_blkdev_internal": "blockdev-snapshot-delete-internal-sync",
    "trace-event": "trace-event-set-state",
    "watchdog_action": "set-action",
}
"""HMP commands whose QMP twin has another name."""
_HMP_NAME = re.compile(r"[ \t\n\v\f\r]*([^/ \t\n\v\f\r]*)")


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
        names = [command.name, *list_actions(command.arguments)] if command.name == "transaction" else [command.name]
        return next((name for name in names if not self._allows(name)), None)

    def _allows(self, name: str) -> bool:
        if self.read_only and not _matches(name, READ_ONLY):
            return False
        return (self.allow is None or _matches(name, self.allow)) and not _matches(name, self.deny)

    def _has_lists(self) -> bool:
        return self.allow is not None or bool(self.deny)

    def _find_denied_hmp(self, line: str) -> "str | None":
        name = read_hmp_name(line)
        if not name or HMP in self.deny or (self._has_lists() and HMP not in (self.allow or ())):
            return HMP
        if name == "info":
            return "info" if "info" in self.deny else None
        if self.read_only:
            return name
        twin = TWINS.get(name, name)
        denied = _matches(name, self.deny) or _matches(twin, self.deny)
        allowed = self.allow is None or _matches(name, self.allow) or _matches(twin, self.allow)
        return None if allowed and not denied else name


FULL = Policy()


def list_actions(arguments: "dict[str, object]") -> "Iterator[str]":
    """Yield the names of a transaction's actions; what is none is one without a name, which no list allows."""
    actions = arguments.get("actions")
    for action in actions if isinstance(actions, list) else ():
        kind = action.get("type") if isinstance(action, dict) else None
        yield kind if isinstance(kind, str) else ""


def read_hmp_name(line: str) -> str:
    """Return the name of the human monitor command: QEMU ends it at white space or a slash, and knows no abbreviations."""
    match = _HMP_NAME.match(line)
    return match[1] if match else ""


def _matches(name: str, patterns: "Iterable[str]") -> bool:
    if name in patterns:
        return True
    return any(pattern.endswith("*") and name.startswith(pattern[:-1]) for pattern in patterns)
