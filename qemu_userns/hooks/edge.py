"""The edge: where errors become lines on stderr and an exit status, once."""

import os
import sys

from qemu_userns.errors import QemuUsernsError, describe_bug, format_error, printable

_CLIENTS = {"lxd": "lxc", "incus": "incus"}  # whose profiles begin so

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn


def run_at_edge(function: "Callable[[], int]") -> "NoReturn":
    """Run a program's main function and exit; no traceback reaches the user."""
    sys.excepthook = _report_bug
    try:
        status = function()
    except QemuUsernsError as err:
        _print(format_error(err) + explain_denial(err, read_profile()))
        status = err.exit_status
    except OSError as err:
        _print(f"qemu-userns: {printable(str(err.filename or 'system call'))}: {err.strerror or err}\n")
        status = 1
    sys.exit(status)


def read_profile() -> "str | None":
    """Return the AppArmor profile that confines this process, None if there is none: aa-status(8), proc(5)."""
    for path in ("/proc/self/attr/apparmor/current", "/proc/self/attr/current"):
        try:
            with open(path) as file:
                name, _, mode = file.read().rstrip("\0\n").rpartition(" ")
        except OSError:
            continue  # another security module has it, or none
        if mode == "(enforce)":
            return name
    return None


def explain_denial(error: QemuUsernsError, profile: "str | None") -> str:
    """Return the line that names the rule which a profile lacks, and the command that adds it; "" where that is not the matter.

    This code cannot be anywhere else: from inside QEMU's view nothing can be imported any more.

    Args:
        error: a step that failed.
        profile: AppArmor's, of this process.
    """
    rule = error.find_rule()
    if profile is None or rule is None:
        return ""
    kind, _, rest = profile.partition("-")
    command = "add it to the profile, and load that with apparmor_parser -r"
    if kind in _CLIENTS:
        lines = f"/etc/qemu-userns/{kind}.apparmor"
        command = f'{_CLIENTS[kind]} config set {_parse_instance(rest)} raw.apparmor "$(cat {lines})"'
        command += f", which qemu-userns hook {kind} --apply writes"
    elif kind == "libvirt":
        command = "add it to /etc/apparmor.d/local/abstractions/libvirt-qemu"
    lack = f"its profile {printable(profile)} lacks `{rule}`"
    return f"hint: where it is AppArmor that forbids this, {lack}: {printable(command)}\n"


def _parse_instance(text: str) -> str:
    """Return the words that name the VM of a profile of LXD's: `v1_</var/lib/lxd>`, and of a project's, `p_v1_</var/lib/lxd>`.

    Neither name can have a `_`. A profile whose name would be too long is named by a digest.
    """
    name, mark, _ = text.partition("_<")
    project, _, instance = name.rpartition("_")
    return (f"--project {project} {instance}" if project else instance) if mark else "INSTANCE"


def _print(text: str) -> None:
    """Write to stderr, which may be closed."""
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        return


def _report_bug(_kind: "type[BaseException]", error: BaseException, _: "TracebackType | None") -> None:
    """Say in one line what no other error said, and where."""
    _print(f"qemu-userns: {describe_bug(error)}\nhint: please report this line\n")
