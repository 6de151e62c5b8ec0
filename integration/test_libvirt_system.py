"""libvirt's system daemon, which root runs, starts the drop-in: as root, and as the user that qemu.conf names."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.libvirt import (
    HOST_ADDRESS,
    Console,
    Domain,
    DomainGuest,
    LibvirtError,
    SystemLibvirt,
    UserLibvirt,
    disk,
    virsh_console,
)
from integration.talk import REAL, is_alive, map_of, status_of, wait_until
from tests.conftest import TEST_USER, dropin_folder, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.userns,
    pytest.mark.newuidmap,
    pytest.mark.dropin,
    pytest.mark.libvirt,
    pytest.mark.root,
    pytest.mark.slow,
]

DROPIN = str(dropin_folder() / "qemu-system-x86_64")
MAC = "52:54:00:12:34:56"
NO_NAMESPACES = "namespaces = []\n"
AS_ROOT = f'user = "root"\ngroup = "root"\ndynamic_ownership = 0\nremember_owner = 0\n{NO_NAMESPACES}'
AS_USER = f'user = "{TEST_USER}"\ngroup = "{TEST_USER}"\n'
BOTH = pytest.mark.parametrize("qemu_conf", [AS_ROOT, AS_USER], ids=["root", "user"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose socket names stay short."""
    path = Path(tempfile.mkdtemp(prefix="libvirt-")).resolve()
    path.chmod(0o755)
    yield path
    remove_tree(path)


@pytest.fixture
def idle_libvirt(folder: Path, qemu_conf: str) -> Iterator[SystemLibvirt]:
    """Libvirt without its daemon."""
    with made(folder / "host-a", qemu_conf) as libvirt:
        yield libvirt


@pytest.fixture
def libvirt(idle_libvirt: SystemLibvirt) -> Iterator[SystemLibvirt]:
    with idle_libvirt.serving():
        yield idle_libvirt
        assert idle_libvirt.virsh("list", "--name") == ""


@contextlib.contextmanager
def made(folder: Path, qemu_conf: str, beside: SystemLibvirt | None = None) -> Iterator[SystemLibvirt]:
    """Make libvirt's folders in a new one."""
    folder.mkdir()
    libvirt = SystemLibvirt(folder, qemu_conf, beside)
    yield libvirt
    libvirt.end_programs()


@BOTH
def test_libvirt_finds_the_same_abilities(libvirt: SystemLibvirt) -> None:
    found = []
    for emulator in (REAL, DROPIN):
        text = libvirt.virsh("domcapabilities", "--virttype", "qemu", "--emulatorbin", emulator)
        found.append(text.replace(emulator, "EMULATOR"))
    assert found[0] == found[1]


@BOTH
def test_a_domain_gets_a_disk_a_network_and_a_console_and_starts_again(libvirt: SystemLibvirt, qemu_conf: str) -> None:
    domain = Domain(libvirt, "vm", DROPIN)
    domain.define("<console type='pty'><target type='virtio'/><alias name='ua-talk'/></console>")
    image = domain.make_disk("a.qcow2", "-f", "qcow2")
    with domain.started() as guest:
        assert_confined(domain, qemu_conf)
        guest.check("modprobe -a virtio_blk virtio_net virtio_console")
        domain.virsh("attach-disk", str(image), "vda", "--targetbus", "virtio", "--subdriver", "qcow2", "--live")
        guest.check("until [ -b /dev/vda ]; do sleep 0.1; done; echo first >/dev/vda; sync")
        domain.virsh("attach-interface", "bridge", "br0", "--model", "virtio", "--mac", MAC, "--live")
        guest.check(f"until ip link | grep -q {MAC}; do sleep 0.1; done")
        guest.check(f"ip link set eth0 up; ip address add 10.11.12.2/24 dev eth0; ping -c 1 -w 20 {HOST_ADDRESS}")
        domain.virsh("detach-interface", "bridge", "--mac", MAC, "--live")
        domain.virsh("detach-disk", "vda", "--live")
        guest.check(f"while [ -b /dev/vda ] || ip link | grep -q {MAC}; do sleep 0.1; done")
        with virsh_console(domain, "ua-talk") as console:
            hear(guest, console)
            console.write(b"from the host\n")
            assert guest.check("head -n 1 /dev/hvc0") == "from the host\n"
        pid = domain.pid
        domain.virsh("destroy")
        assert domain.state == "shut off (destroyed)"
        assert not is_alive(pid)
    with domain.started() as guest:
        domain.attach(disk(image, "vda"))
        guest.check("modprobe virtio_blk; until [ -b /dev/vda ]; do sleep 0.1; done")
        assert guest.check("head -n 1 /dev/vda") == "first\n"
    domain.virsh("undefine")


@BOTH
def test_a_domain_is_saved_and_found_by_a_new_daemon(idle_libvirt: SystemLibvirt, qemu_conf: str) -> None:
    domain = Domain(idle_libvirt, "vm", DROPIN)
    base, overlay, state = domain.make_disk("base.qcow2", "-f", "qcow2"), domain.home / "overlay.qcow2", domain.home / "state"
    with idle_libvirt.serving():
        domain.define(disk(base, "vda"))
        domain.virsh("start", "--paused")
        domain.virsh("snapshot-create-as", "s1", "--disk-only", "--diskspec", f"vda,file={overlay}")
        domain.virsh("save", str(state), "--paused")
        idle_libvirt.virsh("restore", str(state), "--paused")
        pid = domain.pid
    with idle_libvirt.serving(), domain.destroyed_at_the_end():
        assert domain.pid == pid
        assert_confined(domain, qemu_conf)
        assert str(overlay) in domain.virsh("domblklist")
        domain.virsh("blockcommit", "vda", "--active", "--pivot", "--wait", "--shallow")
        assert str(base) in domain.virsh("domblklist")
        domain.virsh("destroy")
        assert not is_alive(pid)
        domain.virsh("undefine", "--snapshots-metadata")


