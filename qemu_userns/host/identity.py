"""Decide who QEMU is outside, from the caller, the options and the host's subordinate ids."""

from qemu_userns.errors import HostError, UsageError
from qemu_userns.host.subids import IdRange, find_ranges, find_unshared_ranges, intersect_ranges
from qemu_userns.plan.identity import DIRECT, NEWIDMAP, SELF, Identity, MapEntry, build_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.host.config import Config
    from qemu_userns.host.leases import Lease
    from qemu_userns.host.shares import Mapped
    from qemu_userns.plan.facts import Account, Caller
    from qemu_userns.plan.idmaps import ShareMap

SUBUID, SUBGID = "/etc/subuid", "/etc/subgid"
RUN_DIR = "/run/qemu-userns"


def find_identity(
    caller: "Caller",
    user: "Account | None",
    config: "Config",
    preferred: str,
    preview: bool,
    mapped: "Mapped | None" = None,
) -> "tuple[Identity, Lease | None]":
    """Find the identity of a VM.

    Args:
        caller: who starts it.
        user: whom -runas or -run-with user= names, None without.
        config: extra map entries and the pool of leases.
        preferred: the VM's uuid or name, so that it gets the same leased ids again.
        preview: whether to say only which ids would be leased first.
        mapped: that shares have id maps, None where none has.

    Returns:
        The identity; and for a root caller the lease, whose fd is owned, where no user is named, or one without ids for the
        guest's users in the map of a share.

    Raises:
        HostError: the files of subordinate ids are broken, or no ids can be leased.
        UsageError: an unprivileged caller names another user.
    """
    own = None if mapped is None else mapped.own
    identity, lease = _find(caller, user, config, preferred, preview, mapped is not None and own is None)
    return (identity if own is None else _follow(identity, own)), lease


def _find(
    caller: "Caller", user: "Account | None", config: "Config", preferred: str, preview: bool, needs_ids: bool
) -> "tuple[Identity, Lease | None]":
    """Find the identity as if no share's map had to be its own; `needs_ids` is for the guest's users in the maps of others."""
    if not caller.root:
        if user is not None and user.uid != caller.account.uid:
            raise UsageError(f"user {user.name}", "only root can run QEMU as another user")
        return _find_own(caller.account, config), None
    if user is not None:
        found = _build(user, user.groups, *_subordinate(user, True), config, "the user that the command line names")
        if not needs_ids or len(found.uid_map) > 1:
            return found, None
    from qemu_userns.host.leases import LEASE_COUNT, find_pools, lease_range, preview_range

    pools, taken = find_pools(SUBUID, SUBGID, config.pool)
    pools = tuple(pool for pool in intersect_ranges(pools, _find_own_ids()) if pool.count >= LEASE_COUNT)
    if not pools:
        raise HostError(
            "ids",
            f"the pool has no {LEASE_COUNT} that this user namespace has as well",
            "give the container more ids, or name a user of it for QEMU: -run-with user=, or the setting `user`",
        )
    if preview:
        return _build_leased(user, preview_range(pools, taken, preferred), LEASE_COUNT, config), None
    lease = lease_range(RUN_DIR, pools, taken, preferred)
    return _build_leased(user, lease.first_id, lease.count, config), lease


def _follow(identity: Identity, share: "ShareMap") -> Identity:
    """Return an identity whose ids are those of a share's map, beside its own.

    Raises:
        UsageError: the guest's root would have to be somebody else than QEMU, which has its id.
    """
    maps = []
    for own, entries in ((identity.uid, share.uid_map), (identity.gid, share.gid_map)):
        others = [entry for entry in entries if entry.inside != 0]
        for entry in entries:
            if entry.inside == 0 and entry.outside != own:
                raise UsageError(
                    f"share.{share.name}.idmap",
                    f"guest id 0 cannot be {entry.outside}: QEMU's own user namespace has the map, where that is QEMU itself",
                    "leave guest id 0 out, or use a file system that can be idmapped (ext4, xfs, btrfs, tmpfs)",
                )
            if entry.inside == 0 and entry.count > 1:
                others.append(MapEntry(1, entry.outside + 1, entry.count - 1))
        maps.append(build_map(own, (), others))
    method = identity.method if identity.switch else NEWIDMAP
    return identity.replace(method=method, uid_map=maps[0], gid_map=maps[1], why=f"{identity.why}; ids of share {share.name}")


