"""The catalogue, row by row: a command line that meets the row, what it needs, and what an unprivileged caller's plan grants."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.needs import find_needs
from qemu_userns.catalogue.rows import ROWS, Row
from tests.plans import asked_for, plan_of, read

RO, RW, DIR_RO, DIR_RW = "ro /x/file", "rw /x/file", "ro /x/dir", "rw /x/dir"
HELPER = "/usr/lib/qemu/qemu-bridge-helper"
NEW = "create /x/new"
NO_SYS = "refuse: QEMU would look for the USB device in /sys, which its view does not show"
OWN_MONITOR = "monitor serves it on sockets of ours alone"
NO_DESKTOP = "refuse: it needs the caller's desktop (X or Wayland, D-Bus, /dev/dri), which QEMU does not see"
NO_HOME = "refuse: it takes known_hosts and keys from the caller's home, which QEMU does not see, and would then have"
VNC = "vnc /x/new by qemu-userns"
NVME = "/sys/bus/pci/devices/0000:02:00.0"
VFIO = ("device /dev/vfio/vfio", "device /dev/vfio/01")


@dataclass(frozen=True)
class Case:
    """Words, the needs (way and path), and the grants in brief."""

    words: tuple[str, ...]
    needs: tuple[tuple[str, str], ...]
    grants: tuple[str, ...]
    fds: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join(self.words)


def case(words: str, way: str, path: str, *grants: str, fds: tuple[int, ...] = ()) -> Case:
    """Make a case with one need."""
    return Case(tuple(words.split()), ((way, path),), grants, fds)


def value_cases(options: str, way: str, path: str, *grants: str) -> list[Case]:
    return [case(f"-{option} {path}", way, path, *grants) for option in options.split()]


def two(words: str, way: str, paths: tuple[str, str], *grants: str, fds: tuple[int, ...] = ()) -> Case:
    return Case(tuple(words.split()), tuple((way, path) for path in paths), grants, fds)


CASES = [
    # Kernels, firmware and tables
    *value_cases("kernel dtb shim", ways.READ, "/x/file", RO),
    *value_cases("initrd", ways.READ_MODULES, "/x/file", RO),
    *value_cases("bios", ways.FIRMWARE, "/x/file", RO),
    case("-bios new.bin", ways.FIRMWARE, "new.bin"),
    case("-M pc,kernel=/x/file", ways.READ, "/x/file", RO),
    case("-machine initrd=/x/file", ways.READ_MODULES, "/x/file", RO),
    case("-M dtb=/x/file", ways.READ, "/x/file", RO),
    case("-M shim=/x/file", ways.READ, "/x/file", RO),
    case("-M dumpdtb=/x/new", ways.MADE, "/x/new", "rw /x"),
    case("-M firmware=/x/file", ways.FIRMWARE, "/x/file", RO),
    case("-option-rom /x/file,bootindex=1", ways.FIRMWARE, "/x/file", RO),
    case("-device VGA,romfile=/x/file", ways.FIRMWARE, "/x/file", RO),
    case('-device {"driver":"VGA","romfile":"/x/file"}', ways.FIRMWARE, "/x/file", RO),
    case("-boot splash=/x/file", ways.FIRMWARE, "/x/file", RO),
    two("-acpitable file=/x/file1:/x/file2", ways.READ, ("/x/file1", "/x/file2"), "ro /x/file1", "ro /x/file2"),
    case("-acpitable data=/x/file", ways.READ, "/x/file", RO),
    case("-smbios file=/x/file", ways.READ, "/x/file", RO),
    case("-smbios type=11,path=/x/file", ways.READ, "/x/file", RO),
    case("-fw_cfg opt/x,file=/x/file", ways.READ, "/x/file", RO),
    case("-device loader,file=/x/file", ways.READ, "/x/file", RO),
    case("-device guest-loader,file=/x/file", ways.READ, "/x/file", RO),
    case("-device ipmi-bmc-sim,sdrfile=/x/file", ways.READ, "/x/file", RO),
    case("-device ipmi-bmc-sim,frudatafile=/x/file", ways.READ, "/x/file", RO),
    case("-device cxl-type3,cdat=/x/file", ways.READ, "/x/file", RO),
    Case(
        ("-L", "/x/dir"),
        ((ways.DIRECTORY, "/x/dir"), (ways.DIRECTORY, "/x/dir/keymaps"), (ways.DIRECTORY, "/x/dir/dtb")),
        (DIR_RO, "ro /x/dir/keymaps", "ro /x/dir/dtb"),
    ),
    Case(("-L", "help"), (), ()),
    case("-plugin /x/file,arg=x", ways.READ, "/x/file", RO),
    case("-readconfig /x/file", ways.CONFIG, "/x/file"),
    case("-global virtio-net-pci.romfile=/x/file", ways.FIRMWARE, "/x/file", RO),
    case("-global driver=e1000,property=romfile,value=/x/file", ways.FIRMWARE, "/x/file", RO),
    Case(("-global", "virtio-net-pci.romfile="), (), ()),
    Case(("-global", "isa-fdc.driveA=/x/file"), (), ()),
    # Block devices
    Case(("/x/file",), ((ways.IMAGE, "/x/file"),), (RW,)),
    *value_cases("hda hdb hdc hdd fda fdb mtdblock sd pflash", ways.IMAGE, "/x/file", RW),
    *value_cases("cdrom", ways.IMAGE, "/x/file", RO),
    case("-drive file=/x/file", ways.IMAGE, "/x/file", RW),
    case("-drive file=/x/file,readonly=on", ways.IMAGE, "/x/file", RO),
    case("-drive file=/x/file,media=cdrom", ways.IMAGE, "/x/file", RO),
    case("-drive file=/x/new", ways.IMAGE, "/x/new"),
    Case(("-drive", "file=nbd://host/x"), (), ()),
    case("-drive file=nbd:unix:/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-drive file=nbd+unix:///name?socket=/x/sock&x", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-drive file=fat:/x/dir", ways.DIRECTORY, "/x/dir", DIR_RO),
    case("-drive file=fat:floppy:rw:/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW, "createdir /var/tmp"),
    Case(
        ("-drive", "file=blkdebug:/x/file1:/x/file2"),
        ((ways.READ, "/x/file1"), (ways.IMAGE, "/x/file2")),
        ("ro /x/file1", "rw /x/file2"),
    ),
    two("-drive file=blkverify:/x/file1:/x/file2", ways.IMAGE, ("/x/file1", "/x/file2"), "rw /x/file1", "rw /x/file2"),
    Case(("-drive", "file=/dev/fdset/4"), (), ()),
    Case(("-chardev", "file,id=c,path=/dev/fdset/0,append=on"), (), ()),
    Case(("-chardev", "null,id=c,logfile=/dev/fdset/0"), (), ()),
    Case(("-object", "rng-random,id=r,filename=/dev/fdset/0"), (), ()),
    case('-drive file=json:{"driver":"qcow2",,"file":{"filename":"/x/file"}}', ways.IMAGE, "/x/file", RW),
    case("-drive file.driver=file,file.filename=/x/file", ways.IMAGE, "/x/file", RW),
    case("-blockdev file,node-name=a,filename=/x/file", ways.IMAGE, "/x/file", RW),
    case("-blockdev file,node-name=a,read-only=on,filename=/x/file", ways.IMAGE, "/x/file", RO),
    case('-blockdev {"driver":"raw","file":{"driver":"file","filename":"/x/file"}}', ways.IMAGE, "/x/file", RW),
    case("-blockdev host_device,node-name=a,filename=/x/block", ways.IMAGE, "/x/block", "device /x/block"),
    case("-blockdev vvfat,node-name=a,dir=/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW),
    case("-drive driver=vvfat,dir=/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW),
    case("-blockdev rbd,node-name=a,conf=/x/file", ways.READ, "/x/file", RO),
    case("-drive driver=rbd,conf=/x/file", ways.READ, "/x/file", RO),
    case("-blockdev blkdebug,node-name=a,config=/x/file", ways.READ, "/x/file", RO),
    case("-drive driver=blkdebug,config=/x/file", ways.READ, "/x/file", RO),
    case("-blockdev nbd,node-name=a,path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-blockdev nbd,node-name=a,server.type=unix,server.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-drive file.driver=nbd,file.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-blockdev gluster,node-name=a,server.0.type=unix,server.0.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-blockdev gluster,node-name=a,logfile=/x/new", ways.APPEND, "/x/new", NEW),
    case("-blockdev virtio-blk-vhost-user,node-name=a,path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    *[
        case(f"-blockdev {name},node-name=a,path=/x/char", ways.DEVICE, "/x/char", "device /x/char")
        for name in ("virtio-blk-vhost-vdpa", "nvme-io_uring")
    ],
    case("-iscsi initiator-name-file=/x/file", ways.READ, "/x/file", RO),
    # Memory
    *value_cases("mem-path", ways.MEMORY, "/x/dir", DIR_RW),
    case("-object memory-backend-file,id=m,mem-path=/x/file", ways.MEMORY, "/x/file", RW),
    case("-object memory-backend-file,id=m,mem-path=/x/new", ways.MEMORY, "/x/new", "create /x/new"),
    case("-object memory-backend-file,id=m,mem-path=/x/file,readonly=on", ways.READ, "/x/file", RO),
    # Character devices and monitors
    case("-chardev socket,id=c,path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-chardev socket,id=c,path=/x/new,server=on", ways.SOCKET, "/x/new", "listen /x/new"),
    case("-chardev socket,id=c,path=/x/new,reconnect=1", ways.SOCKET, "/x/new", "ro /x"),
    Case(("-chardev", "socket,id=c,path=x,abstract=on"), (), ()),
    case("-chardev file,id=c,path=/x/new", ways.WRITE, "/x/new", NEW),
    case("-chardev file,id=c,path=/x/file", ways.WRITE, "/x/file", RW),
    case("-chardev file,id=c,path=/x/file,append=on", ways.APPEND, "/x/file", RW),
    case("-chardev file,id=c,path=/x/char", ways.WRITE, "/x/char", "device /x/char"),
    case("-chardev pipe,id=c,path=/x/fifo", ways.PIPE, "/x/fifo", "rw /x/fifo.in", "rw /x/fifo.out"),
    *[case(f"-chardev {name},id=c,path=/x/char", ways.DEVICE, "/x/char", "device /x/char") for name in ("serial", "parport")],
    *[case(f"-chardev {name},id=c,path=/x/char", ways.DEVICE, "/x/char", "device /x/char") for name in ("tty", "parallel")],
    case("-chardev pty,id=c,path=/x/new", ways.MADE, "/x/new", "rw /x"),
    Case(
        ("-chardev", "file,id=c,path=/x/new,input-path=/x/file"),
        ((ways.WRITE, "/x/new"), (ways.READ, "/x/file")),
        (NEW, RO),
    ),
    case("-chardev null,id=c,logfile=/x/new", ways.WRITE, "/x/new", NEW),
    case("-chardev null,id=c,logfile=/x/file,logappend=on", ways.APPEND, "/x/file", RW),
    *[case(f"-{name} file:/x/new", ways.WRITE, "/x/new", NEW) for name in ["serial", "parallel", "monitor", "qmp", "qmp-pretty"]],
    *[case(f"-{name} unix:/x/new,server", ways.SOCKET, "/x/new", "listen /x/new") for name in ["debugcon", "gdb", "qtest"]],
    # Files that QEMU writes
    case("-pidfile /x/new", ways.PIDFILE, "/x/new", "create /x/new temporary"),
    case("-pidfile /x/file", ways.PIDFILE, "/x/file", "create /x/file temporary"),
    *value_cases("D qtest-log dump-vmstate", ways.WRITE, "/x/new", NEW),
    case("-D /x/new-%d", ways.WRITE, "/x/new-%d", "rw /x"),
    case("-trace events=/x/file", ways.READ, "/x/file", RO),
    case("-trace file=/x/new", ways.WRITE, "/x/new", NEW),
    case("-icount 1,rr=record,rrfile=/x/new", ways.WRITE, "/x/new", NEW),
    case("-icount 1,rr=replay,rrfile=/x/file", ways.READ, "/x/file", RO),
    case("-audiodev wav,id=a,path=/x/new", ways.WRITE, "/x/new", NEW),
    case("-device usb-tablet,pcap=/x/new", ways.WRITE, "/x/new", NEW),
    case("-object filter-dump,id=f,netdev=n,file=/x/new", ways.WRITE, "/x/new", NEW),
    # Secrets, certificates, access lists
    *[case(f"-object {name},id=s,file=/x/file", ways.READ, "/x/file", RO) for name in ("secret", "igvm-cfg")],
    *[
        case(f"-object tls-creds-{kind},id=t,dir=/x/dir{end}", ways.DIRECTORY, "/x/dir", DIR_RO)
        for kind in ("x509", "psk", "anon")
        for end in ("", ",endpoint=client", ",endpoint=server")
    ],
    case("-object authz-list-file,id=a,filename=/x/file", ways.READ, "/x/file", RO),
    case("-object rng-random,id=r,filename=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    case("-device virtio-input-host-pci,evdev=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    case("-device u2f-passthru,hidraw=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    case("-object input-linux,id=i,evdev=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    *[
        Case(
            ("-object", f"sev-guest,id=s,{key}=/x/file"),
            ((ways.DEVICE, "/dev/sev"), (ways.READ, "/x/file")),
            ("device /dev/sev", RO),
        )
        for key in ("file", "dh-cert-file", "session-file")
    ],
    case("-object pr-manager-helper,id=p,path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case(
        '-object {"qom-type":"x-vfio-user-server","id":"v","socket":{"type":"unix","path":"/x/new"}}',
        ways.LISTEN,
        "/x/new",
        "rw /x",
    ),
    case("-object tdx-guest,id=t,quote-generation-socket.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-object sev-guest,id=s,sev-device=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    *[case(f"-object {name},id=s", ways.DEVICE, "/dev/sev", "device /dev/sev") for name in ("sev-guest", "sev-snp-guest")],
    case("-object memory-backend-epc,id=m,size=1M", ways.DEVICE, "/dev/sgx_vepc", "device /dev/sgx_vepc"),
    case("-overcommit mem-lock=on", ways.LOCK, "on"),
    Case(("-overcommit", "cpu-pm=on,mem-lock=off"), (), ()),
    case("-object qtest,id=q,chardev=c,log=/x/new", ways.WRITE, "/x/new", NEW),
    Case(("-object", "qtest,id=q,chardev=c,log=none"), (), ()),
    Case(("-qtest-log", "none"), (), ()),
    # Displays
    case("-spice x509-dir=/x/dir", ways.DIRECTORY, "/x/dir", DIR_RO),
    *[case(f"-spice x509-{name}-file=/x/file", ways.READ, "/x/file", RO) for name in ("key", "cert", "cacert", "dh-key")],
    case("-display egl-headless,rendernode=/x/char", ways.RENDER, "/x/char", "device /x/char", "ro /sys/dev/char/0:0/device"),
    case("-display dbus,p2p=on,rendernode=/x/char", ways.RENDER, "/x/char", "device /x/char", "ro /sys/dev/char/0:0/device"),
    case("-spice gl=on,rendernode=/x/char", ways.RENDER, "/x/char", "device /x/char", "ro /sys/dev/char/0:0/device"),
    *[case(f"-{words}", ways.RENDER, "/dev/dri") for words in ("display egl-headless", "spice gl=on")],
    case("-device virtio-gpu-pci,blob=on", ways.DEVICE, "/dev/udmabuf", "device /dev/udmabuf"),
    *[Case(("-device", name), (), ()) for name in ("virtio-gpu-pci", "virtio-gpu-gl-pci,blob=on")],
    case("-spice unix=on,addr=/x/new", ways.DISPLAY, "/x/new", OWN_MONITOR, "spice /x/new by qemu-userns"),
    case("-spice unix=on,addr=/x/new,port=5900", ways.DISPLAY, "/x/new", "rw /x"),
    case("-vnc unix:/x/new", ways.DISPLAY, "/x/new", OWN_MONITOR, VNC),
    case("-vnc unix:/x/new,to=9", ways.DISPLAY, "/x/new", "rw /x"),
    case("-vnc unix:/x/new,websocket=on", ways.DISPLAY, "/x/new", "rw /x"),
    case("-vnc unix:/x/sock,reverse=on", ways.DISPLAY, "/x/sock", "rw /x/sock"),
    case("-display vnc=unix:/x/new", ways.DISPLAY, "/x/new", OWN_MONITOR, VNC),
    case("-vnc unix:/x/new -preconfig", ways.DISPLAY, "/x/new", "rw /x"),
    two("-vnc unix:/x/new -vnc unix:/y/new", ways.DISPLAY, ("/x/new", "/y/new"), OWN_MONITOR, VNC, "rw /y"),
    *[case(f"-display {kind}", ways.HOST_TREE, kind, NO_DESKTOP) for kind in ("gtk", "sdl", "spice-app")],
    case("-display dbus", ways.REFUSE, "dbus", "refuse: a bus takes the caller only under its own uid, and inside QEMU is root"),
    Case(("-display", "dbus,p2p=on"), (), ()),
    Case(("-vnc", ":1"), (), ()),
    # Shares
    case("-fsdev local,id=f,path=/x/dir,security_model=mapped", ways.SHARE, "/x/dir", DIR_RW),
    case("-fsdev local,id=f,path=/x/dir,security_model=none,readonly=on", ways.SHARE, "/x/dir", DIR_RO),
    case("-virtfs local,path=/x/dir,mount_tag=t,security_model=none", ways.SHARE, "/x/dir", DIR_RW),
    case("-device usb-mtp,rootdir=/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW),
    # Networks
    *[case(f"-{name} user,smb=/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW) for name in ("netdev", "nic", "net")],
    *[case(f"-{name} user,tftp=/x/dir", ways.DIRECTORY, "/x/dir", DIR_RO) for name in ("netdev", "nic", "net")],
    case("-netdev stream,id=n,server=on,addr.type=unix,addr.path=/x/new", ways.LISTEN, "/x/new", "listen /x/new"),
    case("-netdev stream,id=n,addr.type=unix,addr.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-netdev dgram,id=n,local.type=unix,local.path=/x/new", ways.MADE, "/x/new", "rw /x"),
    case("-netdev dgram,id=n,remote.type=unix,remote.path=/x/sock", ways.SOCKET, "/x/sock", "ro /x"),
    case("-netdev vde,id=n,sock=/x/dir", ways.WRITE_DIRECTORY, "/x/dir", DIR_RW),
    *[
        tried
        for option in ("netdev", "nic", "net")
        for tried in (
            case(f"-{option} tap,id=n", ways.TAP, "/dev/net/tun", "tap any x1"),
            case(f"-{option} bridge,id=n", ways.BRIDGE, HELPER, f"{HELPER} --use-vnet --fd=3 --br=br0"),
            case(f"-{option} tap,id=n,helper=/x/h", ways.BRIDGE, HELPER, "/x/h --use-vnet --fd=3 --br=br0"),
            *(
                Case(
                    (f"-{option}", f"tap,id=n,{member}=on"),
                    ((ways.TAP, "/dev/net/tun"), (ways.VHOST, "/dev/vhost-net")),
                    ("tap any x1", "open /dev/vhost-net rw alone"),
                )
                for member in ("vhost", "vhostforce")
            ),
        )
    ],
    *[
        case(f"-{kind} user,guestfwd=tcp:10.0.2.100:80-{target}", way, path, grant)
        for kind in ("netdev", "nic", "net")
        for target, way, path, grant in (
            ("cmd:/x/file", ways.READ, "/x/file", RO),
            ("unix:/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
            ("unix:/x/new,,server=on", ways.MADE, "/x/new", "rw /x"),
        )
    ],
    Case(
        ("-netdev", "user,id=n,guestfwd=:10.0.2.100:1-cmd:/x/file,guestfwd=:10.0.2.100:2-unix:/y/sock"),
        ((ways.READ, "/x/file"), (ways.SOCKET, "/y/sock")),
        (RO, "rw /y/sock"),
    ),
    Case(
        ("-netdev", '{"type":"user","id":"n","guestfwd":[{"str":"tcp:1:1-cmd:/x/file"}],"hostfwd":[{"str":"tcp::1-:2"}]}'),
        ((ways.READ, "/x/file"),),
        (RO,),
    ),
    Case(("-netdev", '{"type":"user","id":"n","hostfwd":[{"str":"unix:/x/new-:2"}]}'), ((ways.MADE, "/x/new"),), ("rw /x",)),
    Case(("-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:cat,hostfwd=tcp:127.0.0.1:8080-:80"), (), ()),
    Case(("-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:8080"), (), ()),
    *[case(f"-{kind} user,hostfwd=unix:/x/new-10.0.2.15:80", ways.MADE, "/x/new", "rw /x") for kind in ("netdev", "nic", "net")],
    case("-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", ways.OPEN, "/dev/vhost-vdpa-0", "open /dev/vhost-vdpa-0 rw alone"),
    case("-netdev vhost-vdpa,id=n,vhostfd=9", ways.FD, "9", "fd 9", fds=(9,)),
    case("-device vhost-vdpa-device-pci,vhostdev=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    *[
        case(f"-{kind} {words}", ways.REFUSE, words.partition(",")[0], f"refuse: {row.reason}")
        for kind in ("netdev", "nic")
        for words in ("l2tpv3,id=n,src=::1", "af-xdp,id=n,ifname=eth0", "passt,id=n,vhost-user=on")
        for row in ROWS
        if (row.kind, row.key, row.way) == (kind, "type", ways.REFUSE) and words.startswith(row.when[0][1][0])
    ],
    Case(("-netdev", "l2tpv3,id=n,src=::1,udp=on,srcport=1,dstport=2"), (), ()),
    *[case(f"-{kind} passt", ways.PASST, "passt") for kind in ("netdev", "nic", "net")],  # of an older QEMU
    *[case(f"-{kind} passt,path=/x/passt", ways.PASST, "/x/passt") for kind in ("netdev", "nic", "net")],
    Case(("-netdev", "hubport,id=n,hubid=0"), (), ()),
    # Devices
    case("-tpmdev passthrough,id=t,path=/x/char", ways.TPM, "/x/char", "device /x/char"),
    case("-tpmdev passthrough,id=t,cancel-path=/x/file", ways.WRITE, "/x/file", RW),
    *[
        case(f"-device vhost-{kind}-{bus}", ways.OPEN, f"/dev/vhost-{kind}", f"open /dev/vhost-{kind} rw alone")
        for kind in ("vsock", "scsi")
        for bus in ("pci", "pci-non-transitional", "ccw", "device")
    ],
    case('-device {"driver":"vhost-vsock-pci"}', ways.OPEN, "/dev/vhost-vsock", "open /dev/vhost-vsock rw alone"),
    case("-device vhost-vsock-pci,vhostfd=9", ways.FD, "9", "fd 9", fds=(9,)),
    Case(("-device", "vhost-user-vsock-pci,chardev=c"), (), ()),
    case("-object iommufd,id=i", ways.OPEN, "/dev/iommu", "open /dev/iommu rw alone"),
    case("-object iommufd,id=i,fd=9", ways.FD, "9", "fd 9", fds=(9,)),
    case("-device usb-host,hostdevice=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    Case(("-device", "usb-host,hostdevice=/dev/fdset/0"), (), ()),
    case("-device usb-host,hostbus=1,hostaddr=0x1f", ways.USB, "/dev/bus/usb/001/031", "device /dev/bus/usb/001/031"),
    *[
        case(f"-device usb-host,{members}", ways.USB, "/dev/bus/usb", NO_SYS)
        for members in ("hostbus=1", "vendorid=0x46f4,productid=1", "hostbus=1,hostport=2.1", "hostbus=1,hostaddr=2,vendorid=7")
    ],
    Case(("-device", "usb-host"), (), ()),
    *[
        case(
            f"-device vfio-pci,host={host}",
            ways.VFIO,
            f"/sys/bus/pci/devices/{device}",
            f"ro /sys/bus/pci/devices/{device}",
            *VFIO,
        )
        for host, device in (("0001:0a:1f.7", "0001:0a:1f.7"), ("2:0.0", "0000:02:00.0"))
    ],
    *[Case(("-device", f"vfio-pci,host={host}"), (), ()) for host in ("x", "0:1", "0:0:0:0.0", "1:.0", "1:2.")],
    case("-device vfio-ap,sysfsdev=/sys/mdev", ways.VFIO, "/sys/mdev", "ro /sys/mdev", "ro /sys/mdev/subsystem", *VFIO),
    case("-blockdev virtio-blk-vfio-pci,node-name=a,path=/sys/x", ways.VFIO, "/sys/x", "ro /sys/x", *VFIO),
    case("-device vfio-pci,sysfsdev=/sys/x,fd=9", ways.FD, "9", "fd 9", fds=(9,)),
    case("-enable-kvm", ways.KVM, "", "device /dev/kvm"),
    case("-accel kvm", ways.KVM, "kvm", "device /dev/kvm"),
    case("-M accel=kvm:tcg", ways.KVM, "kvm:tcg", "device /dev/kvm"),
    case("-accel kvm,device=/x/char", ways.DEVICE, "/x/char", "device /x/char"),
    Case(("-accel", "kvm,device=/dev/fdset/1"), (), ()),
    Case(("-accel", "tcg"), (), ()),
    # Fds of the caller
    case("-netdev tap,id=n,fd=9", ways.FD, "9", "fd 9", fds=(9,)),
    Case(
        ("-netdev", "tap,id=n,vhostfd=9"), ((ways.TAP, "/dev/net/tun"), (ways.FD, "9")), ("tap any x1", "fd 9"), fds=(9,)
    ),
    case("-fsdev proxy-like,id=f,sock_fd=9", ways.FD, "9", "fd 9", fds=(9,)),
    case("-add-fd fd=9,set=1", ways.FD, "9", "fd 9", fds=(9,)),
    case("-add-fd fd=9,set=1", ways.FD, "9"),
    case('-blockdev {"driver":"nbd","server":{"type":"fd","str":"9"}}', ways.FD, "9", "fd 9", fds=(9,)),
    two("-nic tap,fds=8:9", ways.FD, ("8", "9"), "fd 8", "fd 9", fds=(8, 9)),
    two("-netdev vhost-vdpa,id=n,vhostfds=8:9", ways.FD, ("8", "9"), "fd 8", "fd 9", fds=(8, 9)),
    two("-netdev af-xdp,id=n,sock-fds=8:9", ways.FD, ("8", "9"), "fd 8", "fd 9", fds=(8, 9)),
    two("-device virtio-net-pci,ebpf-rss-fds=8:9", ways.FD, ("8", "9"), "fd 8", "fd 9", fds=(8, 9)),
    *[
        case(f"-netdev stream,id=n,{name}.type=fd,{name}.str=9", ways.FD, "9", "fd 9", fds=(9,))
        for name in ("addr", "local", "remote", "server")
    ],
    Case(("-netdev", "dgram,id=n,local.type=inet,local.str=9"), (), (), (9,)),
    case("-incoming fd:9", ways.FD, "9", "fd 9", fds=(9,)),
    case("-incoming exec:cat", ways.RUN, "cat"),
    case("-incoming unix:/x/new", ways.MADE, "/x/new", "rw /x"),
    case('-incoming {"addr":{"transport":"socket","type":"unix","path":"/x/new"}}', ways.MADE, "/x/new", "rw /x"),
    case("-incoming channel-type=main,addr.transport=socket,addr.type=unix,addr.path=/x/new", ways.MADE, "/x/new", "rw /x"),
    case('-incoming {"addr":{"transport":"file","filename":"/x/file"}}', ways.READ, "/x/file", RO),
    case('-incoming {"addr":{"transport":"exec","args":["cat","x"]}}', ways.RUN, "cat"),
    case('-incoming {"addr":{"transport":"socket","type":"fd","str":"9"}}', ways.FD, "9", "fd 9", fds=(9,)),
    case("-incoming file:/x/file,offset=0", ways.READ, "/x/file", RO),
    Case(("-incoming", "tcp:0:4444"), (), ()),
    # Files by the number of an fd
    case("-kernel /dev/fd/9", ways.READ, "/dev/fd/9", "fd 9 reopened", fds=(9,)),
    # What this program does itself
    case("-runas user", ways.CONSUME, "user", "consume"),
    case("-run-with user=user", ways.CONSUME, "user", "consume"),
    case("-chroot /x/dir", ways.CONSUME, "/x/dir", "consume"),
    case("-run-with chroot=/x/dir", ways.CONSUME, "/x/dir", "consume"),
]
PROXY = [
    case(f"-{name} proxy,id=f,{socket}", ways.STAND_IN, "proxy", "rw /x/dir", *fds, fds=(9,))
    for name in ("fsdev", "virtfs")
    for socket, fds in (("socket=/x/sock", ("fd 9",)),)
]
NESTED = [
    case("-drive file=rbd:pool/image:id=x:conf=/x/file", ways.READ, "/x/file", RO),
    case(r"-hda rbd:pool/im\:age@snap\\:conf=/x/file-a\:b:key=y", ways.READ, "/x/file-a:b", "ro /x/file-a:b"),
    Case(("-hda", r"rbd:pool/image\:conf=/x/file"), (), ()),
    Case(("-hda", "http://host/x/file"), (), ()),
    *[
        case(f"-{words}", ways.HOST_TREE, value, NO_HOME)
        for words, value in (
            ("hda ssh://user@host/x/file", "ssh://user@host/x/file"),
            ("drive if=none,file.driver=ssh,file.host=h,file.path=/x/file", "ssh"),
            ("blockdev ssh,node-name=a,server.host=h,server.port=22,path=/x/file", "ssh"),
            ('drive file=json:{"driver":"raw",,"file":{"driver":"ssh",,"path":"/x/file"}}', "ssh"),
        )
    ],
    Case(("-hda", "iscsi://host/iqn.x:y/0"), (), ()),
    *[
        case(f"-{words}", ways.VFIO, NVME, f"ro {NVME}", *VFIO)
        for words in (
            "hda nvme://0:2:0.0/1",
            "drive if=none,driver=nvme,device=0:2:0.0,namespace=1",
            "blockdev nvme,node-name=a,device=0000:02:00.0,namespace=1",
            'drive file=json:{"driver":"raw",,"file":{"driver":"nvme",,"device":"2:0.0",,"namespace":1}}',
        )
    ],
    Case(("-hda", "nvme://bogus/1"), (), ()),
    Case(("-hda", 'json:{"driver":"nvme","device":"bogus","namespace":1}'), (), ()),
    case('-hda json:{"driver":"rbd","pool":"p","image":"i","conf":"/x/file"}', ways.READ, "/x/file", RO),
    case(
        '-hda json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"/x/sock"}}}',
        ways.SOCKET,
        "/x/sock",
        "rw /x/sock",
    ),
    case(
        "-blockdev raw,node-name=a,file.driver=nbd,file.server.type=unix,file.server.path=/x/sock",
        ways.SOCKET,
        "/x/sock",
        "rw /x/sock",
    ),
    case("-drive file.driver=nbd,file.server.type=unix,file.server.path=/x/sock", ways.SOCKET, "/x/sock", "rw /x/sock"),
    case("-blockdev raw,node-name=a,file.driver=nbd,file.server.type=fd,file.server.str=9", ways.FD, "9", "fd 9", fds=(9,)),
]


@pytest.mark.parametrize("tried", CASES + NESTED + PROXY, ids=str)
def test_needs_and_grants(tried: Case) -> None:
    needs = find_needs(read(*tried.words))
    assert tuple((need.way, need.path) for need in needs) == tried.needs
    assert tuple(asked_for(plan_of(*tried.words, fds=tried.fds))) == tried.grants


def test_every_row_has_a_case() -> None:
    needs = [need for tried in CASES + NESTED + PROXY for need in find_needs(read(*tried.words))]
    legacy = {need.obj.kind for need in needs if need.legacy}  # such a need has the row of the -chardev that it stands for
    hit = {id(need.row) for need in needs} | {id(row) for row in ROWS if row.way == ways.CHARDEV and row.kind in legacy}
    assert [(row.kind, row.key, row.way, row.when) for row in ROWS if id(row) not in hit] == []


def test_rows_name_known_ways() -> None:
    known = {value for name, value in vars(ways).items() if name.isupper()}
    assert {row.way for row in ROWS} <= known
    assert len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.way in (ways.REFUSE, ways.CONSUME)], ids=lambda row: f"{row.kind} {row.key}"
)
def test_a_row_that_is_not_handed_over_says_why(row: Row) -> None:
    assert row.reason
    assert row.way != ways.REFUSE or row.hint


def test_of_a_member_given_twice_the_last_counts() -> None:
    assert [need.path for need in find_needs(read("-drive", "file=/x/file1,file=/x/file2"))] == ["/x/file2"]
    line = read("-drive", "if=none,id=d,file=/x/file1", "-set", "drive.d.file=/x/file2")
    assert [need.path for need in find_needs(line)] == ["/x/file2"]


def test_a_readconfig_section_is_read_as_its_option() -> None:
    text = '[drive "d"]\n  file = "/x/file"\n[chardev "c"]\n  backend = "file"\n  path = "/x/new,"\n[acpi "a"]\n  data = "/x/file3"\n'  # noqa: E501
    needs = find_needs(read("-readconfig", "/x/file", configs={1: text}))
    expected = [(ways.CONFIG, "/x/file"), (ways.IMAGE, "/x/file"), (ways.WRITE, "/x/new,"), (ways.READ, "/x/file3")]
    assert [(need.way, need.path) for need in needs] == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [(("-kernel", "/x/file"), "-kernel"), (("-drive", "file=/x/file"), "-drive file"), (("/x/file",), "-disk")],
)
def test_a_need_names_its_word(words: tuple[str, ...], text: str) -> None:
    assert [need.describe() for need in find_needs(read(*words))] == [text]
