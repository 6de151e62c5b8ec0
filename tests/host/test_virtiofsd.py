"""Finding virtiofsd."""

from pathlib import Path

import pytest

from qemu_userns.host.virtiofsd import find_virtiofsd
from qemu_userns.plan.facts import VirtiofsdFact


def program(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\n[ \"$*\" = --help ] && echo '{says}' >&2\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name in ("etc", "usr"):
        (tmp_path / name).mkdir()
    return [str(tmp_path / "etc"), str(tmp_path / "usr")]


def describe(folder: str, name: str, text: str) -> None:
    Path(folder, name).write_text(text)


def test_by_the_first_description_of_a_program_that_is_there(tmp_path: Path, folders: list[str]) -> None:
    old, new = program(tmp_path / "old", "usage: -o source=PATH"), program(tmp_path / "new", "--shared-dir <SHARED_DIR>")
    describe(folders[1], "10-gpu.json", '{"type": "gpu", "binary": "/bin/true"}')
    describe(folders[1], "20-broken.json", "{")
    describe(folders[1], "30-gone.json", '{"type": "fs", "binary": "/nowhere/virtiofsd"}')
    describe(folders[1], "40-list.json", "[]")
    describe(folders[1], "50-fs.json", f'{{"type": "fs", "binary": "{old}"}}')
    assert find_virtiofsd(None, folders, ()) == VirtiofsdFact(str(old), modern=False)
    describe(folders[0], "50-fs.json", f'{{"type": "fs", "binary": "{new}"}}')  # which masks the other of that name
    assert find_virtiofsd(None, folders, ()) == VirtiofsdFact(str(new), modern=True)


def test_by_its_usual_places(tmp_path: Path, folders: list[str]) -> None:
    new = program(tmp_path / "virtiofsd", "--shared-dir")
    assert find_virtiofsd(None, folders, ("/nowhere/virtiofsd", str(new))) == VirtiofsdFact(str(new), modern=True)
    assert find_virtiofsd(None, (), ()) is None


def test_what_it_says_is_kept(tmp_path: Path) -> None:
    new = program(tmp_path / "virtiofsd", "--shared-dir")
    kept = str(tmp_path / "cache")
    first = find_virtiofsd(kept, (), (str(new),))
    assert first == find_virtiofsd(kept, (), (str(new),)) == VirtiofsdFact(str(new), modern=True)
