"""QMP commands as people type them: `COMMAND KEY=VALUE...`, `hmp LINE`, or JSON."""

import json

from qemu_userns.errors import UsageError
from qemu_userns.qmp.dialect import DialectError, parse_value
from qemu_userns.qmp.stream import CommandStream
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HMP = "human-monitor-command"
_HMP_LINE = "command-line"
_CLOSER = {"{": "}", "[": "]"}


class Command(Record):
    """A command, ready to be sent."""

    name: str
    text: bytes
    number: object
    """Its id; None for JSON of the caller's without one."""
    plain: bool = False
    """The reply is a text for people."""
    ends_vm: bool = False

    def is_answered_by(self, message: "dict[str, object]") -> bool:
        """Say whether a message is the reply; an error without an id is QEMU's word on a text that it cannot read."""
        if "return" not in message and "error" not in message:
            return False
        return message.get("id") == self.number or ("id" not in message and "error" in message)


def build_command(words: "Sequence[str]", number: object) -> Command:
    """Build a command from words, as a shell or `split_line` separates them.

    Raises:
        UsageError: they are not understood.
    """
    first, rest = words[0], words[1:]
    if first.startswith("{"):
        if rest:
            raise UsageError(rest[0], "JSON stands alone", "quote a command in JSON as one word")
        return _take_json(first)
    if first == "hmp":
        if not rest:
            raise UsageError("hmp", "no command of the human monitor is named", "hmp info status")
        return _build(HMP, {_HMP_LINE: " ".join(rest)}, number, plain=True)
    return _build(first, parse_arguments(rest), number)


def _build(name: str, arguments: "dict[str, object]", number: object, plain: bool = False) -> Command:
    message: dict[str, object] = {"execute": name, "id": number}
    if arguments:
        message["arguments"] = arguments
    try:
        text = json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise UsageError(name, "an argument is not UTF-8, which JSON has to be") from err
    return Command(name, text + b"\n", number, plain, _ends_vm(name, arguments))


def _take_json(text: str) -> Command:
    """Take a command in JSON, which is sent as it is, once it is sure that QEMU will answer it."""
    sent = text.encode(errors="surrogateescape") + b"\n"
    if [item.kind for item in CommandStream().feed(sent)] != ["message"]:
        raise UsageError(text, "not one JSON object", "a brace or a quote is missing, or there is one too many")
    try:
        value = parse_value(text)
    except DialectError:
        value = None
    message = value if isinstance(value, dict) else {}
    name = message.get("execute", message.get("exec-oob"))
    name = name if isinstance(name, str) else "JSON"
    arguments = message.get("arguments")
    return Command(name, sent, message.get("id"), False, _ends_vm(name, arguments if isinstance(arguments, dict) else {}))


def _ends_vm(name: str, arguments: "dict[str, object]") -> bool:
    line = str(arguments.get(_HMP_LINE, "")).split()
    return name == "quit" or (name == HMP and line[:1] in (["q"], ["quit"]))


def parse_arguments(words: "Sequence[str]") -> "dict[str, object]":
    """Parse `KEY=VALUE` words.

    A value that is JSON is that value, else it is a string; `KEY:=VALUE` must be JSON. A dotted key makes an object.

    Raises:
        UsageError: a word is none of that, or two contradict each other.
    """
    arguments: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.rstrip(":"):
            raise UsageError(word, "not KEY=VALUE", "arguments are KEY=VALUE, VALUE a text or JSON; objects are KEY.KEY=VALUE")
        value = _read_value(text)
        if key.endswith(":") and value is text and not text.startswith('"'):
            raise UsageError(word, "the value is not JSON")
        *parents, last = key.rstrip(":").split(".")
        place = arguments
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UsageError(word, f"{parent} has a value already")
            place = inner
        if last in place:
            raise UsageError(word, f"{key} has a value already")
        place[last] = value
    return arguments


def _read_value(text: str) -> object:
    """Return what a text means; the same text where it is no JSON."""
    try:
        value = parse_value(text)
        json.dumps(value, allow_nan=False)
    except ValueError:
        return text
    return value


def split_line(line: str) -> "list[str]":
    """Split a line at white space, but not within quotes, braces or brackets that a word or a value begins with.

    Quotes stay: `id="0"` is a string, since that is what JSON says.

    Raises:
        UsageError: one of them is not closed.
    """
    words: list[str] = []
    begin, position = 0, 0
    while position < len(line):
        character = line[position]
        if character.isspace():
            words.append(line[begin:position])
            begin = position + 1
        elif character in "\"'{[" and (position == begin or line[position - 1] == "="):
            position = _find_end(line, position)
        position += 1
    return [word for word in [*words, line[begin:]] if word]


def _find_end(line: str, begin: int) -> int:
    """Return the index of what closes the quote, brace or bracket at `begin`."""
    closers: list[str] = []
    position = begin
    while position < len(line):
        character = line[position]
        if closers and closers[-1] in "\"'":
            if character == "\\":
                position += 1
            elif character == closers[-1]:
                closers.pop()
        elif character in "\"'":
            closers.append(character)
        elif character in _CLOSER:
            closers.append(_CLOSER[character])
        elif character == closers[-1]:
            closers.pop()
        if not closers:
            return position
        position += 1
    raise UsageError(line[begin:], "not closed", "a quote, brace or bracket is missing")
