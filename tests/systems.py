"""The files of a made-up system, for hooks that take `--root`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qemu_userns.cli.hook import hook

if TYPE_CHECKING:
    from pathlib import Path

Tree = dict[str, tuple[int, str | bytes | None]]
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qemu_userns.cli.main import main; main()"
"""Of a Python that has the checkout as its first argument, and then the words of the command line."""
QEMU = "usr/bin/qemu-system-x86_64"
FILES = {
    QEMU: "#!/bin/sh\n",
    "usr/lib/systemd/system/lxd.service": "[Service]\nExecStart=/usr/bin/lxd\n",
    "usr/lib/systemd/system/incus.service": "[Service]\nExecStart=/usr/bin/incusd\n",
    "var/lib/dpkg/status": """\
Package: lxd
Status: install ok installed
Version: 5.0.2-5

Package: qemu-system-common
Status: deinstall ok config-files
Version: 1:7.2
""",
    "etc/environment": 'LANG=C\nPATH="/usr/bin:/bin"\n',
}


def build_system(root: Path) -> Path:
    """Make the files of a system that has LXD, Incus and one QEMU."""
    for name, text in FILES.items():
        write(root / name, text)
    (root / QEMU).chmod(0o755)
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def directory_of(name: str) -> str:
    """Return where a hook puts its entries."""
    return f"/usr/local/lib/qemu-userns/{name}"


def run_hook(root: Path, name: str, *words: str) -> int:
    """Run a hook for a system; return its exit status."""
    return hook([name, "--root", str(root), *words])


def tree(root: Path) -> Tree:
    """Return all that there is."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        content: str | bytes | None = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


def files(root: Path) -> Tree:
    """Return the files, without what dpkg notes for itself, and directories, of which those stay that others may use by then."""
    return {name: entry for name, entry in tree(root).items() if not name.startswith("var/lib/dpkg") and entry[1] is not None}


def diverted(root: Path) -> list[str]:
    """Return the lines of dpkg's list of diversions."""
    path = root / "var/lib/dpkg/diversions"
    return path.read_text().splitlines() if path.exists() else []
