"""`qemu-userns share`: real directories, a kill at every system call that changes something, attacks, and QEMU's own view."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from integration.file_systems import file_systems
from integration.raw9p import TGETATTR, NineError, RawShare, raw_share
from integration.share_trees import GROUP, OWNER, PROGRAM, make_tree, own_views, share, snapshot, to_mapped, to_passthrough, views
from qemu_userns.cli.share import share as command
from qemu_userns.errors import ResourceError
from qemu_userns.host.own_ids import enter_own_ids, find_own_ids
from qemu_userns.linux.files import exchange
from qemu_userns.linux.process import prctl
from qemu_userns.shares.convert import convert, scan
from qemu_userns.shares.idmap import Translation
from qemu_userns.shares.journal import Journal, find_journal
from qemu_userns.shares.wanted import Job
from tests.conftest import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.xattr]

MAPPED = ("mapped-xattr", "mapped-file")
MODE, UID_AND_GID = 1, 6
PR_SET_PTRACER = 0x59616D61
CHANGING = (
    *("setxattr", "removexattr", "fchownat", "chmod", "fchmod", "fchmodat", "renameat2", "rename", "renameat", "unlink"),
    *("unlinkat", "mkdir", "mkdirat", "rmdir", "symlinkat", "mknodat", "linkat", "write", "fsync", "utimensat", "ftruncate"),
)


def check(*words: str | Path) -> str:
    done = share(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_progress_is_for_who_looks_on(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    count = len(snapshot(root))
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-I", "-c", PROGRAM, *map(str, to_mapped(root, "mapped-xattr"))]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60)
        said = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert said.endswith(f"\r{count} of {count}\r\n")
    assert done.stdout == f"{count} entries converted from passthrough to mapped-xattr\n"


@pytest.mark.parametrize("model", MAPPED)
def test_there_and_back_everything_is_as_it_was(shared_tmp: Path, model: str) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    before, seen = snapshot(root), views(root)
    plan = check(*to_mapped(root, model), "--dry-run")
    assert snapshot(root) == before
    assert f"{len(before)} entries can be converted" in plan
    check(*to_mapped(root, model))
    for path, entry in views(root).items():
        host = entry["host"]
        assert (host["uid"], host["gid"]) == (OWNER, GROUP), path
        assert host["mode"] in (stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700), path
        assert entry[model] == seen[path]["passthrough"], path
    if model == "mapped-file":
        assert os.path.samefile(root / ".virtfs_metadata" / "plain", root / "d" / ".virtfs_metadata" / "plain2")
    check(*to_passthrough(root, model))
    assert snapshot(root) == before
    assert [path.name for path in shared_tmp.iterdir()] == ["share"]


@pytest.mark.root
@pytest.mark.parametrize("model", MAPPED)
@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs", "tmpfs", "overlay"])
def test_on_every_file_system(shared_tmp: Path, name: str, model: str) -> None:
    with file_systems(shared_tmp, [name]):
        root = shared_tmp / name / "share"
        make_tree(root)
        before, seen = snapshot(root), views(root)
        check(*to_mapped(root, model))
        assert {path: entry[model] for path, entry in views(root).items()} == {
            path: entry["passthrough"] for path, entry in seen.items()
        }
        check(*to_passthrough(root, model))
        assert snapshot(root) == before


def test_from_one_mapped_model_to_the_other(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    before = snapshot(root)
    check(*to_mapped(root, "mapped-xattr"))
    check("convert", root, "--from=mapped-xattr", "--to=mapped-file")
    assert not any(name.startswith("user.virtfs") for path in root.rglob("*") for name in os.listxattr(path))
    check("convert", root, "--from=mapped-file", "--to=mapped-xattr")
    assert not list(root.rglob(".virtfs_metadata*"))
    check(*to_passthrough(root, "mapped-xattr"))
    assert snapshot(root) == before


@pytest.mark.parametrize("model", MAPPED)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from(["dir", "file", "link", "fifo"]),
            st.binary(min_size=1, max_size=20).filter(lambda n: not {0, 47} & set(n) and n not in (b".", b"..")),
            st.integers(0, 0o7777),
            st.tuples(st.integers(1, 1 << 31), st.integers(1, 0xFFFFFFFE)),
        ),
        max_size=12,
    )
)
def test_any_tree_comes_back(shared_tmp: Path, model: str, entries: list[tuple[str, bytes, int, tuple[int, int]]]) -> None:
    root = shared_tmp / "share"
    root.mkdir()
    folder = os.fsencode(root)
    for kind, name, mode, (uid, gid) in entries:
        path = folder + b"/" + name
        if os.path.lexists(path) or name.startswith(b".virtfs_"):
            continue
        if kind == "link":
            os.symlink(name * 3, path)
        elif kind == "dir":
            os.mkdir(path)
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            with open(path, "wb") as file:
                file.write(name)
        if os.geteuid() == 0:
            os.chown(path, uid, gid, follow_symlinks=False)
        if kind != "link":
            os.chmod(path, mode if os.geteuid() == 0 else mode | 0o500)
        if kind == "dir" and os.geteuid() == 0:
            folder = path
    before = snapshot(root)
    run(root, "passthrough", model)
    run(root, model, "passthrough")
    try:
        assert snapshot(root) == before
    finally:
        remove_tree(root)


def run(root: Path, source: str, target: str) -> None:
    """Convert within this process."""
    job = Job(source, target, Translation(), (OWNER, GROUP), True, os.geteuid(), frozenset(os.getgroups()))
    journal = Journal(find_journal(str(root)), {"job": target})
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert scan(fd, job, journal)[2] == []
        journal.start()
        convert(fd, job, journal, lambda _: None)
        journal.close(True)
    finally:
        journal.close(False)
        os.close(fd)


# --- killed anywhere --------------------------------------------------------------------------------------------------


@pytest.mark.strace
@pytest.mark.slow
@pytest.mark.parametrize("model", MAPPED)
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_a_run_that_is_killed_at_any_change_is_finished_by_the_next(shared_tmp: Path, model: str, back: bool) -> None:
    pristine, root = shared_tmp / "pristine", shared_tmp / "share"
    make_tree(pristine)
    original = views(pristine)
    copy(pristine, root)
    check(*to_mapped(root, model))
    mapped = views(root)
    check(*to_passthrough(root, model))
    passthrough = snapshot(root)
    if back:
        check(*to_mapped(pristine, model))
    words = (to_passthrough if back else to_mapped)(root, model)
    counts = count_calls(pristine, root, words)
    assert {"renameat2", "write"} < counts.keys()
    for call, count in counts.items():
        for when in range(1, count + 1):
            copy(pristine, root)
            rule = f"inject={call}:signal=SIGKILL:when={when}"
            status = run_traced(words, "-o", "/dev/null", "-e", f"trace={call}", "-e", rule)
            if call == "write" and status == 0:
                continue  # a line on stderr less: another user's QEMU that may serve the share has ended meanwhile
            assert status == -signal.SIGKILL, f"{call} {when}"
            assert_readable(root, original, model, f"{call} {when}")
            finish(words)
            if back:
                assert without_times(snapshot(root)) == without_times(passthrough), f"{call} {when}"
            else:
                assert views(root) == mapped, f"{call} {when}"
            assert {path.name for path in shared_tmp.iterdir()} == {"pristine", "share"}


def finish(words: list[str | Path]) -> None:
    """Run a conversion again, within this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert command([str(word) for word in words]) == 0


