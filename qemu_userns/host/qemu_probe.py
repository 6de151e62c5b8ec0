"""Learn what must be known of a QEMU by running it: only when the cache does not know (qemu.py), so off the launch path."""

import os
import subprocess

from qemu_userns.cmdline.table import parse_help
from qemu_userns.errors import HostError, LaunchError
from qemu_userns.host.qemu import parse_version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.host.cache import Facts

PROBE_TIMEOUT_S = 20
SYSTEM_DIRS = ("/usr", "/lib", "/lib32", "/lib64", "/libx32")  # in every view


def run_probes(path: str) -> "Facts":
    """Gather the facts by running QEMU; raises HostError and LaunchError."""
    # Options are handled in their order: a QEMU built without seccomp exits at -sandbox, with nothing on stdout.
    version = _run(path, "-sandbox", "on", "-version")[0]
    sandbox = bool(parse_version(version))
    errors = ""
    if not sandbox:
        version, errors = _run(path, "-version")
    if not parse_version(version):
        raise HostError(
            path, f"does not work as QEMU: {(errors or version).strip()[:200] or 'it says nothing'}", f"try `{path} -version`"
        )
    options = parse_help(_run(path, "-help")[0])
    lines = _run(path, "-L", "help")[0].split("\n")
    data_dirs = [os.path.normpath(line) for line in lines if line.startswith("/")]
    return {
        "version": [version.split("\n")[0]],
        "sandbox": ["on"] if sandbox else [],
        "valued": [name for name, valued in options.items() if valued],
        "bare": [name for name, valued in options.items() if not valued],
        "data_dirs": data_dirs,
        "library_dirs": _find_library_dirs(path, data_dirs),
    }


def _run(path: str, *args: str, **environ: str) -> "tuple[str, str]":
    """Run QEMU; return its stdout and stderr, whatever its exit status; raises HostError and LaunchError."""
    try:
        done = subprocess.run(
            [path, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            cwd="/",
            env={**os.environ, "LC_ALL": "C", "LANG": "C", **environ},
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        command = " ".join([path, *args])
        raise HostError(path, f"no answer within {PROBE_TIMEOUT_S} s", f"try `{command}`") from err
    except OSError as err:
        status = 127 if isinstance(err, FileNotFoundError) else 126
        raise LaunchError(path, f"cannot be executed: {err.strerror}", "check the path of QEMU", exit_status=status) from err
    return os.fsdecode(done.stdout), os.fsdecode(done.stderr)


def _find_library_dirs(path: str, data_dirs: "Iterable[str]") -> "list[str]":
    """Find the directories outside the system's own that QEMU reads by itself, data_dirs aside."""
    directories = {os.path.dirname(name) for name in _shared_libraries(path)}
    program_dir = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(f"{program_dir}/qemu-bundle"):
        directories.add(program_dir)  # a build tree
    directories.update(_module_dirs(os.path.dirname(program_dir)))
    for data_dir in data_dirs:
        directories.update(_link_target_dirs(data_dir))
    return sorted(directory for directory in directories if not _is_system(directory))


def _shared_libraries(path: str) -> "set[str]":
    """Return the shared libraries and the linker of a program, as named and as they really are.

    Source: ld.so(8), LD_TRACE_LOADED_OBJECTS. A static program ignores it and prints its version.
    """
    names = set()
    for line in _run(path, "-version", LD_TRACE_LOADED_OBJECTS="1")[0].split("\n"):
        name = line.rpartition("=> ")[2].strip().rpartition(" (0x")[0]
        if name.startswith("/"):
            names |= {os.path.normpath(name), os.path.realpath(name)}
    return names


def _module_dirs(prefix: str) -> "list[str]":
    """Return the directories of QEMU's modules below a prefix: lib/qemu, lib64/qemu, lib/x86_64-linux-gnu/qemu."""
    candidates = []
    for library_dir in (f"{prefix}/lib", f"{prefix}/lib64"):
        candidates.append(f"{library_dir}/qemu")
        candidates += [f"{library_dir}/{name}/qemu" for name in _names_in(library_dir)]
    return [os.path.normpath(directory) for directory in candidates if os.path.isdir(directory)]


def _link_target_dirs(data_dir: str) -> "set[str]":
    """Return where the links in a data directory lead: other packages' firmware, the sources of a build tree."""
    if _is_system(data_dir):
        return set()
    paths = (f"{data_dir}/{name}" for name in _names_in(data_dir))
    return {os.path.dirname(os.path.realpath(path)) for path in paths if os.path.islink(path)}


def _names_in(directory: str) -> "list[str]":
    """List a directory; nothing if it cannot be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _is_system(directory: str) -> bool:
    """Tell whether a directory is in every view, or is the root and thus too much for any."""
    return directory == "/" or any(directory == system or directory.startswith(f"{system}/") for system in SYSTEM_DIRS)
