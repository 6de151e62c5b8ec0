"""TCP sockets of monitors."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import pytest

from qemu_userns.errors import ResourceError
from qemu_userns.host import tcp

HOST = "127.0.0.1"


def test_the_first_free_port_is_taken() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"^{HOST}:{port}: Failed to find an available port: Address already in use$"):
            tcp.listen_tcp({"host": HOST, "port": str(port)})
        with socket.socket(fileno=tcp.listen_tcp({"host": HOST, "port": str(port), "to": str(port + 20)})) as found:
            assert port < found.getsockname()[1] <= port + 20
            os.close(tcp.connect_tcp({"host": "localhost", "port": str(found.getsockname()[1]), "ipv4": "yes"}))


def test_nobody_is_there() -> None:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        with pytest.raises(ResourceError, match=r"Failed to connect: Connection refused$"):
            tcp.connect_tcp({"host": HOST, "port": str(bound.getsockname()[1])})


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_CONNECT_TIMEOUT_S", 0.1)
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        with pytest.raises(ResourceError, match=r"Failed to connect: timed out$"):
            tcp.connect_tcp({"host": HOST, "port": str(server.getsockname()[1])})
