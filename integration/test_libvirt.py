"""libvirt drives a domain whose <emulator> is the drop-in, as it drives one of plain QEMU.

Not as root: that has one system driver and no session (libvirt takes qemu:///session of root's for qemu:///system, whose files
are all over the host).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.libvirt import Domain, Libvirt, LibvirtError, disk
from integration.talk import REAL, is_alive, map_of, wait_until
from tests.conftest import dropin_folder, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.userns,
    pytest.mark.newuidmap,
    pytest.mark.dropin,
    pytest.mark.libvirt,
    pytest.mark.ordinary,
    pytest.mark.slow,
]

DROPIN = str(dropin_folder() / "qemu-system-x86_64")
BOTH = pytest.mark.parametrize("emulator", [REAL, DROPIN], ids=["plain", "dropin"])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder for all tests, whose socket names stay short."""
    path = Path(tempfile.mkdtemp(prefix="libvirt-")).resolve()
    path.chmod(0o755)
    yield path
    remove_tree(path)


@pytest.fixture(scope="module")
def folders(folder: Path) -> Libvirt:
    """Libvirt's folders: what it has found out about an emulator is kept from test to test."""
    return Libvirt(folder)


@pytest.fixture
def idle_libvirt(folders: Libvirt) -> Iterator[Libvirt]:
    """Libvirt without its daemon."""
    yield folders
    folders.end_programs()


@pytest.fixture
def libvirt(idle_libvirt: Libvirt) -> Iterator[Libvirt]:
    with idle_libvirt.serving():
        yield idle_libvirt
        assert idle_libvirt.virsh("list", "--name") == ""


@pytest.fixture
def emulator() -> str:
    """A domain's, where the test is not one of BOTH, which show that they pass with plain QEMU."""
    return DROPIN


@pytest.fixture
def domain(libvirt: Libvirt, emulator: str) -> Iterator[Domain]:
    """A domain that is not yet defined."""
    domain = Domain(libvirt, f"vm-{len(list(libvirt.folder.glob('vm-*')))}", emulator)
    yield domain
    if domain.name in libvirt.virsh("list", "--all", "--name").split():
        domain.virsh("undefine", "--managed-save", "--snapshots-metadata")


def test_libvirt_finds_the_same_abilities(libvirt: Libvirt) -> None:
    found = []
    for emulator in (REAL, DROPIN):
        text = libvirt.virsh("domcapabilities", "--virttype", "qemu", "--emulatorbin", emulator)
        found.append(text.replace(emulator, "EMULATOR"))
    assert found[0] == found[1]
    kept = {}
    for path in (libvirt.folder / "cache/libvirt/qemu/cache/capabilities").iterdir():
        text = path.read_text()
        emulator = re.findall("<emulator>(.*)</emulator>", text)[0]
        kept[emulator] = re.sub(r"<(qemuctime|selfctime|emulator)>.*</\1>\n", "", text)
    assert kept[DROPIN] == kept[REAL]


