"""The cache of facts about files."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_userns.host import cache

FACTS = {"version": ["QEMU 7.2"], "options": ["a", "b\tc", ""], "none": []}


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """The file that the facts are about, as if written a while ago."""
    path = tmp_path / "subject"
    path.write_text("x")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "parent" / "cache")


def fact_file(directory: str) -> str:
    (name,) = os.listdir(directory)
    return os.path.join(directory, name)


def test_what_is_stored_is_loaded(subject: Path, directory: str) -> None:
    assert cache.load(directory, "k", subject.stat()) is None
    cache.store(directory, "k", subject.stat(), FACTS)
    assert cache.load(directory, "k", subject.stat()) == FACTS
    assert cache.load(directory, "other", subject.stat()) is None
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(fact_file(directory)).st_mode & 0o777 == 0o600


def test_nothing_to_say(subject: Path, directory: str) -> None:
    cache.store(directory, "k", subject.stat(), {})
    assert cache.load(directory, "k", subject.stat()) == {}


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_a_changed_file_is_not_known(subject: Path, directory: str, change: str) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    if change == "size":
        subject.write_text("xy")
        os.utime(subject, (1_700_000_000, 1_700_000_000))
    elif change == "mtime":
        os.utime(subject, ns=(1_700_000_000_000_000_000, 1_700_000_000_000_000_001))
    else:
        os.link(subject, f"{subject}-kept")
        subject.unlink()
        subject.write_text("x")
        os.utime(subject, (1_700_000_000, 1_700_000_000))
    assert cache.load(directory, "k", subject.stat()) is None
    cache.store(directory, "k", subject.stat(), {"new": []})
    assert cache.load(directory, "k", subject.stat()) == {"new": []}


def test_a_file_that_may_change_within_its_mtime_is_not_stored(subject: Path, directory: str) -> None:
    os.utime(subject)
    cache.store(directory, "k", subject.stat(), FACTS)
    assert not os.path.exists(directory)


def test_no_directory(subject: Path) -> None:
    cache.store(None, "k", subject.stat(), FACTS)
    assert cache.load(None, "k", subject.stat()) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_file_that_others_may_write(subject: Path, directory: str, mode: int) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    os.chmod(fact_file(directory), mode)
    assert cache.load(directory, "k", subject.stat()) is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_directory_that_others_may_write(subject: Path, directory: str, mode: int) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    os.chmod(directory, mode)
    assert cache.load(directory, "k", subject.stat()) is None
    os.unlink(fact_file(directory))
    cache.store(directory, "k", subject.stat(), FACTS)
    assert os.listdir(directory) == []


def test_another_owner(subject: Path, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    if os.geteuid() == 0:
        os.chown(fact_file(directory), 1000, 1000)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    assert cache.load(directory, "k", subject.stat()) is None


def test_links_are_not_followed(subject: Path, directory: str, tmp_path: Path) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    path = fact_file(directory)
    os.rename(path, tmp_path / "real")
    os.symlink(tmp_path / "real", path)
    assert cache.load(directory, "k", subject.stat()) is None
    os.symlink(directory, tmp_path / "link")
    assert cache.load(str(tmp_path / "link"), "k", subject.stat()) is None


def test_fifo_and_huge_file(subject: Path, directory: str) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    path = fact_file(directory)
    with open(path, "a") as file:
        file.write("k\tv\n" * (1 << 18))
    assert cache.load(directory, "k", subject.stat()) is None
    os.unlink(path)
    os.mkfifo(path, 0o600)
    assert cache.load(directory, "k", subject.stat()) is None


def test_cut_off_file(subject: Path, directory: str) -> None:
    cache.store(directory, "k", subject.stat(), FACTS)
    whole = Path(fact_file(directory)).read_bytes()
    for size in range(len(whole)):
        Path(fact_file(directory)).write_bytes(whole[:size])
        loaded = cache.load(directory, "k", subject.stat())
        assert loaded is None or whole[size - 1 : size] == b"\n"  # it is written whole: a cut at a line's end cannot happen


@pytest.mark.parametrize("facts", [{"a\tb": ["c"]}, {"a\nb": []}, {"a": ["b\nc"]}])
def test_what_is_not_a_line_is_not_stored(subject: Path, directory: str, facts: "dict[str, list[str]]") -> None:
    cache.store(directory, "k", subject.stat(), facts)
    assert cache.load(directory, "k", subject.stat()) is None


def test_unwritable_directory_is_no_cache(subject: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache.store(f"{tmp_path}/file/cache", "k", subject.stat(), FACTS)
    cache.store("/proc/cache", "k", subject.stat(), FACTS)


def test_no_temporary_file_is_left(subject: Path, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    cache.store(directory, "k", subject.stat(), FACTS)
    assert os.listdir(directory) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.text(st.characters(exclude_categories=["Cs"])))
    )
)
def test_facts_come_back_or_are_not_stored(subject: Path, directory: str, facts: "dict[str, list[str]]") -> None:
    if os.path.exists(directory):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
    cache.store(directory, "k", subject.stat(), facts)
    assert cache.load(directory, "k", subject.stat()) in (facts, None)


@pytest.mark.parametrize(
    ("environ", "euid", "directory"),
    [
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, 0, "/var/cache/qemu-userns"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, 1000, "/x/qemu-userns"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "x"}, 1000, "/h/.cache/qemu-userns"),
        ({"HOME": "/h"}, 1000, "/h/.cache/qemu-userns"),
        ({"HOME": ""}, 1000, None),
        ({}, 1000, None),
    ],
)
def test_cache_dir(environ: "dict[str, str]", euid: int, directory: "str | None") -> None:
    assert cache.cache_dir(environ, euid) == directory
