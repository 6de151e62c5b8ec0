"""The configuration files of -readconfig.

Source: util/qemu-config.c of QEMU, which reads with fgets() and sscanf(): `[group "id"]` and `#` only in column 0, a space
before "=" required, a value ends at the next quote, no escapes, text behind it ignored. Where QEMU's sscanf() silently
takes half a line (an unquoted value is read as empty), this refuses: what is to be rewritten must be understood.
"""

from qemu_userns.cmdline.source import LINE_MAX_BYTES, Member, Source
from qemu_userns.errors import CommandLineError
from qemu_userns.record import Record

NAME_MAX = 63
SPACE = " \t\r\v\f"


class Section(Record):
    """One `[group "id"]`; `end` is the end of its last line, the newline not included."""

    group: str
    id: str | None
    members: tuple[Member, ...]
    start: int
    end: int


def parse_readconfig(file: Source, source: int) -> "tuple[Section, ...]":
    """Return the sections of a configuration file.

    Raises:
        CommandLineError: a line is not understood; `what` is FILE:LINE.
    """
    sections: list[Section] = []
    start = 0
    for number, line in enumerate(file.text.split("\n"), 1):
        where = f"{file.where}:{number}"
        if "\0" in line or len(line.encode("utf-8", "surrogateescape")) > LINE_MAX_BYTES:
            raise CommandLineError(where, f"longer than {LINE_MAX_BYTES} bytes, or a NUL: QEMU would read it as several lines")
        if line.startswith("["):
            sections.append(_read_header(line, start, where))
        elif line and not line.startswith("#"):
            if not sections:
                raise CommandLineError(where, "no group defined", 'begin with a line [group "id"]')
            member = _read_assignment(line, source, start, number, where)
            section = sections[-1]
            sections[-1] = section.replace(members=(*section.members, member), end=start + len(line))
        start += len(line) + 1
    return tuple(sections)


def _read_header(line: str, start: int, where: str) -> Section:
    """Read `[group "id"]` or `[group]`."""
    words = line[1:].split(None, 1)
    group, rest = words[0] if words else "", words[1] if len(words) == 2 else ""
    section_id = None
    if rest.startswith('"') and rest[1:].partition('"')[0]:
        section_id = rest[1:].partition('"')[0]
    else:
        group = line[1:].partition("]")[0]
    if not group or len(group) > NAME_MAX or len(section_id or "") > NAME_MAX:
        raise CommandLineError(where, f'not [group "id"] with names of at most {NAME_MAX} characters')
    return Section(group, section_id, (), start, start + len(line))


def _read_assignment(line: str, source: int, start: int, number: int, where: str) -> Member:
    """Read `key = "value"`."""
    key, _, rest = _split_word(line)
    equals = rest.lstrip(SPACE)
    quoted = equals[1:].lstrip(SPACE)
    value, closing, _ = quoted[1:].partition('"')
    if not key or len(key) > NAME_MAX or not equals.startswith("=") or not quoted.startswith('"') or not closing:
        raise CommandLineError(where, f'not of the form key = "value": {line.strip()}', "spaces around =, the value in quotes")
    begin = start + len(line) - len(quoted) + 1
    return Member(key, value, source, begin, begin + len(value), "ini", number, start)


def _split_word(line: str) -> "tuple[str, str, str]":
    """Return the first word of a line, the blank behind it, and the rest."""
    line = line.lstrip(SPACE)
    end = 0
    while end < len(line) and line[end] not in SPACE:
        end += 1
    return line[:end], line[end : end + 1], line[end + 1 :]
