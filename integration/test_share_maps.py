"""Id maps of shares: each its own, on every file system, and nothing that a guest makes belongs to whom it should not.

LXD's contract, points 11 to 15: what guest root chowns, creates or makes set-uid has the ids of the map, and no others.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.file_systems import MAPPABLE, file_systems
from integration.shares import (
    Launch,
    SharedVm,
    dropin_words,
    fsdev,
    launches,
    maps,
    module_folder,
    mount_options,
    shared_vm,
    tree,
)
from integration.vm import running_guest
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.slow]

NOT_MAPPABLE = ("ramfs", "overlay")
MAP = ("both 65534 0", "both 1000-1999 1000-1999", "uid 5000 5", "gid 6000 5")
"""What LXD makes of raw.idmap, with host ids that are not the guest's."""
OVERFLOW = 65534
EXPLAIN = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", "qemu-system-x86_64"]


def fill(share: Path, root: int = 65534) -> None:
    """Make what the guest finds in a share: its root's, a user's, the host root's, and a stranger's."""
    for name, owner in (("user", 1000), ("hosts", 0), ("stranger", 4321)):
        (share / name).write_text(name)
        os.chown(share / name, owner, owner)
    (share / "hosts").chmod(0o4755)
    (share / "for-all").mkdir()
    (share / "for-all").chmod(0o1777)
    os.chown(share, root, root)


# --- root: idmapped mounts -------------------------------------------------------------------------------------------


WAYS = [Launch("lease"), Launch("nobody", ("-runas", "nobody"), "nobody"), *(way for way in launches() if way.name == "runas")]


@pytest.fixture(scope="module", params=[pytest.param(way, id=str(way), marks=pytest.mark.root) for way in WAYS])
def vm(request: pytest.FixtureRequest) -> Iterator[SharedVm]:
    """A guest with a share on every file system, one of them read-only, one with another map, one with none."""
    launch: Launch = request.param
    with module_folder() as folder, file_systems(folder, MAPPABLE):
        extra = []
        for index, name in enumerate(MAPPABLE):
            fill(folder / name)
            extra += fsdev(name, folder / name, ("passthrough", "none")[index % 2]) + maps(name, *MAP)
        for name in ("ro", "other", "plain"):
            (folder / name).mkdir()
        fill(folder / "ro")
        fill(folder / "other", root=7000)
        launch.own(folder / "plain")
        extra += [*fsdev("ro", folder / "ro", "passthrough", ",readonly=on"), *maps("ro", *MAP)]
        extra += [*fsdev("other", folder / "other", "passthrough"), *maps("other", "both 7000-7009 0-9")]
        extra += fsdev("plain", folder / "plain", "passthrough")
        with shared_vm(launch, extra, folder) as vm:
            vm.mount(*MAPPABLE, "ro", "other", "plain")
            yield vm


def owners(share: Path, *names: str) -> list[tuple[int, int]]:
    """Return uid and gid on the host's disk."""
    return [(found.st_uid, found.st_gid) for found in ((share / name).lstat() for name in names)]


@pytest.mark.parametrize("name", MAPPABLE)
def test_owners_are_those_of_the_map_both_ways(vm: SharedVm, name: str) -> None:
    answer = vm.guest.check(f"""cd /{name}
        stat -c '%n %u %g' . user hosts stranger
        echo data >roots; mkdir folder; ln -s user link
        echo data >users; chown 1000:1001 users; chmod 6755 users; chown 1999:5 folder; chown -h 5:1500 link
        stat -c '%n %u %g %a' roots folder users; stat -c '%n %u %g' link; cat user""")
    assert answer == (
        f". 0 0\nuser 1000 1000\nhosts {OVERFLOW} {OVERFLOW}\nstranger {OVERFLOW} {OVERFLOW}\n"
        "roots 0 0 644\nfolder 1999 5 755\nusers 1000 1001 6755\nlink 5 1500\nuser"
    )
    share = vm.folder / name
    assert owners(share, "roots", "folder", "users", "link") == [
        (65534, 65534),
        (1999, 6000),
        (1000, 1001),
        (5000, 1500),
    ]


