"""The layout of a view: order, and nothing that is shown becomes less than was granted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_userns.plan.grants import Bind, Copy, Create, CreateDir, Grant, KeepFd, Link, Node, Private, Refuse
from qemu_userns.plan.identity import build_owner_map
from qemu_userns.plan.layout import build_layout, find_covered, find_shown, is_below
from tests.plans import LEASED

ROOTS = build_owner_map(0, 0, LEASED)
NAMES = st.sampled_from(["a", "b", "ab", "a.b", "a-", "A"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda names: "/" + "/".join(names))
GRANTS = st.one_of(
    st.builds(Bind, st.just("why"), PATHS, st.booleans(), st.booleans(), st.just((1, 2)), st.sampled_from([None, ROOTS])),
    st.builds(Private, st.just("why"), PATHS, st.just(0o755), st.booleans()),
    st.builds(Link, st.just("why"), PATHS, st.just("target")),
    st.builds(Copy, st.just("why"), PATHS, st.just("text")),
    st.builds(Create, st.just("why"), PATHS, st.just(0o600)),
    st.builds(CreateDir, st.just("why"), PATHS),
    st.builds(Node, st.just("why"), PATHS, st.just(1), st.booleans()),
    st.builds(KeepFd, st.just("why"), st.integers(3, 9)),
    st.builds(Refuse, st.just("why"), st.just("reason")),
)


def seen_through(layout: tuple[Grant, ...], path: str) -> Grant | None:
    """Return what shows a path: the deepest grant at or above it."""
    above = [grant for grant in layout if not isinstance(grant, Link) and is_below(path, grant.path)]  # type: ignore[attr-defined]
    return max(above, key=lambda grant: len(grant.path), default=None)  # type: ignore[attr-defined]


@settings(deadline=None)
@given(st.lists(GRANTS, max_size=12))
def test_parents_come_before_what_lies_in_them(grants: list[Grant]) -> None:
    paths = [grant.path for grant in build_layout(grants)]
    assert len(set(paths)) == len(paths)
    for index, path in enumerate(paths):
        assert not any(is_below(other, path) for other in paths[:index] if other != path)


@settings(deadline=None)
@given(st.lists(GRANTS, max_size=12))
def test_what_was_granted_writable_stays_writable(grants: list[Grant]) -> None:
    layout = build_layout(grants)
    for grant in grants:
        if isinstance(grant, Create | CreateDir):
            shown = seen_through(layout, grant.path)
            assert isinstance(shown, Create | CreateDir | Copy | Node) or (isinstance(shown, Bind) and shown.writable), grant
        elif isinstance(grant, Bind) and grant.writable:
            shown = seen_through(layout, grant.path)
            assert not isinstance(shown, Bind) or shown.writable, (grant, shown)


@settings(deadline=None)
@given(st.lists(GRANTS, max_size=12))
def test_nothing_becomes_writable_that_was_not_granted_so(grants: list[Grant]) -> None:
    writable = {grant.path for grant in grants if isinstance(grant, Bind) and grant.writable}
    assert {grant.path for grant in build_layout(grants) if isinstance(grant, Bind) and grant.writable} <= writable


@settings(deadline=None)
@given(st.lists(GRANTS, max_size=12))
def test_it_is_the_same_when_done_twice(grants: list[Grant]) -> None:
    layout = build_layout(grants)
    assert build_layout(layout) == layout
    assert build_layout([*grants, *grants]) == layout


@settings(deadline=None)
@given(st.permutations([Bind("a", "/a", True), Bind("b", "/a/b"), Private("c", "/a/b/c"), Create("d", "/a/d", 0o600)]))
def test_the_order_of_the_grants_does_not_matter(grants: list[Grant]) -> None:
    assert [grant.path for grant in build_layout(grants)] == ["/a"]


@pytest.mark.parametrize(
    ("grants", "paths"),
    [
        ([Bind("w", "/usr"), Bind("w", "/usr/bin/x")], ["/usr"]),
        ([Bind("w", "/usr"), Bind("w", "/usr/bin/x", True)], ["/usr", "/usr/bin/x"]),
        ([Bind("w", "/a", True), Bind("w", "/a/b")], ["/a"]),
        ([Bind("w", "/usr"), Bind("w", "/usr/dev", True, True)], ["/usr", "/usr/dev"]),
        ([Bind("w", "/usr"), Link("w", "/usr/lib/x", "y")], ["/usr"]),
        ([Bind("w", "/usr"), Bind("w", "/usr2/x")], ["/usr", "/usr2/x"]),
        ([Bind("w", "/a-b"), Bind("w", "/a"), Bind("w", "/a/c", True)], ["/a", "/a/c", "/a-b"]),
        ([Private("w", "/tmp"), Bind("w", "/tmp/x")], ["/tmp", "/tmp/x"]),
        ([Private("w", "/tmp"), Link("w", "/tmp/l", "x")], ["/tmp", "/tmp/l"]),
        ([Bind("w", "/home"), Private("w", "/home/me", tmpfs=False)], ["/home"]),
        ([Bind("w", "/home"), Private("w", "/home/me")], ["/home"]),
        ([Bind("w", "/a", True), Create("w", "/a/log", 0o600)], ["/a"]),
        ([Bind("w", "/a", True), CreateDir("w", "/a/tmp")], ["/a"]),
        ([Bind("w", "/a"), CreateDir("w", "/a/tmp")], ["/a", "/a/tmp"]),
        ([Bind("w", "/a"), Create("w", "/a/log", 0o600)], ["/a", "/a/log"]),
        ([Bind("w", "/a"), Bind("w", "/a/x", idmap=ROOTS)], ["/a", "/a/x"]),
        ([CreateDir("w", "/a"), Private("w", "/a/cwd", tmpfs=False)], ["/a", "/a/cwd"]),
        ([CreateDir("w", "/a"), CreateDir("w", "/a/tmp")], ["/a", "/a/tmp"]),
        ([CreateDir("w", "/a"), Create("w", "/a/log", 0o600)], ["/a", "/a/log"]),
        ([CreateDir("w", "/a"), Link("w", "/a/l", "x")], ["/a", "/a/l"]),
        ([KeepFd("w", 3), Refuse("w", "no")], []),
    ],
    ids=str,
)
def test_what_a_bind_shows_already_is_left_out(grants: list[Grant], paths: list[str]) -> None:
    assert [grant.path for grant in build_layout(grants)] == paths


def test_temporary_files_do_not_cover_what_the_caller_gives() -> None:
    """A share of /var/tmp, say: what a guest leaves there would go with the VM."""
    temporary = CreateDir("snapshots", "/a")
    for share in (Bind("share", "/a", True), Bind("share", "/a")):
        assert build_layout([share, temporary]) == build_layout([temporary, share]) == (share,)
        assert find_shown([temporary], share) is None


def test_two_readers_of_a_file_are_both_served() -> None:
    grants = [Bind("-drive file", "/x", True, inode=(1, 2)), Bind("-kernel", "/x", inode=(1, 2))]
    for order in (grants, grants[::-1]):
        (only,) = build_layout(order)
        assert isinstance(only, Bind)
        assert only.writable
        assert set(only.why.split(", ")) == {"-drive file", "-kernel"}


def test_a_device_and_a_file_at_one_path() -> None:
    """-drive file=/dev/x and -serial /dev/x, in either order."""
    grants = [Bind("-serial", "/dev/x", True, True), Bind("-drive file", "/dev/x")]
    for order in (grants, grants[::-1]):
        (only,) = build_layout(order)
        assert isinstance(only, Bind)
        assert only.device


@pytest.mark.parametrize(
    ("path", "directory", "below"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/", True),
        ("/", "/a", False),
        ("/a/b", "/a/", True),
    ],
)
def test_is_below(path: str, directory: str, below: bool) -> None:
    assert is_below(path, directory) is below


# --- hot-plug ---------------------------------------------------------------------------------------------------------

LAUNCH = (
    Private("tmp", "/tmp", 0o1777),
    Bind("usr", "/usr"),
    Bind("share", "/srv/share", writable=True),
    Bind("disk", "/srv/disk", writable=True, inode=(1, 2)),
    Bind("iso", "/srv/iso", inode=(1, 3)),
    Bind("null", "/dev/null", True, True),
    Node("node", "/dev/kvm", 5, False),
    Link("link", "/var/run", "/run"),
    CreateDir("big", "/var/tmp"),
    Copy("copy", "/etc/passwd", "text"),
    Create("log", "/srv/log", 0o600),
    Bind("shadow", "/srv/mapped", idmap=ROOTS),
)


@pytest.mark.parametrize(
    ("grant", "by"),
    [
        (Bind("new", "/srv/new"), None),
        (Bind("new", "/tmp/new"), None),
        (Bind("new", "/usr/share/rom"), "/usr"),
        (Bind("new", "/usr/share/rom", writable=True), None),
        (Bind("new", "/srv/share/deep/file", writable=True), "/srv/share"),
        (Bind("new", "/srv/share/node", writable=True, device=True), None),
        (Bind("new", "/srv/share/secret", idmap=ROOTS), None),
        (Bind("new", "/srv/disk"), "/srv/disk"),
        (Bind("new", "/srv/disk", inode=(1, 2)), "/srv/disk"),
        (Bind("new", "/srv/disk", inode=(1, 9)), None),
        (Bind("new", "/srv/iso", inode=(1, 3)), "/srv/iso"),
        (Bind("new", "/srv/iso", writable=True, inode=(1, 3)), None),
        (Bind("new", "/dev/null", True, True), "/dev/null"),
        (Bind("new", "/dev/kvm", True, True), None),
        (Node("new", "/dev/kvm", 5, False), "/dev/kvm"),
        (Node("new", "/dev/kvm", 6, False), None),
        (Link("new", "/var/run", "/run"), "/var/run"),
        (Link("new", "/var/run", "/elsewhere"), None),
        (Link("new", "/usr/link", "target"), "/usr"),
        (Bind("new", "/var/run/file"), None),
        (Bind("new", "/var/tmp", writable=True), None),
        (Bind("new", "/etc/passwd"), None),
        (Create("new", "/srv/log", 0o600), None),
        (Create("new", "/srv/share/log", 0o600), "/srv/share"),
        (Bind("new", "/srv/mapped", idmap=ROOTS), "/srv/mapped"),
        (Bind("new", "/srv/mapped"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else value and value.describe(),
)
def test_what_a_hot_plug_finds_shown_already(grant: Bind | Node | Link | Create, by: str | None) -> None:
    found = find_shown(LAUNCH, grant)
    assert (found and found.path) == by


def test_of_two_at_one_path_the_later_one_is_seen() -> None:
    first, second = Bind("first", "/disk", inode=(1, 1)), Bind("second", "/disk", inode=(1, 2))
    assert find_shown((first, second), first) is None
    assert find_shown((first, second), second) is second


@settings(deadline=None)
@given(st.lists(GRANTS, max_size=12))
def test_what_a_layout_holds_is_shown_unless_it_is_new_or_private(grants: list[Grant]) -> None:
    layout = build_layout(grants)
    for grant in layout:
        assert (find_shown(layout, grant) is grant) == isinstance(grant, Bind | Link | Node)


def test_what_a_directory_covers() -> None:
    assert [grant.path for grant in find_covered(LAUNCH, "/srv")] == [
        "/srv/share",
        "/srv/disk",
        "/srv/iso",
        "/srv/log",
        "/srv/mapped",
    ]
    assert find_covered(LAUNCH, "/srv/share") == ()
