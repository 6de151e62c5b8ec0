"""A host of the test's own: network, /dev/net/tun that everybody may open, /etc, and scripts that say when they run."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_userns.linux import process

if TYPE_CHECKING:
    from collections.abc import Iterator

# A tmpfs lies over /dev/net, and a copy of /etc over /etc: the tests write there.
MAKE = """
set -e
mount --make-rprivate /
mount -t sysfs sysfs /sys
mkdir {folder}/net {folder}/etc
mount -t tmpfs -o mode=755 net {folder}/net
mknod -m 666 {folder}/net/tun c 10 200
mount --move {folder}/net /dev/net
mount -t tmpfs -o mode=755 etc {folder}/etc
cp -a /etc/. {folder}/etc
mkdir -p {folder}/etc/qemu
mount --move {folder}/etc /etc
ip link set lo up
"""


@contextlib.contextmanager
def own_network(folder: Path) -> Iterator[None]:
    """Give this process a network and mount namespace of its own."""
    cwd = Path.cwd()
    kinds = {"mnt": process.CLONE_NEWNS, "net": process.CLONE_NEWNET}
    before = {kind: os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds}
    try:
        for flag in kinds.values():
            process.unshare(flag)
        subprocess.run(["/bin/sh", "-c", MAKE.format(folder=folder)], check=True)
        yield
    finally:
        for kind, fd in before.items():
            process.setns(fd, kinds[kind])
            os.close(fd)
        os.chdir(cwd)


def ip(*words: str) -> str:
    """Run ip(8)."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def interfaces() -> list[str]:
    """Return the interfaces but for lo."""
    return sorted(name for name in os.listdir("/sys/class/net") if name != "lo")


def flags_of(name: str) -> int:
    """Return what a tap was made with, IFF_*."""
    return int(Path(f"/sys/class/net/{name}/tun_flags").read_text(), 16)


class Scripts:
    """Network scripts in a folder, which write down that they run, and whether the interface is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.log.chmod(0o666)

    def make(self, name: str, status: int = 0, path: Path | None = None) -> Path:
        path = path or self.folder / name
        there = 'ip link show "$1" >/dev/null 2>&1 && there=there || there=gone'
        path.write_text(f'#!/bin/sh\n{there}\necho "{name} $# $1 $there" >>{self.log}\nexit {status}\n')
        path.chmod(0o755)
        return path

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def take(self) -> list[str]:
        """Return what was said since the last time."""
        found = self.said()
        self.log.write_text("")
        return found
