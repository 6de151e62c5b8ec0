"""Id maps and what an identity may open."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qemu_userns.plan.identity import SELF, Identity, MapEntry, build_map

BASE = 100_000
SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=4)


def ranges_of(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Turn (gap, count) into ranges of outside ids that do not overlap."""
    found, at = [], BASE
    for gap, count in spans:
        found.append((at + gap, count))
        at += gap + count
    return found


def entries_of(spans: list[tuple[int, int]], inside: int, outside: int) -> list[MapEntry]:
    found = []
    for gap, count in spans:
        found.append(MapEntry(inside + gap, outside + gap, count))
        inside, outside = inside + gap + count, outside + gap + count
    return found


EXTRA = st.builds(entries_of, SPANS, st.integers(0, 120), st.one_of(st.just(1000), st.integers(BASE - 60, BASE + 120)))


def ids(entry: MapEntry, side: str) -> range:
    start = getattr(entry, side)
    return range(start, start + entry.count)


@settings(deadline=None)
@given(SPANS, EXTRA)
def test_each_id_is_mapped_once(spans: list[tuple[int, int]], extra: list[MapEntry]) -> None:
    entries = build_map(1000, ranges_of(spans), extra)
    for side in ("inside", "outside"):
        mapped = [one for entry in entries for one in ids(entry, side)]
        assert len(set(mapped)) == len(mapped)
    assert list(entries) == sorted(entries, key=lambda entry: entry.inside)
    assert all(entry.count > 0 for entry in entries)


@settings(deadline=None)
@given(SPANS, EXTRA)
def test_extra_entries_are_kept_as_they_are(spans: list[tuple[int, int]], extra: list[MapEntry]) -> None:
    entries = build_map(1000, ranges_of(spans), extra)
    assert set(extra) <= set(entries)


@settings(deadline=None)
@given(SPANS, EXTRA)
def test_nothing_is_mapped_that_was_not_asked_for(spans: list[tuple[int, int]], extra: list[MapEntry]) -> None:
    pairs = {(0, 1000)}
    inside = 1
    for first, count in ranges_of(spans):
        pairs |= {(inside + i, first + i) for i in range(count)}
        inside += count
    wanted = {pair for entry in extra for pair in zip(ids(entry, "inside"), ids(entry, "outside"), strict=True)}
    kept = {(one, other) for one, other in pairs if one not in {i for i, _ in wanted} and other not in {o for _, o in wanted}}
    entries = build_map(1000, ranges_of(spans), extra)
    found = {pair for entry in entries for pair in zip(ids(entry, "inside"), ids(entry, "outside"), strict=True)}
    assert found == kept | wanted


@settings(deadline=None)
@given(SPANS)
def test_without_extra_entries_all_ids_count(spans: list[tuple[int, int]]) -> None:
    ranges = ranges_of(spans)
    entries = build_map(1000, ranges, [])
    assert entries[0] == MapEntry(0, 1000, 1)
    assert sum(entry.count for entry in entries) == 1 + sum(count for _, count in ranges)


def test_lxds_example() -> None:
    """`both 1000 1000` on a range of 65536 ids."""
    assert build_map(5000, [(BASE, 65535)], [MapEntry(1000, 1000, 1)]) == (
        MapEntry(0, 5000, 1),
        MapEntry(1, BASE, 999),
        MapEntry(1000, 1000, 1),
        MapEntry(1001, BASE + 1000, 64535),
    )


def test_the_callers_own_id_can_be_moved() -> None:
    assert build_map(1000, [(BASE, 10)], [MapEntry(1000, 1000, 1)]) == (MapEntry(1, BASE, 10), MapEntry(1000, 1000, 1))


@pytest.mark.parametrize(("count", "text"), [(1, "0 is 1000"), (65536, "0-65535 are 1000-66535")])
def test_an_entry_in_words(count: int, text: str) -> None:
    assert MapEntry(0, 1000, count).describe() == text


ME = Identity(1000, 1001, (44,), False, SELF, (), (), "test")


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "want", "may"),
    [
        (0o400, 1000, 0, 4, True),
        (0o400, 1000, 0, 2, False),
        (0o077, 1000, 1001, 4, False),  # the owner's bits count for the owner, whatever the others say
        (0o640, 0, 1001, 4, True),
        (0o640, 0, 44, 4, True),
        (0o640, 0, 44, 6, False),
        (0o606, 0, 44, 4, False),
        (0o604, 0, 0, 4, True),
        (0o600, 0, 0, 4, False),
        (0o755, 0, 0, 5, True),
        (0o755, 0, 0, 7, False),
    ],
)
def test_may(mode: int, uid: int, gid: int, want: int, may: bool) -> None:
    assert ME.may(mode, uid, gid, want) is may


@settings(deadline=None)
@given(st.integers(0, 0o777), st.sampled_from([0, 1000]), st.sampled_from([0, 44, 1001]), st.sampled_from([1, 2, 4, 6]))
def test_may_more_means_may_less(mode: int, uid: int, gid: int, want: int) -> None:
    assume(ME.may(mode, uid, gid, want))
    assert all(ME.may(mode, uid, gid, bit) for bit in (1, 2, 4) if want & bit)
