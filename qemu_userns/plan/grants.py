"""Grants: what the host gives to one VM. Pure; sandbox/, host/ and supervisor/ execute them.

Each has `describe()`, one line for `explain` and the log, and `why`, the word of the command line that asked for it.
"""

from qemu_userns.plan.rights import Rights
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.identity import MountMap

HELPER_FD = 3  # of qemu-bridge-helper and passt: a socket

READ = 4
WRITE = 2
SEARCH = 1


class Grant(Record):
    """Base of all grants."""

    why: str

    def describe(self) -> str:
        """Say in one line what is given."""
        raise NotImplementedError


class Bind(Grant):
    """A path of the host, visible in the view at the same path."""

    path: str  # real path: no component is a symlink
    writable: bool = False
    device: bool = False
    inode: "tuple[int, int] | None" = None  # (st_dev, st_ino) that was planned for; None: whatever is there
    idmap: "MountMap | None" = None  # of the idmapped mount that shows it

    def describe(self) -> str:
        """Say path and access."""
        mapped = "" if self.idmap is None else f", {self.idmap.text}"
        return f"{self.path} ({'rw' if self.writable else 'ro'}{', device' if self.device else ''}{mapped})"


class Node(Grant):
    """A device node of the host that QEMU's id may not open: the same node, made anew for that id alone."""

    path: str
    device: int  # st_rdev
    block: bool  # whether it is a block device

    def describe(self) -> str:
        """Say path and kind."""
        return f"{self.path} ({'block' if self.block else 'character'} device, a node of QEMU's own)"


class Link(Grant):
    """A symlink in the view, as it is on the host."""

    path: str
    target: str

    def describe(self) -> str:
        """Say where it leads."""
        return f"{self.path} -> {self.target}"


class Private(Grant):
    """An empty directory in the view that is the VM's alone."""

    path: str
    mode: int = 0o755
    tmpfs: bool = True  # a writable file system in memory; else only a directory that the caller stood in

    def describe(self) -> str:
        """Say what kind."""
        return f"{self.path} ({'private tmpfs' if self.tmpfs else 'empty directory'})"


class Copy(Grant):
    """A file in the view with contents of our own; the host's file of that path stays as it is."""

    path: str
    content: str

    def describe(self) -> str:
        """Say how much."""
        return f"{self.path} (private copy, {len(self.content)} characters)"


class Create(Grant):
    """A file that QEMU shall create: made empty outside, given to QEMU's id, and visible at its path."""

    path: str
    mode: int
    overwrites: "tuple[int, int] | None" = None  # inode of a file that is there, not QEMU's, and gives way to the new one
    temporary: bool = False  # removed when QEMU has ended, as QEMU itself would

    def describe(self) -> str:
        """Say path and fate."""
        fate = ", removed at QEMU's end" if self.temporary else ""
        return f"{self.path} (rw, created{', replacing what is there' if self.overwrites else ''}{fate})"


class CreateDir(Grant):
    """A directory of the VM's own below one of the host's, for what does not fit into memory, shown as that one."""

    path: str

    def describe(self) -> str:
        """Say path and fate."""
        return f"{self.path} (rw, a private directory below it, removed at QEMU's end)"


class KeepFd(Grant):
    """An fd that the caller passed in: kept under its number."""

    number: int
    reopened: bool = False  # named as a path (/dev/fd/N), so that QEMU opens it again

    def describe(self) -> str:
        """Say the number."""
        return f"fd {self.number}: kept{', may be opened again' if self.reopened else ''}"


class Reserved(Grant):
    """An fd that the launcher itself opens for QEMU, under a number of the plan's."""

    what: str  # "lease", "supervisor", "ptmx", "config of ...", or "copy": of the caller's fd, in its place
    number: int
    content: "str | None" = None  # of a configuration file

    def describe(self) -> str:
        """Say what it is."""
        return f"fd {self.number}: {self.why}"


class OpenFd(Grant):
    """A file or device node opened outside with the caller's rights."""

    path: str
    given: str  # the path as the caller spells it, which query-fdsets shows
    flags: int
    number: int
    fdset: "int | None"  # that it is passed in; None: by its number, or by name
    inode: "tuple[int, int]"
    device: "int | None" = None  # st_rdev of a character device; None: a regular file
    guest_cid: "int | None" = None  # of vhost-vsock: taken at once, so that no other VM can have it

    def describe(self) -> str:
        """Say what it is open on."""
        access = ("read-only", "write-only", "read-write")[self.flags & 3]
        cid = "" if self.guest_cid is None else f", guest CID {self.guest_cid}"
        return f"fd {self.number}: {self.path}, {access}{cid}" + ("" if self.fdset is None else f", in /dev/fdset/{self.fdset}")


