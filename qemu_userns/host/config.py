"""Our own settings: /etc/qemu-userns/config.toml, then the user's config.toml, then `-userns` or `qemu-userns run --key=value`.

Each later place overrides the earlier ones key by key; only the table `qemu` is joined. A launch seldom parses TOML
(24 ms): the settings of a file that has not changed come from the cache, as the same strings that `-userns` takes.
"""

import os
import stat

from qemu_userns.errors import UsageError
from qemu_userns.host import cache
from qemu_userns.host.subids import IdMapEntry, IdRange, parse_idmap, parse_span
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SYSTEM_CONFIG = "/etc/qemu-userns/config.toml"
MAX_BYTES = 1 << 20
MIN_POOL = 65536  # one lease
CHOICES = {
    "fs": ("view", "host"),
    "require": ("landlock",),
}
WORDS = {"on": True, "yes": True, "true": True, "": True, "off": False, "no": False, "false": False}
TYPES = {"qemu": str, "fs": str, "pool": str, "idmap": list, "sandbox": str, "require": list, "off": bool}


class Config(Record):
    """The settings."""

    qemu: "tuple[tuple[str, str], ...]" = ()  # name and path of a QEMU; name "" is any, its path may be a directory
    fs: str = "view"  # or "host": QEMU sees the whole host tree
    pool: "IdRange | None" = None  # where root leases from if /etc/subuid and /etc/subgid have nothing for it
    idmap: "tuple[IdMapEntry, ...]" = ()  # in addition to the identity's own
    sandbox: str = "auto"  # or "off", or the value of QEMU's -sandbox
    require: "tuple[str, ...]" = ()  # what must not be missing: "landlock"
    off: bool = False  # the real QEMU is executed as it is


def config_paths(environ: "Mapping[str, str]") -> "tuple[str, ...]":
    """Return the configuration files, the one with the last word last; they need not exist."""
    base = environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):
        home = environ.get("HOME", "")
        base = f"{home}/.config" if home.startswith("/") else ""
    return (SYSTEM_CONFIG, f"{base}/qemu-userns/config.toml") if base else (SYSTEM_CONFIG,)


def load_config(paths: "Iterable[str]", cache_dir: "str | None") -> Config:
    """Load the settings from files.

    Args:
        paths: the files; a later one overrides an earlier, an absent one says nothing.
        cache_dir: where parsed settings are kept, None for nowhere.

    Raises:
        UsageError: a file is not safe, not readable, not TOML, or has an unknown key or a wrong value.
    """
    config = Config()
    for path in paths:
        config = _apply(config, _load_settings(path, cache_dir), path)
    return config


def parse_userns_option(pairs: "Iterable[tuple[str, str]]", config: Config, where: str = "-userns") -> Config:
    """Override settings from the command line.

    Args:
        pairs: keys and values; `idmap` and `require` may be repeated, `off` may have an empty value.
        config: the settings so far.
        where: the option, for errors.

    Raises:
        UsageError: a key is unknown, a value wrong.
    """
    settings: dict[str, list[str]] = {}
    for key, value in pairs:
        values = settings.setdefault(key, [])
        if TYPES.get(key) is not list:
            values.clear()  # the last one counts, as in QEMU
        values.append(os.path.abspath(value) if value and _names_qemu(key) else value)
    return _apply(config, settings, where)


def configured_qemu(config: Config, name: str) -> "str | None":
    """Return the configured path of a QEMU, or a directory that has it; None if there is none."""
    paths = dict(config.qemu)
    return paths.get(name, paths.get(""))


def _apply(config: Config, settings: "Mapping[str, list[str]]", where: str) -> Config:
    """Return the settings with those of one place; raises UsageError."""
    changes: dict[str, object] = {}
    qemu = dict(config.qemu)
    for key, values in settings.items():
        what = f"{where}: {key}"
        if _names_qemu(key):
            qemu[key[len("qemu.") :]] = _parse_path(values[0], what)
        elif key == "fs":
            changes[key] = _parse_choice(values[0], CHOICES[key], what)
        elif key == "require":
            changes[key] = tuple(_parse_choice(value, CHOICES[key], what) for value in values)
        elif key == "pool":
            changes[key] = _parse_pool(values[0], what)
        elif key == "idmap":
            changes[key] = parse_idmap("\n".join(values), what)
        elif key == "sandbox":
            changes[key] = _parse_sandbox(values[0], what)
        elif key == "off":
            changes[key] = _parse_switch(values[0], what)
        else:
            raise UsageError(what, "there is no such setting", f"known are {', '.join(TYPES)}")
    return config.replace(qemu=tuple(qemu.items()), **changes)


