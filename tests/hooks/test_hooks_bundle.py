"""The bundle of modules beside the drop-in entries: used while it is current, and only then."""

import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qemu_userns
from qemu_userns.hooks.bundle import LOADER, build_bundle

ASK = """
import sys
sys.path += [{path!r}]
import marshal
data = open({bundle!r}, "rb").read()[{magic}:]
end = 4 + int.from_bytes(data[:4], "little")
loader, BUNDLE = marshal.loads(data[4:end])
exec(loader, {{"BUNDLE": BUNDLE, "CODE": memoryview(data)[end:], "__name__": "loader"}})
import qemu_userns.hooks.dropin as module
print(getattr(module.__spec__.loader, "__name__", "a file"), module.__file__)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package, whose files the test may change."""
    source = Path(qemu_userns.__file__).parent
    shutil.copytree(source, tmp_path / "qemu_userns", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def ask(checkout: Path) -> str:
    """Return how a module is imported in an interpreter that has the bundle."""
    script = ASK.format(path=str(checkout), bundle=str(checkout / "bundle"), magic=len(importlib.util.MAGIC_NUMBER))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make(checkout: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(checkout)!r}); from qemu_userns.hooks.bundle import build_bundle\n"
    script += f"open({str(checkout / 'bundle')!r}, 'wb').write(build_bundle())"
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_modules_come_from_the_bundle_and_have_their_files(checkout: Path) -> None:
    make(checkout)
    assert ask(checkout) == f"BundleFinder {checkout}/qemu_userns/hooks/dropin.py"


@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_a_bundle_that_is_older_than_a_module_is_left_alone(checkout: Path, change: str) -> None:
    make(checkout)
    module = checkout / "qemu_userns/host/images.py"
    if change == "time":
        os.utime(module, ns=(1, 1))
    elif change == "size":
        status = module.stat()
        module.write_text(module.read_text() + "\n")
        os.utime(module, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        module.unlink()
    assert ask(checkout) == f"a file {checkout}/qemu_userns/hooks/dropin.py"


def test_it_has_the_launch_path_and_no_tools() -> None:
    data = build_bundle()
    assert data.startswith(importlib.util.MAGIC_NUMBER)
    _, modules = marshal.loads(data[len(importlib.util.MAGIC_NUMBER) + 4 :])
    assert {"qemu_userns", "qemu_userns.launch", "qemu_userns.plan.build", "qemu_userns.supervisor.process"} <= modules.keys()
    assert not [name for name in modules if name.startswith("qemu_userns.cli") or name == LOADER]
