"""Walking paths as the kernel does."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_userns.host.paths import PathWalker, find_fd
from qemu_userns.plan.facts import ABSENT, CHARACTER, DIRECTORY, FIFO, REGULAR, SOCKET, PathFact

not_root = pytest.mark.ordinary


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The working directory, with a small tree in it."""
    real = tmp_path.resolve()
    (real / "dir/sub").mkdir(parents=True)
    (real / "dir/file").write_text("text")
    (real / "dir/sub/inner").touch()
    monkeypatch.chdir(real)
    return str(real)


def look(path: str) -> PathFact:
    return PathWalker(os.getcwd(), privileged=False).look(path)


def test_a_file(here: str) -> None:
    fact = look("dir/file")
    status = os.stat("dir/file")
    assert (fact.given, fact.real, fact.kind, fact.error) == ("dir/file", f"{here}/dir/file", REGULAR, None)
    assert (fact.inode, fact.mode, fact.uid) == ((status.st_dev, status.st_ino), status.st_mode, os.geteuid())
    assert (fact.links, fact.passed) == ((), ())
    assert fact.readable
    assert fact.writable
    assert fact.parent_writable


@pytest.mark.parametrize("path", ["./dir//file", "dir/./file", "dir/sub/../file", "/../{here}/dir/file"])
def test_spellings_of_one_file(path: str, here: str) -> None:
    assert look(path.replace("{here}", here)).real == f"{here}/dir/file"


@pytest.mark.parametrize("path", ["/", "//", "/..", "/../.."])
def test_the_root(path: str) -> None:
    fact = look(path)
    assert (fact.real, fact.kind, fact.error) == ("/", DIRECTORY, None)


def test_what_dotdot_leaves_again_is_noted(here: str) -> None:
    """The view needs dir/sub, or the kernel finds nothing to leave."""
    assert look("dir/sub/../file").passed == (f"{here}/dir/sub",)
    assert look("dir/sub/../../dir/file").passed == (f"{here}/dir/sub", f"{here}/dir")


def test_a_chain_of_links_is_noted_in_order(here: str) -> None:
    os.symlink("second", "first")
    os.symlink(f"{here}/dir", "second")
    fact = look("first/file")
    assert fact.real == f"{here}/dir/file"
    assert fact.links == ((f"{here}/first", "second"), (f"{here}/second", f"{here}/dir"))


def test_dotdot_after_a_link_leaves_its_target(here: str) -> None:
    os.symlink("dir/sub", "link")
    fact = look("link/../file")
    assert fact.real == f"{here}/dir/file"
    assert fact.passed == (f"{here}/dir/sub",)


def test_a_link_in_a_links_target(here: str) -> None:
    os.symlink("dir", "a")
    os.symlink("a/sub/../file", "b")
    fact = look("b")
    assert fact.real == f"{here}/dir/file"
    assert fact.links == ((f"{here}/b", "a/sub/../file"), (f"{here}/a", "dir"))


@pytest.mark.parametrize(("links", "path"), [({"loop": "loop"}, "loop"), ({"a": "b", "b": "a"}, "a/x")])
def test_loops_end(links: dict[str, str], path: str) -> None:
    for name, target in links.items():
        os.symlink(target, name)
    fact = look(path)
    assert (fact.kind, fact.error) == (ABSENT, os.strerror(errno.ELOOP))


def test_as_many_links_as_the_kernel_follows() -> None:
    os.symlink("dir/file", "0")
    for number in range(1, 45):
        os.symlink(str(number - 1), str(number))
    for number in range(45):
        try:
            os.stat(str(number))
            expected = None
        except OSError as err:
            expected = err.strerror
        assert look(str(number)).error == expected, number


def test_a_file_that_is_not_there_has_a_place(here: str) -> None:
    fact = look("dir/new")
    assert (fact.kind, fact.real, fact.error, fact.parent_writable) == (ABSENT, f"{here}/dir/new", None, True)
    fact = look("dir/no/new")
    assert (fact.kind, fact.real, fact.error) == (ABSENT, f"{here}/dir/no/new", os.strerror(errno.ENOENT))


def test_a_dangling_link_leads_to_the_place_where_the_file_would_be_made(here: str) -> None:
    os.symlink("dir/new", "dangling")
    fact = look("dangling")
    assert (fact.kind, fact.real, fact.error) == (ABSENT, f"{here}/dir/new", None)
    assert fact.links == ((f"{here}/dangling", "dir/new"),)


@pytest.mark.parametrize("path", ["dir/file/x", "dir/file/.."])
def test_a_file_is_no_directory(path: str) -> None:
    assert errno_of_stat(path) == errno.ENOTDIR
    assert look(path).error == os.strerror(errno.ENOTDIR)


