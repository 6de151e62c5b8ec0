"""QEMU's dialect of JSON, flattened to dotted keys with the span of each scalar.

Source: qobject/json-lexer.c and json-parser.c of QEMU. Strings take single or double quotes, control characters must be
escaped, a key may not repeat, and 1024 levels are the limit (hence no recursion here: Python's limit is lower).
"""

from qemu_userns.cmdline.source import JSON_SPACE, Member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_DEPTH = 1024
KEYWORDS = {"true": "on", "false": "off", "null": ""}
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
PUNCTUATION = "{}[]:,"


class JsonError(ValueError):
    """The text is not JSON to QEMU, which reports it itself."""


class _Token:
    """A piece of text: punctuation, "string" or "scalar", and its value and place."""

    __slots__ = ("end", "kind", "start", "value")

    def __init__(self, kind: str, value: str, start: int, end: int) -> None:
        self.kind = kind
        self.value = value
        self.start = start
        self.end = end


class _Container:
    """An object or list that is still open."""

    __slots__ = ("count", "is_list", "item", "keys", "path", "prefix")

    def __init__(self, is_list: bool, prefix: str) -> None:
        self.is_list = is_list
        self.prefix = prefix
        self.count = 0
        self.keys: set[str] = set()
        self.path = prefix
        self.item = -1


def parse_json(text: str, source: int = 0) -> "tuple[tuple[Member, ...], int]":
    """Return the members of the JSON object that `text` is, and where the object ends.

    Raises:
        JsonError: QEMU would refuse the text.
    """
    tokens = _read_tokens(text)
    if next(tokens).kind != "{":
        raise JsonError("not an object")
    members: list[Member] = []
    open_containers = [_Container(False, "")]
    while open_containers:
        token = _next_value(tokens, open_containers)
        container = open_containers[-1] if open_containers else None
        if token.kind in ("}", "]"):
            end = token.end
        elif token.kind in ("{", "["):
            if len(open_containers) >= MAX_DEPTH:
                raise JsonError("nested too deep")
            assert container
            open_containers.append(_Container(token.kind == "[", f"{container.path}."))
        else:
            assert container
            item = token.start if container.item < 0 else container.item
            members.append(Member(container.path, token.value, source, token.start, token.end, "json", 0, item))
    if next(tokens).kind != "end":
        raise JsonError("text after the object")
    return tuple(members), end


def _next_value(tokens: "Iterator[_Token]", open_containers: "list[_Container]") -> _Token:
    """Return the innermost container's next scalar or opening bracket, with its path set, or close the container."""
    container = open_containers[-1]
    token = next(tokens)
    if token.kind == ("]" if container.is_list else "}"):
        open_containers.pop()
        return token
    if container.count:
        _expect(token, ",")
        token = next(tokens)
    container.count += 1
    if container.is_list:
        container.path = f"{container.prefix}{container.count - 1}"
    else:
        _expect(token, "string")
        if token.value in container.keys:
            raise JsonError("duplicate key")
        container.keys.add(token.value)
        container.path = container.prefix + token.value
        container.item = token.start
        _expect(next(tokens), ":")
        token = next(tokens)
    if token.kind not in ("string", "scalar", "{", "["):
        raise JsonError("expecting a value")
    return token


def _expect(token: _Token, kind: str) -> None:
    if token.kind != kind:
        raise JsonError(f"expecting {kind}")


def _read_tokens(text: str) -> "Iterator[_Token]":
    """Yield the tokens of `text`, then without end a token "end"."""
    position = 0
    while True:
        while text[position : position + 1] in JSON_SPACE and position < len(text):
            position += 1
        char = text[position : position + 1]
        if not char:
            yield _Token("end", "", position, position)
        elif char in PUNCTUATION:
            yield _Token(char, char, position, position + 1)
            position += 1
        else:
            token = _read_string(text, position) if char in "\"'" else _read_scalar(text, position)
            yield token
            position = token.end


def _read_scalar(text: str, start: int) -> _Token:
    """Read a number or keyword."""
    end = start
    while end < len(text) and text[end] not in PUNCTUATION + JSON_SPACE:
        end += 1
    word = text[start:end]
    if word in KEYWORDS:
        return _Token("scalar", KEYWORDS[word], start, end)
    if not _is_number(word):
        raise JsonError("invalid word")
    return _Token("scalar", word, start, end)


def _is_number(word: str) -> bool:
    mantissa, has_exponent, exponent = word.lower().partition("e")
    whole, has_point, fraction = mantissa.removeprefix("-").partition(".")
    if has_exponent and not _is_digits(exponent[1:] if exponent[:1] in ("+", "-") else exponent):
        return False
    return _is_digits(whole) and (whole == "0" or whole[0] != "0") and (not has_point or _is_digits(fraction))


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _read_string(text: str, start: int) -> _Token:
    """Read a quoted string."""
    quote = text[start]
    value: list[str] = []
    position = start + 1
    while True:
        char = text[position : position + 1]
        if char < " " or "\ud800" <= char <= "\udfff":
            raise JsonError("end, control character or invalid UTF-8 in a string")
        position += 1
        if char == quote:
            return _Token("string", "".join(value), start, position)
        if char == "\\":
            char, position = _read_escape(text, position)
        value.append(char)


def find_characters(text: str, start: int) -> "list[int]":
    """Return where each character of the string that starts at `start` is spelled, and where its closing quote stands."""
    places: "list[int]" = []
    position = start + 1
    while text[position] != text[start]:
        places.append(position)
        position = _read_escape(text, position + 1)[1] if text[position] == "\\" else position + 1
    return [*places, position]


def _read_escape(text: str, position: int) -> "tuple[str, int]":
    """Read what stands behind a backslash."""
    char = text[position : position + 1]
    if char in ESCAPES:
        return ESCAPES[char], position + 1
    code, position = _read_code(text, position)
    if 0xD800 <= code < 0xDC00 and text.startswith("\\u", position):
        low, position = _read_code(text, position + 1)
        if not 0xDC00 <= low < 0xE000:
            raise JsonError("invalid surrogate pair")
        code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF)
    if not code or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        raise JsonError("invalid character")
    return chr(code), position


def _read_code(text: str, position: int) -> "tuple[int, int]":
    """Read the uXXXX of an escape."""
    digits = text[position + 1 : position + 5]
    if text[position : position + 1] != "u" or len(digits) < 4 or not all(c in "0123456789abcdefABCDEF" for c in digits):
        raise JsonError("invalid escape")
    return int(digits, 16), position + 5
