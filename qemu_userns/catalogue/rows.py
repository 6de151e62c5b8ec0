"""The catalogue: for each kind of object, which member names a host resource, and how that is handed over. Pure.

One table for the command line, -readconfig sections, -set, and QMP commands, which all build the same objects. A row with
conditions applies only to objects whose members have one of the values; "" stands for a member that is not there. A key
that begins with "**." matches at any depth, and its conditions are about members of that depth; "#" stands for the elements of
a list. What no row names goes to QEMU as it is.

Source: QEMU's qemu-options.hx and qapi/*.json, 7.2 to 11.0.
"""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.buses import RENDER_NODES
from qemu_userns.record import Record

ANY_ENTRY = "*"


class Row(Record):
    """One member of one kind of object that names a host resource."""

    kind: str  # "*" for every kind
    key: str
    way: str
    when: "tuple[tuple[str, tuple[str, ...]], ...]" = ()
    reason: str = ""  # of REFUSE and CONSUME
    hint: str = ""
    entries: "tuple[str, ...]" = ()  # of DIRECTORY: the names that QEMU looks for in it, or ANY_ENTRY
    node: str = ""  # of OPEN: the device node
    fd_key: str = ""  # of OPEN and VFIO: the member by which QEMU takes an fd of it


def _with_values(kinds: str, way: str) -> "tuple[Row, ...]":
    """Make rows for options whose whole value is the resource."""
    return tuple(Row(kind, "value", way) for kind in kinds.split())


_SEV = ("sev-guest", "sev-snp-guest")
_QOM_TYPES_WITH_FILE = ("secret", "sev-guest", "igvm-cfg")


def _list_certificates(end: str) -> "tuple[str, ...]":
    """Return the names of certificates and keys of one end; the numbered ones are those of newer QEMUs."""
    return tuple(f"{end}-{what}{number}.pem" for number in ("", "-0", "-1", "-2", "-3") for what in ("cert", "key"))


_AS_SERVER, _AS_CLIENT = ("endpoint", ("server",)), ("endpoint", ("client", ""))
# What QEMU opens in the directory of a tls-creds object; crypto/tlscreds*.c.
_CREDENTIALS = (
    ("tls-creds-x509", _AS_SERVER, ("ca-cert.pem", "ca-crl.pem", "dh-params.pem", *_list_certificates("server"))),
    ("tls-creds-x509", _AS_CLIENT, ("ca-cert.pem", *_list_certificates("client"))),
    ("tls-creds-psk", _AS_SERVER, ("dh-params.pem", "keys.psk")),
    ("tls-creds-psk", _AS_CLIENT, ("keys.psk",)),
    ("tls-creds-anon", _AS_SERVER, ("dh-params.pem",)),
)


def _open_for(kind: str, key: str, names: "tuple[str, ...]", node: str, fd_key: str) -> Row:
    """Make the row of objects that open a device node unless an fd is given."""
    return Row(kind, key, ways.OPEN, ((key, names), (fd_key, ("",))), node=node, fd_key=fd_key)


def _with_buses(name: str) -> "tuple[str, ...]":
    """Return the names of a virtio device on each bus."""
    return tuple(f"{name}-{bus}" for bus in ("pci", "pci-non-transitional", "pci-transitional", "ccw", "device"))


def _taps(kind: str) -> "tuple[Row, ...]":
    """Make the rows of taps, which QEMU opens unless fds are given, and of passt; conditions are as in net/tap.c."""
    tap = (("type", ("tap",)), ("fd", ("",)), ("fds", ("",)))
    vhost = (("type", ("tap",)), ("vhostfd", ("",)), ("vhostfds", ("",)))
    helper, node = "/usr/lib/qemu/qemu-bridge-helper", "/dev/vhost-net"
    return (
        Row(kind, "type", ways.TAP, (*tap, ("helper", ("",))), node="/dev/net/tun"),
        Row(kind, "type", ways.BRIDGE, tap, node=helper),
        Row(kind, "type", ways.BRIDGE, (("type", ("bridge",)),), node=helper),
        Row(kind, "path", ways.PASST, (("type", ("passt",)),)),
        Row(kind, "type", ways.PASST, (("type", ("passt",)), ("path", ("",)), ("vhost-user", ("", "off"))), node="passt"),
        Row(kind, "vhost", ways.VHOST, (*vhost, ("vhost", ("on",))), node=node),
        Row(kind, "vhostforce", ways.VHOST, (*vhost, ("vhost", ("",)), ("vhostforce", ("on",))), node=node),
    )


