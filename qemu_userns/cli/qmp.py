"""qemu-userns qmp: one command, a shell, or the events."""

import errno
import json
import os
import signal

from qemu_userns.cli.qmp_link import Link, build_id
from qemu_userns.cli.qmp_words import build_command
from qemu_userns.cli.vms import describe_vms, find_vm, read_vms
from qemu_userns.errors import HostError, ResourceError, UsageError, printable
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_FORM = "qemu-userns qmp [--compact] [--events] [--pass-fd N] (VM | --socket PATH) [COMMAND [KEY=VALUE...]]"
_FLAGS = ("--compact", "--events")
_VALUES = ("--socket", "--pass-fd")


class Asked(Record):
    """What the command line asks for."""

    vm: str  # "" where a socket is named
    socket: str
    compact: bool
    events: bool
    fd: "int | None"
    words: "tuple[str, ...]"  # the command; none for the shell


def qmp(words: "Sequence[str]") -> int:
    """Do what the words after `qmp` ask for; return the exit status."""
    asked = parse_words(words)
    command = build_command(asked.words, build_id(1)) if asked.words else None
    link, title = _open_link(asked)
    try:
        if asked.events:
            return _follow(link)
        if command is None:
            from qemu_userns.cli.qmp_shell import Shell

            return Shell(link, title, asked.compact).run()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads our output may have enough of it
        print(format_reply(link.execute(command, asked.fd), command.plain, asked.compact), end="", flush=True)
    finally:
        link.close()
    return 0


def parse_words(words: "Sequence[str]") -> Asked:
    """Parse our options, which stand before the command.

    Raises:
        UsageError: they are not understood.
    """
    left = list(words)
    given: dict[str, str] = {}
    place: list[str] = []
    while left and (left[0].startswith("-") or not (place or "--socket" in given)):
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            if not place and "--socket" not in given:
                place.append(left.pop(0) if left else "")
            break
        if not word.startswith("-"):
            place.append(word)
        elif name in given or (name in _FLAGS and equals) or name not in _FLAGS + _VALUES:
            raise UsageError(word, "not understood", _FORM)
        elif name in _FLAGS or equals:
            given[name] = value
        elif left:
            given[name] = left.pop(0)
        else:
            raise UsageError(word, "its value is missing", _FORM)
    return _check(given, "".join(place), tuple(left))


def _check(given: "dict[str, str]", vm: str, words: "tuple[str, ...]") -> Asked:
    """Build the request from options that have been understood."""
    if vm and "--socket" in given:
        raise UsageError(vm, "a VM and a socket are named, one of them is enough", _FORM)
    if not vm and not given.get("--socket"):
        raise UsageError("qemu-userns qmp", "no VM is named", describe_vms(read_vms()))
    if words and "--events" in given:
        raise UsageError(words[0], "--events takes no command", _FORM)
    fd = None
    if "--pass-fd" in given:
        if not words:
            raise UsageError("--pass-fd", "it goes with a command", _FORM)
        fd = _check_fd(given["--pass-fd"])
    return Asked(vm, given.get("--socket", ""), "--compact" in given, "--events" in given, fd, words)


def _check_fd(text: str) -> int:
    """Return the number of an fd that is open."""
    try:
        fd = int(text)
        os.fstat(fd)
    except (ValueError, OverflowError) as err:
        raise UsageError(f"--pass-fd {text}", "not a number of a file descriptor") from err
    except OSError as err:
        hint = f"open it where the command is started: {text}<FILE"
        raise ResourceError(f"--pass-fd {text}", err.strerror or str(err), hint) from err
    return fd


def _open_link(asked: Asked) -> "tuple[Link, str]":
    """Connect; return also what a person calls the VM."""
    if asked.socket:
        try:
            return Link(asked.socket, asked.socket), os.path.basename(asked.socket)
        except OSError as err:
            hint = "nobody listens there: has that QEMU ended?" if err.errno == errno.ECONNREFUSED else None
            raise ResourceError(asked.socket, err.strerror or str(err), hint) from err
    vm = find_vm(asked.vm)
    try:
        return Link(vm.socket, f"VM {vm.describe()}"), vm.title
    except (FileNotFoundError, ConnectionRefusedError) as err:
        raise HostError(f"VM {vm.describe()}", "its supervisor is gone", f"qemu-userns adopt {vm.pid}") from err


def _follow(link: Link) -> int:
    """Print each event as a line, until the VM ends."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    while (message := link.read()) is not None:
        if "event" in message:
            print(json.dumps(message), flush=True)
    return 0


def format_reply(reply: "dict[str, object]", plain: bool, compact: bool) -> str:
    """Return a reply as lines to print: ASCII, or where it is `plain` a text without control characters."""
    text = reply.get("return")
    if plain and isinstance(text, str):
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        return "".join("\t".join(map(printable, line.split("\t"))) + "\n" for line in lines) if text else ""
    return json.dumps(reply, indent=None if compact else 2) + "\n"
