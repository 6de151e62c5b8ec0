"""What scripts/demo shows, once scripts/setup has run."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.vm import user_environment
from tests.conftest import CHECKOUT, dropin_folder, lacking, try_command

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.xattr, pytest.mark.slow]


@pytest.mark.ordinary
def test_demo(shared_tmp: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "integration.demo", str(dropin_folder() / "qemu-system-x86_64")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "TMPDIR": str(shared_tmp), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    uid = os.getuid()
    me = f"{uid}:{os.getgid()}"
    mapped, _, rest = done.stdout.partition("share passthrough")
    passthrough, _, qemu = rest.partition("QEMU, pid")
    for line in (
        f"file -rw-r----- 1000:1000 -rw------- {me} uid=1000 gid=1000 mode=100640",
        f"set-uid -rwsr-xr-x 0:0 -rw------- {me} uid=0 gid=0 mode=104755",
        f"device crw-r--r-- 0:0 -rw------- {me} uid=0 gid=0 mode=20644",
        f"foreign -rw-r--r-- 200000:0 -rw------- {me} uid=200000 gid=0 mode=100644",
    ):
        assert line in words(mapped), done.stdout
    first = int(re.search(r"uid_map 0 is \d+ .* 1-\d+ are (\d+)-", words(qemu))[1])  # type: ignore[index]
    first_gid = int(re.search(r"gid_map 0 is \d+ .* 1-\d+ are (\d+)-", words(qemu))[1])  # type: ignore[index]
    for line in (
        f"file -rw-r----- 1000:1000 -rw-r----- {first + 999}:{first_gid + 999}",
        f"set-uid -rwsr-xr-x 0:0 -rwsr-xr-x {me}",
        "device - - foreign",
        "refused: mknod: device: Operation not permitted; chown: foreign: Invalid argument",
    ):
        assert line in words(passthrough), done.stdout
    for line in (
        f"uid_map 0 is {uid} all ids are the host's",
        f"uid on the host {uid} {uid}",
        "capabilities chown dac_override fowner fsetid (inside only) none",
        "no_new_privs 1 ",
        "mount passthrough: rw,nosuid,nodev",
    ):
        assert line in words(qemu), done.stdout
    for kind in ("user", "mnt"):
        inside, outside = re.search(rf"{kind} namespace (\S+) (\S+)", words(qemu)).groups()  # type: ignore[union-attr]
        assert inside != outside
    assert max(map(len, done.stdout.splitlines())) <= 130
    assert not list(shared_tmp.iterdir())


SUDOER = "qemu-userns-sudo"
# A dpkg-query that knows nothing of one package, which scripts/setup then installs once more: nothing changes but apt's lists.
DPKG_QUERY = """#!/bin/sh
for package; do :; done
[ "$package" != acl ] || exit 1
exec /usr/bin/dpkg-query "$@"
"""


class Sudoer:
    """A user with sudo and without subordinate ids, whom nobody knows who does not see `etc` at /etc."""

    def __init__(self, folder: Path) -> None:
        self.etc, home = folder / "etc", folder / "home"
        subprocess.run(["cp", "-a", "/etc", str(self.etc)], check=True)
        self.run(["useradd", "--system", "--user-group", "--create-home", "--home-dir", str(home), SUDOER], check=True)
        rule = self.etc / "sudoers.d" / SUDOER
        rule.write_text(f"{SUDOER} ALL=(ALL) NOPASSWD: ALL\n")
        rule.chmod(0o440)
        _, _, uid, gid, *rest = next(line.split(":") for line in self.lines("passwd"))
        self.entry = pwd.struct_passwd((SUDOER, "x", int(uid), int(gid), *rest))

    def run(self, words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command, as root, that sees `etc`."""
        script = 'mount --bind "$0" /etc && exec "$@"'
        return subprocess.run(["unshare", "--mount", "sh", "-c", script, str(self.etc), *words], text=True, **more)

    def lines(self, name: str) -> list[str]:
        """Return the user's lines in a file of `etc`."""
        return [line for line in (self.etc / name).read_text().splitlines() if line.startswith(f"{SUDOER}:")]


@pytest.fixture
def sudoer(shared_tmp: Path) -> Sudoer:
    """Not in the host's /etc, where it could disturb others' tests."""
    if reason := try_command("sudo", "--non-interactive", "true"):
        lacking("sudo", reason)
    return Sudoer(shared_tmp)


def copy_checkout(copy: Path, owner: pwd.struct_passwd) -> None:
    """Copy this checkout with its .venv, as if `owner` had set it up."""
    copy.mkdir()
    pack = ["tar", "--exclude=./.git", "--exclude=./.*_cache", "-cf", "-", "-C", str(CHECKOUT), "."]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        subprocess.run(["tar", "-xf", "-", "-C", str(copy)], stdin=packing.stdout, check=True)
    assert packing.returncode == 0
    subprocess.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", str(copy)], check=True)


@pytest.mark.root
def test_a_user_with_sudo_runs_the_demo(sudoer: Sudoer, shared_tmp: Path) -> None:
    """What is missing is installed by sudo; the copy stands in the checkout's place, so that its .venv need not be made anew."""
    copy, tools, tmp = shared_tmp / "checkout", shared_tmp / "bin", shared_tmp / "tmp"
    copy_checkout(copy, sudoer.entry)
    tools.mkdir()
    (tools / "dpkg-query").write_text(DPKG_QUERY)
    (tools / "dpkg-query").chmod(0o755)
    tmp.mkdir()
    tmp.chmod(0o1777)
    assert sudoer.lines("subuid") + sudoer.lines("subgid") == []
    script = 'mount --bind "$1" "$2" && cd "$2" && exec setpriv --reuid="$3" --regid="$3" --init-groups scripts/demo'
    environ = user_environment(sudoer.entry)
    done = sudoer.run(
        ["sh", "-c", script, "sh", str(copy), str(CHECKOUT), SUDOER],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**environ, "TMPDIR": str(tmp), "PATH": f"{tools}:{environ['PATH']}"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for line in ("setup: installing acl ...", f"setup: giving {SUDOER} subordinate uids ...", f"starting a guest as {SUDOER} "):
        assert line in done.stderr
    assert (len(sudoer.lines("subuid")), len(sudoer.lines("subgid"))) == (1, 1)
    first = int(sudoer.lines("subuid")[0].split(":")[1])
    assert f"uid_map 0 is {sudoer.entry.pw_uid} all ids are the host's 1-65536 are {first}-{first + 65535}" in words(done.stdout)
    assert not list(tmp.iterdir())
    assert {path.lstat().st_uid for path in copy.rglob("*")} == {sudoer.entry.pw_uid}


def words(text: str) -> str:
    """Return a text with every run of white space as one blank."""
    return " ".join(text.split())
