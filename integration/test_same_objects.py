"""QEMU accepts the original command line and the rewritten one, and makes the same objects of both.

Each case is started twice in the same folder with the same files in it, by plain QEMU and by the drop-in, and everything that
QMP tells about block devices, character devices, objects and networks is compared. Each is explained too, which changes
nothing. And for every kind of file that a view may hold, QEMU in the drop-in has opened one here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.probe import Probe, QmpError, probing
from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from tests.conftest import CHECKOUT, dropin_folder, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.userns, pytest.mark.slow]

ROOT = os.geteuid() == 0
CALLER_FD = 60
OWN_FDSETS = OWN_FDSET_BASE

# Queries without arguments; one that this QEMU lacks is an error in both.
QUERIES = [
    "query-block",
    "query-named-block-nodes",
    "query-blockstats",
    "query-chardev",
    "query-memdev",
    "query-memory-devices",
    "query-memory-size-summary",
    "query-name",
    "query-uuid",
    "query-status",
    "query-iothreads",
    "query-tpm",
    "query-tpm-models",
    "query-vnc",
    "query-vnc-servers",
    "query-fdsets",
    "query-mice",
    "query-rx-filter",
    "query-block-exports",
    "query-jobs",
    "query-block-jobs",
    "query-migrate",
    "query-replay",
    "query-hotpluggable-cpus",
    "x-query-numa",
    "x-query-usb",
    "x-query-ramblock",
    "x-query-rdma",
    "query-acpi-ospm-status",
    "query-pci",
    "query-machines",
]
HMP = [
    "info network",
    "info chardev",
    "info block -v",
    "info qtree",
    "info roms",
    "info usernet",
    "info pci",
    "info mice",
    "info tpm",
    "info numa",
    "info usb",
    "info irq",
    "info vnc",
    "info snapshots",
]
VOLATILE = ("rtc-time", "thread-id", "actual-size", "fd")
QOM_FOLDERS = ("/objects", "/machine/peripheral", "/machine/peripheral-anon", "/chardevs", "/machine/fw_cfg", "/machine")


@dataclass(frozen=True)
class Case:
    """A command line; `{d}` in it is the folder that QEMU is started in."""

    name: str
    words: tuple[str, ...]
    qemu: str = "qemu-system-x86_64"
    fdset: bool = False  # as root with leased ids, disks that are root's come as fdsets here
    fd: int | None = None  # an fd of the caller: "socket" pair's end
    opens: tuple[str, ...] = ()  # kinds of files of the "The view" that this case opens
    root_refused: str = ""  # as root with leased ids, what is root's cannot be handed over: how the launch says so
    connects: bool = False  # as root with leased ids, a client socket may be connected outside: its address is then an fd


def case(name: str, words: str, *, opens: str = "", **options: Any) -> Case:
    """Make a case of a command line with blanks between its words; `~` stands for a blank within one."""
    parts = tuple(word.replace("~", " ") for word in words.split())
    return Case(name, parts, opens=tuple(opens.split()), **options)


ROOT_FIFO = "may not open it"

CASES = (
    # Character devices
    case(
        "chardev-new",
        "-chardev null,id=n -chardev file,id=f,path=out/file.log -chardev file,id=a,path={d}/out/append.log,append=on "
        "-chardev ringbuf,id=r,size=4096 -chardev null,id=l,logfile=out/log.log,logappend=on "
        "-chardev socket,id=s,path=out/s.sock,server=on,wait=off -chardev socket,id=c,path=peer.sock "
        "-chardev udp,id=u,host=127.0.0.1,port=9 "
        "-chardev socket,id=t,host=127.0.0.1,port=0,server=on,wait=off,nodelay=on "
        "-device virtio-serial-pci -device virtconsole,chardev=f -device virtserialport,chardev=s,name=x",
        connects=True,
        opens="chardev-file chardev-socket log",
    ),
    case(
        "chardev-flags",
        "-chardev socket,id=s,path={d}/out/s.sock,server,nowait,mux=on -mon s -serial chardev:s -mon chardev=s,mode=readline",
    ),
    case(
        "chardev-pipe",
        "-chardev pipe,id=p,path=fifo -chardev pipe,id=q,path={d}/one",
        opens="chardev-pipe",
        root_refused=ROOT_FIFO,
    ),
    case(
        "chardev-absolute",
        "-chardev socket,id=s,path={d}/out/s.sock,server=on,wait=off -serial chardev:s -qmp unix:{d}/out/q,server=on,wait=off",
    ),
    case("chardev-pty", "-chardev pty,id=p -serial chardev:p", opens="pty"),
    case(
        "chardev-legacy",
        "-serial file:out/serial0 -serial unix:{d}/out/s1.sock,server=on,wait=off -serial null "
        "-monitor unix:out/m.sock,server,nowait -qmp unix:{d}/out/q.sock,server=on,wait=off -qmp-pretty null "
        "-debugcon file:out/debug -parallel null -gdb unix:out/g.sock,server=on,wait=off",
    ),
    case("chardev-legacy-mux", "-serial mon:unix:out/s.sock,server=on,wait=off -monitor none"),
    case("chardev-legacy-client", "-serial unix:peer.sock -monitor unix:{d}/peer.sock", connects=True),
    case("chardev-legacy-pty", "-serial pty -monitor pty"),
    case(
        "chardev-readconfig",
        "-readconfig chardevs.cfg -readconfig {d}/sub/serial.cfg -set chardev.f.append=on",
        connects=True,
    ),
    case("chardev-fd", f"-chardev socket,id=c,fd={CALLER_FD} -mon chardev=c,mode=control", fd=CALLER_FD),
    case("chardev-reconnect", "-chardev socket,id=c,path=out/later.sock,reconnect=5 -serial chardev:c"),
    case("stdio", "-chardev stdio,id=s,signal=off -serial chardev:s -monitor null"),
    # Disks
    case(
        "hda",
        "-hda top.qcow2 -hdb disk.raw -cdrom cd.iso",
        fdset=True,
        opens="drive backing cdrom",
    ),
    case("hda-absolute", "-hda {d}/absolute.qcow2 -snapshot", opens="snapshot"),
    case("bare-word", "disk.raw", fdset=True),
    case(
        "drive",
        "-drive file=disk.raw,format=raw,if=none,id=a -drive file={d}/top.qcow2,if=virtio,id=b,cache=writeback "
        "-drive file=json.qcow2,format=qcow2,if=none,id=c,readonly=on -drive file=cd.iso,media=cdrom,id=d,format=raw "
        "-drive driver=qcow2,file.filename=second.qcow2,file.driver=file,if=none,id=e "
        "-drive file=third.raw,format=raw,if=none,snapshot=on,id=g -device virtio-blk-pci,drive=a,id=disk",
        fdset=True,
    ),
    case("drive-file-protocol", "-drive file=file:disk.raw,format=raw,if=none,id=a", fdset=True),
    case(
        "drive-json",
        """-drive file=json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"second.qcow2"}},if=none,id=a""",
        fdset=True,
    ),
    case("drive-set", "-drive if=none,id=x,format=raw -set drive.x.file={d}/disk.raw -set drive.x.readonly=on"),
    case("drive-readconfig", "-readconfig drives.cfg -device virtio-blk-pci,drive=r0", fdset=True),
    case("drive-data-file", "-drive file=data.qcow2,if=none,id=a,readonly=on", opens="data-file"),
    case(
        "drive-vmdk",
        "-drive file=flat.vmdk,if=none,id=a,readonly=on -drive file=split.vmdk,if=none,id=b,snapshot=on",
        opens="extent",
    ),
    case("drive-qed", "-drive file=a.qed,format=qed,if=none,id=a,readonly=on"),
    case(
        "fat",
        "-drive file=fat:fatdir,format=raw,if=none,id=a,readonly=on -drive file=fat:rw:{d}/fatdir,format=raw,if=none,id=b",
        opens="fat",
    ),
    case("blkdebug", "-drive file=blkdebug:blkdebug.conf:disk.raw,format=raw,if=none,id=a,readonly=on", opens="blkdebug"),
    case("floppy", "-fda floppy.img -M pc", fdset=True),
    case("empty-drives", "-drive if=ide,media=cdrom,id=cd -drive if=none,id=none"),
    case(
        "blockdev-dotted",
        "-blockdev driver=file,filename=disk.raw,node-name=f0,auto-read-only=on -blockdev raw,file=f0,node-name=r0 "
        "-blockdev qcow2,node-name=q0,file.driver=file,file.filename={d}/second.qcow2,read-only=on "
        "-device virtio-blk-pci,drive=q0,id=disk",
        fdset=True,
        opens="blockdev",
    ),
    case(
        "blockdev-json",
        """-blockdev {"driver":"qcow2","node-name":"q","read-only":true,"file":{"driver":"file","filename":"top.qcow2"}} """
        """-blockdev {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"{d}/disk.raw","locking":"off"}} """
        """-blockdev {"driver":"qcow2","node-name":"n","read-only":true,"file":{"driver":"file","filename":"absolute.qcow2"},"""
        """"backing":{"driver":"raw","file":{"driver":"file","filename":"{d}/sub/base.raw"}}} """
        """-device {"driver":"virtio-blk-pci","drive":"r","id":"d0"}""",
        fdset=True,
    ),
    case(
        "blockdev-layers",
        "-blockdev driver=throttle,node-name=t,throttle-group=g,file.driver=null-co,file.size=1048576,file.read-zeroes=on "
        "-object throttle-group,id=g,x-iops-total=10 -blockdev driver=copy-on-read,node-name=c,file.driver=raw,"
        "file.file.driver=file,file.file.filename=disk.raw",
        fdset=True,
    ),
    case(
        "nbd",
        "-blockdev driver=nbd,node-name=n,server.type=unix,server.path={d}/nbd.sock,read-only=on",
        opens="nbd-socket",
        connects=True,
    ),
    case(
        "pflash",
        "-M pc -drive if=pflash,format=raw,unit=0,file=flash.fd,readonly=on -drive if=pflash,format=raw,unit=1,file=vars.fd,snapshot=on",  # noqa: E501
        opens="pflash",
    ),
    case("pflash-short", "-M q35 -pflash flash.fd", fdset=True),
    case(
        "pflash-machine",
        "-M q35,pflash0=code -blockdev driver=file,filename={d}/flash.fd,node-name=code,read-only=on",
    ),
    # Networks
    case(
        "netdev-user",
        "-netdev user,id=n0,hostfwd=tcp:127.0.0.1:0-:22,tftp=fatdir,bootfile=x -device virtio-net-pci,netdev=n0,id=nic0",
        opens="tftp",
    ),
    case("nic", "-nic user,model=e1000,tftp={d}/fatdir -nic none"),
    case("net-legacy", "-net nic,model=e1000 -net user"),
    case("netdev-socket", "-netdev socket,id=n1,udp=127.0.0.1:9,localaddr=127.0.0.1:0 -device e1000,netdev=n1"),
    case("netdev-socket-fd", f"-netdev socket,id=n1,fd={CALLER_FD} -device e1000,netdev=n1", fd=CALLER_FD),
    case(
        "netdev-stream",
        "-netdev stream,id=n2,server=off,addr.type=unix,addr.path=peer.sock "
        "-netdev dgram,id=n4,local.type=inet,local.host=127.0.0.1,local.port=0,remote.type=inet,remote.host=127.0.0.1,remote.port=9",  # noqa: E501
        opens="netdev-socket",
        connects=True,
    ),
    case(
        "netdev-stream-json",
        """-netdev {"type":"stream","id":"n2","server":false,"addr":{"type":"unix","path":"{d}/peer.sock"}}""",
        connects=True,
    ),
    case(
        "netdev-stream-fd",
        f"-netdev stream,id=n5,addr.type=fd,addr.str={CALLER_FD} -device virtio-net-pci,netdev=n5",
        fd=CALLER_FD,
    ),
    # Objects
    case(
        "objects",
        "-object secret,id=s0,file=secret.txt -object secret,id=s1,data=geheim -object rng-random,id=r,filename=/dev/urandom "
        "-object memory-backend-ram,id=m0,size=1M -object memory-backend-memfd,id=m1,size=1M "
        "-object memory-backend-file,id=m2,size=1M,mem-path=memory,share=on -object iothread,id=io "
        "-object tls-creds-psk,id=t0,dir=psk,endpoint=server -object authz-simple,id=z,identity=x "
        "-device virtio-rng-pci,rng=r,id=rng0",
        opens="secret mem-path tls device",
    ),
    case(
        "objects-json",
        """-object {"qom-type":"secret","id":"s0","file":"{d}/secret.txt"} -object {"qom-type":"rng-builtin","id":"r"}""",
    ),
    case("objects-readconfig", "-readconfig objects.cfg"),
    case(
        "mem-path",
        "-m 64 -mem-path {d}/out -mem-prealloc",
        opens="mem-path-directory",
    ),
    case("memory-new-file", "-m 64 -object memory-backend-file,id=m,size=64M,mem-path=out/new,share=on -M memory-backend=m"),
    case("filter-dump", "-netdev user,id=n -object filter-dump,id=f,netdev=n,file=out/net.pcap", opens="dump"),
    # Shares
    case(
        "fsdev",
        "-fsdev local,id=f0,path=share,security_model=none,readonly=on -device virtio-9p-pci,fsdev=f0,mount_tag=a,id=p0 "
        "-fsdev local,id=f1,path={d}/share,security_model=mapped-file,fmode=0600,dmode=0700 -device virtio-9p-pci,fsdev=f1,mount_tag=b "  # noqa: E501
        "-virtfs local,path=./sub/../share,mount_tag=c,security_model=passthrough,id=v,multidevs=remap",
        opens="fsdev",
    ),
    case("fsdev-readconfig", "-readconfig share.cfg -set fsdev.s.path={d}/share -device virtio-9p-pci,fsdev=s,mount_tag=s"),
    # Firmware and tables
    case("kernel", "-kernel kernel -initrd initrd -append a=b", opens="kernel initrd"),
    case("machine-kernel", "-M pc,kernel={d}/kernel,initrd=initrd"),
    case("bios", "-bios bios.bin -L fatdir -L {d}/sub", opens="bios -L"),
    case("bios-by-name", "-bios bios-256k.bin -option-rom linuxboot.bin -device VGA,romfile={d}/rom.bin", opens="romfile"),
    case("dtb", "-M virt -dtb board.dtb -kernel kernel -cpu cortex-a57", qemu="qemu-system-aarch64", opens="dtb"),
    case(
        "tables",
        "-smbios file=smbios.bin -smbios type=11,path=text -smbios type=1,manufacturer=x,,y -acpitable data=acpi.bin "
        "-acpitable sig=TEST,file={d}/acpi.bin:text -fw_cfg opt/a,file=text -fw_cfg name=opt/b,string=x,,y -boot splash=text",
        opens="smbios acpitable fw_cfg splash",
    ),
    case("loader", "-device loader,file=text,addr=0x10000 -device loader,addr=0x20000,data=1,data-len=4", opens="loader"),
    # Files that QEMU writes
    case(
        "logs",
        "-D out/qemu.log -d guest_errors -pidfile out/qemu.pid -trace vm_state_notify -name x,process=y",
        opens="-D pidfile",
    ),
    case("trace", "-trace events=events,file=out/trace.log -pidfile {d}/out/pid -D {d}/out/log", opens="trace-events trace-file"),
    # Several spellings of one machine
    case(
        "whole",
        "-name vm,debug-threads=on -uuid 6ba7b810-9dad-11d1-80b4-00c04fd430c8 -M pc,usb=on -m 64M,slots=2,maxmem=128M -smp 2,sockets=2 "  # noqa: E501
        "-rtc base=utc -boot order=c,menu=on -global virtio-blk-pci.disable-modern=on -device usb-tablet,id=tab "
        "-device virtio-scsi-pci,id=scsi -drive file=disk.raw,if=none,id=d,format=raw,read-only=on -device scsi-hd,drive=d,id=hd "
        "-vnc none -readconfig drives2.cfg -set device.hd.serial=abc -chardev socket,id=mon0,path=out/mon.sock,server=on,wait=off "  # noqa: E501
        "-mon chardev=mon0,id=monitor,mode=control -watchdog-action none -overcommit mem-lock=off -msg timestamp=on",
    ),
    case(
        "symlinks-and-dots",
        "-hda link/../disk.raw -drive file=link/inner.raw,format=raw,if=none,id=a,readonly=on -kernel {d}/link/../kernel",
        fdset=True,
    ),
    case(
        "odd-names",
        "-drive file=odd/a,,b~c.raw,format=raw,if=none,id=a,readonly=on -drive file=odd/\u00e4\u00f6\u20ac.raw,format=raw,if=none,id=b,readonly=on "  # noqa: E501
        "-kernel odd/a,b~c.raw -chardev file,id=c,path=out/x,,y~z",
    ),
)
KINDS = [
    "kernel",
    "initrd",
    "dtb",
    "bios",
    "pflash",
    "-L",
    "drive",
    "blockdev",
    "backing",
    "data-file",
    "extent",
    "cdrom",
    "fsdev",
    "mem-path",
    "mem-path-directory",
    "smbios",
    "acpitable",
    "fw_cfg",
    "secret",
    "tls",
    "log",
    "-D",
    "trace-events",
    "trace-file",
    "dump",
    "chardev-file",
    "chardev-pipe",
    "chardev-socket",
    "pidfile",
    "pty",
    "snapshot",
    "fat",
]

MAKE_FILES = """
set -e
mkdir out sub psk fatdir share odd elsewhere elsewhere/deep
img() { qemu-img create -q "$@"; }
for name in disk.raw third.raw sub/base.raw odd/plain.raw cd.iso; do truncate -s 1M $name; done
truncate -s 1474560 floppy.img
truncate -s 256K flash.fd vars.fd
truncate -s 64K bios.bin
truncate -s 1M memory
ln -s elsewhere/deep link
truncate -s 1M elsewhere/deep/inner.raw elsewhere/disk.raw
cp odd/plain.raw "odd/a,b c.raw"
cp odd/plain.raw "odd/\u00e4\u00f6\u20ac.raw"
img -f qcow2 -b base.raw -F raw sub/base.qcow2
img -f qcow2 -b sub/base.qcow2 -F qcow2 top.qcow2
img -f qcow2 -b "$PWD/sub/base.qcow2" -F qcow2 absolute.qcow2
img -f qcow2 -u -b "json:{\\"driver\\":\\"raw\\",\\"file\\":{\\"driver\\":\\"file\\",\\"filename\\":\\"$PWD/sub/base.raw\\"}}" -F raw json.qcow2 1M
img -f qcow2 second.qcow2 1M
img -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1M
img -f vmdk -o subformat=monolithicFlat flat.vmdk 1M
img -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 1M
img -f qed a.qed 1M
printf 'geheim' >secret.txt
printf 'qemu:0123456789abcdef\\n' >psk/keys.psk
printf 'some text\\n' >text
printf 'vm_state_notify\\n' >events
printf 'a file\\n' >fatdir/file.txt
printf '[inject-error]\\nevent = "read_aio"\\nerrno = "5"\\nonce = "on"\\n' >blkdebug.conf
mkfifo fifo.in fifo.out one
printf '[chardev "f"]\\n  backend = "file"\\n  path = "%s/out/a,b"\\n# comment\\n[chardev "s"]\\n  backend = "socket"\\n  path = "out/s.sock"\\n  server = "on"\\n  wait = "off"\\n[chardev "n"]\\n  backend = "null"\\n' "$PWD" >chardevs.cfg
printf '[chardev "u"]\\n  backend = "socket"\\n  path = "peer.sock"\\n[mon "m"]\\n  chardev = "u"\\n  mode = "control"\\n' >sub/serial.cfg
printf '[drive "r0"]\\n  file = "disk.raw"\\n  format = "raw"\\n  if = "none"\\n[drive "r1"]\\n  file = "%s/top.qcow2"\\n  if = "none"\\n  readonly = "on"\\n' "$PWD" >drives.cfg
printf '[drive "w0"]\\n  file = "second.qcow2"\\n  if = "none"\\n  read-only = "on"\\n\\n[device "w"]\\n  driver = "virtio-blk-pci"\\n  drive = "w0"\\n' >drives2.cfg
printf '[object "s"]\\n  qom-type = "secret"\\n  file = "%s/secret.txt"\\n[object "m"]\\n  qom-type = "memory-backend-file"\\n  size = "1M"\\n  mem-path = "memory"\\n' "$PWD" >objects.cfg
printf '[fsdev "s"]\\n  fsdriver = "local"\\n  path = "/nowhere"\\n  security_model = "none"\\n  readonly = "on"\\n' >share.cfg
qemu-system-aarch64 -M virt,dumpdtb=board.dtb -cpu cortex-a57 -display none 2>/dev/null
"""  # noqa: E501


def make_smbios() -> bytes:
    """Make a structure of type 128 with one string."""
    return bytes([128, 4, 0x34, 0x12]) + b"text\0\0"


def make_rom(size: int = 512) -> bytes:
    """Make an option ROM that only returns."""
    rom = bytearray(size)
    rom[:4] = bytes([0x55, 0xAA, size // 512, 0xCB])
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def make_kernel() -> bytes:
    """Make the head of a bzImage: enough for QEMU to load it."""
    kernel = bytearray(8192)
    kernel[0x1F1] = 4  # setup sectors
    kernel[0x1FE:0x200] = b"\x55\xaa"
    kernel[0x202:0x206] = b"HdrS"
    kernel[0x206:0x208] = (0x020C).to_bytes(2, "little")
    kernel[0x211] = 1  # loaded high
    kernel[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")
    return bytes(kernel)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The folder that every QEMU is started in; `fill` puts the files of `folder.template` in it."""
    base = Path(tempfile.mkdtemp(prefix="same-")).resolve()
    base.chmod(0o755)
    work = base / "work"
    work.mkdir()
    subprocess.run(["bash", "-c", MAKE_FILES], cwd=work, check=True)
    (work / "smbios.bin").write_bytes(make_smbios())
    (work / "acpi.bin").write_bytes(bytes(64))
    (work / "rom.bin").write_bytes(make_rom())
    (work / "kernel").write_bytes(make_kernel())
    (work / "initrd").write_bytes(b"initrd" * 100)
    (work / "odd/a,b c.raw").write_bytes(make_kernel())
    (work / "elsewhere/kernel").write_bytes(make_kernel())
    work.rename(base / "template")
    yield work
    remove_tree(base)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Have the files, and who listens on the sockets, in the folder; nothing of the run before."""
    if folder.exists():
        remove_tree(folder)
    subprocess.run(["cp", "-a", str(folder.parent / "template"), str(folder)], check=True)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_tree, folder)
        peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        # The address has room for 107 bytes, and the folder's name may take them.
        here = os.open(folder, os.O_PATH)
        stack.callback(os.close, here)
        peer.bind(f"/proc/self/fd/{here}/peer.sock")
        peer.listen(8)
        yield


@contextlib.contextmanager
def nbd_server(folder: Path) -> Iterator[None]:
    words = [
        "qemu-nbd",
        "--socket",
        str(folder / "nbd.sock"),
        "--persistent",
        "--read-only",
        "-f",
        "raw",
        str(folder / "third.raw"),
    ]
    server = subprocess.Popen(words)
    try:
        while not (folder / "nbd.sock").exists():
            assert server.poll() is None
        yield
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def caller_fd(number: int | None) -> Iterator[tuple[int, ...]]:
    """Have one end of a socket pair open as fd `number`."""
    if number is None:
        yield ()
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(theirs.fileno(), number, inheritable=False)
        try:
            yield (number,)
        finally:
            os.close(number)


def fill_in(words: tuple[str, ...], folder: Path) -> list[str]:
    return [word.replace("{d}", str(folder).replace(",", ",,")) for word in words]


@contextlib.contextmanager
def started(qemu: list[str], tried: Case, folder: Path) -> Iterator[Probe]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(filled(folder))
        if tried.name == "nbd":
            stack.enter_context(nbd_server(folder))
        fds = stack.enter_context(caller_fd(tried.fd))
        yield stack.enter_context(probing(qemu, fill_in(tried.words, folder), cwd=folder, pass_fds=fds))


# --- what is compared -------------------------------------------------------------------------------------------------


PRIVATE = "a socket of the supervisor's"


def take_inventory(probe: Probe) -> dict[str, Any]:
    """Ask QEMU for all that it has."""
    found: Any = {}
    for query in QUERIES:
        found[query] = _try(lambda query=query: probe.ask(query))
    for line in HMP:
        # When the file system allocates what was written just now is its business.
        said = re.sub(r"disk size: .*", "disk size: any", probe.hmp(line))
        found[line] = sorted(said.split("\n")) if line == "info chardev" else said
    for path in QOM_FOLDERS:
        for child in _try(lambda path=path: probe.ask("qom-list", path=path)) or []:
            if isinstance(child, dict):
                found[f"{path}/{child['name']}"] = _properties(probe, path, child)
    _leave_out_ends(found)
    normal: dict[str, Any] = _normal(found, own_fdsets(probe))
    return normal


def _leave_out_ends(found: dict[str, Any]) -> None:
    """Leave out what is different by design: the supervisor is at the other end of QMP monitors, on a socket of its own."""
    for key in [key for key in found if key.endswith("/chardevs/probe")]:
        del found[key]
    for key, value in found.items():
        if "/chardevs/" in key and isinstance(value, tuple) and isinstance(value[1], dict):
            value[1].pop("connected", None)
            _, address = value[1].get("addr", (None, None))
            if isinstance(address, dict) and ".qemu-userns." in address.get("path", ""):
                value[1]["addr"] = PRIVATE
            elif isinstance(address, dict) and address.get("type") == "fd":
                del value[1]["addr"]


def _properties(probe: Probe, path: str, child: dict[str, str]) -> Any:
    """Return the properties of an object below `path`, or the value of a plain property."""
    if not child["type"].startswith("child<"):
        return child["type"], _try(lambda: probe.ask("qom-get", path=path, property=child["name"]))
    if path == "/machine":
        return child["type"]
    inner = f"{path}/{child['name']}"
    return child["type"], {
        item["name"]: (item["type"], _try(lambda item=item: probe.ask("qom-get", path=inner, property=item["name"])))
        for item in probe.ask("qom-list", path=inner)
    }


def _try(ask: Any) -> Any:
    try:
        return ask()
    except QmpError as err:
        return f"error: {err}"


def own_fdsets(probe: Probe) -> dict[str, str]:
    """Return the path that each fdset of ours stands for, as QEMU's words say; query-fdsets does not show them to clients."""
    assert all(group["fdset-id"] < OWN_FDSETS for group in probe.ask("query-fdsets"))
    words = Path(f"/proc/{probe.process.pid}/cmdline").read_text().split("\0")
    found = {}
    for option, value in itertools.pairwise(words):
        if option == "-add-fd":
            fields = dict(field.split("=", 1) for field in value.replace(",,", "\1").split(","))
            if int(fields["set"]) > OWN_FDSETS:
                found[f"/dev/fdset/{fields['set']}"] = fields["opaque"].replace("\1", ",")
    return found


