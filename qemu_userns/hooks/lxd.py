"""What makes LXD or Incus start the drop-in: it is first in the daemon's PATH, where both look up QEMU at each start of a VM.

LXD runs a VM's QEMU under an AppArmor profile that it writes itself, and that lets nobody make namespaces. What a profile has to
have besides goes into an instance's, or a profile's, `raw.apparmor`.
"""

import os

from qemu_userns.hooks import applied
from qemu_userns.hooks.apparmor import build_profile, escape_path, find_restriction, is_apparmor_enabled
from qemu_userns.hooks.files import NEW, read_text
from qemu_userns.hooks.host import find_package, find_processes, find_snap
from qemu_userns.hooks.install import find_qemus
from qemu_userns.hooks.limits import describe_limits, describe_qemu, list_programs
from qemu_userns.hooks.steps import STANDARD_PATH, Command, Fault, Setup, Step
from qemu_userns.hooks.steps_files import File
from qemu_userns.hooks.steps_qemu import Diversion, Entries, find_link, list_diverted
from qemu_userns.host.qemu import DIVERTED
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.hooks.host import Options, Process

_UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_PROGRAMS = "/usr/bin"


class Daemon(Record):
    """One of the two."""

    name: str
    client: str
    processes: "tuple[str, ...]"
    snap: str  # where its snap is


DAEMONS = {
    "lxd": Daemon("lxd", "lxc", ("lxd",), "/snap/lxd"),
    "incus": Daemon("incus", "incus", ("incusd",), ""),
}


def build_setup(daemon: Daemon, options: "Options") -> Setup:
    """Look at the host, and say what is to be done.

    Raises:
        ResourceError: a file cannot be read.
    """
    root, name = options.root, daemon.name
    unit = next((f"{path}/{name}.service" for path in _UNITS if os.path.exists(f"{root}{path}/{name}.service")), None)
    snap = find_snap(daemon.snap, root) if daemon.snap else None
    qemus = find_qemus(STANDARD_PATH, root)
    running = () if root else find_processes(daemon.processes)
    limits, limit_faults = describe_limits(options, running[0].pid if running else None)
    version = find_package(name, root)
    findings = [
        f"{name}: {f'Debian package {version}' if version else f'snap {snap}' if snap else 'not installed'}",
        f"unit: {unit or 'none'}",
        f"daemon: {f'runs, pid {running[0].pid}' if running else 'does not run'}",
        f"QEMU: {', '.join(qemus) or 'none'}; Debian package {find_package('qemu-system-common', root) or 'none'}",
        *describe_qemu(qemus, root),
        f"AppArmor: {'enabled' if is_apparmor_enabled(root) else 'not enabled'}",
        *limits,
    ]
    restriction = find_restriction(name, f"{options.directory}/qemu-system-*", root)
    by_hand = [f"systemctl restart {name}    # VMs that run go on running"] if unit else []
    if is_apparmor_enabled(root):
        lines = f'"$(cat {_build_path(name, "apparmor")})"'
        by_hand.append(f"{daemon.client} profile set default raw.apparmor {lines}    # for each profile that VMs use")
    return Setup(
        tuple(findings),
        tuple(_build_steps(name, options)),
        tuple(_find_obstacles(daemon, unit, snap, qemus)),
        (*_find_faults(daemon, running, options), *limit_faults, *([restriction] if restriction else [])),
        tuple(by_hand),
    )


