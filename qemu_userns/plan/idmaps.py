"""Id maps of shares: which host id a guest's id is on disk. Pure.

A guest's id becomes a host id in two steps: QEMU's user namespace makes an outside id of it, and an idmapped mount
(mount_setattr(2), "ID-mapped mounts") makes the id on disk of that. So every share can have a map of its own, and the outside
ids between never reach a disk. What is in no map has the overflow id 65534 in the guest, and cannot be made (EOVERFLOW).
"""

from qemu_userns.plan.grants import Bind
from qemu_userns.plan.identity import MapEntry, MountMap
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import Object
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PathFact
    from qemu_userns.plan.identity import Identity

SHARE_KINDS = ("fsdev", "virtfs")
MAPPABLE = ("passthrough", "none")  # security models that keep the guest's ids as those of the files


class ShareMap(Record):
    """What the settings say of one share; of its entries, `inside` is the guest's id and `outside` the one on disk."""

    name: str  # the id of a -fsdev, or a mount tag
    uid_map: "tuple[MapEntry, ...]"
    gid_map: "tuple[MapEntry, ...]"

    def describe(self) -> str:
        """Say it in one line."""
        if self.uid_map == self.gid_map:
            return f"guest's {_join(self.uid_map)} on disk"
        return f"guest's uid {_join(self.uid_map)}, gid {_join(self.gid_map)} on disk"


def find_names(share: "Object", objects: "Iterable[Object]") -> "frozenset[str]":
    """Return what a share is called: its id, and the mount tags of the devices that serve it."""
    tags = {share.get("mount_tag"), share.id}
    if share.kind == "fsdev":
        tags |= {obj.get("mount_tag") for obj in objects if obj.kind == "device" and obj.get("fsdev") == share.id}
    return frozenset(tag for tag in tags if tag)


def find_map(maps: "Sequence[ShareMap]", share: "Object", objects: "Iterable[Object]") -> "ShareMap | None":
    """Return the map of a share, None where the settings say nothing of it; the last one that names it counts."""
    names = find_names(share, objects)
    return next((found for found in reversed(maps) if found.name in names), None)


def build_mount_map(share: ShareMap, identity: "Identity") -> MountMap:
    """Return the map of the mount through which QEMU's outside ids become those on disk."""
    return MountMap(
        tuple(_translate(share.uid_map, identity.uid_map)),
        tuple(_translate(share.gid_map, identity.gid_map)),
        share.describe(),
    )


def find_unmapped(share: ShareMap, identity: "Identity") -> "int | None":
    """Return the first guest id of a share's map that QEMU's user namespace does not have."""
    for wanted, has in ((share.uid_map, identity.uid_map), (share.gid_map, identity.gid_map)):
        for entry in wanted:
            ends = sorted((e.inside, e.inside + e.count) for e in has)
            first = entry.inside
            for start, end in ends:
                if start <= first < end:
                    first = end
            if first < entry.inside + entry.count:
                return first
    return None


def choose_map(draft: "Draft", need: "Need", fact: "PathFact") -> "MountMap | None":
    """Return the map of the mount that shows a share's root, None where it needs none; refuse what cannot be.

    Args:
        draft: of the plan.
        need: the share.
        fact: of its root.
    """
    what = f"{need.describe()} {need.path}"
    share = find_map(draft.share_maps, need.obj, draft.objects)
    found = None if share is None else build_map(draft, what, need.obj.get("security_model") or "", share)
    for grant in draft.grants:
        if isinstance(grant, Bind) and grant.path == fact.real and grant.why.startswith(need.describe()) and grant.idmap != found:
            draft.refuse(what, "two shares of one directory have different id maps", "share it once, or give both the same map")
    if found is not None and fact.real == "/":
        draft.refuse(what, "the whole host tree cannot be shown with other ids", "share a directory of it")
    return found


def build_map(draft: "Draft", what: str, model: str, share: ShareMap) -> "MountMap | None":
    """Return the map of a share's mount, None where QEMU's own namespace has it; refuse what cannot be.

    Args:
        draft: of the plan.
        what: names the share.
        model: its security model.
        share: what the settings say of it.
    """
    missing = find_unmapped(share, draft.identity)
    if model not in MAPPABLE:
        draft.refuse(what, f"security_model={model} keeps the guest's ids beside the files", "an id map goes with passthrough")
    elif any(entry.outside == 0 for entry in (*share.uid_map, *share.gid_map)):
        draft.refuse(what, "host root is in its id map", "host root is never mapped; leave host id 0 out")
    elif missing is not None:
        draft.refuse(
            what,
            f"guest id {missing} is in its id map, and not in QEMU's user namespace",
            "give QEMU's user more subordinate ids (usermod --add-subuids, --add-subgids)",
        )
    else:
        found = build_mount_map(share, draft.identity)
        if all(entry.inside == entry.outside for entry in (*found.uid_map, *found.gid_map)):
            draft.notes.append(f"{what}: {share.describe()}, by QEMU's own user namespace")
        elif draft.identity.switch:
            return found
        else:
            draft.refuse(what, "only root can give a share another id map than the VM's", "run it as root with -run-with user=")
    return None


def _translate(share: "Iterable[MapEntry]", own: "Iterable[MapEntry]") -> "Iterator[MapEntry]":
    """Yield the entries from the ids on disk to QEMU's outside ids."""
    own = tuple(own)
    for wanted in share:
        for entry in own:
            first = max(wanted.inside, entry.inside)
            last = min(wanted.inside + wanted.count, entry.inside + entry.count)
            if first < last:
                yield MapEntry(wanted.outside + first - wanted.inside, entry.outside + first - entry.inside, last - first)


def _join(entries: "Iterable[MapEntry]") -> str:
    return ", ".join(entry.describe() for entry in entries) or "none"
