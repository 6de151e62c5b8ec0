"""QEMU that misbehaves: stopped, killed, and one that is not QEMU at all and sends what QEMU never would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.brokered import NEGOTIATE, STATUS, Raw, Served, assert_gone, open_raw, served
from integration.talk import DEADLINE_S, IDLE, fds_of, is_alive, started, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

MIB_KIB = 1024
RUNNING = {"return": {"status": "prelaunch", "singlestep": False, "running": False}}

# Answers what a launch asks a QEMU, else takes the fd of its -chardev and misbehaves as its name says.
FAKE = """#!{python} -IS
import os, re, select, socket, sys, time
NAME = {name!r}
words = sys.argv[1:]
if "-version" in words:
    print("QEMU emulator version 7.2.22 (fake)")
    sys.exit()
if "-help" in words:
    os.execv("/usr/bin/qemu-system-x86_64", ["qemu", "-help"])
if "-L" in words:
    print("/usr/share/qemu")
    sys.exit()
fd = next(int(found[1]) for word in words if (found := re.search(r"fd=(\\d+)", word)))
listener = socket.socket(fileno=fd)
listener.setblocking(True)
GREETING = b'{{"QMP": {{"version": {{}}, "capabilities": ["oob"]}}}}\\r\\n'
OK = b'{{"return": {{}}}}\\r\\n'
EVENT = b'{{"timestamp": {{"seconds": 0, "microseconds": 0}}, "event": "STOP"}}\\r\\n'

def talk(c):
    if NAME == "closes at once":
        return
    if NAME == "no greeting":
        time.sleep(600)
    if NAME == "random bytes":
        c.sendall(os.urandom(100000))
    elif NAME == "endless line":
        while True:
            c.sendall(b"x" * 65536)
    elif NAME == "endless line in a greeting":
        c.sendall(GREETING[:-3])
        while True:
            c.sendall(b" " * 65536)
    elif NAME == "deep":
        c.sendall(GREETING + b'{{"return": ' + b"[" * 100000 + b"]" * 100000 + b"}}\\r\\n")
    elif NAME == "lines":
        c.sendall(b"\\n" * 100000)
    elif NAME == "scalars":
        c.sendall(b"1\\nnull\\n[]\\n")
    elif NAME == "greeting is odd":
        c.sendall(b'{{"QMP": 17}}\\r\\n')
    elif NAME == "half a greeting":
        c.sendall(GREETING[:20])
        return
    else:
        c.sendall(GREETING)
    count = 0
    while True:
        data = c.recv(65536)
        if not data:
            return
        for _ in range(data.count(b"execute")):
            count += 1
            if count == 1 and NAME != "refuses":
                c.sendall(OK)
            elif NAME == "refuses":
                c.sendall(b'{{"error": {{"class": "GenericError", "desc": "no"}}}}\\r\\n')
            elif count < 4:
                desc = b"Capabilities negotiation is already complete, command ignored"
                c.sendall(b'{{"error": {{"class": "CommandNotFound", "desc": "' + desc + b'"}}}}\\r\\n')
            elif NAME == "unknown ids":
                c.sendall(b'{{"return": 1, "id": "nobody"}}\\r\\n' * 3)
            elif NAME == "replies to nothing":
                c.sendall(OK * 1000)
            elif NAME == "greets again":
                c.sendall(GREETING * 1000 + OK)
            elif NAME == "events only":
                while True:
                    c.sendall(EVENT * 1000)
            elif NAME == "many events":
                c.sendall(EVENT * 10000 + OK)
            elif NAME == "half a reply":
                c.sendall(OK[:5])
                return
            elif NAME == "sends fds":
                for _ in range(100):
                    socket.send_fds(c, [EVENT], [0] * 200)
                c.sendall(OK)
            elif NAME == "error without words":
                c.sendall(b'{{"error": 5}}\\r\\n')
            elif NAME == "both":
                c.sendall(b'{{"return": 1, "error": {{}}, "event": "X", "QMP": {{}}}}\\r\\n')
            elif NAME == "event without a name":
                c.sendall(b'{{"event": null}}\\r\\n{{"event": {{}}, "data": 5}}\\r\\n' + OK)
            elif NAME == "not utf-8":
                c.sendall(b'{{"return": "\\xff\\xfe"}}\\r\\n')
            elif NAME == "huge reply":
                c.sendall(b'{{"return": "' + b"x" * (40 << 20) + b'"}}\\r\\n')
            elif NAME == "never reads":
                time.sleep(600)