@pytest.mark.parametrize("name", MAPPABLE)
def test_a_set_uid_shell_of_guest_root_is_nobodys(vm: SharedVm, name: str) -> None:
    """The attack of Incus' pull request 1547."""
    vm.guest.check(f"cd /{name} && cp /bin/busybox shell && chown 0:0 shell && chmod 6755 shell")
    found = (vm.folder / name / "shell").stat()
    assert (found.st_uid, found.st_gid) == (65534, 65534)
    for path, status in tree(vm.folder / name):
        assert path.name in ("hosts", "for-all", "lost+found") or 0 not in (status.st_uid, status.st_gid), path
    assert {"nosuid", "nodev"} <= mount_options(vm.guest.proc, vm.folder / name)


@pytest.mark.parametrize("name", MAPPABLE)
def test_ids_that_are_not_in_the_map_are_not_to_be_had(vm: SharedVm, name: str) -> None:
    answer = vm.guest.check(f"""cd /{name}; echo data >mine
        for id in 1:0 0:1 999:0 2000:2000 4321:0 {OVERFLOW}:0 {vm.uid(1)}:0; do chown $id mine 2>/dev/null && echo $id; done
        chown 0:0 hosts; chmod 777 hosts; chown 0 stranger; rm -f hosts; echo data >hosts; mv stranger for-all/
        stat -c '%u %g' mine""")
    assert answer.endswith("\n0 0\n"), answer
    assert not any(line[0].isdigit() and ":" in line.split()[0] for line in answer.splitlines()[:-1]), answer
    share = vm.folder / name
    assert owners(share, "mine") == [(65534, 65534)]
    found = {entry.name: entry.lstat() for entry in (*share.iterdir(), *(share / "for-all").iterdir())}
    assert all(
        status.st_uid in (0, 65534, 4321) or 1000 <= status.st_uid < 2000 or status.st_uid == 5000 for status in found.values()
    )


def test_each_share_has_its_own_map(vm: SharedVm) -> None:
    vm.guest.check("for tag in other plain; do cd /$tag; echo data >made; echo data >users; chown 9:9 users; done")
    assert owners(vm.folder / "other", "made", "users") == [(7000, 7000), (7009, 7009)]
    assert owners(vm.folder / "plain", "made", "users") == [(vm.uid(0), vm.gid(0)), (vm.uid(9), vm.gid(9))]


def test_read_only_is_the_mounts_business(vm: SharedVm) -> None:
    answer = vm.guest.check("mount -o remount,rw /ro; cd /ro; touch new; chown 1000 user; chmod 777 user; stat -c '%u' user")
    assert answer.count("Read-only file system") == 3
    assert answer.endswith("\n1000\n")
    assert "ro" in mount_options(vm.guest.proc, vm.folder / "ro")


# --- root: file systems that cannot be idmapped ----------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("name", NOT_MAPPABLE)
def test_one_map_can_be_qemus_own(name: str, shared_tmp: Path) -> None:
    launch = Launch("nobody", ("-runas", "nobody"), "nobody")
    with file_systems(shared_tmp, [name]):
        share = shared_tmp / name
        fill(share)
        extra = [*fsdev("tag", share, "passthrough"), *maps("tag", *MAP), *launch.options]
        with running_guest(dropin_words(), tmp=shared_tmp, extra=extra) as guest:
            vm = SharedVm(launch, shared_tmp, guest)
            vm.mount("tag")
            answer = guest.check("""cd /tag; stat -c '%n %u %g' . user hosts
                echo data >made; echo data >users; chown 1000:5 users; chown 2000 made; chown 1:1 made
                stat -c '%u %g' made users""")
            guest.power_off()
        assert answer.startswith(f". 0 0\nuser 1000 1000\nhosts {OVERFLOW} {OVERFLOW}\n")
        assert answer.endswith("\n0 0\n1000 5\n")
        assert owners(share, "made", "users") == [(65534, 65534), (1000, 6000)]


