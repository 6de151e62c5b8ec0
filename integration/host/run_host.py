"""Run a command in test hosts: `python3 -m integration.host.run_host [SUITE...] [-- COMMAND]`; by default all, and their tests.

A host is plain QEMU under software emulation: two processors that have SVM, so that its /dev/kvm works. Its root is thrown
away afterwards. The project in it is what git lists of this checkout.
"""

from __future__ import annotations

import contextlib
import ctypes
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

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKOUT = Path(__file__).resolve().parent.parent.parent
TIME_LIMIT_S = 1200
MEMORY_MIB = 3072
PR_SET_PDEATHSIG = 1


class HostTimeoutError(Exception):
    """The host did not end in time, and has been killed."""


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
        (home / "command").write_text(command)
        pack_project(home / "project.tar")
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
            finally:
                timer.cancel()
                qemu.kill()
        console = (home / "console").read_text(errors="replace") if (home / "console").exists() else ""
        if late.is_set():
            raise HostTimeoutError(f"no end after {timeout_s:.0f} s\n{console[-3000:]}")
        status = (home / "status").read_text().strip() if (home / "status").exists() else ""
        if not status:
            raise BuildError(f"no exit status; QEMU's is {qemu.returncode}\n{console[-3000:]}")
        return int(status)


def qemu_words(host: HostFiles, home: Path) -> list[str]:
    """Return the command line; what the command in the host writes comes out at QEMU's stdout."""
    ports = {"output": "path=/dev/stdout,append=on", "status": f"path={home}/status"}
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-M", "q35", "-accel", "tcg,thread=multi"),
        *("-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
        *("-kernel", str(host.kernel), "-initrd", str(host.initramfs)),
        *("-append", "console=ttyS0 panic=-1 loglevel=4 intel_iommu=on"),
        *("-device", "intel-iommu,intremap=on", "-nic", "none", "-device", "e1000e"),  # a device for vfio
        *("-chardev", f"file,id=console,path={home}/console", "-serial", "chardev:console"),
        *("-drive", f"file={host.root},if=none,id=root,format=raw,snapshot=on", "-device", "virtio-blk-pci,drive=root"),
        *(
            "-drive",
            f"file={home}/project.tar,if=none,id=project,format=raw,readonly=on",
            "-device",
            "virtio-blk-pci,drive=project",
        ),
        *("-fw_cfg", f"name=opt/qemu-userns/command,file={home}/command"),
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


def pack_project(archive: Path) -> None:
    """Write a tar file of what git lists of this checkout, and of the guest that is nested in the host."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, capture_output=True, check=True
    ).stdout.split(b"\0")
    guest = (find_guest() or build_nested_guest()).kernel.parent
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, names):
            if (CHECKOUT / os.fsdecode(name)).exists():
                tar.add(CHECKOUT / os.fsdecode(name), f"project/{os.fsdecode(name)}", filter=belongs_to_root)
        tar.add(guest, f"guest/{guest.name}", filter=belongs_to_root)


def belongs_to_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Let everybody read a file, whatever the checkout's umask."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode |= 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def end_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(words: Sequence[str]) -> int:
    at = words.index("--") if "--" in words else len(words)
    names, command = words[:at], words[at + 1 :]
    if unknown := [name for name in names if name not in SUITES]:
        print(f"host: no such suite: {' '.join(unknown)} (there are {' '.join(SUITES)})", file=sys.stderr)
        return 2
    text = shlex.join(command) if command else "integration/host/run_tests"
    results: dict[str, str] = {}
    for name in names or SUITES:
        start = time.monotonic()
        try:
            status = run_in_host(build_host(SUITES[name]), text, TIME_LIMIT_S)
            results[name] = "passed" if status == 0 else f"FAILED with exit status {status}"
        except (BuildError, HostTimeoutError) as err:
            results[name] = f"FAILED: {err}"
        results[name] += f" ({time.monotonic() - start:.0f} s)"
        print(f"host: {name}: {results[name]}", flush=True)
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
