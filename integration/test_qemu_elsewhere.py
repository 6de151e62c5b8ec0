"""A QEMU outside /usr, as under /opt or in a snap: its libraries, firmware and late modules are its own, as without us."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.rom import EXIT_DEVICE, build_rom, exit_status
from integration.talk import REAL, outcome, running
from integration.vm import run_guest
from qemu_userns.host.cache import cache_dir
from tests.conftest import lacking, remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from integration.talk import Running

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

NAME = "qemu-system-x86_64"
ROM, LINE, VALUE = "elsewhere.rom", "firmware from elsewhere", 5
RUN_ROM = ["-nodefaults", "-display", "none", "-serial", "stdio", "-bios", ROM, *EXIT_DEVICE]
ROM_RAN = (exit_status(VALUE), f"{LINE}\n", "")
LATE_MODULE, LATE_LIBRARY = "hw-usb-redirect.so", "libusbredirparser.so.1"  # only that module needs this library
USB = ["-M", "q35", "-nodefaults", "-display", "none", "-S", "-device", "qemu-xhci", "-device", "qxl"]
IN_MOUNTS = """
set -e
revision=$1 content=$2; shift 2
mount -t tmpfs -o nosuid,nodev,mode=755 snap "$revision"
mkdir -p "$revision/external/qemu" "$revision/lib"
mount --bind "$content" "$revision/external/qemu"
mount -o remount,bind,ro,nosuid,nodev "$revision/external/qemu"
mount -o remount,ro "$revision"
exec "$@"
"""


@dataclass(frozen=True)
class Installation:
    """A QEMU somewhere, and how it is started there."""

    prefix: Path
    environ: dict[str, str]
    """What the installation's own launcher sets."""
    through: tuple[str, ...] = ()
    """Words before the command, which make the installation's mounts."""

    @property
    def program(self) -> Path:
        return self.prefix / "bin" / NAME

    def env(self, **more: str) -> dict[str, str]:
        path = f"{self.prefix}/bin:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, **self.environ, **more}

    def plain(self) -> list[str]:
        return [*self.through, str(self.program)]

    def by(self, words: list[str]) -> list[str]:
        return [*self.through, *words]


@pytest.fixture(scope="module")
def modules() -> Path:
    """Where the modules of the host's QEMU are."""
    found = glob.glob(f"/usr/lib*/qemu/{LATE_MODULE}") + glob.glob(f"/usr/lib*/*/qemu/{LATE_MODULE}")
    if not found:
        lacking("qemu", f"a QEMU with modules ({LATE_MODULE})")
    return Path(found[0]).parent


@pytest.fixture(scope="module")
def relocated(modules: Path) -> Iterator[Path]:
    """A copy of the host's QEMU with all its data, modules and libraries, laid out below a prefix as it is below /usr."""
    folder = Path(tempfile.mkdtemp(prefix="test-elsewhere-")).resolve()
    try:
        folder.chmod(0o755)
        prefix = folder / "opt/q"
        copy_qemu(prefix, modules, prefix / modules.relative_to("/usr"))
        yield prefix
    finally:
        forget(folder.rglob(NAME))
        remove_tree(folder)


def copy_qemu(prefix: Path, modules: Path, module_dir: Path) -> None:
    """Copy it; the libraries that only one module needs are in a folder of their own, where the program has none."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib").mkdir()
    (prefix / "late").mkdir()
    shutil.copy2(REAL, prefix / "bin")
    for line in subprocess.check_output([REAL, "-L", "help"], text=True).splitlines():
        source = Path(os.path.normpath(line))
        if source.is_dir() and source.is_relative_to("/usr"):
            shutil.copytree(source, prefix / source.relative_to("/usr"), dirs_exist_ok=True)
    shutil.copytree(modules, module_dir)
    for library in libraries([Path(REAL), *modules.glob("*.so")]):
        shutil.copy2(library, prefix / ("late" if library.name.startswith(LATE_LIBRARY) else "lib"))
    (prefix / "share/qemu" / ROM).write_bytes(build_rom(LINE, VALUE))
    (prefix / "private").write_bytes(bytes(512))


def libraries(programs: Iterable[Path]) -> set[Path]:
    """Return the shared libraries of programs and modules."""
    lines = subprocess.check_output(["ldd", *map(str, programs)], text=True).splitlines()
    return {Path(line.split("=> ")[1].split(" (")[0]) for line in lines if "=> /" in line}


def forget(programs: Iterable[Path]) -> None:
    """Remove what the drop-in keeps of files that go."""
    cache = cache_dir(os.environ, os.geteuid())
    for status in [program.stat() for program in programs]:
        for entry in Path(cache or "/nonexistent").glob(f"*-{status.st_dev:x}-{status.st_ino:x}"):
            entry.unlink()


@pytest.fixture(params=["relocated", "QEMU_MODULE_DIR", "relative"])
def opt(request: pytest.FixtureRequest, relocated: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """A QEMU below a prefix: as it finds its parts by itself; with its modules where only a variable says; by relative paths."""
    late = {"LD_LIBRARY_PATH": f"{relocated}/lib:{relocated}/late"}
    if request.param == "relative":
        monkeypatch.chdir(relocated)
        return Installation(relocated, {"LD_LIBRARY_PATH": "lib:./late"})
    if request.param == "relocated":
        return Installation(relocated, late)
    moved = shared_tmp / "modules of QEMU"
    found = next(relocated.rglob(LATE_MODULE)).parent
    shutil.copytree(found, moved, copy_function=os.link)
    return Installation(relocated, {**late, "QEMU_MODULE_DIR": str(moved)})


@pytest.fixture(params=["folders", pytest.param("mounts", marks=pytest.mark.root)])
def snap(request: pytest.FixtureRequest, relocated: Path, shared_tmp: Path) -> Installation:
    """LXD's snap with a QEMU from a content snap, by the link `current`, with the environment that its launcher sets."""
    home, revision = shared_tmp / "snap/lxd", shared_tmp / "snap/lxd/x1"
    revision.mkdir(parents=True)
    (home / "current").symlink_to("x1")
    through: tuple[str, ...] = ()
    if request.param == "mounts":
        through = ("unshare", "--mount", "sh", "-c", IN_MOUNTS, "sh", str(revision), str(relocated))
    else:
        shutil.copytree(relocated, revision / "external/qemu", copy_function=os.link)
    current, prefix = home / "current", home / "current/external/qemu"
    library_path = f"{prefix}/lib:{prefix}/late::{current}/lib:{current}/lib/absent"  # the empty entry is the launcher's own
    environ = {"SNAP": str(revision), "SNAP_QEMU_PREFIX": "external/qemu", "LD_LIBRARY_PATH": library_path}
    return Installation(prefix, environ, through)


