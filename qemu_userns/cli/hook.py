"""qemu-userns hook: set up another program so that it starts the drop-in."""

import os
import sys

from qemu_userns.errors import UsageError, format_error, printable
from qemu_userns.hooks import libvirt, lxd, systemd
from qemu_userns.hooks.host import Options
from qemu_userns.hooks.install import find_qemus
from qemu_userns.hooks.snap import build_tree
from qemu_userns.hooks.steps import STANDARD_PATH, apply, undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.hooks.steps import Fault, Setup

_USAGE = (
    "qemu-userns hook lxd|incus|libvirt|systemd [--apply | --remove | --check] [--divert] [--dir DIR] [--root DIR]"
    " | hook lxd --snap DIR"
)
_DIRECTORY = "/usr/local/lib/qemu-userns/dropin"
_BUILDERS: "dict[str, Callable[[Options], Setup]]" = {
    "lxd": lambda options: lxd.build_setup(lxd.DAEMONS["lxd"], options),
    "incus": lambda options: lxd.build_setup(lxd.DAEMONS["incus"], options),
    "libvirt": libvirt.build_setup,
    "systemd": systemd.build_setup,
}
_ACTIONS = ("--apply", "--remove", "--check")


def hook(words: "list[str]") -> int:
    """Look, apply, remove or check; return the exit status.

    Raises:
        UsageError: the words make no sense.
        ResourceError: a file cannot be read, written or removed.
        HostError: a program that has to be run fails.
    """
    if words[:1] == ["lxd"] and len(words) == 3 and words[1] == "--snap":
        _print_rest(build_tree(words[2], find_qemus(STANDARD_PATH)))
        return 0
    name, action, options = _parse(words)
    setup = _BUILDERS[name](options)
    if action == "--apply":
        return _apply(setup, options.root)
    if action == "--remove":
        return _remove(setup, options.root)
    faults = [*setup.faults, *(fault for step in setup.steps if (fault := step.find_fault(options.root)) is not None)]
    if action == "--check":
        _print_faults(faults)
        return 1 if faults else 0
    for line in setup.findings:
        print(line)
    for fault in setup.faults:
        print(f"fault: {fault.what}: {fault.why}" + (f" ({fault.hint})" if fault.hint else ""))
    for step in setup.steps:
        print(f"{'done ' if step.find_fault(options.root) is None else 'to do'}  {step.describe()}")
    _print_rest(setup.by_hand)
    return 0


def _apply(setup: "Setup", root: str) -> int:
    """Do all steps, and say which."""
    for step in apply(setup.steps, root):
        print(step.describe())
    _print_rest(setup.by_hand)
    return 0


def _remove(setup: "Setup", root: str) -> int:
    """Undo all steps, and say which; return 1 if some cannot be."""
    done, faults = undo(setup.steps, root)
    for step in done:
        print(f"undone: {step.describe()}")
    for fault in faults:
        sys.stderr.write(format_error(fault))
    return 1 if faults else 0


def _print_faults(faults: "list[Fault]") -> None:
    for fault in faults:
        hint = fault.hint or "qemu-userns hook NAME --apply"
        print(f"qemu-userns: {printable(fault.what)}: {printable(fault.why)}\nhint: {printable(hint)}", file=sys.stderr)


def _print_rest(by_hand: "tuple[str, ...]") -> None:
    for line in by_hand:
        print(f"then: {line}")


def _parse(words: "list[str]") -> "tuple[str, str | None, Options]":
    """Return the name of the program, the action, and the options; raises UsageError."""
    bad = UsageError(" ".join(["hook", *words]), "not understood", _USAGE)
    actions, values, names = [], {"--dir": _DIRECTORY, "--root": ""}, []
    divert = False
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if word in _ACTIONS:
            actions.append(word)
        elif word == "--divert":
            divert = True
        elif key in values:
            found = value if equals else next(rest, "")
            if not found:
                raise bad
            values[key] = os.path.abspath(found)
        else:
            names.append(word)
    if len(names) != 1 or names[0] not in _BUILDERS or len(actions) > 1:
        raise bad
    root = "" if values["--root"] == "/" else values["--root"]
    return names[0], next(iter(actions), None), Options(values["--dir"], root, os.path.realpath(sys.executable), divert)
