"""The system call wrappers, each with a success and a failure: the errno and the path are in the error."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from qemu_userns.linux import landlock, mount, process
from qemu_userns.linux.syscall import call, find_function, syscall
from tests.forked import errno_of, in_child, in_namespaces

NOSUID, NODEV, RDONLY = mount.MOUNT_ATTR_NOSUID, mount.MOUNT_ATTR_NODEV, mount.MOUNT_ATTR_RDONLY


def make_tmpfs(attributes: int = 0) -> int:
    context = mount.fsopen("tmpfs", mount.FSOPEN_CLOEXEC)
    mount.fsconfig(context, mount.FSCONFIG_SET_STRING, "size", "1m")
    mount.fsconfig(context, mount.FSCONFIG_CMD_CREATE)
    try:
        return mount.fsmount(context, mount.FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def mount_options(path: str) -> set[str]:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        fields = line.split(" ")
        if fields[4] == path:
            return set(fields[5].split(","))
    return set()


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_failing_call_raises_errno_and_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        call(find_function("chdir", 1), b"/nowhere", path="/nowhere")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/nowhere")


def test_a_symbol_that_is_not_there() -> None:
    with pytest.raises(OSError, match="no_such_function"):
        find_function("no_such_function", 0)


def test_an_unknown_system_call() -> None:
    assert errno_of(syscall, 4000) == errno.ENOSYS


# --- mounts -----------------------------------------------------------------------------------------------------------


@pytest.mark.mount
def test_a_tmpfs_is_made_and_attached(tmp_path: Path) -> None:
    def inside() -> set[str]:
        fd = make_tmpfs(NOSUID | NODEV)
        mount.move_mount(fd, "", mount.AT_FDCWD, str(tmp_path), mount.MOVE_MOUNT_F_EMPTY_PATH)
        (tmp_path / "file").write_text("x")
        options = mount_options(str(tmp_path))
        mount.umount2(str(tmp_path), mount.MNT_DETACH)
        assert not (tmp_path / "file").exists()
        return options

    assert {"nosuid", "nodev", "rw"} <= in_namespaces(inside)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.mount
def test_a_copy_of_a_mount_can_be_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def inside() -> int | None:
        fd = mount.open_tree(mount.AT_FDCWD, str(tmp_path), mount.OPEN_TREE_CLONE | mount.AT_RECURSIVE)
        mount.mount_setattr(fd, "", mount.AT_EMPTY_PATH, RDONLY)
        assert not os.get_inheritable(fd)
        return errno_of(lambda: os.open("file", os.O_WRONLY, dir_fd=fd))

    assert in_namespaces(inside) == errno.EROFS


@pytest.mark.mount
def test_what_the_mount_calls_refuse(tmp_path: Path) -> None:
    def inside() -> list[tuple[int | None, str | None]]:
        found: list[tuple[int | None, str | None]] = []
        for function, arguments in (
            (mount.open_tree, (mount.AT_FDCWD, "/nowhere", mount.OPEN_TREE_CLONE)),
            (mount.move_mount, (make_tmpfs(), "", mount.AT_FDCWD, "/nowhere", mount.MOVE_MOUNT_F_EMPTY_PATH)),
            (mount.fsopen, ("no-such-fs", mount.FSOPEN_CLOEXEC)),
            (mount.pivot_root, (str(tmp_path), str(tmp_path))),
            (mount.set_propagation, ("/nowhere", mount.MS_SLAVE)),
            (mount.mount_setattr, (mount.AT_FDCWD, "/nowhere", 0, RDONLY)),
        ):
            try:
                function(*arguments)
                found.append((None, None))
            except OSError as err:
                found.append((err.errno, err.filename))
        return found

    where = str(tmp_path)
    assert in_namespaces(inside) == [
        (errno.ENOENT, "/nowhere"),
        (errno.ENOENT, "/nowhere"),
        (errno.ENODEV, "no-such-fs"),
        (errno.EINVAL, where),
        (errno.ENOENT, "/nowhere"),
        (errno.ENOENT, "/nowhere"),
    ]


@pytest.mark.userns
def test_without_capabilities_no_mount_is_copied(tmp_path: Path) -> None:
    def inside() -> int | None:
        process.capset(frozenset())
        return errno_of(mount.open_tree, mount.AT_FDCWD, str(tmp_path), mount.OPEN_TREE_CLONE)

    assert in_namespaces(inside) == errno.EPERM


def test_openat2_follows_no_symlink(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "up").symlink_to("/etc")
    root = os.open(tmp_path, os.O_PATH)
    try:
        os.close(mount.openat2(root, "file", os.O_PATH, mount.RESOLVE_NO_SYMLINKS))
        assert errno_of(mount.openat2, root, "link", os.O_PATH, mount.RESOLVE_NO_SYMLINKS) == errno.ELOOP
        assert errno_of(mount.openat2, root, "up/passwd", os.O_PATH, mount.RESOLVE_NO_SYMLINKS) == errno.ELOOP
        assert errno_of(mount.openat2, root, "up/passwd", os.O_PATH, mount.RESOLVE_IN_ROOT) == errno.ENOENT
        inside = mount.openat2(root, "../../..", os.O_PATH, mount.RESOLVE_IN_ROOT)
        assert os.path.samestat(os.fstat(inside), tmp_path.stat())
        assert not os.get_inheritable(inside)
        os.close(inside)
    finally:
        os.close(root)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.userns
def test_unshare() -> None:
    def inside() -> bool:
        before = os.readlink("/proc/self/ns/user")
        process.unshare(process.CLONE_NEWUSER)
        return os.readlink("/proc/self/ns/user") != before

    assert in_child(inside)


@pytest.mark.userns
def test_setns() -> None:
    def inside() -> bool:
        process.unshare(process.CLONE_NEWNS)
        fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        before = os.readlink("/proc/self/ns/mnt")
        process.unshare(process.CLONE_NEWNS)
        process.setns(fd, process.CLONE_NEWNS)
        return os.readlink("/proc/self/ns/mnt") == before

    assert in_namespaces(inside)
    assert in_child(lambda: errno_of(process.setns, 0, process.CLONE_NEWNS)) == errno.EINVAL


def test_prctl() -> None:
    def inside() -> tuple[int, int]:
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGUSR1)
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        return process.get_pdeathsig(), process.prctl(39)  # PR_GET_NO_NEW_PRIVS

    assert in_child(inside) == (signal.SIGUSR1, 1)
    assert process.get_pdeathsig() == 0


@pytest.mark.parametrize(("option", "value"), [(process.PR_SET_PDEATHSIG, 1000), (process.PR_CAPBSET_DROP, 63), (9999, 0)])
def test_prctl_raises(option: int, value: int) -> None:
    assert errno_of(process.prctl, option, value) in (errno.EINVAL, errno.EPERM)


def test_umount2_raises() -> None:
    assert errno_of(mount.umount2, "/nowhere", 0) in (errno.ENOENT, errno.EPERM)


def test_unshare_raises() -> None:
    assert in_child(lambda: errno_of(process.unshare, 0x1)) == errno.EINVAL


def capabilities(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(f"{name}:"))


@pytest.mark.userns
def test_capset() -> None:
    kept = frozenset((process.CAP_CHOWN, process.CAP_SYS_ADMIN, 39))

    def inside() -> list[int]:
        process.capset(kept)
        return [capabilities(name) for name in ("CapPrm", "CapEff", "CapInh")]

    mask = 1 << 0 | 1 << 21 | 1 << 39
    assert in_namespaces(inside) == [mask, mask, 0]

    def regain() -> int | None:
        process.capset(frozenset())
        return errno_of(process.capset, kept)

    assert in_namespaces(regain) == errno.EPERM


@pytest.mark.userns
def test_bounding_set() -> None:
    def inside() -> int:
        process.prctl(process.PR_CAPBSET_DROP, process.CAP_SYS_ADMIN)
        process.prctl(process.PR_CAP_AMBIENT, process.PR_CAP_AMBIENT_CLEAR_ALL)
        return capabilities("CapBnd") & 1 << process.CAP_SYS_ADMIN

    assert in_namespaces(inside) == 0


def test_close_range() -> None:
    def inside() -> list[int]:
        fds = [os.dup2(0, number) for number in range(500, 504)]
        process.close_range(fds[0], fds[1], 0)
        os.set_inheritable(fds[2], True)
        process.close_range(fds[2], process.FD_MAX, process.CLOSE_RANGE_CLOEXEC)
        assert [errno_of(os.fstat, fd) for fd in fds] == [errno.EBADF, errno.EBADF, None, None]
        assert not os.get_inheritable(fds[2])
        return fds

    assert in_child(inside)
    assert errno_of(process.close_range, 5, 4, 0) == errno.EINVAL


def test_reset_signal() -> None:
    def inside() -> int:
        process.reset_signal(process.SIGPIPE)
        ignored = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
        return int(ignored.split()[1], 16) >> process.SIGPIPE - 1 & 1

    assert in_child(inside) == 0
    assert errno_of(process.reset_signal, 1000) == errno.EINVAL


# --- Landlock ---------------------------------------------------------------------------------------------------------


def restrict(allowed: Path, scoped: int = 0) -> None:
    abi = landlock.probe_landlock()
    ruleset = landlock.landlock_create_ruleset(abi, scoped if abi >= 6 else 0)
    root = os.open(allowed, os.O_PATH)
    landlock.landlock_add_rule(ruleset, root, landlock.file_rights(abi, root))
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    landlock.landlock_restrict_self(ruleset)


needs_landlock = pytest.mark.skipif(landlock.probe_landlock() == 0, reason="this kernel has no Landlock")


@needs_landlock
def test_landlock_denies_what_lies_outside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/file", "outside"):
        (tmp_path / name).write_text("x")

    def inside() -> list[int | None]:
        outside = os.open(tmp_path / "outside", os.O_RDONLY)
        restrict(tmp_path / "in")
        return [
            errno_of((tmp_path / "in/file").read_text),
            errno_of((tmp_path / "in/new").touch),
            errno_of((tmp_path / "outside").read_text),
            errno_of((tmp_path / "in/../outside").read_text),
            errno_of((tmp_path / "new").touch),
            errno_of(os.read, outside, 1),
            errno_of(lambda: os.open(f"/proc/self/fd/{outside}", os.O_RDONLY)),
            errno_of(os.rename, tmp_path / "in/file", tmp_path / "moved"),
        ]

    denied = errno.EACCES
    *found, renamed = in_child(inside)
    assert found == [None, None, denied, denied, denied, None, denied]
    assert renamed in (denied, errno.EXDEV)


@needs_landlock
def test_landlock_rules_for_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    def inside() -> list[int | None]:
        restrict(tmp_path / "file")
        return [errno_of((tmp_path / "file").read_text), errno_of((tmp_path / "other").touch)]

    assert in_child(inside) == [None, errno.EACCES]


@needs_landlock
def test_what_landlock_refuses(tmp_path: Path) -> None:
    abi = landlock.probe_landlock()
    ruleset = landlock.landlock_create_ruleset(abi, 0)
    pipe = os.pipe()
    try:
        assert errno_of(landlock.landlock_add_rule, ruleset, pipe[0], 4) == errno.EBADFD
        assert errno_of(landlock.landlock_add_rule, pipe[0], pipe[0], 4) in (errno.EBADF, errno.EBADFD)
        if os.geteuid() != 0:
            assert in_child(lambda: errno_of(landlock.landlock_restrict_self, ruleset)) == errno.EPERM
    finally:
        for fd in (ruleset, *pipe):
            os.close(fd)


@pytest.mark.skipif(landlock.probe_landlock() < 6, reason="this kernel's Landlock has no scopes (Linux 6.12)")
def test_landlock_scopes_signals() -> None:
    parent = os.getpid()

    def inside() -> list[int | None]:
        restrict(Path("/"), landlock.LANDLOCK_SCOPE_SIGNAL)
        return [errno_of(os.kill, parent, 0), errno_of(os.kill, os.getpid(), 0)]

    assert in_child(inside) == [errno.EPERM, None]


@pytest.mark.parametrize(("abi", "bits"), [(1, 13), (2, 14), (3, 15), (4, 15), (5, 16), (6, 16), (9, 16)])
def test_rights_by_abi(abi: int, bits: int) -> None:
    assert landlock.all_rights(abi) == (1 << bits) - 1
