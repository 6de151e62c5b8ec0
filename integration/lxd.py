"""LXD's part in the life of a VM, replayed: its folders, argv, fds and qemu.conf, the start, and what it looks at afterwards.

    with Instance(SHAPES[0], words, folder) as vm:
        vm.start()
        with vm.connected() as client:
            client.ask("cont")
        vm.kill()

contracts/lxd.md 1 and 2.4. What a machine may lack is left out: AppArmor, /dev/vhost-vsock, and KVM with
its `-cpu host`, which QEMU 7.2 cannot have wherever KVM itself is a guest's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from integration import lxd_conf
from integration.libvirt import DomainGuest
from integration.lxd_client import LIMIT_S, LxdClient, connected_as_lxd
from integration.stand_in import LXD_MAP, Helper, entering, helper
from integration.talk import UUID, connected, is_alive, is_listening, status_of, wait_until
from integration.vm import KERNEL_ARGUMENTS, guest_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from integration.lxd_conf import Section, Shape
    from qemu_userns.plan.identity import MapEntry

FORKLIMITS = Path(__file__).with_name("forklimits.py")
FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")  # LXD's own, OVMF, is not everywhere
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"  # QEMU 7.2's
VHOST_VSOCK = Path("/dev/vhost-vsock")
FIRST_FD = 3
HIGH_FD = 200
CAP_SYS_RESOURCE = 24
POLL_S = 0.25
UNPRIVILEGED = "nobody"  # the first of lxd and nobody that the host has; tests need one that every host has
SETTINGS_BYTES = 256 << 10


class LxdError(Exception):
    """LXD's own error; the text is what its user sees."""


@dataclass(frozen=True)
class Disk:
    """A directory that is a disk device of the instance."""

    name: str
    source: Path
    id_map: Sequence[MapEntry] = LXD_MAP
    readonly: bool = False


