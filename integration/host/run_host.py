"""Run a command in test hosts: `python3 -m integration.host.run_host [--limit SECONDS] [SUITE...] [-- COMMAND]`.

By default in all of them, and the tests that selection.py names. A host is plain QEMU under software emulation. It has one
processor, with SVM, so that its /dev/kvm works: with two threads the emulation of QEMU 7.2 loses at times what Linux patches in
its own code (panics in __schedule), and with two processors in one thread no nested guest gets through its boot. Its root is
thrown away afterwards. The project in it is what git lists of this checkout. A signal that asks to end (SIGINT, SIGTERM,
SIGHUP) ends the host too, and leaves nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from integration.guest.build_guest import BuildError, find_guest
from integration.guest.build_guest import build_guest as build_nested_guest
from integration.host.build_host import SUITES, HostFiles, build_host
from integration.host.selection import SELECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

CHECKOUT = Path(__file__).resolve().parent.parent.parent
MEMORY_MIB = 3072
CONSOLE_LINES = 100  # a panic of the kernel has some 80
PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class HostTimeoutError(Exception):
    """The host did not end in time, and has been killed."""


class InterruptedBySignal(BaseException):
    """This process is asked to end; the argument is the signal."""


def run_in_host(host: HostFiles, command: str, timeout_s: float) -> int:
    """Boot a host and run a shell command in it; its output goes to stdout as it comes.

    Returns:
        The command's exit status.

    Raises:
        HostTimeoutError: it took too long.
        BuildError: the host did not get as far as to the command's end.
    """
    with tempfile.TemporaryDirectory(prefix="qemu-userns-host-") as folder:
        home = Path(folder)
        pack_project(home / "project.tar", command)
        return run_machine(host, home, timeout_s)


def run_machine(host: HostFiles, home: Path, timeout_s: float) -> int:
    """Do as `run_in_host` does, with the project that `home` has."""
    with subprocess.Popen(
        qemu_words(host, home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=end_with_us
    ) as qemu:
        assert qemu.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            qemu.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            while data := os.read(qemu.stdout.fileno(), 65536):
                sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
                sys.stdout.flush()
            qemu.wait()
        except BaseException:
            print(f"\nhost: interrupted; its console ended so:\n{console_end(home)}", flush=True)
            raise
        finally:
            timer.cancel()
            qemu.kill()
    if late.is_set():
        raise HostTimeoutError(f"no end after {timeout_s:.0f} s; its console ended so:\n{console_end(home)}")
    status = (home / "status").read_text().strip() if (home / "status").exists() else ""
    if not status:
        raise BuildError(f"no exit status; QEMU's is {qemu.returncode}, and the console ended so:\n{console_end(home)}")
    return int(status)


def console_end(home: Path) -> str:
    """Return the last lines of a host's console."""
    console = home / "console"
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    return "\n".join(lines[-CONSOLE_LINES:])


def qemu_words(host: HostFiles, home: Path) -> list[str]:
    """Return the command line; what the command in the host writes comes out at QEMU's stdout."""
    ports = {"output": "path=/dev/stdout,append=on", "status": f"path={home}/status"}
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-M", "q35", "-accel", "tcg,thread=single"),
        *("-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-kernel", str(host.kernel), "-initrd", str(host.initramfs)),
        *("-append", "console=ttyS0 panic=-1 loglevel=4 intel_iommu=on"),
        *("-device", "intel-iommu,intremap=on", "-netdev", "user,id=vfio,restrict=on", "-device", "e1000e,netdev=vfio"),
        # What is handed on to guests: a USB device, a parallel port, a CD. (With a TPM, SeaBIOS leaves the kernel no ACPI.)
        *("-device", "qemu-xhci", "-device", "usb-tablet"),
        *("-chardev", "null,id=parallel", "-device", "isa-parallel,chardev=parallel"),
        *("-drive", f"file={home}/project.tar,if=none,id=cd,format=raw,readonly=on", "-device", "ide-cd,drive=cd"),
        *("-chardev", f"file,id=console,path={home}/console", "-serial", "chardev:console"),
        *("-drive", f"file={host.root},if=none,id=root,format=raw,snapshot=on", "-device", "virtio-blk-pci,drive=root"),
        *(
            "-drive",
            f"file={home}/project.tar,if=none,id=project,format=raw,readonly=on",
            "-device",
            "virtio-blk-pci,drive=project",
        ),
        *("-device", "virtio-serial-pci,id=ports"),
        *(
            word
            for name, chardev in ports.items()
            for word in (
                *("-chardev", f"file,id={name},{chardev}"),
                *("-device", f"virtserialport,bus=ports.0,chardev={name},name=qemu-userns.{name}"),
            )
        ),
    ]


def pack_project(archive: Path, command: str) -> None:
    """Write a tar file of what git lists of this checkout, of the guest that is nested in the host, and of a shell command."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, check=True
    ).stdout.split(b"\0")
    guest = (find_guest() or build_nested_guest()).kernel.parent
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, names):
            if (CHECKOUT / os.fsdecode(name)).exists():
                tar.add(CHECKOUT / os.fsdecode(name), f"project/{os.fsdecode(name)}", filter=belongs_to_root)
        tar.add(guest, f"guest/{guest.name}", filter=belongs_to_root)
        member = tarfile.TarInfo("command")
        member.size = len(os.fsencode(command))
        tar.addfile(member, io.BytesIO(os.fsencode(command)))


def belongs_to_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Let everybody read a file, whatever the checkout's umask."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode |= 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def end_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def parse_words(words: Sequence[str]) -> argparse.Namespace:
    """Return `suites`, `limit` in seconds or None, and `command`, which is empty for the selected tests."""
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="scripts/test --host", usage="%(prog)s [--limit SECONDS] [SUITE...] [-- COMMAND...]")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="instead of the selection's own")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; all by default")
    found = parser.parse_args(words[:at])
    if unknown := [name for name in found.suites if name not in SUITES]:
        parser.error(f"no such suite: {' '.join(unknown)} (there are {' '.join(SUITES)})")
    found.command = list(words[at + 1 :])
    return found


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Let everything that has something to undo do so."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise InterruptedBySignal(number)


def main(words: Sequence[str]) -> int:
    """Run what the words say; a signal becomes the exit status that a shell gives it."""
    asked = parse_words(words)
    for number in ENDING:  # also where a shell in the background has SIGINT ignored
        signal.signal(number, interrupt)
    results: dict[str, str] = {}
    try:
        for name in asked.suites or SUITES:
            selection, start = SELECTIONS[name], time.monotonic()
            command = asked.command or ["integration/host/run_tests", *selection.tests]
            try:
                status = run_in_host(build_host(SUITES[name]), shlex.join(command), asked.limit or selection.limit_s)
                results[name] = "passed" if status == 0 else f"FAILED with exit status {status}"
            except (BuildError, HostTimeoutError) as err:
                results[name] = f"FAILED: {err}"
            results[name] += f" ({time.monotonic() - start:.0f} s)"
            print(f"host: {name}: {results[name]}", flush=True)
    except InterruptedBySignal as err:
        return 128 + int(err.args[0])
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
