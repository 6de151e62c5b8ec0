"""Decide what becomes of an entry, and whether it can: what the planner of a conversion and the conversion itself agree on."""

import os
import stat

from qemu_userns.record import Record
from qemu_userns.shares import virtfs
from qemu_userns.shares.idmap import OVERFLOW_ID
from qemu_userns.shares.stores import MAPPED_FILE, NEW, PASSTHROUGH, STORES, read_xattrs
from qemu_userns.shares.tree import ROOT
from qemu_userns.shares.virtfs import SPECIAL, Kept, Seen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.host.own_ids import OwnIds
    from qemu_userns.shares.idmap import Translation
    from qemu_userns.shares.journal import Journal
    from qemu_userns.shares.tree import Entry

_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_LINK_MAX = 4095  # bytes of a symlink's target
_SYSTEM = "system."


class Job(Record):
    """A conversion as it was asked for."""

    source: str  # security model
    target: str
    ids: "Translation"
    owner: "tuple[int, int]"  # of the files, with a mapped target
    privileged: bool  # whether device nodes, and files of host root, may come of it
    caller: int  # effective uid
    groups: "frozenset[int]" = frozenset()  # that the caller may give files to
    own: "OwnIds | None" = None  # the caller's, where it has them all at hand (host/own_ids.py)

    @property
    def skip(self) -> "frozenset[str]":
        """Names that are no entries of the share."""
        return frozenset((virtfs.META_DIR, virtfs.META_ROOT) if MAPPED_FILE in (self.source, self.target) else ())


class UnfitError(ValueError):
    """An entry that the target cannot hold; says why."""


class ConvertedError(UnfitError):
    """An entry that is what it is to be, and not by a conversion that is under way."""


class Step(Record):
    """What an entry is to be: in a mapped target `seen` has the guest's ids, in passthrough the host's."""

    seen: Seen
    kind: int  # type on the host, as S_IFMT has it
    mode: int  # permissions on the host
    owner: "tuple[int, int]"  # on the host
    acls: "tuple[tuple[str, bytes], ...]"  # attributes, by the names that they have in the target

    def describe(self) -> str:
        """Say it in one line."""
        seen, (uid, gid) = self.seen, self.owner
        host = f"{stat.filemode(self.kind | self.mode)} {uid}:{gid}"
        return f"{stat.filemode(seen.mode)} {seen.uid}:{seen.gid}, on the host {host}"


def build_step(entry: "Entry", job: Job, journal: "Journal", begun: bool) -> Step:
    """Find out what an entry is to be.

    Args:
        entry: as it is; a run that was killed may have left it anywhere between.
        job: the conversion.
        journal: of it.
        begun: whether what the target keeps is from this conversion: then it is what counts.

    Raises:
        UnfitError: the target cannot hold it.
    """
    target = STORES[job.target].read(entry)
    status = entry.status
    if begun and target.complete and target.uid is not None and target.gid is not None and target.mode is not None:
        seen = Seen(target.uid, target.gid, target.mode, target.rdev or 0)
    elif begun and status.st_nlink > 1 and status.st_ino in journal.seen:
        seen = journal.seen[status.st_ino]
    else:
        if target != Kept() and not begun:
            settled = (status.st_uid, status.st_gid) == job.owner and stat.S_IMODE(status.st_mode) in (0o600, 0o700)
            error = ConvertedError if target.complete and settled else UnfitError
            raise error(f"has attributes of {job.target} already")
        seen = _see(entry, job, journal)
    if job.target == PASSTHROUGH:
        owner, mode, kind = (seen.uid, seen.gid), stat.S_IMODE(seen.mode), seen.kind
    else:
        kind = stat.S_IFDIR if seen.kind == stat.S_IFDIR else stat.S_IFREG
        owner, mode = job.owner, 0o700 if kind == stat.S_IFDIR else 0o600
    step = Step(seen, kind, mode, owner, _find_acls(entry, job))
    _check(entry, step, job)
    if not begun:
        _check_names(entry, job)
    return step


def _see(entry: "Entry", job: Job, journal: "Journal") -> Seen:
    """Return what the source says of an entry, in the ids of the target; what it does not keep is the host's."""
    kept, status = STORES[job.source].read(entry), entry.status
    mode = kept.mode if kept.mode is not None else journal.modes.get(status.st_ino, status.st_mode)
    mode = mode if stat.S_IFMT(mode) else mode | entry.kind
    rdev = kept.rdev if kept.rdev is not None else status.st_rdev
    return Seen(
        _translate("uid", kept.uid, status.st_uid, job), _translate("gid", kept.gid, status.st_gid, job), mode & 0xFFFF, rdev
    )


