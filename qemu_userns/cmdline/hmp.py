"""The command lines of the human monitor, as far as they name things of the host.

A line is split with the grammar of its command, which QEMU keeps as a string like "device:B,force:-f,target:F,arg:s?". Of such
a line only the words are ever replaced, so that the rest of it stays as it was written.

Source: monitor/hmp.c of QEMU, monitor_parse_arguments() and get_str(); hmp-commands.hx, 7.2 to 11.0.
"""

from qemu_userns.cmdline.json import JsonError, parse_json
from qemu_userns.cmdline.objects import Object
from qemu_userns.cmdline.opts import parse_keyval, parse_opts
from qemu_userns.cmdline.source import Member
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Command -> its QMP twin, or the kind of object that it makes, and its grammar with the twin's names for the arguments. A flag's
# name may carry the value that it stands for. Types: F, B, s: a word; S: the rest of the line; O: a word that is a list of
# options; i, l: an expression; -x: a flag; -xs: a flag with a word.
COMMANDS: "dict[str, tuple[str, str]]" = {
    "change": ("blockdev-change-medium", "device:B,force:-f,file:F,format:s?,read-only-mode:s?"),
    "eject": ("eject", "force:-f,device:B"),
    "screendump": ("screendump", "filename:F,format:-fs,device:s?,head:i?"),
    "dump-guest-memory": (
        "dump-guest-memory",
        "paging:-p,detach:-d,windmp:-w,raw:-R,zlib:-z,lzo:-l,snappy:-s,filename:F,begin:l?,length:l?",
    ),
    "memsave": ("memsave", "val:l,size:i,filename:s"),
    "pmemsave": ("pmemsave", "val:l,size:i,filename:s"),
    "dumpdtb": ("dumpdtb", "filename:F"),
    "dump-skeys": ("dump-skeys", "filename:F"),
    "drive_add": ("drive", "kind=blockdev:-n,pci_addr:s,opts:O"),
    "drive_del": ("drive_del", "id:s"),
    "drive_mirror": ("drive-mirror", "mode=existing:-n,full:-f,device:B,target:s,format:s?"),
    "drive_backup": ("drive-backup", "mode=existing:-n,full:-f,compress:-c,device:B,target:s,format:s?"),
    "snapshot_blkdev": ("blockdev-snapshot-sync", "mode=existing:-n,device:B,snapshot-file:s?,format:s?"),
    "netdev_add": ("netdev", "netdev:O"),
    "netdev_del": ("netdev_del", "id:s"),
    "object_add": ("object", "object:S"),
    "object_del": ("object-del", "id:s"),
    "device_add": ("device", "device:O"),
    "chardev-add": ("chardev", "chardev:O"),
    "chardev-change": ("chardev", "id:s,chardev:O"),
    "chardev-remove": ("chardev-remove", "id:s"),
    "migrate": ("migrate", "detach:-d,blk:-b,inc:-i,resume:-r,uri:s"),
    "migrate_incoming": ("migrate-incoming", "uri:s"),
    "migrate_recover": ("migrate-recover", "uri:s"),
    "nbd_server_start": ("nbd-server-start", "all:-a,writable:-w,uri:s"),
    "nbd_server_stop": ("nbd-server-stop", ""),
    "qom-set": ("qom-set", "json:-j,path:s,property:s,value:S"),
    "logfile": ("logfile", "filename:F"),
    "trace-file": ("trace-file", "op:s?,filename:F?"),
    "wavcapture": ("wavcapture", "path:F,audiodev:s,freq:i?,bits:i?,nchannels:i?"),
    "gdbserver": ("gdbserver", "device:s?"),
}
# Key of a first option without one, by kind.
_IMPLIED = {"netdev": "type", "object": "qom-type", "device": "driver", "chardev": "backend"}
# QEMU reads a word into a buffer of that size and drops the rest without a word.
_WORD_MAX_BYTES = 1023
_SPACE = " \t\n\v\f\r"
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_OPERATORS = "+-*/%&|^"


class Word(Record):
    """One argument of a line."""

    key: str
    value: str
    start: int  # its span in the line, quotes included
    end: int
    kind: str  # its type in the grammar

    def print(self, value: str) -> str:
        """Return what is written for another value."""
        if self.kind == "S" or (value and not any(char in _SPACE for char in value) and value[0] != '"'):
            return value
        for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
            value = value.replace(char, escaped)
        return f'"{value}"'


class HmpLine(Record):
    """A line that names a command of the table and follows its grammar."""

    line: str
    name: str
    words: "tuple[Word, ...]"

    def find_object(self) -> Object:
        """Return the object that the line names or makes: the spans of its members are in the words, numbered from 1."""
        kind, implied = COMMANDS[self.name][0], None
        members: "list[Member]" = []
        form, place, end = "hmp", 0, 0
        for number, word in enumerate(self.words, 1):
            if word.kind == "O" or (word.kind == "S" and kind == "object"):
                implied = _IMPLIED.get(kind)
                found, form, end = _read_list(word, number, implied)
                members += found
                place = number
            else:
                flag = word.kind == "-"
                members.append(Member(word.key, word.value, number, 0, 0 if flag else len(word.value), "word", 0, 0))
        kinds = [member.value for member in members if member.key == "kind" and member.form == "word"]
        first_id = next((member.value for member in members if member.key == "id"), None)
        return Object(kinds[0] if kinds else kind, first_id, tuple(members), place, 0, end, form, 0, implied)

    def replace_words(self, values: "dict[int, str]") -> str:
        """Return the line with other values for some words, by their numbers."""
        line = self.line
        for number in sorted(values, reverse=True):
            word = self.words[number - 1]
            line = line[: word.start] + word.print(values[number]) + line[word.end :]
        return line


