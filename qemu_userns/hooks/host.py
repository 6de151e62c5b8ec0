"""What hooks want to know of a host, or of the files of another system."""

import os

from qemu_userns.hooks.steps import read_text
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Options(Record):
    """What the operator says."""

    directory: str  # of the entries, as the host sees it
    root: str  # where the host's files are; "" for this host
    python: str  # our interpreter
    divert: bool = False


def find_package(name: str, root: str) -> "str | None":
    """Return the version of an installed Debian package: dpkg(1), "status".

    Raises:
        ResourceError: dpkg's list cannot be read.
    """
    for paragraph in (read_text(f"{root}/var/lib/dpkg/status", None) or "").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Package") == name and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version")
    return None


def is_apparmor_enabled(root: str) -> bool:
    """Say whether AppArmor confines programs here; of the files of another system, whether it is installed there."""
    if root:
        return os.path.isdir(f"{root}/etc/apparmor.d")
    return (read_text("/sys/module/apparmor/parameters/enabled") or "").startswith("Y")


def find_processes(names: "Sequence[str]") -> "tuple[tuple[int, dict[str, str]], ...]":
    """Return pid and environment of the programs of root's that have one of the names; who cannot read it gets none of it."""
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if os.stat(f"/proc/{pid}").st_uid != 0 or os.path.basename(os.readlink(f"/proc/{pid}/exe")) not in names:
                continue
            with open(f"/proc/{pid}/environ", "rb") as file:
                words = os.fsdecode(file.read()).split("\0")
        except OSError:
            continue  # it has ended, or is none of the caller's business
        found.append((pid, dict(word.split("=", 1) for word in words if "=" in word)))
    return tuple(found)
