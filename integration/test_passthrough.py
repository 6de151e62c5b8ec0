"""passthrough=PATH: a monitor that QEMU itself serves, on a socket of the host, beside whatever monitors there are."""

from __future__ import annotations

import array
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from integration.talk import DEADLINE_S, IDLE, Qmp, connected, fds_of, outcome, qmp_over, started, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

LABEL = "qemu-userns-passthrough"
HEADLESS = ["-display", "none", "-M", "none", "-S"]


def labels(qmp: Qmp) -> dict[str, str]:
    return {item["label"]: item["filename"] for item in qmp.execute("query-chardev")}


@pytest.mark.parametrize(
    "options",
    [
        ["-nodefaults", *HEADLESS],
        HEADLESS,
        ["-display", "none", "-M", "pc", "-S"],
        ["-nographic", "-M", "none"],
        ["-nodefaults", *HEADLESS, "-monitor", "null"],
    ],
)
def test_the_callers_and_the_default_devices_stay_as_they_are(dropin: list[str], shared_tmp: Path, options: list[str]) -> None:
    path = shared_tmp / "raw"
    monitor = ["-chardev", f"socket,id=mine,path={shared_tmp / 'plain'},server=on,wait=off"]
    plain = ["qemu-system-x86_64", *options, *monitor, "-mon", "mine"]
    reader = f"{shared_tmp / 'plain'}"
    with started(plain, stdout=subprocess.DEVNULL), connected(Path(reader)) as client:
        client.settimeout(DEADLINE_S)
        text = b""
        client.sendall(b"info chardev\n")
        while b"(qemu) " not in text.partition(b"mine: ")[2]:
            text += client.recv(65536)
    expected = {line.split(b":")[0].decode().strip() for line in text.splitlines() if b": filename=" in line}
    command = [*dropin, *options, *monitor, "-mon", "mine", "-userns", f"passthrough={path}"]
    with started(command, stdout=subprocess.DEVNULL) as process, connected(path) as client, qmp_over(client) as qmp:
        assert labels(qmp).keys() == expected | {LABEL}
        assert labels(qmp)[LABEL] == f"unix:{path},server=on"
        qmp.execute("quit")
        assert process.wait(DEADLINE_S) == 0


def test_the_greeting_is_qemus_and_fds_go_straight_through(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "raw"
    with (
        started([*dropin, *IDLE, "-userns", f"passthrough={path}"]) as process,
        connected(path) as client,
        qmp_over(client) as qmp,
        (shared_tmp / "file").open("wb") as file,
    ):
        assert qmp.greeting["QMP"]["capabilities"] == ["oob"]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        client.sendmsg([b'{"execute": "getfd", "arguments": {"fdname": "f"}}\n'], rights)
        assert qmp.read() == {"return": {}}
        assert str(shared_tmp / "file") in fds_of(process.pid).values()
        client.sendmsg([b'{"execute": "add-fd", "arguments": {"fdset-id": 7}}\n'], rights)
        assert qmp.read()["return"]["fdset-id"] == 7
        assert [item["fdset-id"] for item in qmp.execute("query-fdsets")] == [7]
        qmp.execute("quit")
        assert process.wait(DEADLINE_S) == 0
    wait_until(lambda: not os.path.lexists(path), "the end of the socket")


def test_clients_come_one_after_the_other(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "raw"
    with started([*dropin, *IDLE, "-userns", f"passthrough={path}"]) as process:
        for _ in range(3):
            with connected(path) as client, qmp_over(client) as qmp:
                assert qmp.execute("query-status")["status"] == "prelaunch"
        assert fds_of(process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_socket_goes_with_qemu_however_it_ends(dropin: list[str], shared_tmp: Path, number: int) -> None:
    path = shared_tmp / "raw"
    with started([*dropin, *IDLE, "-userns", f"passthrough={path}"]) as process:
        with connected(path) as client, qmp_over(client):
            os.kill(process.pid, number)
        process.wait(DEADLINE_S)
    wait_until(lambda: not os.path.lexists(path), "the end of the socket")


def test_with_daemonize_and_other_configuration_files(dropin: list[str], shared_tmp: Path) -> None:
    path, config = shared_tmp / "raw", shared_tmp / "config"
    config.write_text('[name]\n  guest = "from the file"\n[chardev "c"]\n  backend = "null"\n')
    words = [*IDLE, "-daemonize", "-readconfig", str(config), "-userns", f"passthrough={path}"]
    status, _, err = outcome(dropin, *words)
    assert (status, err) == (0, "")
    with connected(path) as client, qmp_over(client) as qmp:
        assert qmp.execute("query-name") == {"name": "from the file"}
        assert labels(qmp).keys() == {"c", LABEL}
        qmp.execute("quit")
    wait_until(lambda: not os.path.lexists(path), "the end of the socket")


def test_the_path_names_the_vm_and_replaces_an_old_socket(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "vm.raw"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with started([*dropin, *IDLE, "-name", "vm", "-userns", f"passthrough={shared_tmp}/%n.raw"]) as process:
        with connected(path) as client, qmp_over(client) as qmp:
            assert qmp.execute("query-name") == {"name": "vm"}
            assert stat.S_ISSOCK(path.lstat().st_mode)
            qmp.execute("quit")
        assert process.wait(DEADLINE_S) == 0


def test_what_is_no_socket_stays(dropin: list[str], shared_tmp: Path) -> None:
    path = shared_tmp / "file"
    path.write_text("mine")
    status, _, err = outcome(dropin, *IDLE, "-userns", f"passthrough={path}")
    assert status == 1
    assert err.startswith(f"qemu-userns: passthrough {path}: there is a file\n")
    assert path.read_text() == "mine"
