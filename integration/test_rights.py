"""What a client may do, and who may be one: on monitors of the command line, and on sockets of ours.

Each monitor has a `logfile`, in which QEMU puts all that it says there: what has no answer in it has not reached QEMU.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.brokered import NEGOTIATE, WITH_OOB, Raw, open_raw
from integration.talk import DEADLINE_S, IDLE, UUID, as_user, fds_of, outcome, started, supervisor_of, wait_until
from qemu_userns.supervisor.registry import find_run_dir
from tests.conftest import CHECKOUT, TEST_USER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    StartVm = Callable[..., contextlib.AbstractContextManager["Vm"]]

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

OURS = str(CHECKOUT / ".venv/bin/qemu-userns")
ME = os.geteuid()
SOMEBODY = 4242
CONNECT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(30)
    client.connect(sys.argv[1])
    print(client.recv(4).decode(), end="")
"""


class Vm:
    """A VM with the monitor `m`, which has a log."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self.pid, self.folder = process, process.pid, folder
        self.path = folder / "m"

    def client(self, name: str = "m", words: bytes = NEGOTIATE) -> Raw:
        return open_raw(self.folder / name).negotiate(words)

    @property
    def said(self) -> list[str]:
        """What QEMU has said on the monitor, but for events."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line for line in lines if '"event"' not in line]

    @property
    def log(self) -> str:
        """What the supervisor has written down."""
        return (Path(find_run_dir(ME)) / f"vms/{self.pid}.log").read_text()


@pytest.fixture
def start(dropin: list[str], shared_tmp: Path) -> StartVm:
    """Give what starts a VM with settings from a user's config.toml."""

    @contextlib.contextmanager
    def start(settings: str = "", *options: str, monitor: str | None = None, **popen: Any) -> Iterator[Vm]:
        place = monitor or f"path={shared_tmp}/m,server=on,wait=off"
        chardev = f"socket,id=m,logfile={shared_tmp}/log,{place}"
        words = [*dropin, *IDLE, "-chardev", chardev, "-mon", "chardev=m,mode=control", *options]
        with started(words, env=settings_of(shared_tmp, settings), cwd=shared_tmp, **popen) as process:
            yield Vm(process, shared_tmp)
        # The next VM of the test has sockets of the same names.
        wait_until(lambda: not any((shared_tmp / name).is_socket() for name in ("m", "ours")), "the end of the sockets")

    return start


def settings_of(folder: Path, text: str) -> dict[str, str]:
    """Write a user's settings; return the environment that has them, where `SOCKETS` is the folder of sockets."""
    path = folder / "config/qemu-userns/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("SOCKETS", str(folder)))
    return {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}


def rights(table: str, **values: object) -> str:
    """Return a table of the settings: of the monitor `m`, or of a socket of ours."""
    name = 'path = "SOCKETS/ours"' if table == "socket" else 'name = "m"'
    return f"[[qmp.{table}]]\n{name}\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def refusal(name: str, echo: object = None) -> dict[str, Any]:
    error = {"class": "CommandNotFound", "desc": f"The command {name} is not allowed for this client"}
    return {"error": error} if echo is None else {"id": echo, "error": error}


