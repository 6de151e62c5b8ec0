"""Read and check our settings; off the launch path where there are none.

A launch seldom parses TOML (24 ms): the settings of a file that has not changed come from the cache, as the same strings
that `-userns` takes.
"""

import os
import stat

from qemu_userns.errors import UsageError
from qemu_userns.host import cache
from qemu_userns.host.subids import IdRange, parse_idmap, parse_span
from qemu_userns.plan.identity import CALLERS_NETWORK, NO_NETWORK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qemu_userns.host.config import Config

MAX_BYTES = 1 << 20
MIN_POOL = 65536  # one lease
CHOICES = {
    "fs": ("view", "host"),
    "require": ("landlock",),
}
WORDS = {"on": True, "yes": True, "true": True, "": True, "off": False, "no": False, "false": False}
TYPES = {
    "qemu": str,
    "fs": str,
    "net": str,
    "user": str,
    "pool": str,
    "idmap": list,
    "sandbox": str,
    "require": list,
    "off": bool,
    "notify": bool,
    "qmp": list,
    "qmp.socket": list,
    "qmp.monitor": list,
    "passthrough": str,
}
ABOUT_MONITORS = ("qmp", "qmp.socket", "qmp.monitor", "passthrough")
TAP = "tap."  # what a setting of a tap begins with
SHARES = "share."  # what a setting of a share begins with, before its name


def apply_settings(config: "Config", settings: "Mapping[str, list[str]]", where: str) -> "Config":
    """Return the settings with those of one place; raises UsageError."""
    changes: dict[str, object] = {}
    qemu = dict(config.qemu)
    taps = config.taps
    for key, values in settings.items():
        what = f"{where}: {key}"
        if _names_qemu(key):
            qemu[key[len("qemu.") :]] = _parse_path(values[0], what)
        elif key == "fs":
            changes[key] = _parse_choice(values[0], CHOICES[key], what)
        elif key == "net":
            changes[key] = _parse_network(values[0], what)
        elif key == "require":
            changes[key] = tuple(_parse_choice(value, CHOICES[key], what) for value in values)
        elif key == "user":
            changes[key] = _parse_user(values[0], what)
        elif key == "pool":
            changes[key] = _parse_pool(values[0], what)
        elif key == "idmap":
            changes[key] = parse_idmap("\n".join(values), what)
        elif key == "sandbox":
            changes[key] = _parse_sandbox(values[0], what)
        elif key in ("off", "notify"):
            changes[key] = _parse_switch(values[0], what)
        elif key.startswith(TAP):
            from qemu_userns.host.settings_taps import parse_tap

            changes["taps"] = taps = parse_tap(taps, key, values[0], what)
        elif not key.startswith(SHARES) and key not in ABOUT_MONITORS:
            raise UsageError(what, "there is no such setting", f"known are {', '.join(TYPES)}")
    config = config.replace(qemu=tuple(qemu.items()), **changes)
    if any(key.startswith(SHARES) for key in settings):
        from qemu_userns.host.settings_shares import apply_shares

        config = apply_shares(config, settings, where)
    if settings.keys().isdisjoint(ABOUT_MONITORS):
        return config
    from qemu_userns.host.settings_qmp import apply_qmp

    return apply_qmp(config, settings, where)


def expand_shares(pairs: "Sequence[tuple[str, str]]", where: str) -> "Sequence[tuple[str, str]]":
    """Return `-userns` pairs with `share=PATH,tag=T,...` as settings of that share; raises UsageError."""
    if all(key != "share" for key, _ in pairs):
        return pairs
    from qemu_userns.host.settings_shares import expand

    return expand(pairs, where)


def join_pairs(pairs: "Iterable[tuple[str, str]]") -> "dict[str, list[str]]":
    """Return `-userns` pairs as settings: the last one of a key counts, but for lists."""
    settings: dict[str, list[str]] = {}
    for key, value in pairs:
        values = settings.setdefault(key, [])
        if TYPES.get(key) is not list and not _lists_map(key):
            values.clear()  # the last one counts, as in QEMU
        values.append(_make_absolute(key, value))
    return settings


