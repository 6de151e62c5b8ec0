"""Act with all ids that are an unprivileged caller's: its own, and its subordinate ones."""

import os

from qemu_userns.host.accounts import look_at_caller
from qemu_userns.host.identity import SUBGID, SUBUID
from qemu_userns.host.subids import find_ranges
from qemu_userns.host.usernamespace import Holder, open_namespace, write_maps
from qemu_userns.linux import process
from qemu_userns.plan.identity import NEWIDMAP, Identity, MapEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    OwnIds = tuple[tuple[range, ...], tuple[range, ...]]


def find_own_ids() -> "OwnIds | None":
    """Return the uids and the gids of the caller, its own first; None if it has no subordinate ones.

    Raises:
        HostError: the files of subordinate ids are broken.
    """
    account = look_at_caller().account
    uids, gids = find_ranges(SUBUID, account.name, account.uid), find_ranges(SUBGID, account.name, account.uid, account.gid)
    if not uids or not gids:
        return None
    return (
        (range(account.uid, account.uid + 1), *(range(span.start, span.end) for span in uids)),
        (range(account.gid, account.gid + 1), *(range(span.start, span.end) for span in gids)),
    )


def enter_own_ids(own: "OwnIds") -> None:
    """Enter a new user namespace in which they are what they are outside, with all capabilities over their files.

    Other ids are seen as 65534 from then on: user_namespaces(7), "Unmapped user and group IDs".

    Must not: be followed by a program or a thread that is not to have the capabilities.

    Raises:
        HostError: user namespaces are forbidden here, or newuidmap is missing or refuses.
    """
    uid_map, gid_map = (tuple(MapEntry(ids.start, ids.start, len(ids)) for ids in spans) for spans in own)
    identity = Identity(uid_map[0].outside, gid_map[0].outside, (), False, NEWIDMAP, uid_map, gid_map, "the caller's own ids")
    holder = Holder(None)
    try:
        write_maps(holder.pid, identity)
        namespace = open_namespace(holder.pid, "user")
        try:
            process.setns(namespace, process.CLONE_NEWUSER)
        finally:
            os.close(namespace)
    finally:
        holder.let_go()
