"""Every identity, security model and map, on every file system: what guest root makes has the owners that the map says.

One guest for each identity has all shares. In each of them it does what the attack of Incus' pull request 1547 does: it puts a
program there that a shell could be, and makes it set-uid root. On the host that is never root's, and whoever runs it there
becomes nobody else's root.
"""

from __future__ import annotations

import base64
import os
import pwd
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.file_systems import MAPPABLE, file_systems
from integration.shares import Launch, SharedVm, dropin_words, fsdev, maps, metadata, module_folder, virtfs_attributes
from integration.talk import home_of
from integration.vm import running_guest
from tests.conftest import TEST_USER

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.slow, pytest.mark.root]

FILE_SYSTEMS = (*MAPPABLE, "overlay")
HOST_IDS = ("passthrough", "none")
MAPPED = ("mapped-xattr", "mapped-file")
STRANGER = 54321
SLOTS, FUNCTIONS = range(8, 24), 8

Entry = tuple[int, int, int]
"""A host id, the guest's for it, and how many follow."""


@dataclass(frozen=True)
class Map:
    """An id map of a share, for uids and gids alike."""

    name: str
    entries: tuple[Entry, ...]
    user: tuple[int, int]
    """A uid and a gid of the guest that are in it."""
    stranger: int | None = None
    """A guest's id that is not."""

    def lines(self) -> list[str]:
        return [f"both {host}-{host + count - 1} {inside}-{inside + count - 1}" for host, inside, count in self.entries]

    def on_disk(self, inside: int) -> int | None:
        """Return the host id of a guest's id, None for one that is not in the map."""
        found = (host + inside - first for host, first, count in self.entries if first <= inside < first + count)
        return next(found, None)


@dataclass(frozen=True)
class Share:
    """A share of the guest."""

    tag: str
    path: Path
    model: str
    map: Map


@dataclass(frozen=True)
class Who:
    """An identity, and what maps its shares have beside QEMU's own ids."""

    launch: Launch
    caller: str | None = None
    """Who starts QEMU, if it is not root."""
    own_map: bool = False
    """The map is QEMU's own, so all shares and file systems have it; else there are idmapped mounts."""

    def __str__(self) -> str:
        return f"{self.launch.name}{' with a map of its own' if self.own_map else ''}"


LXD = Map("lxd", ((65534, 0, 1), (1000, 1000, 1000)), (1000, 1001), 2000)
OTHER = Map("other", ((7000, 0, 10),), (9, 3), 10)
IDENTITIES = [
    Who(Launch("lease")),
    Who(Launch("lease"), own_map=True),
    Who(Launch("nobody", ("-runas", "nobody"), "nobody")),
    Who(Launch("nobody", ("-runas", "nobody"), "nobody"), own_map=True),
    Who(Launch("runas", ("-runas", TEST_USER), TEST_USER)),
    Who(Launch("runas", ("-runas", TEST_USER), TEST_USER), own_map=True),
    Who(Launch("caller", user=TEST_USER), TEST_USER),
    Who(Launch("caller", user=TEST_USER), TEST_USER, own_map=True),
]


def find_maps(who: Who, file_system: str) -> list[Map | None]:
    """Return the maps that shares of a file system can have; None for QEMU's own ids."""
    if who.own_map:
        root = [(pwd.getpwnam(who.launch.user).pw_uid, 0, 1)] if who.launch.user else []
        if who.caller is None:
            return [Map("own", (*root, (3000, 1000, 1000)), (1000, 1001), 2000)]
        ranges = (line.split(":") for line in Path("/etc/subuid").read_text().splitlines())
        first = next(int(start) for name, start, _ in ranges if name == who.caller)
        return [Map("own", (*root, (first + 10, 1000, 10)), (1009, 1000), 2000)]
    return [None, LXD, OTHER] if who.caller is None and file_system in MAPPABLE else [None]


def list_shares(who: Who, folder: Path) -> Iterator[tuple[Share, list[str]]]:
    """Make the directories of all shares; yield them with QEMU's options."""
    places = [f"{slot:x}.{function:x}" for slot in SLOTS for function in range(FUNCTIONS)]
    unmapped = Map("none", (), (1000, 1001))
    for file_system in FILE_SYSTEMS:
        wanted = [(model, found) for model in HOST_IDS for found in find_maps(who, file_system)]
        wanted += [] if who.own_map else [(model, None) for model in MAPPED]
        for model, found in wanted:
            share_map = found or unmapped
            tag = f"{file_system}-{model}-{share_map.name}"
            path = folder / file_system / tag
            path.mkdir()
            root = found.on_disk(0) if found is not None else None
            if root is not None and who.caller is None:
                os.chown(path, root, root)
            else:
                who.launch.own(path)
            options = fsdev(tag, path, model, device=f",addr={places.pop(0)},multifunction=on")
            yield Share(tag, path, model, share_map), [*options, *(maps(tag, *found.lines()) if found is not None else [])]