@BOTH
def test_a_domain_migrates_to_another_host(libvirt: SystemLibvirt, folder: Path, qemu_conf: str) -> None:
    domain = Domain(libvirt, "vm", DROPIN)
    image = domain.make_disk("a.qcow2", "-f", "qcow2")
    # The daemon that the guest leaves would give the image back to root at any time after the migration.
    shutil.chown(image, "root" if qemu_conf == AS_ROOT else TEST_USER)
    domain.define(disk(image, "vda", label="<seclabel model='dac' relabel='no'/>"))
    with made(folder / "host-b", qemu_conf, libvirt) as other, other.serving(), domain.started() as guest:
        guest.check("modprobe virtio_blk; echo before >/dev/vda; sync; echo before >/tmp/state")
        pid = domain.pid
        arrived = domain.migrate(other, f"tcp://{HOST_ADDRESS}")
        assert domain.state == "shut off (migrated)"
        wait_until(lambda: not is_alive(pid), "the end of the QEMU that the guest has left")
        with arrived.talking() as again, arrived.destroyed_at_the_end():
            assert_confined(arrived, qemu_conf)
            arrived.virsh("resume")
            assert again.check("cat /tmp/state; head -n 1 /dev/vda") == "before\nbefore\n"
            again.check("echo after >/dev/vda; sync")
            added = arrived.make_disk("b.raw", "-f", "raw")
            arrived.attach(disk(added, "vdb", "raw"))
            again.check("until [ -b /dev/vdb ]; do sleep 0.1; done; echo added >/dev/vdb; sync")
        arrived.virsh("undefine")
    assert added.read_bytes().startswith(b"added\n")
    domain.virsh("undefine")


def test_a_domain_of_a_users_session_has_a_console_and_migrates(folder: Path) -> None:
    hosts = [UserLibvirt(make_folder(folder / name), TEST_USER) for name in ("host-a", "host-b")]
    with contextlib.ExitStack() as stack:
        for host in hosts:
            stack.callback(host.end_programs)
            stack.enter_context(host.serving())
        domain = Domain(hosts[0], "vm", DROPIN)
        domain.define("<console type='pty'><target type='virtio'/><alias name='ua-talk'/></console>")
        image = domain.make_disk("a.qcow2", "-f", "qcow2")
        with domain.started() as guest:
            guest.check("modprobe -a virtio_blk virtio_net virtio_console")
            domain.virsh("attach-disk", str(image), "vda", "--targetbus", "virtio", "--subdriver", "qcow2", "--live")
            domain.attach(f"<interface type='user'><mac address='{MAC}'/><model type='virtio'/></interface>")  # virsh has no word
            guest.check(f"until [ -b /dev/vda ] && ip link | grep -q {MAC}; do sleep 0.1; done; echo before >/dev/vda; sync")
            with virsh_console(domain, "ua-talk") as console:
                hear(guest, console)
            pid = domain.pid
            arrived = domain.migrate(hosts[1], "tcp://127.0.0.1")
            wait_until(lambda: not is_alive(pid), "the end of the QEMU that the guest has left")
            with arrived.talking() as again, arrived.destroyed_at_the_end():
                assert_confined(arrived, AS_USER)
                arrived.virsh("resume")
                assert again.check("head -n 1 /dev/vda") == "before\n"


def hear(guest: DomainGuest, console: Console) -> None:
    """Have the guest say something until it is heard: what it says before libvirt has opened the terminal is lost."""
    guest.check("(while echo from the guest >/dev/hvc0; do sleep 0.2; done) >/dev/null 2>&1 & echo $! >/tmp/speaker")
    wait_until(lambda: b"from the guest" in console.read(), "what the guest says")
    guest.check("kill $(cat /tmp/speaker)")


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """Make a block device of an image."""
    made = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def assert_confined(domain: Domain, qemu_conf: str) -> None:
    """Check that QEMU is nobody whom the host knows, or the user of qemu.conf, and in a user namespace."""
    uid_map = map_of(domain.pid, "uid")
    assert status_of(domain.pid)["CapBnd"] == f"{0:016x}"
    if qemu_conf == AS_ROOT:
        assert all(outside >= 524288 for _, outside, _ in uid_map), uid_map
        assert sum(count for _, _, count in uid_map) == 65536
    else:
        assert (0, pwd.getpwnam(TEST_USER).pw_uid, 1) in uid_map


@pytest.mark.parametrize("qemu_conf", [AS_ROOT, AS_USER, AS_USER + NO_NAMESPACES], ids=["root", "user", "user, no namespaces"])
def test_a_block_device_is_plugged_in_by_its_path(libvirt: SystemLibvirt, qemu_conf: str) -> None:
    domain = Domain(libvirt, "vm", DROPIN)
    domain.define()
    domain.virsh("start", "--paused")
    with loop_device(domain.make_disk("a.raw", "-f", "raw")) as device, domain.destroyed_at_the_end():
        source = f"<source dev='{device}'/><target dev='vda' bus='virtio'/>"
        disk = f"<disk type='block'><driver name='qemu' type='raw'/>{source}</disk>"
        if NO_NAMESPACES in qemu_conf:
            domain.attach(disk)
            assert device in domain.virsh("domblklist")
        else:  # why `qemu-userns hook libvirt` switches them off
            with pytest.raises(LibvirtError, match=f"Unable to create device {device}: Read-only file system"):
                domain.attach(disk)
