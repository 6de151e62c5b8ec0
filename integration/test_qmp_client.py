"""`qemu-userns qmp` and `qemu-userns ps`, with QEMU at the other end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.talk import IDLE, PLAIN, UUID, fds_of, is_alive, started, wait_until
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu]

OURS = str(CHECKOUT / ".venv/bin/qemu-userns")
TIMEOUT_S = 30


class Plain:
    """A plain QEMU with two monitors, one for each client that plain QEMU can serve at a time, and a pretty one."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self.process = process
        self.one, self.two, self.pretty = (str(home / name) for name in ("one", "two", "pretty"))


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Plain]:
    words = [*PLAIN, *IDLE]
    for option, name in (("-qmp", "one"), ("-qmp", "two"), ("-qmp-pretty", "pretty")):
        words += [option, f"unix:{tmp_path / name},server=on,wait=off"]
    words += ["-monitor", f"unix:{tmp_path / 'human'},server=on,wait=off"]
    with started(words) as process:
        wait_until(lambda: (tmp_path / "human").exists(), "QEMU's sockets")
        yield Plain(process, tmp_path)


def qmp(
    *words: str, stdin: str = "", pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OURS, "qmp", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        pass_fds=pass_fds,
        env={**os.environ, **(env or {})},
    )


# --- one command ------------------------------------------------------------------------------------------------------


def test_a_reply_is_indented_json_without_our_id(plain: Plain) -> None:
    done = qmp("--socket", plain.one, "query-name")
    assert (done.returncode, done.stdout, done.stderr) == (0, '{\n  "return": {}\n}\n', "")
    done = qmp("--compact", f"--socket={plain.one}", "query-status")
    assert json.loads(done.stdout)["return"]["status"] == "prelaunch"
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("command", ["query-status", "query-qmp-schema"])
def test_a_pretty_monitor_is_understood(plain: Plain, command: str) -> None:
    one, other = qmp("--socket", plain.one, command), qmp("--socket", plain.pretty, command)
    assert (other.returncode, other.stderr) == (0, "")
    assert one.stdout == other.stdout


def test_arguments_make_objects_and_numbers(plain: Plain) -> None:
    words = ["driver=raw", "node-name=n", "file.driver=null-co", "file.size=4096", "read-only=true"]
    assert qmp("--socket", plain.one, "blockdev-add", *words).stderr == ""
    nodes = json.loads(qmp("--socket", plain.one, "query-named-block-nodes").stdout)["return"]
    assert {node["node-name"]: node["image"]["virtual-size"] for node in nodes}["n"] == 4096


def test_an_error_is_a_line_on_stderr_and_status_1(plain: Plain) -> None:
    done = qmp("--socket", plain.one, "device_del", "id=nosuch")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "qemu-userns: device_del: Device 'nosuch' not found (DeviceNotFound)\n"


def test_digits_that_must_be_a_text_get_a_hint(plain: Plain) -> None:
    done = qmp("--socket", plain.one, "device_del", "id=7")
    assert done.returncode == 1
    assert done.stderr.splitlines()[1].startswith("hint: ")
    assert "'7' not found" in qmp("--socket", plain.one, "device_del", 'id="7"').stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"execute": "query-version", "id": [1]}',
        "{'execute': 'query-version', 'id': [1]}",
        '{"exec-oob":"query-version","id":[1]}',
    ],
)
def test_json_is_sent_as_it_is(plain: Plain, text: str) -> None:
    done = qmp("--socket", plain.one, text)
    if "oob" in text:
        assert done.stderr == "qemu-userns: query-version: The command query-version does not support OOB (GenericError)\n"
    else:
        assert json.loads(done.stdout)["id"] == [1]
        assert done.returncode == 0


@pytest.mark.parametrize("text", ['{"execute": "query-version"', '{"execute": "query-version"}{"execute": "quit"}', "{'a: 1}"])
def test_json_that_qemu_would_wait_on_is_refused(plain: Plain, text: str) -> None:
    done = qmp("--socket", plain.one, text)
    assert (done.returncode, done.stdout) == (1, "")
    assert ": not one JSON object\nhint: " in done.stderr


def test_an_error_of_qemus_parser_is_the_reply(plain: Plain) -> None:
    done = qmp("--socket", plain.one, '{"execute": nonsense}')
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-userns: JSON: ")
    assert "(GenericError)" in done.stderr


def test_hmp_prints_text(plain: Plain) -> None:
    done = qmp("--socket", plain.one, "hmp", "info", "status")
    assert (done.returncode, done.stdout, done.stderr) == (0, "VM status: paused (prelaunch)\n", "")
    assert qmp("--socket", plain.one, "hmp", "nosuch").stdout.startswith("unknown command: 'nosuch'")


