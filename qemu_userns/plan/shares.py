"""Hand over the roots of 9p shares, with the capabilities and the id maps that they take. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.cmdline.source import append, remove, replace
from qemu_userns.plan.facts import DIRECTORY
from qemu_userns.plan.grants import READ, SEARCH, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PathFact
    from qemu_userns.plan.identity import MountMap

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID = 0, 1, 3, 4
# What -fsdev local needs to act for every guest user; all of them reach no further than the mapped ids.
PASSTHROUGH_CAPABILITIES = frozenset((CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID))


def show_share(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show the root of a 9p share, and keep the capabilities that its security model takes."""
    fact = draft.path(need.path)
    why = f"{need.describe()} {need.path}"
    model = need.obj.get("security_model") or ""
    readonly = need.obj.is_on("readonly")
    if not draft.check(need, fact, READ):
        return
    if fact.kind != DIRECTORY:
        draft.refuse(why, f"it is a {fact.kind}, and a share is a directory", "name the directory that holds it")
        return
    if model in ("mapped", "mapped-xattr") and not readonly and not fact.xattrs:
        draft.refuse(
            why,
            f"its file system has no user.* attributes, which security_model={model} keeps ids and modes in",
            "use security_model=mapped-file",
        )
        return
    _choose_capabilities(draft, need)
    idmap = _choose_map(draft, need, fact)
    if fact.real == "/":
        draft.show_host(read_only=readonly)
        if not readonly:
            draft.warnings.append(f"{why}: the share is the whole host tree, so QEMU sees all of it")
        return
    draft.bind(fact, not readonly, need.describe(), idmap=idmap)
    if not readonly and model in ("passthrough", "none"):
        warn_of_set_uid(draft, fact, why)
    if idmap is None and not readonly and not draft.may(fact, WRITE | SEARCH):
        draft.notes.append(
            f"{why}: belongs to {fact.uid}:{fact.gid}; QEMU is {draft.identity.uid}:{draft.identity.gid} and can only read it"
        )


def serve_stand_in(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Serve a share of virtfs-proxy-helper's by QEMU's own local driver, under the ids of the stand-in's user namespace."""
    share = need.obj
    found = draft.facts.stand_ins[share]
    why = f"virtfs-proxy-helper serves no protocol here: it hands {found.path} over"
    model = share.members[0].replace(key="security_model", value="passthrough")
    local = need.replace(way=ways.SHARE, path=found.path, obj=share.replace(members=(*share.members, model)))
    if draft.path(found.path).inode != found.inode:
        draft.refuse(need.describe(), f"{found.path} is not the directory that virtfs-proxy-helper has opened")
    show_share(draft, local, commandline)
    draft.keep_fd(found.number, "virtfs-proxy-helper ends when it is closed")
    draft.edits += (remove(share, member, why) for key in ("sock_fd", "socket") for member in share.find_all(key))
    draft.edits += (replace(member, "local", why) for member in share.find_all("fsdriver"))
    draft.edits += (append(share, key, value, why) for key, value in (("path", found.path), ("security_model", "passthrough")))
    if found.idmap is None and draft.facts.caller.root and not draft.share_maps:
        draft.warnings.append(
            f"{need.describe()} proxy {found.path}: its helper is host root without an id map; the share has QEMU's own ids "
            f"(share.{share.id or share.get('mount_tag')}.idmap gives it a map)"
        )


def warn_of_set_uid(draft: "Draft", fact: "PathFact", what: str) -> None:
    """Warn where a guest can leave a file of the caller's, set-uid, that others on this host can execute.

    Nobody else can become who inside 0 is by that: leased ids are no user's, and who names a user by -runas has chosen one.

    Args:
        draft: of the plan.
        fact: of the root of a share that the guest may write and whose files have the guest's owners and modes.
        what: names the share.
    """
    account = draft.facts.caller.account
    if draft.identity.uid == account.uid and is_reached((fact.mode, fact.uid, fact.gid), fact.above, account.uid):
        draft.logged.append(
            f"{what}: root of the guest is {account.name} here, and others on this host can reach the share: a guest can leave a "
            f"set-uid program of {account.name} there; keep others out of a directory above it, or use readonly=on or "
            "security_model=mapped-xattr"
        )


def is_reached(root: "tuple[int, int, int]", above: "Iterable[tuple[int, int, int]]", uid: int) -> bool:
    """Say whether others than a user may be able to walk to what a guest puts into a share.

    Args:
        root: mode, uid and gid of the share's root. The guest can change the mode of one that is the user's.
        above: the same of the directories above it.
        uid: the user, whom inside 0 is. A group of the same number is taken for the user's alone, as adduser(8) makes it.
    """
    passed = (*above, *(() if root[1] == uid else (root,)))
    return all(mode & 0o001 or (mode & 0o010 and gid != uid) for mode, _, gid in passed)


def _choose_map(draft: "Draft", need: "Need", fact: "PathFact") -> "MountMap | None":
    """Return the map of the mount that shows a share, None without one."""
    if not draft.share_maps:
        return None
    from qemu_userns.plan.idmaps import choose_map

    return choose_map(draft, need, fact)


def _choose_capabilities(draft: "Draft", need: "Need") -> None:
    """Keep what a share's security model takes."""
    if need.obj.get("security_model") == "passthrough":
        draft.capabilities |= PASSTHROUGH_CAPABILITIES


def keep_fd(draft: "Draft", need: "Need", fact: "PathFact") -> None:
    """Keep what a share takes whose root is an fd of the caller; the fd itself is not this function's."""
    _choose_capabilities(draft, need)
    if _choose_map(draft, need, fact) is not None:
        draft.refuse(f"{need.describe()} {need.path}", "an fd of the caller cannot be shown with other ids", "name its path")
