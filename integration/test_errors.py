"""What a launch says when it cannot be: one line, a hint, status 1, and nothing left on the host."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from integration.talk import (
    DEADLINE_S,
    IDLE,
    PLAIN,
    as_user,
    copy_program,
    fds_of,
    home_of,
    install_copy,
    is_alive,
    outcome,
    running,
    started,
    status_of,
    wait_until,
)
from tests.conftest import CHECKOUT

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

FORM = re.compile(r"qemu-userns: (?P<what>[^\n]+?): (?P<why>[^\n]+)\n(hint: (?P<hint>[^\n]+)\n)?")


def error_of(words: list[str], *options: str, status: int = 1, **run: Any) -> tuple[str, str | None]:
    """Return our error line and hint of a launch that must fail with them and nothing else."""
    found, stdout, stderr = outcome(words, *options, **run)
    assert (found, stdout) == (status, ""), stderr
    match = FORM.fullmatch(stderr)
    assert match, stderr
    return stderr.split("\n")[0], match["hint"]


@pytest.mark.parametrize("option", ["-kernel", "-initrd", "-dtb", "-cdrom", "-pflash", "-readconfig"])
def test_a_missing_file_is_named_with_its_option(dropin: list[str], option: str) -> None:
    if option in ("-cdrom", "-pflash"):
        assert outcome(dropin, *IDLE, option, "/nonexistent/file") == outcome(PLAIN, *IDLE, option, "/nonexistent/file")
    else:
        line, _ = error_of(dropin, *IDLE, option, "/nonexistent/file")
        assert line == f"qemu-userns: {option} /nonexistent/file: No such file or directory"


def test_a_missing_relative_file_has_a_hint_what_it_is_relative_to(dropin: list[str], shared_tmp: Path) -> None:
    line, hint = error_of(dropin, *IDLE, "-kernel", "vmlinuz", cwd=shared_tmp)
    assert line == "qemu-userns: -kernel vmlinuz: No such file or directory"
    assert hint
    assert str(shared_tmp) in hint


def test_a_newline_in_a_name_forges_no_line(dropin: list[str]) -> None:
    line, _ = error_of(dropin, *IDLE, "-kernel", "/nonexistent\nqemu-userns: forged: line\x1b[2J")
    assert "forged" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("option", ["-kernel {}", "-fw_cfg name=opt/a,file={}", "-D {} -d unimp", "-pidfile {}"])
def test_a_file_that_the_caller_may_not_open_is_permission_denied(
    dropin: list[str], unprivileged_user: str, shared_tmp: Path, option: str
) -> None:
    file = Path("/etc/shadow") if os.geteuid() else shared_tmp / "private"
    if not os.geteuid():
        file.write_text("")
        file.chmod(0o600)
    words = as_user(unprivileged_user, *dropin)
    line, hint = error_of(words, *IDLE, *option.format(file).split(), env=home_of(unprivileged_user))
    assert str(file) in line
    assert line.endswith(": Permission denied")
    assert hint


def test_an_unreadable_disk_is_one_line(dropin: list[str], unprivileged_user: str, shared_tmp: Path) -> None:
    file = Path("/etc/shadow") if os.geteuid() else shared_tmp / "private"
    if not os.geteuid():
        file.write_bytes(bytes(65536))
        file.chmod(0o600)
    options = [*IDLE, "-drive", f"file={file},format=raw,if=none"]
    status, stdout, stderr = outcome(as_user(unprivileged_user, *dropin), *options, env=home_of(unprivileged_user))
    assert (status, stdout) == (1, "")
    assert stderr.count("\n") <= 2
    assert str(file) in stderr
    assert "Permission denied" in stderr


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("[name]\n  guest = \n", 2),
        ('[name]\nguest = "a"\n\n# fine\nnonsense\n', 5),
        ('guest = "a"\n', 1),
    ],
)
def test_a_malformed_readconfig_is_named_by_line(dropin: list[str], shared_tmp: Path, text: str, number: int) -> None:
    file = shared_tmp / "vm.cfg"
    file.write_text(text)
    status, stdout, stderr = outcome(dropin, *IDLE, "-readconfig", str(file))
    assert (status, stdout) == (1, "")
    assert f"{file}:{number}: " in stderr
    assert stderr.count("\n") <= 2


def test_a_share_that_is_a_file_is_refused(dropin: list[str], shared_tmp: Path) -> None:
    (shared_tmp / "file").write_text("")
    line, hint = error_of(dropin, *IDLE, "-fsdev", f"local,id=f,path={shared_tmp / 'file'},security_model=none")
    assert line == f"qemu-userns: -fsdev path {shared_tmp / 'file'}: it is a file, and a share is a directory"
    assert hint


def test_a_share_that_is_missing_is_refused(dropin: list[str], shared_tmp: Path) -> None:
    line, _ = error_of(dropin, *IDLE, "-fsdev", f"local,id=f,path={shared_tmp / 'none'},security_model=none")
    assert line == f"qemu-userns: -fsdev path {shared_tmp / 'none'}: No such file or directory"


@pytest.mark.parametrize("value", ["nosuch=on", "fs=nosuch", "pool=1", "idmap=nonsense", "require=nosuch", "sandbox=maybe"])
def test_a_wrong_option_of_ours_says_what_is_right(dropin: list[str], value: str) -> None:
    line, hint = error_of(dropin, *IDLE, "-userns", value)
    assert line.startswith(f"qemu-userns: -userns: {value.partition('=')[0]}: ")
    assert hint


def test_a_qemu_that_is_not_there_is_named(dropin: list[str], shared_tmp: Path) -> None:
    line, hint = error_of(dropin, *IDLE, env={"PATH": str(shared_tmp), "HOME": str(shared_tmp)})
    assert line == "qemu-userns: qemu-system-x86_64: no QEMU of this name in PATH"
    assert hint


def test_a_qemu_that_cannot_be_executed_is_status_126(dropin: list[str], shared_tmp: Path) -> None:
    program = shared_tmp / "qemu-system-x86_64"
    program.write_bytes(b"\x7fELF no program")
    program.chmod(0o755)
    environ = {"PATH": f"{shared_tmp}:/usr/bin", "HOME": str(shared_tmp), "QEMU_USERNS": "off"}
    status, stdout, stderr = outcome(dropin, *IDLE, env=environ)
    assert (status, stdout) == (126, "")
    assert FORM.fullmatch(stderr), stderr


def test_user_namespaces_switched_off_is_an_error_with_the_sysctl(dropin: list[str], unprivileged_user: str) -> None:
    uid = pwd.getpwnam(unprivileged_user).pw_uid
    script = 'for n in user mnt; do echo 0 >/proc/sys/user/max_${n}_namespaces || exit 99; done; exec "$@"'
    inner = ["unshare", "--user", f"--map-user={uid}", f"--map-group={uid}", "--keep-caps", "sh", "-c", script, "sh", *dropin]
    line, hint = error_of(as_user(unprivileged_user, *inner), *IDLE, env=home_of(unprivileged_user))
    assert line == "qemu-userns: cannot make a user namespace: the limit is reached"
    assert hint
    assert "user.max_user_namespaces" in hint


def test_without_a_home_it_starts(dropin: list[str]) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    with running(dropin, env=environ, stderr=subprocess.PIPE) as qemu:
        assert qemu.quit() == 0
        assert qemu.process.stderr
        assert qemu.process.stderr.read() == b""


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=str)
def test_closed_standard_streams_stay_closed_as_under_plain_qemu(dropin: list[str], closed: list[int], shared_tmp: Path) -> None:
    seen = []
    for words in (dropin, PLAIN):
        script = " ".join(f"{fd}>&-" for fd in closed)
        pidfile = shared_tmp / "pid"
        command = ["sh", "-c", f'exec "$@" {script}', "sh", *words, *IDLE, "-pidfile", str(pidfile)]
        process = subprocess.Popen(command)
        try:
            wait_until(lambda: pidfile.read_text().strip() == str(process.pid), "the pidfile")  # noqa: B023
            wait_until(lambda: handles_sigterm(process.pid), "QEMU's signal handlers")  # noqa: B023
            targets = fds_of(process.pid)
            seen.append({fd: targets.get(fd, "").partition("[")[0] for fd in closed})
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: not pidfile.exists(), "the pidfile gone")  # noqa: B023
    assert seen[0] == seen[1]


def handles_sigterm(pid: int) -> bool:
    return bool(int(status_of(pid)["SigCgt"], 16) & 1 << signal.SIGTERM - 1)


def test_an_error_with_stderr_closed_is_still_status_1(dropin: list[str]) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *dropin, *IDLE, "-kernel", "/nonexistent"]
    assert subprocess.run(command, capture_output=True, timeout=DEADLINE_S).returncode == 1


def test_a_pidfile_in_a_folder_that_is_not_there_is_an_error(dropin: list[str]) -> None:
    line, _ = error_of(dropin, *IDLE, "-pidfile", "/nonexistent/pid")
    assert line == "qemu-userns: -pidfile /nonexistent/pid: No such file or directory"


@pytest.mark.parametrize("option", ["-pidfile {}/made", "-qmp unix:{}/made,server=on,wait=off", "-D {}/made -d unimp"])
def test_a_read_only_folder_is_an_error(dropin: list[str], unprivileged_user: str, shared_tmp: Path, option: str) -> None:
    shared_tmp.chmod(0o555)
    words = as_user(unprivileged_user, *dropin)
    line, hint = error_of(words, *IDLE, *option.format(shared_tmp).split(), env=home_of(unprivileged_user))
    assert str(shared_tmp) in line
    assert hint
    assert not list(shared_tmp.iterdir())


@pytest.mark.root
@pytest.mark.parametrize("mount", ["ro", "nr_inodes=1", "ro,nr_inodes=1"])
@pytest.mark.parametrize("option", ["-pidfile {}/made", "-qmp unix:{}/made,server=on,wait=off", "-D {}/made -d unimp"])
def test_a_read_only_or_full_file_system_is_an_error(dropin: list[str], shared_tmp: Path, option: str, mount: str) -> None:
    covered = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {mount} tmpfs {shared_tmp} && exec "$@"', "sh"]
    line, _ = error_of([*covered, *dropin], *IDLE, *option.format(shared_tmp).split())
    assert str(shared_tmp) in line
    assert "Read-only file system" in line or "No space left on device" in line or "Permission denied" in line


def test_an_unwritable_second_file_takes_the_first_back(dropin: list[str], shared_tmp: Path) -> None:
    (shared_tmp / "sub" / "socket").mkdir(parents=True)
    options = ["-pidfile", str(shared_tmp / "pid"), "-qmp", f"unix:{shared_tmp / 'sub/socket'},server=on,wait=off"]
    status, stdout, stderr = outcome(dropin, *IDLE, "-D", str(shared_tmp / "log"), "-d", "unimp", *options)
    assert (status, stdout) == (1, "")
    assert FORM.fullmatch(stderr), stderr
    assert [path.name for path in shared_tmp.iterdir()] == ["sub"]


def test_a_socket_path_that_is_too_long_is_one_line(dropin: list[str], shared_tmp: Path) -> None:
    status, stdout, stderr = outcome(dropin, *IDLE, "-qmp", f"unix:{shared_tmp}/{'x' * 120},server=on,wait=off")
    assert (status, stdout) == (1, "")
    assert stderr.count("\n") <= 2
    assert "Traceback" not in stderr
    assert "internal error" not in stderr


def test_ctrl_c_before_qemu_runs_ends_the_process_by_that_signal(dropin: list[str], shared_tmp: Path) -> None:
    fifo = shared_tmp / "fifo"
    os.mkfifo(fifo)
    heeding = ["env", "--default-signal=INT"]  # ignored in a shell's background jobs
    command = [*heeding, *dropin, *IDLE, "-readconfig", str(fifo)]  # waits for a writer
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: is_opening(process.pid), "it opens the file")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, stdout, stderr) == (-signal.SIGINT, b"", b"")
    assert not is_alive(process.pid)


def is_opening(pid: int) -> bool:
    """Tell whether the launcher waits for the writer of a FIFO that it opens."""
    return Path(f"/proc/{pid}/wchan").read_text() == "wait_for_partner"


@pytest.mark.parametrize("more", [(), ("-pidfile", "pid")])
def test_a_program_that_cannot_be_executed_leaves_nothing(shared_tmp: Path, more: tuple[str, ...]) -> None:
    """Its interpreter is not in the view."""
    shell, program = shared_tmp / "interpreter", shared_tmp / "qemu-system-x86_64"
    shutil.copy("/bin/dash", shell)
    program.write_text(f'#!{shell}\nexec {PLAIN[0]} "$@"\n')
    program.chmod(0o755)
    words = [str(CHECKOUT / ".venv/bin/qemu-userns"), "run", "--", str(program), "-M", "none", "-S", "-display", "none"]
    options = ["-D", "log", "-serial", "file:serial", "-monitor", "none", *more]
    done = subprocess.run([*words, *options], capture_output=True, text=True, timeout=60, cwd=shared_tmp)
    assert done.returncode == 127
    assert done.stderr == (
        f"qemu-userns: {program}: cannot be executed: the interpreter or loader that it names is not in QEMU's view\n"
    )
    wait_until(
        lambda: sorted(path.name for path in shared_tmp.iterdir()) == ["interpreter", "qemu-system-x86_64"], "no file left"
    )


@pytest.mark.parametrize("limit", [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 310, 363, 364])
def test_too_few_open_files_are_named(dropin: list[str], shared_tmp: Path, limit: int) -> None:
    made = [shared_tmp / name for name in ("pid", "qmp")]
    options = ["-pidfile", str(made[0]), "-qmp", f"unix:{made[1]},server=on,wait=off", "-version"]
    status, _, stderr = outcome(["prlimit", f"--nofile={limit}:{limit}", *dropin], *IDLE, *options)
    if status:
        assert limit < 96
        ours = f"qemu-userns: open files: ulimit -n is {limit}\nhint: raise it to at least "
        assert "Too many open files" in stderr or ours in stderr
    wait_until(lambda: not any(path.exists() for path in made), "no file left")


@pytest.mark.parametrize("more", [(), ("-daemonize",)])
def test_without_its_supervisor_qemu_does_not_go_on(shared_tmp: Path, more: tuple[str, ...]) -> None:
    """As where a file of the package is damaged; this QEMU takes its time, for the machine may be busy."""
    copy = copy_program(shared_tmp)
    server = copy / "qemu_userns/supervisor/server.py"
    server.write_text(server.read_text() + "raise RuntimeError('damaged')\n")
    entry = install_copy(copy)
    made = [shared_tmp / name for name in ("pid", "log", "qmp")]
    options = ["-pidfile", str(made[0]), "-D", str(made[1]), "-qmp", f"unix:{made[2]},server=on,wait=off", *more]
    options += ["-M", "q35", "-m", "512", "-mem-prealloc"]
    status, stdout, stderr = outcome([entry], *IDLE, *options)
    assert (status, stdout) == (-signal.SIGKILL, "")
    why = r"internal error: RuntimeError at server.py:\d+: damaged"
    assert re.fullmatch(rf"qemu-userns: the supervisor cannot begin: {why}\n", stderr)
    wait_until(lambda: not any(path.exists() for path in made), "no file left")
    wait_until(lambda: not find_users(str(shared_tmp)), "no process left")


def find_users(folder: str) -> list[Path]:
    """Return the processes that have a path on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in file.read_bytes():
                found.append(file)
    return found
