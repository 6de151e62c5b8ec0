"""Make the bundle: the code of this program's modules in one file, for the drop-in entries of a directory.

The modules of a group are run together (loader.py); those that only some launches need have groups of their own.
"""

import ast
import hashlib
import importlib.util
import marshal
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

PREFIX = ".qemu-userns.bundle"
_MARK_BYTES = 8
LOADER = "qemu_userns.hooks.loader"
# What each group is for; it has all that this imports, unless an earlier group has it.
_GROUPS = (
    ("qemu_userns.hooks.dropin",),
    (  # imported by launch.py once the supervisor is forked
        "qemu_userns.host.opening",
        "qemu_userns.planning",
        "qemu_userns.sandbox.confine",
        "qemu_userns.sandbox.namespaces",
        "qemu_userns.sandbox.view",
    ),
    ("qemu_userns.cmdline.json",),
    ("qemu_userns.cmdline.readconfig",),
    ("qemu_userns.host.settings",),
    ("qemu_userns.plan.displays",),
    ("qemu_userns.plan.idmaps", "qemu_userns.host.shares"),
    ("qemu_userns.host.settings_shares",),
    ("qemu_userns.plan.virtiofs", "qemu_userns.host.virtiofsd", "qemu_userns.sandbox.daemons"),
    ("qemu_userns.host.stand_ins",),
    ("qemu_userns.host.network",),
    ("qemu_userns.host.images",),
    ("qemu_userns.host.sockets",),
    ("qemu_userns.host.tcp",),
    ("qemu_userns.host.programs",),
    ("qemu_userns.plan.taps", "qemu_userns.host.taps"),
    ("qemu_userns.host.settings_taps",),
    ("qemu_userns.host.windows",),
    ("qemu_userns.host.tap_settings",),
    ("qemu_userns.host.memory", "qemu_userns.plan.memory"),
    ("qemu_userns.host.vfio", "qemu_userns.plan.vfio"),
    ("qemu_userns.plan.passt",),
    ("qemu_userns.plan.refusals",),
    ("qemu_userns.supervisor.state",),
    ("qemu_userns.host.newidmap",),
    ("qemu_userns.host.leases",),
    ("qemu_userns.supervisor.cleanup",),
    ("qemu_userns.supervisor.life",),
    ("qemu_userns.supervisor.server",),
    ("qemu_userns.supervisor.daemons",),
    ("qemu_userns.supervisor.notifier",),
    ("qemu_userns.supervisor.hotplug",),
)


def find_name(entry: str) -> str:
    """Return the name of the bundle that an entry reads: another version's entries and loader go with another one.

    Args:
        entry: the text of the entries, before it is filled in.
    """
    with open(_find_file(LOADER), "rb") as source:
        return f"{PREFIX}-{hashlib.sha256(entry.encode() + source.read()).hexdigest()[: 2 * _MARK_BYTES]}"


def build_bundle() -> bytes:
    """Return the bundle.

    It is the interpreter's magic number; the size of the head; the head, marshalled, with the loader's code and its GROUPS; and
    the groups, each of which is read when it is needed.
    """
    groups = []
    blocks = b""
    done: "set[str]" = set()
    for names in _GROUPS:
        members = [member for name in names for member in _list_needed(name, done)]
        files = [(member, _find_file(member)) for member in members]
        stats = tuple((file, status.st_mtime_ns, status.st_size) for _, file in files for status in [os.stat(file)])
        modules = marshal.dumps(tuple((member, file, _is_package(file), _compile(file)) for member, file in files))
        block = marshal.dumps((stats, modules))
        mark = hashlib.sha256(block).digest()[:_MARK_BYTES]
        groups.append((tuple(members), len(blocks), len(mark + block), mark))
        blocks += mark + block
    head = marshal.dumps((_compile(_find_file(LOADER)), tuple(groups)))
    return importlib.util.MAGIC_NUMBER + len(head).to_bytes(4, "little") + head + blocks


def _list_needed(name: str, done: "set[str]") -> "Iterator[str]":
    """Yield a module after those that it imports when it runs, but for those that are done; note them there."""
    if name in done:
        return
    done.add(name)
    parent = name.rpartition(".")[0]
    if parent:
        yield from _list_needed(parent, done)
    for imported in _find_imports(name):
        yield from _list_needed(imported, done)
    yield name


def _find_imports(name: str) -> "Iterator[str]":
    """Yield the modules of this program that a module imports at its top level."""
    with open(_find_file(name), "rb") as source:
        tree = ast.parse(source.read())
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if alias.name.startswith("qemu_userns"))
        elif isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("qemu_userns"):
            yield statement.module
            inner = (f"{statement.module}.{alias.name}" for alias in statement.names)
            yield from (found for found in inner if _is_package(_find_file(statement.module)) and importlib.util.find_spec(found))


def _is_package(file: str) -> bool:
    return os.path.basename(file) == "__init__.py"


def _find_file(name: str) -> str:
    """Return the source file of a module."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} has no file")
    return os.path.abspath(spec.origin)


def _compile(file: str) -> "CodeType":
    """Return the code of a source file, without docstrings and asserts, which take time to load."""
    with open(file, "rb") as source:
        code: CodeType = compile(source.read(), file, "exec", dont_inherit=True, optimize=2)
    return code
