"""Attacks by another local user, or by the guest of the last run, on a launch by root or by the same caller."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from integration.talk import outcome, running

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]
SOMEBODY = 65534


@pytest.mark.root
@pytest.mark.parametrize(
    "words",
    [
        "-serial file:{link}",
        "-pidfile {link}",
        "-D {link}",
        "-drive file={link},format=raw,if=none",
        "-hda {link}",
        "-kernel {link}",
        "-object secret,id=s,file={link}",
        "-chardev socket,id=c,path={link}",
        "-chardev file,id=c,path={link},append=on",
        "-fsdev local,id=f,path={link},security_model=none",
    ],
)
def test_root_follows_no_planted_symlink(dropin: list[str], shared_tmp: Path, words: str) -> None:
    """Firecracker CVE-2026-1386 and KubeVirt CVE-2025-64433, for everything that a command line can name."""
    secret = shared_tmp / "secret"
    kept = None
    if "socket" in words:
        kept = socket.socket(socket.AF_UNIX)
        kept.bind(str(secret))
    elif "fsdev" in words:
        secret.mkdir(mode=0o700)
    else:
        secret.write_text("root's own")
        secret.chmod(0o600)
    before = secret.stat()
    link = shared_tmp / "link"
    link.symlink_to(secret)
    os.lchown(link, SOMEBODY, SOMEBODY)
    status, stdout, stderr = outcome(dropin, "-nodefaults", "-display", "none", "-S", *words.format(link=link).split())
    assert (status, stdout) == (1, "")
    assert f"{link} is a symlink of uid {SOMEBODY}, which root does not follow" in stderr
    after = secret.stat()
    assert (after.st_ino, after.st_uid, after.st_mode, after.st_mtime_ns) == (
        before.st_ino,
        before.st_uid,
        before.st_mode,
        before.st_mtime_ns,
    )
    if kept is not None:
        kept.close()


def test_what_a_header_names_elsewhere_is_never_writable(dropin: list[str], shared_tmp: Path) -> None:
    """A guest writes any name into the header of its own disk; the next launch shows that file at most read-only."""
    shared_tmp.chmod(0o777)
    vm, home = shared_tmp / "vm", shared_tmp / "home"
    vm.mkdir()
    home.mkdir()
    victim, beside = home / "bashrc", vm / "base.raw"
    for path in (victim, beside):
        path.write_bytes(bytes(1 << 20))
    for name, backing in (("evil", victim), ("good", beside)):
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "raw", str(vm / f"{name}.qcow2"), "1M"]
        subprocess.run(create, check=True)
        if os.geteuid() == 0:
            for path in (vm / f"{name}.qcow2", backing):
                path.chmod(0o666)
    drives = [word for name in ("evil", "good") for word in ("-drive", f"file={vm}/{name}.qcow2,format=qcow2,if=none,id={name}")]
    with running(dropin, *drives) as qemu:
        options = {
            fields[4]: fields[5].split(",")[0]
            for fields in (line.split() for line in (qemu.proc / "mountinfo").read_text().splitlines())
        }
    assert options[str(victim)] == "ro"
    assert options[str(beside)] == "rw"


@pytest.mark.root
def test_a_header_leads_root_through_no_closed_directory(dropin: list[str], shared_tmp: Path) -> None:
    closed = shared_tmp / "closed"
    closed.mkdir(mode=0o700)
    notes = closed / "notes"
    notes.write_bytes(bytes(1 << 20))
    notes.chmod(0o644)
    image = shared_tmp / "x.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(notes), "-F", "raw", str(image), "1M"], check=True)
    image.chmod(0o666)
    status, _, stderr = outcome(dropin, "-nodefaults", "-display", "none", "-S", "-drive", f"file={image},format=qcow2,if=none")
    assert status == 1
    assert f"Could not open '{notes}': No such file or directory" in stderr
