"""The caller's VMs, as the run directory knows them."""

import os
import stat
import time

from qemu_userns.errors import HostError, UsageError
from qemu_userns.record import Record
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.state import State

_REGISTER_TIMEOUT_S, _PAUSE_S = 0.5, 0.02


class Vm(Record):
    """A VM that runs and has a QMP monitor."""

    pid: int
    state: State
    socket: str
    """Path of its supervisor's own socket."""

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.state.name or str(self.pid)

    @property
    def version(self) -> str:
        """QEMU's version."""
        return ".".join(map(str, self.state.version))

    def describe(self) -> str:
        """Name it so that it can be told from others."""
        return f"{self.pid} ({self.state.name})" if self.state.name else str(self.pid)


def read_vms() -> "list[Vm]":
    """Return the caller's VMs in the order of their pids.

    Raises:
        HostError: somebody else could have put entries there.
    """
    home = registry.find_run_dir(os.geteuid())
    directory = f"{home}/vms"
    for path in (home, directory):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return []
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise HostError(path, "others may change it", f"{path} must be a directory of uid {os.geteuid()}, mode 0700")
    vms = [Vm(pid, state, f"{directory}/{pid}.qmp") for pid, state in registry.read_entries(directory)]
    return sorted(vms, key=lambda vm: vm.pid)


def find_vm(wanted: str) -> Vm:
    """Return the VM that a pid, a name or a uuid means; a pid goes before a name of digits.

    Raises:
        UsageError: there is none, or more than one.
    """
    deadline = time.monotonic() + _REGISTER_TIMEOUT_S
    while not (found := _match(vms := read_vms(), wanted)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)  # a daemon's pid is known to its supervisor a moment after -daemonize has returned
    if not found:
        raise UsageError(wanted or "VM", "there is no such VM", describe_vms(vms))
    if len(found) > 1:
        raise UsageError(wanted, f"{len(found)} VMs are called so", f"say which by its pid: {_list(found)}")
    return found[0]


def is_supervised(vm: Vm) -> bool:
    """Say whether a VM has a supervisor."""
    return registry.is_locked(os.path.dirname(vm.socket), vm.pid)


def _match(vms: "list[Vm]", wanted: str) -> "list[Vm]":
    return [vm for vm in vms if str(vm.pid) == wanted] or [vm for vm in vms if registry.match(vm.pid, vm.state, wanted)]


def describe_vms(vms: "list[Vm]") -> str:
    """Say which VMs there are to choose from."""
    whose = "root" if os.geteuid() == 0 else "this user"
    known = f"VMs of {whose}: {_list(vms)}" if vms else f"no VM of {whose} has a QMP monitor"
    return f"{known}; another user's VMs are seen by that user"


def _list(vms: "list[Vm]") -> str:
    return ", ".join(vm.describe() for vm in vms)
