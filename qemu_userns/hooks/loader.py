"""Import this program's modules from the one file that `qemu-userns install` makes (bundle.py).

Runs in the drop-in entry, out of that file, with its path, the BUNDLE, and its BASE and GROUPS in sight. To import modules one
by one costs more than to run them: a search for each file, and the import system's own steps. So the modules of a group are
read and run together, in an order in which each finds there what it imports. A group with a module that has changed since is
left alone, and its modules are imported from their files.
"""

import posix
import sys
from _frozen_importlib import ModuleSpec
from marshal import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, ModuleType

    Group = tuple[tuple[str, ...], int, int, bytes]
    BUNDLE, BASE = "", 0
    # Of each group: the names of its modules; where it begins, from BASE, and its size, in bytes; and what it begins with. There
    # follow, marshalled, the modules' files with mtime in ns and size in bytes; and, marshalled by itself, of each its name, its
    # file, whether it is a package, and its code.
    GROUPS: "tuple[Group, ...]" = ()

_ModuleType = type(sys)
_group_of = {name: group for group in GROUPS for name in group[0]}
_held: "dict[int, bytes]" = {}  # modules of groups, by where they begin


class BundleFinder:
    """A finder and loader of importlib: at the first import of a module of a group, it runs all of them."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Return the spec of a module that the bundle has."""
        group = _group_of.get(name)
        if group is None:
            return None
        for member in group[0]:
            del _group_of[member]
        try:
            modules = loads(_held.pop(group[1], b"") or _read_current(*group[1:]))
        except (EOFError, ValueError, TypeError):
            return None  # a crash of the host has left it damaged
        spec = None
        for member, file, is_package, code in modules:
            found = _build_spec(member, file, is_package)
            if member == name:
                spec = found
            _run(found, code)
        return spec

    @staticmethod
    def hold() -> None:
        """Read what has not been needed so far, for a process that goes on while this program is updated, moved or removed."""
        for group in set(_group_of.values()):
            try:
                _held[group[1]] = _read_current(*group[1:])
            except (EOFError, ValueError, TypeError):
                continue

    @staticmethod
    def create_module(spec: ModuleSpec) -> "ModuleType":
        """Return the module, which has run."""
        return sys.modules[spec.name]

    @staticmethod
    def exec_module(module: "ModuleType") -> None:
        """Do nothing: it has run."""


def _read_current(start: int, size: int, mark: bytes) -> bytes:
    """Return the modules of a group, still marshalled; none if one of them has changed, or the bundle.

    Raises:
        EOFError, ValueError, TypeError: it is damaged.
    """
    data = _read(start, size, mark)
    files, modules = loads(data) if data is not None else ((), b"")
    return modules if is_current(files) else b""


def _read(start: int, size: int, mark: bytes) -> "memoryview | None":
    """Return what a group is behind its mark, None if the bundle is gone, or is another one by now."""
    try:
        fd = posix.open(BUNDLE, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return None
    data = posix.pread(fd, size, BASE + start)
    posix.close(fd)
    return memoryview(data)[len(mark) :] if data.startswith(mark) and len(data) == size else None


def _build_spec(name: str, file: str, is_package: bool) -> ModuleSpec:
    spec = ModuleSpec(name, BundleFinder, origin=file, is_package=is_package)  # type: ignore[arg-type]
    spec.has_location = True
    if is_package:
        spec.submodule_search_locations = [file.rpartition("/")[0]]
    return spec


def _run(spec: ModuleSpec, code: "CodeType") -> None:
    """Run a module, and leave it where an import finds it."""
    module = _ModuleType(spec.name)
    parent, _, last = spec.name.rpartition(".")
    if parent:
        __import__(parent)  # an earlier group may have it, which this process has not needed so far
    module.__spec__ = spec
    module.__file__ = spec.origin
    module.__package__ = parent
    if spec.submodule_search_locations is not None:
        module.__package__ = spec.name
        module.__path__ = spec.submodule_search_locations
    sys.modules[spec.name] = module
    exec(code, module.__dict__)
    if parent:
        setattr(sys.modules[parent], last, module)


def is_current(files: "tuple[tuple[str, int, int], ...]") -> bool:
    """Say whether every module is as it was when the bundle was made."""
    try:
        for file, mtime_ns, size_bytes in files:
            found = posix.stat(file)
            if found.st_mtime_ns != mtime_ns or found.st_size != size_bytes:
                return False
    except OSError:
        return False
    return True


sys.meta_path.insert(0, BundleFinder)