def run_traced(words: list[str | Path], *options: str) -> int:
    """Run a conversion in a fork under strace, which sees it alone: it would stop at each system call of a new interpreter's
    start and imports. Return its exit status; negative: the signal that ended it.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with contextlib.suppress(OSError):  # without Yama everybody may trace his own processes
                prctl(PR_SET_PTRACER, os.getppid())
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                os.kill(os.getpid(), signal.SIGSTOP)
                status = command([str(word) for word in words])
        finally:
            os._exit(status)
    os.waitpid(child, os.WUNTRACED)
    with subprocess.Popen(["strace", "-p", str(child), *options], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        attached = strace.stderr.readline()
        os.kill(child, signal.SIGCONT if attached.endswith("attached\n") else signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert attached.endswith("attached\n"), attached
    return status


def count_calls(pristine: Path, root: Path, words: list[str | Path]) -> dict[str, int]:
    """Return how often a conversion makes each system call that changes something."""
    copy(pristine, root)
    trace = root.parent / "trace"
    assert run_traced(words, "-o", str(trace), "-e", f"trace={','.join(CHANGING)}") == 0
    calls = [line.partition("(")[0] for line in trace.read_text().splitlines() if re.match(r"\w+\(", line)]
    trace.unlink()
    return {call: calls.count(call) for call in CHANGING if call in calls}


def copy(source: Path, target: Path) -> None:
    if target.exists():
        remove_tree(target)
    subprocess.run(["cp", "-a", source, target], check=True)


def assert_readable(root: Path, original: dict[str, dict[str, object]], model: str, at: str) -> None:
    """Check that one format or the other reads each entry as what it was, where the kernel's calls permit that."""
    for path, entry in views(root).items():
        if ".virtfs_convert-" in path:
            continue
        wanted = original[path]["passthrough"]
        if model == "mapped-file" and path in ("plain", "d/plain2"):
            continue  # several names: see qemu_userns/shares/convert.py
        if os.geteuid() != 0 and path in ("readonly", "d/deep"):
            continue  # no write permission: likewise
        assert wanted in (entry["passthrough"], entry[model]), f"killed at {at}: {path} reads as {entry}"


