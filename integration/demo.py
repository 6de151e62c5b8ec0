"""The main job, shown: a guest with a mapped and a passthrough 9p share, what it sees, what the host sees, and QEMU's state.

    python3 -m integration.demo [DROPIN]

Run by scripts/demo as an ordinary user. Standard library only; all that it makes is in one temporary folder, which it removes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from integration.vm import RunningGuest, running_guest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DROPIN = Path(__file__).resolve().parent.parent / ".venv/dropin/qemu-system-x86_64"
SHARES = {"mapped": "mapped-xattr", "passthrough": "passthrough"}
COMMANDS = (
    "echo data >file; chown 1000:1000 file; chmod 640 file",
    "mkdir folder; chown 5:60 folder; chmod 1770 folder",
    "cp /bin/busybox set-uid; chmod 4755 set-uid",
    "ln -s /etc/shadow symlink",
    "mknod device c 1 3",
    "echo data >foreign; chown 200000 foreign",
)
NAMES = ("file", "folder", "set-uid", "symlink", "device", "foreign")
CAPABILITIES = {0: "chown", 1: "dac_override", 3: "fowner", 4: "fsetid"}
ATTRIBUTES = (("uid", "%d"), ("gid", "%d"), ("mode", "%o"))


def main() -> int:
    dropin = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else DROPIN
    folder = Path(tempfile.mkdtemp(prefix="qemu-userns-demo-"))
    try:
        demonstrate(dropin, folder)
    finally:
        remove(folder)
    return 0


def demonstrate(dropin: Path, folder: Path) -> None:
    """Run the guest, and print what there is to see."""
    folder.chmod(0o755)
    options = []
    for tag, model in SHARES.items():
        (folder / tag).mkdir()
        options += ["-fsdev", f"local,id={tag},path={folder / tag},security_model={model}"]
        options += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    me = pwd.getpwuid(os.geteuid())
    say(f"starting a guest as {me.pw_name} ({me.pw_uid}:{me.pw_gid}) ...")
    start = time.monotonic()
    with running_guest([str(dropin)], tmp=folder, extra=options) as guest:
        say(f"it has booted after {time.monotonic() - start:.1f} s")
        kernel = guest.check("uname -sr").strip()
        print("\nqemu-system-x86_64 ...")
        for option, value in zip(options[::2], options[1::2], strict=True):
            print(f"    {option} {value.replace(str(folder), '.')}")
        print(f"\nThe guest ({kernel}) has both shares mounted. In each, its root runs:")
        for command in COMMANDS:
            print(f"    {command}")
        for tag, model in SHARES.items():
            print_share(guest, folder / tag, tag, model)
        print_qemu(guest)
        guest.power_off()


def print_share(guest: RunningGuest, path: Path, tag: str, model: str) -> None:
    """Let the guest work in a share, and print both sides of it."""
    work = "\n".join(COMMANDS)
    refusals = guest.check(f"mkdir /{tag}; mount -t 9p -o trans=virtio,version=9p2000.L {tag} /{tag}; cd /{tag}\n{work}\ntrue")
    seen = guest.check(f"cd /{tag}; stat -c '%n|%A %u:%g' {' '.join(NAMES)} 2>/dev/null; true")
    inside = dict(line.split("|") for line in seen.splitlines())
    rows = [("NAME", "IN THE GUEST", "ON THE HOST", "user.virtfs.*" if model == "mapped-xattr" else "")]
    rows += [(name, inside.get(name, "-"), host_side(path / name), attributes(path / name)) for name in NAMES]
    print(f"\nshare {tag}, security_model={model}")
    print_table(rows)
    if refusals:
        print("    refused:  " + "; ".join(line.strip() for line in refusals.splitlines()))


def host_side(path: Path) -> str:
    """Return mode and owner of a file of the host's."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return "-"
    return f"{stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid}"


def attributes(path: Path) -> str:
    """Return what mapped-xattr keeps of a file."""
    found = []
    for name, form in ATTRIBUTES:
        try:
            value = os.getxattr(path, f"user.virtfs.{name}", follow_symlinks=False)
        except OSError:
            continue
        found.append(f"{name}={form % int.from_bytes(value, 'little')}")
    return " ".join(found)


def print_qemu(guest: RunningGuest) -> None:
    """Print maps, namespaces and privileges of the running QEMU beside ours."""
    status = dict(line.split(":\t", 1) for line in (guest.proc / "status").read_text().splitlines() if ":\t" in line)
    print(f"\nQEMU, pid {guest.pid}: {(guest.proc / 'cmdline').read_bytes().split(bytes(1))[0].decode().rpartition('/')[2]}")
    rows = [("", "QEMU", "THIS PROGRAM")]
    for kind in ("uid_map", "gid_map"):
        maps = [describe_maps(proc / kind) for proc in (guest.proc, Path("/proc/self"))]
        for number, (theirs, mine) in enumerate(zip_longest(*maps, fillvalue="")):
            rows.append(("" if number else kind, theirs, mine))
    for name in ("user", "mnt"):
        rows.append((f"{name} namespace", os.readlink(guest.proc / "ns" / name), os.readlink(f"/proc/self/ns/{name}")))
    ours = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    rows.append(("uid on the host", status["Uid"].split()[0], ours["Uid"].split()[0]))
    rows.append(("capabilities", f"{capabilities(status['CapEff'])} (inside only)", capabilities(ours["CapEff"])))
    for label, key in (("no_new_privs", "NoNewPrivs"), ("seccomp", "Seccomp")):
        rows.append((label, status[key], ours[key]))
    print_table(rows)
    mounts = [line.split() for line in (guest.proc / "mountinfo").read_text().splitlines()]
    print("    its root  " + " ".join(sorted(path.name for path in (guest.proc / "root").iterdir())))
    for fields in mounts:
        if fields[4].startswith(str(guest.home.parent)) and Path(fields[4]).name in SHARES:
            print(f"    mount     {Path(fields[4]).name}: {fields[5]}")


def describe_maps(path: Path) -> list[str]:
    return [describe_map(line) for line in path.read_text().splitlines()]


def describe_map(line: str) -> str:
    inside, outside, count = map(int, line.split())
    if count == 1:
        return f"{inside} is {outside}"
    if inside == outside == 0:
        return "all ids are the host's"
    return f"{inside}-{inside + count - 1} are {outside}-{outside + count - 1}"


def capabilities(mask: str) -> str:
    bits = int(mask, 16)
    return " ".join(CAPABILITIES.get(bit, str(bit)) for bit in range(64) if bits >> bit & 1) or "none"


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows in aligned columns."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say(text: str) -> None:
    """Print progress."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def remove(folder: Path) -> None:
    """Remove a folder with files of mapped ids, which only the same map can remove."""
    try:
        shutil.rmtree(folder)
    except PermissionError:
        subprocess.run(["unshare", "--user", "--map-root-user", "--map-auto", "rm", "-rf", str(folder)], check=True, cwd="/")


if __name__ == "__main__":
    sys.exit(main())
