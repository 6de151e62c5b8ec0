"""What makes libvirt's system daemon start the drop-in: an <emulator> of its domains, and what would stand in its way.

libvirt's settings of QEMU's user work as they are, both ways: as root (`user = "root"`, `dynamic_ownership = 0`) each VM has
leased ids, and else that user is QEMU's root inside.
"""

import os
import re

from qemu_userns.hooks import applied
from qemu_userns.hooks.apparmor import build_profile, escape_path, find_restriction, is_apparmor_enabled
from qemu_userns.hooks.files import read_text
from qemu_userns.hooks.host import find_package, find_processes
from qemu_userns.hooks.install import find_qemus
from qemu_userns.hooks.limits import describe_limits, describe_qemu
from qemu_userns.hooks.steps import STANDARD_PATH, Command, Fault, Setup, Step
from qemu_userns.hooks.steps_files import MARK, Block
from qemu_userns.hooks.steps_qemu import Entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.hooks.host import Options

QEMU_CONF = "/etc/libvirt/qemu.conf"
PROFILE = "/etc/apparmor.d/local/abstractions/libvirt-qemu"
DAEMONS = ("usr.sbin.libvirtd", "usr.sbin.virtqemud")  # whose profiles let them execute what is in /usr/bin, and little else
DEFAULT_USER = "libvirt-qemu"
# libvirt makes a device node that is plugged in by its path in the mount namespace that QEMU then has: the view, whose /dev is
# read-only. Without a namespace of libvirt's it names the host's.
_SETTINGS = "namespaces = []\n"


def build_setup(options: "Options") -> Setup:
    """Look at the host, and say what is to be done.

    Raises:
        ResourceError: a file cannot be read.
    """
    root, directory = options.root, options.directory
    conf = read_text(root + QEMU_CONF) or ""
    version = find_package("libvirt-daemon-driver-qemu", root) or find_package("libvirt-daemon", root)
    user = find_setting(conf, "user") or DEFAULT_USER
    qemus = find_qemus(STANDARD_PATH, root)
    running = () if root else find_processes(("libvirtd", "virtqemud"))
    limits, limit_faults = describe_limits(options, running[0].pid if running else None)
    steps: "list[Step]" = [
        applied.build_step(options),
        Entries("the emulators that domains name", directory),
        Block("libvirt gives QEMU no mount namespace, for it has one of its own", QEMU_CONF, _SETTINGS),
    ]
    apparmor = is_apparmor_enabled(root)
    if apparmor:
        steps += _build_apparmor_steps(options)
    by_hand = [f"virsh edit DOMAIN    # <emulator>{directory}/qemu-system-x86_64</emulator>", "systemctl restart libvirtd"]
    if user not in ("root", "+0", "0") and f"\n{user}:" not in f"\n{read_text(f'{root}/etc/subuid') or ''}":
        words = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
        by_hand.append(f"{words}    # or another range that is free; else shares hold a single id")
    restriction = find_restriction("libvirt", f"{directory}/qemu-system-*", root)
    return Setup(
        (
            f"libvirt: {f'Debian package {version}' if version else 'not installed'}",
            f"QEMU runs as: {user}",
            f"QEMU: {', '.join(qemus) or 'none'}",
            *describe_qemu(qemus, root),
            f"AppArmor: {'enabled' if apparmor else 'not enabled'}",
            *limits,
        ),
        tuple(steps),
        tuple(_find_obstacles(conf, qemus)),
        (*_find_faults(root), *limit_faults, *([restriction] if restriction else [])),
        tuple(by_hand),
    )


def _build_apparmor_steps(options: "Options") -> "list[Step]":
    """Return what lets the daemon execute the entries, and what a domain's launcher needs besides."""
    # The id maps of a user other than root are written by newuidmap, which is set-uid and no part of the domain.
    directory, python = escape_path(options.directory), escape_path(options.python)
    profile = build_profile(directory, python, options.root) + "/usr/bin/new{u,g}idmap PUx,\n"
    steps: "list[Step]" = [Block("what the profiles of domains need besides", PROFILE, profile)]
    rule = f'"{escape_path(options.directory)}/qemu-system-*" PUx,\n'
    for name in DAEMONS:
        path = f"/etc/apparmor.d/{name}"
        if os.path.exists(options.root + path):
            steps.append(Block("the daemon asks the entries what they can do", f"/etc/apparmor.d/local/{name}", rule))
            steps.append(Command("AppArmor reads its rules", ("apparmor_parser", "--replace", path)))
    return steps


def find_setting(conf: str, key: str) -> "str | None":
    """Return a setting of libvirt's configuration file, whose first line of a key counts (virConfGetValue)."""
    found = re.search(rf"^[ \t]*{key}[ \t]*=[ \t]*(.*?)[ \t]*$", conf, re.MULTILINE)
    return None if found is None else found[1].strip("\"'")


def _find_obstacles(conf: str, qemus: "list[str]") -> "list[Fault]":
    """Return why it is of no use to do anything."""
    obstacles = []
    value = find_setting(conf.partition(MARK)[0], "namespaces")
    if value is not None and value.replace(" ", "") != "[]":
        hint = "remove that line: the first one counts"
        obstacles.append(Fault(QEMU_CONF, f"has namespaces = {value}, and devices could not be plugged in by their paths", hint))
    if not qemus:
        obstacles.append(Fault("qemu-system-*", "there is none", "install qemu-system-x86 or another qemu-system package"))
    return obstacles


def _find_faults(root: str) -> "list[Fault]":
    """Return what no step mends."""
    if os.path.exists(root + QEMU_CONF):
        return []
    return [Fault(QEMU_CONF, "is not there", "install libvirt-daemon-system")]
