"""What scripts/demo shows, once scripts/setup has run."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from integration.vm import user_environment
from tests.conftest import CHECKOUT, dropin_folder

if TYPE_CHECKING:
    from pathlib import Path

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


def words(text: str) -> str:
    """Return a text with every run of white space as one blank."""
    return " ".join(text.split())
