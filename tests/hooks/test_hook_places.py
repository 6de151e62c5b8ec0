"""Where hooks write: a directory for each, and nowhere that somebody else than root decides."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qemu_userns.errors import ResourceError, UsageError
from qemu_userns.hooks.files import NEW
from qemu_userns.host.qemu import is_own_entry
from tests.systems import QEMU, directory_of, files, run_hook, write

if TYPE_CHECKING:
    from pathlib import Path

OTHER = 1234
USR_LOCAL = ("usr/local", "usr/local/lib", "usr/local/lib/qemu-userns", "usr/local/lib/qemu-userns/lxd")


def test_hooks_do_not_share_entries(system: Path) -> None:
    before = files(system)
    names = ("lxd", "incus", "libvirt")
    for name in names:
        assert run_hook(system, name, "--apply") == 0
    for index, name in enumerate(names):
        assert run_hook(system, name, "--remove") == 0
        for other in names[index + 1 :]:
            assert is_own_entry(f"{system}{directory_of(other)}/qemu-system-x86_64")
            assert run_hook(system, other, "--check") == 0
    assert files(system) == before


def test_the_directory_of_another_hook_is_refused(system: Path) -> None:
    run_hook(system, "incus", "--apply", "--dir", "/opt/entries")
    for action in ("--apply", "--remove", "--check"):
        with pytest.raises(ResourceError, match="/opt/entries: has the entries of hook incus"):
            run_hook(system, "lxd", action, "--dir=/opt/entries")
    assert is_own_entry(f"{system}/opt/entries/qemu-system-x86_64")


def test_the_directory_need_be_said_once(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(system)
    run_hook(system, "lxd", "--apply", "--dir", "/opt/entries")
    assert run_hook(system, "lxd", "--check") == 0
    with pytest.raises(ResourceError, match="is not the directory that hook lxd was applied with, /opt/entries"):
        run_hook(system, "lxd", "--apply", "--dir", "/opt/others")
    assert run_hook(system, "lxd", "--remove") == 0
    assert "undone: put an entry for each QEMU into /opt/entries" in capsys.readouterr().out
    assert files(system) == before
    assert not (system / "usr/local").exists() or not any((system / "usr/local").rglob("*.qemu*"))


@pytest.mark.parametrize("directory", ["/a:b", "/a\nb", "/a\x1bb"])
def test_a_directory_that_no_path_can_hold(system: Path, directory: str) -> None:
    with pytest.raises(UsageError, match="cannot stand in a PATH"):
        run_hook(system, "lxd", "--apply", "--dir", directory)


@pytest.mark.parametrize("place", USR_LOCAL)
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777], ids=oct)
def test_where_others_may_write_no_entry_goes(system: Path, place: str, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon is root, and starts what is there: whoever may rename a directory on the way can put another in its place."""
    (system / place).mkdir(parents=True)
    (system / place).chmod(mode)
    before = files(system)
    assert run_hook(system, "lxd", "--apply") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qemu-userns: {system / place}: others may write to it (mode {mode:04o})\nhint: chmod go-w ")
    assert files(system) == before


@pytest.mark.root
@pytest.mark.parametrize("place", USR_LOCAL)
def test_what_somebody_else_has_made_first_is_not_used(system: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    (system / place).mkdir(parents=True)
    os.chown(system / place, OTHER, OTHER)
    assert run_hook(system, "lxd", "--apply") == 1
    assert f"{system / place}: belongs to uid {OTHER}, who could put anything there\n" in capsys.readouterr().err
    assert not list((system / place).rglob("qemu-system-*"))


@pytest.mark.parametrize("place", ["etc/qemu-userns", "usr/local/lib", "etc/systemd", "usr/bin"])
def test_a_symlink_does_not_lead_out_of_the_system(system: Path, tmp_path: Path, place: str) -> None:
    """An image's files are whoever's who made it; absolute symlinks of it are the host's paths here."""
    outside = tmp_path / "outside"
    (system / place).parent.mkdir(parents=True, exist_ok=True)
    if (system / place).exists():
        (system / place).rename(outside)
    else:
        outside.mkdir()
    (system / place).symlink_to(outside)
    before = files(outside)
    assert run_hook(system, "lxd", "--apply", "--divert") == 1
    assert files(outside) == before


def test_a_symlink_in_the_place_of_a_file_is_left_alone(system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = write(tmp_path / "secret", "secret\n")
    conf = system / "etc/libvirt/qemu.conf"
    conf.parent.mkdir(parents=True)
    conf.symlink_to(secret)
    before = files(system)
    assert run_hook(system, "libvirt", "--apply") == 1
    assert f"{conf}: is a symlink, and is left alone" in capsys.readouterr().err
    assert (files(system), secret.read_text()) == (before, "secret\n")


def test_what_lies_at_a_temporary_name_is_replaced_and_not_followed(system: Path, tmp_path: Path) -> None:
    """A leftover of a run that was killed, or what somebody has put there: a FIFO would stop whoever opens it."""
    victim = write(tmp_path / "victim", "text")
    place = system / "etc/qemu-userns"
    place.mkdir()
    os.mkfifo(place / f"lxd.env{NEW}")
    (place / f"lxd.apparmor{NEW}").symlink_to(victim)
    (place / f"lxd.hook{NEW}").hardlink_to(victim)
    assert run_hook(system, "lxd", "--apply") == 0
    assert sorted(path.name for path in place.iterdir()) == ["lxd.apparmor", "lxd.env", "lxd.hook"]
    assert victim.read_text() == "text"


def test_modes_do_not_depend_on_the_umask_and_others_files_keep_theirs(system: Path) -> None:
    """qemu.conf may have passwords in it."""
    conf = write(system / "etc/libvirt/qemu.conf", 'spice_password = "secret"\n')
    conf.chmod(0o600)
    os.umask(0o077)
    assert run_hook(system, "libvirt", "--apply") == 0
    assert conf.stat().st_mode & 0o777 == 0o600
    for path in (
        *USR_LOCAL[:3],
        "etc/qemu-userns",
        directory_of("libvirt")[1:],
        f"{directory_of('libvirt')}/qemu-system-x86_64"[1:],
    ):
        assert (system / path).stat().st_mode & 0o777 == 0o755, path
    assert run_hook(system, "libvirt", "--remove") == 0
    assert conf.stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_changed_to_what_is_no_text_is_left_alone(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_hook(system, "lxd", "--apply")
    changed = system / "etc/qemu-userns/lxd.env"
    changed.write_bytes(b"\xff\n")
    assert run_hook(system, "lxd", "--remove") == 1
    assert "has been changed since a hook wrote it" in capsys.readouterr().err
    assert changed.read_bytes() == b"\xff\n"
    assert (system / QEMU).exists()


@pytest.mark.parametrize(
    ("accounts", "user"), [("root:x:0:\nlxd:x:999:\n", "lxd"), ("root:x:0:\n_lxd:x:999:\n", "nobody"), ("", "nobody")]
)
def test_a_start_from_a_saved_state_gets_the_user_that_lxd_names_otherwise(system: Path, accounts: str, user: str) -> None:
    write(system / "etc/passwd", accounts)
    assert run_hook(system, "lxd", "--apply") == 0
    assert (system / "etc/qemu-userns/lxd.env").read_text().splitlines()[-1] == f"QEMU_USERNS=user={user}"
