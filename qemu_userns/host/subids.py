"""Subordinate ids: /etc/subuid and /etc/subgid, and extra maps in LXD's raw.idmap syntax.

Both files have lines of `owner:start:count`, the owner by name or by uid (also in /etc/subgid: by uid, never by gid).
What newuidmap would take without a word and what lets two owners meet in one id is an error here, named by file and line.

Source: subuid(5), user_namespaces(7); the limit of 340 extents is the kernel's UID_GID_MAP_MAX_EXTENTS.
"""

import errno
import os
import stat

from qemu_userns.errors import HostError, UsageError
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Entry = tuple[str, int, int, int]  # owner, start, count, line number; plain tuples: a host may have thousands

END_OF_IDS = 2**32 - 1  # (uid_t)-1 means "no id"
MAX_EXTENTS = 339  # and one for id 0
MAX_BYTES = 1 << 20


class IdRange(Record):
    """The ids from `start` on, `count` of them."""

    start: int
    count: int

    @property
    def end(self) -> int:
        """The first id after the range."""
        return self.start + self.count


class IdMapEntry(Record):
    """One line of raw.idmap: `count` ids from `inside` on are the host's from `outside` on."""

    kind: str  # "uid", "gid" or "both"
    inside: int
    outside: int
    count: int


def overlaps(a_start: int, a_count: int, b_start: int, b_count: int) -> bool:
    """Tell whether two ranges have an id in common."""
    return a_start < b_start + b_count and b_start < a_start + a_count


def parse_subids(text: str, path: str) -> "list[Entry]":
    """Parse a file in the format of subuid(5).

    Args:
        text: what is in the file.
        path: its name, for errors.

    Returns:
        Each entry as (owner, start, count, line number), in order.

    Raises:
        HostError: a line is neither a comment, nor empty, nor `owner:start:count` in decimal.
    """
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        fields = line.split(":")
        if len(fields) != 3 or not fields[0] or fields[0].split() != [fields[0]]:
            raise _malformed(path, number)
        start, count = _decimal(fields[1]), _decimal(fields[2])
        if start is None or count is None:
            raise _malformed(path, number)
        entries.append((fields[0], start, count, number))
    return entries


def find_ranges(path: str, name: str, uid: int, own_id: "int | None" = None) -> "tuple[IdRange, ...]":
    """Find the subordinate ids of one user.

    Args:
        path: /etc/subuid or /etc/subgid.
        name: the user's name; entries by name count, and so do entries by number.
        uid: the user's uid, for both files.
        own_id: the id that must not be in a range: the uid if None; the gid for /etc/subgid.

    Returns:
        The ranges in the order of the file; none if there is no file.

    Raises:
        HostError: the file is malformed, or a range of this user cannot be used.
    """
    entries = _read_entries(path)
    own = _find_entries(path, entries, name, uid, own_id)
    for entry in own:
        other = _find_overlap(entry, entries)
        if other is not None:
            why = f"the range of {entry[0]} overlaps that of {other[0]} in line {other[3]}"
            raise HostError(f"{path}:{entry[3]}", why, "give each owner ids of its own, or both could reach each other's files")
    return tuple(IdRange(start, count) for _, start, count, _ in own)


def find_unshared_ranges(path: str, name: str, uid: int, own_id: "int | None" = None) -> "tuple[IdRange, ...]":
    """Find those subordinate ids of one user, as `find_ranges` does, that no other entry gives away too: root needs none of them.

    Debian's package lxd, for one, gives the same range to its own user and to root, for the containers of LXD.
    """
    entries = _read_entries(path)
    own = _find_entries(path, entries, name, uid, own_id)
    return tuple(IdRange(entry[1], entry[2]) for entry in own if _find_overlap(entry, entries) is None)


def all_ranges(path: str) -> "tuple[IdRange, ...]":
    """Return the ranges of all owners.

    Raises:
        HostError: the file is malformed.
    """
    return tuple(IdRange(start, count) for _, start, count, _ in _read_entries(path) if count)


def intersect_ranges(a: "Iterable[IdRange]", b: "Iterable[IdRange]") -> "tuple[IdRange, ...]":
    """Return the ids that are in both."""
    others = tuple(b)
    both = ((max(x.start, y.start), min(x.end, y.end)) for x in a for y in others)
    return tuple(IdRange(start, end - start) for start, end in both if start < end)


def parse_idmap(text: str, where: str = "raw.idmap") -> "tuple[IdMapEntry, ...]":
    """Parse LXD's raw.idmap: lines of `both|uid|gid HOST[-LAST] INSIDE[-LAST]`.

    Args:
        text: the lines.
        where: what the lines came from, for errors.

    Raises:
        UsageError: a line is malformed, maps host root, or overlaps an earlier line.
    """
    entries: list[IdMapEntry] = []
    for line in text.split("\n"):
        words = line.split()
        if not words:
            continue
        entry = _parse_idmap_line(words, where)
        for other in entries:
            if _maps_meet(entry, other):
                raise UsageError(where, f"'{line.strip()}' overlaps an earlier line", "map each id once")
        entries.append(entry)
    return tuple(entries)


