"""Plans made from words and made-up hosts, for the tests of the pure rooms.

What a path of the made-up host is, its last component says: dir, file, new (nothing there), sock, char, block, fifo, with
anything behind it; `root` in it makes it root's alone, `deny` unreadable for the caller.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from qemu_userns.catalogue.needs import find_needs
from qemu_userns.cmdline.objects import CommandLine, Object, parse
from qemu_userns.cmdline.table import BUILTIN
from qemu_userns.plan.base import BASE
from qemu_userns.plan.build import Program, Settings, build_plan
from qemu_userns.plan.facts import (
    ABSENT,
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    REGULAR,
    SOCKET,
    Account,
    Caller,
    HostFacts,
    ImageFact,
    PathFact,
    StandIn,
    VfioFact,
    VirtiofsdFact,
)
from qemu_userns.plan.grants import (
    Bind,
    Connect,
    Consume,
    Copy,
    Create,
    CreateDir,
    Display,
    Grant,
    Helper,
    KeepFd,
    Link,
    Listen,
    LockLimit,
    Monitor,
    Node,
    Notify,
    OpenFd,
    Passt,
    Private,
    QmpSocket,
    Refuse,
    Reserved,
    Tap,
    Virtiofsd,
)
from qemu_userns.plan.identity import DIRECT, NEWIDMAP, Identity, MapEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qemu_userns.plan.plan import Plan

UID = 1000
CWD = "/home/user"
KINDS = {
    "dir": (DIRECTORY, stat.S_IFDIR | 0o755),
    "file": (REGULAR, stat.S_IFREG | 0o644),
    "new": (ABSENT, 0),
    "sock": (SOCKET, stat.S_IFSOCK | 0o755),
    "char": (CHARACTER, stat.S_IFCHR | 0o660),
    "kvm": (CHARACTER, stat.S_IFCHR | 0o666),
    "ptmx": (CHARACTER, stat.S_IFCHR | 0o666),
    "block": (BLOCK, stat.S_IFBLK | 0o660),
    "fifo": (FIFO, stat.S_IFIFO | 0o644),
    "tun": (CHARACTER, stat.S_IFCHR | 0o666),
    "passt": (REGULAR, stat.S_IFREG | 0o755),
    "qemu-bridge-helper": (REGULAR, stat.S_IFREG | 0o755),
    "vhost": (CHARACTER, stat.S_IFCHR | 0o660),
    "iommu": (CHARACTER, stat.S_IFCHR | 0o660),
    **dict.fromkeys(("sev", "sgx", "udmabuf", "renderD"), (CHARACTER, stat.S_IFCHR | 432)),
    "vfio": (CHARACTER, stat.S_IFCHR | 0o666),
    "0": (CHARACTER, stat.S_IFCHR | 0o664),  # of a USB device, and of an iommu group
}
USER = Identity(UID, UID, (UID,), False, NEWIDMAP, (MapEntry(0, UID, 1),), (MapEntry(0, UID, 1),), "the caller")
LEASED = Identity(600_000, 600_000, (), True, DIRECT, (MapEntry(0, 600_000, 65536),), (MapEntry(0, 600_000, 65536),), "leased")

VIRTIOFSD = VirtiofsdFact("/usr/lib/qemu/virtiofsd", modern=False)


class MadeUpStandIns(dict[Object, StandIn]):
    """For every share of virtfs-proxy-helper's a stand-in that hands /x/dir over and is connected to fd 9."""

    def __missing__(self, share: Object) -> StandIn:
        return StandIn("/x/dir", make_fact("/x/dir").inode, 9, None)


class MadeUpPaths(dict[str, PathFact]):
    """The fact of every path, made when it is asked for."""

    def __init__(self, root: bool, known: Mapping[str, PathFact] | None = None) -> None:
        super().__init__(known or {})
        self._root = root

    def __missing__(self, path: str) -> PathFact:
        fact = self[path] = make_fact(path, self._root)
        return fact

    def get(self, path: str, default: object = None) -> PathFact:
        return self[path]


def make_fact(path: str, root: bool = False) -> PathFact:
    """Return the fact that the name says."""
    number = path.rpartition("/")[2]
    if path.startswith("/dev/fd/"):
        return PathFact(path, path, REGULAR, fd=int(number), readable=True, writable=True)
    real = path if path.startswith("/") else f"{CWD}/{path}".replace("/./", "/").removesuffix("/.")
    name = real.rpartition("/")[2]
    kind, mode = next((known for key, known in KINDS.items() if name.startswith(key)), (DIRECTORY, stat.S_IFDIR | 0o755))
    owner = 0 if "root" in name else UID
    if owner == 0 and kind in (REGULAR, SOCKET, FIFO):
        mode = stat.S_IFMT(mode) | 0o600
    may = (root or owner == UID) and "deny" not in name and kind != ABSENT
    inode = (1, abs(hash(real)) % 10**9)
    return PathFact(
        path,
        real,
        kind,
        mode=mode,
        uid=owner,
        gid=owner,
        inode=inode,
        readable=may,
        writable=may,
        vfio=make_vfio(name) if real.startswith("/sys/") else None,
        parent_writable=root or owner != 0,
    )


def make_vfio(name: str) -> VfioFact:
    """Return what /sys says of a device, by its name: alone (in no group), other (another driver has it), old, mdev, mates."""
    group, cdev = ("", "") if "alone" in name else ("/dev/vfio/01", "" if "old" in name else "/dev/vfio/devices/vfio0")
    others = (("0000:01:00.1", "e1000e"),) if "mates" in name else ()
    return VfioFact(group, cdev, "other" if "other" in name else "vfio-pci", "mdev" in name, others)


