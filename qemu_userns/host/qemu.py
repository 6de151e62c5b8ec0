"""Finds the real QEMU and learns what must be known of it.

A warm launch asks the cache only. A cold one runs QEMU a few times (-version, -help, -L help), and its dynamic linker once.
"""

import os

from qemu_userns.errors import HostError, LaunchError
from qemu_userns.host import cache
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER = b"qemu-userns drop-in"  # in the first bytes of each entry that `qemu-userns install` makes
MARKER_WITHIN = 256
DIVERTED = ".distrib"  # what dpkg-divert(1) adds to the name of a program that an entry stands in for


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
    if invoked is not None and _is_program(invoked + DIVERTED):
        return invoked + DIVERTED
    for directory in path_env.split(":"):
        path = os.path.abspath(os.path.join(directory, name))
        if _is_program(path) and not is_own_entry(path, invoked):
            return path
        if _is_program(path + DIVERTED):
            return path + DIVERTED
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
    identity = [path, *(f"{name}={value}" for name, value in search_paths(os.environ).items())]
    facts = cache.load(cache_dir, "qemu", status)
    if facts is None or facts.get("identity") != identity:
        from qemu_userns.host.qemu_probe import run_probes

        facts = {"identity": identity, **run_probes(path)}
        cache.store(cache_dir, "qemu", status, facts)
    version_text = facts["version"][0]
    return QemuFacts(
        path=path,
        version=parse_version(version_text),
        version_text=version_text,
        sandbox=bool(facts["sandbox"]),
        options=tuple([(option, True) for option in facts["valued"]] + [(option, False) for option in facts["bare"]]),
        data_dirs=tuple(facts["data_dirs"]),
        library_dirs=tuple(facts["library_dirs"]),
    )


def search_paths(environ: "Mapping[str, str]") -> "dict[str, str]":
    """Return the variables that say where QEMU's libraries and modules are, with absolute paths.

    An empty entry of LD_LIBRARY_PATH, mostly a stray colon, is left out: it means the working directory, which no view shows.
    """
    found = {name: environ[name] for name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "QEMU_MODULE_DIR") if environ.get(name)}
    if "LD_LIBRARY_PATH" in found:
        found["LD_LIBRARY_PATH"] = ":".join(_absolute(entry) for entry in split_path(found["LD_LIBRARY_PATH"]))
    if "QEMU_MODULE_DIR" in found:
        found["QEMU_MODULE_DIR"] = _absolute(found["QEMU_MODULE_DIR"])
    return found


def split_path(text: str) -> "list[str]":
    """Return the entries of LD_LIBRARY_PATH without the empty ones; ld.so(8) takes colons and semicolons."""
    return [entry for entry in text.replace(";", ":").split(":") if entry]


def _absolute(path: str) -> str:
    """Return an absolute path, with its ".." as they are (a symlink may come before one) and the linker's own $ORIGIN."""
    return path if path.startswith(("/", "$")) else os.path.join(os.getcwd(), path)


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


def parse_version(text: str) -> "tuple[int, ...]":
    """Parse `QEMU emulator version 7.2.22 (...)`; empty if it is not that."""
    words = text.split()
    if words[:3] != ["QEMU", "emulator", "version"]:
        return ()
    number = "".join(words[3:4])
    number = number[: len(number) - len(number.lstrip("0123456789."))]
    return tuple(int(part) for part in number.split(".") if part)