# Those that make dma-bufs of the guest's memory by themselves: the others leave it to virgl.
_GPUS = ("virtio-gpu-pci", "virtio-gpu-device", "virtio-gpu-ccw", "virtio-vga")
_VFIO_PCI = ("vfio-pci", "vfio-pci-nohotplug")

# Network back ends that take rights over the host's network or processes, and that no fd stands in for.
_NO_NETDEVS = (
    Row(
        "",
        "",
        ways.REFUSE,
        (("type", ("l2tpv3",)), ("udp", ("", "off"))),
        "L2TPv3 without UDP opens a raw IP socket, which takes CAP_NET_RAW over the host's network",
        "use udp=on with srcport= and dstport= at both ends",
    ),
    Row(
        "",
        "",
        ways.REFUSE,
        (("type", ("af-xdp",)), ("sock-fds", ("",))),
        "AF_XDP loads a BPF program onto the interface, which takes CAP_NET_ADMIN and CAP_BPF over the host",
        "load it outside, and pass one socket per queue: inhibit=on,sock-fds=",
    ),
    Row(
        "",
        "",
        ways.REFUSE,
        (("type", ("passt",)), ("vhost-user", ("on",))),
        "a nic of vhost-user takes no fd, and what QEMU starts may not make the namespaces that passt makes",
        "leave vhost-user=on out, or start passt --vhost-user --socket PATH outside, and use a chardev with -netdev vhost-user",
    ),
)
_NO_DESKTOP = "it needs the caller's desktop (X or Wayland, D-Bus, /dev/dri), which QEMU does not see"
_DESKTOP_HINT = "use -vnc or -spice on a unix socket with a viewer outside, or -userns fs=host"
_NO_HOME = "it takes known_hosts and keys from the caller's home, which QEMU does not see, and would then have"
_SSH_HINT = "run `nbdkit ssh` outside and give its socket (nbd:unix:PATH), or use -userns fs=host, an agent and host_key_check="
_NO_BUS = "a bus takes the caller only under its own uid, and inside QEMU is root"
_BUS_HINT = "use -display dbus,p2p=on, and hand a socket in by getfd and add_client"

SSH = Row("drive", "**.driver", ways.HOST_TREE, (("driver", ("ssh",)),), _NO_HOME, _SSH_HINT)

