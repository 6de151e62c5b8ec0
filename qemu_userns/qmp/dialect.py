"""Values of QEMU's JSON dialect: read as QEMU reads them, printed as QEMU prints them.

Source: qobject/json-parser.c, json-writer.c and qdict.c of QEMU, and `tests/qmp` asks QEMU itself. Neither direction recurses:
QEMU takes 1024 levels, more than Python.
"""

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Most of these are texts, since compiling them takes a millisecond of the time to QEMU's greeting, and few messages need them;
# `re` keeps what it has compiled.
_TOKEN = (
    r"[ \t\r\n]*(?:([{}\[\]:,])"
    r'|("(?:[^"\\]++|\\.)*+"|' + r"'(?:[^'\\]++|\\.)*+')"
    r"|(-?(?:0(?![eE])|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)"
    r"|([a-z]++)|(\Z))"
)
_KEYWORDS = {"true": True, "false": False, "null": None}
# What no string may hold: control characters, and what is no character in Unicode (surrogates are bytes that are no UTF-8).
_NO_CHARACTERS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_INVALID = "[\x00-\x1f\ud800-\udfff\ufdd0-\ufdef" + _NO_CHARACTERS + "]"
_ESCAPE = r"(?s)\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))"
_SIMPLE = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_ENCODED_NUL = "\udcc0\udc80"  # NUL in modified UTF-8, decoded with surrogateescape
_PLAIN = re.compile(r"[ !#-\[\]-~]*")
_PRINTED = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
INT_MIN, UINT_MAX = -(1 << 63), (1 << 64) - 1


class DialectError(ValueError):
    """The text is not JSON to QEMU, which says so itself."""


def parse_value(text: str) -> object:
    """Return the value that `text` is.

    Raises:
        DialectError: QEMU would refuse the text (its limits on depth and size are the stream's matter).
    """
    tokens = _read_tokens(text)
    root: list[object] = []
    stack: list[list[object] | dict[str, object]] = [root]
    key = ""
    kind, value = next(tokens)
    while True:
        top = stack[-1]
        if kind not in ("value", "{", "["):
            raise DialectError("expecting value")
        item: object = {} if kind == "{" else [] if kind == "[" else value
        if isinstance(top, dict):
            top[key] = item
        else:
            top.append(item)
        kind, value = next(tokens)
        if isinstance(item, dict | list):
            stack.append(item)
            if kind != ("}" if isinstance(item, dict) else "]"):
                key, kind, value = _begin_item(item, kind, value, tokens)
                continue
        while len(stack) > 1 and kind == ("}" if isinstance(stack[-1], dict) else "]"):
            stack.pop()
            kind, value = next(tokens)
        if len(stack) == 1:
            break
        if kind != ",":
            raise DialectError("expected separator")
        key, kind, value = _begin_item(stack[-1], *next(tokens), tokens)
    if kind != "end":
        raise DialectError("text after the value")
    return root[0]


def _begin_item(
    container: "list[object] | dict[str, object]", kind: str, value: object, tokens: "Iterator[tuple[str, object]]"
) -> "tuple[str, str, object]":
    """Read the key where the container has keys; return it and the first token of the value."""
    if isinstance(container, list):
        return "", kind, value
    if not isinstance(value, str):
        raise DialectError("key is not a string")
    if value in container:
        raise DialectError("duplicate key")
    if next(tokens)[0] != ":":
        raise DialectError("missing : in object pair")
    return value, *next(tokens)


def _read_tokens(text: str) -> "Iterator[tuple[str, object]]":
    """Yield kind and value of each token: punctuation, "value", and without end "end"."""
    position = 0
    find_token = re.compile(_TOKEN).match
    while True:
        match = find_token(text, position)
        if match is None:
            raise DialectError("stray character")
        position = match.end()
        punctuation, string, number, keyword, _ = match.groups()
        if punctuation:
            yield punctuation, None
        elif string:
            yield "value", _decode_string(string[1:-1])
        elif number:
            yield "value", _decode_number(number)
        elif keyword:
            if keyword not in _KEYWORDS:
                raise DialectError("invalid keyword")
            yield "value", _KEYWORDS[keyword]
        else:
            yield "end", None