def _names_qemu(key: str) -> bool:
    """Tell whether a setting is `qemu` or a member of the table `qemu`."""
    return key == "qemu" or key.startswith("qemu.")


def _parse_path(text: str, what: str) -> str:
    """Check an absolute path; raises UsageError."""
    if not text.startswith("/"):
        raise UsageError(what, f"'{text}' is not an absolute path", "name the program, or the directory that has it, from / on")
    return text


def _parse_choice(text: str, choices: "tuple[str, ...]", what: str) -> str:
    """Check one of several words; raises UsageError."""
    if text not in choices:
        raise UsageError(what, f"'{text}' is not a choice", f"choose from {', '.join(choices)}")
    return text


def _parse_pool(text: str, what: str) -> IdRange:
    """Parse START-END, the last id included; raises UsageError."""
    pool = parse_span(text)
    if pool is None or pool.start == 0 or pool.count < MIN_POOL:
        raise UsageError(what, f"'{text}' is not a range of {MIN_POOL} ids or more", "write START-END, e.g. 524288-1879048191")
    return pool


def _parse_sandbox(text: str, what: str) -> str:
    """Check a value for -sandbox; raises UsageError."""
    if text in ("auto", "off") or text.split(",")[0] in ("on", "enable=on"):
        return text
    raise UsageError(what, f"'{text}' is no value for -sandbox", "write auto, off, or on[,obsolete=allow][,spawn=allow]...")


def _parse_switch(text: str, what: str) -> bool:
    """Parse on or off; raises UsageError."""
    if text not in WORDS:
        raise UsageError(what, f"'{text}' is neither on nor off", "write on or off")
    return WORDS[text]


def _load_settings(path: str, cache_dir: "str | None") -> "Mapping[str, list[str]]":
    """Load one file as flat settings, from the cache if it has not changed; raises UsageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as err:
        if not _can_see(path):  # a HOME that was another user's: nothing is known to be there
            return {}
        raise UsageError(path, "cannot be opened: Permission denied", "make it readable, or remove it") from err
    except OSError as err:
        raise UsageError(path, f"cannot be opened: {err.strerror}", "make it readable, or remove it") from err
    try:
        status = os.fstat(fd)
        _check_file(path, status)
        settings = cache.load(cache_dir, "config", status)
        if settings is None:
            settings = _parse_toml(os.pread(fd, MAX_BYTES, 0), path)
            cache.store(cache_dir, "config", status, settings)
        return settings
    except OSError as err:
        raise UsageError(path, f"cannot be read: {err.strerror}") from err
    finally:
        os.close(fd)


def _can_see(path: str) -> bool:
    """Tell whether the directory of a file can be searched."""
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def _check_file(path: str, status: os.stat_result) -> None:
    """Raise UsageError if somebody else can decide what the file says."""
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(path, "is not a regular file", "replace it by a TOML file")
    if status.st_uid not in (0, os.geteuid()):
        raise UsageError(path, f"belongs to uid {status.st_uid}", f"chown {os.geteuid()} {path}")
    if status.st_mode & stat.S_IWOTH:
        raise UsageError(path, "everybody may write it", f"chmod o-w {path}")
    if status.st_size >= MAX_BYTES:
        raise UsageError(path, f"is larger than {MAX_BYTES} bytes", "shorten it")


def _parse_toml(data: bytes, path: str) -> "dict[str, list[str]]":
    """Parse a file into flat settings; raises UsageError."""
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as err:
        raise UsageError(path, f"is not TOML: {err}", "see https://toml.io") from err
    settings: dict[str, list[str]] = {}
    for key, value in document.items():
        if key == "qemu" and isinstance(value, dict):
            for name, program in value.items():
                settings[f"qemu.{name}"] = _flatten(program, str, f"{path}: qemu.{name}")
        elif key in TYPES:
            settings[key] = _flatten(value, TYPES[key], f"{path}: {key}")
        else:
            raise UsageError(f"{path}: {key}", "there is no such setting", f"known are {', '.join(TYPES)}")
    return settings


def _flatten(value: object, wanted: type, what: str) -> "list[str]":
    """Write a value as strings; raises UsageError."""
    if type(value) is not wanted:
        raise UsageError(what, f"is not a {wanted.__name__}", "correct its type")
    if isinstance(value, list):
        return [line for item in value for line in _flatten(item, str, what)[0].split("\n")]
    return ["on" if value else "off"] if isinstance(value, bool) else [str(value)]