def _make_absolute(key: str, value: str) -> str:
    """Return the value of a `-userns` pair, a path from / on."""
    if value and _names_qemu(key):
        return os.path.abspath(value)
    is_path = key in ("qmp", "passthrough") or (key.startswith(SHARES) and key.endswith(".path"))
    return os.path.join(os.getcwd(), value) if value and is_path else value


def _names_qemu(key: str) -> bool:
    """Tell whether a setting is `qemu` or a member of the table `qemu`."""
    return key == "qemu" or key.startswith("qemu.")


def _lists_map(key: str) -> bool:
    """Tell whether a setting is the id map of a share."""
    return key.startswith(SHARES) and key.endswith(".idmap")


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


def _parse_network(text: str, what: str) -> str:
    """Check one of the words, or an absolute path; raises UsageError."""
    if text not in (CALLERS_NETWORK, NO_NETWORK) and not text.startswith("/"):
        hint = f"choose {CALLERS_NETWORK} or {NO_NETWORK}, or name a network namespace from / on, as in /run/netns"
        raise UsageError(what, f"'{text}' is not a choice", hint)
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


def _parse_user(text: str, what: str) -> str:
    """Check that a user is named, who need not exist where nobody asks; raises UsageError."""
    if text and text.isprintable():
        return text
    raise UsageError(what, f"'{text}' is no user", "name one that `getent passwd` lists, or write UID:GID")


def _parse_switch(text: str, what: str) -> bool:
    """Parse on or off; raises UsageError."""
    if text not in WORDS:
        raise UsageError(what, f"'{text}' is neither on nor off", "write on or off")
    return WORDS[text]


def load_settings(path: str, cache_dir: "str | None") -> "Mapping[str, list[str]]":
    """Load one file as flat settings, from the cache if it has not changed; raises UsageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
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
                settings[f"qemu.{name}"] = _flatten(program, (str,), f"{path}: qemu.{name}")
        elif key == "qmp":
            from qemu_userns.host.settings_qmp import encode_tables

            settings.update(encode_tables(value, path))
        elif key == "share":
            from qemu_userns.host.settings_shares import KEYS as SHARE_KEYS

            settings.update(_flatten_tables(value, key, SHARE_KEYS, path))
        elif key == "tap":
            from qemu_userns.host.settings_taps import KEYS as TAP_KEYS

            settings.update(_flatten_tables(value, key, TAP_KEYS, path))
        elif key in TYPES and "." not in key:
            settings[key] = _flatten(value, (TYPES[key],), f"{path}: {key}")
        else:
            raise UsageError(f"{path}: {key}", "there is no such setting", f"known are {', '.join(TYPES)}")
    return settings


def _flatten_tables(value: object, kind: str, keys: "Mapping[str, tuple[type, ...]]", path: str) -> "dict[str, list[str]]":
    """Write the tables [KIND.NAME] as flat settings KIND.NAME.KEY; raises UsageError.

    Args:
        value: the table of them.
        kind: its name.
        keys: of each of them, with the types that it may have.
        path: of the file.
    """
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise UsageError(f"{path}: {kind}", "is not a table of tables", f"write [{kind}.NAME]")
    settings: "dict[str, list[str]]" = {}
    for name, table in value.items():
        for key, entry in table.items():
            what = f"{path}: {kind}.{name}.{key}"
            if key not in keys or not name:
                raise UsageError(what, "there is no such setting", f"known are {', '.join(keys)}")
            settings[f"{kind}.{name}.{key}"] = _flatten(entry, keys[key], what)
    return settings


def _flatten(value: object, wanted: "tuple[type, ...]", what: str) -> "list[str]":
    """Write a value of one of some types as strings; raises UsageError."""
    if type(value) not in wanted:
        raise UsageError(what, f"is not a {wanted[0].__name__}", "correct its type")
    if isinstance(value, list):
        return [line for item in value for line in _flatten(item, (str,), what)[0].split("\n")]
    return ["on" if value else "off"] if isinstance(value, bool) else [str(value)]
