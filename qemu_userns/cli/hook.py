"""qemu-userns hook: set up another program so that it starts the drop-in."""

import os
import sys

from qemu_userns.errors import UsageError, format_error, printable
from qemu_userns.hooks import libvirt, lxd, systemd
from qemu_userns.hooks.applied import NAMES, find_options
from qemu_userns.hooks.files import Lock
from qemu_userns.hooks.install import find_qemus
from qemu_userns.hooks.snap import build_tree
from qemu_userns.hooks.steps import STANDARD_PATH, apply, undo
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qemu_userns.errors import QemuUsernsError
    from qemu_userns.hooks.host import Options
    from qemu_userns.hooks.steps import Fault, Setup

_USAGE = (
    "qemu-userns hook lxd|incus|libvirt|systemd [--apply | --remove | --check] [--divert] [--dir DIR] [--root DIR]"
    " | hook lxd --snap DIR"
)
_BUILDERS: "dict[str, Callable[[Options], Setup]]" = {
    "lxd": lambda options: lxd.build_setup(lxd.DAEMONS["lxd"], options),
    "incus": lambda options: lxd.build_setup(lxd.DAEMONS["incus"], options),
    "libvirt": libvirt.build_setup,
    "systemd": systemd.build_setup,
}
_ACTIONS = ("--apply", "--remove", "--check")


class _Words(Record):
    """The words, taken apart."""

    name: str  # of the hook
    action: "str | None"
    directory: "str | None"
    divert: bool
    root: str


def hook(words: "list[str]") -> int:
    """Look, apply, remove or check; return the exit status.

    Raises:
        UsageError: the words make no sense.
        ResourceError: a file cannot be read, or the directory is another hook's.
    """
    if words[:1] == ["lxd"] and len(words) == 3 and words[1] == "--snap":
        _print_rest(build_tree(words[2], find_qemus(STANDARD_PATH)))
        return 0
    parsed = _parse(words)
    if parsed.action not in ("--apply", "--remove"):
        return _show(_build_setup(parsed), parsed)
    lock = Lock(parsed.root)
    try:
        setup = _build_setup(parsed)
        return _apply(setup, parsed.root) if parsed.action == "--apply" else _remove(setup, parsed.root)
    finally:
        lock.release()


def _build_setup(words: _Words) -> "Setup":
    python = os.path.realpath(sys.executable)
    return _BUILDERS[words.name](find_options(words.name, words.directory, words.divert, words.root, python))


def _show(setup: "Setup", words: _Words) -> int:
    """Say what there is, or with --check what is not as it has to be, and then return 1."""
    pending = [(step, step.find_fault(words.root)) for step in setup.steps]
    if words.action == "--check":
        faults = [*setup.obstacles, *setup.faults, *(fault for _, fault in pending if fault is not None)]
        _print_faults(faults, f"qemu-userns hook {words.name} --apply")
        return 1 if faults else 0
    for line in setup.findings:
        print(line)
    for fault in (*setup.obstacles, *setup.faults):
        print(f"fault: {fault.what}: {fault.why}" + (f" ({fault.hint})" if fault.hint else ""))
    for step, fault_of_step in pending:
        print(f"{'done ' if fault_of_step is None else 'to do'}  {step.describe()}")
    _print_rest(setup.by_hand)
    return 0


def _apply(setup: "Setup", root: str) -> int:
    """Do all steps, and say which; return 1 if none can be, or is of use."""
    if setup.obstacles:
        _print_faults(setup.obstacles, None)
        return 1
    done, faults = apply(setup.steps, root)
    for step in done:
        print(step.describe())
    _print_errors(faults)
    if faults:
        return 1
    _print_faults(setup.faults, None)
    _print_rest(setup.by_hand)
    return 0


def _remove(setup: "Setup", root: str) -> int:
    """Undo all steps, and say which; return 1 if some cannot be."""
    done, faults = undo(setup.steps, root)
    for step in done:
        print(f"undone: {step.describe()}")
    _print_errors(faults)
    return 1 if faults else 0


def _print_errors(errors: "Iterable[QemuUsernsError]") -> None:
    for error in errors:
        sys.stderr.write(format_error(error))


def _print_faults(faults: "Iterable[Fault]", default_hint: "str | None") -> None:
    for fault in faults:
        hint = fault.hint or default_hint
        print(f"qemu-userns: {printable(fault.what)}: {printable(fault.why)}", file=sys.stderr)
        if hint:
            print(f"hint: {printable(hint)}", file=sys.stderr)


def _print_rest(by_hand: "tuple[str, ...]") -> None:
    for line in by_hand:
        print(f"then: {line}")


def _parse(words: "list[str]") -> _Words:
    """Take the words apart; raises UsageError."""
    bad = UsageError(" ".join(["hook", *words]), "not understood", _USAGE)
    actions, values, names = [], {}, []
    divert = False
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if word in _ACTIONS:
            actions.append(word)
        elif word == "--divert":
            divert = True
        elif key in ("--dir", "--root"):
            found = value if equals else next(rest, "")
            if not found:
                raise bad
            values[key] = os.path.abspath(found)
        else:
            names.append(word)
    if len(names) != 1 or names[0] not in _BUILDERS or len(actions) > 1:
        raise bad
    directory, root = values.get("--dir"), values.get("--root", "")
    if (divert and names[0] not in lxd.DAEMONS) or (directory is not None and names[0] not in NAMES):
        raise bad
    if directory is not None and (":" in directory or not directory.isprintable()):
        raise UsageError(f"--dir {directory}", "cannot stand in a PATH", "name a directory without a colon or control characters")
    return _Words(names[0], next(iter(actions), None), directory, divert, "" if root == "/" else root)
