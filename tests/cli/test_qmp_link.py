"""The client's connection, at the other end a fake that does what QEMU does not, and the VMs that are registered."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.cli import qmp_link
from qemu_userns.cli.ps import ps
from qemu_userns.cli.qmp import format_reply, qmp
from qemu_userns.cli.qmp_link import CommandError, Link, Messages, build_id
from qemu_userns.cli.qmp_words import build_command
from qemu_userns.cli.vms import find_vm, read_vms
from qemu_userns.errors import HostError, QemuUsernsError, ResourceError, UsageError
from qemu_userns.plan.identity import Identity
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'
OK = b'{"return": {}}\r\n'


# --- messages ---------------------------------------------------------------------------------------------------------

STREAM = b'{"QMP": {}}\r\n{\r\n    "return": {\r\n        "a": "}{\\""\r\n    }\r\n}\r\n {"event": "\xc3\xbc", "data": {}}\r\n'
MESSAGES = [{"QMP": {}}, {"return": {"a": '}{"'}}, {"event": "ü", "data": {}}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_messages_are_cut_at_any_byte(size: int) -> None:
    messages = Messages("x")
    cut = [message for i in range(0, len(STREAM), size) for message in messages.feed(STREAM[i : i + size])]
    assert cut == MESSAGES


def test_a_part_of_a_message_does_not_hold_back_those_before_it() -> None:
    messages = Messages("x")
    assert messages.feed(OK + OK + b'{"re') == [{"return": {}}] * 2
    assert messages.feed(b'turn": 1}') == [{"return": 1}]


@pytest.mark.parametrize(
    "data", [b"QEMU 7.2 monitor\r\n", b"[1]\n", b'{"a": 1} x}\n', b'{"a":' * 100_000 + b"1" + b"}" * 100_000]
)
def test_what_is_no_qmp(data: bytes) -> None:
    with pytest.raises(HostError):
        Messages("x").feed(data)


def test_a_message_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_link, "_MESSAGE_MAX_CHARACTERS", 1000)
    messages = Messages("x")
    messages.feed(b'{"' + b"a" * 900)
    with pytest.raises(HostError):
        messages.feed(b"a" * 900)


# --- the connection ---------------------------------------------------------------------------------------------------


def ask(path: Path) -> None:
    with contextlib.closing(Link(str(path), "x")) as link:
        link.execute(build_command(["stop"], build_id(1)))


@contextlib.contextmanager
def peer(path: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """Serve one client: the first answer at once, each other one after it said something; then end. Yield what it said."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(answers[0])
                for answer in answers[1:]:
                    heard.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield heard
        thread.join(30)
        assert not thread.is_alive()


def test_oob_is_enabled_where_it_is_offered(tmp_path: Path) -> None:
    with peer(tmp_path / "s", GREETING, OK) as heard:
        Link(str(tmp_path / "s"), "x").close()
    assert json.loads(heard[0]) == {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}


def test_events_and_replies_of_others_are_passed_over(tmp_path: Path) -> None:
    reply = b'{"event": "STOP"}{"return": 1, "id": 9}{"return": 2}{"id": "qemu-userns-1", "return": 3}\r\n'
    with peer(tmp_path / "s", GREETING, b'{"event": "A"}\r\n' + OK, reply):
        link = Link(str(tmp_path / "s"), "x")
        assert link.execute(build_command(["stop"], build_id(1))) == {"return": 3}
        link.close()


@pytest.mark.parametrize(
    "answers",
    [
        (b"",),
        (b"{}\r\n",),
        (b'{"QMP": 1}\r\n',),
        (GREETING, b""),
        (GREETING, b'{"error": {}}\r\n'),
        (GREETING, OK, b""),
        (GREETING, OK, b'{"event": "SHUTDOWN"}\r\n'),
        (GREETING, OK, b"\xff"),
    ],
)
def test_a_peer_that_fails_is_an_error(tmp_path: Path, answers: tuple[bytes, ...]) -> None:
    with peer(tmp_path / "s", *answers), pytest.raises(HostError):
        ask(tmp_path / "s")


@pytest.mark.parametrize("error", [b'"no object"', b"{}", b'{"class": 1, "desc": []}'])
def test_an_error_that_is_not_as_it_should_be_is_an_error(tmp_path: Path, error: bytes) -> None:
    with peer(tmp_path / "s", GREETING, OK, b'{"error": ' + error + b"}\r\n"), pytest.raises(CommandError, match="stop: "):
        ask(tmp_path / "s")


