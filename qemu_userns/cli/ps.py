"""qemu-userns ps: the caller's VMs."""

import json

from qemu_userns.cli.vms import is_supervised, read_vms
from qemu_userns.errors import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.cli.vms import Vm
    from qemu_userns.plan.grants import Monitor

_TITLES = ("PID", "NAME", "UUID", "QEMU", "UID", "MONITORS")


def ps(as_json: bool) -> int:
    """Print a table of the VMs, or the same and more as a JSON list."""
    vms = read_vms()
    if as_json:
        print(json.dumps([_describe(vm) for vm in vms], indent=2))
        return 0
    rows = [_TITLES, *(_build_row(vm) for vm in vms)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _build_row(vm: "Vm") -> "tuple[str, ...]":
    state = vm.state
    monitors = ", ".join(_name_monitor(monitor) for monitor in state.monitors)
    monitors += "" if is_supervised(vm) else " (no supervisor: qemu-userns adopt)"
    cells = (str(vm.pid), state.name or "-", state.uuid or "-", vm.version, str(state.identity.uid), monitors or "-")
    return tuple(printable(cell) for cell in cells)


def _name_monitor(monitor: "Monitor") -> str:
    return f"{monitor.kind} {monitor.given}".strip() + (" (lost)" if monitor.lost else "")


def _describe(vm: "Vm") -> "dict[str, object]":
    state = vm.state
    return {
        "pid": vm.pid,
        "name": state.name,
        "uuid": state.uuid,
        "program": state.program,
        "version": vm.version,
        "uid": state.identity.uid,
        "gid": state.identity.gid,
        "monitors": [{"label": m.label, "kind": m.kind, "address": m.given, "pretty": m.pretty} for m in state.monitors],
        "socket": vm.socket,
        "supervised": is_supervised(vm),
    }
