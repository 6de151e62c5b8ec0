"""docs/recipes.md: what other programs make of the drop-in, started by them, or with their command lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.plugged import fixed
from integration.talk import DEADLINE_S, PLAIN, connected, is_alive, qmp_over, started, wait_until
from integration.vm import BOOT_S, KERNEL_ARGUMENTS, SCRIPT_NAME, guest_files, port_options

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

QUESTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("query-status", {}),
    ("query-name", {}),
    ("query-block", {}),
    ("query-named-block-nodes", {"flat": True}),
    ("query-memory-devices", {}),
    ("query-iothreads", {}),
    ("query-vnc", {}),
    ("qom-list", {"path": "/machine/peripheral"}),
    ("qom-list", {"path": "/objects"}),
)

# drivers/qemu/driver.go, StartTask: a job with graceful_shutdown and guest_agent, a port_map of one port.
NOMAD = """
    -machine type=pc,accel=tcg -name image.qcow2 -m 128M -drive file={folder}/image.qcow2,if=ide,id=image0 -nographic
    -monitor unix:{folder}/qemu-monitor.sock,server=on,wait=off
    -chardev socket,path={folder}/qemu-guest-agent.sock,server=on,wait=off,id=qga0
    -device virtio-serial -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0
    -netdev user,id=user.0,hostfwd=udp::0-:22,hostfwd=tcp::0-:22 -device virtio-net,netdev=user.0
"""
# src/test/cfg2cmd/simple1-template.conf.cmd, with a display as in simple1.conf.cmd. Not here: what Proxmox's own QEMU alone has
# (-id, +pve0), its files (-boot splash=) and its bridge script: taps have tests of their own (test_netdevs.py).
PROXMOX = """
    -name simple,debug-threads=on -no-shutdown
    -chardev socket,id=qmp,path={folder}/8006.qmp,server=on,wait=off -mon chardev=qmp,mode=control
    -chardev socket,id=qmp-event,path={folder}/listens.sock,reconnect=5 -mon chardev=qmp-event,mode=control
    -pidfile {folder}/8006.pid -daemonize -smbios type=1,uuid=7b10d7af-b932-4c66-b2c3-3996152ec465
    -smp 1,sockets=1,cores=1,maxcpus=1 -nodefaults -boot menu=on,strict=on,reboot-timeout=1000
    -vnc unix:{folder}/8006.vnc,password=on -cpu qemu64 -m 512
    -object {{"id":"throttle-drive-scsi0","limits":{{}},"qom-type":"throttle-group"}}
    -global PIIX4_PM.disable_s3=1 -global PIIX4_PM.disable_s4=1
    -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e -device pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f
    -device vmgenid,guid=c773c261-d800-4348-9f5d-167fadd53cf8 -device piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2
    -device usb-tablet,id=tablet,bus=uhci.0,port=1 -device VGA,id=vga,bus=pci.0,addr=0x2
    -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on
    -iscsi initiator-name=iqn.1993-08.org.debian:01:aabbccddeeff
    -device ide-cd,bus=ide.1,unit=0,id=ide2,bootindex=200 -device virtio-scsi-pci,id=scsihw0,bus=pci.0,addr=0x5
    -blockdev {{"detect-zeroes":"unmap","discard":"unmap","driver":"throttle","file":{{\
"cache":{{"direct":true,"no-flush":false}},"detect-zeroes":"unmap","discard":"unmap","driver":"qcow2","file":{{"aio":"threads","cache":{{"direct":true,"no-flush":false}},\
"detect-zeroes":"unmap","discard":"unmap","driver":"file","filename":"{folder}/image.qcow2","node-name":"ecd04be","read-only":false}},\
"node-name":"fcd04be","read-only":false}},"node-name":"drive-scsi0","read-only":false,"throttle-group":"throttle-drive-scsi0"}}
    -device scsi-hd,bus=scsihw0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,device_id=drive-scsi0,write-cache=on
    -machine accel=tcg,smm=off,type=pc
"""
# What guestfish 1.48.6 was seen to write.
LIBGUESTFS = """
    -global virtio-blk-pci.scsi=off -no-user-config -nodefaults -display none -machine accel=tcg,graphics=off -cpu max,la57=off
    -m 1280 -no-reboot -rtc driftfix=slew -no-hpet -global kvm-pit.lost_tick_policy=discard -kernel {kernel} -initrd {initramfs}
    -object rng-random,filename=/dev/urandom,id=rng0 -device virtio-rng-pci,rng=rng0 -device virtio-scsi-pci,id=scsi
    -drive file={folder}/disk,cache=writeback,format=raw,id=hd0,if=none -device scsi-hd,drive=hd0
    -drive file={folder}/root,snapshot=on,id=appliance,cache=unsafe,if=none,format=raw -device scsi-hd,drive=appliance
    -device virtio-serial-pci -serial stdio -chardev socket,path={folder}/listens.sock,id=channel0
    -device virtserialport,chardev=channel0,name=org.libguestfs.channel.0 -append panic=1