ROWS: "tuple[Row, ...]" = (
    # Kernels, firmware and tables
    *_with_values("kernel dtb shim", ways.READ),
    Row("initrd", "value", ways.READ_MODULES),
    *_with_values("bios", ways.FIRMWARE),
    Row("machine", "kernel", ways.READ),
    Row("machine", "initrd", ways.READ_MODULES),
    Row("machine", "dtb", ways.READ),
    Row("machine", "shim", ways.READ),
    Row("machine", "dumpdtb", ways.MADE),
    Row("machine", "firmware", ways.FIRMWARE),
    Row("option-rom", "romfile", ways.FIRMWARE),
    Row("device", "romfile", ways.FIRMWARE),
    Row("global", "value", ways.FIRMWARE, (("property", ("romfile",)),)),
    Row("boot", "splash", ways.FIRMWARE),
    Row("acpitable", "file", ways.READ_LIST),
    Row("acpitable", "data", ways.READ_LIST),
    Row("smbios", "file", ways.READ),
    Row("smbios", "path", ways.READ),
    Row("fw_cfg", "file", ways.READ),
    Row("device", "file", ways.READ, (("driver", ("loader", "guest-loader")),)),
    Row("device", "sdrfile", ways.READ),
    Row("device", "frudatafile", ways.READ),
    Row("device", "cdat", ways.READ),
    Row("L", "value", ways.DIRECTORY, entries=(ANY_ENTRY,)),
    Row("plugin", "file", ways.READ),
    Row("readconfig", "value", ways.CONFIG),
    # Block devices
    *_with_values("disk hda hdb hdc hdd cdrom fda fdb mtdblock sd pflash", ways.IMAGE),
    SSH,
    SSH.replace(kind="blockdev"),
    Row("drive", "file", ways.IMAGE),
    Row("drive", "**.filename", ways.IMAGE),
    Row("blockdev", "**.filename", ways.IMAGE),
    Row("blockdev", "**.dir", ways.WRITE_DIRECTORY),
    Row("drive", "**.dir", ways.WRITE_DIRECTORY),
    Row("blockdev", "**.conf", ways.READ),
    Row("drive", "**.conf", ways.READ),
    Row("blockdev", "**.config", ways.READ),
    Row("drive", "**.config", ways.READ),
    Row("blockdev", "**.server.path", ways.SOCKET),
    Row("drive", "**.server.path", ways.SOCKET),
    Row("blockdev", "**.path", ways.SOCKET, (("driver", ("nbd",)),)),
    Row("drive", "**.path", ways.SOCKET, (("driver", ("nbd",)),)),
    Row("blockdev", "**.server.0.path", ways.SOCKET, (("driver", ("gluster",)),)),
    Row("blockdev", "**.logfile", ways.APPEND, (("driver", ("gluster",)),)),
    Row("blockdev", "**.path", ways.SOCKET, (("driver", ("virtio-blk-vhost-user",)),)),
    Row("blockdev", "**.path", ways.DEVICE, (("driver", ("virtio-blk-vhost-vdpa", "nvme-io_uring")),)),
    Row("blockdev", "**.path", ways.VFIO, (("driver", ("virtio-blk-vfio-pci",)),)),  # its directory in /sys; QEMU >= 8.1
    Row("blockdev", "**.device", ways.VFIO, (("driver", ("nvme",)),)),
    Row("drive", "**.device", ways.VFIO, (("driver", ("nvme",)),)),
    Row("iscsi", "initiator-name-file", ways.READ),
    # Memory
    *_with_values("mem-path", ways.MEMORY),
    Row("object", "mem-path", ways.READ, (("readonly", ("on",)),)),
    Row("object", "mem-path", ways.MEMORY),
    Row("overcommit", "mem-lock", ways.LOCK, (("mem-lock", ("on", "on-fault")),)),
    # Character devices and monitors
    Row("chardev", "path", ways.SOCKET, (("backend", ("socket",)), ("abstract", ("", "off")))),
    Row("chardev", "path", ways.WRITE, (("backend", ("file",)), ("append", ("", "off")))),
    Row("chardev", "path", ways.APPEND, (("backend", ("file",)), ("append", ("on",)))),
    Row("chardev", "path", ways.PIPE, (("backend", ("pipe",)),)),
    Row("chardev", "path", ways.DEVICE, (("backend", ("serial", "tty", "parallel", "parport")),)),
    Row("chardev", "path", ways.MADE, (("backend", ("pty",)),)),
    Row("chardev", "input-path", ways.READ),
    Row("chardev", "logfile", ways.WRITE, (("logappend", ("", "off")),)),
    Row("chardev", "logfile", ways.APPEND, (("logappend", ("on",)),)),
    *_with_values("serial parallel monitor qmp qmp-pretty debugcon gdb qtest", ways.CHARDEV),
    # Files that QEMU writes
    Row("pidfile", "value", ways.PIDFILE),
    *_with_values("D qtest-log dump-vmstate", ways.WRITE),
    Row("trace", "events", ways.READ),
    Row("trace", "file", ways.WRITE),
    Row("icount", "rrfile", ways.WRITE, (("rr", ("record",)),)),
    Row("icount", "rrfile", ways.READ, (("rr", ("replay",)),)),
    Row("audiodev", "path", ways.WRITE, (("driver", ("wav",)),)),
    Row("device", "pcap", ways.WRITE),
    Row("object", "file", ways.WRITE, (("qom-type", ("filter-dump",)),)),
    # Secrets, certificates, access lists
    Row("object", "file", ways.READ, (("qom-type", _QOM_TYPES_WITH_FILE),)),
    *(
        Row("object", "dir", ways.DIRECTORY, (("qom-type", (qom_type,)), endpoint), entries=entries)
        for qom_type, endpoint, entries in _CREDENTIALS
    ),
    Row("object", "dir", ways.DIRECTORY),
    Row("object", "filename", ways.READ, (("qom-type", ("authz-list-file", "authz-listfile")),)),
    Row("object", "filename", ways.DEVICE, (("qom-type", ("rng-random",)),)),
    Row("object", "evdev", ways.DEVICE),
    Row("device", "evdev", ways.DEVICE),
    Row("device", "hidraw", ways.DEVICE),
    Row("object", "dh-cert-file", ways.READ),
    Row("object", "session-file", ways.READ),
    Row("object", "path", ways.SOCKET, (("qom-type", ("pr-manager-helper",)),)),
    Row("object", "socket.path", ways.LISTEN, (("qom-type", ("x-vfio-user-server",)),)),
    Row("object", "quote-generation-socket.path", ways.SOCKET),
    Row("object", "sev-device", ways.DEVICE),
    Row("object", "qom-type", ways.DEVICE, (("qom-type", _SEV), ("sev-device", ("",))), node="/dev/sev"),
    Row("object", "qom-type", ways.DEVICE, (("qom-type", ("memory-backend-epc",)),), node="/dev/sgx_vepc"),
    Row("object", "log", ways.WRITE, (("qom-type", ("qtest",)),)),
    # Displays
    Row("spice", "x509-dir", ways.DIRECTORY, entries=("ca-cert.pem", "server-cert.pem", "server-key.pem")),
    *(Row("spice", f"x509-{name}-file", ways.READ) for name in ("key", "cert", "cacert", "dh-key")),
    Row("spice", "addr", ways.DISPLAY, (("unix", ("on",)),)),
    Row("vnc", "vnc", ways.VNC),
    Row("display", "rendernode", ways.RENDER),
    Row("display", "type", ways.RENDER, (("type", ("egl-headless",)), ("rendernode", ("",))), node=RENDER_NODES),
    Row("spice", "rendernode", ways.RENDER),
    Row("spice", "gl", ways.RENDER, (("gl", ("on",)), ("rendernode", ("",))), node=RENDER_NODES),
    Row("device", "blob", ways.DEVICE, (("driver", _GPUS), ("blob", ("on",))), node="/dev/udmabuf"),
    Row("display", "type", ways.HOST_TREE, (("type", ("gtk", "sdl", "spice-app")),), _NO_DESKTOP, _DESKTOP_HINT),
    Row("display", "type", ways.REFUSE, (("type", ("dbus",)), ("p2p", ("", "off"))), _NO_BUS, _BUS_HINT),
    # Shares
    Row("fsdev", "path", ways.SHARE, (("fsdriver", ("local",)),)),
    Row("virtfs", "path", ways.SHARE, (("fsdriver", ("local",)),)),
    Row("fsdev", "fsdriver", ways.STAND_IN, (("fsdriver", ("proxy",)),)),
    Row("virtfs", "fsdriver", ways.STAND_IN, (("fsdriver", ("proxy",)),)),
    Row("device", "rootdir", ways.WRITE_DIRECTORY),
    # Networks
    *(row for kind in ("netdev", "nic", "net") for row in _taps(kind)),
    Row("netdev", "smb", ways.WRITE_DIRECTORY),
    Row("netdev", "tftp", ways.DIRECTORY),
    Row("nic", "smb", ways.WRITE_DIRECTORY),
    Row("nic", "tftp", ways.DIRECTORY),
    Row("net", "smb", ways.WRITE_DIRECTORY),
    Row("net", "tftp", ways.DIRECTORY),
    Row("netdev", "addr.path", ways.LISTEN, (("type", ("stream",)), ("server", ("on",)), ("addr.abstract", ("", "off")))),
    Row("netdev", "addr.path", ways.SOCKET, (("type", ("stream",)), ("server", ("", "off")), ("addr.abstract", ("", "off")))),
    Row("netdev", "local.path", ways.MADE, (("type", ("dgram",)),)),
    Row("netdev", "remote.path", ways.SOCKET, (("type", ("dgram",)),)),
    Row("netdev", "sock", ways.WRITE_DIRECTORY, (("type", ("vde",)),)),
    *(Row(kind, key, ways.FORWARD) for kind in ("netdev", "nic", "net") for key in ("guestfwd", "hostfwd")),
    *(Row("netdev", f"{key}.#.str", ways.FORWARD) for key in ("guestfwd", "hostfwd")),  # in JSON
    Row("netdev", "vhostdev", ways.OPEN, (("vhostfd", ("",)),), fd_key="vhostfd"),
    Row("device", "vhostdev", ways.DEVICE),  # vhost-vdpa-device-pci, since QEMU 8.0
    *(row.replace(kind=kind, key="type") for kind in ("netdev", "nic") for row in _NO_NETDEVS),
    # Devices
    Row("tpmdev", "path", ways.TPM),
    Row("tpmdev", "cancel-path", ways.WRITE),
    _open_for("device", "driver", _with_buses("vhost-vsock"), "/dev/vhost-vsock", "vhostfd"),
    _open_for("device", "driver", _with_buses("vhost-scsi"), "/dev/vhost-scsi", "vhostfd"),
    _open_for("object", "qom-type", ("iommufd",), "/dev/iommu", "fd"),
    Row("device", "hostdevice", ways.DEVICE, (("driver", ("usb-host",)),)),
    Row("device", "driver", ways.USB, (("driver", ("usb-host",)), ("hostdevice", ("",)))),
    Row("device", "host", ways.VFIO, (("driver", _VFIO_PCI), ("sysfsdev", ("",)), ("fd", ("",))), fd_key="fd"),
    Row("device", "sysfsdev", ways.VFIO, (("fd", ("",)),), fd_key="fd"),  # with iommufd=, since QEMU 9.0
    Row("enable-kvm", "", ways.KVM),
    Row("accel", "accel", ways.KVM, (("device", ("",)),)),
    Row("accel", "device", ways.DEVICE, (("accel", ("kvm",)),)),
    Row("machine", "accel", ways.KVM),
    # Fds of the caller
    *(Row("*", f"**.{key}", ways.FD) for key in ("fd", "vhostfd", "sock_fd")),
    *(Row("*", f"**.{key}", ways.FDS) for key in ("fds", "vhostfds", "sock-fds", "ebpf-rss-fds")),
    Row("*", "**.str", ways.FD, (("type", ("fd",)),)),
    Row("incoming", "value", ways.INCOMING),
    Row("incoming", "addr.path", ways.MADE, (("addr.type", ("unix",)), ("addr.abstract", ("", "off")))),
    Row("incoming", "addr.filename", ways.READ, (("addr.transport", ("file",)),)),
    Row("incoming", "addr.args.0", ways.RUN, (("addr.transport", ("exec",)),)),
    # What this program does itself
    Row("runas", "value", ways.CONSUME, reason="QEMU runs as that user from the start"),
    Row("run-with", "user", ways.CONSUME, reason="QEMU runs as that user from the start"),
    Row("chroot", "value", ways.CONSUME, reason="the view is the root already, and shows less than a chroot"),
    Row("run-with", "chroot", ways.CONSUME, reason="the view is the root already, and shows less than a chroot"),
)
