"""The qemu-userns command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_userns.cli.explain import describe_plan
from qemu_userns.cli.main import parse_settings
from qemu_userns.errors import UsageError
from tests.conftest import CHECKOUT
from tests.plans import plan_of


def qemu_userns(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from qemu_userns.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=cwd)


# --- options of ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "settings", "argv"),
    [
        (["qemu-system-x86_64"], (), ("qemu-system-x86_64",)),
        (["qemu-system-x86_64", "--S", "-m", "1"], (), ("qemu-system-x86_64", "--S", "-m", "1")),
        (["--fs=host", "qemu"], (("fs", "host"),), ("qemu",)),
        (["--fs=host", "--idmap=both 1 1", "--", "qemu", "--x=y"], (("fs", "host"), ("idmap", "both 1 1")), ("qemu", "--x=y")),
        (["--", "--odd-name", "-S"], (), ("--odd-name", "-S")),
        (["--a=b=c", "/usr/bin/qemu"], (("a", "b=c"),), ("/usr/bin/qemu",)),
        (["--a=", "qemu"], (("a", ""),), ("qemu",)),
    ],
)
def test_our_options_come_before_the_program(
    words: list[str], settings: tuple[tuple[str, str], ...], argv: tuple[str, ...]
) -> None:
    assert parse_settings(words) == (settings, argv)


@pytest.mark.parametrize("words", [[], ["--"], ["--fs=host"], ["--fs", "qemu"]])
def test_what_is_not_understood(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_settings(words)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help(words: tuple[str, ...]) -> None:
    done = qemu_userns(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: qemu-userns run ")


def test_version() -> None:
    done = qemu_userns("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] == "qemu-userns"


@pytest.mark.parametrize(
    "words",
    [("bogus",), ("install",), ("install", "a", "b"), ("run",), ("explain", "--json"), ("run", "--fs=x", "qemu-system-x86_64")],
)
def test_wrong_use_is_one_line_and_a_hint(words: tuple[str, ...]) -> None:
    done = qemu_userns(*words)
    assert (done.returncode, done.stdout) == (1, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("qemu-userns: ")
    assert all(line.startswith("hint: ") for line in rest)
    assert len(rest) <= 1


def test_install_names_the_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/qemu-system-test"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    names = ("qemu-system-test", "virtfs-proxy-helper")
    done = qemu_userns("install", str(tmp_path / "dropin"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "".join(f"{tmp_path}/dropin/{name}\n" for name in names), "")


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.qemu
def test_explain_says_what_launch_does(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    words = [
        "-drive",
        "file=disk.raw,format=raw",
        "-pidfile",
        "pid",
        "-chardev",
        "socket,id=c,path=sock,server=on,wait=off",
        "-runs",
    ]
    done = qemu_userns("explain", "--json", "qemu-system-x86_64", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    here = tmp_path.resolve()
    assert any(row["what"].startswith(f"{here}/disk.raw (") for row in plan["view"] + plan["fds"]) or os.geteuid() == 0
    assert any(row["what"].startswith(f"{here}/pid (rw, created") for row in plan["view"])
    assert any("listens on " in row["what"] for row in plan["fds"])
    assert {"option": "-runs"}.items() <= plan["left alone"][0].items()
    assert plan["uid map"]
    assert plan["gid map"]
    assert any("socket,id=c" in row["before"] and "fd=" in row["after"] for row in plan["rewritten"])
    assert plan["command line"][0]["word"] == "qemu-system-x86_64"
    assert sorted(os.listdir(tmp_path)) == ["disk.raw"]


@pytest.mark.qemu
def test_explain_says_what_would_be_refused(tmp_path: Path) -> None:
    for options in ((), ("--json",)):
        done = qemu_userns("explain", *options, "qemu-system-x86_64", "-kernel", "missing", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == ""
        assert "No such file or directory" in done.stdout


def test_every_row_of_a_plan_is_text() -> None:
    plan = plan_of("-drive", "file=/x/file", "-netdev", "tap,id=n,fd=9", "-kernel", "/x/new", "-bogus", fds=(9,))
    tables = describe_plan(plan)
    assert json.loads(json.dumps(tables)) == tables
    assert {"uid map", "gid map", "view", "fds", "rewritten", "left alone", "refused", "confinement"} <= tables.keys()
    for rows in tables.values():
        for row in rows:
            assert row
            assert all(isinstance(value, str) for value in row.values())


@pytest.mark.qemu
def test_explain_says_what_the_settings_add_to_the_monitors(tmp_path: Path) -> None:
    ours = ["--qmp=a", "--qmp=%n", "--passthrough=raw", "--qmp.socket=path=/nowhere/s,access=read-only"]
    done = qemu_userns("explain", "--json", *ours, "qemu-system-x86_64", "-nodefaults", "-name", "vm", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    plan = json.loads(done.stdout)
    here = tmp_path.resolve()
    assert [row["what"].partition(" (")[0] for row in plan["monitors"][1:]] == [f"{here}/a", f"{here}/vm"]
    users = ", ".join(map(str, sorted({0, os.geteuid()})))
    assert {row["clients"] for row in plan["monitors"][1:]} == {f"every command; for uid {users} alone"}
    assert any(f"listens on {here}/raw" in row["what"] for row in plan["fds"])
    assert [row["what"] for row in plan["refused"]] == ["QMP socket /nowhere/s"]
    assert sorted(os.listdir(tmp_path)) == []


@pytest.mark.qemu
def test_explain_says_who_serves_which_monitor(tmp_path: Path) -> None:
    """By the supervisor: where, how, for whom. By QEMU itself: that nothing is opened for it, as text and as JSON."""
    words = ["-nodefaults", "-qmp", "unix:q,server=on", "-monitor", "unix:h,server=on,wait=off", "-qmp", "pty"]
    given = ["explain", "--qmp.monitor=name=compat_monitor0,access=read-only,users=7", "qemu-system-x86_64", *words]
    served = "the supervisor listens on q, and QEMU waits for the first client"
    notes = [
        f"monitor {label}, which QEMU serves by itself: a path that is first named there is not in its view"
        for label in ("compat_monitor1: HMP", "compat_monitor2: QMP on a pty")
    ]
    done = qemu_userns(*given, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[lines.index("notes:") + 1 :][:2] == [f"  {note}" for note in notes]
    monitor = lines[lines.index("monitors:") + 1]
    assert f"QMP monitor compat_monitor0; {served}   why: -qmp   " in monitor
    assert monitor.endswith("   clients: commands that change nothing; for uid 7 alone")
    plan = json.loads(qemu_userns(given[0], "--json", *given[1:], cwd=tmp_path).stdout)
    assert [row["note"] for row in plan["notes"]] == notes
    assert [row["clients"] for row in plan["monitors"]] == ["commands that change nothing; for uid 7 alone"]
