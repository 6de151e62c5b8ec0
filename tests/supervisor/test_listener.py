"""A listening socket: what becomes of the fds of those who come."""

from __future__ import annotations

import os
import socket

import pytest

from qemu_userns.supervisor.listener import Listener
from qemu_userns.supervisor.poller import Poller

DEADLINE_S = 30


class UnexpectedError(Exception):
    """What nobody expected of an admission."""


def fail(_: int) -> bool:
    raise UnexpectedError


@pytest.mark.parametrize("admits", [fail, lambda _: False])
def test_a_client_that_is_not_admitted_sees_the_end(admits: object) -> None:
    """Also where finding out who it is fails: nothing of it stays open."""
    poller = Poller()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("")
    listening.listen()
    name = listening.getsockname()
    reports: list[str] = []
    poller.report = reports.append
    listener = Listener(poller, listening.detach(), admits, os.close, reports.append)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(name)
        before = os.listdir("/proc/self/fd")
        poller.run_once(DEADLINE_S)
        assert os.listdir("/proc/self/fd") == before
        assert client.recv(1) == b""
    listener.close()
    assert any("UnexpectedError" in line for line in reports) == (admits is fail)
