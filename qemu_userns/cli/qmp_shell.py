"""The interactive shell of `qemu-userns qmp`.

Theory of operation. readline waits for keys in the main thread; a second thread reads the socket. A reply goes to the main
thread by a queue. An event is printed at once: the terminal inserts lines for it above the prompt and puts the cursor back, so
that readline has nothing to draw again. When QEMU ends, a SIGUSR1 ends the waiting; it is repeated, since a signal just before
readline's select(2) is seen only after the next key. Where standard input or output is no terminal, lines are read and replies
written, and that is all.
"""

import json
import os
import queue
import signal
import sys
import threading
import time

from qemu_userns.cli.qmp import format_reply
from qemu_userns.cli.qmp_link import Link, build_id, check_reply
from qemu_userns.cli.qmp_schema import Schema, complete, describe_command
from qemu_userns.cli.qmp_words import build_command, split_line
from qemu_userns.errors import HostError, QemuUsernsError, UsageError, format_error, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.cli.qmp_words import Command

_OWN_WORDS = ("help", "hmp", "exit")
_HELP = """\
COMMAND KEY=VALUE...   run a QMP command; VALUE is JSON or else a text; KEY.KEY=VALUE makes objects; Tab completes
{"execute": ...}       run a QMP command given as JSON, sent as it is
hmp LINE               run a command of the human monitor
help [COMMAND [KEY=VALUE...]]   commands, or arguments; values choose variants
exit, Ctrl-D           leave; the VM runs on
"""
_COLUMNS = 80
_REPEAT_S = 0.1
_SCHEMA_TIMEOUT_S = 5
_HISTORY_LINES = 1000
_SECRETS = ("password", "secret")


class _EndedError(Exception):
    """The connection has ended."""