@BOTH
def test_a_domain_starts_and_is_destroyed(domain: Domain) -> None:
    domain.define()
    with domain.started() as guest:
        assert domain.state == "running (booted)"
        assert guest.check("uname -s") == "Linux\n"
        assert "Linux version" in domain.console
        assert is_confined(domain)
        pid = domain.pid
        assert pid_of_vcpu(domain) in {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
        domain.virsh("vcpupin", "0", "0")
        assert os.sched_getaffinity(pid_of_vcpu(domain)) == {0}
        domain.virsh("destroy")
        assert domain.state == "shut off (destroyed)"
        assert not is_alive(pid)


def test_a_guest_reboots_is_reset_and_powers_off(domain: Domain) -> None:
    domain.define()
    with domain.started() as guest:
        pid = domain.pid
        guest.run_and_leave("reboot -f")
        guest.wait_ready()
        domain.virsh("reset")
        guest.wait_ready()
        domain.virsh("suspend")
        assert domain.state == "paused (user)"
        domain.virsh("resume")
        assert guest.check("echo back") == "back\n"
        assert domain.pid == pid
        guest.run_and_leave("poweroff -f")
        wait_until(lambda: domain.state == "shut off (shutdown)", "the domain's end", 60)
        wait_until(lambda: not is_alive(pid), "QEMU's end", 60)
        assert domain.console.count("Linux version") == 3


@BOTH
def test_disks_come_and_go(domain: Domain) -> None:
    domain.define()
    disks = {"vda": disk(domain.make_disk("a.qcow2", "-f", "qcow2"), "vda")}
    raw = domain.make_disk("b.raw", "-f", "raw")
    disks["vdb"] = disk(raw, "vdb", "raw")
    with domain.started() as guest:
        guest.check("modprobe virtio_blk")
        for _ in range(2):
            for name, device in disks.items():
                domain.attach(device)
                guest.check(f"until [ -b /dev/{name} ]; do sleep 0.1; done; yes {name} | head -c 65536 >/dev/{name}; sync")
                assert str(domain.home) in domain.virsh("domblklist")
                assert domain.virsh("domblkinfo", name).startswith("Capacity:       4194304")
            for name, device in disks.items():
                assert guest.check(f"head -c 65536 /dev/{name} | sort -u") == f"{name}\n"
                domain.detach(device)
                guest.check(f"while [ -b /dev/{name} ]; do sleep 0.1; done")
            assert domain.virsh("domblklist") == ""
    assert set(raw.read_bytes()[:65536].split(b"\n")) <= {b"vdb", b"v", b"vd", b""}
    assert qemu_img("check", domain.home / "a.qcow2").startswith("No errors")


def test_a_disk_that_is_not_there_is_refused(domain: Domain) -> None:
    domain.define()
    domain.virsh("start", "--paused")
    with domain.destroyed_at_the_end():
        path = domain.home / "missing.qcow2"
        with pytest.raises(LibvirtError, match=f"Cannot access storage file '{path}'.*: No such file or directory"):
            domain.attach(disk(path, "vda"))
        text = domain.home / "text.qcow2"
        text.write_text("no image")
        text.chmod(0o666)
        with pytest.raises(LibvirtError, match="Image is not in qcow2 format"):
            domain.attach(disk(text, "vda"))
        domain.attach(disk(domain.make_disk("a.qcow2", "-f", "qcow2"), "vda"))


def test_an_external_snapshot_is_taken_and_merged(domain: Domain) -> None:
    base, overlay = domain.make_disk("base.qcow2", "-f", "qcow2"), domain.home / "overlay.qcow2"
    domain.define(disk(base, "vda"))
    with domain.started() as guest:
        guest.check("modprobe virtio_blk; echo one >/dev/vda; sync")
        domain.virsh("snapshot-create-as", "s1", "--disk-only", "--diskspec", f"vda,file={overlay}")
        assert str(overlay) in domain.virsh("domblklist")
        guest.check("echo two >/dev/vda; sync")
        assert str(base) in qemu_img("info", "-U", "--backing-chain", overlay)
        domain.virsh("snapshot-delete", "s1", "--metadata")
        domain.virsh("blockcommit", "vda", "--active", "--pivot", "--wait", "--shallow")
        assert str(base) in domain.virsh("domblklist")
        overlay.unlink()
        guest.check("[ $(head -n 1 /dev/vda) = two ]; echo three >/dev/vda; sync")
    assert qemu_io(base).startswith("00000000:  74 68 72 65 65 0a")


def test_an_overlay_of_a_disk_is_plugged(domain: Domain) -> None:
    base = domain.make_disk("base.raw", "-f", "raw")
    base.write_bytes(b"base\n" + bytes(4 * 2**20 - 5))
    overlay = domain.make_disk("overlay.qcow2", "-f", "qcow2", "-b", str(base), "-F", "raw")
    domain.define()
    with domain.started() as guest:
        guest.check("modprobe virtio_blk")
        domain.attach(disk(overlay, "vda"))
        guest.check("until [ -b /dev/vda ]; do sleep 0.1; done; [ $(head -n 1 /dev/vda) = base ]; echo over >/dev/vda; sync")
    assert base.read_bytes().startswith(b"base\n")
    assert qemu_io(overlay).startswith("00000000:  6f 76 65 72 0a")


def test_an_internal_snapshot_is_taken_and_reverted_to(domain: Domain) -> None:
    domain.define(disk(domain.make_disk("a.qcow2", "-f", "qcow2", size="64M"), "vda"))
    with domain.started() as guest:
        guest.check("modprobe virtio_blk; echo before >/dev/vda; sync; echo before >/tmp/state")
        domain.virsh("snapshot-create-as", "s1")
        assert "s1" in domain.virsh("snapshot-list")
        guest.check("echo after >/dev/vda; sync; echo after >/tmp/state")
        domain.virsh("snapshot-revert", "s1", "--paused")  # another QEMU: a guest that runs would see that nobody is connected
        with domain.talking() as again, domain.destroyed_at_the_end():
            domain.virsh("resume")
            seen = again.check("cat /tmp/state; echo 3 >/proc/sys/vm/drop_caches; head -n 1 /dev/vda")
            assert seen == "before\nbefore\n"
            domain.virsh("snapshot-delete", "s1")
            assert domain.virsh("snapshot-list") == ""


def test_a_saved_domain_is_restored(domain: Domain) -> None:
    domain.define()
    state = domain.home / "state"
    with domain.started() as guest:
        guest.check("echo kept >/tmp/kept")
        domain.virsh("suspend")
        domain.virsh("save", str(state), "--paused")
        assert domain.state == "shut off (saved)"
    domain.libvirt.virsh("restore", str(state), "--paused")
    with domain.talking() as guest, domain.destroyed_at_the_end():
        assert is_confined(domain)
        domain.virsh("resume")
        assert guest.check("cat /tmp/kept") == "kept\n"


def test_a_medium_is_changed(domain: Domain) -> None:
    images = [domain.make_disk(name, "-f", "raw", size="1M") for name in ("a.iso", "b.iso")]
    for path in images:
        path.write_bytes(path.name.encode() + b"\n" + bytes(2**20 - 6))
    device = "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='sda' bus='sata'/><readonly/></disk>"
    domain.define(device)
    with domain.started() as guest:
        guest.check("modprobe -a ahci sr_mod; until [ -b /dev/sr0 ]; do sleep 0.1; done")
        for path in images:
            domain.virsh("change-media", "sda", str(path), "--live", "--update")
            guest.check(f'until [ "$(head -n 1 /dev/sr0)" = {path.name} ]; do sleep 0.1; done')
            assert str(path) in domain.virsh("domblklist")
        domain.virsh("change-media", "sda", "--eject", "--live", "--force")
        assert str(domain.home) not in domain.virsh("domblklist")


def test_a_network_card_is_plugged(domain: Domain) -> None:
    domain.define()
    device = "<interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>"
    with domain.started() as guest:
        guest.check("modprobe virtio_net")
        domain.attach(device)
        guest.check("until grep -q 52:54:00:12:34:56 /sys/class/net/eth*/address; do sleep 0.1; done 2>/dev/null")
        domain.detach(device)
        guest.check("while grep -q 52:54:00:12:34:56 /sys/class/net/eth*/address; do sleep 0.1; done 2>/dev/null")


def test_a_new_daemon_finds_the_running_domain(idle_libvirt: Libvirt, emulator: str) -> None:
    domain = Domain(idle_libvirt, f"vm-{len(list(idle_libvirt.folder.glob('vm-*')))}", emulator)
    with idle_libvirt.serving():
        domain.define()
        domain.virsh("start")
        pid = domain.pid
    with domain.talking() as guest:
        guest.wait_ready()
        with idle_libvirt.serving(), domain.destroyed_at_the_end():
            assert domain.state == "running (booted)"
            assert domain.pid == pid
            guest.check("modprobe virtio_blk")
            domain.attach(disk(domain.make_disk("a.qcow2", "-f", "qcow2"), "vda"))
            guest.check("until [ -b /dev/vda ]; do sleep 0.1; done; echo new >/dev/vda; sync")
            domain.virsh("destroy")
            domain.virsh("undefine")


def test_qemus_monitor_is_asked_through_libvirt(domain: Domain) -> None:
    domain.define()
    domain.virsh("start", "--paused")
    with domain.destroyed_at_the_end():
        assert '"status":"prelaunch"' in domain.virsh("qemu-monitor-command", '{"execute": "query-status"}')
        assert "VM status: paused" in domain.virsh("qemu-monitor-command", "--hmp", "info status")
        path = domain.home / "dump"
        domain.virsh("dump", str(path), "--memory-only", "--live")
        assert path.stat().st_size > 256 * 2**20


def is_confined(domain: Domain) -> bool:
    """Tell whether a domain's QEMU is in a user namespace of its own, if it has to be."""
    if domain.emulator == REAL:
        return map_of(domain.pid, "uid") == map_of(os.getpid(), "uid")
    return (0, os.getuid(), 1) in map_of(domain.pid, "uid")


def pid_of_vcpu(domain: Domain) -> int:
    reply = domain.virsh("qemu-monitor-command", '{"execute": "query-cpus-fast"}')
    return int(re.findall(r'"thread-id":(\d+)', reply)[0])


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True, cwd="/").stdout


def qemu_io(path: Path) -> str:
    command = ["qemu-io", "-f", "qcow2", "-c", "read -v 0 16", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout
