"""9p shares for tests: who starts QEMU, the options of a share, and what the host sees of it."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from integration.leftovers import is_held, process_table
from integration.vm import RunningGuest, quote, running_guest
from tests.conftest import dropin_folder, lacking, missing, remove_tree, unprivileged_user_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOUNT_OPTIONS = "trans=virtio,version=9p2000.L"


@dataclass(frozen=True)
class Launch:
    """A way to start QEMU through the drop-in, by which inside 0 is somebody else outside."""

    name: str
    options: tuple[str, ...] = ()
    user: str | None = None
    """Who inside 0 is outside; None: ids leased for the VM, which nobody knows beforehand."""

    def __str__(self) -> str:
        return self.name

    def own(self, path: Path) -> Path:
        """Let QEMU write a folder of the host, as its operator would."""
        path.chmod(0o777 if self.user is None else 0o755)
        if self.user is not None and os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid)
        return path


def launches() -> list[Launch]:
    """Return the ways that the tester has: root leases ids or names a user, anybody else is inside 0 itself."""
    user = unprivileged_user_name()
    if os.geteuid() != 0:
        return [Launch("own", user=user)]
    return [Launch("lease"), *([Launch("runas", ("-runas", user), user)] if user else [])]


class SharedVm:
    """A guest that several tests use, and the folder on the host that holds its shares."""

    def __init__(self, launch: Launch, folder: Path, guest: RunningGuest) -> None:
        self.launch = launch
        self.folder = folder
        self.guest = guest

    def uid(self, inside: int) -> int:
        """Return the outside id of a uid inside."""
        return outside_id(self.guest.proc / "uid_map", inside)

    def gid(self, inside: int) -> int:
        return outside_id(self.guest.proc / "gid_map", inside)

    def mount(self, *tags: str, options: str = MOUNT_OPTIONS) -> None:
        """Mount shares at /TAG in the guest."""
        self.guest.check("set -e\n" + "\n".join(f"mkdir -p /{tag}; mount -t 9p -o {options} {tag} /{tag}" for tag in tags))


@contextlib.contextmanager
def shared_vm(launch: Launch, extra: Sequence[str], folder: Path, qemu: Sequence[str] = ()) -> Iterator[SharedVm]:
    """Boot a guest for several tests; its lease has to go with it."""
    with running_guest(list(qemu) or dropin_words(), tmp=folder, extra=[*extra, *launch.options]) as guest:
        vm = SharedVm(launch, folder, guest)
        lease = Path(f"/run/qemu-userns/leases/{vm.uid(0)}") if launch.user is None else None
        assert lease is None or is_held(lease)
        yield vm
    assert lease is None or not lease.exists() or not is_held(lease)


@contextlib.contextmanager
def module_folder() -> Iterator[Path]:
    """Make a folder as the fixture `shared_tmp` does, for a whole module; nothing of ours may be left at its end."""
    for mark in ("qemu", "dropin", "newuidmap", "xattr"):
        if reason := missing(mark):
            lacking(mark, reason)
    folder = Path(tempfile.mkdtemp(prefix="test-")).resolve()
    folder.chmod(0o755)
    yield folder
    left = [f"process {pid}: {command}" for pid, (_, command) in process_table().items() if str(folder) in command]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    assert not left, left
    remove_tree(folder)


def dropin_words() -> list[str]:
    return [str(dropin_folder() / "qemu-system-x86_64")]


def fsdev(tag: str, path: Path | str, model: str, more: str = "", device: str = "") -> list[str]:
    """Return the options of a share by -fsdev and -device."""
    value = f"local,id={tag},path={quote(Path(path)) if isinstance(path, Path) else path},security_model={model}{more}"
    return ["-fsdev", value, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}{device}"]


def maps(tag: str, *lines: str) -> list[str]:
    """Return the option that gives a share its map."""
    return ["-userns", ",".join(f"share.{tag}.idmap={line}" for line in lines)]


def virtfs(tag: str, path: Path | str, model: str, more: str = "") -> list[str]:
    """Return the option of a share by -virtfs."""
    return ["-virtfs", f"local,path={path},mount_tag={tag},security_model={model}{more}"]


def outside_id(id_map: Path, inside: int) -> int:
    """Look an inside id up in /proc/PID/uid_map or gid_map."""
    for line in id_map.read_text().splitlines():
        first, outside, count = map(int, line.split())
        if first <= inside < first + count:
            return outside + inside - first
    raise AssertionError(f"{inside} is not in {id_map}: {id_map.read_text()}")


def mapped_ids(id_map: Path) -> set[range]:
    """Return the outside ids of a map."""
    lines = [tuple(map(int, line.split())) for line in id_map.read_text().splitlines()]
    return {range(outside, outside + count) for _, outside, count in lines}


def mount_options(proc: Path, path: Path) -> set[str]:
    """Return the options of the mount at `path` in a process's mount namespace."""
    for line in (proc / "mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path).replace(" ", "\\040"):
            return set(fields[5].split(","))
    raise AssertionError(f"{path} is no mount of {proc}")


def virtfs_attributes(path: Path) -> dict[str, int]:
    """Return what security_model=mapped-xattr keeps of a file."""
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user.virtfs.")]
    return {name.rpartition(".")[2]: int.from_bytes(os.getxattr(path, name), "little") for name in names}


def metadata(path: Path) -> dict[str, int]:
    """Return what security_model=mapped-file keeps of a file."""
    text = (path.parent / ".virtfs_metadata" / path.name).read_text()
    return {key.removeprefix("virtfs."): int(value) for key, _, value in (line.partition("=") for line in text.splitlines())}


def tree(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return everything below a folder, symlinks not followed; what the tester may not list is left out."""
    paths = [Path(top) / name for top, folders, files in os.walk(folder) for name in folders + files]
    return [(path, path.lstat()) for path in paths]
