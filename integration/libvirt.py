"""libvirt's daemon, started by hand in a folder of its own, and a domain that is the test guest.

libvirt = Libvirt(folder)  # the caller's session; or, for root, SystemLibvirt(folder, settings)
with libvirt.serving():
    domain = Domain(libvirt, "vm", emulator)
    domain.define()
    with domain.started() as guest:
        guest.check("true")
libvirt.end_programs()

Everything that libvirt makes is in `folder`.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import os
import select
import shutil
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from integration.talk import connected, is_alive, started, wait_until
from integration.vm import KERNEL_ARGUMENTS, RunningGuest, guest_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIBVIRTD = "/usr/sbin/libvirtd"  # not on every user's PATH
LIMIT_S = 120.0
BOOT_S = 120.0
# More than libvirt makes for what the domain has: hot-plugged devices need a free port each.
FREE_PORTS = 4
HOST_ADDRESS = "10.11.12.1"
NETWORK = ("ip link set lo up", "ip link add br0 up type bridge", f"ip address add {HOST_ADDRESS}/24 dev br0")


class LibvirtError(Exception):
    """virsh has failed; the text is its stderr, and the end of the domain's log."""


class Libvirt:
    """A running daemon of the caller's session, and virsh."""

    uri = "qemu:///session"
    socket_file = "run/libvirt/libvirt-sock"
    pid_files = "run/libvirt/qemu/run"
    qemu_logs = "cache/libvirt/qemu/log"

    def __init__(self, folder: Path) -> None:
        """Make libvirt's folders below `folder`."""
        self.folder = folder
        self.environment = dict(os.environ)
        names = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache"}
        for variable, name in {**names, "XDG_DATA_HOME": "data"}.items():
            path = folder / name
            path.mkdir(mode=0o700)
            self.environment[variable] = str(path)
        self._log, self._pid_file = folder / "libvirtd.log", folder / "libvirtd.pid"
        self._log.touch()
        settings = folder / "libvirtd.conf"
        settings.write_text(f'log_level = 3\nlog_outputs = "3:file:{self._log}"\nhost_uuid = "{uuid.uuid4()}"\n')
        self.daemon = [LIBVIRTD, "-f", str(settings), "--pid-file", str(self._pid_file)]

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text())

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Run the daemon; its domains stay when it goes."""
        socket_file = self.folder / self.socket_file
        with (
            self._log.open("ab") as log,
            started(self.daemon, env=self.environment, cwd="/", stdout=subprocess.DEVNULL, stderr=log) as process,
        ):
            wait_until(lambda: socket_file.is_socket() or process.poll() is not None, "libvirtd's socket")
            assert process.poll() is None, f"libvirtd ended: {self._read(self._log)}"
            try:
                yield
            finally:
                process.terminate()
                process.wait(LIMIT_S)

    def virsh(self, *words: str) -> str:
        """Run virsh, which must succeed; return what it prints.

        Raises:
            LibvirtError: it has not.
        """
        command = ["virsh", "--quiet", "--connect", self.uri, *words]
        done = subprocess.run(command, env=self.environment, cwd="/", capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode != 0:
            raise LibvirtError(f"virsh {' '.join(words)}: {done.stderr.strip()}\n{self.read_last_words()}")
        return done.stdout.strip()

    def read_last_words(self) -> str:
        """Return the end of what QEMU wrote for the newest domain, without the words that it was started with."""
        logs = sorted((self.folder / self.qemu_logs).glob("*.log"), key=lambda path: path.stat().st_mtime)
        lines = [line for path in logs[-1:] for line in self._read(path).splitlines() if not line.endswith("\\")]
        return "\n".join(lines[-10:])

    def own(self, path: Path) -> None:
        """Make a file or a directory of the tester's that of who runs the daemon."""

    def find_pid(self, domain: str) -> int:
        """Return the pid of a domain's QEMU, as libvirt knows it."""
        return int((self.folder / self.pid_files / f"{domain}.pid").read_text())

    def end_programs(self) -> None:
        """End what a daemon leaves behind: the log daemon, and after a failure QEMUs too."""
        pid_files = [self.folder / "run/libvirt/virtlogd.pid", *(self.folder / self.pid_files).glob("*.pid")]
        for path in pid_files:
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                pid = int(path.read_text())
                if str(self.folder) in _environment_of(pid):  # pids are used again
                    os.kill(pid, signal.SIGTERM if path.name == "virtlogd.pid" else signal.SIGKILL)
                    wait_until(lambda pid=pid: not is_alive(pid), f"the end of {path.name}")  # type: ignore[misc]

    def _read(self, path: Path | str) -> str:
        return (self.folder / path).read_text(errors="replace")


