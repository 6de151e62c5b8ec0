"""Hot-plug for tests: a QEMU with listening monitors, plain or by the drop-in, its clients, and what it holds of the host."""

from __future__ import annotations

import array
import contextlib
import json
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from integration.shares import Launch, dropin_words
from integration.talk import DEADLINE_S, PLAIN, connected, fds_of, started, supervisor_of, wait_until
from tests.machine import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Dialogue = Callable[["Vm"], list[Any]]
    Compare = Callable[..., None]

ROOT = os.geteuid() == 0
BARE = ["-nodefaults", "-display", "none", "-M", "none"]
SIZE_BYTES = 1 << 20
SETTLE_S = 5 * PATIENCE
PROBE_LIMIT_S = 20 * PATIENCE

# What differs from run to run: when, and QEMU's own numbers for block nodes, fds and ports.
_VARYING = [
    (re.compile(r"#block\d+"), "#block"),
    (re.compile(r'((?:micro)?seconds\\?"): \d+'), r"\1: 0"),
    (re.compile(r'(fd\\?": |file descriptor )\d+'), r"\g<1>0"),
    (re.compile(r"/dev/pts/\d+"), "/dev/pts/N"),
]


class Client:
    """A client of a QMP monitor, who sends fds too; events are kept until somebody asks for them."""

    def __init__(self, connection: socket.socket, negotiate: bool = True) -> None:
        """Borrow a connection to a monitor."""
        self.socket = connection
        self.socket.settimeout(DEADLINE_S)
        self.events: list[dict[str, Any]] = []
        self._received = b""
        self.greeting = self.read()
        if negotiate:
            self.execute("qmp_capabilities")

    def send(self, data: bytes, *fds: int) -> None:
        """Send bytes, and fds with the first of them."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.socket.sendmsg([data], rights) == len(data)

    def post(self, command: str, *fds: int, **arguments: object) -> None:
        """Send a command and read nothing; `_` stands for `-` in the arguments' names."""
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": dashed}).encode(), *fds)

    def ask(self, command: str, *fds: int, **arguments: object) -> dict[str, Any]:
        """Execute a command, return its whole reply."""
        self.post(command, *fds, **arguments)
        return self.reply()

    def execute(self, command: str, *fds: int, **arguments: object) -> Any:
        """Execute a command that must succeed."""
        reply = self.ask(command, *fds, **arguments)
        assert "return" in reply, f"{command} {arguments}: {reply}"
        return reply["return"]

    def refused(self, command: str, *fds: int, **arguments: object) -> str:
        """Execute a command that must fail; return why it does."""
        reply = self.ask(command, *fds, **arguments)
        assert "error" in reply, f"{command} {arguments}: {reply}"
        return str(reply["error"]["desc"])

    def hmp(self, line: str) -> str:
        return str(self.execute("human-monitor-command", command_line=line))

    def reply(self) -> dict[str, Any]:
        """Return the next message that is no event."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def wait_event(self, name: str, **data: object) -> dict[str, Any]:
        """Return the first event of that name and with that data, come or to come; forget it and those before it."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    del self.events[: index + 1]
                    return event
            message = self.read()
            assert "event" in message, message
            self.events.append(message)

    def wait_job(self, job: str) -> dict[str, Any]:
        """Wait until a job has concluded, dismiss it, and return what it says of itself."""
        end = time.monotonic() + DEADLINE_S
        while (found := next(item for item in self.execute("query-jobs") if item["id"] == job))["status"] != "concluded":
            assert time.monotonic() < end, found
            time.sleep(0.01)
        self.execute("job-dismiss", id=job)
        return {key: found[key] for key in ("status", "type", "error") if key in found}

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\n" not in self._received:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("QEMU has closed its monitor")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


@dataclass(frozen=True)
class Held:
    """What a VM holds of the host while it runs: it must be the same after something was plugged in and out."""

    mounts: list[str]
    root: list[str]
    qemu: Counter[str]
    supervisor: Counter[str]

    def compare(self, later: Held, kept: str) -> list[str]:
        """Return a line for each thing that came or went, but for paths of a name."""
        lines = []
        for kind in ("mounts", "root", "qemu", "supervisor"):
            ours, theirs = Counter(getattr(self, kind)), Counter(getattr(later, kind))
            lines += [f"{kind} gone: {line}" for line in (ours - theirs)] + [f"{kind} new: {line}" for line in (theirs - ours)]
        return [line for line in lines if not kept or kept not in line]


