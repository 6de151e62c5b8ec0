"""Our own settings: of /etc/qemu-userns/config.toml, the user's config.toml, the environment, `qemu-userns run` and `-userns`.

Each later place overrides the earlier ones key by key; only the table `qemu` is joined, and `qmp` adds.
What reads and checks them (settings.py) is loaded only where there are any.
"""

import os

from qemu_userns.plan.identity import CALLERS_NETWORK
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qemu_userns.host.subids import IdMapEntry, IdRange
    from qemu_userns.plan.added_shares import AddedShare
    from qemu_userns.plan.grants import TapSettings
    from qemu_userns.plan.idmaps import ShareMap
    from qemu_userns.plan.rights import MonitorRights, SocketRights

SYSTEM_CONFIG = "/etc/qemu-userns/config.toml"


class Config(Record):
    """The settings."""

    qemu: "tuple[tuple[str, str], ...]" = ()  # name and path of a QEMU; name "" is any, its path may be a directory
    fs: str = "view"  # or "host": QEMU sees the whole host tree
    net: str = CALLERS_NETWORK  # or NO_NETWORK, or the path of a network namespace
    user: str = ""  # whom root's QEMU becomes where the command line names nobody
    pool: "IdRange | None" = None  # where root leases from if /etc/subuid and /etc/subgid have nothing for it
    idmap: "tuple[IdMapEntry, ...]" = ()  # in addition to the identity's own
    sandbox: str = "auto"  # or "off", or the value of QEMU's -sandbox
    require: "tuple[str, ...]" = ()  # what must not be missing: "landlock"
    off: bool = False  # the real QEMU is executed as it is
    sockets: "tuple[SocketRights, ...]" = ()  # QMP sockets of ours, in addition to the command line's
    monitors: "tuple[MonitorRights, ...]" = ()  # what clients of the command line's QMP monitors may do
    share_maps: "tuple[ShareMap, ...]" = ()  # id maps of single shares; the last one that names a share counts
    taps: "tuple[TapSettings, ...]" = ()  # of taps that are made for the VM, one for each name
    shares: "tuple[AddedShare, ...]" = ()  # that are added to the command line
    notify: bool = False  # the service manager is told of QEMU's state
    passthrough: str = ""  # path of a socket of QEMU's own monitor; may hold %n, %u and %%


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
        if os.path.exists(path):  # not so where its directory cannot be searched: a HOME that was another user's
            from qemu_userns.host.settings import apply_settings, load_settings

            config = apply_settings(config, load_settings(path, cache_dir), path)
    return config


def parse_userns_option(pairs: "Iterable[tuple[str, str]]", config: Config, where: str = "-userns") -> Config:
    """Override settings from the command line.

    Args:
        pairs: keys and values; `idmap`, `require` and `qmp` may be repeated, `off` may have an empty value.
        config: the settings so far.
        where: the option, for errors.

    Raises:
        UsageError: a key is unknown, a value wrong.
    """
    given = list(pairs)
    if not given:
        return config
    from qemu_userns.host.settings import apply_settings, expand_shares, join_pairs

    return apply_settings(config, join_pairs(expand_shares(given, where)), where)


def configured_qemu(config: Config, name: str) -> "str | None":
    """Return the configured path of a QEMU, or a directory that has it; None if there is none."""
    paths = dict(config.qemu)
    return paths.get(name, paths.get(""))
