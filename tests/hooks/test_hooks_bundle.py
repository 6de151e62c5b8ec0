"""The bundle of modules beside the drop-in entries: used while it is current, and only then."""

from __future__ import annotations

import ast
import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qemu_userns
from qemu_userns.hooks.bundle import LOADER, build_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = """
import sys
sys.path += [{path!r}]
import marshal
data = open({bundle!r}, "rb").read()
head = int.from_bytes(data[4:8], "little")
loader, groups = marshal.loads(data[8:])
exec(loader, {{"BUNDLE": {bundle!r}, "BASE": 8 + head, "GROUPS": groups, "__name__": "loader"}})
import qemu_userns.hooks.dropin as early
import qemu_userns.planning as late
for module in (early, late):
    print(getattr(module.__spec__.loader, "__name__", "a file"), module.__file__)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package, whose files the test may change."""
    source = Path(qemu_userns.__file__).parent
    shutil.copytree(source, tmp_path / "qemu_userns", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def ask(checkout: Path) -> list[str]:
    """Return how a module of the first group and one of the second are imported in an interpreter that has the bundle."""
    script = ASK.format(path=str(checkout), bundle=str(checkout / "bundle"))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def make(checkout: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(checkout)!r}); from qemu_userns.hooks.bundle import build_bundle\n"
    script += f"open({str(checkout / 'bundle')!r}, 'wb').write(build_bundle())"
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_modules_come_from_the_bundle_and_have_their_files(checkout: Path) -> None:
    make(checkout)
    files = [f"{checkout}/qemu_userns/{name}.py" for name in ("hooks/dropin", "planning")]
    assert ask(checkout) == [f"BundleFinder {file}" for file in files]


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_group_that_is_older_than_a_module_is_left_alone(checkout: Path, change: str) -> None:
    make(checkout)
    module = checkout / "qemu_userns/host/facts.py"
    if change == "time":
        os.utime(module, ns=(1, 1))
    elif change == "size":
        status = module.stat()
        module.write_text(module.read_text() + "\n")
        os.utime(module, ns=(status.st_atime_ns, status.st_mtime_ns))
    early, late = ask(checkout)
    assert early == f"BundleFinder {checkout}/qemu_userns/hooks/dropin.py"
    assert late == f"a file {checkout}/qemu_userns/planning.py"


def test_it_has_the_launch_path_and_no_tools() -> None:
    data = build_bundle()
    assert data.startswith(importlib.util.MAGIC_NUMBER)
    _, groups = marshal.loads(data[len(importlib.util.MAGIC_NUMBER) + 4 :])
    first, second = ({*names} for names, *_ in groups[:2])
    assert {"qemu_userns", "qemu_userns.launch", "qemu_userns.supervisor.process"} <= first
    assert {"qemu_userns.plan.build", "qemu_userns.sandbox.view"} <= second
    names = [name for names, *_ in groups for name in names]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("qemu_userns.cli") or name == LOADER]


def test_any_module_may_be_the_first_that_is_needed(checkout: Path) -> None:
    """A launch that needs a later group before an earlier one, as JSON on its command line did, gets both."""
    make(checkout)
    _, groups = marshal.loads((checkout / "bundle").read_bytes()[len(importlib.util.MAGIC_NUMBER) + 4 :])
    names = [name for members, *_ in groups for name in members]
    script = ASK.format(path=str(checkout), bundle=str(checkout / "bundle")).partition("import qemu_userns")[0]
    script += f"""
import importlib, os
for name in {names!r}:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            module = importlib.import_module(name)
            status = int(module.__spec__.loader.__name__ != "BundleFinder")
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        print(name)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_the_launch_path_imports_no_other_module() -> None:
    """What a launch needs is read with the groups that are made for it, not file by file."""
    data = build_bundle()
    _, groups = marshal.loads(data[len(importlib.util.MAGIC_NUMBER) + 4 :])
    early = {name for names, *_ in groups[:2] for name in names}
    script = f"import sys; sys.path.insert(0, {str(Path(qemu_userns.__file__).parents[1])!r})\n"
    script += "import qemu_userns.hooks.dropin\n" + "".join(f"import {name}\n" for name in groups[1][0])
    script += "print(*(name for name in sys.modules if name.startswith('qemu_userns')))"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == early


@pytest.mark.parametrize("damage", ["swapped", "cut", "zeros", "gone"])
def test_a_group_that_is_not_what_the_head_says_is_left_alone(checkout: Path, damage: str) -> None:
    """The bundle changes between the first group and the second."""
    make(checkout)
    bundle = checkout / "bundle"
    data = bundle.read_bytes()
    base = 8 + int.from_bytes(data[4:8], "little")
    (_, first_start, first_size, _), (_, start, size, mark), *_ = marshal.loads(data[8:base])[1]
    assert first_start + first_size <= start
    begin = base + start
    damaged = {
        "swapped": data[:begin] + bytes(len(mark)) + data[begin + len(mark) :],
        "cut": data[: begin + size - 100],
        "zeros": data[: begin + size // 2] + bytes(size // 2) + data[begin + size :],
    }
    if damage == "gone":
        (checkout / "new").touch()
    else:
        (checkout / "new").write_bytes(damaged[damage])
    change = f"import os; os.rename({str(checkout / 'new')!r}, {str(bundle)!r})"
    script = ASK.format(path=str(checkout), bundle=str(bundle)).replace(
        "import qemu_userns.planning", f"{change}\nimport qemu_userns.planning"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["BundleFinder", "a"]


def test_what_a_supervisor_needs_later_is_held(checkout: Path) -> None:
    """Without the bundle it is imported at once."""
    make(checkout)
    later = find_later("qemu_userns.supervisor.life") - {"qemu_userns.supervisor.adoption"}
    assert {"qemu_userns.supervisor.hotplug", "qemu_userns.host.taps", "qemu_userns.host.scripts"} <= later
    with_bundle = ASK.format(path=str(checkout), bundle=str(checkout / "bundle")).partition("import qemu_userns")[0]
    for start in (with_bundle, f"import sys\nsys.path += [{str(checkout)!r}]\n"):
        script = f"""{start}
import importlib, os, shutil
from qemu_userns.supervisor import server
from qemu_userns.supervisor.life import hold_code
hold_code()
shutil.rmtree({str(checkout / "qemu_userns")!r})
for name in {sorted(later)!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == ""
        shutil.copytree(Path(qemu_userns.__file__).parent, checkout / "qemu_userns", ignore=shutil.ignore_patterns("__pycache__"))


def find_later(name: str) -> set[str]:
    """Return the modules of this program that a module imports, also when one of its functions runs, and what these import."""
    found: set[str] = set()
    left = [name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += find_imports(name)
    return found


def find_imports(name: str) -> Iterator[str]:
    """Yield what a module imports, but for its annotations."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    left: list[ast.AST] = [ast.parse(Path(spec.origin).read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        left += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (found for found in names if found.startswith("qemu_userns.") and is_module(found))


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