def _parse_idmap_line(words: "list[str]", where: str) -> IdMapEntry:
    """Parse the words of one line of raw.idmap; raises UsageError."""
    line = " ".join(words)
    hint = "write `both|uid|gid HOST[-LAST] INSIDE[-LAST]`, e.g. `both 1000 1000`"
    if len(words) != 3 or words[0] not in ("both", "uid", "gid"):
        raise UsageError(where, f"'{line}' is not an id map", hint)
    outside, inside = parse_span(words[1]), parse_span(words[2])
    if outside is None or inside is None:
        raise UsageError(where, f"'{line}' has a malformed range of ids", hint)
    if outside.count != inside.count:
        raise UsageError(where, f"'{line}' maps {outside.count} host ids to {inside.count}", "give both ranges the same length")
    if outside.start == 0:
        raise UsageError(where, f"'{line}' maps host root", "host root is never mapped; leave host id 0 out")
    return IdMapEntry(words[0], inside.start, outside.start, outside.count)


def parse_span(text: str) -> "IdRange | None":
    """Parse `FIRST` or `FIRST-LAST`; None if it is neither, or has an id that does not exist."""
    first, dash, last = text.partition("-")
    low = _decimal(first)
    high = _decimal(last) if dash else low
    if low is None or high is None or high < low or high >= END_OF_IDS:
        return None
    return IdRange(low, high - low + 1)


def _maps_meet(a: IdMapEntry, b: IdMapEntry) -> bool:
    """Tell whether two entries map an id twice in the same map."""
    if a.kind != b.kind and "both" not in (a.kind, b.kind):
        return False
    return overlaps(a.inside, a.count, b.inside, b.count) or overlaps(a.outside, a.count, b.outside, b.count)


def _check_range(path: str, entry: "Entry", own_id: int) -> None:
    """Raise HostError unless the range can be mapped without giving away an id that matters."""
    _, start, count, line = entry
    if count == 0:
        why = "the range is empty"
    elif start == 0:
        why = "the range contains id 0, host root"
    elif start + count > END_OF_IDS:
        why = f"the range ends at {start + count - 1}, the last id is {END_OF_IDS - 1}"
    elif start <= own_id < start + count:
        why = f"the range contains its owner's own id {own_id}"
    else:
        return
    raise HostError(f"{path}:{line}", why, f"correct line {line} of {path} (subuid(5)), e.g. with usermod --add-subuids")


def _find_entries(path: str, entries: "list[Entry]", name: str, uid: int, own_id: "int | None") -> "list[Entry]":
    """Return the entries of one user, each of which can be mapped; raises HostError."""
    own = [entry for entry in entries if entry[0] in (name, str(uid))]
    if len(own) > MAX_EXTENTS:
        raise HostError(path, f"{len(own)} ranges for {name}, the kernel takes {MAX_EXTENTS}", f"join ranges of {name} in {path}")
    for entry in own:
        _check_range(path, entry, uid if own_id is None else own_id)
    return own


def _find_overlap(entry: "Entry", entries: "list[Entry]") -> "Entry | None":
    """Return another entry that shares an id with this one."""
    _, start, count, line = entry
    others = (other for other in entries if other[3] != line and other[2])
    return next((other for other in others if overlaps(start, count, other[1], other[2])), None)


def _decimal(text: str) -> "int | None":
    """Parse digits and nothing else, as many as a count of ids can have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def _malformed(path: str, line: int) -> HostError:
    """Make the error for a line that is no entry."""
    return HostError(f"{path}:{line}", "not `owner:start:count`", f"correct or remove line {line} of {path} (subuid(5))")


def _read_entries(path: str) -> "list[Entry]":
    """Read and parse a file; an absent one has no entries; raises HostError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise HostError(path, "is a symbolic link", f"put a regular file owned by root at {path}") from err
        raise HostError(path, f"cannot be opened: {err.strerror}", "it must be readable by all, as subuid(5) says") from err
    try:
        text = _read_regular(fd, path)
    except OSError as err:
        raise HostError(path, f"cannot be read: {err.strerror}") from err
    finally:
        os.close(fd)
    return parse_subids(os.fsdecode(text), path)


def _read_regular(fd: int, path: str) -> bytes:
    """Read a regular file of sane size; borrows the fd; raises HostError, or OSError from the read."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise HostError(path, "is not a regular file", f"put a regular file owned by root at {path}")
    data = b""
    while len(data) <= MAX_BYTES:
        block = os.read(fd, 65536)
        if not block:
            return data
        data += block
    raise HostError(path, f"is larger than {MAX_BYTES} bytes", f"remove what is no longer used from {path}")
