"""KVM in the test host: a guest with Linux for each way of starting QEMU, identities outside the group, shares and vsock."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.rom import EXIT_DEVICE, build_rom, exit_status
from integration.shares import Launch, dropin_words, fsdev
from integration.talk import DEADLINE_S, PLAIN, fds_of
from integration.test_hotplug_guest import wait_for
from integration.vm import running_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.kvm, pytest.mark.host]

LINE = "hello from the firmware"
VALUE = 21
CID = 4077
# A Debian system's Python runs from a share of its /usr.
CHROOT = """set -e
mkdir -p /deb/usr /deb/dev /deb/tmp
mount -o bind /dev /deb/dev
mount -t 9p -o trans=virtio,version=9p2000.L,ro usr /deb/usr
ln -s usr/lib /deb/lib; ln -s usr/lib64 /deb/lib64; ln -s usr/bin /deb/bin
"""
TALK = """chroot /deb /usr/bin/python3 -IS -c '
import socket
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
    connection.connect((socket.VMADDR_CID_HOST, %d))
    connection.sendall(b"from the guest")
    print(connection.recv(100).decode())
'"""


@pytest.fixture
def rom(shared_tmp: Path) -> list[str]:
    path = shared_tmp / "rom.bin"
    path.write_bytes(build_rom(LINE, VALUE))
    return ["-nodefaults", "-display", "none", "-m", "16", "-bios", str(path), "-serial", "stdio", *EXIT_DEVICE, "-accel", "kvm"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listening:
        listening.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listening.listen()
        listening.settimeout(DEADLINE_S)
        yield listening


def test_kvm_is_there() -> None:
    """What the other tests stand on, and no user's right beyond the group's."""
    found = os.stat("/dev/kvm")
    assert found.st_mode & 0o777 == 0o660
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.mark.root
@pytest.mark.parametrize("identity", [("-runas", "nobody"), ("-run-with", "user=nobody")], ids=" ".join)
def test_kvm_for_an_identity_outside_its_group(rom: list[str], identity: tuple[str, str]) -> None:
    """Plain QEMU opens it before it changes its identity. The drop-in knows both options, QEMU itself -runas until 10 only."""
    done, plain = (
        subprocess.run([*words, *rom, *identity], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)
        for words in (dropin_words(), PLAIN)
    )
    assert (done.returncode, done.stdout) == (exit_status(VALUE), f"{LINE}\n"), done.stderr
    assert (plain.returncode, plain.stdout) == (done.returncode, done.stdout) or "invalid option" in plain.stderr


@pytest.mark.slow
def test_a_guest_with_linux_talks_over_vsock(launch: Launch, shared_tmp: Path, listener: socket.socket) -> None:
    """By a program from a share: the 9p client of a guest under KVM."""
    extra = [*fsdev("usr", Path("/usr"), "none", ",readonly=on"), "-device", f"vhost-vsock-pci,guest-cid={CID}", *launch.options]
    with running_guest(dropin_words(), tmp=shared_tmp, accel="kvm", extra=extra) as guest:
        assert re.search(r"^flags\t*:.* hypervisor", guest.check("cat /proc/cpuinfo"), re.MULTILINE)
        assert "Hypervisor detected: KVM" in guest.check("dmesg")
        guest.check(CHROOT)
        guest.check(f"({TALK % listener.getsockname()[1]}) >/tmp/talk 2>&1 &")
        try:
            connection, (cid, _) = listener.accept()
        except TimeoutError:
            pytest.fail(guest.check("cat /tmp/talk"))
        with connection:
            assert (cid, connection.recv(100)) == (CID, b"from the guest")
            connection.sendall(b"from the host")
        assert guest.check(f"{wait_for('[ -s /tmp/talk ]')}; cat /tmp/talk") == "from the host\n"
        targets = set(fds_of(guest.pid).values())
        assert {"anon_inode:kvm-vm", "/dev/vhost-vsock"} <= targets
        assert (guest.proc / "status").read_text().partition("CapEff:\t")[2].split()[0] == "0" * 16
