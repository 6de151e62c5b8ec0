"""What makes LXD or Incus start the drop-in: it is first in the daemon's PATH, where both look up QEMU at each start of a VM.

LXD runs a VM's QEMU under an AppArmor profile that it writes itself, and that lets nobody make namespaces. What a profile has to
have besides goes into an instance's, or a profile's, `raw.apparmor`.
"""

import os

from qemu_userns.hooks.host import find_package, find_processes, is_apparmor_enabled
from qemu_userns.hooks.install import find_qemus
from qemu_userns.hooks.steps import STANDARD_PATH, Command, Diversion, Entries, Fault, File, Setup, Step, read_text
from qemu_userns.host.qemu import DIVERTED
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.hooks.host import Options

_UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
# For the launcher and the supervisor: QEMU has no capability outside its user namespace. The view is built below a root that
# AppArmor sees as "/": from then on the view says what QEMU can reach, not the profile.
_PROFILE = """\
{userns}capability chown,
capability fowner,
capability fsetid,
capability mknod,
capability setpcap,
capability sys_admin,
capability sys_ptrace,
mount,
umount,
pivot_root,
ptrace (read),
unix,
/ r,
/** rwlk,
{directory}/qemu-system-* ix,
{python} ix,
"""


class Daemon(Record):
    """One of the two."""

    name: str
    client: str
    processes: "tuple[str, ...]"
    snap: str  # where its snap is


DAEMONS = {
    "lxd": Daemon("lxd", "lxc", ("lxd",), "/snap/lxd/current"),
    "incus": Daemon("incus", "incus", ("incusd",), ""),
}


def build_setup(daemon: Daemon, options: "Options") -> Setup:
    """Look at the host, and say what is to be done.

    Raises:
        ResourceError: a file cannot be read.
    """
    root, name = options.root, daemon.name
    directory = options.directory
    unit = next((f"{path}/{name}.service" for path in _UNITS if os.path.exists(f"{root}{path}/{name}.service")), None)
    qemus = find_qemus(STANDARD_PATH, root)
    running = () if root else find_processes(daemon.processes)
    old_path = _find_path(root, directory, running)
    steps: list[Step] = [Entries("what the daemon finds instead of QEMU", directory)]
    environment, profile = f"/etc/qemu-userns/{name}.env", f"/etc/qemu-userns/{name}.apparmor"
    steps += [
        # A unit's EnvironmentFile= has the last word over Environment=, and the last of them over the others: systemd.exec(5).
        File("the daemon's PATH", environment, f"PATH={directory}:{old_path}\n"),
        File(
            f"{name}.service reads it",
            f"/etc/systemd/system/{name}.service.d/qemu-userns.conf",
            f"[Service]\nEnvironmentFile={environment}\n",
        ),
        File("what QEMU's AppArmor profile needs besides", profile, build_profile(directory, options.python, root)),
    ]
    if options.divert:
        for name_of_qemu in _list_programs(root):
            path = f"/usr/bin/{name_of_qemu}"
            steps.append(Diversion(f"for whoever starts {path}", path, f"{directory}/{name_of_qemu}"))
    if os.path.isdir("/run/systemd/system"):
        steps.append(Command("systemd reads its files", ("systemctl", "daemon-reload")))
    by_hand = [f"systemctl restart {name}    # VMs that run go on running"] if unit else []
    if is_apparmor_enabled(root):
        by_hand.append(f'{daemon.client} profile set default raw.apparmor "$(cat {profile})"    # for each profile that VMs use')
    return Setup(
        tuple(_describe(daemon, unit, qemus, running, options)),
        tuple(steps),
        tuple(_find_faults(daemon, unit, qemus, running, options)),
        tuple(by_hand),
    )


def build_profile(directory: str, python: str, root: str) -> str:
    """Return the lines for raw.apparmor; `userns` only where the parser knows it: apparmor.d(5), from 4.0 on."""
    userns = "userns,\n" if os.path.exists(f"{root}/etc/apparmor.d/abi/4.0") else ""
    return _PROFILE.format(userns=userns, directory=directory, python=python)


def _find_path(root: str, directory: str, running: "tuple[tuple[int, dict[str, str]], ...]") -> str:
    """Return the PATH that the daemon has without us."""
    found = running[0][1].get("PATH") if running else None
    if found is None:
        lines = (read_text(f"{root}/etc/environment") or "").splitlines()
        found = next((line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PATH=")), STANDARD_PATH)
    return ":".join(entry for entry in found.split(":") if entry != directory)


def _list_programs(root: str) -> "list[str]":
    """Return the names of QEMU in /usr/bin, and of those that are diverted already."""
    names = {name.removesuffix(DIVERTED) for name in os.listdir(f"{root}/usr/bin") if name.startswith("qemu-system-")}
    return sorted(names)


def _describe(
    daemon: Daemon, unit: "str | None", qemus: "list[str]", running: "tuple[tuple[int, dict[str, str]], ...]", options: "Options"
) -> "list[str]":
    """Say what is there."""
    root = options.root
    version = find_package(daemon.name, root)
    snap = daemon.snap and os.path.lexists(root + daemon.snap)
    return [
        f"{daemon.name}: {f'Debian package {version}' if version else 'snap' if snap else 'not installed'}",
        f"unit: {unit or 'none'}",
        f"daemon: {f'runs, pid {running[0][0]}' if running else 'does not run'}",
        f"QEMU: {', '.join(qemus) or 'none'}; Debian package {find_package('qemu-system-common', root) or 'none'}",
        f"AppArmor: {'enabled' if is_apparmor_enabled(root) else 'not enabled'}",
    ]


def _find_faults(
    daemon: Daemon, unit: "str | None", qemus: "list[str]", running: "tuple[tuple[int, dict[str, str]], ...]", options: "Options"
) -> "list[Fault]":
    """Return what no step mends."""
    faults = []
    if daemon.snap and os.path.lexists(options.root + daemon.snap):
        hint = "qemu-userns hook lxd --snap DIR makes a snap with the drop-in for it"
        faults.append(Fault(f"the snap {daemon.name}", "has a PATH of its own, that no unit file changes", hint))
    elif unit is None:
        hint = f"install {daemon.name}, or put {options.directory} first in its PATH"
        faults.append(Fault(daemon.name, "has no unit file", hint))
    if not qemus:
        faults.append(Fault("qemu-system-*", "there is none", "install qemu-system-x86 or another qemu-system package"))
    for pid, environ in running:
        if environ.get("PATH", "").split(":")[0] != options.directory:
            why = f"{options.directory} is not first in its PATH"
            faults.append(Fault(f"{daemon.name}, pid {pid}", why, f"systemctl restart {daemon.name}"))
    return faults
