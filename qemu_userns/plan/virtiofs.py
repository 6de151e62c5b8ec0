"""Shares by virtiofsd: what each takes of the host, and what its virtiofsd sees. Pure."""

from qemu_userns.plan.added_shares import find_backends, name_chardev
from qemu_userns.plan.base import BASE
from qemu_userns.plan.facts import ABSENT, DIRECTORY, MISSING
from qemu_userns.plan.grants import READ, SEARCH, Bind, Link, Virtiofsd
from qemu_userns.plan.identity import build_owner_map
from qemu_userns.plan.idmaps import build_map
from qemu_userns.plan.layout import build_layout
from qemu_userns.plan.shares import warn_of_set_uid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qemu_userns.plan.added_shares import AddedShare
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PathFact
    from qemu_userns.plan.grants import Grant
    from qemu_userns.plan.identity import MountMap
    from qemu_userns.plan.layout import Placed

ROOT = "/share"  # where virtiofsd sees the share, whatever its path: it reads its options as a comma list
_PROGRAMS = BASE[0].why
_NEEDED = ("/proc", "/dev/null", "/etc/ld.so.cache")
_HINT = "it is in Debian's packages virtiofsd, and qemu-system-common up to Debian 12; or use driver=9p"


def add_daemons(draft: "Draft", shares: "Sequence[AddedShare]") -> None:
    """Add a virtiofsd, and QEMU's connection to it, for each share that wants one."""
    wanted = [(number, share) for number, share in enumerate(shares) if share.by_virtiofs]
    if not wanted:
        return
    _check_memory(draft)
    for number, share in wanted:
        what = f"share {share.tag}"
        program = draft.facts.virtiofsd
        if program is None:
            draft.refuse(what, "there is no virtiofsd", _HINT)
        elif _check_root(draft, share, f"{what} {share.path}"):
            fact, fd = draft.path(share.path), draft.next_fd()
            if not share.readonly and not share.by_9p:
                warn_of_set_uid(draft, fact, f"{what} {share.path}")
            idmap = _choose_map(draft, share, fact, f"{what} {share.path}")
            draft.add(
                Virtiofsd(what, share.tag, fact.real, fact.inode, not share.readonly, idmap, program.path, program.modern, fd)
            )
            draft.words += ("-chardev", f"socket,id={name_chardev(number)},fd={fd}")


def build_view(grant: Virtiofsd, grants: "Iterable[Grant]") -> "tuple[Placed, ...]":
    """Return what a virtiofsd sees: of what QEMU sees the programs and libraries, and its share at ROOT.

    Args:
        grant: the virtiofsd.
        grants: of the plan.
    """
    program = Bind("virtiofsd itself", grant.program)
    return build_layout((*_find_base(grants), program, Bind(grant.why, ROOT, grant.writable, False, grant.inode, grant.idmap)))


def build_argv(grant: Virtiofsd, number: int) -> "tuple[str, ...]":
    """Return the command line of a virtiofsd that listens on fd `number`; the limit of open files is ours to set."""
    common = (grant.program, f"--fd={number}", "--rlimit-nofile=0")
    if grant.modern:
        return (*common, f"--shared-dir={ROOT}", "--sandbox=chroot", "--cache=auto", "--xattr", "--log-level=warn")
    return (*common, "-o", f"source={ROOT}", "-o", "sandbox=chroot", "-o", "cache=auto", "-o", "xattr", "-o", "log_level=warn")


def _find_base(grants: "Iterable[Grant]") -> "Iterator[Grant]":
    for grant in grants:
        if isinstance(grant, Bind | Link) and (grant.why == _PROGRAMS or grant.path in _NEEDED):
            yield grant


def _check_root(draft: "Draft", share: "AddedShare", what: str) -> bool:
    """Refuse a root that cannot be shared; return whether it can."""
    fact = draft.path(share.path)
    if fact.error is not None or fact.kind != DIRECTORY:
        reason = fact.error or (MISSING if fact.kind == ABSENT else f"it is a {fact.kind}, and a share is a directory")
        draft.refuse(what, reason, "name a directory that is there")
    elif not draft.caller_may(fact, READ):
        draft.refuse(what, "Permission denied", "the caller may not read it")
    elif fact.real == "/":
        draft.refuse(what, "virtiofsd sees its share alone, and this is the whole host", "share a directory of it")
    else:
        return True
    return False


def _choose_map(draft: "Draft", share: "AddedShare", fact: "PathFact", what: str) -> "MountMap | None":
    """Return the map of the mount that virtiofsd sees: the same as QEMU would for 9p."""
    wanted = next((found for found in reversed(draft.share_maps) if found.name == share.tag), None)
    if wanted is not None:
        return build_map(draft, what, share.model, wanted)
    if share.readonly and draft.facts.caller.root and not draft.may(fact, READ | SEARCH):
        return build_owner_map(fact.uid, fact.gid, draft.identity)
    return None


def _check_memory(draft: "Draft") -> None:
    """Refuse memory that virtiofsd cannot map: it must be a file or memfd, and shared."""
    if any(obj.kind == "mem-path" for obj in draft.objects):
        hint = "-object memory-backend-file,id=ID,size=SIZE,mem-path=PATH,share=on -machine memory-backend=ID"
        draft.refuse("-mem-path", "virtiofs takes memory that virtiofsd can have too", hint)
    for name in find_backends(draft.objects):
        for obj in draft.objects:
            if obj.kind != "object" or obj.id != name:
                continue
            kind = obj.get("qom-type") or ""
            is_shared = obj.is_on("share") or (kind == "memory-backend-memfd" and obj.get("share") is None)
            if kind == "memory-backend-ram" or not is_shared:
                hint = "memory-backend-memfd,share=on" if kind == "memory-backend-ram" else "add share=on to it"
                draft.refuse(f"-object {kind},id={name}", "virtiofs takes memory that virtiofsd can have too", hint)