"""
# mkosi/qemu.py of mkosi 26: a disk image, booted directly, with the console on the terminal.
MKOSI = """
    -machine type=q35,smm=off,hpet=off -smp 2 -m 512M -object rng-random,filename=/dev/urandom,id=rng0
    -device virtio-rng-pci,rng=rng0,id=rng-device0 -device virtio-balloon,free-page-reporting=on -no-user-config
    -nic user,model=virtio-net-pci -cpu max -accel tcg -nographic -nodefaults -chardev stdio,mux=on,id=console,signal=off
    -device virtio-serial-pci,id=mkosi-virtio-serial-pci -device virtconsole,chardev=console -mon console
    -kernel {kernel} -device virtio-scsi-pci,id=mkosi
    -blockdev driver=raw,node-name=mkosi,discard=unmap,file.driver=file,file.filename={folder}/disk,file.aio=threads,\
cache.direct=yes,cache.no-flush=no -device scsi-hd,drive=mkosi,bootindex=1 -smbios type=11,path={folder}/credential
    -initrd {initramfs} -append console=hvc0
"""
LINES = {"nomad": NOMAD, "proxmox": PROXMOX, "libguestfs": LIBGUESTFS, "mkosi": MKOSI}


@pytest.fixture(scope="module")
def guest_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory for virtme-ng: the test guest's, with its kernel as a distribution has it."""
    root = tmp_path_factory.mktemp("root")
    names = [name for name in ("bin", "etc", "lib") for name in (name, f"{name}/*")]  # no device nodes: they take root
    with guest_files().initramfs.open("rb") as archive:
        subprocess.run(["cpio", "--extract", "--make-directories", "--quiet", *names], cwd=root, stdin=archive, check=True)
    for name in ("boot", "dev", "home", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var"):
        (root / name).mkdir()
    for applet in subprocess.run([root / "bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "sbin").symlink_to("bin")
    (modules,) = (root / "lib/modules").iterdir()
    for index in modules.glob("modules.*"):
        index.unlink()  # virtme-ng has depmod make the indices that kmod reads
    (root / "boot" / f"vmlinuz-{modules.name}").symlink_to(guest_files().kernel)
    return root


def run_program(words: list[str], home: Path, said: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that starts a QEMU, and tell it something."""
    return subprocess.run(
        words,
        cwd=home,
        input=said,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BOOT_S,
        env={**os.environ, "HOME": str(home), **environment},
        check=False,
    )


@pytest.mark.slow
def test_virtme_ng_runs_a_command_in_a_guest(dropin: list[str], guest_root: Path, tmp_path: Path) -> None:
    """As root its standard streams are pipes that QEMU's leased id may not open by the names that virtme-ng gives them."""
    (kernel,) = (guest_root / "boot").iterdir()
    (guest_root / "secret").write_text("of the tester's alone\n")
    options = ["--disable-kvm", "--force-9p", "--user", "root", "--root", str(guest_root), "--run", str(kernel), "--verbose"]
    options += ["--append", "cryptomgr.notests no_timer_check"]
    programs = Path(sys.executable).parent
    vng = [str(programs / "vng"), *options, "--qemu", *dropin]
    words = [*vng, "--", "echo uid $(id -u); cat /secret; touch /made || echo read-only; exit 3"]
    done = run_program(words, tmp_path, PATH=f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin")
    said = done.stdout + done.stderr
    assert "uid 0" in said, said
    assert "of the tester's alone" in said
    assert "read-only" in said
    assert "script exited with code 3" in said


@pytest.mark.slow
@pytest.mark.guestfish
def test_guestfish_makes_a_file_system(dropin: list[str], shared_tmp: Path) -> None:
    """Its appliance has the test guest's kernel: a container, say, has none."""
    with guest_files().initramfs.open("rb") as archive:
        extract = ["cpio", "--extract", "--make-directories", "--quiet", "lib/modules/*"]
        subprocess.run(extract, cwd=shared_tmp, stdin=archive, check=True)
    (modules,) = (shared_tmp / "lib/modules").iterdir()
    kernel = {
        "SUPERMIN_KERNEL": str(guest_files().kernel),
        "SUPERMIN_KERNEL_VERSION": modules.name,
        "SUPERMIN_MODULES": str(modules),
    }
    places = dict.fromkeys(("LIBGUESTFS_CACHEDIR", "TMPDIR"), str(shared_tmp))
    settings = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg", "LIBGUESTFS_HV": dropin[0]}
    (shared_tmp / "disk").write_bytes(bytes(16 << 20))
    commands = ["run", "part-disk /dev/sda mbr", "mkfs ext4 /dev/sda1", "mount /dev/sda1 /", "write /made there", "cat /made"]
    done = run_program(["guestfish", "-a", "disk"], shared_tmp, "\n".join(commands), **kernel, **places, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")
    assert (shared_tmp / "disk").read_bytes()[510:512] == b"\x55\xaa"


@pytest.mark.mkosi
def test_mkosi_boots_an_image(dropin: list[str], shared_tmp: Path) -> None:
    """One that is there with its kernel: what mkosi makes images of is on the network.

    It finds no swtpm: with a TPM, SeaBIOS gives a kernel that is started by PVH, as the test guest's is, no ACPI.
    """
    tools = shared_tmp / "tools"
    tools.mkdir()
    for name in ("qemu-system-x86_64", "newuidmap", "newgidmap"):
        (tools / name).symlink_to(shutil.which(name) or "/nowhere")
    image, script = shared_tmp / "image.raw", shared_tmp / "script"
    image.write_bytes(b"of the image\n" + bytes((8 << 20) - 13))
    script.write_text("modprobe virtio_blk; head -n 1 /dev/vda")
    (shared_tmp / "image.vmlinuz").symlink_to(guest_files().kernel)
    (shared_tmp / "image.initrd").symlink_to(guest_files().initramfs)
    (shared_tmp / "image.cmdline").write_text(KERNEL_ARGUMENTS)
    ports = [word for name in ("output", "status") for word in port_options(name, f"file,path={shared_tmp / name}")]
    options = ["-no-reboot", "-fw_cfg", f"name={SCRIPT_NAME},file={script}", "-device", "virtio-serial-pci,id=ports", *ports]
    settings = [
        "--format",
        "gpt_ext4",
        "--output",
        image.name,
        "--qemu-boot",
        "linux",
        "--qemu-kvm",
        "no",
        "--qemu-headless",
        "yes",
    ]
    words = ["/usr/bin/python3", "-m", "mkosi", "--distribution", "debian", *settings, "qemu", *options]
    done = run_program(words, shared_tmp, PATH=f"{Path(dropin[0]).parent}:{tools}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert (shared_tmp / "output").read_text() == "of the image\n", said


@pytest.mark.parametrize("program", LINES)
def test_a_programs_command_line_has_the_same_answers(dropin: list[str], shared_tmp: Path, program: str) -> None:
    """The programs themselves are not started."""
    answers = []
    for name, words in (("plain", PLAIN), ("dropin", dropin)):
        folder = shared_tmp / name
        make_files(folder)
        with listening(folder / "listens.sock") as listener, replayed(words, LINES[program], folder) as line:
            answers.append(line)
            if "listens.sock" in LINES[program]:
                client, _ = listener.accept()
                with client:
                    if program == "proxmox":
                        assert b"QMP" in client.recv(4096)
    assert answers[1] == answers[0]
    assert '"error"' not in answers[0]


def make_files(folder: Path) -> None:
    """Make what the command lines name."""
    folder.mkdir()
    folder.chmod(0o755)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "image.qcow2", "8M"], check=True)
    for name in ("disk", "root"):
        (folder / name).write_bytes(bytes(1 << 20))
    (folder / "credential").write_text("io.systemd.credential:name=value")
    for file in folder.iterdir():
        file.chmod(0o666)  # else root's are named by fdsets, docs/differences.md


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Give a listening socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        yield listener


@contextlib.contextmanager
def replayed(words: list[str], line: str, folder: Path) -> Iterator[str]:
    """Start QEMU with a program's command line, halted; give what it answers, without its folder; end it."""
    files = guest_files()
    filled = [word.format(folder=folder, kernel=files.kernel, initramfs=files.initramfs) for word in line.split()]
    qmp = folder / "qmp"
    with started([*words, *filled, "-S", "-qmp", f"unix:{qmp},server=on,wait=off"], stdout=subprocess.DEVNULL) as process:
        if "-daemonize" in filled:
            assert process.wait(DEADLINE_S) == 0
            pid = int((folder / "8006.pid").read_text())
        else:
            pid = process.pid
        with connected(qmp) as connection, qmp_over(connection) as client:
            answers = [client.ask(command, **arguments) for command, arguments in QUESTIONS]
            answers.append({"chardevs": sorted(found["label"] for found in client.execute("query-chardev"))})
            yield re.sub(r"/vl\.\w{6}", "/vl.XXXXXX", fixed(json.dumps(answers, indent=1), folder))
            client.execute("quit")
        wait_until(lambda: process.poll() is not None and not is_alive(pid), "the end of QEMU")