while True:
    client = listener.accept()[0]
    try:
        talk(client)
    except OSError:
        pass
    client.close()
    if NAME == "closes and listens no more":
        listener.close()
        time.sleep(600)
"""

NAMES = [
    "closes at once",
    "no greeting",
    "random bytes",
    "endless line",
    "endless line in a greeting",
    "deep",
    "lines",
    "scalars",
    "greeting is odd",
    "half a greeting",
    "refuses",
    "unknown ids",
    "replies to nothing",
    "greets again",
    "events only",
    "many events",
    "half a reply",
    "sends fds",
    "error without words",
    "both",
    "event without a name",
    "not utf-8",
    "huge reply",
    "never reads",
]


@pytest.fixture
def vm(dropin: list[str], shared_tmp: Path) -> Iterator[Served]:
    with served(dropin, shared_tmp) as vm:
        yield vm


def fake(folder: Path, name: str) -> str:
    """Return the path of a program that misbehaves."""
    path = folder / "qemu-system-x86_64"
    path.write_text(FAKE.format(python=os.path.realpath(sys.executable), name=name))
    path.chmod(0o755)
    return str(path)


def say(client: Raw, data: bytes) -> None:
    """Send what may be sent in vain."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(data)


@pytest.mark.parametrize("name", NAMES)
def test_a_qemu_that_is_none(dropin: list[str], shared_tmp: Path, name: str) -> None:
    """Clients get a reply, an event or EOF; the supervisor lives, holds a bounded amount, and goes when QEMU does."""
    with served(dropin, shared_tmp, "-userns", f"qemu={fake(shared_tmp, name)}") as vm:
        first = vm.connect()
        supervisor = vm.supervisor
        before = len(fds_of(supervisor))
        with first:
            say(first, NEGOTIATE + STATUS * 3)
            first.socket.settimeout(1)
            got = 0
            try:
                while got < 300_000 and (data := first.socket.recv(65536)):
                    got += len(data)
            except (TimeoutError, ConnectionResetError):
                pass
        with vm.connect() as later:
            say(later, NEGOTIATE + STATUS)
            later.socket.settimeout(0.3)
            try:
                later.socket.recv(65536)
            except (TimeoutError, ConnectionResetError):
                pass
            assert is_alive(supervisor)
            assert vm.memory_kib() < 160 * MIB_KIB
        wait_until(lambda: len(fds_of(supervisor)) <= before + 1, "no fd left behind")
        assert "internal error" not in vm.log, vm.log
        assert len(vm.log) < 20_000
        vm.process.kill()
        vm.process.wait()
        assert_gone(vm, supervisor)


def test_a_stopped_qemu(vm: Served) -> None:
    """Clients are told nothing, others may connect, and all goes on afterwards."""
    with vm.client() as one, vm.client() as two:
        os.kill(vm.pid, signal.SIGSTOP)
        one.send(STATUS * 20)
        two.send(STATUS)
        with vm.connect() as late:
            assert "QMP" in late.read()
            late.send(NEGOTIATE + STATUS)
            assert late.is_silent(1)
            assert one.is_silent(1)
            assert two.is_silent(1)
            gone = vm.connect()
            gone.send(NEGOTIATE + STATUS)
            gone.close()
            os.kill(vm.pid, signal.SIGCONT)
            assert [one.read() for _ in range(20)] == [RUNNING] * 20
            assert two.read() == RUNNING
            assert late.read() == {"return": {}}
            assert late.read() == RUNNING


def test_a_stopped_qemu_and_clients_that_say_a_lot(vm: Served) -> None:
    """What waits for QEMU is bounded too, and takes none of the others down."""
    with vm.client() as one, vm.connect() as oob:
        assert "QMP" in oob.read()
        assert oob.ask(b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}") == {"return": {}}
        before = vm.memory_kib()
        os.kill(vm.pid, signal.SIGSTOP)
        for client, verb in ((one, b"execute"), (oob, b"exec-oob")):
            client.socket.settimeout(1)
            try:
                for _ in range(40):
                    client.send(b"{'%s': 'query-yank', 'id': '" % verb + b"x" * (1 << 20) + b"'}")
            except TimeoutError:
                pass
        assert vm.memory_kib() - before < 64 * MIB_KIB
        one.close()
        oob.close()
        os.kill(vm.pid, signal.SIGKILL)


