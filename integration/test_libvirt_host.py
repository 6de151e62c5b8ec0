"""Debian's libvirt in the test host, confined by AppArmor as it is on Debian: what `hook libvirt --apply` adds is enough."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.daemons import kernel_log
from integration.libvirt import Domain, HostLibvirt, LibvirtError, disk
from integration.talk import map_of
from tests.conftest import CHECKOUT, dropin_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.root, pytest.mark.host, pytest.mark.libvirt, pytest.mark.kvm, pytest.mark.dropin, pytest.mark.slow]

PROGRAM = CHECKOUT / ".venv/bin/qemu-userns"
PROFILES = ("usr.lib.libvirt.virt-aa-helper", "usr.sbin.libvirtd")
QEMU_CONF = Path("/etc/libvirt/qemu.conf")
HOOKED = "/usr/local/lib/qemu-userns/libvirt/qemu-system-x86_64"
# No systemd is there to ask for cgroups, and no daemon that writes logs.
ALWAYS = 'stdio_handler = "file"\ncgroup_controllers = []\n'
AS_ROOT = 'user = "root"\ngroup = "root"\ndynamic_ownership = 0\nremember_owner = 0\n'
AS_DEBIAN_HAS_IT = ""


@pytest.fixture(params=[AS_ROOT, AS_DEBIAN_HAS_IT], ids=["root", "libvirt-qemu"])
def libvirt(request: pytest.FixtureRequest) -> Iterator[HostLibvirt]:
    """A daemon that is not served yet, with its domains where Debian's profile of virt-aa-helper lets them be."""
    before = QEMU_CONF.read_text()
    QEMU_CONF.write_text(before + ALWAYS + request.param)
    folder = Path("/var/lib/libvirt/images/test")
    folder.mkdir(mode=0o755)
    for name in PROFILES:
        subprocess.run(["apparmor_parser", "--replace", f"/etc/apparmor.d/{name}"], check=True)
    libvirt = HostLibvirt(folder)
    yield libvirt
    libvirt.end_programs()
    shutil.rmtree(folder)
    QEMU_CONF.write_text(before)


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    """Apply the hook, and undo it."""
    hook("--apply")
    hook("--check")
    yield
    hook("--remove")


def hook(action: str) -> None:
    done = subprocess.run([PROGRAM, "hook", "libvirt", action], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def denials() -> Callable[[], list[str]]:
    """What AppArmor has forbidden since."""
    before = len(kernel_log())
    return lambda: [line for line in kernel_log()[before:] if "DENIED" in line]


def profile_of(pid: int | str) -> str:
    return Path(f"/proc/{pid}/attr/current").read_text().strip()


def test_without_the_hook_the_daemon_may_not_execute_an_entry(libvirt: HostLibvirt) -> None:
    with libvirt.serving():
        domain = Domain(libvirt, "vm", str(dropin_folder() / "qemu-system-x86_64"), "kvm")
        with pytest.raises(LibvirtError, match="Permission denied"):
            domain.define()


def test_a_confined_daemon_starts_a_confined_domain(
    libvirt: HostLibvirt, request: pytest.FixtureRequest, denials: Callable[[], list[str]]
) -> None:
    """What QEMU may only read, kernels and disks, libvirt's profile forbids to write, without a word in the log."""
    with hooked(), libvirt.serving():
        domain = Domain(libvirt, request.node.callspec.id, HOOKED, "kvm")
        domain.define()
        image, read_only = domain.make_disk("a.qcow2", "-f", "qcow2"), domain.make_disk("b.raw", "-f", "raw")
        with domain.started() as guest:
            assert profile_of(libvirt.pid) == "libvirtd (enforce)"
            assert profile_of(domain.pid) == f"libvirt-{domain.virsh('domuuid')} (enforce)"
            assert map_of(domain.pid, "uid")[0][0] == 0
            domain.virsh("attach-disk", str(image), "vda", "--targetbus", "virtio", "--subdriver", "qcow2", "--live")
            domain.attach(disk(read_only, "vdb", "raw").replace("</disk>", "<readonly/></disk>"))
            guest.check("modprobe virtio_blk; until [ -b /dev/vda ] && [ -b /dev/vdb ]; do sleep 0.1; done")
            guest.check("echo first >/dev/vda && sync && ! echo second >/dev/vdb")
            domain.virsh("detach-disk", "vda", "--live")
            domain.virsh("detach-disk", "vdb", "--live")
        assert denials() == []