@dataclass
class Vm:
    """A QEMU with two monitors."""

    process: subprocess.Popen[bytes]
    folder: Path
    """Its own, which it can write; also where it stands."""
    confined: bool
    monitors: list[Path]
    stack: contextlib.ExitStack
    clients: dict[int, Client] = field(default_factory=dict)

    @property
    def qmp(self) -> Client:
        """The client of the first monitor."""
        return self.client(0)

    @property
    def other(self) -> Client:
        """A second client: of the same monitor where that serves several."""
        return self.client(1)

    def client(self, number: int) -> Client:
        if number not in self.clients:
            path = self.monitors[0 if self.confined else number]
            found = Client(self.stack.enter_context(connected(path)), negotiate=False)
            assert found.ask("qmp_capabilities") == {"return": {}}
            self.clients[number] = found
        return self.clients[number]

    @property
    def proc(self) -> Path:
        return Path(f"/proc/{self.process.pid}")

    @property
    def uid(self) -> int:
        """Who QEMU is outside."""
        return self.proc.stat().st_uid

    @property
    def supervisor(self) -> int:
        """The supervisor's pid."""
        return supervisor_of(self.process.pid)

    def settle(self) -> None:
        """Wait until the supervisor has done what the commands so far make it do."""
        self.qmp.execute("query-status")
        workers = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children")
        wait_until(lambda: not workers.read_text(), "the end of the supervisor's workers")

    def own(self, path: Path) -> Path:
        """Give a file to QEMU's id."""
        if ROOT:
            entry = self.proc.stat()
            os.chown(path, entry.st_uid, entry.st_gid)
        return path

    def image(self, name: str, form: str = "raw", *options: str, own: bool = True) -> Path:
        """Make an image of one MiB, QEMU's own or the caller's, which everybody may read."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = () if "-b" in options else (str(SIZE_BYTES),)
        subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, path, *size], check=True, cwd=path.parent)
        path.chmod(0o644)
        return self.own(path) if own else path

    def text(self, name: str, content: str | bytes = "", mode: int = 0o644, *, own: bool = False) -> Path:
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return self.own(path) if own else path

    def state_of(self, path: Path) -> list[Any]:
        """Return what the host says of a file: kind, mode, whether QEMU or the caller owns it, size and beginning."""
        try:
            found = path.lstat()
        except FileNotFoundError:
            return ["absent"]
        owner = "QEMU" if found.st_uid == self.uid else "caller" if found.st_uid == os.geteuid() else found.st_uid
        content = ""
        if stat.S_ISREG(found.st_mode):
            with path.open("rb") as file:
                content = file.read(16).hex()
        return [stat.filemode(found.st_mode), owner, found.st_size, content]

    def held(self) -> Held:
        """Return what it holds."""
        mounts = (self.proc / "mountinfo").read_text().splitlines()
        view = self.proc / "root"
        root = sorted(str(path.relative_to(view)) for path in find_view(view)) if self.confined else []
        fds = Counter(fds_of(self.process.pid).values())
        supervisor = Counter(fds_of(self.supervisor).values()) if self.confined else Counter[str]()
        return Held(mounts, root, fds, supervisor)

    @contextlib.contextmanager
    def balanced(self, kept: str = "") -> Iterator[None]:
        """Fail unless QEMU and the supervisor hold in the end what they held in the beginning, but for paths of a name."""
        self.qmp.execute("query-status")
        before = self.held()
        yield
        self.settle()
        end = time.monotonic() + SETTLE_S
        while (differences := before.compare(self.held(), kept)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not differences, "not as before:\n" + "\n".join(differences)


def find_view(root: Path) -> list[Path]:
    """Return what is on the view's own file systems, as directories of it stand in `root`: not what binds show."""
    found = []
    for name in ("", "tmp", "run", "var", "var/tmp", "work", "home", "dev"):
        with contextlib.suppress(OSError):
            found += [root / name / entry for entry in os.listdir(root / name)]
    return found


@contextlib.contextmanager
def plugged(
    folder: Path, launch: Launch | None, *options: str, machine: Sequence[str] = BARE, pass_fds: tuple[int, ...] = ()
) -> Iterator[Vm]:
    """Start a QEMU with monitors in a new folder; `launch` says how the drop-in does it, None stands for plain QEMU."""
    folder.mkdir()
    monitors = [folder / "q0", folder / "q1"]
    words = [word for path in monitors for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    command = [*(PLAIN if launch is None else dropin_words()), *machine, *words, *options, *(launch.options if launch else ())]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(started(command, cwd=folder, pass_fds=pass_fds))
        clients = stack.enter_context(contextlib.ExitStack())
        vm = Vm(process, folder, launch is not None, monitors, clients)
        assert "return" in vm.qmp.ask("query-status")
        yield vm
        process.send_signal(signal.SIGCONT)


def compared(shared_tmp: Path, launch: Launch, dialogue: Dialogue, *options: str, kept: str = "", **more: Any) -> None:
    """Have a dialogue with plain QEMU and with the drop-in's: both must see the same, and ours hold in the end what it did.

    Args:
        shared_tmp: a folder that QEMU can pass through.
        launch: how the drop-in starts QEMU.
        dialogue: returns what was seen.
        options: more of QEMU's.
        kept: a name; what is left of such a path is none of this test's business.
        more: for `plugged`.
    """
    with plugged(shared_tmp / "plain", None, *options, **more) as vm:
        plain = [fixed(json.dumps(item), vm.folder) for item in dialogue(vm)]
    with plugged(shared_tmp / "dropin", launch, *options, **more) as vm, vm.balanced(kept):
        pairs = zip_longest(plain, (fixed(json.dumps(item), vm.folder) for item in dialogue(vm)))
        differences = [f"  plain: {theirs}\n  ours:  {ours}" for theirs, ours in pairs if ours != theirs]
        assert not differences, "\n" + "\n".join(differences)


def fixed(text: str, folder: Path) -> str:
    """Return what a client saw without what differs from run to run."""
    text = text.replace(str(folder), "FOLDER")
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text


def user_name() -> str:
    """Return the tester's name."""
    return pwd.getpwuid(os.geteuid()).pw_name
