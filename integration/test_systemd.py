"""A VM as a service: systemctl starts, asks and stops it. systemd is the real one, process 1 of a pid namespace."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.libvirt import DomainGuest
from integration.systemd import booted
from integration.talk import connected, map_of, qmp_over, status_of, wait_until
from integration.vm import machine_options, port_options
from qemu_userns.hooks.systemd import ENVIRONMENT_DIR, UNIT, build_units
from tests.conftest import CHECKOUT, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.systemd import Systemd

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.systemd, pytest.mark.root, pytest.mark.slow]

VM = "qemu-userns@vm.service"
IDLE = "-nodefaults -display none -M q35 -S"
SHARE_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4
"""CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID: over the ids of the map."""
# Of systemd.exec(5): what a VM starts with besides the unit's own, and what keeps it from starting.
HIDES = {"ProtectHome=yes": ("/home/", "/root/"), "PrivateTmp=yes": ("/tmp/", "/var/tmp/")}
"""What cannot be tried where the program itself is there."""
ALL_MORE = (*HIDES, "PrivateDevices=yes", "PrivateNetwork=yes")
MORE = tuple(option for option in ALL_MORE if not str(CHECKOUT).startswith(HIDES.get(option, ())))
TOO_MUCH = (
    *("RestrictNamespaces=yes", "PrivateUsers=yes", "RestrictSUIDSGID=yes", "ProtectKernelTunables=yes"),
    "MemoryDenyWriteExecute=yes",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose socket names stay short."""
    path = Path(tempfile.mkdtemp(prefix="systemd-")).resolve()
    path.chmod(0o755)
    yield path
    remove_tree(path)


def service(folder: Path, **environment: str) -> dict[str, str]:
    """Return the units, with the environment file of one VM."""
    file = folder / "vm.env"
    file.write_text("".join(f"{name}='{value}'\n" for name, value in environment.items()))
    units = build_units(str(CHECKOUT / ".venv/bin/qemu-userns"))
    return {name: text.replace(f"{ENVIRONMENT_DIR}/%i.env", str(file)) for name, text in units.items()}


def wait_state(systemd: Systemd, **wanted: str) -> None:
    """Wait until properties of the VM's unit are as they have to be."""
    wait_until(lambda: systemd.show(VM, *wanted) == wanted, f"{wanted}", 60)


def assert_nothing_left(systemd: Systemd) -> None:
    assert systemd.run("find", "/run/qemu-userns", "-not", "-type", "d", "-not", "-path", "*/leases/*") == ""


def test_a_guest_boots_as_a_service_and_powers_off_when_it_is_stopped(folder: Path) -> None:
    """With a share and a tap, which its hardening leaves possible."""
    home, share = folder / "home", folder / "share"
    home.mkdir()
    share.mkdir()
    os.chown(share, 1000, 1000)
    words = [
        *machine_options(home, "tcg", 256, "qemu_userns_serve"),
        *port_options("command", f"socket,path={home}/command,server=on,wait=off"),
        *("-qmp", f"unix:{home}/qmp,server=on,wait=off"),
        *("-userns", f"share={share},tag=t,driver=9p,map=both 1000 0"),
        *("-netdev", "tap,id=n,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:77"),
    ]
    args = " ".join(f'"{word}"' if " " in word else word for word in words)
    with booted(folder, service(folder, QEMU_ARGS=args)) as systemd:
        systemd.systemctl("start", VM)
        wait_state(systemd, ActiveState="active", SubState="running", StatusText="running", Slice="qemu-userns.slice")
        pid = systemd.outer_pid(int(systemd.show(VM, "MainPID")["MainPID"]))
        assert Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system")
        assert all(outside >= 524288 for _, outside, _ in map_of(pid, "uid"))
        assert int(status_of(pid)["CapBnd"], 16) == SHARE_CAPABILITIES
        group = systemd.run("sh", "-c", f"cat /proc/$(systemctl show -P MainPID {VM})/cgroup")
        assert group.endswith(f"/qemu-userns.slice/{VM}\n")
        with connected(home / "command") as channel:
            guest = DomainGuest(channel, home)
            guest.wait_ready()
            guest.check("modprobe -a 9pnet_virtio 9p && mount -t 9p -o trans=virtio,version=9p2000.L t /mnt && touch /mnt/made")
            assert (share / "made").stat().st_uid == 1000
            guest.check("modprobe virtio_net && grep -l 52:54:00:00:00:77 /sys/class/net/*/address")
            with connected(home / "qmp") as connection, qmp_over(connection) as qmp:
                qmp.execute("stop")
                wait_state(systemd, StatusText="paused")
                qmp.execute("cont")
                wait_state(systemd, StatusText="running")
                systemd.systemctl("stop", "--no-block", VM)
                while qmp.read().get("event") != "POWERDOWN":
                    pass
                wait_state(systemd, ActiveState="deactivating")
                guest.run_and_leave("poweroff -f")
        wait_state(systemd, ActiveState="inactive", Result="success")
        assert_nothing_left(systemd)


