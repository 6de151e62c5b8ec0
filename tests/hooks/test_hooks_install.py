"""Drop-in entries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_userns.errors import HostError, ResourceError
from qemu_userns.hooks.bundle import PREFIX, find_name
from qemu_userns.hooks.files import NEW
from qemu_userns.hooks.install import _ENTRY, find_qemus, install, uninstall
from qemu_userns.host.qemu import is_own_entry


@pytest.fixture
def qemus(tmp_path: Path) -> Path:
    """A folder of PATH with programs in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("qemu-system-x86_64", "qemu-system-arm", "qemu-img", "qemu-system-not-executable"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o644 if "not" in name else 0o755)
    (folder / "qemu-system-folder").mkdir()
    return folder


def test_an_entry_for_each_qemu(qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "a/drop in"
    assert install(str(target), str(qemus)) == ["qemu-system-arm", "qemu-system-x86_64", "virtfs-proxy-helper"]
    assert sorted(os.listdir(target)) == [find_name(_ENTRY), "qemu-system-arm", "qemu-system-x86_64", "virtfs-proxy-helper"]
    assert (target / find_name(_ENTRY)).stat().st_mode & 0o777 == 0o644
    for entry in target.glob("[qv]*"):
        assert entry.stat().st_mode & 0o777 == 0o755
        assert is_own_entry(str(entry))
        compile(entry.read_text(), str(entry), "exec")
        assert entry.read_text().splitlines()[0] == f"#!{os.path.realpath(sys.executable)} -IS"


def test_modes_do_not_depend_on_the_umask(qemus: Path, tmp_path: Path) -> None:
    os.umask(0o077)
    install(str(tmp_path / "dropin"), str(qemus))
    assert (tmp_path / "dropin/qemu-system-arm").stat().st_mode & 0o777 == 0o755


def test_our_own_entries_are_replaced(qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "dropin"
    install(str(target), str(qemus))
    entry = target / "qemu-system-arm"
    entry.write_text(entry.read_text() + "# old\n")
    install(str(target), f"{target}:{qemus}")
    assert "# old" not in entry.read_text()


def kept(path: Path) -> tuple[int, ...]:
    """Return what tells a file from another one; not its access time, which looking at a symlink changes."""
    status = path.lstat()
    return (status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)


@pytest.mark.parametrize("what", ["program", "symlink", "dangling", "folder"])
def test_a_foreign_file_is_left_alone(qemus: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "dropin"
    target.mkdir()
    entry = target / "qemu-system-arm"
    if what == "program":
        entry.write_text("#!/bin/sh\n")
    elif what == "folder":
        entry.mkdir()
    else:
        entry.symlink_to(qemus / "qemu-system-arm" if what == "symlink" else "nowhere")
    before = kept(entry)
    with pytest.raises(ResourceError, match="is not an entry of qemu-userns"):
        install(str(target), str(qemus))
    assert kept(entry) == before
    assert (qemus / "qemu-system-arm").read_text() == "#!/bin/sh\n"
    assert not list(target.glob(f"*{NEW}"))


def test_a_symlink_at_the_temporary_name_is_not_followed(qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "dropin"
    target.mkdir()
    (tmp_path / "victim").write_text("text")
    (target / f"qemu-system-arm{NEW}").symlink_to(tmp_path / "victim")
    install(str(target), str(qemus))
    assert (tmp_path / "victim").read_text() == "text"
    assert is_own_entry(str(target / "qemu-system-arm"))


def test_what_was_being_written_when_killed_goes_away(qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "dropin"
    target.mkdir()
    for name in ("qemu-system-arm", "qemu-system-gone", f"{PREFIX}-0123456789abcdef"):
        (target / f"{name}{NEW}").write_text("#!")
    install(str(target), str(qemus))
    assert sorted(os.listdir(target)) == [find_name(_ENTRY), "qemu-system-arm", "qemu-system-x86_64", "virtfs-proxy-helper"]
    (target / f"qemu-system-arm{NEW}").write_text("#!")
    assert uninstall(str(target))
    assert os.listdir(target) == []


def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no QEMU in PATH"):
        install(str(tmp_path / "dropin"), f"/nowhere:{tmp_path}")
    assert not (tmp_path / "dropin").exists()


def test_a_place_that_is_no_folder(qemus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file"):
        install(str(tmp_path / "file"), str(qemus))


def test_the_empty_entry_of_path_is_the_working_directory(qemus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(qemus)
    assert find_qemus("") == ["qemu-system-arm", "qemu-system-x86_64"]


FORBIDDEN = [
    "re",
    "json",
    "dataclasses",
    "typing",
    "enum",
    "collections",
    "functools",
    "ctypes",
    "argparse",
    "subprocess",
    "socket",
    "selectors",
    "asyncio",
    "signal",
    "tomllib",
    "pyroute2",
    "psutil",
    "site",
    "importlib.metadata",
    "contextlib",
    "logging",
    "threading",
    "pathlib",
]


@pytest.mark.qemu
@pytest.mark.dropin
@pytest.mark.newuidmap
def test_a_launch_imports_nothing_heavy(dropin_entry: str, tmp_path: Path) -> None:
    """What is loaded up to execve, which -version comes after; the second run has a warm cache."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    words = [
        "-S",
        "-drive",
        f"file={image},if=none,id=a",
        "-pidfile",
        str(tmp_path / "pid"),
        "-kernel",
        "/dev/null",
        "-enable-kvm",
    ]
    command = [os.path.realpath(sys.executable), "-IS", "-X", "importtime", dropin_entry, *words, "-version"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "qemu_userns.host.opening" in loaded  # the first of the last group (hooks/bundle.py)
    assert sorted(loaded & set(FORBIDDEN)) == []


@pytest.fixture
def dropin_entry() -> str:
    from tests.conftest import dropin_folder

    return str(dropin_folder() / "qemu-system-x86_64")


def test_the_bundle_of_another_version_goes_and_its_entries_go_on(qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "dropin"
    install(str(target), str(qemus))
    old = target / f"{PREFIX}-0123456789abcdef"
    old.write_bytes(b"of another version")
    entry = target / "qemu-system-x86_64"
    entry.write_text(entry.read_text().replace(find_name(_ENTRY), old.name))
    (qemus / "qemu-system-x86_64").rename(tmp_path / "qemu-system-x86_64")
    install(str(target), str(qemus))
    assert sorted(path.name for path in target.glob(f"{PREFIX}*")) == [find_name(_ENTRY)]
    assert old.name in entry.read_text()
    assert start(entry) == "qemu-userns: qemu-system-x86_64: no QEMU of this name in PATH"


@pytest.mark.parametrize("size", [0, 3, 6, 100, 3000])
def test_a_bundle_that_is_cut_costs_time_only(size: int, qemus: Path, tmp_path: Path) -> None:
    target = tmp_path / "dropin"
    install(str(target), str(qemus))
    bundle = target / find_name(_ENTRY)
    bundle.write_bytes(bundle.read_bytes()[:size])
    (qemus / "qemu-system-x86_64").unlink()
    assert start(target / "qemu-system-x86_64") == "qemu-userns: qemu-system-x86_64: no QEMU of this name in PATH"


def start(entry: Path) -> str:
    """Start an entry whose QEMU is gone; return what it says first."""
    done = subprocess.run([entry], capture_output=True, text=True, env={"PATH": "/nonexistent"}, check=False)
    assert done.returncode != 0
    return done.stderr.splitlines()[0]