class Shell:
    """A dialogue with one VM."""

    def __init__(self, link: Link, title: str, compact: bool) -> None:
        """Prepare; the link is borrowed.

        Args:
            link: to the VM.
            title: what the prompt calls it.
            compact: print replies as one line.
        """
        self._link, self._title, self._compact = link, printable(title), compact
        self._on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._main = threading.main_thread()
        self._replies: "queue.SimpleQueue[dict[str, object] | None]" = queue.SimpleQueue()
        self._output = threading.Lock()
        self._prompt = ""
        """What is on the screen before the line that is typed; nothing where none is."""
        self._ended = False
        self._woken = False
        self._failure: "QemuUsernsError | None" = None
        self._number = 1
        self._schema: "Schema | None" = None
        self._choices: "list[str]" = []

    def run(self) -> int:
        """Run until the end of input or of the VM; return the exit status."""
        if not self._on_terminal:
            threading.Thread(target=self._listen, daemon=True).start()
            return self._run_script()
        history = _find_history()
        self._set_up_readline(history)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, self._wake)
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self._run_dialogue()
        except _EndedError:
            self._say(f"\n{self._title} has ended\n" if self._failure is None else "\n" + format_error(self._failure))
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            _write_history(history)
        return 0 if self._failure is None else 1

    # --- the two ways to read commands ---

    def _run_script(self) -> int:
        """Run each line of a script, go on after errors, and return 1 if there were any."""
        status = 0
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for line in sys.stdin:
            try:
                self._run_line(line.strip())
            except EOFError:
                break
            except _EndedError:
                raise self._failure or HostError(self._link.source, "the connection has ended") from None
            except QemuUsernsError as err:
                sys.stderr.write(format_error(err))
                status = 1
        return status

    def _run_dialogue(self) -> None:
        """Prompt for lines and run them."""
        self._say("help lists the commands, Tab completes, exit leaves\n")
        while True:
            try:
                self._run_line(self._ask(f"(qmp {self._title}) ").strip())
            except KeyboardInterrupt:
                self._say("\n")
            except EOFError:
                break
            except QemuUsernsError as err:
                self._say(format_error(err))

    def _ask(self, prompt: str) -> str:
        """Read a line; raises EOFError at the end of input."""
        self._prompt = prompt
        try:
            if self._ended:
                raise _EndedError
            return input(prompt)
        except EOFError:
            self._say("\n")
            raise
        finally:
            self._prompt = ""

    def _run_line(self, line: str) -> None:
        """Do what a line says; raises EOFError where it says to leave."""
        if not line or line.startswith("#"):
            return
        if self._on_terminal and not any(secret in line.lower() for secret in _SECRETS):
            import readline

            readline.add_history(line)
        words = [line] if line.startswith("{") else line.split() if line.startswith("hmp ") else split_line(line)
        if words[0] == "exit":
            raise EOFError
        if words[0] in ("help", "?"):
            self._help(words[1:])
            return
        self._number += 1
        if words[0] == "hmp":
            words = ["hmp", line.partition(" ")[2].strip()] if len(words) > 1 else words
        command = build_command(words, build_id(self._number))
        if command.ends_vm and not self._confirm(command, line):
            return
        self._say(format_reply(self._execute(command), command.plain, self._compact))

    def _confirm(self, command: "Command", line: str) -> bool:
        """Ask before the VM is ended; a script has to say it in JSON, since `quit` may be meant for us."""
        if self._on_terminal:
            return self._ask(f"{command.name} ends the VM {self._title}. Send it? [y/N] ").strip().lower() in ("y", "yes")
        if line.startswith("{"):
            return True
        hint = 'exit leaves; to end the VM: qemu-userns qmp VM quit, or {"execute": "quit"} here'
        raise UsageError(command.name, "it ends the VM, and is not sent without being asked for on a terminal", hint)

    # --- commands and replies ---

    def _execute(self, command: "Command", timeout_s: "float | None" = None) -> "dict[str, object]":
        """Send a command and return its reply; replies to commands that were given up are dropped."""
        try:
            self._link.send(command.text)
        except HostError:
            raise _EndedError from None
        while (reply := self._replies.get(timeout=timeout_s)) is not None:
            if command.is_answered_by(reply):
                return check_reply(command, reply)
        raise _EndedError

    def _listen(self) -> None:
        """Read until the connection ends: the second thread."""
        try:
            while (message := self._link.read()) is not None:
                if "event" in message:
                    self._show(message)
                else:
                    self._replies.put(message)
        except QemuUsernsError as err:
            self._failure = err
        except OSError as err:
            self._failure = HostError(self._link.source, err.strerror or str(err))
        self._ended = True
        self._replies.put(None)
        while self._on_terminal and self._main.is_alive() and not self._woken:
            signal.pthread_kill(self._main.ident or 0, signal.SIGUSR1)
            time.sleep(_REPEAT_S)

    def _wake(self, *_: object) -> None:
        """Leave the waiting for keys."""
        if self._prompt:
            self._woken = True
            raise _EndedError

    def _show(self, event: "dict[str, object]") -> None:
        """Print an event, above the line that is being typed."""
        if not self._on_terminal:
            return
        line = f"{time.strftime('%H:%M:%S')} {printable(str(event['event']))} {json.dumps(event.get('data', {}))}"
        self._say(self._place_above(line) if self._prompt else line + "\n")

    def _place_above(self, text: str) -> str:
        """Return what inserts a text above the line that is typed, for terminals like the VT220 and later.

        Of a line that takes several rows the cursor is taken to be in the last; if it is not, the text stands a row too high.
        """
        import readline

        typed = self._prompt + readline.get_line_buffer()
        if os.environ.get("TERM", "dumb") == "dumb":
            return f"\r{text}\n{typed}"
        width = _find_width()
        rows, above = -(-len(text) // width), len(typed) // width
        go_up = f"\x1b[{above}A" if above else ""
        make_room = "\x1bD" * rows + f"\x1b[{rows}A"  # IND scrolls where there is no row below
        return f"{make_room}\x1b7\r{go_up}\x1b[{rows}L{text}\x1b8\x1b[{rows}B"

    def _say(self, text: str) -> None:
        """Print, from either thread."""
        with self._output:
            sys.stdout.write(text)
            sys.stdout.flush()

    # --- help and completion ---

    def _find_schema(self) -> Schema:
        """Return QEMU's schema, asked for once; raises QemuUsernsError where it cannot be had."""
        if self._schema is None:
            self._number += 1
            try:
                reply = self._execute(build_command(["query-qmp-schema"], build_id(self._number)), _SCHEMA_TIMEOUT_S)
            except queue.Empty:
                raise HostError(self._link.source, f"no schema within {_SCHEMA_TIMEOUT_S} s") from None
            self._schema = Schema(reply.get("return"))
        return self._schema

    def _help(self, words: "list[str]") -> None:
        """Print the arguments of a command, or all commands."""
        schema = self._find_schema()
        if not words:
            self._say(_HELP + "\n" + _lay_out([printable(name) for name in schema.find_commands()]))
            return
        if words[0] not in schema.find_commands():
            raise UsageError(words[0], "no command of this QEMU", "help lists them; for hmp: hmp help")
        given = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
        lines = [words[0], *describe_command(schema, words[0], given)]
        self._say("".join(f"{printable(line)}\n" for line in lines))

    def _set_up_readline(self, history: "str | None") -> None:
        import readline

        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(_HISTORY_LINES)
        if history is not None:
            try:
                readline.read_history_file(history)
            except OSError:
                return  # none yet

    def _complete(self, text: str, index: int) -> "str | None":
        """Return one of the words that `text` can become, None behind the last: called by readline."""
        import readline

        if index == 0:
            try:
                words = split_line(readline.get_line_buffer()[: readline.get_begidx()])
                words = words[1:] if words[:1] == ["help"] else words
                self._choices = [c for c in complete(self._find_schema(), words, text, _OWN_WORDS) if c.isprintable()]
            except (QemuUsernsError, _EndedError):
                self._choices = []
        return self._choices[index] if index < len(self._choices) else None


def _find_width() -> int:
    """Return how many characters a row of the terminal has."""
    try:
        return os.get_terminal_size(1).columns or _COLUMNS
    except OSError:
        return _COLUMNS


def _lay_out(names: "list[str]") -> str:
    """Lay names out in columns."""
    width = max(map(len, names), default=0) + 2
    count = max(1, _find_width() // width)
    rows = [names[begin : begin + count] for begin in range(0, len(names), count)]
    return "".join("".join(name.ljust(width) for name in row).rstrip() + "\n" for row in rows)


def _find_history() -> "str | None":
    """Return where the history is kept, None where it cannot be; not in a directory of another user's (`sudo`)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/state")
    directory = os.path.join(base, "qemu-userns")
    try:
        home = base
        while not os.path.exists(home):
            home = os.path.dirname(home)
        if os.stat(home).st_uid != os.geteuid():
            return None
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError:
        return None
    return os.path.join(directory, "qmp_history")


def _write_history(path: "str | None") -> None:
    """Write the history, for its owner alone."""
    import readline

    if path is None:
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        readline.write_history_file(path)
    except OSError:
        return
