"""Boot the test guest: `run_guest` for one script, `running_guest` for a guest that waits for commands.

    result = run_guest(["qemu-system-x86_64"], "uname -r; exit 7", tmp=tmp_path)
    assert (result.status, result.output) == (7, "6.1.0-56-amd64\n")

    with running_guest([str(dropin)], tmp=tmp_path, extra=[...]) as guest:
        status, output = guest.run("mount -t 9p share /mnt && ls -ln /mnt")
        maps = (guest.proc / "uid_map").read_text()

The scripts run as root in busybox's sh (integration/guest/init). `qemu` is QEMU, or what stands in for it, as a list of
words; it is started in a folder below `tmp`, and all that QEMU writes is in that folder.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from integration.guest.build_guest import GuestFiles, build_guest, find_guest
from tests.machine import ACCELERATOR, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCRIPT_NAME = "opt/qemu-userns/script"
# A panic ends QEMU too: panic=-1 resets, and -no-reboot. The kernel's tests of its ciphers are a fifth of a boot under TCG, the
# protection of its own memory, and the search for what is not protected, an eighth of the rest.
BOOT_S = 120 * PATIENCE
KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 oops=panic cryptomgr.notests no_timer_check rodata=off"


@dataclass(frozen=True)
class GuestResult:
    """What is known once QEMU has ended."""

    status: int | None
    """Exit status of the script in the guest; None if the guest never got so far (see `console` and `stderr`)."""
    output: str
    """What the script wrote to stdout and stderr, in order."""
    console: str
    """The serial console: kernel messages, a panic."""
    qemu_status: int
    """QEMU's exit status; negative: the signal that ended it."""
    stdout: str
    stderr: str


class GuestTimeoutError(Exception):
    """The guest did not finish, or did not answer, in time. QEMU has been killed."""


def run_guest(
    qemu: Sequence[str],
    script: str,
    *,
    tmp: Path,
    extra: Sequence[str] = (),
    timeout_s: float = BOOT_S,
    accel: str = ACCELERATOR,
    memory_mib: int = 256,
    user: str | None = None,
    env: dict[str, str] | None = None,
) -> GuestResult:
    """Boot the guest, run `script` in it, power it off.

    Args:
        qemu: the words before QEMU's options.
        script: what the guest's shell runs.
        tmp: a folder that `user` can pass through.
        extra: more QEMU options, after ours.
        timeout_s: for the whole run; machines are sometimes five times slower than usual.
        accel: the value of -accel.
        memory_mib: the guest's memory.
        user: start QEMU as this user (only root can), with the user's groups.
        env: environment variables to add.

    Raises:
        GuestTimeoutError: it took too long.
    """
    home = run_folder(tmp, user)
    script_file = home / "script"
    script_file.write_text(script)
    script_file.chmod(0o644)
    options = [
        *("-fw_cfg", f"name={SCRIPT_NAME},file={quote(script_file)}"),
        *port_options("output", f"file,path={quote(home / 'output')}"),
        *port_options("status", f"file,path={quote(home / 'status')}"),
    ]
    process = start(qemu, [*machine_options(home, accel, memory_mib), *options, *extra], home, user=user, env=env)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired as err:
        raise GuestTimeoutError(f"no end after {timeout_s} s\n{diagnosis(home)}") from err
    finally:
        process.kill()
        process.wait()
    return result(home, process.returncode)


