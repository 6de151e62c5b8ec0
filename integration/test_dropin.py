"""The drop-in is QEMU to whoever starts it: pid, words, streams, exit status, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from integration.talk import (
    IDLE,
    PLAIN,
    REAL,
    UUID,
    Qmp,
    fds_of,
    map_of,
    outcome,
    running,
    started,
    status_of,
    wait_until,
    words_of,
)
from tests.conftest import CHECKOUT

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

OURS = str(CHECKOUT / ".venv/bin/qemu-userns")
# mov dx,0x501; mov al,3; out dx,al; hlt: ends QEMU through isa-debug-exit, whose status is value * 2 + 1.
EXIT_CODE = b"\xba\x01\x05\xb0\x03\xee\xf4"


def test_the_started_pid_is_qemu_under_its_own_names(dropin: list[str]) -> None:
    with running(dropin, "-uuid", UUID, "-name", "my vm") as qemu:
        assert os.readlink(qemu.proc / "exe") == REAL
        assert (qemu.proc / "comm").read_text() == "qemu-system-x86\n"
        words = words_of(qemu.pid)
        assert words[0] == dropin[0]
        assert words[words.index("-uuid") + 1] == UUID
        assert words[words.index("-name") + 1] == "my vm"
        assert qemu.qmp.execute("query-uuid") == {"UUID": UUID}
        assert qemu.qmp.execute("query-name") == {"name": "my vm"}
        assert qemu.quit() == 0


def test_name_process_renames_it_as_it_does_plain_qemu(dropin: list[str]) -> None:
    with running(dropin, "-name", "vm,process=renamed") as qemu:
        assert (qemu.proc / "comm").read_text() == "renamed\n"


def test_qmp_speaks_on_stdin_and_stdout_and_quit_is_status_0(dropin: list[str]) -> None:
    with started([*dropin, *IDLE, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        qmp = Qmp(process.stdout, process.stdin)
        assert qmp.execute("query-status")["status"] == "prelaunch"
        qmp.execute("quit")
        assert process.wait(30) == 0


def test_exit_status_of_a_guest_that_uses_isa_debug_exit(dropin: list[str], shared_tmp: Path) -> None:
    rom = bytearray(b"\xf4" * 0x10000)
    rom[: len(EXIT_CODE)] = EXIT_CODE
    rom[0xFFF0:0xFFF5] = b"\xea\x00\x00\x00\xf0"  # jmp f000:0000
    file = shared_tmp / "exit.rom"
    file.write_bytes(rom)
    options = ["-nodefaults", "-display", "none", "-bios", str(file), "-device", "isa-debug-exit,iobase=0x501"]
    assert outcome(dropin, *options) == (7, "", "")
    assert outcome(PLAIN, *options) == (7, "", "")


@pytest.mark.parametrize(
    "options",
    [
        ["-version"],
        ["--version"],
        ["-help"],
        ["-h"],
        ["-machine", "help"],
        ["-M", "?"],
        ["-device", "help"],
        ["-device", "virtio-9p-pci,help"],
        ["-cpu", "help"],
        ["-accel", "help"],
        ["-netdev", "help"],
        ["-object", "help"],
        ["-chardev", "help"],
        ["-drive", "format=?"],
        ["-L", "help"],
        ["-sandbox", "help"],
        ["-d", "help"],
        ["-trace", "help"],
        ["-invalidoption"],
        ["--"],
        [""],
        ["-drive", "file=/nonexistent.img"],
        ["-drive", "file=/nonexistent.img,format=raw,if=none"],
        ["/nonexistent.img"],
        ["-hda", "/nonexistent directory/with, a comma.img"],
        ["-cdrom", "/nonexistent.iso"],
        ["-blockdev", '{"driver": "file", "filename": "/nonexistent.img", "node-name": "a"}'],
        ["-blockdev", "{malformed"],
        ["-drive", "file=a,file.driver=nosuch"],
        ["-M", "nosuch"],
        ["-cpu", "nosuch"],
        ["-device", "nosuch"],
        ["-device", "virtio-blk-pci,drive=nosuch"],
        ["-netdev", "user"],
        ["-netdev", "nosuch,id=n"],
        ["-chardev", "socket"],
        ["-chardev", "socket,id=c,fd=99"],
        ["-chardev", "socket,id=c,path=/nonexistent.sock"],
        ["-serial", "nosuch"],
        ["-m"],
        ["-m", "nosuch"],
        ["-name", "a", "-kernel"],
        ["-uuid", "nosuch"],
        ["-fsdev", "local,id=f,path=/tmp"],
        ["-virtfs", "local,path=/tmp"],
        ["-add-fd", "fd=99,set=1"],
        ["-set", "nosuch"],
        ["-accel", "nosuch"],
        ["-sandbox", "nosuch"],
    ],
    ids=" ".join,
)
def test_words_on_stdout_and_stderr_and_the_status_are_those_of_plain_qemu(dropin: list[str], options: list[str]) -> None:
    assert outcome(dropin, *options) == outcome(PLAIN, *options)


def test_the_monitor_on_stdio_writes_the_same_bytes(dropin: list[str]) -> None:
    commands = b"info status\ninfo chardev\ninfo version\nnosuch\nquit\n"
    ours, plain = (outcome(words, *IDLE, "-monitor", "stdio", stdin=commands) for words in (dropin, PLAIN))
    assert ours == plain
    assert plain[0] == 0


def test_sigkill_of_the_started_pid_kills_qemu(dropin: list[str]) -> None:
    with running(dropin) as qemu:
        threads = [int(task.name) for task in (qemu.proc / "task").iterdir()]
        os.kill(qemu.pid, signal.SIGKILL)
        assert qemu.process.wait(30) == -signal.SIGKILL
        assert qemu.pid in threads
        for thread in threads:
            wait_until(lambda thread=thread: not Path(f"/proc/{thread}").exists(), f"the end of thread {thread}")  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_status_0_and_qemus_own_words(dropin: list[str], number: signal.Signals) -> None:
    said = []
    for words in (dropin, PLAIN):
        with running(words, stderr=subprocess.PIPE) as qemu:
            os.kill(qemu.pid, number)
            assert qemu.process.wait(30) == 0
            assert qemu.process.stderr
            said.append(qemu.process.stderr.read().decode())
    assert said[0] == said[1]
    assert f"terminating on signal {number:d} from pid {os.getpid()}" in said[0]


def test_a_closed_terminal_stream_stays_qemus(dropin: list[str]) -> None:
    with running(dropin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as qemu:
        targets = fds_of(qemu.pid)
        assert qemu.process.stdout
        assert qemu.process.stderr
        assert targets[0] == "/dev/null"
        for number, pipe in ((1, qemu.process.stdout), (2, qemu.process.stderr)):
            assert targets[number] == os.readlink(f"/proc/self/fd/{pipe.fileno()}")


@pytest.mark.parametrize("how", ["environment", "-userns off", "run --off=on"])
def test_off_executes_plain_qemu_with_the_same_words_and_fds(dropin: list[str], how: str) -> None:
    read, write = os.pipe()
    try:
        words, options, environ = dropin, [], dict(os.environ)
        if how == "environment":
            environ["QEMU_USERNS"] = "off"
        elif how == "-userns off":
            options = ["-userns", "off=on"]
        else:
            words = [OURS, "run", "--off=on", "--", "qemu-system-x86_64"]
        with running(words, *options, pass_fds=(read,), env=environ) as qemu, running(PLAIN, pass_fds=(read,)) as plain:
            assert map_of(qemu.pid, "uid") == map_of(os.getpid(), "uid")
            for namespace in ("user", "mnt"):
                assert os.readlink(qemu.proc / "ns" / namespace) == os.readlink(f"/proc/self/ns/{namespace}")
            assert status_of(qemu.pid)["Seccomp"] == "0"
            assert read in fds_of(qemu.pid)
            assert kinds(qemu.pid) == kinds(plain.pid)
            assert unnumbered(words_of(qemu.pid))[1:] == unnumbered(words_of(plain.pid))[1:]
            assert os.path.basename(words_of(qemu.pid)[0]) == "qemu-system-x86_64"
    finally:
        os.close(read)
        os.close(write)


def kinds(pid: int) -> list[str]:
    """Return what kind of thing each fd is; the numbers of sockets and pipes differ from process to process."""
    return sorted(target.partition("[")[0] for target in fds_of(pid).values())


def unnumbered(words: list[str]) -> list[str]:
    """Return words without the number of the test's own monitor socket."""
    return [word.partition(",fd=")[0] for word in words]


