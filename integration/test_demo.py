"""What scripts/demo shows, once scripts/setup has run."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.vm import user_environment
from tests.conftest import CHECKOUT, dropin_folder, lacking, try_command

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.xattr, pytest.mark.slow]


def test_demo(unprivileged_user: str, shared_tmp: Path) -> None:
    entry = pwd.getpwnam(unprivileged_user)
    shared_tmp.chmod(0o1777)
    root = os.geteuid() == 0
    done = subprocess.run(
        [sys.executable, "-m", "integration.demo", str(dropin_folder() / "qemu-system-x86_64")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**user_environment(entry), "TMPDIR": str(shared_tmp), "PYTHONDONTWRITEBYTECODE": "1"},
        user=entry.pw_uid if root else None,
        group=entry.pw_gid if root else None,
        extra_groups=os.getgrouplist(entry.pw_name, entry.pw_gid) if root else None,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    me = f"{entry.pw_uid}:{entry.pw_gid}"
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
        f"uid_map 0 is {entry.pw_uid} all ids are the host's",
        f"uid on the host {entry.pw_uid} {entry.pw_uid}",
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


@pytest.fixture
def sudoer() -> Iterator[pwd.struct_passwd]:
    """A user with sudo and without subordinate ids, as long as the test takes."""
    if reason := try_command("sudo", "--non-interactive", "true"):
        lacking("sudo", reason)
    rule = Path("/etc/sudoers.d") / SUDOER
    subprocess.run(["useradd", "--system", "--user-group", "--create-home", SUDOER], check=True)
    try:
        rule.write_text(f"{SUDOER} ALL=(ALL) NOPASSWD: ALL\n")
        rule.chmod(0o440)
        yield pwd.getpwnam(SUDOER)
    finally:
        rule.unlink(missing_ok=True)
        subprocess.run(["userdel", "--remove", SUDOER], check=True, capture_output=True)


def subordinate_ids(name: str) -> list[tuple[str, str]]:
    """Return the lines of a user in /etc/subuid and /etc/subgid."""
    files = ("/etc/subuid", "/etc/subgid")
    return [(file, line) for file in files for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:")]


def copy_checkout(copy: Path, owner: pwd.struct_passwd) -> None:
    """Copy this checkout with its .venv, as if `owner` had set it up."""
    copy.mkdir()
    pack = ["tar", "--exclude=./.git", "--exclude=./.*_cache", "-cf", "-", "-C", str(CHECKOUT), "."]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
        subprocess.run(["tar", "-xf", "-", "-C", str(copy)], stdin=packing.stdout, check=True)
    assert packing.returncode == 0
    subprocess.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", str(copy)], check=True)


@pytest.mark.root
def test_a_user_with_sudo_runs_the_demo(sudoer: pwd.struct_passwd, shared_tmp: Path) -> None:
    """What is missing is installed by sudo; the copy stands in the checkout's place, so that its .venv need not be made anew."""
    copy, tools, tmp = shared_tmp / "checkout", shared_tmp / "bin", shared_tmp / "tmp"
    copy_checkout(copy, sudoer)
    tools.mkdir()
    (tools / "dpkg-query").write_text(DPKG_QUERY)
    (tools / "dpkg-query").chmod(0o755)
    tmp.mkdir()
    tmp.chmod(0o1777)
    assert subordinate_ids(SUDOER) == []
    script = 'mount --bind "$1" "$2" && cd "$2" && exec setpriv --reuid="$3" --regid="$3" --init-groups scripts/demo'
    environ = user_environment(sudoer)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(copy), str(CHECKOUT), SUDOER],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**environ, "TMPDIR": str(tmp), "PATH": f"{tools}:{environ['PATH']}"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for line in ("setup: installing acl ...", f"setup: giving {SUDOER} subordinate uids ...", f"starting a guest as {SUDOER} "):
        assert line in done.stderr
    assert [file for file, _ in subordinate_ids(SUDOER)] == ["/etc/subuid", "/etc/subgid"]
    first = int(subordinate_ids(SUDOER)[0][1].split(":")[1])
    assert f"uid_map 0 is {sudoer.pw_uid} all ids are the host's 1-65536 are {first}-{first + 65535}" in words(done.stdout)
    assert not list(tmp.iterdir())
    assert {path.lstat().st_uid for path in copy.rglob("*")} == {sudoer.pw_uid}


def words(text: str) -> str:
    """Return a text with every run of white space as one blank."""
    return " ".join(text.split())