class Instance:
    """A VM of LXD's; at the end of the `with` block it is killed, and what LXD has mounted for it is unmounted."""

    def __init__(
        self,
        shape: Shape,
        words: Sequence[str],
        folder: Path,
        *,
        name: str = "v1",
        uuid: str = UUID,
        disks: Sequence[Disk] = (),
        virtiofs: bool = False,
        memlock: bool = True,
        run_with: bool = False,
        stateful: bool = False,
        tpm: bool = False,
        huge_pages: Path | None = None,
    ) -> None:
        """Make the instance's folders; in that of devices a helper looks in its own user namespace.

        Args:
            shape: LXD's version.
            words: what LXD finds by the name of QEMU.
            folder: where LXD's folders are.
            name: the instance's.
            uuid: its volatile.uuid.
            disks: directories to share over 9p.
            virtiofs: have the config drive and the disks as virtio-fs too, or only so where a version has no 9p disks.
            memlock: raise the limit on locked memory, as LXD does outside containers.
            tpm: have one of swtpm's.
            huge_pages: have the memory there.
            stateful: wait for a saved state; QEMU is to stay root then.
            run_with: name the user by -run-with, as LXD 6.5, 5.21.4 and later do from QEMU 9.1 on.
        """
        self.shape, self.name, self.uuid, self.disks = shape, name, uuid, disks
        self._program, self._words = shutil.which(words[0]), words[1:]
        self._tpm, self._virtiofs, self._memlock = tpm, virtiofs, memlock and may_raise_limits()
        self.logs, self.path, self.devices = (folder / part / name for part in ("logs", "virtual-machines", "devices"))
        for made, mode in ((self.logs, 0o700), (self.path, 0o700), (self.devices, 0o711)):
            made.mkdir(parents=True, mode=mode)
        self._run_with, self._stateful, self._huge_pages = run_with, stateful, huge_pages
        self.conf = ""
        self.monitor, self.pid_file = self.logs / "qemu.monitor", self.logs / "qemu.pid"
        self.user = pwd.getpwnam(UNPRIVILEGED)
        self.helpers: list[Helper] = []
        self._fds: list[int] = []
        self._running = contextlib.ExitStack()
        self._make_config_drive()
        self.settings = self._own(self.path / "qemu.nvram")
        self.settings.write_bytes(bytes(SETTINGS_BYTES))
        self.settings.chmod(0o600)

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- the start (1.3 to 1.6) ---------------------------------------------------------------------------------------

    def start(self, *raw: str, env: dict[str, str] | None = None) -> int:
        """Start QEMU; return its pid. `raw` is raw.qemu.

        Raises:
            LxdError: it has not started.
        """
        log = self.logs / "qemu.log"
        if log.exists():
            log.rename(self.logs / "qemu.log.old")
        try:
            sections = list(self._sections())
            conf = self.logs / "qemu.conf"
            self.conf = lxd_conf.build_conf(sections)
            conf.write_text(self.conf)
            conf.chmod(0o640)
            argv = [*self._limits(), *self.qemu_argv(), *raw]
            status = self._run(argv, {**os.environ, **(env or {})})
        finally:
            while self._fds:
                os.close(self._fds.pop())
        for stand_in in self.helpers:
            stand_in.channel.close()
        if status != 0:
            raise LxdError(f"Failed running: {' '.join(argv)}: {self.early_log()}: exit status {status}")
        return self.find_pid()

    def qemu_argv(self) -> list[str]:
        """Return QEMU's command line but for raw.qemu, in LXD's order."""
        debugcon = ["-debugcon", f"file:{self.logs}/edk2.log", "-global", "isa-debugcon.iobase=0x402"]
        user = ["-run-with", f"user={UNPRIVILEGED}"] if self._run_with else ["-runas", UNPRIVILEGED]
        return [
            *(self._program or "", *self._words, "-S", "-name", self.name, "-uuid", self.uuid, "-daemonize"),
            *("-cpu", "max", "-nographic", "-serial", "chardev:console", "-nodefaults"),
            *("-no-user-config", "-sandbox", "on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"),
            *("-readconfig", f"{self.logs}/qemu.conf"),
            *("-spice", f"unix=on,disable-ticketing=on,addr={self.logs}/qemu.spice"),
            *("-pidfile", str(self.pid_file), "-D", f"{self.logs}/qemu.log"),
            *(debugcon if self.shape.debugcon else ()),
            *(("-incoming", "defer") if self._stateful else ()),
            *("-smbios", "type=2,manufacturer=Canonical Ltd.,product=LXD"),
            *(user if os.geteuid() == 0 and not self._stateful else ()),
        ]

    def early_log(self) -> str:
        """Return what was written to stdout and stderr at the start."""
        return (self.logs / "qemu.early.log").read_text()

    def _limits(self) -> list[str]:
        limit = ["limit=memlock:unlimited:unlimited"] if self._memlock else []
        fds = [f"fd={FIRST_FD + index}" for index in range(len(self._fds))]
        return [sys.executable, "-I", "-S", str(FORKLIMITS), *limit, *fds, "--"]

    def _run(self, argv: list[str], env: dict[str, str]) -> int:
        """Start a process in a session of its own, its fds from 3 on; return its exit status when it ends."""
        early, write = str(self.logs / "qemu.early.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        # Not where a number is the target of another one before it is copied.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for fd in self._fds]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, early, write, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_DUP2, fd, FIRST_FD + index) for index, fd in enumerate(high)),
        ]
        try:
            pid = os.posix_spawn(argv[0], argv, env, file_actions=actions, setsid=True)
        finally:
            for fd in high:
                os.close(fd)
        return wait_for_status(pid)

    def _add_fd(self, fd: int) -> int:
        """Own an fd that QEMU gets, and return its number there."""
        self._fds.append(fd)
        return FIRST_FD + len(self._fds) - 1

    def _sections(self) -> Iterator[Section]:
        """Start what QEMU is connected to, open what it gets, and return qemu.conf."""
        yield from lxd_conf.base_sections(self.shape, self.logs, 2, self._huge_pages)
        if VHOST_VSOCK.exists():
            fd = self._add_fd(os.open(VHOST_VSOCK, os.O_RDWR)) if self.shape.hands_vsock_over else None
            yield lxd_conf.vsock(cid=1000, fd=fd)
        yield from lxd_conf.firmware(FIRMWARE, self._add_fd(os.open(self.settings, os.O_RDONLY)))
        drive = self._bind(self.path / "config", "config.mount", readonly=True)
        yield from lxd_conf.config_drive(drive)
        if self._virtiofs:
            yield from lxd_conf.virtiofs("qemu_config-virtiofs", "config", self._serve(drive), 5)
        if self._tpm:
            yield from lxd_conf.tpm("tpm", self._emulate_tpm())
        for port, disk in enumerate(self.disks, 6):
            place = self._bind(disk.source, f"disk.{disk.name}", readonly=disk.readonly)
            if self.shape.proxy:
                stand_in = self._running.enter_context(helper(place, disk.id_map))
                self.helpers.append(stand_in)
                yield from lxd_conf.proxy_share(disk.name, self._add_fd(os.dup(stand_in.fd)), port, readonly=disk.readonly)
            if self._virtiofs:
                tag, address = f"lxd_{disk.name}", self._serve(place, disk.id_map)
                yield from lxd_conf.virtiofs(tag, tag, address, port + len(self.disks))

    def _make_config_drive(self) -> None:
        """Make what the agent in the guest reads (3.1)."""
        drive = self._own(self.path / "config")
        for name, mode in (("install.sh", 0o500), ("agent.conf", 0o400), ("server.key", 0o400)):
            self._own(drive / name).write_text(f"{name} of {self.name}\n")
            (drive / name).chmod(mode)
        drive.chmod(0o500)

    def _own(self, path: Path) -> Path:
        """Make a file or folder, and give it to QEMU's user; its group stays."""
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, self.user.pw_uid, -1)
        return path

    def _bind(self, source: Path, name: str, *, readonly: bool) -> Path:
        """Show a directory among the instance's devices; who is not root has it where it is."""
        if os.geteuid() != 0:
            return source
        place = self.devices / name
        place.mkdir()
        subprocess.run(["mount", "--bind", *(["-o", "ro"] if readonly else []), source, place], check=True)
        return place

    def _serve(self, source: Path, id_map: Sequence[MapEntry] = ()) -> str:
        """Start virtiofsd on a socket, in a user namespace if it has a map; return the address that QEMU gets."""
        path = self.logs / f"virtio-fs.{source.name}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            command = [VIRTIOFSD, f"--fd={listener.fileno()}", "-o", f"source={source}"]
            quiet = subprocess.DEVNULL
            with entering(id_map) as enter:
                daemon = subprocess.Popen(
                    command, pass_fds=[listener.fileno()], stdin=quiet, stdout=quiet, stderr=quiet, preexec_fn=enter
                )
        self._running.callback(path.unlink)
        self._running.callback(daemon.wait)
        self._running.callback(daemon.kill)
        return self._address(path)

    def _emulate_tpm(self) -> str:
        """Start swtpm on a socket; return the address that QEMU gets."""
        state, path = self.path / "tpm", self.logs / "tpm.sock"
        state.mkdir(exist_ok=True)
        words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={path}"]
        emulator = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        self._running.callback(path.unlink, missing_ok=True)
        self._running.callback(emulator.wait)
        self._running.callback(emulator.kill)
        wait_until(lambda: is_listening(path), "swtpm's socket")
        return self._address(path)

    def _address(self, path: Path) -> str:
        """Return what stands for a socket in qemu.conf."""
        return f"/dev/fd/{self._add_fd(os.open(path, os.O_PATH))}" if self.shape.numbers_sockets else str(path)

    # --- what LXD looks at, and the end (2.4) -------------------------------------------------------------------------

    def find_pid(self) -> int:
        """Return the pid in the pidfile.

        Raises:
            LxdError: it is not that of this instance.
        """
        pid = int(self.pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"qemu-system" not in words or self.uuid.encode() not in words:
            raise LxdError("PID does not match the running process")
        return pid

    def status(self) -> str:
        """Return the instance's status as LXD tells it."""
        try:
            with self.connected() as client:
                return "RUNNING" if client.ask("query-status") is not None else "ERROR"
        except OSError:
            try:
                self.find_pid()
            except (OSError, ValueError, LxdError):
                return "STOPPED"
            return "ERROR"

    def connected(self) -> contextlib.AbstractContextManager[LxdClient]:
        """Connect to the monitor, once."""
        return connected_as_lxd(self.monitor, self.shape)

    @contextlib.contextmanager
    def talking_to_guest(self) -> Iterator[DomainGuest]:
        """Connect to the command port of the test guest (`guest_words`)."""
        with connected(self.logs / "command") as channel:
            guest = DomainGuest(channel, self.logs)
            guest.wait_ready()
            yield guest

    def guest_words(self) -> list[str]:
        """Return the raw.qemu that boots the test guest."""
        files = guest_files()
        port = "virtserialport,chardev=command,name=qemu-userns.command,bus=dev-qemu_serial.0"
        return [
            *("-kernel", str(files.kernel), "-initrd", str(files.initramfs)),
            *("-append", f"{KERNEL_ARGUMENTS} qemu_userns_serve"),
            *("-chardev", f"socket,id=command,path={self.logs}/command,server=on,wait=off", "-device", port),
        ]

    def wait_gone(self) -> None:
        """Wait for QEMU's end, looking as often as LXD does, and clean up as it does."""
        try:
            pid = self.find_pid()
        except (OSError, ValueError, LxdError):
            pid = None
        end = time.monotonic() + LIMIT_S
        while pid is not None and is_alive(pid):
            assert time.monotonic() < end, "QEMU has not ended"
            time.sleep(POLL_S)
        self._clean_up()

    def kill(self) -> None:
        """Kill QEMU as a forced stop does when nothing else has helped, by the pid in the pidfile."""
        with contextlib.suppress(OSError, ValueError, LxdError):
            os.kill(self.find_pid(), signal.SIGKILL)
        self.wait_gone()

    def processes(self) -> list[str]:
        """Return the command lines that `pgrep -af UUID` shows."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [words for words in found if self.uuid in words]

    def sockets(self) -> list[Path]:
        """Return what else QEMU leaves at its end: its sockets, and the pidfile."""
        return [path for path in self.logs.iterdir() if path.is_socket() or path == self.pid_file]

    def _clean_up(self) -> None:
        for path in (self.pid_file, self.monitor):
            path.unlink(missing_ok=True)
        self.helpers.clear()
        self._running.close()
        for place in self.devices.iterdir():
            try_unmount(place)
            place.rmdir()


def may_raise_limits() -> bool:
    """Tell whether this process may raise its hard limits: not even root may in some containers."""
    return bool(int(status_of(os.getpid())["CapEff"], 16) >> CAP_SYS_RESOURCE & 1)


def try_unmount(place: Path) -> None:
    """Unmount as LXD does: it tries again where something is busy."""
    command = ["umount", str(place)]
    wait_until(lambda: subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0, f"{place} is free")


def wait_for_status(pid: int) -> int:
    """Wait for a child's end; kill it where it takes too long."""
    end = time.monotonic() + LIMIT_S
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise LxdError(f"no end of the started process after {LIMIT_S} s")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])
