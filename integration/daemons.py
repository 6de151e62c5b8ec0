"""LXD and Incus in the test host: the daemon, with the drop-in first in its PATH or without, and its VMs.

The daemon is started as its unit does it, without systemd. What it needs beyond that is below, with the reason.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from integration.vm import guest_files
from qemu_userns.hooks.apparmor import build_profile
from tests.conftest import dropin_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

START_S = 180
COMMAND_S = 240
POLL_S = 0.2
MEMORY = "256MiB"
BRIDGE = "vmbr0"
LOG = Path("/tmp/daemon.log")
FIRMWARE = Path("/firmware")
SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
NVRAM_BYTES = 65536


@dataclass(frozen=True)
class Kind:
    """How one of the two is called."""

    name: str
    server: str
    client: str
    group: str
    firmware_variable: str
    """Names the folder of the firmware."""
    state: Path
    logs: Path


LXD = Kind("lxd", "/usr/bin/lxd", "lxc", "lxd", "LXD_OVMF_PATH", Path("/var/lib/lxd"), Path("/var/log/lxd"))
INCUS = Kind(
    "incus",
    "/usr/libexec/incus/incusd",
    "incus",
    "incus-admin",
    "INCUS_EDK2_PATH",
    Path("/var/lib/incus"),
    Path("/var/log/incus"),
)


class Daemon:
    """A running daemon. VMs are made with a disk and a network card on a bridge of ours, and start nothing but SeaBIOS."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the client."""
        return subprocess.run(
            [self.kind.client, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S
        )

    def check(self, *words: str) -> str:
        """Run the client, which must succeed; return what it printed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.diagnosis()}"
        return done.stdout

    def state(self, name: str) -> str:
        return self.check("list", name, "--format=csv", "--columns=s").strip()

    @contextlib.contextmanager
    def vm(self, name: str, config: dict[str, str], disks: dict[str, str]) -> Iterator[Vm]:
        """Make a VM, which is removed at the end.

        Args:
            name: of the VM.
            config: its keys beside those that all have.
            disks: devices by name, with the words that define each.
        """
        config = {"security.secureboot": "false", "limits.memory": MEMORY} | config
        options = [word for key, value in config.items() for word in ("--config", f"{key}={value}")]
        self.check("init", "--vm", "--empty", name, "--device", "root,size=64MiB", *options)
        try:
            for disk, words in disks.items():
                self.check("config", "device", "add", name, disk, "disk", *words.split())
            yield Vm(self, name)
        finally:
            self.check("delete", "--force", name)

    def diagnosis(self) -> str:
        """Return what the daemon and the kernel say: AppArmor's denials are in the kernel's log."""
        denied = [line for line in kernel_log() if "DENIED" in line]
        return "\n".join([*LOG.read_text(errors="replace").splitlines()[-8:], *denied[-8:]])


class Vm:
    """A VM of the daemon."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon = daemon
        self.name = name
        self.logs = daemon.kind.logs / name

    def start(self) -> None:
        self.daemon.check("start", self.name)
        assert self.state == "RUNNING"

    @property
    def state(self) -> str:
        return self.daemon.state(self.name)

    @property
    def pid(self) -> int:
        """QEMU's, as the daemon knows it."""
        return int(next(line for line in self.daemon.check("info", self.name).splitlines() if line.startswith("PID:")).split()[1])

    @property
    def proc(self) -> Path:
        return Path(f"/proc/{self.pid}")

    def status(self, key: str) -> str:
        """Return a line of QEMU's status."""
        return next(line for line in (self.proc / "status").read_text().splitlines() if line.startswith(f"{key}:")).split(
            None, 1
        )[1]

    @property
    def early_log(self) -> str:
        return (self.logs / "qemu.early.log").read_text()

    @contextlib.contextmanager
    def guest(self) -> Iterator[Guest]:
        """Talk to the test guest, which the options of `guest_options` boot."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(self.channel))
            channel.settimeout(COMMAND_S)
            with channel.makefile("rw", newline="\n") as file:
                yield Guest(file)

    @property
    def channel(self) -> Path:
        return channel_of(self.daemon.kind, self.name)


class Guest:
    """The test guest, at the other end of its socket (integration/guest/init)."""

    def __init__(self, file: TextIO) -> None:
        """Borrow the channel; wait until the guest has booted."""
        self._file = file
        assert self._file.readline() == "ready\n"

    def check(self, command: str) -> str:
        """Run shell commands that must succeed, return what they wrote."""
        self._file.write(base64.b64encode(command.encode()).decode() + "\n")
        self._file.flush()
        status, _, output = self._file.readline().rstrip("\n").partition(" ")
        text = base64.b64decode(output).decode(errors="replace")
        assert status == "0", f"in the guest: {command}: exit status {status}\n{text}"
        return text


def channel_of(kind: Kind, name: str) -> Path:
    return kind.logs / name / "command.sock"


def guest_options(kind: Kind, name: str) -> str:
    """Return a raw.qemu that boots the test guest, which takes commands from a socket; SeaBIOS starts its kernel."""
    files = guest_files()
    return (
        f"-kernel {files.kernel} -initrd {files.initramfs} -append 'console=ttyS0 panic=-1 qemu_userns_serve'"
        f" -chardev socket,id=command,path={channel_of(kind, name)},server=on,wait=off"
        f" -device virtserialport,bus=dev-qemu_serial.0,chardev=command,name=qemu-userns.command"
    )


@contextlib.contextmanager
def running_daemon(kind: Kind, with_dropin: bool = True, variables: dict[str, str] | None = None) -> Iterator[Daemon]:
    """Start the daemon, and set it up if this is the first time.

    Args:
        kind: which one.
        with_dropin: whether the drop-in is first in its PATH.
        variables: what it gets besides.
    """
    make_firmware()
    path = [*([str(dropin_folder())] if with_dropin else []), os.environ["PATH"]]
    env = {**os.environ, "PATH": ":".join(path), kind.firmware_variable: str(FIRMWARE), **(variables or {})}
    warm_up(env)
    Path("/dev/vsock").chmod(0o666)  # as udev does
    with LOG.open("wb") as log:
        server = subprocess.Popen(
            [kind.server, "--group", kind.group],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        subprocess.run([kind.server, "waitready", f"--timeout={START_S}"], check=True, timeout=START_S + 10)
        daemon = Daemon(kind)
        set_up(daemon)
        assert "qemu" in daemon.check("query", "/1.0"), LOG.read_text()
        yield daemon
    finally:
        subprocess.run([kind.server, "shutdown"], stdin=subprocess.DEVNULL, check=False, timeout=COMMAND_S)
        server.kill()
        server.wait()
        unmount_below(kind.state)


def warm_up(env: dict[str, str]) -> None:
    """Start QEMU once: the daemon's check of its features gives it five seconds, too few here with a cold cache."""
    words = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"]
    talk = '{"execute": "qmp_capabilities"}{"execute": "quit"}'
    subprocess.run(words, env=env, input=talk, text=True, stdout=subprocess.DEVNULL, check=True, timeout=COMMAND_S)


def set_up(daemon: Daemon) -> None:
    """Give the daemon a pool, and a bridge that it does not manage: that takes neither dnsmasq nor a firewall."""
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
    if "default" not in daemon.check("storage", "list", "--format=csv"):
        daemon.check("storage", "create", "default", "dir")
        daemon.check("profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        daemon.check("profile", "device", "add", "default", "eth0", "nic", "nictype=bridged", f"parent={BRIDGE}")


def make_firmware() -> None:
    """Put SeaBIOS where OVMF is sought: OVMF under nested KVM ends the emulator of the test host."""
    FIRMWARE.mkdir(exist_ok=True)
    for name in ("OVMF_CODE.fd", "OVMF_CODE.4MB.fd"):
        shutil.copyfile(SEABIOS, FIRMWARE / name)
    for name in ("OVMF_VARS.fd", "OVMF_VARS.ms.fd", "OVMF_VARS.4MB.fd", "OVMF_VARS.4MB.ms.fd"):
        (FIRMWARE / name).write_bytes(bytes(NVRAM_BYTES))


def apparmor_lines() -> str:
    """Return what raw.apparmor has to allow, as `qemu-userns hook` writes it."""
    return build_profile(str(dropin_folder()), os.path.realpath(sys.executable), "")


def mount_points() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def kernel_log() -> list[str]:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.splitlines()


def wait_gone(pid: int) -> None:
    """Wait until a process has ended."""
    end = time.monotonic() + COMMAND_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, pid
        time.sleep(POLL_S)


def wait_state(vm: Vm, state: str) -> None:
    """Wait until the daemon has noticed."""
    end = time.monotonic() + COMMAND_S
    while vm.state != state:
        assert time.monotonic() < end, (vm.state, vm.daemon.diagnosis())
        time.sleep(POLL_S)


def unmount_below(folder: Path) -> None:
    """Unmount what a daemon has left, which nothing may hinder.

    Bookworm's LXD 5.0.2 leaves the mounts of a VM whose QEMU was killed, with plain QEMU too.
    """
    for point in reversed(mount_points()):
        if point.startswith(f"{folder}/"):
            subprocess.run(["umount", point], check=True)
