"""What a QEMU shows that is not told what: a window where it has one, which the view has no desktop for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.windows import opens_window
from qemu_userns.plan.build import Settings, names_display
from tests.plans import plan_of, read

if TYPE_CHECKING:
    from pathlib import Path

VNC = ("-display", "none", "-vnc", "localhost:0,to=99,id=default")


SAID = (("-display", "gtk"), ("-display", "none"), ("-nographic",), ("-vnc", ":1"), ("-spice", "port=1"))


@pytest.mark.parametrize("words", SAID)
def test_who_says_what_is_shown_is_asked_nothing(words: tuple[str, ...]) -> None:
    assert names_display(read("-m", "32", *words))
    assert not names_display(read("-m", "32"))


def test_without_a_window_there_is_vnc_for_this_host() -> None:
    plan = plan_of("-m", "32", window=True)
    assert plan.words[plan.words.index("-display") :][:4] == VNC
    assert not plan.warnings
    added = [rewrite.after for rewrite in plan.rewrites if rewrite.where == "added"]
    assert {" ".join(VNC[:2]), " ".join(VNC[2:])} < set(added)
    assert "-display" not in plan_of("-m", "32").words


@pytest.mark.parametrize("name", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_a_caller_with_a_desktop_is_told(name: str) -> None:
    (warning,) = plan_of(window=True, environ={name: ":0"}).warnings
    assert "opens no window" in warning
    assert "fs=host" in warning


def test_with_the_hosts_tree_it_is_qemus_own_affair() -> None:
    assert "-vnc" not in plan_of(window=True, settings=Settings(whole_host=True)).words


@pytest.mark.parametrize("folder", ["lib/qemu", "lib64/qemu", "lib/x86_64-linux-gnu/qemu", "other"])
@pytest.mark.parametrize("module", ["ui-gtk.so", "ui-sdl.so"])
def test_a_module_that_is_a_window_is_found(tmp_path: Path, folder: str, module: str) -> None:
    program, place = tmp_path / "bin/qemu", tmp_path / folder
    for parent in (program.parent, tmp_path / "lib", place):
        parent.mkdir(parents=True, exist_ok=True)
    program.touch()
    environ = {"QEMU_MODULE_DIR": str(place)} if folder == "other" else {}
    assert not opens_window(str(program), environ)
    (place / module).touch()
    assert opens_window(str(program), environ)