def _build_steps(name: str, options: "Options") -> "list[Step]":
    root, directory = options.root, options.directory
    environment = _build_path(name, "env")
    profile = build_profile(escape_path(directory), escape_path(options.python), root)
    steps: "list[Step]" = [
        applied.build_step(options),
        Entries("what the daemon finds instead of QEMU", directory),
        # A unit's EnvironmentFile= has the last word over Environment=, and the last of them over the others: systemd.exec(5).
        File("the daemon's PATH, and QEMU's user at a stateful start", environment, _build_environment(name, options)),
        File(
            f"{name}.service reads it",
            f"/etc/systemd/system/{name}.service.d/qemu-userns.conf",
            f"[Service]\nEnvironmentFile={environment}\n",
        ),
        File("what QEMU's AppArmor profile needs besides", _build_path(name, "apparmor"), profile),
    ]
    for program in _list_diversions(options):
        path = f"{_PROGRAMS}/{program}"
        steps.append(Diversion(f"for whoever starts {path}", path, f"{directory}/{program}"))
    if os.path.isdir("/run/systemd/system"):
        steps.append(Command("systemd reads its files", ("systemctl", "daemon-reload")))
    return steps


def _build_path(name: str, kind: str) -> str:
    return f"/etc/qemu-userns/{name}.{kind}"


def _read_path(root: str, directory: str) -> str:
    """Return the PATH that the daemon has without us, as the host's files say: whoever asks, and whether it runs or not."""
    lines = (read_text(f"{root}/etc/environment") or "").splitlines()
    found = next((line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PATH=")), STANDARD_PATH)
    return ":".join(entry for entry in found.split(":") if entry != directory)


def _build_environment(name: str, options: "Options") -> str:
    """Return the variables that the daemon gets besides.

    Where a VM starts from a saved state it names no user (LXD's driver_qemu.go); it shall be the same one as otherwise: the
    first of these two that there is (LXD's sys/os.go).
    """
    users = [line.partition(":")[0] for line in (read_text(f"{options.root}/etc/passwd") or "").splitlines()]
    path = f"{options.directory}:{_read_path(options.root, options.directory)}"
    return f"PATH={_quote(path)}\nQEMU_USERNS=user={name if name in users else 'nobody'}\n"


def _quote(value: str) -> str:
    """Return a value as an EnvironmentFile= has it: systemd.exec(5)."""
    return '"' + "".join(f"\\{character}" if character in '"\\`$' else character for character in value) + '"'


def _list_diversions(options: "Options") -> "list[str]":
    """Return the names of the programs to divert, and of those that this hook has diverted."""
    directory = options.root + _PROGRAMS
    there = {name.removesuffix(DIVERTED) for name in list_programs(directory)}
    linked = {name for name in there if find_link(f"{directory}/{name}") == f"{options.directory}/{name}"}
    if not options.divert:
        return sorted(linked)
    noted = {os.path.basename(path) for path in list_diverted(options.root) if path.startswith(f"{_PROGRAMS}/qemu-system-")}
    return sorted(name for name in there | noted if not name.endswith(NEW))


def _find_obstacles(daemon: Daemon, unit: "str | None", snap: "str | None", qemus: "list[str]") -> "list[Fault]":
    """Return why it is of no use to do anything."""
    obstacles = []
    if snap:
        hint = f"qemu-userns hook {daemon.name} --snap DIR makes a snap with the drop-in for it; or remove the snap"
        obstacles.append(Fault(f"the snap {daemon.name}", "has a PATH of its own, that no unit file changes", hint))
    elif unit is None:
        hint = (
            f"install {daemon.name}; or, for one that systemd does not start, qemu-userns install DIR, and DIR first in its PATH"
        )
        obstacles.append(Fault(daemon.name, "has no unit file", hint))
    if not qemus:
        obstacles.append(Fault("qemu-system-*", "there is none", "install qemu-system-x86 or another qemu-system package"))
    return obstacles


def _find_faults(daemon: Daemon, running: "tuple[Process, ...]", options: "Options") -> "list[Fault]":
    """Return whether a daemon that runs has another PATH."""
    faults = []
    for process in running:
        hint = f"systemctl restart {daemon.name}"
        if process.environ is None:
            faults.append(Fault(f"{daemon.name}, pid {process.pid}", "its PATH cannot be read", "run it as root"))
        elif process.environ.get("PATH", "").split(":")[0] != options.directory:
            why = f"{options.directory} is not first in its PATH"
            faults.append(Fault(f"{daemon.name}, pid {process.pid}", why, hint))
    return faults