def test_silence_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_link, "GREETING_TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(HostError, match="no greeting") as caught:
            Link(str(tmp_path / "s"), "x")
    assert "one client at a time" in str(caught.value.hint)


def test_a_path_may_be_longer_than_an_address(tmp_path: Path) -> None:
    home = tmp_path / ("d" * 200)
    home.mkdir()
    with peer(tmp_path / "s", GREETING, OK):
        (tmp_path / "s").rename(home / "s")
        Link(str(home / "s"), "x").close()


@pytest.mark.parametrize("kind", ["absent", "file", "unserved"])
def test_nobody_listens(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "s").touch()
    elif kind == "unserved":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
    with pytest.raises(ResourceError, match=str(tmp_path)):
        qmp(["--socket", str(tmp_path / "s"), "stop"])


def test_text_for_people_has_no_control_characters() -> None:
    assert format_reply({"return": "a\tb\r\n\x1b[2J\r\n"}, plain=True, compact=False) == "a\tb\n\\x1b[2J\n"
    assert format_reply({"return": ""}, plain=True, compact=False) == ""
    assert format_reply({"return": "\x9b"}, plain=False, compact=True) == '{"return": "\\u009b"}\n'


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def vms(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry."""
    monkeypatch.setattr(registry, "find_run_dir", lambda _: str(shared_tmp / "run"))
    return Path(registry.open_registry(os.geteuid()))


def register(vms: Path, pid: int, name: str, uuid: str = "") -> None:
    fields: dict[str, Any] = dict.fromkeys(State._fields, ())
    identity = Identity(1000, 1000, (), False, "self", (), (), "")
    known = {"pid": pid, "name": name, "uuid": uuid, "program": "/q", "version": (9, 2, 0), "identity": identity}
    state = State(**{**fields, **known, "started": registry.find_start(pid)})
    registry.write_entry(str(vms), pid, registry.Entry(state, pid))


def test_a_pid_goes_before_a_name_of_digits(vms: Path) -> None:
    register(vms, os.getpid(), "a", "u")
    register(vms, os.getppid(), str(os.getpid()))
    assert find_vm(str(os.getpid())).state.name == "a"
    assert find_vm("a") == find_vm("u")
    assert [vm.pid for vm in read_vms()] == sorted([os.getpid(), os.getppid()])


def test_an_ambiguous_name_lists_the_pids(vms: Path) -> None:
    register(vms, os.getpid(), "a")
    register(vms, os.getppid(), "a")
    with pytest.raises(UsageError, match="2 VMs") as caught:
        find_vm("a")
    assert str(os.getpid()) in str(caught.value.hint)
    assert str(os.getppid()) in str(caught.value.hint)


@pytest.mark.parametrize("wanted", ["", "nosuch"])
def test_no_such_vm_lists_those_there_are(vms: Path, wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_vm(wanted)
    assert "no VM of " in str(caught.value.hint)
    register(vms, os.getpid(), "")
    with pytest.raises(UsageError) as caught:
        find_vm(wanted)
    assert str(os.getpid()) in str(caught.value.hint)


def test_a_supervisor_that_is_gone_can_be_replaced(vms: Path) -> None:
    register(vms, os.getpid(), "a")
    for socket_there in (False, True):
        if socket_there:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{vms}/{os.getpid()}.qmp")
        with pytest.raises(HostError, match="supervisor is gone") as caught:
            qmp(["a", "stop"])
        assert caught.value.hint == f"qemu-userns adopt {os.getpid()}"


def test_a_registry_that_others_may_change_is_not_believed(vms: Path) -> None:
    register(vms, os.getpid(), "a")
    vms.chmod(0o722)
    with pytest.raises(QemuUsernsError, match="others may change it"):
        read_vms()


def test_no_registry_is_no_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "find_run_dir", lambda _: str(tmp_path / "nosuch"))
    assert read_vms() == []
    assert ps(as_json=True) == 0
    assert capsys.readouterr().out == "[]\n"


def test_ps_shows_no_control_characters(vms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register(vms, os.getpid(), "a\nb\x1b", "u")
    assert ps(as_json=False) == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert titles.split() == ["PID", "NAME", "UUID", "QEMU", "UID", "MONITORS"]
    assert row.split() == [str(os.getpid()), "a\\nb\\x1b", "u", "9.2.0", "1000", "(no", "supervisor:", "qemu-userns", "adopt)"]