def command(name: str, **arguments: object) -> bytes:
    return json.dumps({"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}).encode()


def hmp(line: str, **arguments: object) -> bytes:
    return command("human-monitor-command", command_line=line, **arguments)


def next_reply(client: Raw) -> dict[str, Any]:
    while "event" in (reply := client.read()):
        pass
    return reply


def assert_unheard(vm: Vm, client: Raw, attempts: Sequence[tuple[bytes, dict[str, Any]]]) -> None:
    """Make attempts one by one, all at once, and byte by byte; QEMU must say nothing to any of them, and live."""
    before = said_up_to(vm, client, "before")
    for said, answer in attempts:
        assert client.ask(said) == answer, said
    client.send(b"\n".join(said for said, _ in attempts))
    assert [next_reply(client) for _ in attempts] == [answer for _, answer in attempts]
    for said, answer in attempts:
        for byte in said:
            client.send(bytes([byte]))
        assert next_reply(client) == answer, said
    assert said_up_to(vm, client, "after")[:-1] == before
    assert vm.process.poll() is None


def said_up_to(vm: Vm, client: Raw, mark: str) -> list[str]:
    """Return what QEMU has said when it has answered a query: its log is behind what it sends."""
    assert client.ask(f'{{"execute": "query-status", "id": "{mark}"}}'.encode())["id"] == mark
    return wait_until(lambda: said if f'"id": "{mark}"' in (said := vm.said)[-1] else None, "the log") or []


# --- what is allowed --------------------------------------------------------------------------------------------------


def test_a_monitor_of_the_caller_has_every_right(start: StartVm) -> None:
    with start() as vm, vm.client() as client, (vm.folder / "file").open("wb") as file:
        for name in ("cont", "stop", "query-status"):
            client.execute(name)
        assert client.ask(b'{"execute": "getfd", "arguments": {"fdname": "a"}}', file.fileno()) == {"return": {}}
        assert client.ask(b'{"execute": "closefd", "arguments": {"fdname": "a"}}') == {"return": {}}
        assert client.ask(hmp("info version"))["return"]
        assert client.ask(command("transaction", actions=[{"type": "abort", "data": {}}]))["error"]["class"] == "GenericError"
        said = len(vm.said)
        assert client.ask(b"{'execute': 'query-status' 5}")["error"]["class"] == "GenericError"
        wait_until(lambda: len(vm.said) > said, "what QEMU itself says to that")
        client.execute("quit")
        assert vm.process.wait(DEADLINE_S) == 0


QUITS = [
    b'{"execute": "quit"}',
    b"{'execute': 'quit'}",
    b'{"execute": "\\u0071uit"}',
    b"{'\\u0065xecute': '\\u0071\\u0075\\u0069\\u0074'}",
    b' \r\n\t{"arguments" : { } , "execute"\n:\n"quit"}',
]
CHANGES: dict[str, dict[str, object]] = {
    "add_client": {"protocol": "vnc", "fdname": "a"},
    "add-fd": {"fdset-id": 5},
    "balloon": {"value": 1},
    "blockdev-add": {"driver": "null-co", "node-name": "n"},
    "chardev-add": {"id": "c", "backend": {"type": "file", "data": {"out": "/x"}}},
    "closefd": {"fdname": "a"},
    "cont": {},
    "device_add": {"driver": "nvme"},
    "dump-guest-memory": {"paging": False, "protocol": "file:/x"},
    "getfd": {"fdname": "a"},
    "migrate": {"uri": "exec:true"},
    "migrate-incoming": {"uri": "exec:true"},
    "netdev_add": {"type": "user", "id": "n"},
    "object-add": {"qom-type": "secret", "id": "s", "file": "/etc/shadow"},
    "qom-set": {"path": "/machine", "property": "x", "value": 1},
    "remove-fd": {"fdset-id": 5},
    "screendump": {"filename": "/x"},
    "set-action": {"reboot": "shutdown"},
    "system_reset": {},
    "trace-event-set-state": {"name": "*", "enable": True},
    "transaction": {"actions": []},
    "yank": {"instances": []},
}
LINES = {
    "quit": "quit",
    "q": "q",
    " \t\v\f\r\nq": "q",
    "q/x": "q",
    "q\nx": "q",
    "/quit": "human-monitor-command",
    "//quit": "human-monitor-command",
    "": "human-monitor-command",
    "  ": "human-monitor-command",
    "info\0x": "info\\x00",
    "informer": "informer",
    "INFO version": "INFO",
    "inf version": "inf",
    "?": "?",
    "help": "help",
    "qom-set /machine x 1": "qom-set",
    "o /b 0x64 0xfe": "o",
    "change vnc password x": "change",
    "chardev-add file,id=f,path=/x": "chardev-add",
    "getfd a": "getfd",
    "migrate exec:true": "migrate",
    "logfile /x": "logfile",
    "quit #info": "quit",
}


@pytest.mark.parametrize("table", ["monitor", "socket"])
def test_who_may_only_look_changes_nothing(start: StartVm, table: str) -> None:
    attempts = [(said, refusal("quit")) for said in QUITS]
    attempts += [(json.dumps({"execute": name, "arguments": given}).encode(), refusal(name)) for name, given in CHANGES.items()]
    attempts.append((b'{"execute": "no-such"}', refusal("no-such")))
    for line, name in LINES.items():
        shown = "info\0x" if "\0" in line else name
        attempts += [(hmp(line), refusal(shown)), (hmp(line, cpu_index=0), refusal(shown))]
    attempts += [(command("human-monitor-command", command_line=given), refusal("human-monitor-command")) for given in (5, None)]
    attempts.append((command("human-monitor-command"), refusal("human-monitor-command")))
    attempts.append((command("human-monitor-command", command_line=["info"]), refusal("human-monitor-command")))
    for echo in (7, "x", [1, {"a": None}], {"b": 1.5}, False):
        attempts.append((json.dumps({"execute": "quit", "id": echo}).encode(), refusal("quit", echo)))
    attempts.append((command("qom-get", path="/objects/key", property="data"), refusal("qom-get")))
    secret = "secret,id=key,data=the-key"
    with (
        start(rights(table, access="read-only"), "-object", secret) as vm,
        vm.client("m" if table == "monitor" else "ours") as client,
    ):
        assert_unheard(vm, client, attempts)
        assert client.execute("query-name") == {}
        assert client.execute("qom-list", path="/")
        assert client.execute("qom-get", path="/objects/key", property="format") == "raw"
        assert client.execute("device-list-properties", typename="nvme")
        assert "QEMU" in client.execute("query-version")["package"] or client.execute("query-version")["qemu"]
        assert client.ask(hmp("info version"))["return"].strip()
        assert client.ask(hmp(" \n info\tversion"))["return"].strip()
        # A line has one command, whatever follows it.
        for line in ("info version\nquit", "info version;quit", "info/quit", "info\nquit"):
            assert "return" in client.ask(hmp(line))
        assert client.ask(NEGOTIATE)["error"]["desc"].startswith("Capabilities negotiation is already complete")
        assert vm.process.poll() is None


FAULTS = [
    b'{"execute": "query-status", "execute": "quit"}',
    b'{"execute": "query-status", "\\u0065xecute": "quit"}',
    b'{"execute": "query-status", "exec-oob": "quit"}',
    b'{"exec-oob": "quit"}',
    b'{"exec-oob": "query-status"}',
    b'{"execute": "quit", "control": {}}',
    b'{"execute": ["quit"]}',
    b'{"execute": "query-status", "arguments": ["quit"]}',
    b'{"execute": "quit" "id": 1}',
    b'{"execute": "qu\xff',
    b'{"execute": "qu\x00it"}',
    b'{"execute": "\\q"}',
    b'{"execute": "\xc3"}',
    b'[{"execute": "quit"}]',
    b'"quit" ',
    b"NaN ",
    b"{}",
]


@pytest.mark.parametrize("table", ["monitor", "socket"])
def test_what_is_no_command_never_reaches_qemu(start: StartVm, table: str) -> None:
    name = "m" if table == "monitor" else "ours"
    with start(rights(table, deny=["quit"])) as vm, vm.client(name) as client, vm.client(name) as other:
        before = said_up_to(vm, client, "before")
        for fault in FAULTS:
            client.send(fault + b"\n")
            assert client.read()["error"]["class"] == "GenericError", fault
            # Whatever else of it is told, our 0xFF ends it.
            client.send(b'\xff{"execute": "quit", "id": "end"}')
            while client.read() != refusal("quit", "end"):
                pass
            assert other.ask(b'{"execute": "quit"}') == refusal("quit")
        client.send(b"[" * 2000 + b'\xff{"execute": "quit", "id": "end"}')
        while client.read() != refusal("quit", "end"):
            pass
        client.send(b'{"execute": "query-status"')
        assert said_up_to(vm, other, "after")[:-1] == before
        client.close()
        assert other.execute("query-status")


@pytest.mark.parametrize("table", ["monitor", "socket"])
def test_lists_count_within_transactions(start: StartVm, table: str) -> None:
    name = "m" if table == "monitor" else "ours"
    abort, bitmap = {"type": "abort", "data": {}}, {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "b"}}
    snapshot = {"type": "blockdev-snapshot-sync", "data": {"node-name": "n", "snapshot-file": "/x"}}
    escaped = json.dumps({"execute": "transaction", "arguments": {"actions": [abort, snapshot]}})
    denied = refusal("blockdev-snapshot-sync")
    attempts = [
        (command("transaction", actions=[snapshot]), denied),
        (command("transaction", actions=[bitmap, bitmap, snapshot]), denied),
        (escaped.replace("snapshot-sync", "snapshot-\\u0073ync").encode(), denied),
        (command("blockdev-snapshot-sync", **snapshot["data"]), denied),  # type: ignore[arg-type]
        (b'{"execute": "quit", "id": 3}', refusal("quit", 3)),
        (hmp("info version"), refusal("human-monitor-command")),
    ]
    with start(rights(table, deny=["blockdev-snap*", "quit"])) as vm, vm.client(name) as client:
        assert_unheard(vm, client, attempts)
        assert "Abort action" in client.ask(command("transaction", actions=[abort]))["error"]["desc"]
        client.execute("cont")
    allow = ["query-status", "transaction", "abort"]
    with start(rights(table, allow=allow)) as vm, vm.client(name) as client:
        attempts = [
            (command("transaction", actions=[abort, bitmap]), refusal("block-dirty-bitmap-add")),
            (command("transaction", actions=[abort, {"data": {}}]), refusal("")),
            (command("transaction", actions=["abort"]), refusal("")),
            (command("stop"), refusal("stop")),
            (command("query-name"), refusal("query-name")),
            (hmp("info version"), refusal("human-monitor-command")),
        ]
        assert_unheard(vm, client, attempts)
        assert "Abort action" in client.ask(command("transaction", actions=[abort]))["error"]["desc"]


def test_lists_count_within_the_human_monitor(start: StartVm) -> None:
    allow = ["human-monitor-command", "query-*", "stop", "chardev-*", "object-add", "logfile"]
    settings = rights("socket", allow=allow, deny=["chardev-remove", "query-block"])
    attempts = [
        (hmp("cont"), refusal("cont")),
        (hmp("c"), refusal("c")),
        (hmp("quit"), refusal("quit")),
        (hmp("chardev-remove c"), refusal("chardev-remove")),
        (hmp("object_del s"), refusal("object_del")),
        (hmp("info block"), refusal("info")),
        (hmp("info \f block/x"), refusal("info")),
        (hmp("qom-set /machine x 1"), refusal("qom-set")),
        (command("query-block"), refusal("query-block")),
    ]
    with start(settings) as vm, vm.client("ours") as client:
        assert_unheard(vm, client, attempts)
        made = ["chardev-add null,id=c", "object_add authz-simple,id=a,identity=x"]
        for line in ("s", "stop", "info version", "info status", *made):
            assert "return" in client.ask(hmp(line)), line
        # What they may name is opened outside for them too.
        client.ask(hmp(f"chardev-add file,id=f,path={vm.folder / 'made'}"))
        assert (vm.folder / "made").exists()
        assert {item["label"] for item in client.execute("query-chardev")} == {"m", "c", "f"}


def test_out_of_band_does_not_pass_by(start: StartVm) -> None:
    oob = [
        (b'{"exec-oob": "migrate-pause", "id": 1}', refusal("migrate-pause", 1)),
        (b'{"exec-oob": "yank", "id": 2, "arguments": {"instances": []}}', refusal("yank", 2)),
        (b'{"exec-oob": "quit", "id": 3}', refusal("quit", 3)),
        (b'{"exec-oob": "human-monitor-command", "id": 4, "arguments": {"command-line": "q"}}', refusal("q", 4)),
    ]
    with start(rights("monitor", access="read-only")) as vm:
        with vm.client(words=WITH_OOB) as client:
            assert_unheard(vm, client, oob)
            assert client.ask(b'{"exec-oob": "query-yank", "id": 5}')["return"]
            before = len(said_up_to(vm, client, "before"))
        with open_raw(vm.path) as client:
            # Said before it is negotiated, to be run once it is.
            client.send(WITH_OOB + b"".join(said for said, _ in oob) + b'{"execute": "query-name", "id": "end"}')
            assert "QMP" in client.read()
            replies = [client.read() for _ in range(len(oob) + 2)]
        assert {"return": {}} in replies
        assert {"return": {}, "id": "end"} in replies
        assert [reply for reply in replies if "error" in reply] == [answer for _, answer in oob]
        with vm.client() as client:
            # To the negotiation, the query, our second negotiation, and this query.
            assert len(said_up_to(vm, client, "after")) == before + 4


def test_fds_of_others_are_out_of_reach(start: StartVm) -> None:
    look, lists = rights("socket", access="read-only"), rights("socket", allow=["closefd", "getfd", "query-*", "remove-fd"])
    settings = look + lists.replace("ours", "lists")
    with (
        start(settings) as vm,
        vm.client() as owner,
        vm.client("ours") as looker,
        vm.client("lists") as other,
        (vm.folder / "file").open("wb") as file,
        (vm.folder / "second").open("wb") as second,
    ):
        owner.execute("cont")  # a QEMU 7.2 that does not run marks fds as removed, and keeps them

        def held(path: str) -> int:
            return list(fds_of(vm.pid).values()).count(str(vm.folder / path))

        assert owner.ask(command("getfd", fdname="a"), file.fileno()) == {"return": {}}
        assert owner.ask(command("add-fd", fdset_id=5), file.fileno())["return"]["fdset-id"] == 5
        assert held("file") == 2
        for name, arguments in (("closefd", {"fdname": "a"}), ("remove-fd", {"fdset-id": 5})):
            assert looker.ask(command(name, **arguments)) == refusal(name)
        for name, arguments in (("getfd", {"fdname": "a"}), ("add-fd", {"fdset-id": 5})):
            assert looker.ask(command(name, **arguments), second.fileno()) == refusal(name)
        assert len(looker.execute("query-fdsets")) == 1
        # A name is its client's own, and the fd behind it stays where another gives the same.
        assert other.ask(command("closefd", fdname="a"))["error"]["desc"] == "File descriptor named 'a' not found"
        assert other.ask(command("getfd", fdname="a"), second.fileno()) == {"return": {}}
        assert (held("file"), held("second")) == (2, 1)
        assert other.ask(command("add-fd"), second.fileno()) == refusal("add-fd")
        assert other.ask(command("remove-fd", fdset_id=5)) == {"return": {}}  # as its list allows
        wait_until(lambda: held("file") == 1, "the end of the fdset")
        assert owner.ask(command("closefd", fdname="a")) == {"return": {}}
        assert (held("file"), held("second")) == (0, 1)
        looker.close()
        other.close()
        wait_until(lambda: supervisors_of(vm, "second") == 0, "the end of what was sent along with what is denied")


def supervisors_of(vm: Vm, name: str) -> int:
    """Return how many fds of a file the supervisor has."""
    return list(fds_of(supervisor_of(vm.pid)).values()).count(str(vm.folder / name))


def test_events_still_come(start: StartVm) -> None:
    with start(rights("socket", access="read-only")) as vm, vm.client() as owner, vm.client("ours") as looker:
        owner.execute("cont")
        owner.execute("stop")
        assert [looker.read()["event"] for _ in range(2)] == ["RESUME", "STOP"]
        assert looker.ask(b'{"execute": "cont"}') == refusal("cont")
        owner.execute("quit")
        assert looker.read()["event"] == "SHUTDOWN"
        assert looker.rest() == b""


def test_a_new_supervisor_grants_the_same(start: StartVm) -> None:
    users = {"users": sorted({0, ME})}
    settings = rights("monitor", deny=["quit"]) + rights("socket", access="read-only", mode="0640", **users)
    with start(settings, "-userns", "qmp=all") as vm:

        def probe() -> list[object]:
            found: list[object] = []
            for name in ("m", "ours", "all"):
                with vm.client(name) as client:
                    found += [client.ask(command(said)) for said in ("query-status", "system_wakeup", "x-colo-lost-heartbeat")]
                    found.append(client.ask(b'{"execute": "quit"}') if name != "all" else None)
                found.append(stat.S_IMODE((vm.folder / name).stat().st_mode))
            return found

        before = probe()
        assert before.count(refusal("quit")) == 2
        assert before.count(refusal("system_wakeup")) == 1
        # What the settings say by then is for the VMs that are started then.
        env = settings_of(vm.folder, rights("monitor", access="full") + rights("socket", access="full"))
        for _ in range(2):
            assert outcome([OURS, "adopt", "--replace"], str(vm.pid), env=env) == (0, f"{vm.pid}\n", "")
            assert probe() == before


# --- who may be a client ----------------------------------------------------------------------------------------------


def assert_turned_away(vm: Vm, peer: str) -> None:
    """The log has it once: whoever comes again and again must not fill it."""
    line = f" a client {peer} is turned away, as the settings say\n"
    wait_until(lambda: vm.log.count(line) == 1, f"{line!r} in the log")


def assert_eof(connection: socket.socket) -> None:
    connection.settimeout(DEADLINE_S)
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def connect_as(user: str, path: Path) -> str:
    """Connect as a user; return what is said first."""
    # Not `python -m`: the checkout may be out of reach.
    status, out, err = outcome(as_user(user, sys.executable, "-I", "-c", CONNECT), str(path), cwd="/")
    assert (status, err) == (0, "")
    return out


@pytest.mark.parametrize("table", ["monitor", "socket"])
@pytest.mark.parametrize("users", [[SOMEBODY], [SOMEBODY, 0 if ME else SOMEBODY + 1]])
def test_who_is_not_named_is_turned_away(start: StartVm, table: str, users: list[int]) -> None:
    """Not even the caller, where only others are named."""
    with start(rights(table, users=users)) as vm:
        for _ in range(2):
            with contextlib.closing(open_raw(vm.folder / ("m" if table == "monitor" else "ours")).socket) as client:
                assert_eof(client)
            assert_turned_away(vm, f"of uid {ME}")
        # The settings name users of this one alone.
        if table == "socket":
            vm.client().close()


@pytest.mark.parametrize("table", ["monitor", "socket"])
def test_who_is_named_is_served(start: StartVm, table: str) -> None:
    name = pwd.getpwuid(ME).pw_name
    with start(rights(table, users=[SOMEBODY, name])) as vm, vm.client("m" if table == "monitor" else "ours") as client:
        assert client.execute("query-status")


@pytest.mark.root
@pytest.mark.parametrize("table", ["monitor", "socket"])
def test_another_users_process(start: StartVm, table: str, unprivileged_user: str) -> None:
    uid = pwd.getpwnam(TEST_USER).pw_uid
    path = "m" if table == "monitor" else "ours"

    def connect(vm: Vm) -> str:
        open_raw(vm.folder / path).close()  # it is there
        (vm.folder / path).chmod(0o666)
        return connect_as(unprivileged_user, vm.folder / path)

    with start(rights(table, users=[0])) as vm:
        assert connect(vm) == ""
        assert_turned_away(vm, f"of uid {uid}")
        vm.client(path).close()
    with start(rights(table, users=[unprivileged_user])) as vm:
        assert connect(vm) == '{"QM'
        with contextlib.closing(open_raw(vm.folder / path).socket) as client:
            assert_eof(client)
        assert_turned_away(vm, "of uid 0")


@pytest.mark.root
def test_by_default_a_socket_of_ours_is_the_callers_whatever_its_mode(start: StartVm, unprivileged_user: str) -> None:
    with start(rights("socket", mode="0666")) as vm:
        wait_until((vm.folder / "ours").exists, "the socket")
        assert connect_as(unprivileged_user, vm.folder / "ours") == ""
        assert_turned_away(vm, f"of uid {pwd.getpwnam(unprivileged_user).pw_uid}")
        vm.client("ours").close()


def test_a_client_that_is_turned_away_is_not_the_one_that_qemu_waits_for(start: StartVm, shared_tmp: Path) -> None:
    monitor = f"path={shared_tmp}/m,server=on,wait=on"
    with start(rights("monitor", users=[SOMEBODY]), "-pidfile", f"{shared_tmp}/pid", monitor=monitor) as vm:
        with contextlib.closing(open_raw(vm.path).socket) as client:
            assert_eof(client)
        assert_turned_away(vm, f"of uid {ME}")
        time.sleep(0.3)
        assert (vm.folder / "log").read_bytes() == b""  # nobody has been greeted


@pytest.mark.parametrize("admitted", [True, False])
def test_a_connection_that_was_passed_in(start: StartVm, admitted: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            running = start(rights("monitor", users=[ME if admitted else SOMEBODY]), monitor=f"fd={fd}", pass_fds=(fd,))
            vm = running.__enter__()
        try:
            if admitted:
                assert Raw(ours).negotiate().execute("query-status")
            else:
                assert_eof(ours)
                assert_turned_away(vm, f"of uid {ME}")
        finally:
            running.__exit__(None, None, None)


@pytest.mark.parametrize("listens", [True, False])
def test_tcp_that_was_passed_in_has_no_uid(start: StartVm, listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(listener.getsockname())) if not listens else None
        given = stack.enter_context(listener.accept()[0]) if not listens else listener
        fd = given.fileno()
        monitor = f"fd={fd},server=on,wait=off" if listens else f"fd={fd}"
        vm = stack.enter_context(start(rights("monitor", users=[0, ME]), monitor=monitor, pass_fds=(fd,)))
        if client is None:
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
        else:
            given.close()
        assert_eof(client)
        assert_turned_away(vm, "without a uid")


@pytest.mark.parametrize("reconnect", ["", ",reconnect=1"])
@pytest.mark.parametrize("admitted", [True, False])
def test_whom_a_monitor_connects_to(start: StartVm, shared_tmp: Path, reconnect: str, admitted: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared_tmp / "them"))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        monitor = f"path={shared_tmp}/them{reconnect}"
        with start(rights("monitor", users=[ME if admitted else SOMEBODY]), monitor=monitor) as vm:
            for _ in range(2 if reconnect else 1):
                client, _ = listener.accept()
                with Raw(client) as raw:
                    if admitted:
                        assert raw.negotiate().execute("query-status")
                    else:
                        assert_eof(client)
                        assert_turned_away(vm, f"of uid {ME}")
            assert reconnect or not select.select([listener], [], [], 0.2)[0]


@pytest.mark.parametrize("device", ["stdio", "tcp:127.0.0.1:1,server=on,wait=off", "tcp:127.0.0.1:1"])
def test_users_are_refused_where_nobody_has_a_uid(dropin: list[str], shared_tmp: Path, device: str) -> None:
    settings = rights("monitor", users=[0, ME]).replace('"m"', '"*"')
    status, out, err = outcome(dropin, *IDLE, "-qmp", device, env=settings_of(shared_tmp, settings))
    assert (status, out) == (1, "")
    assert err.startswith("qemu-userns: monitor compat_monitor0: the settings name its users, and ")
    assert "has no uid" in err
    assert "hint: " in err


# --- sockets of ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["quit", "kill"])
def test_sockets_are_made_as_asked_for_and_removed(start: StartVm, ends: str) -> None:
    settings = """
        [[qmp.socket]]
        path = "SOCKETS/%n.%u.100%%"
        mode = "0666"
        [[qmp.socket]]
        path = "SOCKETS/secret"
    """
    with start(settings, "-name", "vm,process=x", "-uuid", UUID, "-userns", "qmp=%n.sock", umask=0o077) as vm:
        modes = {f"vm.{UUID}.100%": 0o666, "secret": 0o600, "vm.sock": 0o600}
        for name, mode in modes.items():
            with vm.client(name) as client:
                assert client.execute("query-name") == {"name": "vm"}
            found = (vm.folder / name).lstat()
            assert stat.S_ISSOCK(found.st_mode)
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, ME, os.getegid())
        if ends == "kill":
            vm.process.kill()
        else:
            with vm.client("secret") as client:
                client.execute("quit")
        vm.process.wait(DEADLINE_S)
        wait_until(lambda: not {*modes, "m"} & {path.name for path in vm.folder.iterdir()}, "the end of the sockets")


