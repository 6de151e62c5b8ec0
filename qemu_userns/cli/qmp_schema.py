"""What query-qmp-schema says of commands: for help, and for completion.

Source: qapi/introspect.json of QEMU. Types have numbers for names; a `tag` member chooses one of the `variants`, which adds
members. It comes from QEMU, so a part that is not as it should be is passed over.
"""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DEEPEST = 8


class Member(Record):
    """An argument, or a part of one."""

    name: str
    type: str
    optional: bool


class Schema:
    """The commands of one QEMU."""

    def __init__(self, entries: object) -> None:
        """Take the reply of query-qmp-schema."""
        self._entries = {_text(entry, "name"): entry for entry in _dicts(entries)}

    def find_commands(self) -> "list[str]":
        """Return the names of all commands, sorted."""
        return sorted(name for name, entry in self._entries.items() if _text(entry, "meta-type") == "command")

    def find_members(self, command: str, parents: "list[str]", given: "Mapping[str, str]") -> "list[Member]":
        """Return the arguments of a command, or the members of one of them.

        Args:
            command: its name.
            parents: the keys that lead to the object; none for the arguments themselves.
            given: by dotted key, the values that have been typed: they choose variants.
        """
        kind, path = _text(self._entries.get(command), "arg-type"), ""
        for parent in parents:
            members = {member.name: member for member in self._iterate_members(kind, path, given)}
            if parent not in members:
                return []
            kind, path = members[parent].type, f"{path}{parent}."
        return list({member.name: member for member in self._iterate_members(kind, path, given)}.values())

    def find_values(self, kind: str) -> "list[str]":
        """Return the values that a type lets one choose from; none where any will do."""
        entry = self._entries.get(kind)
        meta = _text(entry, "meta-type")
        if meta == "enum" and entry is not None:
            members = [_text(member, "name") for member in _dicts(entry.get("members"))]  # since QEMU 6.2
            values = entry.get("values")
            return members or [value for value in (values if isinstance(values, list) else []) if isinstance(value, str)]
        if meta == "alternate":
            return [v for k in self._find_alternatives(kind) if self._get_meta(k) != "alternate" for v in self.find_values(k)]
        return ["true", "false"] if kind == "bool" else []

    def has_members(self, kind: str) -> bool:
        """Say whether a type is an object, or may be one."""
        return bool(self._find_objects(kind))

    def describe_type(self, kind: str, depth: int = 0) -> str:
        """Say in a few words what a type is."""
        meta = self._get_meta(kind)
        if depth > _DEEPEST:
            return "..."
        if meta == "array":
            return f"list of {self.describe_type(_text(self._entries[kind], 'element-type'), depth + 1)}"
        if meta == "enum":
            return " | ".join(self.find_values(kind))
        if meta == "alternate":
            kinds = [k for k in self._find_alternatives(kind) if self._get_meta(k) != "alternate"]
            return " or ".join(dict.fromkeys(self.describe_type(k, depth + 1) for k in kinds))
        return meta if meta == "object" else kind

    def _iterate_members(self, kind: str, path: str, given: "Mapping[str, str]", depth: int = 0) -> "Iterator[Member]":
        """Yield the members of an object, and of the variants that `given` chooses."""
        for name in self._find_objects(kind):
            entry = self._entries[name]
            for member in _dicts(entry.get("members")):
                yield Member(_text(member, "name"), _text(member, "type"), "default" in member)
            chosen = given.get(path + _text(entry, "tag"))
            for variant in _dicts(entry.get("variants")):
                if chosen is not None and _text(variant, "case") == chosen and depth < _DEEPEST:
                    yield from self._iterate_members(_text(variant, "type"), path, given, depth + 1)

    def _find_objects(self, kind: str) -> "list[str]":
        """Return the object types that a type is or may be."""
        kinds = self._find_alternatives(kind) if self._get_meta(kind) == "alternate" else [kind]
        return [name for name in kinds if self._get_meta(name) == "object"]

    def _find_alternatives(self, kind: str) -> "list[str]":
        return [_text(member, "type") for member in _dicts(self._entries[kind].get("members"))]

    def _get_meta(self, kind: str) -> str:
        return _text(self._entries.get(kind), "meta-type")


def complete(schema: Schema, words: "list[str]", text: str, others: "tuple[str, ...]" = ()) -> "list[str]":
    """Return what a word can become.

    Args:
        schema: QEMU's.
        words: those before it; the first is the command.
        text: the word as far as it is typed.
        others: words that are no commands of QEMU's and may be the first.
    """
    if not words:
        return [f"{name} " for name in sorted({*schema.find_commands(), *others}) if name.startswith(text)]
    given = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
    key, equals, value = text.partition("=")
    *parents, last = key.split(".")
    members = schema.find_members(words[0], parents, given)
    if equals:
        kinds = [member.type for member in members if member.name == last]
        return [f"{key}={choice} " for kind in kinds for choice in schema.find_values(kind) if choice.startswith(value)]
    prefix = "".join(f"{parent}." for parent in parents)
    return [
        prefix + member.name + end
        for member in sorted(members, key=lambda member: (member.optional, member.name))
        if member.name.startswith(last) and prefix + member.name not in given
        for end in _find_ends(schema, member.type)
    ]


def _find_ends(schema: Schema, kind: str) -> "list[str]":
    """Return what may stand behind a key: `=` and a value, or `.` and a member."""
    if not schema.has_members(kind):
        return ["="]
    return ["."] if schema.describe_type(kind) == "object" else ["=", "."]


def describe_command(schema: Schema, command: str, given: "Mapping[str, str]") -> "list[str]":
    """Return lines of help on a command; `given` values choose variants.

    The lines hold text of QEMU's, which may be anything.
    """
    rows = []
    for member in schema.find_members(command, [], given):
        rows.append((member.name, "optional" if member.optional else "required", schema.describe_type(member.type)))
        if schema.describe_type(member.type) == "object":
            for part in schema.find_members(command, [member.name], given):
                rows.append((f"{member.name}.{part.name}", "optional" if part.optional else "", schema.describe_type(part.type)))
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"  {name.ljust(width)}  {need.ljust(8)}  {kind}" for name, need, kind in rows] or ["  takes no arguments"]


def _dicts(value: object) -> "list[dict[str, object]]":
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(entry: "Mapping[str, object] | None", key: str) -> str:
    value = entry.get(key) if entry is not None else None
    return value if isinstance(value, str) else ""