@pytest.mark.parametrize("dashes", [[], ["--"]], ids=["bare", "after --"])
def test_qemu_userns_run_is_the_same_by_hand(dashes: list[str]) -> None:
    with running([OURS, "run", *dashes, "qemu-system-x86_64"], "-uuid", UUID) as qemu:
        assert os.readlink(qemu.proc / "exe") == REAL
        assert words_of(qemu.pid)[0] == "qemu-system-x86_64"
        assert map_of(qemu.pid, "uid") != map_of(os.getpid(), "uid")
        assert qemu.quit() == 0


def test_qemu_userns_run_takes_a_path_to_qemu() -> None:
    with running([OURS, "run", REAL]) as qemu:
        assert words_of(qemu.pid)[0] == REAL
        assert os.readlink(qemu.proc / "ns/user") != os.readlink("/proc/self/ns/user")


def test_fs_host_shows_the_whole_host_but_keeps_the_rest(dropin: list[str], shared_tmp: Path) -> None:
    (shared_tmp / "seen").write_text("")
    with running(dropin, "-userns", "fs=host") as qemu:
        assert os.readlink(qemu.proc / "ns/user") != os.readlink("/proc/self/ns/user")
        assert os.readlink(qemu.proc / "ns/mnt") != os.readlink("/proc/self/ns/mnt")
        assert (status_of(qemu.pid)["CapEff"], status_of(qemu.pid)["NoNewPrivs"]) == ("0" * 16, "1")
        node = {"node-name": "a", "read-only": True}
        qemu.qmp.execute("blockdev-add", driver="file", filename=str(shared_tmp / "seen"), **node)


@pytest.mark.parametrize("name", ["qemu-system-arm", "qemu-system-aarch64", "qemu-system-i386", "qemu-system-x86_64"])
def test_every_architecture_starts(dropin: list[str], name: str) -> None:
    entry = [str(Path(dropin[0]).parent / name)]
    plain = outcome([name], "-version")
    assert outcome(entry, "-version") == plain
    with running(entry) as qemu, running([name]) as other:
        assert qemu.qmp.greeting == other.qmp.greeting
        assert qemu.qmp.execute("query-target") == other.qmp.execute("query-target")
        assert (qemu.proc / "comm").read_text() == (other.proc / "comm").read_text()
        assert map_of(qemu.pid, "uid") != map_of(os.getpid(), "uid")
        assert qemu.quit() == 0
