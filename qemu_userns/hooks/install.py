"""Put drop-in entries into a directory."""

import importlib.util
import os
import sys

from qemu_userns.errors import HostError, ResourceError
from qemu_userns.hooks.bundle import PREFIX, build_bundle, find_name
from qemu_userns.hooks.files import NEW, act, write_file
from qemu_userns.host.qemu import DIVERTED, is_own_entry

# Started without site and isolated, which saves a third of an interpreter start. The second line is how find_qemu knows us.
_ENTRY = """#!{python} -IS
# qemu-userns drop-in
import _signal
import gc
import marshal
import sys
from _frozen_importlib_external import MAGIC_NUMBER

gc.disable()  # this process is QEMU before there is anything to collect

if _signal.getsignal(2) is _signal.default_int_handler:
    _signal.signal(2, _signal.SIG_DFL)  # Ctrl-C ends this process at once; the supervisor cleans up
sys.path += {path!r}
try:
    with open({bundle!r}, "rb", 0) as file:
        if file.read(len(MAGIC_NUMBER)) == MAGIC_NUMBER:
            loader, groups = marshal.loads(file.read(int.from_bytes(file.read(4), "little")))
            sight = {{"BUNDLE": {bundle!r}, "BASE": file.tell(), "GROUPS": groups}}
            exec(loader, {{**sight, "__name__": "qemu_userns.hooks.loader"}})
except (OSError, EOFError, ValueError, TypeError):
    pass  # there is none, or it is damaged: the modules are imported one by one
try:
    from qemu_userns.hooks.dropin import main
except (ImportError, OSError) as error:
    sys.exit(f"qemu-userns: cannot be loaded: {{error}}\\nhint: install it again, and the entries with qemu-userns install")
main(__file__)
"""
_PROXY_ENTRY = """#!{python} -IS
# qemu-userns drop-in
import sys

sys.path += {path!r}
try:
    from qemu_userns.hooks.proxy_helper import main
except (ImportError, OSError) as error:
    sys.exit(f"qemu-userns: cannot be loaded: {{error}}\\nhint: install it again, and the entries with qemu-userns install")
main()
"""
_PREFIX = "qemu-system-"
PROXY_HELPER = "virtfs-proxy-helper"


def install(directory: str, path_env: str, root: str = "") -> "list[str]":
    """Put an entry for every qemu-system-* of PATH, and one for virtfs-proxy-helper, into a directory; older ones are replaced.

    Args:
        directory: made if it is missing.
        path_env: PATH.
        root: the directory of another system that all these are in, and that has this program and its interpreter where they
            are here.

    Returns:
        The names of the entries.

    Raises:
        HostError: there is no QEMU, or the path of the interpreter has a blank.
        ResourceError: the directory cannot be written, or holds a file of such a name that is not ours.
    """
    names = find_qemus(path_env, root)
    if not names:
        raise HostError("qemu-system-*", "no QEMU in PATH", "install qemu-system-x86 or another qemu-system package")
    python = os.path.realpath(sys.executable)
    if any(character.isspace() for character in python):
        raise HostError(python, "has a blank, and no first line of a script can name it", "install qemu-userns at another place")
    directory = os.path.abspath(directory)
    bundle = os.path.join(directory, find_name(_ENTRY))
    try:
        os.makedirs(root + directory, exist_ok=True)
        _remove_leftovers(root + directory)
        write_file(root + bundle, build_bundle(), 0o644)
        write_entries(root + directory, names, python, find_import_path(), bundle)
        _remove_others(root + bundle)
    except OSError as err:
        raise ResourceError(str(err.filename or directory), err.strerror or str(err)) from err
    return [*names, PROXY_HELPER]


def write_entries(directory: str, names: "list[str]", python: str, path: "list[str]", bundle: str = "") -> None:
    """Write entries for QEMU, and the one for virtfs-proxy-helper.

    Args:
        directory: that is there.
        names: of QEMU.
        python: the interpreter.
        path: where it finds this program.
        bundle: of modules; there may be none.

    Raises:
        OSError: one cannot be written.
        ResourceError: a file of such a name is not ours.
    """
    for name in names:
        _write_entry(os.path.join(directory, name), _ENTRY.format(python=python, path=path, bundle=bundle))
    _write_entry(os.path.join(directory, PROXY_HELPER), _PROXY_ENTRY.format(python=python, path=path))


def uninstall(directory: str) -> bool:
    """Remove what `install` has put into a directory; return whether there was any.

    Raises:
        ResourceError: it cannot be removed.
    """
    ours = list_own_files(directory)
    for name in ours:
        act(os.unlink, os.path.join(directory, name))
    return bool(ours)


def list_own_files(directory: str) -> "list[str]":
    """Return the names of what `install` has put into a directory, or was putting there when it was killed.

    Raises:
        ResourceError: it cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as err:
        raise ResourceError(directory, err.strerror or str(err)) from err
    return [
        name for name in names if name.startswith(PREFIX) or name.endswith(NEW) or is_own_entry(os.path.join(directory, name))
    ]


def find_qemus(path_env: str, root: str = "") -> "list[str]":
    """Return the names of all qemu-system-* programs in PATH, below `root`, that are not our own entries."""
    names = set()
    for directory in path_env.split(":"):
        directory = root + directory
        try:
            entries = os.listdir(directory or ".")
        except OSError:
            continue
        for name in entries:
            path = os.path.join(directory, name)
            if name.startswith(_PREFIX) and os.access(path, os.X_OK) and os.path.isfile(path) and not is_own_entry(path):
                names.add(name.removesuffix(DIVERTED))
    return sorted(names)


def find_import_path() -> "list[str]":
    """Return the folders from which an interpreter without site imports this program."""
    path = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
    pyroute2 = importlib.util.find_spec("pyroute2")
    if pyroute2 is not None and pyroute2.origin is not None:
        path.append(os.path.dirname(os.path.dirname(os.path.abspath(pyroute2.origin))))
    if sys.version_info < (3, 12):
        import unshare

        path.append(os.path.dirname(os.path.abspath(unshare.__file__)))
    return list(dict.fromkeys(path))


def _remove_leftovers(directory: str) -> None:
    """Remove what somebody was writing when killed; raises OSError."""
    for name in os.listdir(directory):
        if name.endswith(NEW):
            os.unlink(os.path.join(directory, name))


def _remove_others(bundle: str) -> None:
    """Remove the bundles of other versions; an entry that still names one imports the modules one by one."""
    directory, name = os.path.split(bundle)
    for other in os.listdir(directory):
        if other.startswith(PREFIX) and other != name:
            os.unlink(os.path.join(directory, other))


def _write_entry(path: str, text: str) -> None:
    """Write an entry beside its place and move it there, so that a start at the same moment finds a whole one."""
    if os.path.lexists(path) and not is_own_entry(path):
        raise ResourceError(path, "is not an entry of qemu-userns, and is left alone", "name another directory")
    write_file(path, text.encode(), 0o755)
