"""systemd as process 1 of a pid namespace: its own /run and control groups, and the host's files but for its units.

None of the host's own services must start: they would set up the machine anew.

with booted(folder, units) as systemd:
    systemd.systemctl("start", "some.service")
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from integration.talk import started, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROGRAM = "/usr/lib/systemd/systemd"
LIMIT_S = 120.0
TARGET = "qemu-userns-test.target"
TARGETS = (TARGET, "sysinit.target", "basic.target", "shutdown.target")
_NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup", "--ipc", "--uts")
# A group of its own in the one version 2 hierarchy, wherever the host has that mounted: what systemd makes goes with it.
_OUTER = """\
set -e
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo $$ >"$1/cgroup/$2/cgroup.procs"
shift 2
exec "$@"
"""
_INNER = """\
set -e
for place in /etc/systemd/system /usr/lib/systemd/system /usr/lib/systemd/system-generators /usr/lib/tmpfiles.d /run; do
    mount -t tmpfs -o mode=755 tmpfs "$place"
done
mkdir -p /run/systemd/system /run/lock
cp -r "$1/units/." /run/systemd/system/
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=qemu-userns-test PATH="$PATH" "$2" --system --unit="$3" --log-target=console --show-status=no
"""
_CLEAR = 'mount -t cgroup2 cgroup2 "$1/cgroup" && find "$1/cgroup/$2" -depth -type d -exec rmdir {} +'


@dataclass(frozen=True)
class Systemd:
    """A running one."""

    folder: Path
    pid: int

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program beside it, which must succeed; return what it prints."""
        command = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--cgroup", "--ipc", "--uts", *words]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}\n{self.log[-6000:]}"
        return done.stdout

    def systemctl(self, *words: str) -> str:
        return self.run("systemctl", "--no-pager", *words)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit."""
        lines = self.systemctl("show", unit, *(f"--property={name}" for name in names)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def outer_pid(self, pid: int) -> int:
        """Return the number that a process has for the tester."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found = next((line.split()[1:] for line in status.read_text().splitlines() if line.startswith("NSpid:")), [])
                if found[-1:] == [str(pid)] and len(found) > 1 and self._is_ours(int(found[0])):
                    return int(found[0])
        raise AssertionError(f"there is no process {pid} in there")

    def _is_ours(self, pid: int) -> bool:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


@contextlib.contextmanager
def booted(folder: Path, units: Mapping[str, str]) -> Iterator[Systemd]:
    """Boot it with some units; whatever it runs ends with it."""
    for name in ("units", "cgroup"):
        (folder / name).mkdir()
    for name, text in {**dict.fromkeys(TARGETS, "[Unit]\nDefaultDependencies=no\n"), **units}.items():
        (folder / "units" / name).write_text(text)
    group = folder.name
    inner = ["unshare", *_NAMESPACES, "sh", "-c", _INNER, "sh", str(folder), PROGRAM, TARGET]
    outer = ["unshare", "--mount", "sh", "-c", _OUTER, "sh", str(folder), group, *inner]
    try:
        with (folder / "log").open("wb") as log, started(outer, cwd="/", stdout=log, stderr=log) as process:
            systemd = Systemd(folder, wait_until(lambda: _find_children(process.pid), "systemd")[0])
            wait_until(lambda: systemd.run("systemctl", "is-active", TARGET, check=False) == "active\n", "systemd's target")
            yield systemd
            process.kill()
            process.wait()
    finally:
        clear = ["unshare", "--mount", "sh", "-c", _CLEAR, "sh", str(folder), group]
        wait_until(lambda: subprocess.run(clear, capture_output=True).returncode == 0, "the end of its processes")


def _find_children(pid: int) -> list[int]:
    """Return the child that is systemd by now; a shell has others before."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "systemd\n"]
