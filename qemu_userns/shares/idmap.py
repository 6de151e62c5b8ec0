"""Translate ids between the host and the guests of a share. Pure."""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qemu_userns.host.subids import IdMapEntry

OVERFLOW_ID = 65534


class Translation(Record):
    """The entries of raw.idmap; with None every id is itself."""

    entries: "tuple[IdMapEntry, ...] | None" = None

    def to_guest(self, kind: str, number: int) -> "int | None":
        """Return the guest's id of the host's; None if it has none.

        Args:
            kind: "uid" or "gid".
            number: the id.
        """
        return (
            number
            if self.entries is None
            else _find(number, ((e.outside, e.inside, e.count) for e in self.entries if e.kind in (kind, "both")))
        )

    def to_host(self, kind: str, number: int) -> "int | None":
        """Return the host's id of the guest's; None if it has none."""
        return (
            number
            if self.entries is None
            else _find(number, ((e.inside, e.outside, e.count) for e in self.entries if e.kind in (kind, "both")))
        )


def _find(number: int, spans: "Iterable[tuple[int, int, int]]") -> "int | None":
    return next((other + number - first for first, other, count in spans if first <= number < first + count), None)
