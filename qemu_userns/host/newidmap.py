"""Write id maps through newuidmap(1) and newgidmap(1), the set-uid programs of the package uidmap."""

import os

from qemu_userns.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.plan.identity import MapEntry

_HINT = "install the package uidmap (shadow-utils, shadow-uidmap or newuidmap elsewhere)"
_REFUSED_HINT = (
    "the ranges must be the caller's in /etc/subuid and /etc/subgid, the programs set-uid root or with file capabilities, "
    "on a file system without nosuid, and the caller without no_new_privs"
)


def run_newidmap(pid: int, uid_map: "Sequence[MapEntry]", gid_map: "Sequence[MapEntry]") -> None:
    """Write both maps of a process; the two programs run at the same time.

    Should: run outside, as the user who owns the process.
    Must not: name the process by its pid where the program takes a directory fd of /proc/PID (shadow 4.14): a pid may be
        another process's by the time that it is used.

    Raises:
        HostError: a program is missing, or refuses; its own words are the reason.
    """
    directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(directory, True)
    try:
        started = [_start(name, pid, directory, entries) for name, entries in (("newuidmap", uid_map), ("newgidmap", gid_map))]
        failures = [failure for failure in [_finish(*running) for running in started] if failure is not None]
    finally:
        os.close(directory)
    if failures:
        raise failures[0]


def find_program(name: str) -> str:
    """Return the path of a program in PATH.

    Raises:
        HostError: it is not there.
    """
    for directory in os.environ.get("PATH", os.defpath).split(":"):
        path = os.path.join(directory or ".", name)
        if os.access(path, os.X_OK):
            return path
    raise HostError(name, "not found, and the caller has subordinate ids to map", _HINT)


def takes_fd(path: str) -> bool:
    """Say whether the program takes `fd:N` for the process. Asking it costs an exec, so it is told by its text."""
    with open(path, "rb") as file:
        return b"fd:" in file.read()


def _start(name: str, pid: int, directory: int, entries: "Sequence[MapEntry]") -> "tuple[str, int, int]":
    """Start one of the programs; return its name, its pid and an owned fd of its error output."""
    path = find_program(name)
    process = f"fd:{directory}" if takes_fd(path) else str(pid)
    words = [name, process, *(str(number) for entry in entries for number in (entry.inside, entry.outside, entry.count))]
    errors_read, errors_write = os.pipe()
    try:
        child = os.posix_spawn(path, words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, errors_write, 2)])
    except OSError as err:
        os.close(errors_read)
        raise HostError(name, err.strerror or str(err), _HINT) from err
    finally:
        os.close(errors_write)
    return name, child, errors_read


def _finish(name: str, child: int, errors: int) -> "HostError | None":
    """Wait for one of the programs; return what went wrong."""
    with os.fdopen(errors, "rb") as file:
        text = os.fsdecode(file.read(4096)).strip()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        return None
    return HostError("cannot write the id maps", text or f"{name} failed", _REFUSED_HINT)
