"""Streams of bytes cut into messages: what clients send, as QEMU's JSON streamer cuts it, and what QEMU sends.

Source: qobject/json-streamer.c of QEMU. A message ends where the braces and the brackets are balanced (each for itself), or
one of them is closed too often; a scalar is a message; so is a comma. All of that is QEMU's to answer: what counts here is that
each item causes exactly one reply.
"""

from qemu_userns.qmp import lexer
from qemu_userns.record import Record

MAX_NESTING = 1024
MESSAGE_MAX_BYTES = 8 << 20
REPLY_MAX_BYTES = 64 << 20
# QEMU takes 2 Mi tokens in a message. There is at most one other token for each structural one (and one more).
MAX_STRUCTURAL = (1 << 20) - 1
_SHORT = 4096
TOO_LARGE = "JSON token size limit exceeded"
TOO_MANY = "JSON token count limit exceeded"


class Item(Record):
    """What QEMU answers with one reply (nobody has looked yet whether it is a command)."""

    kind: str
    """"message": balanced; "garbage": QEMU's lexer or streamer stops at its last byte with an error; "excess": too much."""
    text: bytes
    """The bytes, without white space around; of "excess" QEMU's words for it."""


class CommandStream:
    """What one client sends. The memory it holds is bounded by MESSAGE_MAX_BYTES and the size of one `feed`."""

    def __init__(self) -> None:
        """Begin with nothing received."""
        self._buffer = bytearray()
        """The bytes of the unfinished item."""
        self._position = 0
        """How far into the buffer the lexer has come."""
        self._state = lexer.START
        self._braces = 0
        self._brackets = 0
        self._discarding = False
        """The unfinished item was too large and has been answered: its bytes are not kept."""

    def feed(self, data: bytes) -> "list[Item]":
        """Take the next bytes and return the items that end in them."""
        if not self._buffer and not self._discarding and len(data) < _SHORT and self._state <= lexer.RECOVERY:
            whole = lexer.compile_message().fullmatch(data)
            if whole:
                self._state = lexer.START
                return [Item("message", whole[1])]
        items: list[Item] = []
        buffer: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            buffer = self._buffer
        begin = self._cut(buffer, items)
        if buffer is self._buffer:
            del self._buffer[:begin]
        else:
            self._buffer += data[begin:]
        self._position -= begin
        if len(self._buffer) > MESSAGE_MAX_BYTES or self._discarding:
            if not self._discarding:
                items.append(Item("excess", TOO_LARGE.encode()))
            self._discarding = True
            self._buffer.clear()
            self._position = 0
        return items

    def _cut(self, buffer: "bytes | bytearray", items: "list[Item]") -> int:
        """Go on from `_position`, append the items that end in the buffer, and return where the unfinished one begins."""
        state, position, begin, end = self._state, self._position, 0, len(buffer)
        while True:
            inside = self._braces or self._brackets
            run = lexer.TOKENS if state == lexer.START and inside else lexer.RUN[state]
            match = run.match(buffer, position)
            assert match  # of nothing, too
            position = match.end()
            if state == lexer.START and not inside:
                begin = position
            if position == end:
                break
            code = lexer.NEXT[state][buffer[position]]
            if code == lexer.RESET:
                state = lexer.START
                continue
            if code != lexer.TOKEN_END:
                position += 1
            if code <= lexer.LAST_STATE:
                state = code
                continue
            kind = self._count(code)
            state = lexer.RECOVERY if code == lexer.ERROR else lexer.START
            if kind:
                self._emit(kind, buffer, begin, position, items)
                begin = position
        self._state, self._position = state, position
        return position if state == lexer.RECOVERY else begin

    def _count(self, code: int) -> "str | None":
        """Count a token or error, and return the kind of item that it ends."""
        if code == lexer.ERROR:
            return "garbage"
        if code == lexer.OPEN_BRACE:
            self._braces += 1
        elif code == lexer.CLOSE_BRACE:
            self._braces -= 1
        elif code == lexer.OPEN_BRACKET:
            self._brackets += 1
        elif code == lexer.CLOSE_BRACKET:
            self._brackets -= 1
        if self._braces + self._brackets > MAX_NESTING:
            return "garbage"
        return None if self._braces >= 0 and self._brackets >= 0 and (self._braces or self._brackets) else "message"

    def _emit(self, kind: str, buffer: "bytes | bytearray", begin: int, end: int, items: "list[Item]") -> None:
        """Append the item that ends, unless it was answered when it became too large."""
        self._braces = self._brackets = 0
        if self._discarding:
            self._discarding = False
            return
        text = bytes(buffer[begin:end])
        if len(text) > MAX_STRUCTURAL and sum(text.count(byte) for byte in b"{}[],:") > MAX_STRUCTURAL:
            kind, text = "excess", TOO_MANY.encode()
        elif len(text) > MESSAGE_MAX_BYTES:
            kind, text = "excess", TOO_LARGE.encode()
        items.append(Item(kind, text))


class ReplyStream:
    """What QEMU sends: a message is a line, or where the monitor is `pretty` the lines up to one that is "}"."""

    def __init__(self, pretty: bool) -> None:
        """Begin with nothing received."""
        self._end = b"\n}\r\n" if pretty else b"\n"
        self._buffer = bytearray()
        self.overflowed = False
        """QEMU has sent more than REPLY_MAX_BYTES that are no message; nothing more comes out."""

    def feed(self, data: bytes) -> "list[bytes]":
        """Take the next bytes and return the messages that end in them, each with its line end."""
        mark, buffer = self._end, self._buffer
        if self.overflowed:
            return []
        if not buffer and data.endswith(mark) and data.count(mark) == 1:
            return [data]
        messages: list[bytes] = []
        begin, seen = 0, max(0, len(buffer) - len(mark))
        buffer += data
        while (end := buffer.find(mark, seen)) >= 0:
            seen = end + len(mark)
            messages.append(bytes(buffer[begin:seen]))
            begin = seen
        del buffer[:begin]
        if len(buffer) > REPLY_MAX_BYTES:
            self.overflowed = True
            buffer.clear()
        return messages