def _find_own_ids() -> "tuple[IdRange, ...]":
    """Return the ids that this process's user namespace has, as users and as groups: in a container, not all."""
    found = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            found.append([IdRange(int(start), int(count)) for start, _, count in map(str.split, file)])
    return intersect_ranges(*found)


def _build_leased(user: "Account | None", first_id: int, count: int, config: "Config") -> Identity:
    """Build the identity of a VM that has a range of its own: for the guest's users, and for QEMU if there is no user."""
    if user is not None:
        ranges = ((first_id, count),)
        return _build(user, user.groups, ranges, ranges, config, "the user that the command line names, with leased ids")
    owner = _Owner(first_id, first_id)
    ranges = ((first_id + 1, count - 1),)
    return _build(owner, (), ranges, ranges, config, "ids leased for this VM")


class _Owner:
    """The ids of a lease, where an account stands otherwise."""

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid


def _find_own(account: "Account", config: "Config") -> Identity:
    """Build the identity of an unprivileged caller: its own id, and its subordinate ids after it."""
    uid_ranges, gid_ranges = _subordinate(account, False)
    uid_extra, gid_extra = _extra(config)
    if uid_ranges and gid_ranges:
        method, why, warning = NEWIDMAP, "the caller, with subordinate ids", None
    elif uid_extra or gid_extra:
        method, why, warning = NEWIDMAP, "the caller, with the ids that idmap names", None
        uid_ranges = gid_ranges = ()
    else:
        method, why = SELF, "the caller alone"
        missing = SUBGID if uid_ranges else SUBUID
        uid_ranges = gid_ranges = ()
        warning = (
            f"{account.name} has no subordinate ids in {missing}, so only one id is mapped, and passthrough shares cannot hold "
            f"others (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {account.name})"
        )
    return Identity(
        account.uid,
        account.gid,
        account.groups,
        False,
        method,
        build_map(account.uid, uid_ranges, uid_extra),
        build_map(account.gid, gid_ranges, gid_extra),
        why,
        warning,
    )


def _build(
    owner: "Account | _Owner",
    groups: "tuple[int, ...]",
    uid_ranges: "tuple[tuple[int, int], ...]",
    gid_ranges: "tuple[tuple[int, int], ...]",
    config: "Config",
    why: str,
) -> Identity:
    """Build an identity that a root caller switches to."""
    uid_extra, gid_extra = _extra(config)
    uid_map = build_map(owner.uid, uid_ranges, uid_extra)
    gid_map = build_map(owner.gid, gid_ranges, gid_extra)
    return Identity(owner.uid, owner.gid, groups, True, DIRECT, uid_map, gid_map, why)


def _subordinate(account: "Account", unshared: bool) -> "tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]":
    """Return the subordinate uid and gid ranges of an account; `unshared` leaves out those that are somebody else's too."""
    find = find_unshared_ranges if unshared else find_ranges
    uid_ranges = find(SUBUID, account.name, account.uid)
    gid_ranges = find(SUBGID, account.name, account.uid, account.gid)
    return tuple((span.start, span.count) for span in uid_ranges), tuple((span.start, span.count) for span in gid_ranges)


def _extra(config: "Config") -> "tuple[tuple[MapEntry, ...], tuple[MapEntry, ...]]":
    """Return the extra map entries for uids and for gids."""
    return tuple(MapEntry(e.inside, e.outside, e.count) for e in config.idmap if e.kind in ("uid", "both")), tuple(
        MapEntry(e.inside, e.outside, e.count) for e in config.idmap if e.kind in ("gid", "both")
    )