def without_times(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """Leave out the times of directories, which a killed run does not put back."""
    return {name: (*row[:4], None if stat.S_ISDIR(int(str(row[0]))) else row[4], *row[5:]) for name, row in found.items()}


# --- refused, and attacked --------------------------------------------------------------------------------------------


def refused(*words: str | Path) -> str:
    done = share(*words)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 0
    return done.stderr


def test_what_is_mapped_already_is_not_mapped_again(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    check(*to_mapped(root, "mapped-xattr"))
    before = snapshot(root)
    assert f"{len(before)} entries are mapped-xattr already" in check(*to_mapped(root, "mapped-xattr"))
    assert snapshot(root) == before
    (root / "new").write_text("by the host")
    before = snapshot(root)
    assert "plain: has attributes of mapped-xattr already" in refused(*to_mapped(root, "mapped-xattr"))
    assert snapshot(root) == before


@pytest.mark.root
def test_what_a_guest_planted_does_not_become_host_roots(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    root.mkdir()
    os.chown(root, OWNER, GROUP)
    for name, mode, uid in (
        ("shell", stat.S_IFREG | 0o4755, 0),
        ("disk", stat.S_IFBLK | 0o666, 5),
        ("gid", stat.S_IFREG | 0o2755, 5),
    ):
        (root / name).touch(0o600)
        for key, value in (("uid", uid), ("gid", 0 if name == "gid" else 5), ("mode", mode)):
            os.setxattr(root / name, f"user.virtfs.{key}", struct.pack("<I", value))
        os.setxattr(root / name, "user.virtfs.rdev", struct.pack("<Q", os.makedev(8, 0)))
    before = snapshot(root)
    errors = refused("convert", root, "--from", "mapped-xattr", "--to", "passthrough")
    for line in ("shell: its uid would be host root's", "disk: would be a device node", "gid: its gid would be host root's"):
        assert line in errors
    assert "3 of 4 entries cannot be converted" in errors
    assert snapshot(root) == before
    assert "is in no map" in refused("convert", root, "--from", "mapped-xattr", "--to", "passthrough", "--map", "both 1000 5")
    assert "host root" in refused("inspect", root, "--map", "both 0 0")


@pytest.mark.root
@pytest.mark.parametrize("model", MAPPED)
def test_ids_go_through_the_map(shared_tmp: Path, model: str) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    for path in [root, *root.rglob("*")]:
        os.chown(path, 100005, 200006, follow_symlinks=False)
    before = {name: row[1:3] for name, row in snapshot(root).items()}
    ids = ["--map", "uid 100000-100009 0-9, gid 200000-200009 10-19"]
    check(*to_mapped(root, model), *ids)
    assert {(entry[model]["uid"], entry[model]["gid"]) for entry in views(root).values()} == {(5, 16)}
    os.unlink(root / "null")
    os.unlink(root / "d" / "disk")
    (root / ".virtfs_metadata" / "null").unlink(missing_ok=True)
    check("convert", root, "--from", model, "--to", "passthrough", *ids)
    assert {name: row[1:3] for name, row in snapshot(root).items()} == {
        n: r for n, r in before.items() if n not in ("null", "d/disk")
    }


@pytest.mark.ordinary
def test_a_user_cannot_convert_the_files_of_others(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    before = snapshot(root)
    assert "only root can give it away" in refused(*to_mapped(root, "mapped-xattr")[:-1], f"{OWNER + 1}:{GROUP}")
    assert snapshot(root) == before


@pytest.mark.root
def test_access_control_lists_follow(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    subprocess.run(["setfacl", "-m", "u:1234:rwx,g:77:r", "-m", "d:u:1234:rx", root / "d"], check=True)
    before = snapshot(root)
    check(*to_mapped(root, "mapped-xattr"))
    assert "user.virtfs.system.posix_acl_access" in os.listxattr(root / "d")
    assert "system.posix_acl_access" not in os.listxattr(root / "d")
    assert "which mapped-file does not keep" in refused("convert", root, "--from", "mapped-xattr", "--to", "mapped-file")
    check(*to_passthrough(root, "mapped-xattr"))
    assert snapshot(root) == before


def test_a_name_outside_of_the_share_is_found(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    os.link(root / "plain", shared_tmp / "outside")
    assert "plain2: has names outside of the share" in refused(*to_mapped(root, "mapped-xattr")).replace("plain:", "plain2:")


def test_another_conversion_has_to_be_finished_first(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    journal = Journal(find_journal(str(root)), {"from": "passthrough", "to": "mapped-file"})
    journal.start()
    journal.close(False)
    assert "another conversion has been begun" in refused(*to_mapped(root, "mapped-xattr"))


def test_symlinks_that_are_swapped_in_lead_nowhere(shared_tmp: Path) -> None:
    secret = shared_tmp / "secret"
    secret.mkdir(0o755)
    (secret / "file").write_text("what nobody may change")
    (secret / "file").chmod(0o644)
    outside = snapshot(secret)
    swaps = 0
    for turn in range(12):
        root = shared_tmp / f"share{turn}"
        (root / "a").mkdir(parents=True)
        for number in range(20):
            (root / "a" / f"file{number}").symlink_to("x")
        (root / "a" / "file").write_text("mine")
        with swapping(root, secret) as count:
            share(*to_mapped(root, MAPPED[turn % 2]))
        swaps += count[0]
        assert snapshot(secret) == outside
    assert swaps > 100


@contextlib.contextmanager
def swapping(root: Path, secret: Path) -> Iterator[list[int]]:
    """Put symlinks to a secret in the place of a directory and of a file, over and over; count how often."""
    stop, count = threading.Event(), [0]

    def attack() -> None:
        while not stop.is_set():
            for name, target in (("a", secret), ("a/file", secret / "file")):
                with contextlib.suppress(OSError):
                    os.rename(root / name, root / "aside")
                    os.symlink(target, root / name)
                    count[0] += 1
                    os.unlink(root / name)
                    os.rename(root / "aside", root / name)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def test_a_file_that_is_put_in_the_place_of_an_entry_stays(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst moment: the replacement is complete, and about to change places with what was looked at."""
    root = shared_tmp / "share"
    root.mkdir()
    (root / "link").symlink_to("target")

    def swap_first(dirfd: int, name: str, other: str) -> None:
        if not (root / "aside").is_symlink():
            os.rename(root / "link", root / "aside")
            (root / "link").write_text("somebody else's")
        exchange(dirfd, name, other)

    monkeypatch.setattr("qemu_userns.shares.convert.exchange", swap_first)
    with pytest.raises(ResourceError, match="has been replaced meanwhile"):
        run(root, "passthrough", "mapped-xattr")
    assert (root / "link").read_text() == "somebody else's"
    assert {path.name for path in root.iterdir()} == {"link", "aside"}


# --- what QEMU says ---------------------------------------------------------------------------------------------------


@pytest.mark.qemu
@pytest.mark.parametrize("model", MAPPED)
def test_the_guest_sees_what_inspect_says(shared_tmp: Path, model: str) -> None:
    root = shared_tmp / "share"
    make_tree(root)
    check("convert", root, "--from", "passthrough", "--to", model, "--owner", f"{os.geteuid()}:{os.getegid()}")
    told = views(root)
    with raw_share(["qemu-system-x86_64"], root, model) as session:
        for path, entry in told.items():
            seen = attributes(session, path)
            wanted = entry[model]
            assert seen == (wanted["mode"], wanted["uid"], wanted["gid"], wanted["rdev"]), path
        session.walk(70, "link")
        session.open(70)
        assert session.read(70)
        with pytest.raises(NineError):
            session.walk(71, ".virtfs_metadata") if model == "mapped-file" else session.walk(71, "no such")
        assert f"(pid {session.pid}) serves it" in refused(*to_passthrough(root, model))
    check(*to_passthrough(root, model))


@pytest.mark.qemu
def test_access_control_lists_are_where_qemu_looks_for_them(shared_tmp: Path) -> None:
    root = shared_tmp / "share"
    (root / "d").mkdir(parents=True)
    (root / "file").touch()
    (root / "file").chmod(0o775)  # as the list that it gets says, which a guest's kernel sees to
    (root / "d").chmod(0o755)
    subprocess.run(["setfacl", "-m", f"u:{OWNER}:rwx", "-m", f"d:u:{OWNER}:rx", root / "d"], check=True)
    lists = {name: os.getxattr(root / "d", name) for name in os.listxattr(root / "d") if "acl" in name}
    os.setxattr(root / "d", "user.mine", b"kept")
    check("convert", root, "--from", "passthrough", "--to", "mapped-xattr", "--owner", f"{os.geteuid()}:{os.getegid()}")
    with raw_share(["qemu-system-x86_64"], root, "mapped-xattr") as session:
        session.walk(60, "d")
        for number, (name, value) in enumerate((*lists.items(), ("user.mine", b"kept")), 61):
            session.get_xattr(60, number, name)
            assert value in session.read(number)
        with pytest.raises(NineError):
            session.get_xattr(60, 70, "user.virtfs.mode")
        session.set_xattr("system.posix_acl_access", lists["system.posix_acl_access"], "file")
    check(*to_passthrough(root, "mapped-xattr"))
    assert {name: os.getxattr(root / "d", name) for name in lists} == lists
    assert os.getxattr(root / "file", "system.posix_acl_access") == lists["system.posix_acl_access"]


@pytest.mark.ordinary
@pytest.mark.dropin
@pytest.mark.newuidmap
@pytest.mark.parametrize("model", MAPPED)
def test_what_a_guest_made_with_the_callers_subordinate_ids(shared_tmp: Path, dropin: list[str], model: str) -> None:
    """In a private directory, too, which the caller cannot even look into."""
    root = shared_tmp / "share"
    root.mkdir()
    (root / "mine").write_text("the caller's")
    ranges = find_own_ids()
    assert ranges is not None
    first = ranges[0][1].start
    with raw_share(dropin, root, "passthrough") as session:
        session.mkdir("private")
        session.walk(60, "private")
        session.create(60, "inner")
        session.symlink("link", "nowhere")
        for fid, names in enumerate((["private", "inner"], ["private"]), 61):
            session.walk(fid, *names)
            session.set_attributes(fid, UID_AND_GID, uid=1000, gid=1000)
            session.set_attributes(fid, MODE, mode=0o700)
    before = own_views(root)
    assert (before["private/inner"]["host"]["uid"], before["private/inner"]["host"]["mode"] & 0o7777) == (first + 999, 0o700)
    ids = ["--map", ",".join(f"{kind} {own}-{own} 0,{kind} {first}-{first + 9999} 1-10000" for kind, own in owners_of(root))]
    check(*to_mapped(root, model), *ids)
    assert {(path.lstat().st_uid, path.lstat().st_mode & 0o077) for path in root.rglob("*")} == {(OWNER, 0)}
    with raw_share(["qemu-system-x86_64"], root, model) as session:
        assert attributes(session, "private/inner")[:3] == (stat.S_IFREG | 0o700, 1000, 1000)
        assert attributes(session, "link")[:3] == (stat.S_IFLNK | 0o777, 0, 0)
    check(*to_passthrough(root, model)[:-1], *ids)
    assert own_views(root) == before
    assert "would belong to 0:0; only root can give it away" in refused(*to_mapped(root, model)[:-1], "0:0")
    empty(root)


def owners_of(root: Path) -> list[tuple[str, int]]:
    return [("uid", root.stat().st_uid), ("gid", root.stat().st_gid)]


def empty(root: Path) -> None:
    """Remove what is in a share, of whichever of the caller's ids it is."""
    ranges = find_own_ids()
    assert ranges is not None
    child = os.fork()
    if child == 0:
        enter_own_ids(ranges)
        remove_tree(root)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def attributes(session: RawShare, path: str) -> tuple[int, int, int, int]:
    """Return mode, uid, gid and device number by Tgetattr."""
    session.walk(60, *([] if path == "." else path.split("/")))
    answer = session.call(TGETATTR, struct.pack("<IQ", 60, 0x7FF))
    session.clunk(60)
    mode, uid, gid, _, rdev = struct.unpack_from("<IIIQQ", answer, 21)
    return mode, uid, gid, rdev
