"""Read and check the settings about shares; off the launch path where there are none.

`share=PATH,tag=T,driver=9p,map=MAP` in `-userns` and `run` says the same as the keys `share.T.path`, `share.T.driver` and
`share.T.idmap`, and the table [share.T] of a file.
"""

from qemu_userns.cmdline.opts import parse_opts
from qemu_userns.errors import UsageError
from qemu_userns.host.subids import parse_idmap
from qemu_userns.plan.added_shares import DRIVERS, MODELS, AddedShare
from qemu_userns.plan.identity import MapEntry
from qemu_userns.plan.idmaps import SHARE_KINDS, ShareMap, find_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qemu_userns.cmdline.objects import Object
    from qemu_userns.host.config import Config

PREFIX = "share."
KEYS: "dict[str, tuple[type, ...]]" = {
    "idmap": (list,),
    "path": (str,),
    "driver": (str,),
    "readonly": (bool,),
    "security_model": (str,),
}
_SPELLED = {"driver": "driver", "map": "idmap", "readonly": "readonly", "security_model": "security_model"}
_TAG_MAX_BYTES = 31  # virtio-9p's MAX_TAG_LEN with its NUL
_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def split_key(key: str) -> "tuple[str, str]":
    """Return the share's name and its member that a setting is about; a name may have dots."""
    name, _, member = key.removeprefix(PREFIX).rpartition(".")
    return name, member


def split_option(value: str) -> "tuple[tuple[str, str], ...]":
    """Return what stands behind `--share=` as pairs, the first of which is `share`."""
    return tuple((member.key, member.value) for member in parse_opts(value, implied="share"))


def expand(pairs: "Iterable[tuple[str, str]]", where: str) -> "list[tuple[str, str]]":
    """Return pairs with `share` and what follows it as settings of their own; raises UsageError."""
    found: "list[tuple[str, str]]" = []
    share: "list[tuple[str, str]]" = []
    for key, value in pairs:
        if key == "share":
            found += _name(share, where)
            share = [("path", value)]
        elif share and (key == "tag" or key in _SPELLED):
            share.append((_SPELLED.get(key, key), value))
        else:
            found.append((key, value))
    return found + _name(share, where)


def apply_shares(config: "Config", settings: "Mapping[str, list[str]]", where: str) -> "Config":
    """Return the settings with what one place says of shares; raises UsageError."""
    maps, shares = config.share_maps, {share.tag: share for share in config.shares}
    for key, values in settings.items():
        if not key.startswith(PREFIX):
            continue
        name, member = split_key(key)
        what = f"{where}: {key}"
        if not name or member not in KEYS:
            raise UsageError(what, "there is no such setting", f"known are {', '.join(f'share.NAME.{known}' for known in KEYS)}")
        if member == "idmap":
            maps = (*maps, _parse_map(name, values, what))
        else:
            shares[name] = _change(shares.get(name, AddedShare(name)), member, values[0], what)
    return config.replace(share_maps=maps, shares=tuple(shares.values()))


def check_shares(config: "Config", objects: "Sequence[Object]") -> None:
    """Refuse shares whose settings, of all places together, do not go with each other or with the command line's objects.

    Raises:
        UsageError: they do not.
    """
    taken = frozenset().union(*(find_names(obj, objects) for obj in objects if obj.kind in SHARE_KINDS))
    for share in config.shares:
        what = f"share {share.tag}"
        if not share.path:
            raise UsageError(what, "has no path", f"give share.{share.tag}.path, or -userns share=PATH,tag={share.tag}")
        if len(share.tag.encode(errors="surrogateescape")) > _TAG_MAX_BYTES:
            raise UsageError(what, f"its tag is longer than the {_TAG_MAX_BYTES} bytes that a guest can be told", "shorten it")
        if share.by_virtiofs and share.model != AddedShare.model:
            hint = f"use security_model={AddedShare.model}, or driver=9p"
            raise UsageError(what, f"virtiofsd has no security_model={share.model}", hint)
        if share.tag in taken:
            raise UsageError(what, "the command line has a share of that name already", "give one of them another tag")


def _name(members: "list[tuple[str, str]]", where: str) -> "list[tuple[str, str]]":
    """Return the members of one share as settings, which have its tag in their keys; raises UsageError."""
    if not members:
        return []
    tag = next((value for key, value in reversed(members) if key == "tag"), "")
    if not tag:
        raise UsageError(f"{where}: share={members[0][1]}", "has no tag", "name it for the guest: share=PATH,tag=NAME")
    return [(f"{PREFIX}{tag}.{key}", value) for key, value in members if key != "tag"]


def _change(share: AddedShare, member: str, value: str, what: str) -> AddedShare:
    """Return a share with one of its members set; raises UsageError."""
    if member == "path":
        if not value.startswith("/"):
            raise UsageError(what, f"'{value}' is not an absolute path", "name the directory from / on")
        return share.replace(path=value)
    if member == "readonly":
        if value not in _SWITCHES:
            raise UsageError(what, f"'{value}' is neither on nor off", "write on or off")
        return share.replace(readonly=_SWITCHES[value])
    choices = DRIVERS if member == "driver" else MODELS
    if value not in choices:
        raise UsageError(what, f"'{value}' is not a choice", f"choose from {', '.join(choices)}")
    return share.replace(driver=value) if member == "driver" else share.replace(model=value)


def _parse_map(name: str, values: "list[str]", what: str) -> ShareMap:
    """Parse the id map of a share; raises UsageError."""
    entries = parse_idmap("\n".join(values), what)
    uids = tuple(MapEntry(entry.inside, entry.outside, entry.count) for entry in entries if entry.kind in ("uid", "both"))
    gids = tuple(MapEntry(entry.inside, entry.outside, entry.count) for entry in entries if entry.kind in ("gid", "both"))
    if not uids or not gids:
        raise UsageError(what, "maps uids or gids alone, and a file has both", "write `both HOST GUEST`, or add the other ones")
    return ShareMap(name, uids, gids)