class UserLibvirt(Libvirt):
    """A running daemon of an ordinary user's session, on a host of its own, as root makes one: libvirt migrates between hosts
    only.
    """

    def __init__(self, folder: Path, user: str) -> None:
        """Make the folders below `folder`, which exists; the host is called as it is."""
        super().__init__(folder)
        self._user = user
        for path in (folder, *folder.rglob("*")):
            self.own(path)
        self.uri = f"qemu+unix:///session?socket={folder / self.socket_file}"
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        self.daemon = ["unshare", "--uts", "sh", "-c", f'hostname {folder.name}; exec "$@"', "sh", *as_user, *self.daemon]

    def own(self, path: Path) -> None:
        shutil.chown(path, self._user, self._user)


class HostLibvirt(Libvirt):
    """The running system daemon of a test host, with its own folders."""

    uri = "qemu:///system"
    socket_file = "/run/libvirt/libvirt-sock"
    pid_files = "/run/libvirt/qemu"
    qemu_logs = "/var/log/libvirt/qemu"

    def __init__(self, folder: Path) -> None:
        """Take `folder`, which exists, for the domains' files."""
        super().__init__(folder)
        self.environment = dict(os.environ)


class SystemLibvirt(Libvirt):
    """A running system daemon, root's.

    Its folders, which libvirt knows by fixed names, are mounted where it alone sees them. Its network has a bridge, br0, and it
    is a host of its own, for libvirt migrates between hosts only.
    """

    socket_file = "run/libvirt-sock"
    pid_files = "run/qemu"
    qemu_logs = "log/qemu"
    MOUNTS: ClassVar = {
        "etc": "/etc/libvirt",
        "lib": "/var/lib/libvirt",
        "log": "/var/log/libvirt",
        "cache": "/var/cache/libvirt",
        "run": "/run/libvirt",
        "passwd": "/etc/passwd",
        "group": "/etc/group",
    }

    def __init__(self, folder: Path, qemu_conf: str, beside: SystemLibvirt | None = None) -> None:
        """Make the folders below `folder`.

        Args:
            folder: it exists; the host is called as it is.
            qemu_conf: what /etc/libvirt/qemu.conf says.
            beside: the daemon of another host, which is served, on the same network.
        """
        super().__init__(folder)
        for name in ("etc", "lib", "log"):
            (folder / name).mkdir(mode=0o755)
        for name in ("run", "cache"):
            (folder / name).chmod(0o755)
        (folder / "etc/qemu.conf").write_text(f'stdio_handler = "file"\ncgroup_controllers = []\n{qemu_conf}')
        self._places = [] if beside else [place for place in map(Path, self.MOUNTS.values()) if not place.exists()]
        for place in self._places:
            place.mkdir()
        # Debian's libvirt does not begin without this user, whatever the configuration names.
        user = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"
        (folder / "passwd").write_text(Path("/etc/passwd").read_text() + user)
        (folder / "group").write_text(Path("/etc/group").read_text() + "libvirt-qemu:x:64055:\n")
        self.uri = f"qemu+unix:///system?socket={folder / self.socket_file}"
        mounts = [f"mount --bind {folder / name} {place}" for name, place in self.MOUNTS.items()]
        lines = ["set -e", f"hostname {folder.name}", *([] if beside else NETWORK), *mounts, 'exec "$@"']
        network = ["nsenter", f"--net=/proc/{beside.pid}/ns/net"] if beside else ["unshare", "--net"]
        private = ["unshare", "--mount", "--uts", "--propagation", "private"]
        self.daemon = [*network, *private, "sh", "-c", "\n".join(lines), "sh", *self.daemon]

    def end_programs(self) -> None:
        """End what a failure leaves behind, and remove what was made to be mounted on."""
        super().end_programs()
        for place in self._places:
            place.rmdir()


def _environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace") + Path(f"/proc/{pid}/cmdline").read_text(errors="replace")


