"""Looking at the host: what is listed of the directories that QEMU looks for files in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qemu_userns.catalogue.needs import find_needs
from qemu_userns.host.facts import look_at_host
from qemu_userns.plan.facts import ABSENT, REGULAR, Account, Caller
from tests.plans import LEASED, USER, read

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qemu_userns.plan.facts import PathFact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of credentials: symlinks, one of them to nowhere, files that everybody and that nobody else may read."""
    folder = tmp_path.resolve() / "D"
    folder.mkdir()
    (folder.parent / "key").write_text("key")
    for name, target in (("server-key.pem", "../key"), ("ca-cert.pem", "nowhere"), ("other", "../key")):
        (folder / name).symlink_to(target)
    (folder / "server-cert.pem").write_text("certificate")
    (folder / "dh-params.pem").write_text("parameters")
    (folder / "dh-params.pem").chmod(0o600)
    return folder


def look(*words: str, root: bool) -> Mapping[str, PathFact]:
    commandline = read(*words)
    caller = Caller(Account("somebody", os.geteuid(), os.getegid(), ()), root, os.getcwd(), 0o022, 1024, frozenset((0, 1, 2)))
    needs = find_needs(commandline)
    return look_at_host(needs, commandline.objects, caller, LEASED if root else USER, {}, "/usr/bin/env", ()).paths


def test_the_symlinks_of_a_directory_are_listed_and_those_that_qemu_looks_for_are_followed(folder: Path) -> None:
    paths = look("-object", f"tls-creds-x509,id=t,dir={folder},endpoint=server", root=False)
    assert paths[str(folder)].entries == ("ca-cert.pem", "other", "server-key.pem")
    assert {path: fact.kind for path, fact in paths.items() if path.startswith(f"{folder}/")} == {
        f"{folder}/ca-cert.pem": ABSENT,
        f"{folder}/server-key.pem": REGULAR,
    }
    assert paths[f"{folder}/server-key.pem"].real == str(folder.parent / "key")


def test_for_root_files_that_qemu_may_not_read_are_listed_too(folder: Path) -> None:
    paths = look("-object", f"tls-creds-x509,id=t,dir={folder},endpoint=server", root=True)
    assert paths[str(folder)].entries == ("ca-cert.pem", "dh-params.pem", "other", "server-key.pem")
    assert paths[f"{folder}/dh-params.pem"].kind == REGULAR


def test_of_a_data_directory_all_symlinks_are_followed(folder: Path) -> None:
    (folder / "keymaps").mkdir()
    (folder / "keymaps/de").symlink_to("../server-cert.pem")
    paths = look("-L", str(folder), root=False)
    assert paths[f"{folder}/other"].kind == REGULAR
    assert paths[f"{folder}/keymaps"].entries == ("de",)
    assert paths[f"{folder}/keymaps/de"].real == f"{folder}/server-cert.pem"


@pytest.mark.parametrize("words", [("-netdev", "user,id=n,tftp={}"), ("-drive", "file=fat:{}")])
def test_no_other_directory_is_listed(words: tuple[str, ...], folder: Path) -> None:
    assert look(*(word.format(folder) for word in words), root=False)[str(folder)].entries == ()


@pytest.mark.ordinary
def test_a_directory_that_cannot_be_listed_has_no_entries(folder: Path) -> None:
    folder.chmod(0o300)
    assert look("-L", str(folder), root=False)[str(folder)].entries == ()
    folder.chmod(0o700)
