"""Spans of source text, and edits that splice new text into them.

Nothing of a command line is ever printed again from parsed values: a `Member` remembers which characters of its source
spell its value, and a rewrite replaces those. What is not edited is byte for byte what the caller wrote.
"""

from qemu_userns.errors import CommandLineError
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qemu_userns.cmdline.objects import Object, Option

    _Tree = dict[str, "str | _Tree"]

# QEMU reads a configuration file with fgets() into 1024 bytes, the newline and the final NUL included.
LINE_MAX_BYTES = 1022
JSON_SPACE = " \t\r\n"


class Source(Record):
    """A text that members point into: one word of argv, or one -readconfig file."""

    text: str
    where: str
    """For messages: "argument 7", or the name of the file."""
    argument: int
    """Index in argv of the word, or of the -readconfig value that names the file."""


class Member(Record):
    """One `key=value` of an object, whatever its spelling."""

    key: str
    """Dotted path as in QEMU ("file.filename"); "value" where the whole word is the value (`-kernel X`)."""
    value: str
    """Decoded; JSON true and false are "on" and "off", null is "", a bare flag `foo` is "on", `nofoo` is foo "off"."""
    source: int
    start: int
    """Of the encoded value: what a new value replaces. A flag's is the whole word, a JSON string's has the quotes."""
    end: int
    form: str
    """How the value is encoded: "word" and "set" verbatim, "opts", "implied" (opts without its key), "flag", "json", "ini"."""
    line: int = 0
    """Line of a configuration file, from 1; else 0."""
    item: int = 0
    """Where the item begins that `remove` takes out: the key, or the line."""


class Edit(Record):
    """`text` instead of the characters from `start` to `end` of a source."""

    source: int
    start: int
    end: int
    text: str
    why: str
    form: str = ""
    """ "opts" or "json": an item of a comma list, which comes or goes with a comma; "option": the whole option goes."""
    key: str = ""
    """Dotted key of an item that is added to JSON; items of the same parent are then written as one object."""


def replace(member: Member, value: "str | int", why: str) -> Edit:
    """Return the edit that gives a member another value, in the spelling that it has.

    Args:
        member: what to change.
        value: str as such; bool as on/off, in JSON true/false; int as decimal digits, in JSON a number.
        why: for `explain`.

    Raises:
        CommandLineError: the value cannot be written in this spelling.
    """
    return Edit(member.source, member.start, member.end, _encode(member, value), why)


def append(obj: "Object", key: str, value: "str | int", why: str) -> Edit:
    """Return the edit that adds a member to an object, in the object's own spelling.

    In JSON a dotted key becomes nested objects, in the existing one where that holds a scalar to put it behind.

    Raises:
        CommandLineError: the value cannot be written in this spelling.
        ValueError: the object is a plain word and has no room for members.
    """
    if obj.form in ("opts", "keyval"):
        return Edit(obj.source, obj.end, obj.end, f"{key}={_double_commas(_text(value))}", why, "opts")
    if obj.form == "ini":
        line = f"  {key} = {_ini_value(key, _text(value), len(key) + 6)}"
        return Edit(obj.source, obj.end, obj.end, f"\n{line}", why)
    if obj.form != "json":
        raise ValueError(f"-{obj.kind} takes no {key}: it is a plain word")
    container, position = _json_container(obj, key)
    return Edit(obj.source, position, position, _json_scalar(value), why, "json", key[len(container) :])


def remove(obj: "Object", member: Member, why: str) -> Edit:
    """Return the edit that takes one member out of an object and leaves the rest well formed.

    A line of a configuration file becomes a comment, a `-set` disappears with both its words.

    Raises:
        ValueError: the member is a whole word; drop its option instead.
    """
    if member.form == "set":
        return Edit(member.source, 0, member.end, "", why, "option")
    if member.form == "ini":
        return Edit(member.source, member.item, member.end + 1, "#", why)
    if member.form == "json":
        return Edit(member.source, member.item, member.end, "", why, "json")
    if member.form == "word":
        raise ValueError(f"{member.key} of -{obj.kind} is a whole word")
    after = [other for other in obj.members if other.source == member.source and other.start > member.end]
    if obj.implied and member.item == obj.start and after and after[0].form == "flag":
        # In front, the flag would be taken for the implied value.
        flag = after[0]
        return Edit(member.source, member.item, flag.end, f"{flag.key}={flag.value}", why)
    return Edit(member.source, member.item, member.end, "", why, "opts")


def drop(option: "Option", why: str) -> Edit:
    """Return the edit that leaves an option and its value out of the command line."""
    return Edit(option.index if option.value_index is None else option.value_index, 0, 0, "", why, "option")