def _read_list(word: Word, number: int, implied: "str | None") -> "tuple[tuple[Member, ...], str, int]":
    """Read a word that is a list of options, or with object_add a JSON object; say which form it has and where it ends."""
    if word.kind == "S" and word.value.startswith("{"):
        try:
            members, end = parse_json(word.value, number)
        except JsonError:
            return (), "json", 0
        return members, "json", end
    keyval = word.kind == "S"
    members = (parse_keyval if keyval else parse_opts)(word.value, number, 0, implied)
    return members, "keyval" if keyval else "opts", members[-1].end if members else 0


def parse_hmp(line: str) -> "HmpLine | None":
    """Return what a line says, None if it names nothing of the host or QEMU will refuse it."""
    start = _skip_space(line, 0)
    position = start
    while position < len(line) and line[position] != "/" and line[position] not in _SPACE:
        position += 1
    name = line[start:position]
    if name not in COMMANDS or "\0" in line:
        return None
    words: "list[Word]" = []
    for key, kind in _read_grammar(COMMANDS[name][1]):
        position = _skip_space(line, position)
        if kind.endswith("?") and position == len(line):
            continue
        found = _read_argument(line, position, key, kind.rstrip("?"), COMMANDS[name][1])
        if found is None:
            return None
        words += found[0]
        position = found[1]
    return HmpLine(line, name, tuple(words)) if _skip_space(line, position) == len(line) else None


def _read_grammar(grammar: str) -> "Iterator[tuple[str, str]]":
    """Yield name and type of each argument."""
    for item in grammar.split(",") if grammar else ():
        key, _, kind = item.partition(":")
        yield key, kind


def _read_argument(line: str, start: int, key: str, kind: str, grammar: str) -> "tuple[list[Word], int] | None":
    """Read one argument; return the words that it gives, and where it ends."""
    if kind.startswith("-"):
        return _read_flag(line, start, key, kind, grammar)
    if kind in ("i", "l"):
        end = _skip_expression(line, start)
        return None if end is None else ([], end)
    if kind == "S":
        return ([Word(key, line[start:], start, len(line), kind)], len(line)) if start < len(line) else None
    if kind == "O" and start == len(line):
        return [], start
    found = _read_word(line, start)
    return None if found is None else ([Word(key, found[0], start, found[1], kind)], found[1])


def _read_flag(line: str, start: int, key: str, kind: str, grammar: str) -> "tuple[list[Word], int] | None":
    """Read a flag, which need not be there."""
    if line[start : start + 1] != "-":
        return [], start
    letter = line[start + 1 : start + 2]
    if letter != kind[1]:
        return ([], start) if f":-{letter}" in grammar else None
    end = start + 2
    if kind.endswith("s"):
        found = _read_word(line, _skip_space(line, end))
        return None if found is None else ([], found[1])
    name, equals, value = key.partition("=")
    return [Word(name, value if equals else "on", start, end, "-")], end


def _read_word(line: str, start: int) -> "tuple[str, int] | None":
    """Read a word, in double quotes or up to the next white space."""
    value: "list[str]" = []
    end = start
    if line[start : start + 1] == '"':
        end += 1
        while end < len(line) and line[end] != '"':
            char = line[end]
            if char == "\\":
                end += 1
                char = _ESCAPES.get(line[end : end + 1], "")
                if not char:
                    return None
            value.append(char)
            end += 1
        if end == len(line):
            return None
        end += 1
    else:
        while end < len(line) and line[end] not in _SPACE:
            end += 1
        if end == start:
            return None
        value.append(line[start:end])
    word = "".join(value)
    return None if len(word.encode("utf-8", "surrogatepass")) > _WORD_MAX_BYTES else (word, end)


def _skip_space(line: str, start: int) -> int:
    while start < len(line) and line[start] in _SPACE:
        start += 1
    return start


def _skip_expression(line: str, start: int) -> "int | None":
    """Return where an expression ends, white space behind it included: "10 /x" divides, so file names come in quotes there."""
    depth, position = 0, start
    while True:
        position = _skip_space(line, position)
        while line[position : position + 1] in ("+", "-", "~", "("):
            depth += line[position] == "("
            position = _skip_space(line, position + 1)
        end = _skip_operand(line, position)
        if end is None:
            return None
        position = _skip_space(line, end)
        while depth and line[position : position + 1] == ")":
            depth -= 1
            position = _skip_space(line, position + 1)
        if position == len(line) or line[position] not in _OPERATORS:
            return None if depth else position
        position += 1


def _skip_operand(line: str, start: int) -> "int | None":
    """Return where a number, a character or a register ends."""
    char = line[start : start + 1]
    end = start
    if char == "'":
        return start + 3 if line[start + 2 : start + 3] == "'" else None
    if char == "$":
        end += 1
        while end < len(line) and line[end].isascii() and (line[end].isalnum() or line[end] in "_."):
            end += 1
        return end
    digits = "0123456789"
    if line[start : start + 2] in ("0x", "0X"):
        end, digits = start + 2, "0123456789abcdefABCDEF"
    while end < len(line) and line[end] in digits:
        end += 1
    return end if end > start else None
