"""What a client of a QMP monitor may do, who may be one, and where our own sockets lie. Pure."""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qemu_userns.cmdline.objects import Object

FULL, READ_ONLY = "full", "read-only"
EVERY_MONITOR = "*"


class Rights(Record):
    """What a client may do, and who may be one; the default is what QEMU allows.

    A command is carried out if `access` covers it, `allow` names it or is empty, and `deny` does not name it. A name that ends in
    `*` stands for all that begin so; qmp/policy.py has the details.
    """

    access: str = FULL  # or READ_ONLY: commands that change nothing
    allow: "tuple[str, ...]" = ()
    deny: "tuple[str, ...]" = ()
    users: "tuple[int, ...]" = ()  # uids of peers (SO_PEERCRED); none: whoever can connect

    @property
    def restricted(self) -> bool:
        """Whether they are less than QEMU gives."""
        return self != Rights()

    def describe(self) -> str:
        """Say them in one line."""
        parts = ["commands that change nothing"] if self.access == READ_ONLY else [] if self.allow else ["every command"]
        parts += [f"only {', '.join(self.allow)}"] if self.allow else []
        denied = f" but not {', '.join(self.deny)}" if self.deny else ""
        users = f"; for uid {', '.join(map(str, self.users))} alone" if self.users else ""
        return ", ".join(parts) + denied + users


class SocketRights(Record):
    """A socket of ours that the settings ask for."""

    path: str  # absolute; may hold %n, %u and %%
    rights: Rights = Rights()
    mode: int = 0o600


class MonitorRights(Record):
    """Rights of a monitor of the caller's command line."""

    name: str  # label of its character device, or EVERY_MONITOR
    rights: Rights


def find_rights(rules: "Iterable[MonitorRights]", label: str) -> Rights:
    """Return the rights of a monitor: the last rule that names it counts, else the last one for all."""
    found = {rule.name: rule.rights for rule in rules}
    return found.get(label) or found.get(EVERY_MONITOR) or Rights()


def expand_path(path: str, objects: "Sequence[Object]") -> "str | None":
    """Return the path of a socket for one VM: %n is its name, %u its uuid, %% a percent sign.

    Returns:
        None where the command line does not say them, or not so that they can be one component of a path.
    """
    parts = []
    for part in path.split("%%"):
        for sign, value in (("%n", _find(objects, "name", "guest")), ("%u", _find(objects, "uuid", "value"))):
            if sign in part:
                if value in ("", ".", "..") or "/" in value:
                    return None
                # A "%u" in the name is no sign of ours.
                part = part.replace(sign, value.replace("%", "\0"))
        parts.append(part.replace("\0", "%"))
    return "%".join(parts)


def _find(objects: "Sequence[Object]", kind: str, key: str) -> str:
    """Return a member of the last object of a kind that has it, "" if none has."""
    return next((obj.get(key) or "" for obj in reversed(objects) if obj.kind == kind and obj.get(key)), "")
