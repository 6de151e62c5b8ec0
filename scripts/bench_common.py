"""What the measurements share: where QEMU and the drop-in are, what machine this is, and the file with the figures."""

import json
import os
import pwd
import struct
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

NAME = "qemu-system-x86_64"
DROPIN = CHECKOUT / ".venv/dropin" / NAME


def find_real() -> str:
    """Return the path of the real QEMU; end where it or the drop-in is missing."""
    paths = (f"{part}/{NAME}" for part in os.get_exec_path())
    real = next((path for path in paths if os.access(path, os.X_OK) and b"qemu-userns drop-in" not in read_head(path)), None)
    if real is None or not DROPIN.exists():
        raise SystemExit(f"bench: no {NAME} in PATH, or no {DROPIN} (scripts/setup makes it)")
    return real


def read_head(path: str) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(256)


def describe_host(real: str) -> list[str]:
    """Return lines about who measures, on what, and what spoils the figures."""
    version = subprocess.run([real, "-version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    about = [
        f"uid {os.geteuid()} ({pwd.getpwuid(os.geteuid()).pw_name})",
        f"Linux {os.uname().release}, {os.cpu_count()} cpus, load {os.getloadavg()[0]:.2f} before; {version}",
    ]
    if stale := find_stale():
        names = ", ".join(str(path.relative_to(CHECKOUT)) for path in stale)
        about.append(f"NOT COMPILED: {names}; a drop-in that needs them compiles them at each start (scripts/setup does it once)")
    return about


def find_stale() -> list[Path]:
    """Return the modules whose compiled form is missing or old, which costs a user who cannot write it each time."""
    stale = []
    for source in (CHECKOUT / "qemu_userns").rglob("*.py"):
        compiled, status = Path(cache_from_source(str(source))), source.stat()
        stamp = struct.pack("<II", int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
        if not compiled.exists() or compiled.read_bytes()[8:16] != stamp:
            stale.append(source)
    return stale


def write_json(json_file: str | None, **figures: object) -> None:
    """Write the figures to a file, if one is asked for."""
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")