class Listen(Grant):
    """A listening unix socket bound outside at the caller's path, passed by number."""

    path: str
    given: str  # the path as the caller spells it, which is what QEMU reports
    number: int

    def describe(self) -> str:
        """Say path and number."""
        return f"fd {self.number}: listens on {self.path}, removed at QEMU's end"


class Connect(Grant):
    """A unix socket connected outside, passed by number."""

    path: str
    number: int
    inode: "tuple[int, int]"

    def describe(self) -> str:
        """Say path and number."""
        return f"fd {self.number}: connected to {self.path}"


class Run(Grant):
    """A program run outside; QEMU gets the other end of the socket that is its stdin and stdout."""

    argv: "tuple[str, ...]"
    number: int

    def describe(self) -> str:
        """Say what runs."""
        return f"fd {self.number}: {' '.join(self.argv)}, run outside"


class Virtiofsd(Grant):
    """A virtiofsd for one share, in QEMU's user namespace and with nothing but the share in sight; passed by number."""

    tag: str
    path: str  # real path of the share's root
    inode: "tuple[int, int]"
    writable: bool
    idmap: "MountMap | None"  # of the idmapped mount that it sees
    program: str
    modern: bool  # the one in Rust, with another command line than QEMU's old one
    number: int

    def describe(self) -> str:
        """Say what it serves."""
        mapped = "" if self.idmap is None else f", {self.idmap.text}"
        access = "rw" if self.writable else "ro"
        return f"fd {self.number}: {self.program} for {self.path} ({access}{mapped}), which sees nothing else and ends with QEMU"


class LockLimit(Grant):
    """How much memory QEMU may lock, where it may not lock so much yet: set outside, before there is a namespace."""

    limit_bytes: "int | None"  # None: all of it

    def describe(self) -> str:
        """Say how much."""
        much = "without limit" if self.limit_bytes is None else f"at least {self.limit_bytes >> 10} KiB"
        return f"RLIMIT_MEMLOCK: {much}"


class TapSettings(Record):
    """What our settings say of a tap that is made for the VM (`tap.NAME.KEY`): set once it is there, before its script runs."""

    name: str  # id of the -netdev, -nic or -net
    bridge: str = ""  # that it is put into
    mtu: "int | None" = None  # bytes
    mac: str = ""  # of the host's side
    owner: "int | None" = None  # uid that may open it too
    up: bool = True

    def describe(self) -> str:
        """Say it in one line."""
        parts = (
            f"in bridge {self.bridge}" if self.bridge else "",
            "" if self.mtu is None else f"mtu {self.mtu}",
            f"mac {self.mac}" if self.mac else "",
            "" if self.owner is None else f"of uid {self.owner}",
            "up" if self.up else "",
        )
        return ", ".join(filter(None, parts))


class Tap(Grant):
    """A tap opened outside, one fd for each queue; passed by number, or by name."""

    name: str  # "": the kernel chooses it, and it is gone with its last fd
    numbers: "tuple[int, ...]"
    vnet_hdr: "bool | None"  # None: if the kernel has it
    script: str = ""  # absolute; run outside once the tap is open, "" for none
    downscript: str = ""  # absolute; run outside when QEMU has ended, or has let go of the tap
    settings: "TapSettings | None" = None

    def describe(self) -> str:
        """Say which tap, what is set, and what runs for it."""
        queues = f", {len(self.numbers)} queues" if len(self.numbers) > 1 else ""
        script = f", {self.script} run outside" if self.script else ""
        downscript = f", {self.downscript} run outside at its end" if self.downscript else ""
        settings = "" if self.settings is None else f", {self.settings.describe()}"
        return f"{_describe_fds(self.numbers)}: tap {self.name or 'that the kernel names'}{queues}{settings}{script}{downscript}"


class Helper(Grant):
    """A tap that qemu-bridge-helper opens, run outside; passed by number, or by name."""

    argv: "tuple[str, ...]"  # HELPER_FD is where it hands the tap back
    number: int

    def describe(self) -> str:
        """Say what runs."""
        return f"fd {self.number}: the tap that {' '.join(self.argv)} opens, run outside"