@contextlib.contextmanager
def running_guest(
    qemu: Sequence[str],
    *,
    tmp: Path,
    extra: Sequence[str] = (),
    timeout_s: float = BOOT_S,
    accel: str = ACCELERATOR,
    memory_mib: int = 256,
    user: str | None = None,
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[RunningGuest]:
    """Boot the guest and wait until it takes commands; power it off at the end, kill it after an exception.

    The command channel is an inherited socket: `-chardev socket,fd=N`. Arguments as for `run_guest`; `timeout_s` bounds the
    boot, and each command by default.
    """
    home = run_folder(tmp, user)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            options = machine_options(home, accel, memory_mib, "qemu_userns_serve") + port_options("command", f"socket,fd={fd}")
            process = start(qemu, [*options, *extra], home, user=user, env=env, pass_fds=(fd, *pass_fds))
        try:
            guest = RunningGuest(process, ours, home, timeout_s)
            guest.wait_ready()
            yield guest
            guest.power_off()
        finally:
            process.kill()
            process.wait()


class RunningGuest:
    """A guest that waits for commands. `process` is what was started: by QEMU's pid being ours, QEMU itself."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, home: Path, timeout_s: float) -> None:
        """Borrow the channel, the other end of which QEMU has."""
        self.process = process
        self.home = home
        self._channel = channel
        self._timeout_s = timeout_s
        self._received = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def proc(self) -> Path:
        """QEMU's folder in /proc."""
        return Path(f"/proc/{self.pid}")

    def run(self, command: str, timeout_s: float | None = None) -> tuple[int, str]:
        """Run shell commands in the guest; return their exit status and what they wrote to stdout and stderr.

        Raises:
            GuestTimeoutError: no answer in time.
            ConnectionError: QEMU has ended.
        """
        self._channel.settimeout(self._timeout_s)
        self._channel.sendall(base64.b64encode(command.encode()) + b"\n")
        status, _, output = self._read_line(timeout_s or self._timeout_s).partition(" ")
        return int(status), base64.b64decode(output).decode(errors="replace")

    def check(self, command: str, timeout_s: float | None = None) -> str:
        """Run shell commands that must succeed, return what they wrote."""
        status, output = self.run(command, timeout_s)
        assert status == 0, f"in the guest: {command}: exit status {status}\n{output}"
        return output

    def wait_ready(self) -> None:
        """Wait until the guest has booted."""
        assert self._read_line(self._timeout_s) == "ready"

    def power_off(self) -> GuestResult:
        """Let the guest power off (unless QEMU has ended already), wait, and return what is left to see."""
        with contextlib.suppress(OSError):
            self._channel.sendall(b"bye\n")
        try:
            self.process.wait(self._timeout_s)
        except subprocess.TimeoutExpired as err:
            raise GuestTimeoutError(f"no power-off after {self._timeout_s} s\n{diagnosis(self.home)}") from err
        return result(self.home, self.process.returncode)

    def _read_line(self, timeout_s: float) -> str:
        end = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            self._channel.settimeout(max(end - time.monotonic(), 0.001))
            try:
                data = self._channel.recv(65536)
            except TimeoutError as err:
                raise GuestTimeoutError(f"no answer after {timeout_s} s\n{diagnosis(self.home)}") from err
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConnectionError(f"QEMU has ended\n{diagnosis(self.home)}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()


# --- the pieces -----------------------------------------------------------------------------------------------------


def guest_files() -> GuestFiles:
    """Return kernel and initramfs, built now if scripts/setup has not."""
    return find_guest() or build_guest()


def machine_options(home: Path, accel: str, memory_mib: int, kernel_arguments: str = "") -> list[str]:
    """Return the options that every guest has."""
    files = guest_files()
    return [
        *("-nodefaults", "-no-reboot", "-display", "none", "-M", "q35", "-accel", accel, "-m", str(memory_mib)),
        *("-kernel", str(files.kernel), "-initrd", str(files.initramfs)),
        *("-append", f"{KERNEL_ARGUMENTS} {kernel_arguments}".rstrip()),
        *("-chardev", f"file,id=console,path={quote(home / 'console')}", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci,id=ports"),
    ]


def port_options(name: str, chardev: str) -> list[str]:
    """Return the options of one named virtio-serial port."""
    backend, _, rest = chardev.partition(",")
    device = f"virtserialport,bus=ports.0,chardev={name},name=qemu-userns.{name}"
    return ["-chardev", f"{backend},id={name},{rest}", "-device", device]


def quote(path: Path) -> str:
    """Return a path as a value in QEMU's key=value syntax."""
    return str(path).replace(",", ",,")


def run_folder(tmp: Path, user: str | None) -> Path:
    """Return a new folder below `tmp` that belongs to `user`."""
    home = Path(tempfile.mkdtemp(dir=tmp, prefix="guest-"))
    home.chmod(0o755)
    if user is not None:
        entry = pwd.getpwnam(user)
        os.chown(home, entry.pw_uid, entry.pw_gid)
    return home


def start(
    qemu: Sequence[str],
    options: Sequence[str],
    home: Path,
    *,
    user: str | None = None,
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start QEMU in `home`, its stdout and stderr in files there: no pipe that a left-over process could keep open."""
    with (home / "qemu.stdout").open("wb") as out, (home / "qemu.stderr").open("wb") as err:
        entry = pwd.getpwnam(user) if user is not None else None
        return subprocess.Popen(
            [*qemu, *options],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=home,
            env={**(user_environment(entry) if entry else os.environ), **(env or {})},
            pass_fds=pass_fds,
            user=entry and entry.pw_uid,
            group=entry and entry.pw_gid,
            extra_groups=entry and os.getgrouplist(entry.pw_name, entry.pw_gid),
        )


def user_environment(entry: pwd.struct_passwd) -> dict[str, str]:
    """Return the environment with what a login sets for that user; the caller's runtime folder is not theirs."""
    kept = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    return {**kept, "HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}


def result(home: Path, qemu_status: int) -> GuestResult:
    status = read(home / "status").strip()
    return GuestResult(
        status=int(status) if status else None,
        output=read(home / "output"),
        console=read(home / "console"),
        qemu_status=qemu_status,
        stdout=read(home / "qemu.stdout"),
        stderr=read(home / "qemu.stderr"),
    )


def diagnosis(home: Path) -> str:
    """Return what a test's reader needs to see of a guest that hangs."""
    return f"stderr:\n{read(home / 'qemu.stderr')[-2000:]}\nconsole:\n{read(home / 'console')[-3000:]}"


def read(path: Path) -> str:
    return path.read_text(errors="replace").replace("\r\n", "\n") if path.exists() else ""
