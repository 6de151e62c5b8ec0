"""The virtiofsd in Rust, which Debian has since 13, in the test host: its own command line, and the same maps and end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from integration.shares import Launch, dropin_words
from integration.talk import is_alive, wait_until
from integration.test_added_shares import MOUNTS, find_daemons, own_map, owners, share
from integration.vm import running_guest
from qemu_userns.host.virtiofsd import find_virtiofsd

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.host, pytest.mark.slow]


def test_it_shares_a_directory_and_ends_with_the_vm(launch: Launch, shared_tmp: Path) -> None:
    found = find_virtiofsd(None)
    assert found is not None
    assert found.modern
    folder = shared_tmp / "shared"
    folder.mkdir()
    launch.own(folder)
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    extra = [*share(folder, "tag", "both", *own_map(launch)), *launch.options]
    with running_guest(dropin_words(), tmp=shared_tmp, extra=extra) as guest:
        (daemon,) = find_daemons(guest.pid)
        assert os.path.basename(os.readlink(f"/proc/{daemon}/exe")) == "virtiofsd"
        first = guest.check(f"""set -e; mkdir /fs /by9p; {MOUNTS["virtiofs"]} tag /fs; {MOUNTS["9p"]} tag /by9p; cd /fs
            echo data >users; chown 1000:1001 users; cp /bin/busybox shell; chown 0:0 shell; chmod 6755 shell
            ! mknod null c 1 3; ! chown 2000:2000 users; stat -c '%n %u %g' shell users; cat /by9p/users""")
        assert first.endswith("shell 0 0\nusers 1000 1001\ndata\n")
        if os.geteuid() == 0:
            assert owners(folder, "shell", "users") == [(65534, 65534), (1000, 1001)]
        else:
            assert owners(folder, "shell") == [(os.geteuid(), os.getegid())]
            assert 0 not in owners(folder, "users")[0]
    wait_until(lambda: not is_alive(daemon), "virtiofsd's end")
