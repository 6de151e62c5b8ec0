"""What runs the test host: it says where a host hangs, and ends with nothing left. The host is the test guest's kernel here."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.guest.build_guest import Cpio
from integration.host.build_host import SUITES, HostFiles
from integration.host.run_host import HostTimeoutError, parse_words, run_machine
from integration.host.selection import SELECTIONS
from integration.leftovers import process_table
from integration.talk import DEADLINE_S, started, wait_until
from integration.vm import guest_files
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

WORDS = "here the host hangs"
INIT = f"#!/bin/busybox sh\n/bin/busybox echo {WORDS}\nexec /bin/busybox sleep 1000\n"
LIMITS_S = (10, 20, 40, 80, 160)
RUN = """
import sys
from pathlib import Path
from integration.host import run_host
files = run_host.HostFiles(*map(Path, sys.argv[1:]))
run_host.build_host = lambda suite: files
run_host.pack_project = lambda archive, command: archive.write_bytes(bytes(512))
sys.exit(run_host.main(["bookworm", "--", "true"]))
"""


@pytest.fixture
def host(shared_tmp: Path) -> HostFiles:
    """A host that says something on its console and then nothing more."""
    guest = guest_files()
    archive = Cpio()
    archive.add_file("init", INIT.encode(), mode=0o755)
    initramfs, root = shared_tmp / "initramfs", shared_tmp / "root"
    content = guest.initramfs.read_bytes()
    initramfs.write_bytes(content + bytes(-len(content) % 4) + archive.finish())  # the later /init replaces the guest's
    root.write_bytes(bytes(512))
    return HostFiles(guest.kernel, initramfs, root)


def leftovers(folder: Path) -> list[str]:
    """Return files below a folder, and processes that name it."""
    return [
        *map(str, folder.iterdir()),
        *(command for _, command in process_table().values() if str(folder) in command and "qemu-system" in command),
    ]


def test_a_host_that_hangs_shows_its_consoles_end(host: HostFiles, shared_tmp: Path) -> None:
    for number, limit_s in enumerate(LIMITS_S):  # a busy machine may not get as far as to the words in a short time
        home = shared_tmp / f"home{number}"
        home.mkdir()
        (home / "project.tar").write_bytes(bytes(512))
        with pytest.raises(HostTimeoutError, match=f"no end after {limit_s} s") as caught:
            run_machine(host, home, limit_s)
        if str(caught.value).endswith(WORDS):
            return
    pytest.fail(str(caught.value))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(host: HostFiles, shared_tmp: Path, number: signal.Signals) -> None:
    folder = shared_tmp / "tmp"
    folder.mkdir()
    command = [sys.executable, "-c", RUN, *map(str, host)]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "PYTHONPATH": str(CHECKOUT)}
    with (shared_tmp / "said").open("wb") as said, started(command, stdout=said, stderr=said, env=environment) as process:
        wait_until(lambda: WORDS in console_of(folder), "the host's last words", 4 * DEADLINE_S)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 128 + number
    assert leftovers(folder) == []
    assert (shared_tmp / "said").read_text().endswith(f"host: interrupted; its console ended so:\n{WORDS}\n")


def console_of(folder: Path) -> str:
    """Return what the only host below a folder has said, once it is there."""
    return next((path.read_text() for path in folder.glob("*/console")), "")


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_selected_is_there(suite: str) -> None:
    """A name that pytest does not find would stop all tests of the host."""
    for name in SELECTIONS[suite].tests:
        file, _, function = name.partition("::")
        text = (CHECKOUT / file).read_text()
        assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), name


def test_what_is_for_a_host_alone_is_selected() -> None:
    files = (CHECKOUT / "integration").glob("test_*.py")
    marked = {f"integration/{path.name}" for path in files if re.search(r"mark[.]host\b", path.read_text())}
    assert len(marked) > 5
    assert marked <= {name.partition("::")[0] for suite in SUITES for name in SELECTIONS[suite].tests}


@pytest.mark.parametrize(
    ("words", "suites", "limit", "command"),
    [
        ((), [], None, []),
        (("trixie", "--limit", "60"), ["trixie"], 60, []),
        (("--limit=9.5", "bookworm", "trixie", "--", "uname", "--", "-r"), ["bookworm", "trixie"], 9.5, ["uname", "--", "-r"]),
    ],
)
def test_words(words: Sequence[str], suites: list[str], limit: float | None, command: list[str]) -> None:
    found = parse_words(words)
    assert (found.suites, found.limit, found.command) == (suites, limit, command)


@pytest.mark.parametrize(("words", "reason"), [(("sid",), "no such suite: sid"), (("--limit", "long"), "invalid float value")])
def test_wrong_words(words: Sequence[str], reason: str) -> None:
    command = [sys.executable, "-m", "integration.host.run_host", *words]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 2
    assert f"error: {'argument --limit: ' if 'long' in words else ''}{reason}" in done.stderr
