"""The run directory: which VMs have a supervisor, with all that the next one would have to know.

For each VM DIR/vms/PID.json, written atomically, DIR/vms/PID.qmp, our own socket on its monitor, and DIR/vms/PID.log. DIR is
/run/qemu-userns for root, else /run/user/UID/qemu-userns, or /tmp/qemu-userns-UID where the host has no such directory.
"""

import json
import os
import stat

from qemu_userns.errors import HostError
from qemu_userns.host.identity import RUN_DIR
from qemu_userns.supervisor.state import State, decode_state, encode_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_START_FIELD = 21  # of /proc/PID/stat, counted from 0: proc(5), starttime


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


def write_entry(directory: str, pid: int, state: State) -> None:
    """Write the state of a VM, all of it or nothing; raises OSError."""
    path = f"{directory}/{pid}.json"
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump(encode_state(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


def remove_entry(directory: str, pid: int) -> None:
    """Forget a VM."""
    for suffix in ("json", "json.new", "qmp", "log"):
        try:
            os.unlink(f"{directory}/{pid}.{suffix}")
        except FileNotFoundError:
            pass


def read_entries(directory: str) -> "Iterator[tuple[int, State]]":
    """Yield pid and state of each VM that runs; entries of those that have ended are left alone."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in sorted(names):
        pid, _, suffix = name.partition(".")
        if suffix != "json" or not pid.isdecimal():
            continue
        try:
            with open(f"{directory}/{name}", encoding="utf-8", errors="surrogateescape") as file:
                state = decode_state(json.load(file))
        except (OSError, ValueError):
            continue  # gone meanwhile, or of another version
        if state.started and state.started == find_start(int(pid)):
            yield int(pid), state


def find_start(pid: int) -> int:
    """Return when a process started, in clock ticks after boot; 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[_START_FIELD - 2])


def match(pid: int, state: State, wanted: str) -> bool:
    """Say whether a VM is meant by a name, a uuid or a pid."""
    return wanted in (str(pid), state.name, state.uuid) and wanted != ""