@pytest.mark.parametrize("path", ["dir/file/", "dir/file/."])
def test_a_slash_behind_a_file(path: str) -> None:
    assert errno_of_stat(path) == errno.ENOTDIR
    assert look(path).error == os.strerror(errno.ENOTDIR)


@not_root
def test_a_directory_that_cannot_be_searched() -> None:
    os.chmod("dir", 0o600)
    try:
        assert look("dir/file").error == os.strerror(errno.EACCES)
        assert look("dir/sub/../file").error == os.strerror(errno.EACCES)
    finally:
        os.chmod("dir", 0o700)


@not_root
def test_what_the_caller_may() -> None:
    os.chmod("dir/file", 0)
    os.chmod("dir", 0o500)
    fact = look("dir/file")
    assert (fact.readable, fact.writable, fact.parent_writable, fact.error) == (False, False, False, None)
    os.chmod("dir", 0o700)


def test_kinds() -> None:
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
    found = [look(path).kind for path in ("fifo", "sock", "/dev/null", "dir", "dir/file")]
    assert found == [FIFO, SOCKET, CHARACTER, DIRECTORY, REGULAR]
    assert look("/dev/null").device == os.stat("/dev/null").st_rdev


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/dev/fd/7", 7),
        ("/proc/self/fd/12", 12),
        ("/dev/stdin", 0),
        ("/dev/stdout", 1),
        ("/dev/stderr", 2),
        ("/dev/fd/", None),
        ("/dev/fd/x", None),
        ("/dev/fd/7/x", None),
        ("/dev/fd/-1", None),
        ("fd/7", None),
    ],
)
def test_fds(path: str, number: int | None) -> None:
    assert find_fd(path) == number
    assert (look(path).fd if number is not None else None) == number


def test_names_of_any_bytes(here: str) -> None:
    name = os.fsdecode(b"\xff\n ,'\"")
    Path(name).touch()
    assert look(name).real == f"{here}/{name}"


def test_a_name_that_is_too_long() -> None:
    assert look("x" * 256).error == os.strerror(errno.ENAMETOOLONG)


def test_an_empty_path() -> None:
    assert errno_of_stat("") == errno.ENOENT
    assert look("").kind == ABSENT


def errno_of_stat(path: str) -> int | None:
    try:
        os.stat(path)
    except OSError as err:
        return err.errno
    return None


PARTS = st.lists(
    st.sampled_from(["dir", "sub", "file", "inner", "..", ".", "up", "abs", "dangling", "no"]), min_size=1, max_size=6
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(PARTS, st.booleans())
def test_the_kernel_walks_the_same_way(parts: list[str], absolute: bool) -> None:
    here = os.getcwd()
    for name, target in (("up", "dir/sub/.."), ("abs", f"{here}/dir"), ("dir/sub/up", "../.."), ("dangling", "dir/none/x")):
        if not os.path.lexists(name):
            os.symlink(target, name)
    path = "/".join([here, *parts] if absolute else parts)
    fact = look(path)
    wanted = errno_of_stat(path)
    if wanted is None:
        assert fact.error is None
        status = os.stat(path)
        assert fact.inode == (status.st_dev, status.st_ino)
        assert fact.real == os.path.realpath(path)
    elif path.endswith("/.") and "file" in [*parts, "inner"]:
        return  # test_a_slash_behind_a_file
    else:
        assert fact.kind == ABSENT


@pytest.mark.root
@pytest.mark.parametrize("where", ["last", "parent", "chain"])
def test_root_follows_no_symlink_of_somebody_else(tmp_path: Path, where: str) -> None:
    """What root opens is given to a guest, and the link may be the guest's own from its last run."""
    folder = Path(os.path.realpath(tmp_path))
    (folder / "secret").mkdir()
    (folder / "secret/file").write_text("root's")
    os.symlink(folder / "secret/file" if where == "last" else folder / "secret", folder / "theirs")
    os.lchown(folder / "theirs", 1001, 1001)
    os.symlink("theirs", folder / "ours")
    given = {"last": "theirs", "parent": "theirs/file", "chain": "ours/file"}[where]
    walker = PathWalker(str(folder), privileged=True)
    assert walker.look(given).error == f"{folder}/theirs is a symlink of uid 1001, which root does not follow"
    assert walker.look(given).kind == ABSENT
    os.lchown(folder / "theirs", 0, 0)
    assert PathWalker(str(folder), privileged=True).look(given).real == f"{folder}/secret/file"
