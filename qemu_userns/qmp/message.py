"""One QMP message: a client's command, QEMU's reply, and the errors that we give in QEMU's words and format.

Source: qapi/qmp-dispatch.c and docs/interop/qmp-spec.rst of QEMU.
"""

import json
import re
from functools import lru_cache

from qemu_userns.qmp.dialect import DialectError, format_value, parse_value
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SHORT_BYTES, _MOST_KEPT = 128, 64
NOT_FOUND = "CommandNotFound"
GENERIC = "GenericError"
NEGOTIATE_FIRST = "Expecting capabilities negotiation with 'qmp_capabilities'"
NEGOTIATED = "Capabilities negotiation is already complete, command ignored"
OOB_UNEXPECTED = "QMP input member 'exec-oob' is unexpected"
_MEMBERS = frozenset(("execute", "exec-oob", "arguments", "id"))
# What json.loads takes otherwise than QEMU, or QEMU alone: those texts are read by QEMU's own rules.
_UNUSUAL = re.compile(rb"[\x80-\xff\x7f]|\\u|0[eE]")
_FIRST_MEMBER = re.compile(rb'\{\s*"(return|error|id|timestamp|event|data|QMP)"')
_PIECE = re.compile(r'"(?:[^"\\]++|\\.)*+"|\{\}|\[\]|[{}\[\]]|, ')
_PLAIN_ID = re.compile(r"[ !#-\[\]-~]*")


class Command(Record):
    """A well-formed command: QEMU would look for it in its table."""

    name: str
    oob: bool
    """It says exec-oob, not execute."""
    id: "str | None"
    """As the JSON text that QEMU echoes (on one line), None where there is none."""
    arguments: "dict[str, object]"
    text: str
    """As the client sent it; bytes that are no UTF-8 are surrogates (there is one: NUL in modified UTF-8)."""

    def encode(self) -> bytes:
        """Return the bytes that the client sent."""
        return self.text.encode("utf-8", "surrogateescape")


class Reply(Record):
    """A message from QEMU."""

    kind: str
    """"return", "error", "event", "QMP" (the greeting), or "" for anything else."""
    line: bytes
    """Byte for byte, with the line end."""

    @property
    def value(self) -> "dict[str, object]":
        """The message read; empty if it cannot be."""
        return read_object(self.line)


def _refuse_duplicates(pairs: "list[tuple[str, object]]") -> "dict[str, object]":
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("duplicate key")
    return read


def _refuse_constant(text: str) -> "NoReturn":
    raise ValueError(text)


_decode = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant).decode
_encode = json.JSONEncoder().encode


def read_text(raw: bytes) -> "tuple[object, str]":
    """Return the value and the text of a client's message.

    Raises:
        DialectError: QEMU would not take it.
    """
    text = raw.decode("utf-8", "surrogateescape")
    if not _UNUSUAL.search(raw):
        try:
            return _decode(text), text
        except (ValueError, RecursionError):
            pass
    return parse_value(text), text


def parse_command(raw: bytes) -> "Command | None":
    """Return the command that a message is, None where QEMU answers it before it looks for a command.

    What a client asks again and again is read once. No arguments are kept, which may be secrets.
    """
    known = len(raw) <= _SHORT_BYTES and b"arguments" not in raw and b"\\" not in raw
    return _parse_again(raw) if known else _parse(raw)


def _parse(raw: bytes) -> "Command | None":
    try:
        value, text = read_text(raw)
    except DialectError:
        return None
    if not isinstance(value, dict) or not value.keys() <= _MEMBERS or ("execute" in value) is ("exec-oob" in value):
        return None
    oob = "exec-oob" in value
    name = value["exec-oob" if oob else "execute"]
    arguments = value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Command(name, oob, _format_id(value["id"]) if "id" in value else None, arguments, text)


_parse_again = lru_cache(_MOST_KEPT)(_parse)


def _format_id(value: object) -> str:
    if isinstance(value, str) and _PLAIN_ID.fullmatch(value):
        return f'"{value}"'
    return str(value) if type(value) is int and abs(value) < 1 << 63 else format_value(value)


