"""What a plan is made from besides the command line: values that host/ has looked up. Pure."""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.cmdline.objects import Object
    from qemu_userns.plan.idmaps import ShareMap

REGULAR, DIRECTORY, SOCKET, FIFO, BLOCK, CHARACTER, ABSENT = (
    "file",
    "directory",
    "socket",
    "fifo",
    "block device",
    "device",
    "absent",
)

MISSING = "No such file or directory"  # PathFact.error of a path whose directory is not there
LANDLOCK_ABI_WITH_SCOPES = 6  # Linux 6.12


def directory_of(path: str) -> str:
    """Return the directory that a path names its last component in: "." for a bare name."""
    head = path[: path.rfind("/") + 1]
    return head.rstrip("/") or ("/" if head else ".")


class VfioFact(Record):
    """What /sys says of a device that is to be given to a guest."""

    group: str  # the node of its iommu group, "" without one
    cdev: str  # its own node, "" where the kernel has none
    driver: str  # "" if none drives it
    mediated: bool  # a part of a device (mdev)
    others: "tuple[tuple[str, str], ...]" = ()  # of the same group, with their drivers that keep vfio from having it


class PagesFact(Record):
    """What there is of the huge pages of one size."""

    size_bytes: int  # of one
    free: int  # how many are to be had
    total: int  # vm.nr_hugepages, of this size


class PathFact(Record):
    """What a path leads to, as the caller sees it."""

    given: str
    real: str  # without symlinks; of an absent file, the real directory and the name
    kind: str
    links: "tuple[tuple[str, str], ...]" = ()  # symlinks on the way: real path and target
    passed: "tuple[str, ...]" = ()  # real directories that a later ".." left again
    mode: int = 0
    uid: int = 0
    gid: int = 0
    inode: "tuple[int, int]" = (0, 0)
    device: int = 0  # st_rdev
    error: "str | None" = None  # why the caller cannot walk to it or read it
    readable: bool = False  # by the caller, as access(2) says
    writable: bool = False
    parent_writable: bool = False
    xattrs: bool = True  # whether user.* attributes can be set (looked up for 9p shares only)
    above: "tuple[tuple[int, int, int], ...]" = ()  # mode, uid and gid of the directories above (looked up for shares only)
    fd: "int | None" = None  # /dev/fd/N and /proc/self/fd/N: the number
    locked: bool = False  # somebody holds a lock on the file (looked up for -pidfile only)
    group: str = ""  # name of the group of a device that the caller may not open (looked up for devices that are named only)
    vfio: "VfioFact | None" = None  # looked up for vfio devices only
    pages: "PagesFact | None" = None  # of a hugetlbfs (looked up for memory only)
    entries: "tuple[str, ...]" = ()  # names in a directory that its own bind does not serve (where the row has entries)


class ImageFact(Record):
    """A file that an image's header names."""

    path: str  # resolved against the image that names it
    format: str
    role: str  # "backing", "data-file", "extent"
    by: str  # path of the image that names it
    readable: bool  # by QEMU with its own rights, every directory on the way included


class StandIn(Record):
    """A share as the stand-in for virtfs-proxy-helper hands it over."""

    path: str  # real path of its root
    inode: "tuple[int, int]"
    number: int  # fd of the connection, which QEMU keeps: the stand-in ends with it
    idmap: "ShareMap | None"  # of the user namespace that it runs in; None: the launcher's own


class VirtiofsdFact(Record):
    """The virtiofsd of this host."""

    path: str  # real path
    modern: bool  # the one in Rust


class Account(Record):
    """A user of the host."""

    name: str
    uid: int
    gid: int
    groups: "tuple[int, ...]"  # supplementary groups, as initgroups(3) sets them


class Caller(Record):
    """Who starts QEMU."""

    account: Account
    root: bool  # effective uid 0 with the capabilities that a root launch needs
    cwd: str
    umask: int
    fd_limit: int  # soft RLIMIT_NOFILE
    open_fds: "frozenset[int]"  # what the caller passed in, 0 to 2 included


class HostFacts(Record):
    """Everything that was looked up once."""

    caller: Caller
    paths: "Mapping[str, PathFact]"  # by the path as given
    images: "Mapping[str, tuple[ImageFact, ...]]"  # by the path of the operator's image
    base: "tuple[PathFact, ...]"  # what every view holds, where it exists
    environment: "Mapping[str, str]"
    landlock_abi: int = 0  # 0: the kernel has none
    refused_taps: "tuple[tuple[str, str], ...]" = ()  # by name, "" for a new one: why the caller may not open it
    # Programs that make a tap for QEMU, and its bridge: why they cannot, and a hint.
    refused_helpers: "tuple[tuple[str, str, str, str], ...]" = ()
    # Of taps with settings, by id: why they cannot be made so, and a hint.
    refused_settings: "tuple[tuple[str, str, str], ...]" = ()
    call_filter: bool = False  # whether a seccomp filter can be built for this machine
    # RLIMIT_MEMLOCK: soft, and how high it may be set; -1 for none (looked up where memory is locked)
    lock_limit: "tuple[int, int]" = (-1, -1)
    window: bool = False  # QEMU would open one, since nobody says what it shall show
    not_taps: "frozenset[int]" = frozenset()  # fds of the caller that the command line names as taps, and are none
    stand_ins: "Mapping[Object, StandIn]" = {}  # noqa: RUF012 (never changed) by the share
    virtiofsd: "VirtiofsdFact | None" = None  # looked up where a share wants it
