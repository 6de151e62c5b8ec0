"""The run directory: which VMs have a supervisor, with all that the next one would have to know.

For each VM DIR/vms/PID.json, written atomically; PID.qmp, our own socket on its monitor; PID.log; and PID.lock, whose lock the
supervisor holds. DIR is /run/qemu-userns for root, else /run/user/UID/qemu-userns, or /tmp/qemu-userns-UID where the host has no
such directory.
"""

import fcntl
import json
import os
import stat
import struct

from qemu_userns.errors import HostError
from qemu_userns.host.identity import RUN_DIR
from qemu_userns.host.leftovers import remove
from qemu_userns.record import Record, from_plain, to_plain
from qemu_userns.supervisor import handed, state
from qemu_userns.supervisor.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qemu_userns.host.leftovers import Leftover
    from qemu_userns.supervisor.handed import Held

_FLOCK = "hhqqi"  # struct flock of fcntl(2)
_STATE_FIELD, _THREADS_FIELD, _START_FIELD = 2, 19, 21  # of /proc/PID/stat, counted from 0: proc(5)


class Entry(Record):
    """What is known of a VM."""

    state: State
    supervisor: int  # pid
    held: "tuple[Held, ...]" = ()  # what its objects were given while it ran

    @property
    def leftovers(self) -> "tuple[Leftover, ...]":
        """What was made on the host for it, at its launch and since."""
        return (*self.state.leftovers, *(file for item in self.held for file in item.handed.created))


CLASSES: "dict[str, type[Record]]" = {**state.CLASSES, **handed.CLASSES, "Entry": Entry}


def find_run_dir(uid: int) -> str:
    """Return where a user's VMs are registered; it need not exist."""
    if uid == 0:
        return RUN_DIR
    home = f"/run/user/{uid}"
    try:
        found = os.lstat(home)
    except OSError:
        return f"/tmp/qemu-userns-{uid}"
    return f"{home}/qemu-userns" if found.st_uid == uid else f"/tmp/qemu-userns-{uid}"


def open_registry(uid: int) -> str:
    """Return the directory of a user's VMs, made if it is missing.

    Raises:
        HostError: somebody else could change it, or it cannot be made.
    """
    directory = find_run_dir(uid)
    try:
        for path, mode in ((directory, 0o755 if uid == 0 else 0o700), (f"{directory}/vms", 0o700)):
            try:
                os.mkdir(path, mode)
            except FileExistsError:
                pass
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o022:
                raise HostError(path, "others may change it", f"{path} must be a directory of uid {uid}, mode 0700")
    except OSError as err:
        raise HostError(directory, f"VMs cannot be registered: {err.strerror}") from err
    return f"{directory}/vms"


def lock_entry(directory: str, pid: int) -> "int | None":
    """Return an owned fd whose lock says that a VM has a supervisor, None where it has one; raises OSError.

    The lock is the process's (fcntl(2), "Advisory record locking"): a worker that outlives its supervisor does not keep it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(f"{directory}/{pid}.lock", flags, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(fd)
        return None
    return fd


def is_locked(directory: str, pid: int) -> bool:
    """Say whether a VM has a supervisor, by a look that leaves no file and takes no lock.

    Must not: be called by the supervisor, whose lock ends when it closes any fd of the file.
    """
    try:
        fd = os.open(f"{directory}/{pid}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    os.close(fd)
    return bool(found[0] != fcntl.F_UNLCK)


def write_entry(directory: str, pid: int, entry: Entry) -> None:
    """Write what is known of a VM, all of it or nothing; raises OSError."""
    path = f"{directory}/{pid}.json"
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump(to_plain(entry), file)
    os.rename(f"{path}.new", path)


def remove_entry(directory: str, pid: int) -> None:
    """Forget a VM."""
    for suffix in ("json", "json.new", "qmp", "log", "lock"):
        try:
            os.unlink(f"{directory}/{pid}.{suffix}")
        except FileNotFoundError:
            pass


def read_entries(directory: str) -> "Iterator[tuple[int, State]]":
    """Yield pid and state of each VM that runs; entries of those that have ended are left alone."""
    for pid in _list_pids(directory):
        entry = _find_entry(directory, pid)
        if entry is not None and is_running(pid, entry.state):
            yield pid, entry.state


def read_entry(directory: str, pid: int) -> Entry:
    """Return what is known of a VM.

    Raises:
        OSError: nothing is.
        ValueError: it was written by another version of this program.
    """
    with open(f"{directory}/{pid}.json", encoding="utf-8", errors="surrogateescape") as file:
        plain = json.load(file)
    try:
        entry = from_plain(plain, CLASSES)
    except TypeError as err:
        raise ValueError(str(err)) from err
    if not isinstance(entry, Entry):
        raise ValueError("no entry of a VM")
    return entry


def sweep(directory: str, kept: "Iterable[str]" = ()) -> None:
    """Forget the VMs that have ended without a supervisor, and remove what is provably theirs.

    Args:
        directory: of the registry.
        kept: paths that a VM uses which is not registered yet; those of the VMs that run are kept too.
    """
    entries = {pid: _find_entry(directory, pid) for pid in _list_pids(directory)}
    running = [entry for pid, entry in entries.items() if entry is not None and is_running(pid, entry.state)]
    used = {*kept, *(item.path for entry in running for item in entry.leftovers)}
    for pid, entry in entries.items():
        ended = find_start(pid) == 0 if entry is None else not is_running(pid, entry.state)
        lock = lock_entry(directory, pid) if ended else None
        if lock is None:
            continue
        if entry is not None:
            remove([item for item in entry.leftovers if item.temporary and item.path not in used], pid)
        remove_entry(directory, pid)
        os.close(lock)


def _find_entry(directory: str, pid: int) -> "Entry | None":
    """Return what is known of a VM, None if that is gone meanwhile, or of another version."""
    try:
        return read_entry(directory, pid)
    except (OSError, ValueError):
        return None


def _list_pids(directory: str) -> "list[int]":
    """Return whom the files are of, also those of an entry that is not complete."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted({int(pid) for pid in (name.partition(".")[0] for name in names) if pid.isdecimal()})


def is_running(pid: int, vm: State) -> bool:
    """Say whether a pid is still that of a VM; a VM that ended while it was being registered has no start."""
    return vm.started != 0 and vm.started == find_start(pid)


def find_start(pid: int) -> int:
    """Return when a process started, in clock ticks after boot; 0 if there is none, or only what nobody has waited for.

    A process whose first thread alone has ended is called a zombie too, and its other threads run on.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return 0
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[_STATE_FIELD - 2] == b"Z" and int(fields[_THREADS_FIELD - 2]) <= 1:
        return 0
    return int(fields[_START_FIELD - 2])


def match(pid: int, vm: State, wanted: str) -> bool:
    """Say whether a VM is meant by a name, a uuid or a pid."""
    return wanted in (str(pid), vm.name, vm.uuid) and wanted != ""