def find_fault(raw: bytes, allow_oob: bool) -> "tuple[str, str | None]":
    """Return what QEMU says to a message that is no command, and the id of it.

    Where a message has two faults QEMU reports the first in its table; this says what it says to each of them.
    """
    try:
        value, _ = read_text(raw)
    except DialectError as err:
        return f"JSON parse error, {err}", None
    if not isinstance(value, dict):
        return "QMP input must be a JSON object", None
    echo = _format_id(value["id"]) if "id" in value else None
    if "exec-oob" in value and not allow_oob:
        return OOB_UNEXPECTED, echo
    for member in value:
        if member not in _MEMBERS:
            return f"QMP input member '{member}' is unexpected", echo
    for member in ("execute", "exec-oob"):
        if not isinstance(value.get(member, ""), str):
            return f"QMP input member '{member}' must be a string", echo
    if not isinstance(value.get("arguments", {}), dict):
        return "QMP input member 'arguments' must be an object", echo
    both = "execute" in value and "exec-oob" in value
    return "QMP input member 'exec-oob' clashes with 'execute'" if both else "QMP input lacks member 'execute'", echo


def mentions_oob(raw: bytes) -> bool:
    """Tell whether a message that is no command has a member exec-oob, which QEMU knows only where that is negotiated."""
    if b"exec-oob" not in raw and b"\\" not in raw:
        return False
    try:
        value, _ = read_text(raw)
    except DialectError:
        return False
    return isinstance(value, dict) and "exec-oob" in value


def build_command(name: str, arguments: "dict[str, object]", echo: "str | None" = None, oob: bool = False) -> bytes:
    """Return the bytes of a command; `echo` is its id as JSON text."""
    text = f'{{"{"exec-oob" if oob else "execute"}": {_encode(name)}'
    if arguments:
        text += f', "arguments": {format_value(arguments)}'
    return (text + (f', "id": {echo}}}' if echo is not None else "}")).encode()


def build_error(error_class: str, desc: str, echo: "str | None", pretty: bool) -> bytes:
    """Return an error as QEMU prints it."""
    error = {"class": error_class, "desc": desc}
    if not pretty:
        first = f'"id": {echo}, ' if echo is not None else ""
        return f'{{{first}"error": {format_value(error)}}}\r\n'.encode()
    first = f'    "id": {_indent(echo)},\r\n' if echo is not None else ""
    return f'{{\r\n{first}    "error": {format_value(error, True, 1)}\r\n}}\r\n'.encode()


def build_return(value: object, echo: "str | None", pretty: bool) -> bytes:
    """Return a success as QEMU prints it, with a value that QEMU has printed."""
    if not pretty:
        last = f', "id": {echo}' if echo is not None else ""
        return f'{{"return": {format_value(value, sort=False)}{last}}}\r\n'.encode()
    last = f',\r\n    "id": {_indent(echo)}' if echo is not None else ""
    return f'{{\r\n    "return": {format_value(value, True, 1, sort=False)}{last}\r\n}}\r\n'.encode()


def _indent(echo: str) -> str:
    """Return an id on one line as QEMU prints it on several, as a member of an object."""
    level = 1

    def indent(match: "re.Match[str]") -> str:
        nonlocal level
        token = match[0]
        level += (token in ("{", "[")) - (token in ("}", "]"))
        gap = "\r\n" + "    " * level
        if token in ("{}", "[]"):
            return token[0] + gap + token[1]
        if token in ("}", "]"):
            return gap + token
        return token.rstrip() + gap if token in ("{", "[", ", ") else token

    return _PIECE.sub(indent, echo)


def read_reply(line: bytes) -> Reply:
    """Tell what QEMU's message is, from its first member: QEMU's objects have an order (`order_keys`)."""
    if line.startswith(b'{"return"'):  # most are
        return Reply("return", line)
    match = _FIRST_MEMBER.match(line)
    first = match[1].decode() if match else ""
    if first == "id":  # a return comes before the id
        first = "error"
    elif first in ("timestamp", "data"):
        first = "event"
    return Reply(first, line)


def read_object(line: bytes) -> "dict[str, object]":
    """Return the JSON object that a line of QEMU's is, {} if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        try:
            value = parse_value(line.decode("utf-8", "surrogateescape"))
        except DialectError:
            return {}
    return value if isinstance(value, dict) else {}


def get_dict(value: "dict[str, object]", key: str) -> "dict[str, object]":
    """Return a member that is an object, {} if it is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def not_found(name: str) -> str:
    """Return QEMU's text for an fd or fdset that is not there."""
    return f"File descriptor named '{name}' not found"
