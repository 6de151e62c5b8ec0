"""Id maps of shares: two steps, from the guest's ids to outside ids and on to those on disk, make the map that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.plan.build import Settings
from qemu_userns.plan.grants import Bind
from qemu_userns.plan.identity import MapEntry, MountMap, build_map
from qemu_userns.plan.idmaps import ShareMap, build_mount_map, find_map, find_names, find_unmapped
from tests.plans import CWD, LEASED, plan_of, read

if TYPE_CHECKING:
    from qemu_userns.plan.plan import Plan

SHARE = ("-fsdev", "local,id=a,path=dir,security_model=passthrough", "-device", "virtio-9p-pci,fsdev=a,mount_tag=tag")
ONE = (MapEntry(1000, 5000, 1),)


def look_up(entries: tuple[MapEntry, ...], number: int) -> int | None:
    """Return what an id is by a map."""
    found = [entry.outside + number - entry.inside for entry in entries if entry.inside <= number < entry.inside + entry.count]
    return found[0] if found else None


@st.composite
def share_maps(draw: st.DrawFn) -> tuple[MapEntry, ...]:
    """Return entries that do not meet, neither in the guest nor on disk."""
    entries, inside, outside = [], 0, 1
    for _ in range(draw(st.integers(1, 4))):
        inside += draw(st.integers(0, 50))
        outside += draw(st.integers(0, 50))
        count = draw(st.integers(1, 30))
        entries.append(MapEntry(inside, outside, count))
        inside, outside = inside + count, outside + count
    return tuple(entries)


@settings(deadline=None)
@given(share_maps(), st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_two_steps_make_the_map(entries: tuple[MapEntry, ...], counts: list[int]) -> None:
    ranges = [(700_000 + 1000 * index, count) for index, count in enumerate(counts)]
    identity = LEASED.replace(uid_map=build_map(600_000, ranges, ()), gid_map=build_map(600_000, ranges, ()))
    share = ShareMap("a", entries, entries)
    mount = build_mount_map(share, identity)
    for guest in range(300):
        on_disk, outside = look_up(entries, guest), look_up(identity.uid_map, guest)
        if on_disk is not None and outside is not None:
            assert look_up(mount.uid_map, on_disk) == outside
    reached = {entry.outside + index for entry in mount.uid_map for index in range(entry.count)}
    assert reached == {look_up(identity.uid_map, guest) for guest in range(300) if look_up(entries, guest) is not None} - {None}
    missing = [guest for guest in range(300) if look_up(entries, guest) is not None and look_up(identity.uid_map, guest) is None]
    assert find_unmapped(share, identity) == (missing[0] if missing else None)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (SHARE, {"a", "tag"}),
        (("-virtfs", "local,path=dir,mount_tag=tag,security_model=none"), {"tag"}),
        (("-virtfs", "local,path=dir,mount_tag=tag,security_model=none,id=b"), {"tag", "b"}),
    ],
)
def test_a_share_is_known_by_its_id_and_its_tag(words: tuple[str, ...], names: set[str]) -> None:
    objects = read(*words).objects
    share = next(obj for obj in objects if obj.kind in ("fsdev", "virtfs"))
    assert find_names(share, objects) == names
    last = ShareMap("tag", ONE, ONE)
    assert find_map((ShareMap("tag", (), ()), last, ShareMap("other", ONE, ONE)), share, objects) == last


def refusals(plan: Plan) -> list[str]:
    return [refusal.reason for refusal in plan.find_refusals()]


def test_root_gets_an_idmapped_mount() -> None:
    plan = plan_of(*SHARE, root=True, settings=Settings(share_maps=(ShareMap("a", ONE, ONE),)))
    (share,) = (grant for grant in plan.grants if isinstance(grant, Bind) and grant.path == f"{CWD}/dir")
    ids = (MapEntry(5000, 601_000, 1),)
    assert share.idmap == MountMap(ids, ids, "guest's 1000 is 5000 on disk")
    assert share.describe() == f"{CWD}/dir (rw, guest's 1000 is 5000 on disk)"


@pytest.mark.parametrize(
    ("root", "path", "model", "entry", "reason"),
    [
        (True, "dir", "passthrough", MapEntry(70_000, 1, 1), "guest id 70000 is in its id map, and not in QEMU's user namespace"),
        (False, "dir", "passthrough", MapEntry(0, 5000, 1), "only root can give a share another id map than the VM's"),
        (True, "dir", "mapped-xattr", ONE[0], "security_model=mapped-xattr keeps the guest's ids beside the files"),
        (True, "dir", "passthrough", MapEntry(5, 0, 1), "host root is in its id map"),
        (True, "/", "passthrough", ONE[0], "the whole host tree cannot be shown with other ids"),
        (True, "/dev/fd/7", "passthrough", ONE[0], "an fd of the caller cannot be shown with other ids"),
    ],
)
def test_what_cannot_be_mapped_is_refused(root: bool, path: str, model: str, entry: MapEntry, reason: str) -> None:
    words = ("-fsdev", f"local,id=a,path={path},security_model={model}")
    settings = Settings(share_maps=(ShareMap("a", (entry,), (entry,)),))
    assert refusals(plan_of(*words, root=root, fds=(7,), settings=settings)) == [reason]


@pytest.mark.parametrize("maps", [("a",), ("b",), ("a", "b")])
def test_one_directory_has_one_map(maps: tuple[str, ...]) -> None:
    words = [word for name in "ab" for word in ("-fsdev", f"local,id={name},path=dir,security_model=passthrough")]
    made = tuple(ShareMap(name, (MapEntry(0, ord(name), 1),), ONE) for name in maps)
    plan = plan_of(*words, root=True, settings=Settings(share_maps=made))
    assert refusals(plan) == ["two shares of one directory have different id maps"]
