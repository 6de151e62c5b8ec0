"""Subordinate ids and raw.idmap."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_userns.errors import HostError, UsageError
from qemu_userns.host.subids import (
    IdMapEntry,
    IdRange,
    all_ranges,
    find_ranges,
    find_unshared_ranges,
    intersect_ranges,
    parse_idmap,
    parse_span,
    parse_subids,
)


@pytest.fixture
def subuid(tmp_path: Path) -> Path:
    return tmp_path / "subuid"


def test_entries_by_name_and_by_number_in_order(subuid: Path) -> None:
    subuid.write_text("# comment\n\n1000:300000:10\nvm:100000:65536\nother:200000:65536\n")
    assert find_ranges(str(subuid), "vm", 1000) == (IdRange(300000, 10), IdRange(100000, 65536))


@pytest.mark.parametrize("text", [None, "", "\n", "# nothing\n", "other:100000:65536\n", "1000:5:5"])
def test_no_range(subuid: Path, text: "str | None") -> None:
    if text is not None:
        subuid.write_text(text)
    assert find_ranges(str(subuid), "vm", 1001) == ()


@pytest.mark.parametrize(
    "line",
    ["vm", "vm:1", "vm:1:2:3", ":1:2", "vm:-1:2", "vm:0x10:2", "vm: 1:2", "vm:1:2 ", " vm:1:2", "vm:1:2\r", "vm:²:1", "vm::1"],
)
def test_malformed_line_is_named(subuid: Path, line: str) -> None:
    subuid.write_text(f"# first\nvm:100000:65536\n{line}\n")
    with pytest.raises(HostError, match=r"not `owner:start:count`") as caught:
        find_ranges(str(subuid), "vm", 1000)
    assert caught.value.what == f"{subuid}:3"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("vm:100000:0", 1, "empty"),
        ("vm:0:65536", 1, "host root"),
        ("vm:4294967295:1", 1, "last id is 4294967294"),
        ("vm:100000:4294967296", 1, "last id is 4294967294"),
        ("vm:100000:99999999999999999999", 1, "last id"),
        ("vm:1000:10", 1, "own id 1000"),
        ("vm:100000:10\nvm:100009:10", 1, "overlaps that of vm in line 2"),
        ("other:100000:65536\nvm:165535:10", 2, "overlaps that of other in line 1"),
        ("vm:100000:65536\nroot:50000:1000000", 1, "overlaps that of root in line 2"),
        ("vm:100000:65536\n1000:100000:65536", 1, "overlaps that of 1000 in line 2"),
    ],
)
def test_unusable_range(subuid: Path, text: str, line: int, why: str) -> None:
    subuid.write_text(text)
    with pytest.raises(HostError, match=why) as caught:
        find_ranges(str(subuid), "vm", 1000)
    assert caught.value.what == f"{subuid}:{line}"
    assert caught.value.hint


def test_ranges_that_nobody_else_has(subuid: Path) -> None:
    subuid.write_text("other:100000:65536\nvm:165535:10\nvm:300000:10\n1000:300009:10\nvm:400000:10\nother:400010:10\n")
    assert find_unshared_ranges(str(subuid), "vm", 1000) == (IdRange(400000, 10),)
    subuid.write_text("vm:0:65536\n")
    with pytest.raises(HostError, match="host root"):
        find_unshared_ranges(str(subuid), "vm", 1000)


def test_last_id_may_be_used(subuid: Path) -> None:
    subuid.write_text("vm:4294967294:1")
    assert find_ranges(str(subuid), "vm", 1000) == (IdRange(4294967294, 1),)


def test_what_others_do_wrong_does_not_matter(subuid: Path) -> None:
    subuid.write_text("a:0:10\nb:5:10\nvm:100000:10\nc:100005:0\n")
    assert find_ranges(str(subuid), "vm", 1000) == (IdRange(100000, 10),)


def test_own_gid_in_subgid(subuid: Path) -> None:
    subuid.write_text("vm:1000:1")
    assert find_ranges(str(subuid), "vm", 1000, own_id=100) == (IdRange(1000, 1),)
    subuid.write_text("vm:100:1")
    with pytest.raises(HostError, match="own id 100"):
        find_ranges(str(subuid), "vm", 1000, own_id=100)


def test_subgid_is_not_looked_up_by_gid(subuid: Path) -> None:
    subuid.write_text("100:200000:65536")
    assert find_ranges(str(subuid), "vm", 1000, own_id=100) == ()


@pytest.mark.parametrize("count", [339, 340])
def test_as_many_extents_as_the_kernel_takes(subuid: Path, count: int) -> None:
    subuid.write_text("".join(f"vm:{100000 + 10 * i}:5\n" for i in range(count)))
    if count == 339:
        assert len(find_ranges(str(subuid), "vm", 1000)) == 339
    else:
        with pytest.raises(HostError, match="340 ranges"):
            find_ranges(str(subuid), "vm", 1000)


def test_symlink(subuid: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("vm:100000:65536")
    subuid.symlink_to("target")
    with pytest.raises(HostError, match="symbolic link") as caught:
        find_ranges(str(subuid), "vm", 1000)
    assert caught.value.hint


def test_neither_fifo_nor_directory(subuid: Path, tmp_path: Path) -> None:
    os.mkfifo(subuid)
    for path in (subuid, tmp_path):
        with pytest.raises(HostError, match="not a regular file"):
            find_ranges(str(path), "vm", 1000)


def test_huge_file(subuid: Path) -> None:
    subuid.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(HostError, match="larger than"):
        find_ranges(str(subuid), "vm", 1000)


def test_all_ranges(subuid: Path) -> None:
    subuid.write_text("a:100000:65536\nb:5:0\n7:9:1\n")
    assert all_ranges(str(subuid)) == (IdRange(100000, 65536), IdRange(9, 1))
    assert all_ranges(str(subuid) + "-absent") == ()


def test_intersect() -> None:
    a = (IdRange(10, 10), IdRange(100, 5))
    assert intersect_ranges(a, (IdRange(15, 90),)) == (IdRange(15, 5), IdRange(100, 5))
    assert intersect_ranges(a, (IdRange(20, 80),)) == ()


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        entries = parse_subids(text, "f")
    except HostError:
        return
    assert all(start >= 0 and count >= 0 for _, start, count, _ in entries)


names = st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters=":#"), min_size=1)


@given(st.lists(st.tuples(names, st.integers(0, 2**64), st.integers(0, 2**64))))
def test_entries_come_back(entries: "list[tuple[str, int, int]]") -> None:
    text = "".join(f"{owner}:{start}:{count}\n" for owner, start, count in entries)
    assert [entry[:3] for entry in parse_subids(text, "f")] == entries


def test_idmap_has_the_host_first() -> None:
    assert parse_idmap("both 1000 0\n\nuid 5-14 100-109\n gid  7   8 \n") == (
        IdMapEntry("both", inside=0, outside=1000, count=1),
        IdMapEntry("uid", inside=100, outside=5, count=10),
        IdMapEntry("gid", inside=8, outside=7, count=1),
    )
    assert parse_idmap("") == ()


def test_uid_and_gid_do_not_meet() -> None:
    assert len(parse_idmap("uid 1000 1000\ngid 1000 1000")) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("both 1000", "not an id map"),
        ("user 1000 1000", "not an id map"),
        ("both 1000 1000 1", "not an id map"),
        ("both 1-x 1", "malformed"),
        ("both 1-2-3 1", "malformed"),
        ("both 5-4 1-2", "malformed"),
        ("both -1 1", "malformed"),
        ("both 4294967295 1", "malformed"),
        ("both 1 4294967295", "malformed"),
        ("uid 5 1000-1999", "maps 1 host ids to 1000"),
        ("both 0 1000", "host root"),
        ("uid 0-9 1000-1009", "host root"),
        ("both 1000 1\nuid 1000 2", "overlaps"),
        ("uid 1000 1\nboth 1001 1", "overlaps"),
        ("gid 1000-1009 0-9\ngid 2000-2009 9-18", "overlaps"),
    ],
)
def test_bad_idmap(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        parse_idmap(text, "config: idmap")
    assert caught.value.what == "config: idmap"
    assert caught.value.hint


@given(st.text(st.sampled_from("both uidg0123456789-\n")))
def test_any_idmap_is_parsed_or_refused(text: str) -> None:
    try:
        entries = parse_idmap(text)
    except UsageError:
        return
    assert all(entry.outside > 0 and entry.count > 0 for entry in entries)


def test_span() -> None:
    assert parse_span("7") == IdRange(7, 1)
    assert parse_span("7-9") == IdRange(7, 3)
    assert parse_span("7-") is None
    assert parse_span("") is None