def test_what_is_not_ours_any_more_stays(start: StartVm) -> None:
    with start(rights("socket")) as vm:
        vm.client("ours").close()
        (vm.folder / "ours").unlink()
        (vm.folder / "ours").write_text("another's")
        with vm.client() as client:
            client.execute("quit")
        vm.process.wait(DEADLINE_S)
        wait_until(lambda: not vm.path.exists(), "the end of the monitor's socket")
        assert (vm.folder / "ours").read_text() == "another's"


def test_a_vm_without_monitors_gets_one_for_our_sockets(dropin: list[str], shared_tmp: Path) -> None:
    env = settings_of(shared_tmp, rights("socket", allow=["query-*", "quit"]))
    with started([*dropin, *IDLE, "-userns", f"qmp={shared_tmp}/all"], env=env) as process:
        with open_raw(shared_tmp / "ours").negotiate() as client, open_raw(shared_tmp / "all").negotiate() as other:
            assert client.ask(b'{"execute": "stop"}') == refusal("stop")
            other.execute("stop")
            client.execute("quit")
        assert process.wait(DEADLINE_S) == 0


# --- monitors that QEMU serves by itself ------------------------------------------------------------------------------


def test_hmp_goes_to_qemu_and_sees_only_the_view(start: StartVm, shared_tmp: Path) -> None:
    hmp_socket = f"unix:{shared_tmp}/hmp,server=on,wait=off"
    with start(rights("monitor", access="read-only"), "-monitor", hmp_socket) as vm, open_raw(vm.folder / "hmp") as human:

        def hear() -> str:
            text = b""
            while not text.endswith(b"(qemu) "):
                text += human.socket.recv(65536)
            return text.decode()

        def say(line: str) -> str:
            human.send(line.encode() + b"\n")
            return hear()

        hear()
        say(f"chardev-add file,id=f,path={shared_tmp}/file")
        assert not (shared_tmp / "file").exists()  # if QEMU has made it, in its own view
        (shared_tmp / "image").write_bytes(bytes(4096))
        assert "No such file" in say(f"drive_add -n 0 driver=file,filename={shared_tmp}/image,node-name=n")
        assert "paused" in say("info status")
        say("cont")
        assert "running" in say("info status")  # no settings restrict it
