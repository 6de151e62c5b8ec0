"""qemu-userns hook: a made-up system in a folder, real files, the real dpkg-divert."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from qemu_userns.cli.hook import hook
from qemu_userns.errors import ResourceError, UsageError
from qemu_userns.hooks.install import find_import_path
from qemu_userns.host.qemu import find_qemu, is_own_entry
from tests.systems import directory_of, files, tree

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["lxd", "incus"])
@pytest.mark.parametrize("more", [(), ("--divert",)], ids=["", "divert"])
def test_what_is_applied_is_there_and_is_undone(system: Path, name: str, more: tuple[str, ...]) -> None:
    before, files_before = tree(system), files(system)
    words = [name, "--root", str(system), *more]
    assert hook([*words, "--check"]) == 1
    assert tree(system) == before
    assert hook([*words, "--apply"]) == 0
    after = tree(system)
    assert is_own_entry(f"{system}{directory_of(name)}/qemu-system-x86_64")
    assert f'PATH="{directory_of(name)}:/usr/bin:/bin"\n' in (system / f"etc/qemu-userns/{name}.env").read_text()
    unit = (system / f"etc/systemd/system/{name}.service.d/qemu-userns.conf").read_text()
    assert f"[Service]\nEnvironmentFile=/etc/qemu-userns/{name}.env\n" in unit
    assert f'"{directory_of(name)}/qemu-system-*" ix,' in (system / f"etc/qemu-userns/{name}.apparmor").read_text()
    assert str(system) not in unit + (system / directory_of(name)[1:] / "qemu-system-x86_64").read_text()
    assert hook([*words, "--check"]) == 0
    assert hook([*words, "--apply"]) == 0
    assert tree(system) == after
    assert hook([*words, "--remove"]) == 0
    assert files(system) == files_before
    assert hook([*words, "--remove"]) == 0


def test_a_diverted_qemu_is_found_behind_its_entry(system: Path) -> None:
    hook(["lxd", "--root", str(system), "--divert", "--apply"])
    path = system / "usr/bin/qemu-system-x86_64"
    assert os.readlink(path) == f"{directory_of('lxd')}/qemu-system-x86_64"
    path.unlink()
    path.symlink_to(f"{system}{directory_of('lxd')}/qemu-system-x86_64")
    assert find_qemu("qemu-system-x86_64", f"{system}{directory_of('lxd')}:{system}/usr/bin") == f"{path}.distrib"


@pytest.mark.qemu
@pytest.mark.newuidmap
def test_the_tree_of_a_snap_has_a_drop_in_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In LXD's snap it is at another place; here the entry gets this one."""
    tree = tmp_path / "snap"
    assert hook(["lxd", "--snap", str(tree)]) == 0
    assert "snap connect lxd:qemu-external qemu-for-lxd:qemu-external" in capsys.readouterr().out
    assert "content: qemu-external-binaries" in (tree / "meta/snap.yaml").read_text()
    entry = tree / "bin/qemu-system-x86_64"
    assert "/snap/lxd/current/external/qemu/lib/python" in entry.read_text()
    compiled = find_import_path()[1:]  # the package unshare, which Python 3.12 does not need
    there = "['/snap/lxd/current/external/qemu/lib/python']"
    assert os.readlink(tree / "bin/python3") == "/usr/bin/python3"  # of LXD's base
    text = entry.read_text().replace(there, repr([f"{tree}/lib/python", *compiled]))
    entry.write_text(text.replace("#!/snap/lxd/current/external/qemu/", f"#!{tree}/"))
    real = find_qemu("qemu-system-x86_64", os.environ["PATH"])
    (tree / "bin/qemu-system-x86_64.distrib").symlink_to(real)
    tools = tmp_path / "tools"  # a PATH without any QEMU
    tools.mkdir()
    for name in ("newuidmap", "newgidmap"):
        (tools / name).symlink_to(shutil.which(name) or "/nowhere")
    done = subprocess.run([entry, "-version"], capture_output=True, text=True, env={"HOME": "/tmp", "PATH": str(tools)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == subprocess.run([real, "-version"], capture_output=True, text=True).stdout
    with pytest.raises(ResourceError, match="is not empty"):
        hook(["lxd", "--snap", str(tree)])


def test_looking_says_what_is_there_and_changes_nothing(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(system)
    assert hook(["lxd", "--root", str(system)]) == 0
    said = capsys.readouterr().out
    assert "lxd: Debian package 5.0.2-5\nunit: /usr/lib/systemd/system/lxd.service\n" in said
    assert "QEMU: qemu-system-x86_64; Debian package none\n" in said
    assert f"to do  put an entry for each QEMU into {directory_of('lxd')}" in said
    assert tree(system) == before


def test_a_file_of_somebody_elses_stops_it_and_nothing_is_left(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = system / "etc/systemd/system/lxd.service.d/qemu-userns.conf"
    other.parent.mkdir(parents=True)
    other.write_text("[Service]\n")
    before = files(system)
    assert hook(["lxd", "--root", str(system), "--apply"]) == 1
    assert "is there, and not as a hook has written it\nhint: " in capsys.readouterr().err
    assert files(system) == before


def test_what_was_changed_since_stays(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lxd", "--root", str(system)]
    hook([*words, "--apply"])
    changed = system / "etc/qemu-userns/lxd.env"
    changed.write_text(changed.read_text() + "MORE=1\n")
    assert hook([*words, "--check"]) == 1
    assert "lxd.env: is not as this version writes it\nhint: " in capsys.readouterr().err
    assert hook([*words, "--apply"]) == 1
    assert hook([*words, "--remove"]) == 1
    assert "has been changed since a hook wrote it" in capsys.readouterr().err
    assert "MORE=1" in changed.read_text()
    assert not (system / "etc/systemd/system/lxd.service.d").exists()


def test_a_full_disk_leaves_nothing(system: Path) -> None:
    before = files(system)
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qemu_userns.cli.main import main; main()"
    for limit in (0, 100, 10_000, 300_000):
        done = subprocess.run(
            [sys.executable, "-c", script, os.getcwd(), "hook", "lxd", "--root", str(system), "--apply"],
            capture_output=True,
            text=True,
            preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert (done.returncode, done.stderr.count("File too large")) == (1, 1), done
        assert files(system) == before


def test_a_system_without_qemu(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (system / "usr/bin/qemu-system-x86_64").unlink()
    assert hook(["lxd", "--root", str(system), "--apply"]) == 1
    assert capsys.readouterr().err.startswith("qemu-userns: qemu-system-*: there is none\nhint: install ")
    assert not (system / directory_of("lxd")[1:]).exists()


@pytest.mark.parametrize(
    "words",
    [
        *("", "lxc", "lxd incus", "lxd --apply --remove", "lxd --dir", "lxd --now"),
        *("libvirt --divert", "systemd --divert", "systemd --dir /x"),
    ],
)
def test_words_that_make_no_sense(words: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        hook(words.split())


# --- libvirt and systemd ------------------------------------------------------------------------------------------------

QEMU_CONF = '# the master configuration file\n#namespaces = [ "mount" ]\n#user = "libvirt-qemu"\n'


@pytest.fixture
def libvirts(system: Path) -> Path:
    """Add libvirt and AppArmor to the system, with the empty file for additions that libvirt's package makes."""
    texts = {"libvirt/qemu.conf": QEMU_CONF, "apparmor.d/local/abstractions/libvirt-qemu": "", "apparmor.d/usr.sbin.libvirtd": ""}
    for name, text in texts.items():
        path = system / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return system


@pytest.mark.parametrize("conf", [QEMU_CONF, "", None])
def test_libvirts_files_get_our_lines_and_are_as_before_without_them(libvirts: Path, conf: str | None) -> None:
    path = libvirts / "etc/libvirt/qemu.conf"
    path.unlink()
    if conf is not None:
        path.write_text(conf)
    before = files(libvirts)
    words = ["libvirt", "--root", str(libvirts)]
    assert hook([*words, "--check"]) == 1
    assert hook([*words, "--apply"]) == 0
    after = tree(libvirts)
    text = path.read_text()
    assert text.startswith(conf or "# qemu-userns hook ")
    assert text.endswith("\nnamespaces = []\n")
    profile = (libvirts / "etc/apparmor.d/local/abstractions/libvirt-qemu").read_text()
    assert f'"{directory_of("libvirt")}/qemu-system-*" ix,' in profile
    assert "/usr/bin/new{u,g}idmap PUx," in profile
    of_daemon = (libvirts / "etc/apparmor.d/local/usr.sbin.libvirtd").read_text().splitlines()
    assert of_daemon[-1] == f'"{directory_of("libvirt")}/qemu-system-*" PUx,'
    assert not (libvirts / "etc/apparmor.d/local/usr.sbin.virtqemud").exists()
    assert "pivot_root,\n" in profile
    assert is_own_entry(f"{libvirts}{directory_of('libvirt')}/qemu-system-x86_64")
    assert hook([*words, "--check"]) == 0
    assert hook([*words, "--apply"]) == 0
    assert tree(libvirts) == after
    assert hook([*words, "--remove"]) == 0
    assert files(libvirts) == before
    assert hook([*words, "--remove"]) == 0


def test_lines_of_ours_that_were_changed_stay(libvirts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["libvirt", "--root", str(libvirts)]
    hook([*words, "--apply"])
    path = libvirts / "etc/libvirt/qemu.conf"
    path.write_text(path.read_text() + 'user = "root"\n')
    assert hook([*words, "--remove"]) == 1
    assert "has lines of a hook's that have been changed since" in capsys.readouterr().err
    assert path.read_text().endswith('namespaces = []\nuser = "root"\n')


def test_a_setting_of_libvirts_that_stands_in_the_way_is_named(libvirts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = libvirts / "etc/libvirt/qemu.conf"
    path.write_text('user = "vms"\nnamespaces = [ "mount" ]\n')
    assert hook(["libvirt", "--root", str(libvirts), "--check"]) == 1
    assert 'has namespaces = [ "mount" ]' in capsys.readouterr().err
    assert hook(["libvirt", "--root", str(libvirts)]) == 0
    said = capsys.readouterr().out
    assert "QEMU runs as: vms\n" in said
    assert f"then: virsh edit DOMAIN    # <emulator>{directory_of('libvirt')}/qemu-system-x86_64</emulator>\n" in said
    assert "then: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 vms " in said
    (libvirts / "etc/subuid").write_text("vms:100000:65536\n")
    hook(["libvirt", "--root", str(libvirts)])
    assert "usermod" not in capsys.readouterr().out


def test_a_file_whose_last_line_does_not_end_is_left_alone(libvirts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = libvirts / "etc/libvirt/qemu.conf"
    path.write_text("# no end")
    before = files(libvirts)
    assert hook(["libvirt", "--root", str(libvirts), "--apply"]) == 1
    assert "its last line does not end" in capsys.readouterr().err
    assert files(libvirts) == before


def test_systemds_units_are_written_and_removed(system: Path) -> None:
    before = files(system)
    words = ["systemd", "--root", str(system)]
    assert hook([*words, "--check"]) == 1
    assert hook([*words, "--apply"]) == 0
    unit = (system / "etc/systemd/system/qemu-userns@.service").read_text()
    assert "\nType=notify\n" in unit
    assert "\nEnvironmentFile=/etc/qemu-userns/vms/%i.env\n" in unit
    assert (system / "etc/systemd/system/qemu-userns.slice").exists()
    assert hook([*words, "--check"]) == 0
    assert hook([*words, "--remove"]) == 0
    assert files(system) == before
