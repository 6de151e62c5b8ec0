"""Shares that our own settings add: `-userns share=PATH,tag=T,driver=...,map=...`, mounted in a guest."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.shares import Launch, SharedVm, dropin_words, launches, module_folder, mount_options, shared_vm, tree
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.slow]

COMMAND = str(CHECKOUT / ".venv/bin/qemu-userns")
OVERFLOW = 65534
DRIVERS = ("9p",)
LAUNCHES = [*launches(), *([Launch("nobody", ("-runas", "nobody"), "nobody")] if os.geteuid() == 0 else [])]
LXD = ("both 65534 0", "both 1000-1999 1000-1999", "uid 5000 5", "gid 6000 5")
MOUNTS = {"9p": "mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288"}


def share(path: Path, tag: str, driver: str, *lines: str, more: str = "") -> list[str]:
    """Return the option that adds a share."""
    maps = "".join(f",map={line}" for line in lines)
    return ["-userns", f"share={path},tag={tag},driver={driver}{more}{maps}"]


def own_map(launch: Launch) -> tuple[str, ...]:
    """Return a map that the launch may have: root any, anybody else of own ids."""
    if os.geteuid() == 0:
        return LXD
    first = int(Path("/etc/subuid").read_text().split(f"{launch.user}:")[1].split(":")[0])
    return (f"both {first + 10}-{first + 1009} 1000-1999", f"both {first + 5} 5")


@pytest.fixture(
    scope="module", params=[(launch, driver) for launch in LAUNCHES for driver in DRIVERS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def vm(request: pytest.FixtureRequest) -> Iterator[tuple[SharedVm, str]]:
    """A guest with three shares: with a map, read-only with a map, and without one (where everybody has his own: for root)."""
    launch, driver = request.param
    with module_folder() as folder, contextlib.ExitStack() as stack:
        for name in ("mapped", "ro", "plain"):
            (folder / name).mkdir()
            launch.own(folder / name)
        if os.geteuid() == 0:
            for name in ("mapped", "ro"):
                os.chown(folder / name, 65534, 65534)
                (folder / name / "hosts").write_text("hosts")
                (folder / name / "user").write_text("user")
                os.chown(folder / name / "user", 1000, 1000)
        else:
            (folder / "ro" / "user").write_text("user")
        lines = own_map(launch)
        extra = share(folder / "mapped", "mapped", driver, *lines) + share(
            folder / "ro", "ro", driver, *lines, more=",readonly=on"
        )
        if os.geteuid() == 0:
            extra += share(folder / "plain", "plain", driver)
        vm = stack.enter_context(shared_vm(launch, extra, folder))
        for tag in ("mapped", "ro", *(("plain",) if os.geteuid() == 0 else ())):
            vm.guest.check(f"mkdir -p /{tag}; {MOUNTS[driver]} {tag} /{tag}")
        yield vm, driver


def owners(folder: Path, *names: str) -> list[tuple[int, int]]:
    return [(found.st_uid, found.st_gid) for found in ((folder / name).lstat() for name in names)]


def test_what_the_guest_makes_belongs_to_whom_the_map_says(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check("""cd /mapped; echo data >roots; echo data >users; chown 1000:1001 users; mkdir folder
        chown 1999:5 folder; ln -s user link; chown -h 5:1500 link; chown 2000:2000 roots && echo bad
        stat -c '%n %u %g' roots users folder link; cat users""")
    assert answer.endswith("roots 0 0\nusers 1000 1001\nfolder 1999 5\nlink 5 1500\ndata\n")
    assert "bad" not in answer
    if os.geteuid() == 0:
        wanted = [(65534, 65534), (1000, 1001), (1999, 6000), (5000, 1500)]
    else:
        first = found.uid(1000) - 10
        root = (os.geteuid(), os.getegid())
        wanted = [root, (first + 10, first + 11), (first + 1009, first + 5), (first + 5, first + 510)]
    assert owners(found.folder / "mapped", "roots", "users", "folder", "link") == wanted


def test_a_set_uid_shell_of_guest_root_is_not_host_roots(vm: tuple[SharedVm, str]) -> None:
    """The attack of Incus' pull request 1547."""
    found, _ = vm
    found.guest.check("cd /mapped && cp /bin/busybox shell && chown 0:0 shell && chmod 6755 shell && ! mknod null c 1 3")
    status = (found.folder / "mapped" / "shell").stat()
    assert (status.st_uid, status.st_gid) == ((65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid()))
    for path, entry in tree(found.folder / "mapped"):
        assert path.name == "hosts" or 0 not in (entry.st_uid, entry.st_gid), path
        assert not stat.S_ISCHR(entry.st_mode), path


