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
from integration.vm import run_guest, running_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.kvm, pytest.mark.host]

LINE = "hello from the firmware"
VALUE = 21
CID = 4077
PORT = 1234
TIMEOUT_S = 300
# A Debian system's Python runs from a share of its /usr.
CHROOT = """set -e
mkdir -p /deb/usr /deb/dev /deb/tmp
mount -t 9p -o trans=virtio,version=9p2000.L,ro usr /deb/usr
ln -s usr/lib /deb/lib; ln -s usr/lib64 /deb/lib64; ln -s usr/bin /deb/bin
"""
TALK = f"""chroot /deb /usr/bin/python3 -IS -c '
import socket
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
    connection.connect((socket.VMADDR_CID_HOST, {PORT}))
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
        listening.bind((socket.VMADDR_CID_ANY, PORT))
        listening.listen()
        listening.settimeout(TIMEOUT_S)
        yield listening


def test_kvm_is_there() -> None:
    """What the other tests stand on, and no user's right beyond the group's."""
    found = os.stat("/dev/kvm")
    assert found.st_mode & 0o777 == 0o660
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.mark.root
@pytest.mark.parametrize("identity", [("-runas", "nobody"), ("-run-with", "user=nobody")], ids=str)
def test_kvm_for_an_identity_outside_its_group(rom: list[str], identity: tuple[str, str]) -> None:
    """Plain QEMU opens it before it changes its identity. -runas works for the drop-in also where QEMU has it no more."""
    done, plain = (
        subprocess.run([*words, *rom, *identity], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        for words in (dropin_words(), ["qemu-system-x86_64"])
    )
    expected = (exit_status(VALUE), f"{LINE}\n") if identity[0] == "-runas" else (plain.returncode, plain.stdout)
    assert (done.returncode, done.stdout) == expected, (done.stderr, plain.stderr)


@pytest.mark.slow
def test_a_guest_with_linux(launch: Launch, shared_tmp: Path) -> None:
    result = run_guest(
        dropin_words(), "cat /proc/cpuinfo; exit 7", tmp=shared_tmp, accel="kvm", extra=launch.options, timeout_s=TIMEOUT_S
    )
    assert (result.status, result.qemu_status) == (7, 0), (result.stderr, result.console[-2000:])
    assert "Hypervisor detected: KVM" in result.console
    assert re.search(r"^flags\t*:.* hypervisor", result.output, re.MULTILINE)


@pytest.mark.slow
def test_text_goes_both_ways_over_vsock(launch: Launch, shared_tmp: Path, listener: socket.socket) -> None:
    """By a program from a share: the 9p client of a guest under KVM."""
    extra = [*fsdev("usr", Path("/usr"), "none", ",readonly=on"), "-device", f"vhost-vsock-pci,guest-cid={CID}", *launch.options]
    with running_guest(dropin_words(), tmp=shared_tmp, accel="kvm", extra=extra, timeout_s=TIMEOUT_S) as guest:
        guest.check(CHROOT)
        guest.check(f"({TALK}) >/tmp/talk 2>&1 &")
        connection, (cid, _) = listener.accept()
        with connection:
            assert (cid, connection.recv(100)) == (CID, b"from the guest")
            connection.sendall(b"from the host")
        guest.check("for _ in $(seq 100); do [ -s /tmp/talk ] && break; sleep 0.1; done")
        assert guest.check("cat /tmp/talk") == "from the host\n"
        targets = {os.readlink(fd) for fd in (guest.proc / "fd").iterdir()}
        assert {"anon_inode:kvm-vm", "/dev/vhost-vsock"} <= targets
        assert (guest.proc / "status").read_text().partition("CapEff:\t")[2].split()[0] == "0" * 16
