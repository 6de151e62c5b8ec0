"""The test guest under plain QEMU: what the other tests compare with. It is the same whoever starts it: root does so once."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from integration.vm import run_guest, running_guest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

QEMU = ["qemu-system-x86_64"]


def share_options(path: Path, tag: str, model: str) -> list[str]:
    device = f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"
    return ["-fsdev", f"local,id={tag},path={path},security_model={model}", "-device", device]


@pytest.mark.ordinary
def test_script_output_and_status_come_back(shared_tmp: Path) -> None:
    result = run_guest(QEMU, "uname -r; echo to stderr >&2; exit 7", tmp=shared_tmp)
    assert result.status == 7, result
    assert result.output.splitlines()[0].endswith("-amd64")
    assert result.output.splitlines()[1] == "to stderr"
    assert "Linux version" in result.console
    assert (result.qemu_status, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.ordinary
def test_script_from_a_share(shared_tmp: Path) -> None:
    share = shared_tmp / "share"
    share.mkdir()
    (share / "script").write_text("echo from the share; exit 3\n")
    extra = [*share_options(share, "scripts", "none"), "-append", "console=ttyS0 panic=-1 script=9p:scripts"]
    result = run_guest(QEMU, "exit 99", tmp=shared_tmp, extra=extra)
    assert (result.status, result.output) == (3, "from the share\n")


@pytest.mark.ordinary
def test_panic_ends_the_run(shared_tmp: Path) -> None:
    result = run_guest(QEMU, "echo c >/proc/sysrq-trigger; sleep 60", tmp=shared_tmp)
    assert result.status is None
    assert "Kernel panic" in result.console


@pytest.mark.ordinary
@pytest.mark.xattr
def test_mapped_xattr_share(shared_tmp: Path) -> None:
    share = shared_tmp / "share"
    share.mkdir()
    (share / "hello").write_text("hello from the host\n")
    script = """set -e
        mount -t 9p -o trans=virtio,version=9p2000.L share /mnt
        cat /mnt/hello
        echo 'hello from the guest' >/mnt/made
        chown 1000:1001 /mnt/made
        chmod 4711 /mnt/made
        mknod /mnt/device c 1 3
        stat -c '%u %g %a' /mnt/made
    """
    result = run_guest(QEMU, script, tmp=shared_tmp, extra=share_options(share, "share", "mapped-xattr"))
    assert (result.status, result.output) == (0, "hello from the host\n1000 1001 4711\n")
    made = share / "made"
    assert made.read_text() == "hello from the guest\n"
    assert (made.stat().st_uid, made.stat().st_mode & 0o7777) == (os.geteuid(), 0o600)
    assert int.from_bytes(os.getxattr(made, "user.virtfs.uid"), "little") == 1000
    assert (share / "device").is_file()


@pytest.mark.ordinary
def test_running_guest_answers_and_powers_off(shared_tmp: Path) -> None:
    with running_guest(QEMU, tmp=shared_tmp) as guest:
        assert guest.run("echo one; echo two >&2; exit 5") == (5, "one\ntwo\n")
        assert guest.check("cat /tmp/none || echo 'still there: \u00e9'").endswith("still there: \u00e9\n")
        assert len(guest.check("seq 1 20000").splitlines()) == 20000
        assert b"qemu-system" in (guest.proc / "cmdline").read_bytes()
        result = guest.power_off()
    assert (result.qemu_status, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.ordinary
def test_killed_guest_is_an_error_at_the_next_command(shared_tmp: Path) -> None:
    with running_guest(QEMU, tmp=shared_tmp) as guest:
        guest.process.kill()
        with pytest.raises(ConnectionError):
            guest.run("true")
        assert guest.power_off().qemu_status == -signal.SIGKILL


@pytest.mark.root
def test_as_another_user(shared_tmp: Path, unprivileged_user: str) -> None:
    with running_guest(QEMU, tmp=shared_tmp, user=unprivileged_user) as guest:
        status = (guest.proc / "status").read_text()
        assert "\nUid:\t0\t" not in status
        assert guest.proc.owner() == unprivileged_user
        assert guest.check("id -u") == "0\n"
