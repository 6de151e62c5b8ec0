"""What every view holds, where the host has it. Pure."""

from qemu_userns.record import Record


class BasePath(Record):
    """A path of the host that is shown to every QEMU."""

    path: str
    why: str
    writable: bool = False
    device: bool = False


# What QEMU and its libraries read of /etc. Passwords, keys and the host's own configuration are not among them.
_ETC = (
    "alternatives ceph crypto-policies fonts gai.conf gnutls group gtk-3.0 host.conf hosts iscsi ld.so.cache localtime "
    "nsswitch.conf pango passwd pki qemu resolv.conf sasl2 services ssl/certs ssl/openssl.cnf"
)

BASE: "tuple[BasePath, ...]" = (
    *(BasePath(path, "programs and libraries") for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")),
    *(BasePath(path, "programs and libraries") for path in ("/nix/store", "/gnu/store")),
    *(BasePath(f"/etc/{name}", "configuration that QEMU and its libraries read") for name in _ETC.split()),
    # Read-only: a process of the same id may write the oom_score_adj of others.
    BasePath("/proc", "processes; 9p and /dev/fd need /proc/self"),
    *(BasePath(f"/dev/{name}", "standard device", True, True) for name in ("null", "zero", "full", "random", "urandom", "tty")),
    # Without devices, so that the caller's other terminals cannot be opened: openpty(3) gets the other end by TIOCGPTPEER.
    BasePath("/dev/pts", "pseudo terminals are told by their number on the host"),
    BasePath("/dev/userfaultfd", "postcopy migration", True, True),
)

LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)

# Directories in memory that are the VM's alone.
PRIVATE = (("/tmp", 0o1777), ("/run", 0o755), ("/var/tmp", 0o1777), ("/dev/shm", 0o1777))

PTMX = "/dev/ptmx"
KVM = "/dev/kvm"
VFIO_CONTAINER = "/dev/vfio/vfio"
VFIO_DEVICES = "/dev/vfio/devices"  # with a node for each device, where the kernel has them