def test_a_guest_that_does_not_power_off_is_terminated(folder: Path) -> None:
    with booted(folder, service(folder, QEMU_ARGS=IDLE, STOP_SECONDS="0.1")) as systemd:
        for _ in range(2):
            systemd.systemctl("start", VM)
            assert systemd.show(VM, "ActiveState", "StatusText") == {"ActiveState": "active", "StatusText": "prelaunch"}
            systemd.systemctl("stop", VM)
            assert systemd.show(VM, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
            assert_nothing_left(systemd)
        systemd.systemctl("start", VM)
        systemd.systemctl("kill", "--signal=KILL", "--kill-whom=main", VM)
        wait_state(systemd, ActiveState="active", NRestarts="1")  # on failure


def test_a_vm_that_cannot_start_says_why(folder: Path) -> None:
    units = service(folder, QEMU_ARGS="-kernel /no/such/kernel")
    units[UNIT] = units[UNIT].replace("Restart=on-failure", "Restart=no\nStandardError=file:" + str(folder / "stderr"))
    with booted(folder, units) as systemd:
        systemd.run("systemctl", "start", VM, check=False)
        assert systemd.show(VM, "ActiveState", "Result") == {"ActiveState": "failed", "Result": "exit-code"}
        assert (folder / "stderr").read_text().startswith("qemu-userns: -kernel /no/such/kernel: No such file or directory\n")


def test_a_vm_without_a_file_of_variables_does_not_start_silently(folder: Path) -> None:
    units = service(folder, QEMU_ARGS=IDLE)
    (folder / "vm.env").unlink()
    with booted(folder, units) as systemd:
        assert "Assertion failed" in systemd.run("sh", "-c", f"! systemctl start {VM} 2>&1")


def test_the_slice_has_limits(folder: Path) -> None:
    with booted(folder, service(folder, QEMU_ARGS=IDLE)) as systemd:
        found = systemd.show("qemu-userns.slice", "TasksMax", "MemoryMax", "CPUWeight", "IOWeight")
    assert 0 < int(found.pop("MemoryMax")) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found == {"TasksMax": "16384", "CPUWeight": "50", "IOWeight": "50"}


def test_which_hardening_a_vm_starts_with(folder: Path) -> None:
    units = service(folder, QEMU_ARGS=IDLE)
    text = units[UNIT].replace("Restart=on-failure", "Restart=no").replace("%i", "vm")
    options = dict(enumerate((*MORE, *TOO_MUCH)))
    units |= {f"vm{number}.service": text.replace("[Install]", f"{option}\n[Install]") for number, option in options.items()}
    started = []
    with booted(folder, units) as systemd:
        for number, option in options.items():
            systemd.run("systemctl", "start", f"vm{number}", check=False)
            if systemd.show(f"vm{number}", "ActiveState") == {"ActiveState": "active"}:
                started.append(option)
                systemd.systemctl("kill", f"vm{number}")
        assert systemd.run("systemd-analyze", "verify", "--man=no", "/run/systemd/system/vm0.service") == ""
    assert started == list(MORE)
