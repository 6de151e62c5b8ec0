"""What the service manager is told, and that QEMU cannot say more to it than a word."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from qemu_userns.supervisor.notifier import Notifier
from qemu_userns.supervisor.poller import Poller

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PID = 4711


class Talk:
    """QEMU's side of the monitor, and the service manager's socket."""

    def __init__(self, address: str, bound: str | bytes) -> None:
        self.log: list[str] = []
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(bound)
        self.manager.setblocking(False)
        self.poller = Poller()
        self.qemu, theirs = socket.socketpair()
        connection = socket.socket(fileno=theirs.detach())
        Notifier(self.poller, connection, address, lambda: PID, self.log.append)

    def say(self, *messages: object) -> None:
        self.qemu.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))
        self.poller.run_once(1)

    def asked(self) -> str:
        return str(json.loads(self.qemu.recv(4096))["execute"])

    def told(self) -> list[str]:
        return self.manager.recv(4096).decode().splitlines()

    def close(self) -> None:
        self.qemu.close()
        self.poller.run_once(1)  # it closes its own end
        self.manager.close()


@pytest.fixture(params=["path", "abstract"])
def talk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Talk]:
    name = f"qemu-userns-test-{os.getpid()}"
    path = str(tmp_path / "notify")
    talk = Talk(path, path) if request.param == "path" else Talk(f"@{name}", b"\0" + name.encode())
    yield talk
    talk.close()


def begin(talk: Talk, status: object = "running") -> None:
    talk.say({"QMP": {"version": {}, "capabilities": []}})
    assert talk.asked() == "qmp_capabilities"
    talk.say({"return": {}})
    assert talk.asked() == "query-status"
    talk.say({"return": {"status": status}})


def test_it_is_ready_when_qemu_answers_and_tells_of_changes(talk: Talk) -> None:
    begin(talk)
    assert talk.told() == ["STATUS=running", "READY=1", f"MAINPID={PID}"]
    talk.say({"event": "RTC_CHANGE"}, {"event": "STOP"})
    assert talk.asked() == "query-status"
    talk.say({"return": {"status": "paused"}})
    assert talk.told() == ["STATUS=paused"]
    assert talk.log == []


@pytest.mark.parametrize("status", ["running\nMAINPID=1", "x" * 41, "", 1, None, {"a": "b"}])
def test_qemu_says_a_word_and_no_line_more(talk: Talk, status: object) -> None:
    begin(talk, status)
    assert talk.told() == ["STATUS=unknown", "READY=1", f"MAINPID={PID}"]


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_ends_it(talk: Talk, line: bytes) -> None:
    begin(talk)
    talk.told()
    talk.qemu.sendall(line + b"\n")
    while not talk.log:
        talk.poller.run_once(1)
    assert talk.log == ["QEMU says what is no JSON: the service manager is told no more"]


@pytest.mark.parametrize("message", [[], 1, None, "QMP", {"event": ["STOP"]}, {"event": {}}, {"return": [{}]}])
def test_other_messages_say_nothing(talk: Talk, message: object) -> None:
    begin(talk)
    talk.told()
    talk.say(message, {"event": "STOP"})
    assert talk.asked() == "query-status"
    assert talk.log == []


def test_a_manager_that_is_gone_is_noted(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    talk = Talk(path, path)
    os.unlink(path)
    begin(talk)
    assert talk.log == ["the service manager cannot be told: No such file or directory"]
    talk.close()
