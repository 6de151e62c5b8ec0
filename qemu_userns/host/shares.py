"""Find out where the id maps of shares have to be: in idmapped mounts, or in QEMU's own user namespace."""

import os

from qemu_userns.errors import HostError, ResourceError, UsageError
from qemu_userns.host.idmap import map_mount
from qemu_userns.host.opening import clone_bind
from qemu_userns.plan.identity import MapEntry, MountMap
from qemu_userns.plan.idmaps import MAPPABLE, SHARE_KINDS, find_map, find_names
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from qemu_userns.cmdline.objects import Object
    from qemu_userns.plan.added_shares import AddedShare
    from qemu_userns.plan.facts import StandIn
    from qemu_userns.plan.idmaps import ShareMap

_TRIAL = MountMap((MapEntry(1, 1, 1),), (MapEntry(1, 1, 1),), "")


class Mapped(Record):
    """That shares have id maps."""

    own: "ShareMap | None"  # the one that QEMU's user namespace has to have, because no idmapped mount can


def check_names(keys: "Iterable[str]", objects: "Sequence[Object]", added: "Sequence[AddedShare]") -> None:
    """Refuse a setting for a share that the command line does not have.

    Args:
        keys: of the settings beside the command line; a configuration file may have some for the shares of other VMs.
        objects: of the command line.
        added: shares of the settings' own.

    Raises:
        UsageError: there is no such share.
    """
    named = (find_names(share, objects) for share in objects if share.kind in SHARE_KINDS)
    known = frozenset(share.tag for share in added).union(*named)
    for key in keys:
        name = key.removeprefix("share.").rpartition(".")[0]
        if key.startswith("share.") and key.endswith(".idmap") and name not in known:
            names = f"there are {', '.join(sorted(known))}" if known else "there is none"
            raise UsageError(key, "no share of this command line has that id or mount tag", names)


def list_mapped(
    objects: "Sequence[Object]",
    maps: "Sequence[ShareMap]",
    stand_ins: "Mapping[Object, StandIn]",
    added: "Sequence[AddedShare]" = (),
) -> "Iterator[tuple[ShareMap, str]]":
    """Yield the shares of a command line that have maps, by the settings or by their stand-ins, and the paths of their roots."""
    for share in objects:
        found = find_map(maps, share, objects) if share.kind in SHARE_KINDS else None
        path = stand_ins[share].path if share in stand_ins else share.get("path")
        if found is not None and path and (share in stand_ins or share.get("security_model") in MAPPABLE):
            yield found, path
    for own in added:
        found = next((found for found in reversed(maps) if found.name == own.tag), None)
        if found is not None and own.by_virtiofs and not own.by_9p:
            yield found, own.path


def find_mapped(shares: "Iterable[tuple[ShareMap, str]]", root: bool) -> "Mapped | None":
    """Find out where the maps have to be; None where no share has one.

    Should: run with the caller's rights.

    Args:
        shares: those with maps, and the paths of their roots.
        root: whether the caller can make idmapped mounts.

    Raises:
        HostError: that would have to be two maps.
        UsageError: the same, for an unprivileged caller.
    """
    own: "ShareMap | None" = None
    mapped = False
    for found, path in shares:
        mapped = True
        if root and _can_map(path):
            continue
        if own is None:
            own = found
        elif (own.uid_map, own.gid_map) != (found.uid_map, found.gid_map):
            what = f"share {found.name}: {path}"
            if not root:
                raise UsageError(what, f"has another id map than {own.name}", "only root can give each share its own")
            raise HostError(
                what,
                f"its file system {_find_type(path)} cannot be idmapped, and QEMU's own ids follow the map of {own.name} already",
                "give both the same map, or move one to ext4, xfs, btrfs or tmpfs",
            )
    return Mapped(own) if mapped else None


def _can_map(path: str) -> bool:
    """Say whether an idmapped mount of a path can be made, by making one; a path that is not there is the plan's to refuse."""
    try:
        fd = clone_bind(os.path.realpath(path), None)
    except ResourceError:
        return True
    try:
        map_mount(fd, _TRIAL, False, path)
    except HostError:
        return False
    finally:
        os.close(fd)
    return True


def _find_type(path: str) -> str:
    """Return the type of the file system that a path is on: proc_pid_fdinfo(5) and proc_pid_mountinfo(5)."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            (number,) = (line.split()[1] for line in info if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
    with open("/proc/self/mountinfo") as mounts:
        return next((line.split(" - ", 1)[1].split()[0] for line in mounts if line.split()[0] == number), "")
