"""The units by which systemd runs VMs: qemu-userns@NAME.service, from /etc/qemu-userns/vms/NAME.env, in one slice."""

import os
import sysconfig

from qemu_userns.hooks.apparmor import find_restriction
from qemu_userns.hooks.limits import describe_limits
from qemu_userns.hooks.steps import Command, Fault, Setup
from qemu_userns.hooks.steps_files import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.hooks.host import Options
    from qemu_userns.hooks.steps import Step

ENVIRONMENT_DIR = "/etc/qemu-userns/vms"
UNIT, SLICE = "qemu-userns@.service", "qemu-userns.slice"

# Not among the hardening options, for no VM starts with them: RestrictNamespaces=, PrivateUsers=, RestrictSUIDSGID=,
# ProtectKernelTunables= (a view has its own /proc), MemoryDenyWriteExecute= (TCG). Nor those that
# hide what a VM may need: ProtectHome=, PrivateTmp=, PrivateDevices=, PrivateNetwork=.
_SERVICE = """\
# Made by `qemu-userns hook systemd`; change it with `systemctl edit`.
[Unit]
Description=Virtual machine %i
Documentation=man:qemu-userns(1)
After=network.target
AssertPathExists={directory}/%i.env

[Service]
Type=notify
NotifyAccess=all
Environment=QEMU=qemu-system-x86_64 QEMU_ARGS= STOP_SECONDS=60
EnvironmentFile={directory}/%i.env
ExecStart={program} run --notify=on -- ${{QEMU}} -name guest=%i $QEMU_ARGS
ExecStop=-{program} qmp $MAINPID system_powerdown
ExecStop=-timeout $STOP_SECONDS {program} qmp --events $MAINPID
TimeoutStartSec=60
TimeoutStopSec=15min
Restart=on-failure
Slice={slice}
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet={capabilities}
ProtectSystem=full
ProtectProc=invisible
PrivateIPC=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET AF_VSOCK

[Install]
WantedBy=multi-user.target
"""
_SLICE = """\
# Made by `qemu-userns hook systemd`; change it with `systemctl edit`.
[Unit]
Description=Virtual machines of qemu-userns

[Slice]
TasksMax=16384
MemoryMax=90%
CPUWeight=50
IOWeight=50
"""
# What the launcher and the supervisor need; QEMU has none of them.
_CAPABILITIES = (
    *("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETFCAP", "CAP_SYS_ADMIN"),  # namespaces, id maps, mounts
    *("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_CHOWN", "CAP_FOWNER", "CAP_MKNOD"),  # root's files and devices
    *("CAP_SYS_PTRACE", "CAP_KILL", "CAP_SYS_RESOURCE", "CAP_IPC_LOCK", "CAP_NET_ADMIN"),  # /proc/PID, limits, memory, taps
)


def build_setup(options: "Options") -> Setup:
    """Look at the host, and say what is to be done."""
    program = os.path.join(sysconfig.get_path("scripts"), "qemu-userns")
    running = os.path.isdir("/run/systemd/system") and not options.root
    steps: "list[Step]" = [
        File("systemd runs VMs by it", f"/etc/systemd/system/{name}", text) for name, text in build_units(program).items()
    ]
    if running:
        steps.append(Command("systemd reads its files", ("systemctl", "daemon-reload")))
    obstacles = []
    if not os.access(program, os.X_OK):
        obstacles.append(Fault(program, "is not there", "install qemu-userns with pip"))
    if any(character in program for character in "\"'\\"):
        obstacles.append(Fault(program, "has a quote or a backslash, and no unit can name it", "install it at another place"))
    limits, faults = describe_limits(options, None)
    restriction = find_restriction(options.name, program, options.root)
    return Setup(
        (f"program: {program}", f"systemd: {'runs' if running else 'does not run here'}", *limits),
        tuple(steps),
        tuple(obstacles),
        (*faults, *([restriction] if restriction else [])),
        (f"write QEMU_ARGS='...' to {ENVIRONMENT_DIR}/NAME.env, and: systemctl start qemu-userns@NAME",),
    )


def build_units(program: str) -> "dict[str, str]":
    """Return the text of each unit, by its name.

    Args:
        program: path of the command qemu-userns.
    """
    quoted = '"' + program.replace("%", "%%").replace("$", "$$") + '"'  # systemd.service(5), "Command lines"
    capabilities = " ".join(_CAPABILITIES)
    service = _SERVICE.format(directory=ENVIRONMENT_DIR, program=quoted, slice=SLICE, capabilities=capabilities)
    return {UNIT: service, SLICE: _SLICE}