@pytest.fixture(scope="module", params=[pytest.param(who, id=str(who)) for who in IDENTITIES])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[SharedVm, list[Share], dict[str, str]]]:
    """Boot a guest that writes to all shares; what it said comes with it."""
    who: Who = request.param
    with module_folder() as folder, file_systems(folder, FILE_SYSTEMS):
        shares, options = [], [*who.launch.options]
        for share, words in list_shares(who, folder):
            shares.append(share)
            options += words
        env = home_of(who.caller) if who.caller else None
        with running_guest(dropin_words(), tmp=folder, extra=options, user=who.caller, env=env) as guest:
            vm = SharedVm(who.launch, folder, guest)
            vm.mount(*(share.tag for share in shares))
            yield vm, shares, {share.tag: vm.guest.check(script(share)) for share in shares}


def script(share: Share) -> str:
    """Return what guest root does in a share."""
    uid, gid = share.map.user
    stranger = f"chown {share.map.stranger} roots 2>/dev/null && echo stranger" if share.map.stranger else ":"
    return f"""cd /{share.tag}; echo data >roots; echo data >users; chown {uid}:{gid} users
        echo {base64.b64encode(build_shell()).decode()} | base64 -d >shell; chown 0:0 shell; chmod 6755 shell; {stranger}
        stat -c '%n %u %g %a' roots users shell"""


def test_owners_are_those_of_the_map(made: tuple[SharedVm, list[Share], dict[str, str]]) -> None:
    vm, shares, answers = made
    for share in shares:
        uid, gid = share.map.user
        assert answers[share.tag] == f"roots 0 0 644\nusers {uid} {gid} 644\nshell 0 0 6755\n", share.tag
        found = {path.name: path.lstat() for path in share.path.iterdir()}
        owners = {name: (found[name].st_uid, found[name].st_gid) for name in ("roots", "users", "shell")}
        if share.model in MAPPED:
            own = (vm.uid(0), vm.gid(0))
            assert owners == dict.fromkeys(owners, own), share.tag
            kept = (virtfs_attributes if share.model == "mapped-xattr" else metadata)(share.path / "users")
            assert (kept["uid"], kept["gid"]) == share.map.user, share.tag
        else:
            root = on_disk(vm, share, 0, 0)
            assert owners == {"roots": root, "users": on_disk(vm, share, uid, gid), "shell": root}, share.tag


def on_disk(vm: SharedVm, share: Share, uid: int, gid: int) -> tuple[int, int]:
    """Return the owner on the host of what is the guest's `uid` and `gid`: by the share's map, else by QEMU's ids."""
    return share.map.on_disk(uid) or vm.uid(uid), share.map.on_disk(gid) or vm.gid(gid)


def test_a_set_uid_shell_of_guest_root_is_not_roots(made: tuple[SharedVm, list[Share], dict[str, str]]) -> None:
    _, shares, _ = made
    for share in shares:
        shell = share.path / "shell"
        found = shell.stat()
        assert 0 not in (found.st_uid, found.st_gid), share.tag
        if share.model in MAPPED:
            assert stat.S_IMODE(found.st_mode) == 0o600, share.tag
            with pytest.raises(PermissionError):
                run_as_stranger(shell)
        else:
            assert stat.S_IMODE(found.st_mode) == 0o6755, share.tag
            assert run_as_stranger(shell) == [found.st_uid, found.st_gid], share.tag


def run_as_stranger(shell: Path) -> list[int]:
    """Run that program on the host as a user who has nothing to do with it; return its effective ids."""
    done = subprocess.run([shell], user=STRANGER, group=STRANGER, extra_groups=(), capture_output=True, check=True, timeout=30)
    return list(struct.unpack("2I", done.stdout))


def build_shell() -> bytes:
    """Return a program that writes its effective uid and gid to stdout. A real shell would give up what it does not need."""
    code = bytes.fromhex(
        "4883ec10"  # sub rsp, 16
        "b86b000000 0f05 890424"  # geteuid, to [rsp]
        "b86c000000 0f05 89442404"  # getegid, to [rsp + 4]
        "b801000000 bf01000000 4889e6 ba08000000 0f05"  # write(1, rsp, 8)
        "b83c000000 31ff 0f05"  # exit(0)
    )
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return elf + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code