def test_a_file_descriptor_goes_with_its_command(plain: Plain, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (tmp_path / "file").open() as file:
        fd = file.fileno()
        done = qmp("--pass-fd", str(fd), "--socket", plain.one, "add-fd", "fdset-id=7", "opaque=mine", pass_fds=(fd,))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["return"]["fdset-id"] == 7
    assert str(tmp_path / "file") in fds_of(plain.process.pid).values()


def test_a_closed_file_descriptor_is_an_error(plain: Plain) -> None:
    done = qmp("--pass-fd", "77", "--socket", plain.one, "getfd", "fdname=x")
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-userns: --pass-fd 77: Bad file descriptor\nhint: ")


def test_quit_is_answered_before_qemu_ends(plain: Plain) -> None:
    assert qmp("--socket", plain.one, "quit").stdout == '{\n  "return": {}\n}\n'
    assert plain.process.wait(TIMEOUT_S) == 0
    done = qmp("--socket", plain.one, "query-status")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"qemu-userns: {plain.one}: ")


def test_an_output_that_nobody_reads_is_quiet(plain: Plain) -> None:
    command = [OURS, "qmp", "--socket", plain.one, "query-qmp-schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(TIMEOUT_S) == -signal.SIGPIPE


def test_a_human_monitor_is_no_qmp(plain: Plain, tmp_path: Path) -> None:
    done = qmp("--socket", str(tmp_path / "human"), "query-status")
    assert done.returncode == 1
    assert done.stderr.startswith(f"qemu-userns: {tmp_path}/human: what comes from there is not QMP\nhint: ")


def test_ctrl_c_is_quiet(plain: Plain) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(plain.one)  # plain QEMU serves it, and us only behind it
        with started([OURS, "qmp", "--socket", plain.one, "query-status"], stderr=subprocess.PIPE) as process:
            pid = process.pid
            wait_until(lambda: any("socket:" in to for to in fds_of(pid).values()) and sleeps(pid), "a connection")
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == -signal.SIGINT  # 130 to a shell
            assert process.stderr
            assert process.stderr.read() == b""


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_are_lines_until_the_vm_ends(plain: Plain) -> None:
    with started([OURS, "qmp", "--events", "--socket", plain.one], stdout=subprocess.PIPE) as process:
        assert process.stdout
        for _ in range(1000):  # until the follower has negotiated
            assert qmp("--socket", plain.two, "cont").returncode == 0
            assert qmp("--socket", plain.two, "stop").returncode == 0
            os.set_blocking(process.stdout.fileno(), False)
            if process.stdout.peek(1):  # type: ignore[attr-defined]
                break
        os.set_blocking(process.stdout.fileno(), True)
        assert qmp("--socket", plain.two, "quit").returncode == 0
        events = [json.loads(line)["event"] for line in process.stdout.read().splitlines()]
        assert process.wait(TIMEOUT_S) == 0
    assert "STOP" in events
    assert events[-1] == "SHUTDOWN"


# --- scripts ----------------------------------------------------------------------------------------------------------


def test_a_script_runs_on_after_an_error(plain: Plain) -> None:
    script = 'query-name\n# a comment\n\nnosuch\nhmp info status\n{"execute": "query-name", "id": 1}\nexit\nnosuch2\n'
    done = qmp("--compact", "--socket", plain.one, stdin=script)
    assert done.returncode == 1
    assert done.stderr == "qemu-userns: nosuch: The command nosuch has not been found (CommandNotFound)\n"
    assert done.stdout.splitlines() == ['{"return": {}}', "VM status: paused (prelaunch)", '{"return": {}, "id": 1}']


def test_quit_in_a_script_may_be_meant_for_us(plain: Plain) -> None:
    for line in ("quit", "hmp q", "human-monitor-command command-line=quit"):
        done = qmp("--socket", plain.one, stdin=line)
        assert done.returncode == 1
        assert "it ends the VM" in done.stderr
    assert plain.process.poll() is None
    assert qmp("--socket", plain.one, stdin='{"execute": "quit"}').returncode == 0
    assert plain.process.wait(TIMEOUT_S) == 0


# --- the shell --------------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal with the shell in it."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd, self.process, self.text = fd, process, ""
        self.mark = 0

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def expect(self, text: str) -> str:
        """Wait for a text behind the one expected before; return what is between them."""
        while (found := self.text.find(text, self.mark)) < 0:
            assert self.read(), f"{text!r} is not in {self.text[self.mark :]!r}"
        between = self.text[self.mark : found]
        self.mark = found + len(text)
        return between

    def wait(self) -> int:
        """Read on to the end; return the exit status."""
        while self.read():
            pass
        return self.process.wait(TIMEOUT_S)

    def read(self) -> bool:
        """Take what is on the screen next; return False at the end, or when nothing comes."""
        ready, _, _ = select.select([self.fd], [], [], TIMEOUT_S)
        try:
            data = os.read(self.fd, 65536) if ready else b""
        except OSError:  # the other end is closed
            return False
        self.text += data.decode()
        return bool(data)


def sleeps(pid: int) -> bool:
    """Tell whether a process waits: a signal just before readline's select(2) is seen after the next key only."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


@contextlib.contextmanager
def terminal(*words: str, state: Path) -> Iterator[Terminal]:
    """Start the shell in a terminal of its own, and wait for its prompt."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(state), "INPUTRC": "/dev/null"}
    try:
        with started(
            [OURS, "qmp", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process:
            os.close(theirs)
            theirs = -1
            shell = Terminal(ours, process)
            shell.expect("(qmp ")
            shell.expect(") ")
            yield shell
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_the_shell_runs_commands_and_leaves_the_vm_alone(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        assert "(qmp one) " in shell.text
        shell.type("query-status\r")
        shell.expect('"status": "prelaunch"')
        shell.type("hmp info status\r")
        shell.expect("VM status: paused (prelaunch)\r\n")
        shell.type("nosuch\r")
        shell.expect("qemu-userns: nosuch: The command nosuch has not been found (CommandNotFound)\r\n")
        shell.type('blockdev-add driver=null-co node-name="a b\r')
        shell.expect("not closed")
        shell.type("exit\r")
        assert shell.wait() == 0
    assert is_alive(plain.process.pid)
    history = tmp_path / "qemu-userns/qmp_history"
    assert history.read_text().splitlines()[:2] == ["query-status", "hmp info status"]
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_shell_ends_at_ctrl_d_and_ctrl_c_drops_a_line(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("stop thi")
        shell.expect("stop thi")
        wait_until(lambda: sleeps(shell.process.pid), "select(2)")
        shell.type("\x03")
        shell.expect("(qmp one) ")
        shell.type("query-name\r")
        shell.expect('"return": {}')
        shell.expect("(qmp one) ")
        shell.type("\x04")
        assert shell.wait() == 0
    assert "Traceback" not in shell.text


def test_tab_completes_commands_keys_and_values(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("query-statu\t")
        shell.expect("query-status ")
        shell.type("\r")
        shell.expect('"running": false')
        shell.expect("(qmp one) ")
        shell.type("blockdev-add dri\tnull-c\tnode-n\tn0 read-o\tt\tsiz\t512\r")
        assert "driver=null-co node-name=n0 read-only=true size=512" in shell.expect("\r\n")
        shell.expect('"return": {}')
        shell.expect("(qmp one) ")
        shell.type("blockdev-add driver=raw file.dri\tnull-a\tfile.lat\t")
        shell.expect("file.driver=null-aio file.latency-ns=")
        shell.type("\x15hel\tblockdev-ad\tdriver=nb\t\r")
        shell.expect("server.type")
        shell.expect("inet | unix")
        shell.expect("(qmp one) ")
        shell.type("\x15query-st\t\t\t")  # the first completes to what they have in common
        shell.expect("query-stats-schemas")
        shell.expect("(qmp one) query-stat")


def test_help_lists_arguments_and_commands(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("help set_password protocol=vnc\r")
        told = shell.expect("(qmp one) ")
        assert ["protocol", "required", "vnc", "|", "spice"] in [line.split() for line in told.splitlines()]
        assert ["display", "optional", "str"] in [line.split() for line in told.splitlines()]
        shell.type("help query-name\r")
        shell.expect("takes no arguments")
        shell.type("help nosuch\r")
        shell.expect("qemu-userns: nosuch: no command of this QEMU")
        shell.expect("(qmp one) ")
        shell.type("help\r")
        assert {"blockdev-add", "query-status", "yank"} <= set(shell.expect("(qmp one) ").split())


def test_an_event_leaves_the_line_that_is_typed(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("query-stus")
        shell.expect("query-stus")
        shell.type("\x02\x02")  # two to the left
        shell.expect("\b\b")
        assert qmp("--socket", plain.two, "cont").returncode == 0
        assert shell.expect(" RESUME {}").startswith("\x1bD\x1b[1A\x1b7\r\x1b[1L")  # a line inserted above,
        assert shell.expect("\x1b8\x1b[1B") == ""  # and back to where the cursor was
        shell.type("at\r")
        shell.expect('"status": "running"')
        shell.expect("(qmp one) ")
        assert qmp("--socket", plain.two, "stop").returncode == 0
        shell.expect(" STOP {}")


def test_the_shell_ends_with_the_vm_also_while_a_line_is_typed(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("query-st")
        shell.expect("query-st")
        plain.process.kill()
        shell.expect("one has ended\r\n")
        assert shell.wait() == 0
    assert "Traceback" not in shell.text


def test_quit_is_asked_for(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        shell.type("quit\r")
        shell.expect("quit ends the VM one. Send it? [y/N] ")
        shell.type("\r")
        shell.expect("(qmp one) ")
        shell.type("{'execute': 'quit'}\r")
        shell.expect("Send it? [y/N] ")
        shell.type("n\r")
        shell.expect("(qmp one) ")
        shell.type("quit\r")
        shell.expect("Send it? [y/N] ")
        shell.type("y\r")
        shell.expect("SHUTDOWN")
        shell.expect("one has ended\r\n")
        assert shell.wait() == 0
    assert plain.process.wait(TIMEOUT_S) == 0


def test_a_command_that_takes_long_can_be_left(plain: Plain, tmp_path: Path) -> None:
    with terminal("--socket", plain.one, state=tmp_path) as shell:
        plain.process.send_signal(signal.SIGSTOP)
        shell.type("query-status\r")
        shell.expect("query-status\r\n")
        shell.type("\x03")
        shell.expect("(qmp one) ")
        plain.process.send_signal(signal.SIGCONT)
        shell.type("query-version\r")
        told = shell.expect("(qmp one) ")
        assert '"qemu"' in told
        assert '"status"' not in told


# --- VMs by name ------------------------------------------------------------------------------------------------------


def vms() -> list[dict[str, object]]:
    done = subprocess.run([OURS, "ps", "--json"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    listed = json.loads(done.stdout)
    assert isinstance(listed, list)
    return listed


@contextlib.contextmanager
def vm(dropin: list[str], home: Path, *options: str) -> Iterator[int]:
    """Start a VM through the drop-in, and wait until it is registered; yield its pid."""
    with started([*dropin, *IDLE, "-qmp", f"unix:{home}/qmp,server=on,wait=off", *options], cwd=home) as process:
        wait_until(lambda: process.pid in [entry["pid"] for entry in vms()], f"an entry for {process.pid}")
        yield process.pid


@pytest.mark.userns
@pytest.mark.newuidmap
@pytest.mark.dropin
def test_a_vm_is_found_by_name_uuid_and_pid(dropin: list[str], shared_tmp: Path, tmp_path: Path) -> None:
    with vm(dropin, shared_tmp, "-name", "my vm", "-uuid", UUID) as pid:
        for wanted in ("my vm", UUID, str(pid)):
            done = qmp("--compact", wanted, "query-uuid")
            assert (done.returncode, done.stdout, done.stderr) == (0, f'{{"return": {{"UUID": "{UUID}"}}}}\n', "")
        done = qmp("nosuch", "query-uuid")
        assert done.returncode == 1
        assert done.stderr.startswith("qemu-userns: nosuch: there is no such VM\nhint: VMs of ")
        assert f"{pid} (my vm)" in done.stderr
        with terminal("my vm", state=tmp_path) as shell:
            assert "(qmp my vm) " in shell.text
            assert json.loads(qmp("my vm", "query-name").stdout)["return"] == {"name": "my vm"}  # beside the shell
            shell.type("query-uuid\r")
            shell.expect(UUID)


@pytest.mark.userns
@pytest.mark.newuidmap
@pytest.mark.dropin
def test_two_vms_of_one_name_are_told_apart(dropin: list[str], shared_tmp: Path) -> None:
    for name in ("a", "b"):
        (shared_tmp / name).mkdir()
    with vm(dropin, shared_tmp / "a", "-name", "same") as one, vm(dropin, shared_tmp / "b", "-name", "same") as other:
        done = qmp("same", "query-status")
        assert done.returncode == 1
        assert done.stderr.startswith("qemu-userns: same: 2 VMs are called so\nhint: ")
        assert str(one) in done.stderr
        assert str(other) in done.stderr
        assert qmp(str(one), "query-status").returncode == 0


@pytest.mark.userns
@pytest.mark.newuidmap
@pytest.mark.dropin
def test_ps_lists_a_vm(dropin: list[str], shared_tmp: Path) -> None:
    with vm(dropin, shared_tmp, "-name", "listed", "-uuid", UUID) as pid:
        entry = next(entry for entry in vms() if entry["pid"] == pid)
        assert (entry["name"], entry["uuid"]) == ("listed", UUID)
        assert str(entry["version"])[:2].rstrip(".").isdecimal()
        assert isinstance(entry["uid"], int)
        done = subprocess.run([OURS, "ps"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        titles, *rows = [line.split() for line in done.stdout.splitlines()]
        assert titles == ["PID", "NAME", "UUID", "QEMU", "UID", "MONITORS"]
        row = next(row for row in rows if row[0] == str(pid))
        assert row[1:3] == ["listed", UUID]
        assert row[-1] == f"{shared_tmp}/qmp"
    wait_until(lambda: pid not in [entry["pid"] for entry in vms()], "the entry gone")
