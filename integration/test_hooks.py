"""Hooks applied below a running systemd: what they write is what it reads, and what the daemons get from it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.systemd import booted
from tests.conftest import CHECKOUT, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from integration.systemd import Systemd

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.systemd, pytest.mark.root, pytest.mark.slow]

PROGRAM = str(CHECKOUT / ".venv/bin/qemu-userns")
# Debian's unit in what counts here: /etc/environment may say what PATH is.
DAEMON = "[Service]\nType=exec\nEnvironmentFile=-/etc/environment\nExecStart=/run/{name} -- infinity\nKillMode=process\n"
DAEMONS = {"lxd": "lxd", "incus": "incusd"}
"""What they call their process."""
VM = "qemu-userns@vm"
# Where the checkout is and whose is the tester's affair.
OWNERS = "root's VMs are started by what is in it"
# The hooks write to these, and the host keeps its own.
_OWN_FILES = """\
set -e
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc
mount -t tmpfs -o mode=755 tmpfs /etc/systemd/system
mount -t tmpfs -o mode=755 tmpfs /usr/local/lib
"""


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    folder = Path(tempfile.mkdtemp(prefix="systemd-")).resolve()
    folder.chmod(0o755)
    with booted(folder, {}) as systemd:
        systemd.run("sh", "-c", _OWN_FILES)
        yield systemd
    remove_tree(folder)


def find_faults(systemd: Systemd, name: str) -> list[str]:
    """Return what --check says."""
    said = systemd.run("sh", "-c", f"{PROGRAM} hook {name} --check 2>&1 || [ $? = 1 ]").splitlines()
    return [line.removeprefix("qemu-userns: ") for line in said if line.startswith("qemu-userns: ") and OWNERS not in line]


def read_environment(systemd: Systemd, unit: str) -> dict[str, str]:
    """Return the variables of a service's process."""
    pid = systemd.show(unit, "MainPID")["MainPID"]
    return dict(item.split("=", 1) for item in systemd.run("cat", f"/proc/{pid}/environ").split("\0") if item)


def list_made(systemd: Systemd) -> str:
    places = ("/etc/systemd/system", "/etc/qemu-userns", "/usr/local/lib", "/run/upper")
    return systemd.run("sh", "-c", f"find {' '.join(places)} ! -type d 2>/dev/null | sort")


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_finds_the_drop_in_once_it_is_restarted(systemd: Systemd, name: str) -> None:
    unit, process = f"{name}.service", DAEMONS[name]
    systemd.run("cp", shutil.which("sleep") or "/bin/sleep", f"/run/{process}")
    systemd.run("sh", "-c", f"printf '%s' '{DAEMON.format(name=process)}' >/etc/systemd/system/{unit}")
    systemd.systemctl("daemon-reload")
    systemd.systemctl("start", unit)
    plain, files = read_environment(systemd, unit), list_made(systemd)
    directory = f"/usr/local/lib/qemu-userns/{name}"

    missing = " ".join(find_faults(systemd, name))
    assert f"{directory}: has no entry qemu-system-" in missing
    assert f"/etc/systemd/system/{unit}.d/qemu-userns.conf: is not there" in missing
    systemd.run(PROGRAM, "hook", name, "--apply")
    not_yet = [fault for fault in find_faults(systemd, name) if "PATH" in fault]
    assert len(not_yet) == 1, not_yet
    assert f"{directory} is not first in its PATH" in not_yet[0]
    assert read_environment(systemd, unit) == plain
    systemd.systemctl("restart", unit)
    assert find_faults(systemd, name) == []

    found = read_environment(systemd, unit)
    assert found["PATH"].split(":")[0] == directory
    assert found["QEMU_USERNS"].startswith("user=")
    which = f"PATH='{found['PATH']}'; command -v qemu-system-x86_64; qemu-system-x86_64 -version"
    said = systemd.run("sh", "-c", which).splitlines()
    assert said == [f"{directory}/qemu-system-x86_64", *systemd.run("/usr/bin/qemu-system-x86_64", "-version").splitlines()]

    systemd.run(PROGRAM, "hook", name, "--remove")
    systemd.systemctl("restart", unit)
    after = read_environment(systemd, unit)
    varying = ("INVOCATION_ID", "SYSTEMD_EXEC_PID")
    assert after | dict.fromkeys(varying) == plain | dict.fromkeys(varying)
    assert list_made(systemd) == files


def test_a_vm_is_started_and_stopped_by_its_name(systemd: Systemd) -> None:
    files = list_made(systemd)
    assert find_faults(systemd, "systemd") != []
    systemd.run(PROGRAM, "hook", "systemd", "--apply")
    assert find_faults(systemd, "systemd") == []
    systemd.run("mkdir", "-p", "/etc/qemu-userns/vms")
    variables = "QEMU_ARGS='-nodefaults -display none -S'\nSTOP_SECONDS=0.1\n"
    systemd.run("sh", "-c", f'printf %s "{variables}" >/etc/qemu-userns/vms/vm.env')
    systemd.systemctl("start", VM)
    assert systemd.show(VM, "ActiveState", "StatusText") == {"ActiveState": "active", "StatusText": "prelaunch"}
    systemd.run(PROGRAM, "hook", "systemd", "--remove")
    assert systemd.show(VM, "ActiveState") == {"ActiveState": "active"}
    systemd.systemctl("stop", VM)
    assert systemd.show(VM, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    systemd.run("rm", "-r", "/etc/qemu-userns/vms")
    assert list_made(systemd) == files
