"""Learn what must be known of a QEMU by running it: only when the cache does not know (qemu.py), so off the launch path."""

import os
import subprocess

from qemu_userns.cmdline.table import parse_help
from qemu_userns.errors import HostError, LaunchError
from qemu_userns.host.qemu import parse_version, search_paths, split_path

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


def _run(path: str, *args: str, cwd: str = "/", **environ: str) -> "tuple[str, str]":
    """Run QEMU; return its stdout and stderr, whatever its exit status; raises HostError and LaunchError."""
    try:
        done = subprocess.run(
            [path, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            cwd=cwd,
            env={**os.environ, **search_paths(os.environ), "LC_ALL": "C", "LANG": "C", **environ},
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
    searched = search_paths(os.environ)
    directories = _library_dirs(_run(path, "-version", LD_TRACE_LOADED_OBJECTS="1")[0])
    # Whole: libraries open others late and by name, plugins of theirs too.
    directories.update(filter(_has_libraries, split_path(searched.get("LD_LIBRARY_PATH", ""))))
    program_dir = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(f"{program_dir}/qemu-bundle"):
        directories.add(program_dir)  # a build tree
    prefix = os.path.dirname(program_dir)
    if os.path.isdir(f"{prefix}/etc/qemu"):
        directories.add(f"{prefix}/etc/qemu")
    module_dirs = {*_module_dirs(prefix), *filter(os.path.isdir, [searched.get("QEMU_MODULE_DIR", "")])}
    for module_dir in module_dirs:
        directories.update(_library_dirs(_trace_modules(path, module_dir)))
    for linking_dir in (*data_dirs, *module_dirs):
        directories.update(_link_target_dirs(linking_dir))
    directories |= module_dirs
    return sorted(directory for directory in directories if not _is_system(directory))


def _library_dirs(trace: str) -> "set[str]":
    """Return where the shared libraries and the linker of a trace are, as named and as they really are.

    Source: ld.so(8), LD_TRACE_LOADED_OBJECTS. A static program ignores it and prints its version.
    """
    directories = set()
    for line in trace.split("\n"):
        name = line.rpartition("=> ")[2].strip().rpartition(" (0x")[0]
        if name.startswith("/"):
            directories |= {os.path.dirname(os.path.normpath(name)), os.path.dirname(os.path.realpath(name))}
    return directories


def _trace_modules(path: str, module_dir: str) -> str:
    """Trace the libraries of the modules of a directory, all at once: QEMU opens them late, but as if they were preloaded.

    Nothing of them is executed. LD_PRELOAD separates names by spaces and colons, which a directory's name may have.
    """
    names = [f"./{name}" for name in _names_in(module_dir) if name.endswith(".so") and " " not in name and ":" not in name]
    if _is_system(module_dir) or not names or not os.access(module_dir, os.X_OK):
        return ""
    return _run(path, "-version", cwd=module_dir, LD_TRACE_LOADED_OBJECTS="1", LD_PRELOAD=" ".join(names))[0]


def _has_libraries(directory: str) -> bool:
    """Tell whether there are shared libraries in a directory."""
    return any(name.endswith(".so") or ".so." in name for name in _names_in(directory))


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
    directory = os.path.normpath(directory)
    return directory == "/" or any(directory == system or directory.startswith(f"{system}/") for system in SYSTEM_DIRS)