def read(*words: str, configs: Mapping[int, str] | None = None) -> CommandLine:
    return parse(words, BUILTIN, configs or {})


def make_facts(
    root: bool = False,
    fds: Sequence[int] = (),
    images: Mapping[str, tuple[ImageFact, ...]] | None = None,
    environ: Mapping[str, str] | None = None,
    landlock_abi: int = 6,
    lock_limit: tuple[int, int] = (-1, -1),
    refused_taps: tuple[tuple[str, str], ...] = (),
    fd_limit: int = 1024,
) -> HostFacts:
    """Return a made-up host that has nothing that every view would show."""
    account = Account("root", 0, 0, (0,)) if root else Account("user", UID, UID, (UID,))
    caller = Caller(account, root, CWD, 0o022, fd_limit, frozenset((0, 1, 2, *fds)))
    base = tuple(PathFact(entry.path, entry.path, ABSENT) for entry in BASE)
    paths = MadeUpPaths(root)
    return HostFacts(
        caller,
        paths,
        images or {},
        base,
        environ or {},
        landlock_abi=landlock_abi,
        lock_limit=lock_limit,
        refused_taps=refused_taps,
    )


def plan_of(
    *words: str,
    root: bool = False,
    fds: Sequence[int] = (),
    images: Mapping[str, tuple[ImageFact, ...]] | None = None,
    configs: Mapping[int, str] | None = None,
    settings: Settings | None = None,
    environ: Mapping[str, str] | None = None,
    seccomp: bool = True,
    landlock_abi: int = 6,
    paths: Mapping[str, PathFact] | None = None,
    lock_limit: tuple[int, int] = (-1, -1),
    version: tuple[int, ...] = (7, 2, 22),
    refused_taps: tuple[tuple[str, str], ...] = (),
    refused_helpers: tuple[tuple[str, str, str, str], ...] = (),
    fd_limit: int = 1024,
    window: bool = False,
    virtiofsd: VirtiofsdFact | None = VIRTIOFSD,
) -> Plan:
    """Plan a command line for an unprivileged caller, or for root with leased ids; `paths` are those not as their names say."""
    commandline = read(*words, configs=configs)
    needs = find_needs(commandline)
    program = Program("/usr/bin/file-qemu", version, seccomp, ())
    facts = make_facts(root, fds, images, environ, landlock_abi, lock_limit, refused_taps, fd_limit)
    stand_ins = MadeUpStandIns()
    facts = facts.replace(paths=MadeUpPaths(root, paths), stand_ins=stand_ins, window=window, virtiofsd=virtiofsd)
    facts = facts.replace(refused_helpers=refused_helpers)
    return build_plan("qemu", commandline, needs, facts, LEASED if root else USER, program, settings or Settings(), leased=root)


def asked_for(plan: Plan) -> list[str]:
    """Return in short what a plan grants beyond what every plan does."""
    always = set(plan_of(root=plan.identity is LEASED).grants)
    return [brief(grant) for grant in plan.grants if grant not in always and not isinstance(grant, Reserved)]


def scripts_of(grant: Tap) -> tuple[str, ...]:
    """Return what is not as by default."""
    default = (grant.script, grant.downscript, grant.vnet_hdr) == ("/etc/qemu-ifup", "/etc/qemu-ifdown", None)
    return () if default else (grant.script or "no", grant.downscript or "no", str(grant.vnet_hdr))


def brief(grant: Grant) -> str:
    """Return a grant in a few words."""
    match grant:
        case Bind():
            access = "device" if grant.device else "rw" if grant.writable else "ro"
            return f"{access} {grant.path}" + ("" if grant.idmap is None else " as owner")
        case Create():
            return f"create {grant.path}" + (" over" if grant.overwrites else "") + (" temporary" if grant.temporary else "")
        case Link():
            return f"link {grant.path}"
        case Private():
            return f"private {grant.path}"
        case CreateDir() | Listen() | Connect() | Node() | Copy():
            return f"{type(grant).__name__.lower()} {grant.path}"
        case Monitor():
            return f"monitor {grant.kind} {grant.given}".rstrip() + (" waits" if grant.wait else "")
        case QmpSocket():
            return f"socket {grant.path} for {grant.label}"
        case Notify():
            return f"notify {grant.address} by {grant.label}"
        case Display():
            return f"{grant.protocol} {grant.path} by {grant.label}"
        case KeepFd():
            return f"fd {grant.number}" + (" reopened" if grant.reopened else "")
        case Virtiofsd():
            return f"virtiofsd {'rw' if grant.writable else 'ro'} {grant.path}" + ("" if grant.idmap is None else " as owner")
        case OpenFd():
            return f"open {grant.path} {('r', 'w', 'rw')[grant.flags & 3]}" + ("" if grant.fdset else " alone")
        case LockLimit():
            return "lock " + ("all" if grant.limit_bytes is None else f"{grant.limit_bytes >> 20} MiB")
        case Tap():
            return " ".join(word for word in (f"tap {grant.name or 'any'} x{len(grant.numbers)}", *scripts_of(grant)) if word)
        case Helper() | Passt():
            return " ".join(grant.argv)
        case Consume():
            return "consume"
        case Refuse():
            return f"refuse: {grant.reason}"
        case _:
            raise TypeError(grant)
