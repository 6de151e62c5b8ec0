"""The objects of a command line, in one form for all four spellings.

`-netdev tap,id=n0`, `-netdev {"type":"tap","id":"n0"}`, a section `[netdev "n0"]` of a -readconfig file and `-set netdev.n0.br=b`
give the same members. What QEMU itself will refuse (an unknown option, bad syntax inside one) yields no objects and is
printed unchanged, so that the user reads QEMU's own message.
"""

from qemu_userns.cmdline.opts import parse_keyval, parse_opts
from qemu_userns.cmdline.source import Member, Source, apply_edits
from qemu_userns.cmdline.table import GROUPS, KEYVAL, KEYVAL_JSON, NONE, OPTS, OPTS_JSON, WORD, Entry
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qemu_userns.cmdline.source import Edit
    from qemu_userns.cmdline.table import OptionTable

# Kinds that -set does not reach: QEMU keeps them elsewhere than in QemuOpts.
NOT_SETTABLE = ("object", "audiodev", "machine", "smp", "boot")
# Grammars that take JSON instead, recognised by the first character.
JSON_GRAMMARS = (OPTS_JSON, KEYVAL_JSON, "netdev", "display", "incoming")
SET_NAME_MAX = 63


def as_switch(value: "str | None") -> "str | None":
    """Return "on" or "off" for the words that QEMU takes for a boolean (qapi_bool_parse), any other value as it is."""
    if value in ("on", "yes", "true", "y"):
        return "on"
    return "off" if value in ("off", "no", "false", "n") else value


class Object(Record):
    """One thing that an option or a section makes."""

    kind: str
    """Name of the option without dashes (-M is "machine", -m "memory"), "disk" for a word without option."""
    id: str | None
    members: tuple[Member, ...]
    source: int
    start: int
    end: int
    """Where `append` adds to it; a trailing comma is behind."""
    form: str
    """How it is spelled: "word", "opts", "keyval", "json" or "ini"."""
    option: int
    """Index in `CommandLine.options`: the option itself, or the -readconfig."""
    implied: str | None = None
    """Key of a first value without one."""

    def find(self, key: str) -> "Member | None":
        """Return the last member with this key, which is the one that counts."""
        for member in reversed(self.members):
            if member.key == key:
                return member
        return None

    def find_all(self, key: str) -> "tuple[Member, ...]":
        """Return all members with this key; some lists of QEMU keep them all (`hostfwd`)."""
        return tuple(member for member in self.members if member.key == key)

    def get(self, key: str, default: "str | None" = None) -> "str | None":
        """Return the value that counts for this key."""
        member = self.find(key)
        return default if member is None else member.value

    def is_on(self, key: str) -> bool:
        """Say whether a boolean member is set and true."""
        return as_switch(self.get(key)) == "on"


class Option(Record):
    """One option of argv, or one word that is none."""

    name: str
    """Canonical; "" for a word that names a disk; as spelled where unknown."""
    spelled: str
    index: int
    value_index: int | None
    known: bool


class CommandLine(Record):
    """QEMU's argv, without argv[0], understood."""

    argv: tuple[str, ...]
    options: tuple[Option, ...]
    sources: tuple[Source, ...]
    """One for each word of argv, then one for each -readconfig file."""
    objects: tuple[Object, ...]

    def print_words(self, edits: "Iterable[Edit]") -> "tuple[list[str], dict[int, str]]":
        """Return argv with the edits applied, and the text of each -readconfig file by index of its source.

        Raises:
            ValueError: two edits overlap.
        """
        by_source: dict[int, list[Edit]] = {}
        dropped: set[int] = set()
        for edit in edits:
            if edit.form == "option":
                dropped.add(edit.source)
            else:
                by_source.setdefault(edit.source, []).append(edit)
        words = {option.index for option in self.options if option.index in dropped or option.value_index in dropped} | dropped
        texts = [apply_edits(source.text, by_source.get(index, ())) for index, source in enumerate(self.sources)]
        count = len(self.argv)
        return [text for index, text in enumerate(texts[:count]) if index not in words], dict(enumerate(texts[count:], count))


def find_readconfigs(argv: "Sequence[str]", table: "OptionTable") -> "tuple[tuple[int, str], ...]":
    """Return index and file name of each -readconfig, for a caller who may read files."""
    return tuple(
        (option.value_index, argv[option.value_index])
        for option in _read_options(argv, table)
        if option.name == "readconfig" and option.value_index is not None
    )


def parse(argv: "Sequence[str]", table: "OptionTable", configs: "Mapping[int, str]") -> CommandLine:
    """Return the objects of a command line.

    Args:
        argv: the words behind argv[0].
        table: the options that the binary knows.
        configs: text of each -readconfig file, read without newline translation, by index in argv of its name.

    Raises:
        CommandLineError: a -readconfig file is malformed.
    """
    options = _read_options(argv, table)
    sources = [Source(word, f"argument {index + 1}", index) for index, word in enumerate(argv)]
    objects: list[Object] = []
    for number, option in enumerate(options):
        place = option.index if option.value_index is None else option.value_index
        if option.name == "":
            objects.append(_read_word("disk", argv[place], place, number))
        elif option.value_index is None:
            continue
        elif option.name == "set":
            _read_set(argv[place], place, objects)
        elif option.known:
            entry = table.find(option.spelled.removeprefix("-").removeprefix("-"))
            assert entry
            objects += _read_value(entry, argv[place], place, number)
            if option.name == "readconfig" and place in configs:
                sources.append(Source(configs[place], argv[place], place))
                objects += _read_sections(sources[-1], len(sources) - 1, number)
    return CommandLine(tuple(argv), options, tuple(sources), tuple(objects))