def test_qemu_is_killed_in_the_middle_of_a_reply(vm: Served) -> None:
    with vm.client() as one, vm.client() as two:
        supervisor = vm.supervisor
        one.send(b"{'execute': 'query-qmp-schema'}" * 60)
        assert one.line()
        vm.process.kill()
        vm.process.wait()
        assert two.rest() == b""
        one.rest()
        assert assert_gone(vm, supervisor) < 1.0


def test_the_supervisor_is_gone_soon(dropin: list[str], shared_tmp: Path) -> None:
    took = []
    for number in range(5):
        with served(dropin, shared_tmp, name=f"q{number}") as vm, vm.client() as client:
            supervisor = vm.supervisor
            client.send(b"{'execute': 'quit'}")
            vm.process.wait(DEADLINE_S)
            took.append(assert_gone(vm, supervisor))
    assert sorted(took)[2] < 0.3, took


def test_quit_tells_of_the_shutdown_before_the_end(vm: Served) -> None:
    with vm.client() as one, vm.client() as two, vm.connect() as three:
        one.send(b"{'execute': 'quit', 'id': 1}")
        messages = [json.loads(line) for line in one.rest().splitlines()]
        assert [message.get("event", message.get("id")) for message in messages] == ["SHUTDOWN", 1]
        assert b'"SHUTDOWN"' in two.rest()
        assert three.rest().count(b"\n") == 1


def test_a_stuck_client_does_not_keep_qemu_or_the_supervisor(vm: Served) -> None:
    with vm.client() as one, vm.client() as stuck:
        supervisor = vm.supervisor
        stuck.send(b"{'execute': 'query-qmp-schema'}" * 20)
        one.send(b"{'execute': 'quit'}")
        vm.process.wait(DEADLINE_S)
        assert assert_gone(vm, supervisor) < 1.0
        assert stuck.rest()


def test_a_daemon(dropin: list[str], shared_tmp: Path) -> None:
    path, pidfile = shared_tmp / "q", shared_tmp / "pid"
    options = ["-daemonize", "-pidfile", str(pidfile), "-qmp", f"unix:{path},server=on,wait=off"]
    with started([*dropin, *IDLE, *options]) as process:
        assert process.wait(DEADLINE_S) == 0
        pid = int(pidfile.read_text())
        try:
            vm = Served(process, path, pid)
            with vm.client() as one, vm.client() as two:
                supervisor = vm.supervisor
                assert one.ask(STATUS) == RUNNING
                os.kill(pid, signal.SIGKILL)
                assert two.rest() == b""
            assert_gone(vm, supervisor)
        finally:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_qemu_waits_for_the_first_client(dropin: list[str], shared_tmp: Path) -> None:
    pidfile = shared_tmp / "pid"
    options = ["-pidfile", str(pidfile), "-qmp", f"unix:{shared_tmp}/q,server=on,wait=on"]
    with started([*dropin, *IDLE, *options], stderr=subprocess.PIPE) as process:
        wait_until((shared_tmp / "q").is_socket, "the socket")
        time.sleep(0.5)  # in which it could go on
        assert process.poll() is None
        with open_raw(shared_tmp / "q") as one, open_raw(shared_tmp / "q") as two:
            assert one.negotiate().ask(STATUS) == RUNNING
            assert two.negotiate().ask(STATUS) == RUNNING
        with open_raw(shared_tmp / "q") as again:
            assert again.negotiate().ask(STATUS) == RUNNING


def test_qemu_that_waits_is_killed(dropin: list[str], shared_tmp: Path) -> None:
    with served(dropin, shared_tmp, "-qmp", f"unix:{shared_tmp}/w,server=on,wait=on") as vm:
        supervisor = vm.supervisor
        vm.process.kill()
        vm.process.wait()
        assert_gone(vm, supervisor)
        assert not (shared_tmp / "w").exists()


@pytest.mark.root
def test_a_run_directory_that_others_may_change(dropin: list[str], shared_tmp: Path) -> None:
    """The VM is not registered; its monitor is served all the same."""
    steps = ("mount -t tmpfs -o mode=755 t /run/qemu-userns", "mkdir /run/qemu-userns/vms", "chmod 0777 /run/qemu-userns/vms")
    script = " && ".join((*steps, 'exec "$@"'))
    hidden = ["unshare", "--mount", "sh", "-c", script, "sh"]
    with served([*hidden, *dropin], shared_tmp) as vm, vm.client() as one, vm.client() as two:
        assert one.ask(STATUS) == RUNNING
        assert two.ask(b"{'execute': 'quit'}") == {"return": {}}
        assert vm.process.wait(DEADLINE_S) == 0
        wait_until(lambda: not vm.path.exists(), "the supervisor's end")