class Passt(Grant):
    """A socket, whose other end a passt has that is run outside, and that ends with it; passed by number, or by name."""

    argv: "tuple[str, ...]"  # HELPER_FD is its end
    number: int

    def describe(self) -> str:
        """Say what runs."""
        return f"fd {self.number}: a socket to {' '.join(self.argv)}, run outside, which ends with it"


def _describe_fds(numbers: "tuple[int, ...]") -> str:
    return f"fd{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


class Consume(Grant):
    """An option that this program carries out itself; QEMU never sees it."""

    what: str

    def describe(self) -> str:
        """Say what happens instead."""
        return self.what


class Refuse(Grant):
    """What cannot work or would break the sandbox; `why` names the word, nothing is touched."""

    reason: str
    hint: "str | None" = None

    def describe(self) -> str:
        """Say the reason."""
        return self.reason


# What the supervisor serves a monitor on.
LISTEN, CONNECT, FD, STDIO, OWN = "listens on", "connects to", "serves", "serves stdio", "serves it on sockets of ours alone"


class Monitor(Grant):
    """A QMP monitor that the supervisor serves; QEMU gets a listening socket that only the supervisor can connect to."""

    kind: str  # LISTEN, CONNECT, FD, STDIO or OWN
    label: str  # of its character device
    pretty: bool
    number: int  # QEMU's fd: the private socket
    way_in: int  # QEMU's fd that is a path to that socket, which a new supervisor finds there
    path: str = ""  # of a unix socket that is listened on or connected to: the real path
    given: str = ""  # the address as the caller spells it: a path, HOST:PORT, or the number of an fd
    listens: bool = False  # FD: it is a listening socket
    wait: bool = False  # QEMU starts when the first client is there
    options: "tuple[tuple[str, str], ...]" = ()  # what else the caller says of the socket
    rights: Rights = Rights()  # of its clients
    lost: bool = False  # a new supervisor cannot have the clients' side again

    @property
    def reconnect_s(self) -> float:
        """After how long a lost or failed connection out is tried again; 0 for never."""
        options = dict(self.options)
        return float(options.get("reconnect-ms") or 0) / 1000 or float(options.get("reconnect") or 0)

    @property
    def public_count(self) -> int:
        """How many fds the launcher opens for its clients' side."""
        if self.lost:
            return 0
        if self.kind == STDIO:
            return 2
        return 0 if self.kind == OWN or (self.kind == CONNECT and self.reconnect_s) else 1

    def describe(self) -> str:
        """Say who serves it, and where."""
        place = f" fd {self.given}" if self.kind == FD else f" {self.given}" if self.given else ""
        waits = ", and QEMU waits for the first client" if self.wait else ""
        return f"fd {self.number}: QMP monitor {self.label}; the supervisor {self.kind}{place}{waits}"


class QmpSocket(Grant):
    """A socket of ours in addition to those of the command line, whose clients the supervisor serves on one of its monitors."""

    label: str  # of that monitor's character device
    path: str  # the real path
    given: str  # as the settings spell it
    mode: int
    rights: Rights

    def describe(self) -> str:
        """Say where, and who may connect as far as the mode says it."""
        return f"{self.given} (mode {self.mode:04o}), where the supervisor serves QMP monitor {self.label}"


class Notify(Grant):
    """The service manager is told of QEMU's state, which the supervisor asks by QMP: sd_notify(3)."""

    label: str  # of the monitor's character device
    address: str  # a path, or @NAME of an abstract socket

    def describe(self) -> str:
        """Say who is told what."""
        return f"{self.address} is told when QMP monitor {self.label} answers, and of each change of the guest's state"


VNC, SPICE = "vnc", "spice"


class Display(Grant):
    """A unix socket of a display, bound outside; the supervisor passes it, or each client that comes there, by QMP."""

    protocol: str  # VNC or SPICE
    label: str  # of the character device of the monitor by which it is passed
    path: str  # the real path
    given: str  # as the caller spells it, which is what QEMU reports

    def describe(self) -> str:
        """Say path and way."""
        how = "passed to QEMU" if self.protocol == VNC else "each client passed to QEMU"
        return f"listens on {self.path}, {how} by monitor {self.label}, removed at QEMU's end"
