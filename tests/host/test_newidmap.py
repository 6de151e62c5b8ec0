"""newuidmap and newgidmap, with stand-ins first in PATH: what they are told, and what is said of their failures."""

import os
from pathlib import Path

import pytest

from qemu_userns.errors import HostError
from qemu_userns.host.newidmap import find_program, run_newidmap, takes_fd
from qemu_userns.plan.identity import MapEntry

MAPS = (MapEntry(0, 1000, 1), MapEntry(1, 100000, 65536))
WORDS = "0 1000 1 1 100000 65536"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def stand_in(folder: Path, text: str) -> None:
    for name in ("newuidmap", "newgidmap"):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


def test_an_old_one_gets_the_pid(programs: Path) -> None:
    stand_in(programs, f'echo "$*" >{programs}/$(basename $0).said')
    run_newidmap(os.getpid(), MAPS, MAPS[:1])
    assert (programs / "newuidmap.said").read_text() == f"{os.getpid()} {WORDS}\n"
    assert (programs / "newgidmap.said").read_text() == f"{os.getpid()} 0 1000 1\n"


def test_a_new_one_gets_a_directory_of_the_process(programs: Path) -> None:
    log = f"{programs}/$(basename $0).said"
    stand_in(programs, f'# usage: [PID|fd:PIDFD]\necho "$*" >{log}\nreadlink /proc/self/fd/${{1#fd:}} >>{log}')
    assert takes_fd(find_program("newuidmap"))
    run_newidmap(os.getpid(), MAPS, MAPS)
    for name in ("newuidmap", "newgidmap"):
        words, directory = (programs / f"{name}.said").read_text().splitlines()
        assert words.startswith("fd:")
        assert words.endswith(f" {WORDS}")
        assert directory == f"/proc/{os.getpid()}"


def test_its_own_words_are_the_reason(programs: Path) -> None:
    stand_in(programs, "echo not allowed >&2; exit 1")
    with pytest.raises(HostError, match="cannot write the id maps: not allowed") as caught:
        run_newidmap(os.getpid(), MAPS, MAPS)
    assert "/etc/subuid" in str(caught.value.hint)


def test_none_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="newuidmap: not found") as caught:
        run_newidmap(os.getpid(), MAPS, MAPS)
    assert "uidmap" in str(caught.value.hint)
