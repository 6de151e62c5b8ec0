"""Finds the real QEMU and learns what must be known of it.

A warm launch asks the cache only. A cold one runs QEMU a few times (-version, -help, -L help), and its dynamic linker once.
"""

import os

from qemu_userns.errors import HostError, LaunchError
from qemu_userns.host import cache
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MARKER = b"qemu-userns drop-in"  # in the first bytes of each entry that `qemu-userns install` makes
MARKER_WITHIN = 256
PROBE_TIMEOUT_S = 20
SYSTEM_DIRS = ("/usr", "/lib", "/lib32", "/lib64", "/libx32")  # in every view


class QemuFacts(Record):
    """What is known of one QEMU program."""

    path: str
    version: "tuple[int, ...]"  # (7, 2, 22)
    version_text: str  # the first line of -version
    sandbox: bool  # built with -sandbox
    options: "tuple[tuple[str, bool], ...]"  # from -help: name, and whether a value follows
    data_dirs: "tuple[str, ...]"  # from -L help
    library_dirs: "tuple[str, ...]"  # outside the system's directories: shared libraries, modules, targets of links in data_dirs


def find_qemu(name: str, path_env: str, invoked: "str | None" = None, configured: "str | None" = None) -> str:
    """Find the real QEMU.

    Args:
        name: qemu-system-x86_64, or a path with a slash, which is then the one.
        path_env: PATH.
        invoked: the script that was started, which cannot be the one.
        configured: the program, or a directory that has it, from our configuration.

    Returns:
        An absolute path.

    Raises:
        HostError: there is none, or only one of our own entries.
    """
    if configured is not None:
        path = os.path.join(configured, name) if os.path.isdir(configured) else configured
        return _check_program(path, invoked, "correct `qemu` in the configuration of qemu-userns")
    if "/" in name:
        return _check_program(name, invoked, "name a QEMU that is not a drop-in entry of qemu-userns")
    for directory in path_env.split(":"):
        path = os.path.abspath(os.path.join(directory, name))
        if _is_program(path) and not is_own_entry(path, invoked):
            return path
    raise HostError(name, "no QEMU of this name in PATH", "install it (qemu-system-*), or set `qemu` in the configuration")


def is_own_entry(path: str, invoked: "str | None" = None) -> bool:
    """Tell whether a program is a drop-in entry of ours, or the very script that was started."""
    try:
        if invoked is not None and os.path.samefile(path, invoked):
            return True
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # ours can be read
    try:
        return MARKER in os.read(fd, MARKER_WITHIN)
    except OSError:
        return False
    finally:
        os.close(fd)


def probe_qemu(path: str, cache_dir: "str | None") -> QemuFacts:
    """Learn what must be known of a QEMU; runs it unless the cache knows.

    Args:
        path: an absolute path.
        cache_dir: where to keep the facts, None for nowhere.

    Raises:
        HostError: it does not work, or is no QEMU.
        LaunchError: it cannot be executed.
    """
    try:
        status = os.stat(path)
    except OSError as err:
        raise LaunchError(path, str(err.strerror), "check the path of QEMU", exit_status=127) from err
    identity = [path, os.environ.get("LD_LIBRARY_PATH", "")]
    facts = cache.load(cache_dir, "qemu", status)
    if facts is None or facts.get("identity") != identity:
        facts = {"identity": identity, **_run_probes(path)}
        cache.store(cache_dir, "qemu", status, facts)
    version_text = facts["version"][0]
    return QemuFacts(
        path=path,
        version=_parse_version(version_text),
        version_text=version_text,
        sandbox=bool(facts["sandbox"]),
        options=tuple([(option, True) for option in facts["valued"]] + [(option, False) for option in facts["bare"]]),
        data_dirs=tuple(facts["data_dirs"]),
        library_dirs=tuple(facts["library_dirs"]),
    )


def _check_program(path: str, invoked: "str | None", hint: str) -> str:
    """Return the absolute path of a program that was asked for; raises HostError."""
    if not _is_program(path):
        raise HostError(path, "is not an executable file", hint)
    if is_own_entry(path, invoked):
        raise HostError(path, "is an entry of qemu-userns, not QEMU", hint)
    return os.path.abspath(path)


def _is_program(path: str) -> bool:
    """Tell whether the caller may execute a file."""
    return os.path.isfile(path) and os.access(path, os.X_OK)


def _run_probes(path: str) -> "cache.Facts":
    """Gather the facts by running QEMU; raises HostError and LaunchError."""
    from qemu_userns.cmdline.table import parse_help

    # Options are handled in their order: a QEMU built without seccomp exits at -sandbox, with nothing on stdout.
    version = _run(path, "-sandbox", "on", "-version")[0]
    sandbox = bool(_parse_version(version))
    errors = ""
    if not sandbox:
        version, errors = _run(path, "-version")
    if not _parse_version(version):
        raise HostError(path, f"does not work as QEMU: {(errors or version).strip()[:200]}", f"try `{path} -version`")
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
    import subprocess

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


def _parse_version(text: str) -> "tuple[int, ...]":
    """Parse `QEMU emulator version 7.2.22 (...)`; empty if it is not that."""
    words = text.split()
    if words[:3] != ["QEMU", "emulator", "version"]:
        return ()
    number = "".join(words[3:4])
    number = number[: len(number) - len(number.lstrip("0123456789."))]
    return tuple(int(part) for part in number.split(".") if part)


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
