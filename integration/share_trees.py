"""Directories for tests of `qemu-userns share`: make them, and say what is in them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from qemu_userns.cli.share import share as command
from tests.conftest import CHECKOUT

PROGRAM = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from qemu_userns.cli.share import share; "
PROGRAM += "from qemu_userns.hooks.edge import run_at_edge; run_at_edge(lambda: share(sys.argv[1:]))"
OWNER = 70000 if os.geteuid() == 0 else os.geteuid()
GROUP = 70000 if os.geteuid() == 0 else os.getegid()


def share(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", PROGRAM, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def to_mapped(root: Path, model: str) -> list[str | Path]:
    return ["convert", root, "--from", "passthrough", "--to", model, "--owner", f"{OWNER}:{GROUP}"]


def to_passthrough(root: Path, model: str) -> list[str | Path]:
    return ["convert", root, "--from", model, "--to", "passthrough", "--privileged"]


def views(root: Path) -> dict[str, dict[str, Any]]:
    """Return what `share inspect` says, by path."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert command(["inspect", "--json", str(root)]) == 0
    return {entry["path"]: entry for entry in json.loads(told.getvalue())}


def own_views(root: Path) -> dict[str, dict[str, Any]]:
    """Return the same of a share whose owners are any of the caller's ids, for which the program enters a user namespace."""
    done = share("inspect", "--json", root)
    assert (done.returncode, done.stderr) == (0, "")
    return {entry["path"]: entry for entry in json.loads(done.stdout)}


def make_tree(root: Path) -> None:
    """Make one of each; root's has devices and other owners."""
    root.mkdir()
    (root / "d" / "deep").mkdir(parents=True)
    (root / "plain").write_text("text")
    os.link(root / "plain", root / "d" / "plain2")
    (root / "readonly").write_text("ro")
    (root / "setid").write_text("#!")
    (root / "sparse").touch()
    os.truncate(root / "sparse", 1 << 24)
    (root / "link").symlink_to("nowhere/at all")
    os.link(root / "link", root / "d" / "link2", follow_symlinks=False)
    os.mkfifo(root / "d" / "fifo")
    bind_socket(root / "d" / "socket")
    os.setxattr(root / "plain", "user.mine", b"kept")
    if os.geteuid() == 0:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "d" / "disk", stat.S_IFBLK | 0o640, os.makedev(259, 300))
        for number, name in enumerate(("plain", "setid", "link", "d/fifo", "d/deep", "null")):
            os.chown(root / name, 1000 + number, 2000 + number, follow_symlinks=False)
    (root / "setid").chmod(0o6755)
    (root / "readonly").chmod(0o444)
    (root / "d" / "deep").chmod(0o1555)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def snapshot(root: Path) -> dict[str, tuple[Any, ...]]:
    """Return all that a conversion and its way back have to keep, read without the program."""
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = None
        attributes: dict[str, bytes] = {}
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = (path.read_bytes(), status.st_blocks)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            attributes = {key: os.getxattr(path, key) for key in os.listxattr(path)}
        same = first.setdefault(status.st_ino, name)
        found[name] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_rdev,
            status.st_mtime_ns,
            content,
            attributes,
            same,
        )
    return found
