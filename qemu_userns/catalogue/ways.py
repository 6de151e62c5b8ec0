"""The ways of handing a named resource over. Pure.

A way says what QEMU does with the thing; plan/ decides from it, and from whose the thing is, which grant that takes.
"""

READ = "read"  # a file that QEMU only reads
READ_LIST = "read list"  # several of them between colons
READ_MODULES = "read modules"  # -initrd: a file, or for multiboot "FILE ARGUMENTS,FILE ARGUMENTS"
FIRMWARE = "firmware"  # a file, or a name that QEMU looks for in its data directories
DIRECTORY = "directory"  # a directory that QEMU only reads
WRITE = "write"  # a file that QEMU creates or truncates
APPEND = "append"  # a file that QEMU creates or goes on writing
PIDFILE = "pidfile"  # created, locked, and removed at QEMU's end
MEMORY = "memory"  # a file to map, or a directory to make an unnamed one in
IMAGE = "image"  # a name in the block layer's language
NEW_IMAGE = "new image"  # the same, of a file that QEMU creates or truncates
SHARE = "share"  # the root of a 9p share
STAND_IN = "stand-in"  # a 9p share of virtfs-proxy-helper's, which our stand-in hands over
WRITE_DIRECTORY = "writable directory"  # a directory whose files QEMU changes
MADE = "made by QEMU"  # a socket or symlink that QEMU makes itself, so its directory has to be writable
VNC = "vnc"  # the address of a display: unix:PATH or of the network
EXPORT = "export"  # the address of an NBD server, alike
DISPLAY = "display"  # a unix socket on which the clients of a display come
HOST_TREE = "host tree"  # what takes more of the host than a path can say, so that QEMU must see all of it; the row says what
SOCKET = "socket"  # a unix socket: listened on or connected to, as the object says
LISTEN = "listen"  # a unix socket that is listened on
PIPE = "pipe"  # FILE.in and FILE.out, or FILE
DEVICE = "device"  # a device node
FORWARD = "forward"  # of a user network: where a port of the guest's or the host's leads
OPEN = "open"  # a device node that QEMU opens by itself, or takes as an fd
TPM = "tpm"  # a TPM of the host, with the file by which a command of its is cancelled
RENDER = "render node"  # of a graphics card, or the directory of all, where QEMU takes the first one that it may open
TAP = "tap"  # a tap, which QEMU opens by /dev/net/tun, or takes as fds
BRIDGE = "bridge"  # a tap that a set-uid program makes and opens: qemu-bridge-helper
PASST = "passt"  # a program that is a network, at the other end of a socket
VHOST = "vhost"  # /dev/vhost-net, once for each queue of a tap
USB = "usb"  # a USB device of the host, which QEMU looks for by other means than its node
VFIO = "vfio"  # a device of the host that vfio drives: its address on the PCI bus, or its directory in /sys
LOCK = "lock"  # memory that stays in memory
CHARDEV = "chardev"  # a character device in the old one-word language
FD = "fd"  # the number of an fd that QEMU has from its caller
FDS = "fds"  # several of them between colons
NAME = "name"  # the name of an fd that a client gave to QEMU by getfd; in QMP, FD may be one too
INCOMING = "incoming"  # a migration address, of the end that waits
MIGRATE = "migrate"  # a migration address, of the end that begins
DUMP = "dump"  # where a dump goes: a file, or an fd by its name
RUN = "run"  # a program that migration data passes through
CONFIG = "config"  # a -readconfig file
KVM = "kvm"  # a list of accelerators between colons
CONSUME = "consume"  # this program does it
REFUSE = "refuse"  # it cannot work; the row says why

# The fdsets by which files are handed over. Those that callers and clients make have lower numbers; QEMU reads one out of a name
# as an int.
OWN_FDSET_BASE = 2_000_000_000
FDS_PER_COMMAND = 64  # at the most, so that no two commands of a monitor use the same number
