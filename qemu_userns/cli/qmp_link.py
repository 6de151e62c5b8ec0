"""A QMP connection of the command line's: one client, one command at a time."""

import codecs
import json
import os
import socket

from qemu_userns.errors import HostError, QemuUsernsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.cli.qmp_words import Command

GREETING_TIMEOUT_S = 10
_READ_BYTES = 1 << 20
_MESSAGE_MAX_CHARACTERS = 64 << 20
_ENDED = "the connection has ended"


class CommandError(QemuUsernsError):
    """QEMU answered a command with an error."""


class Messages:
    """The messages in a stream of bytes: one in a line or in many, several in a read or a part of one."""

    def __init__(self, source: str) -> None:
        """Begin with nothing received; `source` is named in errors."""
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._json = json.JSONDecoder()
        self._text = ""

    def feed(self, data: bytes) -> "list[dict[str, object]]":
        """Take the next bytes and return the messages that end in them.

        Raises:
            HostError: this is no QMP.
        """
        text = (self._text + self._decoder.decode(data)).lstrip()
        messages: list[dict[str, object]] = []
        ends = data.rstrip().endswith(b"}") or b"}\n" in data or b"}\r" in data
        while text and ends:
            try:
                message, end = self._json.raw_decode(text)
            except json.JSONDecodeError:
                break
            except RecursionError as err:
                raise HostError(self._source, "a message is nested too deeply") from err
            if not isinstance(message, dict):
                break
            messages.append(message)
            text = text[end:].lstrip()
        if (text and not text.startswith("{")) or len(text) > _MESSAGE_MAX_CHARACTERS:
            raise HostError(self._source, "what comes from there is not QMP", "is it a human monitor, or another program?")
        self._text = text
        return messages


class Link:
    """A connection that has been greeted and has negotiated its capabilities."""

    def __init__(self, path: str, source: str) -> None:
        """Connect to a unix socket.

        Args:
            path: of any length.
            source: what to call it in errors.

        Raises:
            OSError: nobody listens there.
            HostError: who listens does not speak QMP.
        """
        self.source = source
        self._messages = Messages(source)
        self._waiting: list[dict[str, object]] = []
        self._socket = _connect(path)
        try:
            self._negotiate()
        except TimeoutError as err:
            self.close()
            hint = "a monitor of plain QEMU serves one client at a time; a stopped QEMU serves none"
            raise HostError(source, f"no greeting within {GREETING_TIMEOUT_S} s", hint) from err
        except BaseException:
            self.close()
            raise

    def _negotiate(self) -> None:
        """Read the greeting, and enable what it offers."""
        self._socket.settimeout(GREETING_TIMEOUT_S)
        greeting = self.read()
        if greeting is None:
            raise HostError(self.source, f"{_ENDED} before a greeting")
        about = greeting.get("QMP")
        if not isinstance(about, dict):
            raise HostError(self.source, "what comes from there is not QMP")
        offered = about.get("capabilities")
        enable = {"enable": ["oob"]} if isinstance(offered, list) and "oob" in offered else {}
        self.send(json.dumps({"execute": "qmp_capabilities", "arguments": enable}).encode() + b"\n")
        while (reply := self.read()) is not None and "event" in reply:
            pass
        if reply is None or "return" not in reply:
            raise HostError(self.source, "the capabilities negotiation has failed")
        self._socket.settimeout(None)

    def send(self, text: bytes, fd: "int | None" = None) -> None:
        """Send a command, and with its first byte an fd, which is borrowed.

        Raises:
            HostError: the connection has ended.
        """
        try:
            sent = 0 if fd is None else socket.send_fds(self._socket, [text], [fd], socket.MSG_NOSIGNAL)
            self._socket.sendall(text[sent:], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as err:
            raise HostError(self.source, _ENDED) from err

    def read(self) -> "dict[str, object] | None":
        """Return the next message; None at the end."""
        while not self._waiting:
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._waiting = self._messages.feed(data)
        return self._waiting.pop(0)

    def execute(self, command: "Command", fd: "int | None" = None) -> "dict[str, object]":
        """Send a command and return its reply, as `check_reply` does; events in between are dropped."""
        self.send(command.text, fd)
        while (message := self.read()) is not None:
            if command.is_answered_by(message):
                return check_reply(command, message)
        raise HostError(self.source, f"{_ENDED} before the reply to {command.name}")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def check_reply(command: "Command", reply: "dict[str, object]") -> "dict[str, object]":
    """Return a reply without what is our own in it.

    Raises:
        CommandError: it says that the command failed.
    """
    if "error" not in reply:
        return {key: value for key, value in reply.items() if key != "id" or not _is_ours(value)}
    error = reply["error"]
    detail: dict[str, object] = error if isinstance(error, dict) else {}
    text = str(detail.get("desc", "no reason is given"))
    hint = """a string of digits is typed with quotes of its own: '"7"'""" if "parameter type" in text else None
    raise CommandError(command.name, f"{text} ({detail.get('class', 'no class')})", hint)


def build_id(number: int) -> str:
    """Return the id of a command of ours."""
    return f"qemu-userns-{number}"


def _is_ours(value: object) -> bool:
    return isinstance(value, str) and value.startswith("qemu-userns-")


def _connect(path: str) -> socket.socket:
    """Connect by an fd of the socket's inode, since an address has no more than 107 bytes; raises OSError."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"/proc/self/fd/{place}")
    except OSError:
        connection.close()
        raise
    finally:
        os.close(place)
    return connection
