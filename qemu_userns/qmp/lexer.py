"""QEMU's JSON lexer as a table: where tokens and lexical errors end.

Source: qobject/json-lexer.c of QEMU, "extensions over RFC 8259": strings in single or double quotes, any lower-case word is a
token, `0` takes no exponent, and after an error everything up to a control character other than tab, a structural character,
0xFE or 0xFF is skipped. A state is left by one table look-up; the run of bytes that stays in it is one regular expression.
"""

import re
from functools import cache

# States; those up to LAST_STATE have a row in NEXT and a pattern in RUN.
START, RECOVERY, DOUBLE, DOUBLE_ESCAPE, SINGLE, SINGLE_ESCAPE, KEYWORD, MINUS, ZERO, DIGITS = range(10)
POINT, FRACTION, EXPONENT, EXPONENT_SIGN, EXPONENT_DIGITS = range(10, 15)
LAST_STATE = EXPONENT_DIGITS
# What else a look-up gives: a structural character, the end of a string, a token that ended before this byte, back to START
# with this byte, and an error.
OPEN_BRACE, CLOSE_BRACE, OPEN_BRACKET, CLOSE_BRACKET, SEPARATOR, STRING_END, TOKEN_END, RESET, ERROR = range(16, 25)

_ORDINARY = bytes(range(0x20, 0xFE))  # 0xFE and 0xFF are never part of a string
_DIGIT = b"0123456789"
_LETTER = b"abcdefghijklmnopqrstuvwxyz"
_ROWS: "dict[int, tuple[int, dict[bytes, int]]]" = {
    START: (
        ERROR,
        {
            b" \t\r\n": START,
            b'"': DOUBLE,
            b"'": SINGLE,
            b"0": ZERO,
            b"123456789": DIGITS,
            b"-": MINUS,
            _LETTER: KEYWORD,
            b"{": OPEN_BRACE,
            b"}": CLOSE_BRACE,
            b"[": OPEN_BRACKET,
            b"]": CLOSE_BRACKET,
            b",:": SEPARATOR,
        },
    ),
    RECOVERY: (RESET, {_ORDINARY + b"\t": RECOVERY, b"{}[]:,": RESET}),
    DOUBLE: (ERROR, {_ORDINARY: DOUBLE, b"\\": DOUBLE_ESCAPE, b'"': STRING_END}),
    DOUBLE_ESCAPE: (ERROR, {_ORDINARY: DOUBLE}),
    SINGLE: (ERROR, {_ORDINARY: SINGLE, b"\\": SINGLE_ESCAPE, b"'": STRING_END}),
    SINGLE_ESCAPE: (ERROR, {_ORDINARY: SINGLE}),
    KEYWORD: (TOKEN_END, {_LETTER: KEYWORD}),
    MINUS: (ERROR, {b"0": ZERO, b"123456789": DIGITS}),
    ZERO: (TOKEN_END, {_DIGIT: ERROR, b".": POINT}),
    DIGITS: (TOKEN_END, {_DIGIT: DIGITS, b".": POINT, b"eE": EXPONENT}),
    POINT: (ERROR, {_DIGIT: FRACTION}),
    FRACTION: (TOKEN_END, {_DIGIT: FRACTION, b"eE": EXPONENT}),
    EXPONENT: (ERROR, {b"+-": EXPONENT_SIGN, _DIGIT: EXPONENT_DIGITS}),
    EXPONENT_SIGN: (ERROR, {_DIGIT: EXPONENT_DIGITS}),
    EXPONENT_DIGITS: (TOKEN_END, {_DIGIT: EXPONENT_DIGITS}),
}


def _build_row(default: int, entries: "dict[bytes, int]") -> bytes:
    row = bytearray([default]) * 256
    for characters, code in entries.items():
        for byte in characters:
            row[byte] = code
    return bytes(row)


NEXT = tuple(_build_row(*_ROWS[state]) for state in range(LAST_STATE + 1))
"""NEXT[state][byte]: the next state, or what else."""


class _Runs(dict[int, "re.Pattern[bytes]"]):
    """Patterns by state, each compiled when it is needed: most commands need none."""

    def __missing__(self, state: int) -> "re.Pattern[bytes]":
        stay = bytes(byte for byte in range(256) if NEXT[state][byte] == state)
        self[state] = found = re.compile(b"[" + re.escape(stay) + b"]*" if stay else b"")
        return found


RUN = _Runs()
"""RUN[state] matches the bytes that stay in the state."""

_STRING = rb'"[^"\\\x00-\x1f\xfe\xff]*"' + rb"|'[^'\\\x00-\x1f\xfe\xff]*'"
_NUMBER = rb"(?:-?(?:0|[1-9][0-9]*)|true|false|null)(?=[ \t\r\n,:}\]])"
TOKENS = re.compile(rb"(?:[ \t\r\n,:]+|" + _STRING + rb"|" + _NUMBER + rb"){0,200}")
"""At START, whole tokens of the usual kinds that open and close nothing: a short cut, what it leaves goes by the table."""

_RUN = rb"(?>" + TOKENS.pattern + rb")"
_INNER = rb"(?:\{" + _RUN + rb"\}|\[" + _RUN + rb"\])"
_MIDDLE = rb"(?:\{" + _RUN + rb"(?:" + _INNER + _RUN + rb"){0,20}\}|\[" + _RUN + rb"(?:" + _INNER + _RUN + rb"){0,20}\])"
_MESSAGE = rb"[ \t\r\n]*(\{" + _RUN + rb"(?:" + _MIDDLE + _RUN + rb"){0,20}\})[ \t\r\n]*"


@cache
def compile_message() -> "re.Pattern[bytes]":
    """Return what matches exactly one object that is not nested deep, which is what clients mostly send: a short cut, as TOKENS.

    Compiling it takes a millisecond, which is not the greeting's.
    """
    return re.compile(_MESSAGE)