def _decode_number(text: str) -> "int | float":
    if text.lstrip("-").isdigit() and len(text) <= len(str(UINT_MAX)):
        value = int(text)
        if INT_MIN <= value <= UINT_MAX:
            return value
    return float(text)


def _decode_string(text: str) -> str:
    bare = text.replace(_ENCODED_NUL, "") if _ENCODED_NUL in text else text
    if re.search(_INVALID, bare):
        raise DialectError("invalid character in string")
    text = text.replace(_ENCODED_NUL, "\0") if bare is not text else text
    return re.sub(_ESCAPE, _decode_escape, text) if "\\" in text else text


def _decode_escape(match: "re.Match[str]") -> str:
    high, low, code, simple = match.groups()
    if simple:
        if simple not in _SIMPLE:
            raise DialectError("invalid escape sequence in string")
        return _SIMPLE[simple]
    point = int(code, 16) if code else 0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)
    if point and re.match(_INVALID, chr(point)) and point >= 0x20:
        raise DialectError("not a valid Unicode character")
    return chr(point)


def format_value(value: object, pretty: bool = False, level: int = 0, sort: bool = True) -> str:
    """Return the text that QEMU prints for a value, indented for a container at `level` where it is `pretty`.

    Without `sort` objects keep their order: that of what QEMU has printed is not the one of the same object read again.
    """
    out: list[str] = []
    stack: list[Iterator[tuple[str, object]]] = [iter([("", value)])]
    closers: list[str] = []
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            if closers:
                out.append(("\r\n" + "    " * (level + len(closers) - 1) if pretty else "") + closers.pop())
            continue
        prefix, inner = item
        out.append(prefix)
        if isinstance(inner, dict | list):
            is_dict = isinstance(inner, dict)
            out.append("{" if is_dict else "[")
            closers.append("}" if is_dict else "]")
            stack.append(_iterate(inner, pretty, level + len(closers), sort))
        else:
            out.append(_format_scalar(inner))
    return "".join(out)


def _iterate(value: "dict[str, object] | list[object]", pretty: bool, level: int, sort: bool) -> "Iterator[tuple[str, object]]":
    """Yield what stands before each item of a container, and the item."""
    gap = "\r\n" + "    " * level if pretty else ""
    separator = "," if pretty else ", "
    before = gap
    if isinstance(value, dict):
        for key in order_keys(list(value)) if sort else value:
            yield f"{before}{format_string(key)}: ", value[key]
            before = separator + gap
    else:
        for item in value:
            yield before, item
            before = separator + gap


def _format_scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return format_string(value)
    if isinstance(value, int) and INT_MIN <= value <= UINT_MAX:
        return str(value)
    if isinstance(value, int | float):
        return _format_double(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _format_double(value: "int | float") -> str:
    """Print as C's %.17g."""
    try:
        return f"{float(value):.17g}"
    except OverflowError:
        return "inf" if value > 0 else "-inf"


def format_string(text: str) -> str:
    """Return the text that QEMU prints for a string: ASCII only."""
    return f'"{text}"' if _PLAIN.fullmatch(text) else '"' + "".join(map(_format_character, text)) + '"'


def _format_character(character: str) -> str:
    code = ord(character)
    if character in _PRINTED:
        return _PRINTED[character]
    if 0x20 <= code < 0x7F:
        return character
    if code < 0x10000:
        return f"\\u{code:04X}"
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"


def order_keys(keys: "list[str]") -> "list[str]":
    """Return the keys of an object, given as they were inserted, in the order of QEMU's QDict.

    That is a table of 512 buckets by TDB's string hash; within a bucket the newest key is the first.
    """
    newest_first = keys[::-1]
    return sorted(newest_first, key=_find_bucket) if len(keys) > 1 else keys


def _find_bucket(key: str) -> int:
    name = key.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")
    value = 0x238F13AF * len(name)
    for index, byte in enumerate(name):
        value += byte << (index * 5 % 24)
    return (1103515243 * value + 12345 & 0xFFFFFFFF) % 512