def apply_edits(text: str, edits: "Iterable[Edit]") -> str:
    """Return `text` with the edits of one source spliced in.

    Raises:
        ValueError: two edits overlap.
    """
    out, position, skip_comma = "", 0, False
    for edit in _join_json_items(sorted(edits, key=_order)):
        if edit.start < position:
            raise ValueError(f"overlapping edits: {edit.why}")
        kept, skip_comma = _keep(text[position : edit.start], skip_comma)
        out += kept
        if edit.form and not edit.text:
            # An item goes with the comma before it, or else, being the first, with the one behind.
            before = out.rstrip(JSON_SPACE) if edit.form == "json" else out
            skip_comma = not before.endswith(",")
            out = out if skip_comma else before[:-1]
        elif edit.form:
            first = out.rstrip(JSON_SPACE).endswith(("{", "[")) if edit.form == "json" else not out
            out += edit.text if first else f",{edit.text}"
            skip_comma = False
        else:
            out += edit.text
        position = edit.end
    return out + _keep(text[position:], skip_comma)[0]


def _order(edit: Edit) -> "tuple[int, int, bool]":
    """Sort by place; what is added comes behind what is replaced, an empty value has the same place."""
    return edit.start, edit.end, bool(edit.form)


def _join_json_items(edits: "list[Edit]") -> "Iterator[Edit]":
    """Yield the edits with those that add to JSON at one place made one: QEMU refuses a key that comes twice."""
    trees: dict[int, _Tree] = {}
    for edit in edits:
        if edit.key:
            *outer, last = edit.key.split(".")
            node: str | _Tree = trees.setdefault(edit.start, {})
            for name in outer:
                node = node.setdefault(name, {}) if isinstance(node, dict) else node
            if not isinstance(node, dict) or isinstance(node.get(last), dict):
                raise ValueError(f"{edit.key} is added both as a value and as an object")
            node[last] = edit.text
    for edit in edits:
        if not edit.key:
            yield edit
        elif edit.start in trees:
            yield edit.replace(text=_json_items(trees.pop(edit.start)))


def _json_items(tree: "_Tree") -> str:
    """Return `"key":value,...` for what is to be added."""
    return ",".join(
        f"{_json_string(name)}:{node if isinstance(node, str) else f'{{{_json_items(node)}}}'}" for name, node in tree.items()
    )


def _keep(text: str, skip_comma: bool) -> "tuple[str, bool]":
    """Return text between two edits, without the comma that is to be skipped, and whether it still is to be."""
    rest = text.lstrip(JSON_SPACE)
    if skip_comma and rest.startswith(","):
        return rest[1:], False
    return text, skip_comma and not rest


def _encode(member: Member, value: "str | int") -> str:
    """Return the text for a member's span."""
    if member.form == "json":
        return _json_scalar(value)
    text = _text(value)
    if member.form == "ini":
        return _ini_value(member.key, text, member.start - member.item)[1:-1]
    if member.form in ("word", "set"):
        return text
    # An implied value with "=" would be a key, with "," the rest of it in some grammars; "help" prints help.
    if member.form == "flag" or (member.form == "implied" and (text in ("", "help", "?") or "=" in text or "," in text)):
        return f"{member.key}={_double_commas(text)}"
    return _double_commas(text)


def _text(value: "str | int") -> str:
    """Return a value as QemuOpts spell it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _double_commas(text: str) -> str:
    return text.replace(",", ",,")


def _ini_value(key: str, text: str, indent: int) -> str:
    """Return a value in the quotes of a configuration file, if it fits; there are no escapes."""
    if '"' in text or "\n" in text or "\0" in text:
        raise CommandLineError(
            f'{key} = "{text}"',
            "a -readconfig file cannot hold a quote or a line break in a value",
            "name the file without, or give the option on the command line",
        )
    if indent + len(text.encode("utf-8", "surrogateescape")) + 2 > LINE_MAX_BYTES:
        raise CommandLineError(f"{key} = ...", "the value is too long for a line of a -readconfig file")
    return f'"{text}"'


def _json_scalar(value: "str | int") -> str:
    """Return a value as JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _json_string(value) if isinstance(value, str) else str(value)


def _json_string(text: str) -> str:
    """Return a JSON string; QEMU reads it as UTF-8 and takes no NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CommandLineError(text, "JSON cannot hold a name that is not UTF-8", "use the key=value spelling") from None
    if "\0" in text:
        raise CommandLineError(text, "JSON cannot hold a NUL for QEMU")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    # Written out only where needed: control characters are the exception in names.
    if not escaped.isprintable():
        escaped = "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped)
    return f'"{escaped}"'


def _json_container(obj: "Object", key: str) -> "tuple[str, int]":
    """Return how much of a dotted key names an object that is there already, and where in it a member can be added."""
    prefix = key
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        for member in reversed(obj.members):
            parent, _, name = member.key.rpartition(".")
            if member.form == "json" and parent == prefix and not name.isdecimal():
                return f"{prefix}.", member.end
    return "", obj.end - 1