def _translate(kind: str, kept: "int | None", host: int, job: Job) -> int:
    """Return an owner in the ids of the target; raises UnfitError."""
    if job.target == PASSTHROUGH:
        if kept is None:
            return host
        found = job.ids.to_host(kind, kept)
        if found is None:
            raise UnfitError(f"the guest's {kind} {kept} is in no map")
        if found == 0 and not job.privileged:
            raise UnfitError(f"its {kind} would be host root's; --privileged, without a map, allows that")
        return found
    if kept is not None:
        return kept
    found = job.ids.to_guest(kind, host)
    if found is None:
        raise UnfitError(f"the host's {kind} {host} is in no map")
    return found


def _find_acls(entry: "Entry", job: Job) -> "tuple[tuple[str, bytes], ...]":
    """Return access control lists, translated; raises UnfitError."""
    names = [_SYSTEM + name for name in virtfs.ACLS]
    hidden = read_xattrs(entry, virtfs.PREFIX + _SYSTEM)
    plain = {name: value for name, value in read_xattrs(entry, _SYSTEM).items() if name in names}
    if not hidden and not plain:
        return ()
    if MAPPED_FILE in (job.source, job.target):
        raise UnfitError("has an access control list, which mapped-file does not keep apart from the host's")
    if job.target == PASSTHROUGH:
        wanted = {name.removeprefix(virtfs.PREFIX): value for name, value in hidden.items()}
        ids = (lambda n: job.ids.to_host("uid", n)), (lambda n: job.ids.to_host("gid", n))
    else:
        # What is kept already counts: the host's list may have been removed, or changed with the mode, by then.
        wanted = {virtfs.PREFIX + name: value for name, value in plain.items() if virtfs.PREFIX + name not in hidden}
        ids = (lambda n: job.ids.to_guest("uid", n)), (lambda n: job.ids.to_guest("gid", n))
    found = []
    for name, value in wanted.items():
        try:
            translated = virtfs.translate_acl(value, *ids)
        except ValueError as err:
            raise UnfitError(str(err)) from err
        if translated is None:
            raise UnfitError("its access control list has an id that is in no map")
        found.append((name, translated))
    return tuple(found)


def _check(entry: "Entry", step: Step, job: Job) -> None:
    """Raise UnfitError for what cannot be made of an entry."""
    seen, status = step.seen, entry.status
    is_same = entry.kind == step.kind
    if (
        not is_same
        and not (entry.kind == stat.S_IFREG and step.kind in SPECIAL)
        and not (entry.kind in SPECIAL and entry.kind == seen.kind)
    ):
        raise UnfitError(f"is {stat.filemode(entry.kind)[0]} on the host, and its attributes say {stat.filemode(seen.mode)[0]}")
    if job.target == PASSTHROUGH and not is_same:
        if step.kind in _DEVICES and (job.caller != 0 or not job.privileged):
            raise UnfitError("would be a device node of the host; --privileged allows that to root")
        if step.kind == stat.S_IFLNK and not 0 < status.st_size <= _LINK_MAX:
            raise UnfitError("is no target of a symlink")
    if job.target == PASSTHROUGH and not job.privileged and job.source != PASSTHROUGH:
        is_root = (seen.mode & stat.S_ISUID and seen.uid == 0) or (seen.mode & stat.S_ISGID and seen.gid == 0)
        if is_root and step.kind == stat.S_IFREG:
            raise UnfitError("would be set-id of host root; --privileged, without a map, allows that")
    if job.target == MAPPED_FILE and seen.rdev > 0xFFFFFFFF:
        raise UnfitError("mapped-file keeps 32 bits of a device number")
    before, after = (status.st_uid, status.st_gid), step.owner
    if job.own is not None:
        is_own, can_give = _is_own(before, job.own), _is_own(after, job.own)
    else:
        is_own = job.caller in (0, before[0])
        can_give = job.caller == 0 or (after[0] == job.caller and after[1] in {before[1], *job.groups})
    if not is_own:
        raise UnfitError(f"belongs to {before[0]}:{before[1]}; only root can convert it")
    if not can_give:
        raise UnfitError(f"would belong to {after[0]}:{after[1]}; only root can give it away")
    if job.source == PASSTHROUGH and read_xattrs(entry, "security.capability"):
        raise UnfitError("has file capabilities, which no mapped model keeps; remove them first (setcap -r)")


def _is_own(owner: "tuple[int, int]", own: "OwnIds") -> bool:
    """Say whether both ids are the caller's; what the kernel shows for any other is not."""
    return OVERFLOW_ID not in owner and all(any(number in ids for ids in spans) for number, spans in zip(owner, own, strict=True))


def _check_names(entry: "Entry", job: Job) -> None:
    """Raise UnfitError for names that the conversion, or its target, needs."""
    if entry.name.startswith(NEW):
        raise UnfitError(f"names that begin with {NEW} are the conversion's own")
    if job.target != MAPPED_FILE or entry.kind != stat.S_IFDIR:
        return
    names = (virtfs.META_DIR, virtfs.META_ROOT) if entry.name == ROOT else (virtfs.META_DIR,)
    for name in names:
        try:
            os.stat(name, dir_fd=entry.fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        raise UnfitError(f"has an entry {name}, which mapped-file would hide")
