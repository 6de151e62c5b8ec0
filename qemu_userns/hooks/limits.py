"""What a host has and allows VMs: which QEMU, user namespaces, ids to lease, memory to lock; and whose the programs are."""

import os

import qemu_userns
from qemu_userns.errors import HostError, QemuUsernsError, ResourceError
from qemu_userns.hooks.files import check_place, read_text
from qemu_userns.hooks.install import find_import_path
from qemu_userns.hooks.steps import STANDARD_PATH, Fault, run
from qemu_userns.host.config import load_config
from qemu_userns.host.leases import LEASE_COUNT, count_ranges, find_pools
from qemu_userns.host.qemu import find_qemu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.hooks.host import Options

_SYSCTLS = ("user.max_user_namespaces", "kernel.unprivileged_userns_clone", "kernel.apparmor_restrict_unprivileged_userns")
_CONFIG = "/etc/qemu-userns/config.toml"


def describe_qemu(names: "list[str]", root: str) -> "list[str]":
    """Say which version the QEMUs are, asking each; of another system's none can be asked."""
    if root:
        return []
    versions: "dict[str, list[str]]" = {}
    for name in names:
        try:
            said = run([find_qemu(name, STANDARD_PATH), "-version"]).partition("\n")[0]
        except HostError as err:
            said = f"does not run: {err.why}"
        versions.setdefault(said, []).append(name)
    return [f"{', '.join(several)}: {said}" for said, several in versions.items()]


def read_sysctls() -> "dict[str, str]":
    """Return the settings of user namespaces that this kernel has."""
    found = {name: read_text(f"/proc/sys/{name.replace('.', '/')}") for name in _SYSCTLS}
    return {name: value.strip() for name, value in found.items() if value is not None}


def describe_sysctls(values: "Mapping[str, str]") -> str:
    """Say what they are."""
    return f"user namespaces: {', '.join(f'{name} = {value}' for name, value in values.items()) or 'the kernel has none'}"


def find_sysctl_faults(values: "Mapping[str, str]") -> "list[Fault]":
    """Return which of them allow no user namespaces. AppArmor's is for apparmor.find_restriction, which knows the program."""
    needed = {"user.max_user_namespaces": "65536", "kernel.unprivileged_userns_clone": "1"}
    faults = []
    for name, value in needed.items():
        if values.get(name) == "0":
            setting = f"{name}={value}"
            hint = f"sysctl {setting} && echo {setting} > /etc/sysctl.d/60-qemu-userns.conf"
            faults.append(Fault(name, "is 0: QEMU can have no user namespace", hint))
    if "user.max_user_namespaces" not in values:
        faults.append(Fault("user namespaces", "the kernel is built without them", "use one with CONFIG_USER_NS"))
    return faults


def find_leases(root: str) -> "tuple[str, list[Fault]]":
    """Say which ids root's VMs are leased, and how many VMs they are for; return why there are none."""
    try:
        config = load_config([root + _CONFIG], None)
        pools, taken = find_pools(f"{root}/etc/subuid", f"{root}/etc/subgid", config.pool)
    except QemuUsernsError as err:
        return "ids for VMs of root's: none", [Fault(err.what, err.why, err.hint)]
    count = count_ranges(pools, taken)
    ranges = ", ".join(f"{pool.start}-{pool.start + pool.count - 1}" for pool in pools)
    text = f"ids for VMs of root's: {ranges}, enough for {count} at once"
    if count:
        return text, []
    why = f"no {LEASE_COUNT} ids in a row that /etc/subuid and /etc/subgid do not give to others"
    return text, [Fault(f"ids {ranges}", why, f"set a larger `pool` in {_CONFIG}")]


def find_owners(python: str) -> "list[Fault]":
    """Return whether somebody else than root decides what runs as root: the interpreter, or this program.

    Args:
        python: the interpreter.
    """
    for path in (python, *(os.path.join(directory, "any") for directory in find_import_path()), qemu_userns.__file__):
        try:
            check_place(path, "", trusted_uid=0)
        except ResourceError as err:
            hint = f"{err.hint}; or install qemu-userns where only root may write, and run the hook from there"
            return [Fault(err.what, f"{err.why}, and root's VMs are started by what is in it", hint)]
    return []


def describe_lock_limit(pid: "int | None") -> str:
    """Say how much memory VMs may lock, as vfio and -overcommit mem-lock=on do: getrlimit(2), systemd.exec(5).

    Args:
        pid: of the daemon that starts them, None for one that does not run, and for systemd itself.
    """
    lines = (read_text(f"/proc/{pid}/limits") or "").splitlines() if pid is not None else []
    limit = next((line.split()[3] for line in lines if line.startswith("Max locked memory")), None)
    said = "LimitMEMLOCK= of the unit" if limit is None else limit if limit == "unlimited" else f"{limit} bytes"
    return f"memory that VMs may lock: {said}; for vfio and -overcommit mem-lock=on root's launcher raises it"


def describe_limits(options: "Options", pid: "int | None") -> "tuple[list[str], list[Fault]]":
    """Say what the host allows, and what is wrong with that; of another system, what its files say.

    Args:
        options: of the hook.
        pid: of the daemon, if it runs.
    """
    leases, faults = find_leases(options.root)
    if options.root:
        return [leases], faults
    values = read_sysctls()
    faults = [*find_sysctl_faults(values), *faults, *find_owners(options.python)]
    return [describe_sysctls(values), leases, describe_lock_limit(pid)], faults


def list_programs(directory: str) -> "list[str]":
    """Return the names in a directory that are QEMU's; none if it is not there."""
    try:
        return [name for name in os.listdir(directory) if name.startswith("qemu-system-")]
    except FileNotFoundError:
        return []
