"""Who QEMU is: the ids outside, the maps, and how they come about. Pure."""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# How the maps are written.
SELF = "self"  # by the launcher: one id, its own
NEWIDMAP = "newidmap"  # by newuidmap(1) and newgidmap(1), as subuid(5) allows
DIRECT = "direct"  # by the supervisor, which is root outside

# Which network QEMU is in, if it is not in the namespace that a path leads to.
CALLERS_NETWORK, NO_NETWORK = "caller", "none"


class MapEntry(Record):
    """One line of /proc/PID/uid_map: user_namespaces(7), "User and group ID mappings"."""

    inside: int
    outside: int
    count: int

    def describe(self) -> str:
        """Say it as a reader of `explain` wants it."""
        if self.count == 1:
            return f"{self.inside} is {self.outside}"
        return f"{self.inside}-{self.inside + self.count - 1} are {self.outside}-{self.outside + self.count - 1}"


class MountMap(Record):
    """The map of an idmapped mount; of its entries `inside` is the id on disk, and `outside` what the kernel takes it for."""

    uid_map: "tuple[MapEntry, ...]"
    gid_map: "tuple[MapEntry, ...]"
    text: str  # for `explain`

    @property
    def shows_root(self) -> bool:
        """Whether files of host root are in it: through a writable mount of it QEMU could make such."""
        return any(entry.inside == 0 for entry in (*self.uid_map, *self.gid_map))


class Identity(Record):
    """What QEMU is outside, and its id maps."""

    uid: int  # outside id of inside 0
    gid: int
    groups: "tuple[int, ...]"  # supplementary groups, which stay in force although no map names them
    switch: bool  # whether the launcher, being root, has to become uid and gid first
    method: str  # SELF, NEWIDMAP or DIRECT
    uid_map: "tuple[MapEntry, ...]"
    gid_map: "tuple[MapEntry, ...]"
    why: str
    warning: "str | None" = None

    def may(self, mode: int, uid: int, gid: int, want: int) -> bool:
        """Say whether QEMU may open a file with its own rights.

        Args:
            mode: st_mode of the file.
            uid: its owner.
            gid: its group.
            want: a sum of 4 (read), 2 (write), 1 (execute or search).

        Returns:
            The verdict of the mode bits; an access control list is the kernel's to judge.
        """
        if uid == self.uid:
            bits = mode >> 6
        elif gid == self.gid or gid in self.groups:
            bits = mode >> 3
        else:
            bits = mode
        return bits & want == want


def build_owner_map(uid: int, gid: int, identity: Identity) -> MountMap:
    """Return the map that shows what belongs to one owner as QEMU's own."""
    uids, gids = (MapEntry(uid, identity.uid, 1),), (MapEntry(gid, identity.gid, 1),)
    return MountMap(uids, gids, f"owner {uid}:{gid} shown as QEMU's")


def build_map(outside: int, ranges: "Sequence[tuple[int, int]]", extra: "Sequence[MapEntry]") -> "tuple[MapEntry, ...]":
    """Build a map: inside 0 is `outside`, 1 and up are `ranges` in order, and `extra` entries take precedence.

    Args:
        outside: the outside id of inside 0.
        ranges: (first outside id, count), each following the one before it inside.
        extra: entries of raw.idmap; what they name inside or outside is cut out of the ranges.

    Returns:
        Entries in order of their inside ids.
    """
    entries = [MapEntry(0, outside, 1)]
    inside = 1
    for first, count in ranges:
        entries.append(MapEntry(inside, first, count))
        inside += count
    for wanted in extra:
        entries = [piece for entry in entries for piece in _cut(entry, wanted)]
        entries.append(wanted)
    return tuple(sorted(entries, key=lambda entry: entry.inside))


def _cut(entry: MapEntry, wanted: MapEntry) -> "list[MapEntry]":
    """Return what is left of `entry` when `wanted` takes its inside and its outside ids."""
    pieces = [entry]
    for start in (wanted.inside - entry.inside, wanted.outside - entry.outside):
        left = []
        for piece in pieces:
            offset = piece.inside - entry.inside
            low = min(max(start - offset, 0), piece.count)
            high = min(max(start + wanted.count - offset, 0), piece.count)
            left.append(MapEntry(piece.inside, piece.outside, low))
            left.append(MapEntry(piece.inside + high, piece.outside + high, piece.count - high))
        pieces = [piece for piece in left if piece.count > 0]
    return pieces
