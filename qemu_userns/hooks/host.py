"""What hooks want to know of a host, or of the files of another system."""

import os

from qemu_userns.hooks.files import read_text
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Options(Record):
    """What a hook is to do."""

    name: str  # of the hook
    directory: str  # of the entries, as the host sees it
    root: str  # where the host's files are; "" for this host
    python: str  # our interpreter
    divert: bool = False


class Process(Record):
    """A running program."""

    pid: int
    environ: "dict[str, str] | None"  # None for who may not read it


def find_package(name: str, root: str) -> "str | None":
    """Return the version of an installed Debian package: dpkg(1), "status".

    Raises:
        ResourceError: dpkg's list cannot be read.
    """
    for paragraph in (read_text(f"{root}/var/lib/dpkg/status") or "").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Package") == name and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version")
    return None


def find_snap(directory: str, root: str) -> "str | None":
    """Return the version and the revision of an installed snap, None if there is none.

    Args:
        directory: /snap/NAME.
        root: where the host's files are; "" for this host.

    Raises:
        ResourceError: what describes it cannot be read.
    """
    current = f"{root}{directory}/current"
    if not os.path.lexists(current):
        return None
    lines = (read_text(f"{current}/meta/snap.yaml") or "").splitlines()
    version = next(
        (line.partition(":")[2].strip().strip("\"'") for line in lines if line.startswith("version:")), "of unknown version"
    )
    return f"{version}, revision {os.path.basename(os.path.realpath(current))}"


def find_processes(names: "Sequence[str]", uid: int = 0) -> "tuple[Process, ...]":
    """Return the daemons of a user's that have one of the names.

    A daemon's first word, if any, is an option: `lxd forkproxy ...` is a helper of it. `[lxc monitor] ...` runs the same program
    under another name. What was replaced since it was started is still the daemon: proc(5), /proc/PID/exe.
    """
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if os.stat(f"/proc/{pid}").st_uid != uid:
                continue
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = os.fsdecode(file.read()).split("\0")
            called = words[0].rpartition("/")[2]
            if called not in names or words[1][:1] not in ("", "-") or not _runs(pid, names):
                continue
        except (OSError, IndexError):
            continue  # it has ended, or has no command line
        found.append(Process(pid, _read_environ(pid)))
    return tuple(found)


def _runs(pid: int, names: "Sequence[str]") -> bool:
    """Say whether a process runs a program of one of the names, as far as the caller may know; raises OSError."""
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")) in names
    except PermissionError:
        return True


def _read_environ(pid: int) -> "dict[str, str] | None":
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = os.fsdecode(file.read()).split("\0")
    except OSError:
        return None
    return dict(word.split("=", 1) for word in words if "=" in word)