def mapped(qemu: Running) -> dict[str, str]:
    """Return where each file that a process has mapped is, by its name."""
    lines = (qemu.proc / "maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return {os.path.basename(path): path for path in paths if path.startswith("/")}


def plug_late(qemu: Running) -> dict[str, str]:
    """Plug a device whose module is not loaded yet; return what is mapped then."""
    assert LATE_MODULE not in mapped(qemu)
    qemu.qmp.execute("chardev-add", id="c", backend={"type": "null", "data": {}})
    qemu.qmp.execute("device_add", driver="usb-redir", id="d", chardev="c")
    return mapped(qemu)


def configured(folder: Path, installation: Installation) -> dict[str, str]:
    """Return an environment in which the configuration names the QEMU, and PATH does not."""
    file = folder / "config/qemu-userns/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'qemu = "{installation.prefix}/bin"\n')
    return installation.env(PATH=os.environ["PATH"], XDG_CONFIG_HOME=str(folder / "config"))


def check_same(dropin: list[str], there: Installation, env: dict[str, str]) -> None:
    """Check that QEMU runs its own firmware and loads its own modules, early and late, all from where plain QEMU does."""
    assert outcome(there.plain(), *RUN_ROM, env=there.env()) == ROM_RAN
    assert outcome(there.by(dropin), *RUN_ROM, env=env) == ROM_RAN
    with running(there.plain(), *USB, env=there.env(), idle=False) as plain:
        expected = plug_late(plain)
    with running(there.by(dropin), *USB, env=env, idle=False) as qemu:
        assert os.readlink(qemu.proc / "ns/user") != os.readlink("/proc/self/ns/user")
        assert plug_late(qemu) == expected
        assert qemu.qmp.greeting == plain.qmp.greeting
        view = Path(f"{qemu.proc}/root{there.prefix.resolve()}")
        assert (view / "share/qemu" / ROM).exists()
        assert not (view / "private").exists()
    module_dir = there.environ.get("QEMU_MODULE_DIR", str(there.prefix.resolve()))
    assert expected[NAME] == str(there.program.resolve())
    assert expected[LATE_LIBRARY] in (f"{there.prefix}/late/{LATE_LIBRARY}", f"{there.prefix.resolve()}/late/{LATE_LIBRARY}")
    for name in (LATE_MODULE, "hw-display-qxl.so"):
        assert expected[name].startswith(f"{module_dir}/")


def test_below_a_prefix(dropin: list[str], opt: Installation) -> None:
    check_same(dropin, opt, opt.env())


def test_below_a_prefix_by_the_configuration(dropin: list[str], opt: Installation, shared_tmp: Path) -> None:
    env = configured(shared_tmp, opt)
    check_same(dropin, opt, env)
    forget([shared_tmp / "config/qemu-userns/config.toml"])


def test_in_a_snap(dropin: list[str], snap: Installation) -> None:
    check_same(dropin, snap, snap.env())


def test_in_a_snap_by_the_configuration(dropin: list[str], snap: Installation, shared_tmp: Path) -> None:
    env = configured(shared_tmp, snap)
    check_same(dropin, snap, env)
    forget([shared_tmp / "config/qemu-userns/config.toml"])


def test_a_guest_boots(dropin: list[str], relocated: Path, shared_tmp: Path) -> None:
    there = Installation(relocated, {"LD_LIBRARY_PATH": f"{relocated}/lib"})
    result = run_guest(dropin, "echo booted", tmp=shared_tmp, env=there.env())
    assert (result.status, result.output, result.qemu_status) == (0, "booted\n", 0), result.stderr
