"""Find this host's virtiofsd, as libvirt does: by descriptions of vhost-user back ends (QEMU's docs/interop/vhost-user.json)."""

import json
import os

from qemu_userns.host import cache
from qemu_userns.plan.facts import VirtiofsdFact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DESCRIPTIONS = ("/etc/qemu/vhost-user", "/usr/share/qemu/vhost-user")  # of two of one name the first counts
PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/bin/virtiofsd")
_MAX_BYTES = 1 << 16
_TIMEOUT_S = 20


def find_virtiofsd(
    cache_dir: "str | None", descriptions: "Sequence[str]" = DESCRIPTIONS, places: "Sequence[str]" = PLACES
) -> "VirtiofsdFact | None":
    """Find it, and find out which of the two it is; None if there is none.

    Args:
        cache_dir: where what a program says of itself is kept, None for nowhere.
        descriptions: directories of JSON files.
        places: where it lies without one.
    """
    for path in (*_read_descriptions(descriptions), *places):
        if path.startswith("/") and os.access(path, os.X_OK):
            real = os.path.realpath(path)
            return VirtiofsdFact(real, _is_modern(real, cache_dir))
    return None


def _read_descriptions(directories: "Sequence[str]") -> "Iterator[str]":
    """Yield the programs for file systems that descriptions name, in the order of the files' names."""
    files: "dict[str, str]" = {}
    for directory in directories:
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            files.setdefault(name, f"{directory}/{name}")
    for name in sorted(name for name in files if name.endswith(".json")):
        try:
            with open(files[name], "rb") as file:
                found = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("type") == "fs" and isinstance(found.get("binary"), str):
            yield found["binary"]


def _is_modern(path: str, cache_dir: "str | None") -> bool:
    """Say whether a program has the command line of the virtiofsd in Rust, which its older --print-capabilities do not say."""
    status = os.stat(path)
    known = cache.load(cache_dir, "virtiofsd", status)
    if known is None:
        import subprocess

        try:
            done = subprocess.run(
                [path, "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, cwd="/", check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        known = {"modern": ["on"] if b"--shared-dir" in done.stdout + done.stderr else []}
        cache.store(cache_dir, "virtiofsd", status, known)
    return bool(known.get("modern"))