class Domain:
    """The test guest as a domain; its files are in a folder beside libvirt's."""

    def __init__(self, libvirt: Libvirt, name: str, emulator: str, accelerator: str = "qemu") -> None:
        self.libvirt, self.name, self.emulator, self.accelerator = libvirt, name, emulator, accelerator
        self.home = libvirt.folder / name
        self.home.mkdir()
        libvirt.own(self.home)

    @property
    def pid(self) -> int:
        return self.libvirt.find_pid(self.name)

    @property
    def state(self) -> str:
        return self.virsh("domstate", "--reason")

    @property
    def console(self) -> str:
        path = self.home / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def virsh(self, command: str, *words: str) -> str:
        """Run a virsh command about this domain."""
        return self.libvirt.virsh(command, self.name, *words)

    def migrate(self, libvirt: Libvirt, uri: str) -> Domain:
        """Migrate the running domain; return it as the other daemon has it, paused: a guest that runs would see that nobody
        is connected.

        Its sockets and logs get paths of their own, for who leaves removes its sockets.
        """
        moved = copy.copy(self)
        moved.libvirt, moved.home = libvirt, libvirt.folder / self.name
        moved.home.mkdir()
        libvirt.own(moved.home)
        text = self.virsh("dumpxml", "--migratable")
        for name in ("command", "console"):
            text = text.replace(str(self.home / name), str(moved.home / name))
        options = ["--live", "--suspend", "--persistent", "--unsafe", "--xml", moved._write("domain.xml", text)]
        self.virsh("migrate", libvirt.uri, "--migrateuri", uri, *options)
        return moved

    def define(self, *devices: str) -> None:
        """Tell libvirt about the domain."""
        self.libvirt.virsh("define", self._write("domain.xml", self._describe(devices)))

    def attach(self, device: str) -> None:
        """Plug a device into the running domain."""
        self.virsh("attach-device", self._write("device.xml", device), "--live")

    def detach(self, device: str) -> None:
        """Unplug a device; libvirt waits some seconds for the guest to let go of it."""
        self.virsh("detach-device", self._write("device.xml", device), "--live")

    @contextlib.contextmanager
    def started(self) -> Iterator[DomainGuest]:
        """Start the domain, wait until its guest has booted, and destroy it at the end."""
        self.virsh("start")
        with self.talking() as guest, self.destroyed_at_the_end():
            guest.wait_ready()
            yield guest

    @contextlib.contextmanager
    def destroyed_at_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.name in self.libvirt.virsh("list", "--name").split():
                self.virsh("destroy")

    @contextlib.contextmanager
    def talking(self) -> Iterator[DomainGuest]:
        """Connect to the guest's command port. The guest powers off when it is closed."""
        with connected(self.home / "command") as channel:
            yield DomainGuest(channel, self.home)

    def make_disk(self, name: str, *options: str, size: str = "4M") -> Path:
        """Make an image."""
        path = self.home / name
        subprocess.run(["qemu-img", "create", "-q", *options, path, size], check=True, cwd="/")
        self.libvirt.own(path)
        return path

    def _write(self, name: str, text: str) -> str:
        path = self.home / name
        path.write_text(text)
        return str(path)

    def _describe(self, devices: Sequence[str]) -> str:
        files = guest_files()
        return f"""
            <domain type='{self.accelerator}'>
              <name>{self.name}</name>
              <memory unit='MiB'>256</memory>
              <vcpu>1</vcpu>
              <os>
                <type arch='x86_64' machine='q35'>hvm</type>
                <kernel>{files.kernel}</kernel>
                <initrd>{files.initramfs}</initrd>
                <cmdline>{KERNEL_ARGUMENTS} qemu_userns_serve</cmdline>
              </os>
              <features><acpi/></features>
              <devices>
                <emulator>{self.emulator}</emulator>
                <controller type='pci' index='0' model='pcie-root'/>
                {"<controller type='pci' model='pcie-root-port'/>" * FREE_PORTS}
                <controller type='usb' model='none'/>
                <serial type='file'><source path='{self.home / "console"}'/></serial>
                <channel type='unix'>
                  <source mode='bind' path='{self.home / "command"}'/>
                  <target type='virtio' name='qemu-userns.command'/>
                </channel>
                <memballoon model='none'/>
                {"".join(devices)}
              </devices>
            </domain>"""


class DomainGuest(RunningGuest):
    """A guest whose QEMU is none of our children: it is asked, and ended through libvirt."""

    def __init__(self, channel: socket.socket, home: Path) -> None:
        self.home = home
        self._channel = channel
        self._timeout_s = BOOT_S
        self._received = b""

    def run_and_leave(self, command: str) -> None:
        """Run shell commands that answer nothing: the guest ends."""
        self._channel.sendall(base64.b64encode(command.encode()) + b"\n")


class Console:
    """What is said over a terminal."""

    def __init__(self, terminal: int) -> None:
        """Talk over the terminal's other end, which is borrowed."""
        self._terminal = terminal
        self._heard = b""

    def read(self) -> bytes:
        """Return all that was said so far; waits for more only if there was none."""
        while select.select([self._terminal], [], [], 0)[0]:
            self._heard += os.read(self._terminal, 4096)
        return self._heard

    def write(self, data: bytes) -> None:
        os.write(self._terminal, data)


@contextlib.contextmanager
def virsh_console(domain: Domain, device: str) -> Iterator[Console]:
    """Talk to a device of a domain by `virsh console`, which wants a terminal."""
    ours, theirs = os.openpty()
    command = ["virsh", "--connect", domain.libvirt.uri, "console", domain.name, "--devname", device]
    try:
        console = Console(ours)
        with started(command, stdin=theirs, stdout=theirs, stderr=theirs, env=domain.libvirt.environment):
            wait_until(lambda: b"Escape character" in console.read(), "virsh's console")
            yield console
    finally:
        os.close(ours)
        os.close(theirs)


def disk(path: Path, target: str, form: str = "qcow2", label: str = "") -> str:
    """Return the XML of a disk."""
    return f"""
        <disk type='file' device='disk'>
          <driver name='qemu' type='{form}'/><source file='{path}'>{label}</source>
          <target dev='{target}' bus='virtio'/><serial>{target}</serial>
        </disk>"""