@pytest.mark.root
def test_who_is_not_in_the_map_is_nobody_in_the_guest(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check(
        "cd /mapped; stat -c '%n %u %g' . hosts user; chown 1000 hosts; chmod 777 hosts; rm -f hosts; ls hosts"
    )
    assert answer.startswith(f". 0 0\nhosts {OVERFLOW} {OVERFLOW}\nuser 1000 1000\n")
    assert (found.folder / "mapped" / "hosts").stat().st_mode & 0o777 == 0o644


@pytest.mark.root
def test_a_share_without_a_map_has_qemus_ids(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    found.guest.check("cd /plain; echo data >made; echo data >users; chown 9:9 users")
    assert owners(found.folder / "plain", "made", "users") == [(found.uid(0), found.gid(0)), (found.uid(9), found.gid(9))]


def test_read_only_holds_against_a_guest_that_remounts(vm: tuple[SharedVm, str]) -> None:
    found, _ = vm
    answer = found.guest.check("mount -o remount,rw /ro; cd /ro; touch new; chmod 777 user; rm -f user; cat user")
    assert answer.count("Read-only file system") == 3
    assert answer.endswith("user")
    assert sorted(path.name for path in (found.folder / "ro").iterdir()) == (["hosts", "user"] if os.geteuid() == 0 else ["user"])


def test_the_view_has_the_shares_without_set_uid_and_devices(vm: tuple[SharedVm, str]) -> None:
    found, driver = vm
    if driver == "9p":
        assert {"nosuid", "nodev", "rw"} <= mount_options(found.guest.proc, found.folder / "mapped")
        assert {"nosuid", "nodev", "ro"} <= mount_options(found.guest.proc, found.folder / "ro")


# --- where it is said ------------------------------------------------------------------------------------------------


def explain(*words: str, env: dict[str, str] | None = None) -> dict[str, list[dict[str, str]]]:
    done = subprocess.run([COMMAND, "explain", "--json", *words], capture_output=True, text=True, check=True, env=env)
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return found


def test_by_run_and_by_the_configuration_too(shared_tmp: Path) -> None:
    path, config = shared_tmp / "a,b", shared_tmp / "qemu-userns"
    for folder in (path, config):
        folder.mkdir()
    (config / "config.toml").write_text(f'[share.src]\npath = "{path}"\nreadonly = true\nsecurity_model = "mapped-xattr"\n')
    by_file = explain("qemu-system-x86_64", env={**os.environ, "XDG_CONFIG_HOME": str(shared_tmp)})
    by_run = explain(f"--share={shared_tmp}/a,,b,tag=src,readonly=on,security_model=mapped-xattr", "qemu-system-x86_64")
    option = f"share={shared_tmp}/a,,b,tag=src,readonly=on,security_model=mapped-xattr"
    by_option = explain("qemu-system-x86_64", "-userns", option)
    wanted = [
        f"-fsdev local,id=userns-share0,path={shared_tmp}/a,,b,security_model=mapped-xattr,readonly=on",
        "-device virtio-9p-pci,id=userns-share0,fsdev=userns-share0,mount_tag=src",
    ]
    for found in (by_file, by_run, by_option):
        assert [row["after"] for row in found["rewritten"] if row["where"] == "added"][-2:] == wanted
        assert any(row["what"] == f"{path} (ro)" for row in found["view"])


def test_off_adds_nothing(shared_tmp: Path) -> None:
    words = [*dropin_words(), "-userns", f"share={shared_tmp},tag=src,off=on", "-M", "none", "-version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("share={}/absent,tag=t", "absent: No such file or directory"),
        ("share={}", "has no tag"),
        ("share={},tag=t,driver=nfs", "'nfs' is not a choice"),
        ("share={},tag=t,map=both 0 1000", "maps host root"),
        ("share={},tag=t,security_model=mapped-xattr,map=both 65534 0", "keeps the guest's ids beside the files"),
    ],
)
def test_refusals(option: str, error: str, shared_tmp: Path) -> None:
    done = subprocess.run(
        [*dropin_words(), "-S", "-userns", option.format(shared_tmp)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr
    assert "\nhint: " in done.stderr