def _normal(value: Any, fdsets: dict[str, str]) -> Any:
    """Leave out what differs between two runs of one QEMU: times, ports, numbers of pseudo terminals, fds and addresses."""
    if isinstance(value, dict):
        if "fdset-id" in value and value["fdset-id"] > OWN_FDSETS:
            return None
        kept = {_normal(key, fdsets): item for key, item in value.items() if not key.endswith((*VOLATILE, "_ns"))}
        if kept.get("host") == "127.0.0.1":
            kept.pop("port", None)
        return {key: _normal(item, fdsets) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return sorted((normal for item in value if (normal := _normal(item, fdsets)) is not None), key=_order)
    if isinstance(value, str):
        value = re.sub(r"#(block|chr|net)\d+", r"#\1", value)
        value = re.sub(r"/[^ \"]*/vl\.\w{6}", "TEMPORARY", value)
        value = re.sub(r"/dev/pts/\d+", "/dev/pts/N", value)
        value = re.sub(r"0x[0-9a-f]{12,16}", "0xADDRESS", value)
        value = re.sub(r"127\.0\.0\.1:\d{4,5}|(?<=\[)\d+(?=\])|fd=\d+|fd:\d+|Socket: fd \d+", "NUMBER", value)
        return re.sub(r"(TCP|UDP)\[HOST_FORWARD\].*|time:.*|\(\d+ ns\)", "", value)
    return value


def _order(value: Any) -> str:
    """Sort what QEMU keeps in hash tables of its own names."""
    return str(value.get("label") or value.get("node-name") or "") + str(value) if isinstance(value, dict) else ""


def differences(plain: Any, ours: Any, where: str = "") -> list[str]:
    if isinstance(plain, dict) and isinstance(ours, dict):
        keys = [*plain, *(key for key in ours if key not in plain)]
        return [line for key in keys for line in differences(plain.get(key), ours.get(key), f"{where}/{key}")]
    if isinstance(plain, list) and isinstance(ours, list) and len(plain) == len(ours):
        return [line for i, pair in enumerate(zip(plain, ours, strict=True)) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(plain, str) and isinstance(ours, str) and "\n" in plain + ours:
        return differences(plain.split("\n"), ours.split("\n"), where)
    return [] if plain == ours else [f"{where}:\n  plain  {plain!r:.400}\n  dropin {ours!r:.400}"]


@pytest.mark.parametrize("tried", CASES, ids=lambda tried: tried.name)
def test_the_same_objects(tried: Case, folder: Path) -> None:
    if shutil.which(tried.qemu) is None:
        pytest.skip(f"qemu: no {tried.qemu}")
    with started([tried.qemu], tried, folder) as probe:
        plain = take_inventory(probe)
    if ROOT and tried.root_refused:
        assert_refused(tried, folder)
        return
    with started([str(dropin_folder() / tried.qemu)], tried, folder) as probe:
        fdsets = own_fdsets(probe)
        ours = take_inventory(probe)
    if fdsets:
        assert ROOT, fdsets
        assert tried.fdset, fdsets
        plain, ours = without_names(plain), without_names(ours)
    if ROOT and tried.connects:
        plain, ours = (without_names(without_addresses(inventory)) for inventory in (plain, ours))
    plain, ours = without_private(plain, ours)
    assert not (found := differences(plain, ours)), "\n".join(found)


def assert_refused(tried: Case, folder: Path) -> None:
    """As root with leased ids: one line of ours, a hint, and nothing started."""
    with filled(folder), nbd_server(folder) if tried.name == "nbd" else contextlib.nullcontext():
        words = [str(dropin_folder() / tried.qemu), *fill_in(tried.words, folder)]
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-userns: ")
    assert tried.root_refused in done.stderr
    assert done.stderr.splitlines()[1].startswith("hint: ")


def without_names(inventory: dict[str, Any]) -> dict[str, Any]:
    """Leave out what images are called, and which node is which for that; drivers, sizes and access stay."""
    names = (
        "filename",
        "file",
        "backing-filename",
        "full-backing-filename",
        "parent",
        "actual-size",
        "backing_file",
        "image",
        "cache",
    )
    kept = {key: value for key, value in inventory.items() if key not in ("info block -v", "query-blockstats")}
    for query in ("query-block", "query-named-block-nodes"):
        kept[query] = sorted(
            ({name: _strip(value, names) for name, value in node.items() if name not in names} for node in kept[query]), key=str
        )
    return kept


def _strip(value: Any, names: tuple[str, ...]) -> Any:
    return {key: item for key, item in value.items() if key not in names} if isinstance(value, dict) else value


def without_addresses(inventory: dict[str, Any]) -> dict[str, Any]:
    """Leave out the addresses of the character devices' sockets."""
    return {
        key: [value[0], _strip(value[1], ("addr",))] if key.startswith("/chardevs/") else value
        for key, value in inventory.items()
    }


def without_private(plain: dict[str, Any], ours: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leave out the addresses of QMP monitors, where ours are sockets of the supervisor's."""
    private = {name for name, value in ours.items() if name.startswith("/chardevs/") and PRIVATE in str(value)}

    def strip(inventory: dict[str, Any]) -> dict[str, Any]:
        return {name: [value[0], _strip(value[1], ("addr",))] if name in private else value for name, value in inventory.items()}

    return strip(plain), strip(ours)


def test_every_kind_of_file_is_opened_once() -> None:
    assert set(KINDS) <= {kind for tried in CASES for kind in tried.opens}


@pytest.mark.root
@pytest.mark.parametrize("option", ["-runas", "-run-with"])
def test_as_the_owner_nothing_is_passed_in_an_fdset(option: str, folder: Path, unprivileged_user: str) -> None:
    """Disks of the user that -runas names are shown at their paths, as to an unprivileged caller."""
    as_user = ("-runas", unprivileged_user) if option == "-runas" else ("-run-with", f"user={unprivileged_user}")
    words = ("-hda", "top.qcow2", "-drive", "file=disk.raw,format=raw,if=none,id=a", "-blockdev")
    tried = Case("runas", (*words, "qcow2,node-name=q,file.driver=file,file.filename=second.qcow2"))
    found: list[Any] = []
    for qemu, extra in (([tried.qemu], ()), ([str(dropin_folder() / tried.qemu)], as_user)):
        with filled(folder):
            subprocess.run(["chown", "-R", f"{unprivileged_user}:", str(folder)], check=True)
            with probing(qemu, [*tried.words, *extra], cwd=folder) as probe:
                assert own_fdsets(probe) == {}
                found.append(take_inventory(probe))
    assert not (lines := differences(found[0], found[1])), "\n".join(lines)


POOL = (3_000_000_000, 3_000_065_535)  # nobody else's, so that a lease in it would be that of explain


# --- explain ----------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what is in a folder, and since when."""
    return {
        str(path): (status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for path in folder.rglob("*")
        if (status := path.lstat())
    }


@pytest.mark.parametrize("tried", CASES, ids=lambda tried: tried.name)
def test_explain_says_it_and_does_nothing(tried: Case, folder: Path) -> None:
    command = [str(CHECKOUT / ".venv/bin/python"), "-c", "from qemu_userns.cli.main import main; main()", "explain"]
    with filled(folder), caller_fd(tried.fd) as fds:
        before = snapshot(folder)
        environ = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        words = [f"--pool={POOL[0]}-{POOL[1]}", tried.qemu, *fill_in(tried.words, folder)]
        json_form, text_form = (
            subprocess.run([*command, *more, *words], cwd=folder, capture_output=True, text=True, pass_fds=fds, env=environ)
            for more in (["--json"], [])
        )
        assert snapshot(folder) == before
    assert not [path for path in Path("/run/qemu-userns").glob("leases/*") if POOL[0] <= int(path.name) <= POOL[1]]
    plan = json.loads(json_form.stdout)
    refused = bool(plan["refused"])
    assert (json_form.returncode, json_form.stderr) == (int(refused), "")
    assert (text_form.returncode, text_form.stderr) == (int(refused), "")
    assert not refused or ROOT, plan["refused"]
    assert plan["command line"][0]["word"] == tried.qemu
    for row in plan["view"]:
        assert row["what"].split(" ")[0] in text_form.stdout


# --- a warm launch ----------------------------------------------------------------------------------------------------


@pytest.mark.strace
@pytest.mark.root
@pytest.mark.parametrize("who", ["leased", "user"])
def test_a_warm_launch_starts_nothing_but_qemu(who: str, folder: Path, unprivileged_user: str, shared_tmp: Path) -> None:
    """strace of a set-uid program works for root only, so root does it for the user too."""
    shared_tmp.chmod(0o777)
    log = shared_tmp / "execve"
    tracer = ["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none", "-s", "200", "-o", str(log)]
    tracer += ["-u", unprivileged_user] if who == "user" else []
    dropin = [str(dropin_folder() / "qemu-system-x86_64")]
    words = ["-drive", "file=top.qcow2,if=none,id=a,readonly=on", "-pidfile", "out/pid"]
    with filled(folder):
        if who == "user":
            subprocess.run(["chown", "-R", f"{unprivileged_user}:", str(folder)], check=True)
        home = Path(f"~{unprivileged_user}").expanduser() if who == "user" else Path.home()
        for qemu in (dropin, tracer + dropin):
            with probing(qemu, words, cwd=folder, env={"HOME": str(home)}):
                pass
    started = re.findall(r'execve\("([^"]*)"(?!.* = -1 )', log.read_text())
    names = sorted(Path(path).name for path in started if path != dropin[0])
    helpers = ["newgidmap", "newuidmap"] if who == "user" else []
    supervisor = [name for name in names if name.startswith("python")]
    assert len(supervisor) <= 1
    assert [name for name in names if name not in supervisor] == sorted([*helpers, "qemu-system-x86_64"])


# --- names ------------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    b"a,b",
    b"a b",
    b" leading and trailing ",
    "\u00e4\u00f6\u20ac\U0001f600".encode(),
    b"\xff\xfe not UTF-8",
    b"new\nline",
    b"tab\tand\x01control",
    b"quote\"and'more",
    b"back\\slash",
    b"per%cent%d",
    b"-leading",
    b"a=b",
    b"x" * 255,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_names_of_any_bytes(name: bytes, absolute: bool, folder: Path, dropin: list[str]) -> None:
    with filled(folder):
        path = os.fsencode(folder) + b"/" + name
        for suffix in (b"", b"/disk", b"/kernel"):
            if not suffix:
                os.mkdir(path)
            else:
                Path(os.fsdecode(path + suffix)).write_bytes(make_kernel())
        start = path if absolute else b"./" + name
        doubled = start.replace(b",", b",,")
        words = [
            *(b"-drive", b"if=none,id=a,format=raw,readonly=on,file=" + doubled + b"/disk"),
            *(b"-kernel", start + b"/kernel"),
            *(b"-fw_cfg", b"name=opt/x,file=" + doubled + b"/disk"),
            *(b"-chardev", b"file,id=c,path=" + doubled + b"/made"),
        ]
        with probing(dropin, words, cwd=folder) as probe:
            assert {device["device"] for device in probe.ask("query-block")} >= {"a"}
        assert os.path.exists(path + b"/made")


def test_a_working_directory_that_is_a_symlink(folder: Path, dropin: list[str]) -> None:
    """The kernel knows the real directory only; a shell's $PWD does not matter, `..` is that of the real one."""
    with filled(folder):
        with probing(dropin, ["-hda", "inner.raw", "-hdb", "../disk.raw", "-snapshot"], cwd=folder / "link") as probe:
            names = {node["file"] for node in probe.ask("query-named-block-nodes")}
            assert os.readlink(f"/proc/{probe.process.pid}/cwd") == str(folder / "elsewhere/deep")
        assert {"inner.raw", "../disk.raw"} <= names


def test_a_working_directory_that_only_the_caller_may_enter(folder: Path, dropin: list[str]) -> None:
    with filled(folder):
        (folder / "elsewhere").chmod(0o700)
        with probing(dropin, ["-drive", "file=inner.raw,format=raw,if=none,id=a,readonly=on"], cwd=folder / "link") as probe:
            assert probe.ask("query-block")