@pytest.mark.root
@pytest.mark.parametrize("name", NOT_MAPPABLE)
def test_two_maps_cannot(name: str, shared_tmp: Path) -> None:
    with file_systems(shared_tmp, [name]):
        words = []
        for tag, line in (("one", "both 1000 1000"), ("two", "both 1001 1000")):
            (shared_tmp / name / tag).mkdir()
            words += [*fsdev(tag, shared_tmp / name / tag, "passthrough"), *maps(tag, line)]
        done = subprocess.run([*dropin_words(), "-S", *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"qemu-userns: share two: {shared_tmp}/{name}/two: its file system {name} cannot be idmapped, and QEMU's own ids follow "
        "the map of one already\nhint: give both the same map, or move one to ext4, xfs, btrfs or tmpfs\n"
    )


@pytest.mark.root
def test_guest_root_cannot_be_another_than_qemu_where_qemu_has_the_map(shared_tmp: Path) -> None:
    with file_systems(shared_tmp, ["ramfs"]):
        words = [*fsdev("tag", shared_tmp / "ramfs", "passthrough"), *maps("tag", "both 5000 0")]
        done = subprocess.run([*dropin_words(), "-S", *words, "-runas", "nobody"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-userns: share.tag.idmap: guest id 0 cannot be 5000: ")


# --- everybody -------------------------------------------------------------------------------------------------------


def test_the_callers_own_subordinate_ids(launch: Launch, shared_tmp: Path) -> None:
    """Without root one map can be had, of ids that are the caller's own; others have no place in the guest."""
    if os.geteuid() == 0:
        words = [*EXPLAIN, *fsdev("tag", shared_tmp, "passthrough"), *maps("tag", "both 1000 1000"), *launch.options]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert f"{shared_tmp} (rw, guest's 1000 is 1000 on disk)" in shown
        return
    share = shared_tmp / "share"
    share.mkdir()
    first = int(Path("/etc/subuid").read_text().split(f"{launch.user}:")[1].split(":")[0])
    own = maps("tag", f"both {first + 10}-{first + 19} 1000-1009")
    with running_guest(dropin_words(), tmp=shared_tmp, extra=[*fsdev("tag", share, "passthrough"), *own]) as guest:
        SharedVm(launch, shared_tmp, guest).mount("tag")
        answer = guest.check("cd /tag; echo data >made; chown 1009:1000 made; echo data >other; chown 1 other; stat -c '%u %g' *")
        guest.power_off()
    assert answer == "chown: other: Invalid argument\n1009 1000\n0 0\n"
    assert owners(share, "made", "other") == [(first + 19, first + 10), (os.geteuid(), os.getegid())]


@pytest.mark.ordinary
def test_ids_of_others_are_refused(launch: Launch, shared_tmp: Path) -> None:
    """That is newuidmap's to say, before QEMU is started."""
    words = [*dropin_words(), "-S", *fsdev("tag", shared_tmp, "passthrough"), *maps("tag", "both 1 1000")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "newuidmap" in done.stderr
    assert "\nhint: " in done.stderr


def test_ids_that_nobody_has_inside_are_65534(launch: Launch, shared_tmp: Path) -> None:
    """Without a map too."""
    share = [*fsdev("tag", Path("/etc"), "passthrough", ",readonly=on"), *launch.options]
    with running_guest(dropin_words(), tmp=shared_tmp, extra=share) as guest:
        SharedVm(launch, shared_tmp, guest).mount("tag")
        answer = guest.check("stat -c '%u %g' /tag/passwd; cat /tag/shadow; chown 0:0 /tag/passwd; true")
        guest.power_off()
    assert answer.startswith(f"{OVERFLOW} {OVERFLOW}\n")
    assert "cat: can't open '/tag/shadow'" in answer
    assert "chown: /tag/passwd: Read-only file system" in answer


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("mapped-xattr", "tag", "both 1000 1000"), "security_model=mapped-xattr keeps the guest's ids beside the files"),
        (("passthrough", "tga", "both 1000 1000"), "share.tga.idmap: no share of this command line has that id or mount tag"),
        (("passthrough", "tag", "uid 1000 1000"), "maps uids or gids alone"),
        (("passthrough", "tag", "both 0 1000"), "maps host root"),
        (("passthrough", "tag", "both 1000"), "is not an id map"),
    ],
    ids=lambda words: words[1:] if isinstance(words, tuple) else "",
)
def test_refusals(words: tuple[str, str, str], error: str, shared_tmp: Path) -> None:
    model, tag, line = words
    done = subprocess.run(
        [*dropin_words(), "-S", *fsdev("tag", shared_tmp, model), *maps(tag, line)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr
    assert "\nhint: " in done.stderr


@pytest.mark.root
def test_one_directory_has_one_map(launch: Launch, shared_tmp: Path) -> None:
    shares = [*fsdev("one", shared_tmp, "passthrough"), *fsdev("two", shared_tmp, "passthrough")]
    command = [*dropin_words(), "-S", *launch.options, *shares, *maps("one", "both 1000 1000")]
    for more in ([], maps("two", "both 1001 1000")):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "two shares of one directory have different id maps" in done.stderr
    assert stat.S_ISDIR(shared_tmp.stat().st_mode)