def _read_options(argv: "Sequence[str]", table: "OptionTable") -> "tuple[Option, ...]":
    """Split argv as QEMU does: one or two dashes, no abbreviations, the next word is the value whatever it is."""
    options: list[Option] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        if not word.startswith("-"):
            options.append(Option("", word, index, None, True))
        else:
            entry = table.find(word.removeprefix("-").removeprefix("-"))
            has_value = entry is not None and entry.grammar != NONE
            known = entry is not None and not (has_value and index + 1 == len(argv))
            options.append(Option(entry.kind if entry else word, word, index, index + 1 if known and has_value else None, known))
            index += known and has_value
        index += 1
    return tuple(options)


def _read_value(entry: Entry, text: str, source: int, option: int) -> "tuple[Object, ...]":
    """Return the object that an option with a value makes; none if QEMU will refuse the value."""
    kind, grammar, start = entry.kind, entry.grammar, 0
    if grammar in JSON_GRAMMARS and text.startswith("{"):
        return _read_json(kind, text, source, option)
    if grammar == "display" and text.startswith("vnc="):
        kind, grammar, start = "vnc", OPTS, len("vnc=")
        entry = Entry(kind, grammar, "vnc")
    if grammar == "incoming":
        grammar = WORD if _is_migration_uri(text) else KEYVAL
    if grammar == WORD:
        return (_read_word(kind, text, source, option),)
    if grammar == "global":
        return (_read_global(text, source, option),)
    members = parse_opts(text, source, start, entry.implied)
    form = "keyval" if grammar in (KEYVAL, KEYVAL_JSON, "display") else "opts"
    if grammar == "netdev" and _last_value(members, "type") in ("stream", "dgram"):
        form = "keyval"
    if form == "keyval":
        members = parse_keyval(text, source, start, entry.implied)
    end = members[-1].end if members else start
    return (Object(kind, _first_id(members), members, source, start, end, form, option, entry.implied),)


def _read_word(kind: str, text: str, source: int, option: int) -> Object:
    member = Member("value", text, source, 0, len(text), "word", 0, 0)
    return Object(kind, None, (member,), source, 0, len(text), "word", option, None)


def _read_json(kind: str, text: str, source: int, option: int) -> "tuple[Object, ...]":
    # Imported here, and readconfig below, for start-up time: most command lines have one of the two at most.
    from qemu_userns.cmdline.json import JsonError, parse_json

    try:
        members, end = parse_json(text, source)
    except JsonError:
        return ()
    return (Object(kind, _first_id(members), members, source, 0, end, "json", option, None),)


def _read_sections(file: Source, source: int, option: int) -> "list[Object]":
    from qemu_userns.cmdline.readconfig import parse_readconfig

    return [
        Object(GROUPS.get(s.group, s.group), s.id, s.members, source, s.start, s.end, "ini", option)
        for s in parse_readconfig(file, source)
    ]


def _read_global(text: str, source: int, option: int) -> Object:
    """Read `driver.property=value`, the value verbatim, or the same as a comma list."""
    name, equals, value = text.partition("=")
    driver, dot, prop = name.partition(".")
    if not (equals and 0 < len(driver) <= SET_NAME_MAX and dot and 0 < len(prop) <= SET_NAME_MAX):
        members = parse_opts(text, source)
        return Object("global", None, members, source, 0, members[-1].end if members else 0, "opts", option, None)
    behind = len(name) + 1
    members = (
        Member("driver", driver, source, 0, len(driver), "word", 0, 0),
        Member("property", prop, source, len(driver) + 1, len(name), "word", 0, 0),
        Member("value", value, source, behind, len(text), "word", 0, behind),
    )
    return Object("global", None, members, source, 0, len(text), "word", option, None)


def _read_set(text: str, source: int, objects: "list[Object]") -> None:
    """Add the member of `-set group.id.key=value` to the object that it reaches, if any."""
    group, _, rest = text.partition(".")
    wanted, _, assignment = rest.partition(".")
    key, equals, value = assignment.partition("=")
    if not equals or not all(0 < len(name) <= SET_NAME_MAX for name in (group, wanted, key)):
        return
    for index, found in enumerate(objects):
        if found.form in ("opts", "ini") and wanted == _settable_id(found, group):
            begin = len(text) - len(value)
            member = Member(key, value, source, begin, len(text), "set", 0, 0)
            objects[index] = found.replace(members=(*found.members, member))
            return


def _settable_id(found: Object, group: str) -> "str | None":
    """Return the id by which -set finds an object in a group, None if it cannot."""
    if found.kind == "virtfs":
        # -virtfs makes a [fsdev] at once, which is what its device uses.
        return (found.id or found.get("mount_tag")) if group == "fsdev" and found.form == "opts" else None
    return found.id if found.kind == GROUPS.get(group, group) and found.kind not in NOT_SETTABLE else None


def _first_id(members: "Iterable[Member]") -> "str | None":
    """Return the id; of several, QEMU takes the first."""
    return next((member.value for member in members if member.key == "id"), None)


def _last_value(members: "Sequence[Member]", key: str) -> "str | None":
    return next((member.value for member in reversed(members) if member.key == key), None)


def _is_migration_uri(text: str) -> bool:
    """Tell `tcp:...`, `defer` from a list of members, as `-incoming` of QEMU 10.0 does; older ones know no list."""
    scheme, colon, _ = text.partition(":")
    return text == "defer" or "=" not in text or (bool(colon) and all(c.isalnum() or c in "+-." for c in scheme))
