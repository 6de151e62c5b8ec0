"""Make the bundle: the code of this program's modules in one file, for the drop-in entries of a directory."""

import importlib.util
import marshal
import os
import pkgutil

import qemu_userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

NAME = ".qemu-userns.bundle"
LOADER = "qemu_userns.hooks.loader"
# Not on the launch path, or on that of few command lines.
_LEFT_OUT = (
    "qemu_userns.catalogue.command",
    "qemu_userns.catalogue.owners",
    "qemu_userns.cli",
    "qemu_userns.cmdline.hmp",
    "qemu_userns.hooks.install",
    "qemu_userns.hooks.bundle",
    "qemu_userns.host.programs",
    "qemu_userns.host.qemu_probe",
    "qemu_userns.host.settings",
    "qemu_userns.host.tcp",
    "qemu_userns.plan.command",
    "qemu_userns.qmp",
    "qemu_userns.sandbox.running",
    "qemu_userns.supervisor.",
    LOADER,
)
_KEPT = ("qemu_userns.supervisor.cleanup", "qemu_userns.supervisor.process", "qemu_userns.supervisor.state")


def build_bundle() -> bytes:
    """Return the bundle.

    It is the interpreter's magic number; the length of the head; the head, marshalled, with the loader's code and what it has to
    know of each module; and the modules' code, one after the other.
    """
    modules = {}
    code = b""
    for found in [*pkgutil.walk_packages(qemu_userns.__path__, "qemu_userns."), None]:
        name = "qemu_userns" if found is None else found.name
        if name.startswith(_LEFT_OUT) and name not in _KEPT:
            continue
        file = _find_file(name)
        status = os.stat(file)
        is_package = os.path.basename(file) == "__init__.py"
        start = len(code)
        code += marshal.dumps(_compile(file))
        modules[name] = (is_package, file, status.st_mtime_ns, status.st_size, start, len(code))
    head = marshal.dumps((_compile(_find_file(LOADER)), modules))
    return importlib.util.MAGIC_NUMBER + len(head).to_bytes(4, "little") + head + code


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
