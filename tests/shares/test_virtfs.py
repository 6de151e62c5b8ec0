"""What QEMU's mapped models keep of a file, and id maps; as plain values."""

from __future__ import annotations

import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_userns.host.subids import parse_idmap
from qemu_userns.shares.idmap import Translation
from qemu_userns.shares.virtfs import (
    PREFIX,
    Kept,
    Seen,
    build_metadata,
    build_xattrs,
    parse_metadata,
    parse_xattrs,
    translate_acl,
)

IDS = st.integers(0, 0xFFFFFFFE)
KINDS = st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])


@given(IDS, IDS, KINDS, st.integers(0, 0o7777), st.integers(0, 0xFFFFFFFF))
def test_both_formats_say_what_was_put_in(uid: int, gid: int, kind: int, mode: int, rdev: int) -> None:
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    seen = Seen(uid, gid, kind | mode, rdev if device else 0)
    wanted = Kept(uid, gid, kind | mode, rdev if device else None)
    assert parse_xattrs(build_xattrs(seen)) == wanted
    assert parse_metadata(build_metadata(seen)) == wanted


def test_the_mode_completes_the_attributes() -> None:
    names = list(build_xattrs(Seen(1, 2, stat.S_IFCHR | 0o600, 259)))
    assert names == [PREFIX + name for name in ("uid", "gid", "rdev", "mode")]


def test_an_attribute_of_another_size_is_passed_over_as_by_qemu() -> None:
    assert parse_xattrs({PREFIX + "uid": b"\1", PREFIX + "gid": b"\2\0\0\0"}) == Kept(gid=2)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (b"", Kept()),
        (b"virtfs.uid=-2\nvirtfs.gid= 5x\n", Kept(uid=0xFFFFFFFE, gid=5)),
        (b"virtfs.uid=\nnonsense\nvirtfs.mode=33188", Kept(uid=0, mode=33188)),
        (b"virtfs.uid=1\nvirtfs.uid=2\n", Kept(uid=2)),
    ],
)
def test_a_metadata_file_is_read_as_qemu_reads_it(text: bytes, kept: Kept) -> None:
    assert parse_metadata(text) == kept


@given(st.binary(max_size=200))
def test_no_metadata_file_is_an_error(data: bytes) -> None:
    parse_metadata(data)


def test_mapped_file_has_no_room_for_64_bits_of_a_device_number() -> None:
    with pytest.raises(ValueError, match="32 bits"):
        build_metadata(Seen(0, 0, stat.S_IFCHR, 1 << 32))


def test_a_map_goes_both_ways() -> None:
    ids = Translation(parse_idmap("both 1000 0\nuid 100000-100009 1-10\ngid 5 7"))
    assert [ids.to_guest("uid", n) for n in (1000, 100009, 5, 0)] == [0, 10, None, None]
    assert [ids.to_guest("gid", n) for n in (1000, 100009, 5)] == [0, None, 7]
    assert [ids.to_host("uid", n) for n in (0, 1, 10, 11)] == [1000, 100000, 100009, None]
    assert [ids.to_host("gid", n) for n in (0, 7, 1)] == [1000, 5, None]
    assert Translation().to_host("uid", 12) == 12


def test_the_ids_of_an_access_control_list_are_mapped() -> None:
    def build(uid: int, gid: int) -> bytes:
        rows = ((1, 7, 0xFFFFFFFF), (2, 6, uid), (4, 5, 0xFFFFFFFF), (8, 4, gid), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF))
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)

    up = {5: 1005}.get, {6: 1006}.get
    assert translate_acl(build(5, 6), *up) == build(1005, 1006)
    assert translate_acl(build(6, 6), *up) is None
    with pytest.raises(ValueError, match="malformed"):
        translate_acl(b"\2\0\0\0\1", *up)
