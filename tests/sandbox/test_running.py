"""Hot-plug into the view of a process that was launched as QEMU is, looked at from its inside and from the host."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.errors import SandboxError
from qemu_userns.host.opening import Opened
from qemu_userns.linux import mount, process
from qemu_userns.plan.grants import Bind, Create, CreateDir, Link, Node, Private
from qemu_userns.plan.identity import build_owner_map
from qemu_userns.sandbox import places, running
from qemu_userns.sandbox.running import open_namespaces
from tests.conftest import open_fds
from tests.forked import in_child
from tests.sandbox.stand_in import LEASED, ROOT, StandIn, identity, stand_in

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.userns, pytest.mark.mount]


@pytest.fixture
def host(shared_tmp: Path) -> Path:
    """A part of the host that every id may read; `share` and what is in it is shown at the launch, and `private` is a tmpfs."""
    for name in ("image", "other", "data/sub/file", "share/file", "share/dir/file"):
        (shared_tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (shared_tmp / name).write_text(name)
    (shared_tmp / "private").mkdir()
    for path in (shared_tmp / "share", *(shared_tmp / "share").rglob("*")):
        if ROOT:
            os.chown(path, LEASED, LEASED)
    return shared_tmp


@pytest.fixture
def qemu(host: Path) -> Iterator[StandIn]:
    with stand_in(bind(host / "share", writable=True), Private("test", str(host / "private"), 0o1777)) as started:
        yield started
        assert started.limit() == 0


def bind(path: Path | str, **options: Any) -> Bind:
    status = os.lstat(path)
    return Bind("test", str(path), inode=(status.st_dev, status.st_ino), **options)


def errno_in(qemu: StandIn, expression: str) -> int | None:
    """Return the errno that an expression ends with inside, None if it works."""
    try:
        qemu.run(expression)
    except OSError as err:
        return err.errno
    return None


def give(path: Path) -> None:
    """Make a file QEMU's own."""
    if ROOT:
        os.chown(path, LEASED, LEASED)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_file_comes_and_goes(qemu: StandIn, host: Path) -> None:
    image = host / "image"
    give(image)
    assert errno_in(qemu, f"open({str(image)!r})") == errno.ENOENT
    shown = qemu.bind(bind(image))
    assert qemu.read(image) == "image"
    assert errno_in(qemu, f"open({str(image)!r}, 'r+')") == errno.EROFS
    assert {"ro", "nosuid", "nodev"} <= qemu.options(image)
    assert qemu.unbind(shown) == ()
    assert errno_in(qemu, f"open({str(image)!r})") == errno.ENOENT
    assert qemu.run(f"os.listdir({str(host)!r})") in (["share", "private"], ["private", "share"])
    assert image.read_text() == "image"


def test_a_writable_file(qemu: StandIn, host: Path) -> None:
    give(host / "image")
    qemu.bind(bind(host / "image", writable=True))
    qemu.run(f"open({str(host / 'image')!r}, 'w').write('written')")
    assert (host / "image").read_text() == "written"
    assert {"rw", "nosuid", "nodev"} <= qemu.options(host / "image")


def test_a_directory_with_what_it_holds_later(qemu: StandIn, host: Path) -> None:
    qemu.bind(bind(host / "data"))
    (host / "data/sub/later").write_text("later")
    assert qemu.read(host / "data/sub/later") == "later"
    assert errno_in(qemu, f"os.mkdir({str(host / 'data/new')!r})") == errno.EROFS


def test_a_place_deep_in_the_roots_tmpfs_goes_with_its_directories(qemu: StandIn, host: Path) -> None:
    before = qemu.run("sorted(os.walk('/', topdown=True))[:1]"), qemu.run(f"os.listdir({str(host)!r})")
    first = qemu.bind(bind(host / "data/sub/file"))
    assert qemu.run(f"os.listdir({str(host / 'data')!r})") == ["sub"]
    (host / "data/sub/second").write_text("second")
    second = qemu.bind(bind(host / "data/sub/second"))
    qemu.unbind(first)
    assert qemu.run(f"os.listdir({str(host / 'data/sub')!r})") == ["second"]
    qemu.unbind(second)
    assert (qemu.run("sorted(os.walk('/', topdown=True))[:1]"), qemu.run(f"os.listdir({str(host)!r})")) == before


def test_below_a_private_tmpfs(qemu: StandIn, host: Path) -> None:
    for name in ("disk", "deep/er/disk"):
        (host / "private" / name).parent.mkdir(parents=True, exist_ok=True)
        (host / "private" / name).write_text(name)
        shown = qemu.bind(bind(host / "private" / name))
        assert qemu.read(host / "private" / name) == name
        qemu.unbind(shown)
        assert qemu.run(f"os.listdir({str(host / 'private')!r})") == []


def test_below_a_bind_of_the_host(qemu: StandIn, host: Path) -> None:
    """More access, or another object, than the directory gives that was bound at the launch."""
    shown = qemu.bind(bind(host / "share/dir"))
    assert errno_in(qemu, f"open({str(host / 'share/dir/file')!r}, 'w')") == errno.EROFS
    qemu.unbind(shown)
    assert errno_in(qemu, f"open({str(host / 'share/dir/file')!r}, 'r+')") is None
    assert (host / "share/dir").is_dir()


def test_nothing_is_made_in_a_directory_of_the_hosts(qemu: StandIn, host: Path) -> None:
    """The source is there when the worker opens it, and gone in the directory that the view shows."""
    grant = bind(host / "share/dir/file")
    attach = places.RunningView.attach

    def remove_first(view: places.RunningView, path: str, fd: int) -> places.Shown:
        # Inside by now; share/ is writable.
        os.unlink(path)
        return attach(view, path, fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places.RunningView, "attach", remove_first)
        with pytest.raises(AssertionError, match=r"cannot place .*share/dir/file in QEMU's view: No such file or directory"):
            qemu.bind(grant)
    assert list((host / "share/dir").iterdir()) == []


def test_links(qemu: StandIn, host: Path) -> None:
    (host / "link").symlink_to("data/sub")
    grants = [Link("test", str(host / "link"), "data/sub"), bind(host / "data/sub/file")]
    shown = qemu.bind(*grants)
    assert qemu.read(host / "link/file") == "data/sub/file"
    again = qemu.bind(grants[0])
    assert again[0].place is None
    qemu.unbind(again)
    assert qemu.read(host / "link/file") == "data/sub/file"
    with pytest.raises(AssertionError, match="File exists"):
        qemu.bind(Link("test", str(host / "link"), "elsewhere"))
    qemu.unbind(shown)
    assert errno_in(qemu, f"os.lstat({str(host / 'link')!r})") == errno.ENOENT


def test_created_files_and_directories(qemu: StandIn, host: Path) -> None:
    opened = Opened((), lambda _: None)
    (host / "data/log").touch()
    give(host / "data/log")
    (host / "data/own").mkdir()
    give(host / "data/own")
    opened.places[str(host / "data/sub")] = str(host / "data/own")
    qemu.bind(Create("test", str(host / "data/log"), 0o600), CreateDir("test", str(host / "data/sub")), opened=opened)
    qemu.run(f"open({str(host / 'data/log')!r}, 'w').write('logged')")
    qemu.run(f"os.mkdir({str(host / 'data/sub/made')!r})")
    assert (host / "data/log").read_text() == "logged"
    assert (host / "data/own/made").is_dir()
    assert {"rw", "nosuid", "nodev"} <= qemu.options(host / "data/sub")


def test_a_device(qemu: StandIn) -> None:
    shown = qemu.bind(Bind("test", "/dev/zero", writable=True, device=True))
    assert qemu.run("os.read(os.open('/dev/zero', os.O_RDWR), 2).hex()") == "0000"
    qemu.unbind(shown)
    assert errno_in(qemu, "os.stat('/dev')") == errno.ENOENT
    shown = qemu.bind(Bind("test", "/dev/zero", writable=True))
    assert errno_in(qemu, "open('/dev/zero')") == errno.EACCES
    qemu.unbind(shown)


@pytest.mark.root
def test_a_device_node_of_qemus_own(qemu: StandIn) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    shown = qemu.bind(
        Node("test", "/dev/secret", os.stat("/dev/zero").st_rdev, block=False), Bind("test", "/dev/null", True, True)
    )
    assert qemu.run("os.read(os.open('/dev/secret', os.O_RDWR), 2).hex()") == "0000"
    assert qemu.run("oct(os.stat('/dev/secret').st_mode)") == "0o20600"
    assert qemu.run("os.stat('/dev/secret').st_uid") == 0
    assert "nosuid" in qemu.options("/dev/secret")
    assert qemu.run("sorted(os.listdir('/dev'))") == ["null", "secret"]
    assert Path("/proc/self/mountinfo").read_text() == before
    qemu.unbind(shown)
    assert errno_in(qemu, "os.stat('/dev')") == errno.ENOENT


@pytest.mark.root
def test_a_file_of_another_owner_is_shown_as_qemus(qemu: StandIn, host: Path) -> None:
    (host / "image").chmod(0o600)
    (host / "secret").mkdir(0o700)
    (host / "image").rename(host / "secret/image")
    image = host / "secret/image"
    shown = qemu.bind(bind(image, idmap=build_owner_map(0, 0, qemu.identity)))
    assert qemu.run(f"os.stat({str(image)!r}).st_uid") == 0
    assert qemu.read(image) == "image"
    assert errno_in(qemu, f"open({str(image)!r}, 'r+')") == errno.EROFS
    assert image.stat().st_uid == 0
    qemu.unbind(shown)
    qemu.bind(bind(image))
    assert errno_in(qemu, f"open({str(image)!r})") == errno.EACCES


def test_a_directory_covers_what_was_placed_below_it_until_it_goes(qemu: StandIn, host: Path) -> None:
    give(host / "data/sub/file")
    writable = f"open({str(host / 'data/sub/file')!r}, 'r+')"
    qemu.bind(bind(host / "data/sub/file", writable=True))
    shown = qemu.bind(bind(host / "data"))
    assert errno_in(qemu, writable) == errno.EROFS
    qemu.unbind(shown)
    assert errno_in(qemu, writable) is None
    # Both at once, the directory first: what find_covered is for.
    shown = qemu.bind(bind(host / "data/sub/file", writable=True), bind(host / "data"))
    assert errno_in(qemu, writable) is None
    qemu.unbind(shown)
    assert qemu.run(f"os.listdir({str(host / 'data/sub')!r})") == ["file"]


def test_where_the_hosts_tree_is_in_sight_read_only(host: Path) -> None:
    """fs=host: what is to be written is bound over the host's own, and nothing is made there."""
    give(host / "image")
    hosts_mounts = Path("/proc/self/mountinfo").read_text()
    with stand_in(read_only_host=True) as qemu:
        mounts = qemu.mounts
        writable = f"open({str(host / 'image')!r}, 'r+')"
        assert errno_in(qemu, writable) == errno.EROFS
        shown = qemu.bind(bind(host / "image", writable=True))
        assert errno_in(qemu, writable) is None
        assert Path("/proc/self/mountinfo").read_text() == hosts_mounts
        qemu.unbind(shown)
        assert (errno_in(qemu, writable), qemu.mounts) == (errno.EROFS, mounts)


def test_a_path_of_odd_characters(qemu: StandIn, host: Path) -> None:
    odd = host / "a b\tc\nd\\e\\040#é\udcff"
    odd.write_text("odd")
    shown = qemu.bind(bind(odd))
    assert qemu.read(odd) == "odd"
    assert qemu.unbind(shown) == ()
    assert errno_in(qemu, f"open({str(odd)!r})") == errno.ENOENT


# --- what is left -----------------------------------------------------------------------------------------------------


def test_a_hundred_hot_plugs_leave_nothing(qemu: StandIn, host: Path) -> None:
    (host / "private/disk").write_text("disk")
    mounts, fds, hosts_mounts = qemu.mounts, open_fds(), Path("/proc/self/mountinfo").read_text()
    own_fds = os.listdir(qemu.proc / "fd")
    tree = qemu.run(f"list(os.walk({str(host)!r}))")
    for _ in range(100):
        shown = qemu.bind(bind(host / "image"), bind(host / "data/sub/file"), bind(host / "private/disk"))
        assert Path("/proc/self/mountinfo").read_text() == hosts_mounts
        assert len(qemu.mounts) == len(mounts) + 3
        qemu.unbind(shown)
    assert (qemu.mounts, open_fds(), os.listdir(qemu.proc / "fd")) == (mounts, fds, own_fds)
    assert Path("/proc/self/mountinfo").read_text() == hosts_mounts
    assert qemu.run(f"list(os.walk({str(host)!r}))") == tree


def test_what_is_open_stays_open(qemu: StandIn, host: Path) -> None:
    shown = qemu.bind(bind(host / "image"))
    qemu.run(f"kept.append(open({str(host / 'image')!r}))")
    qemu.unbind(shown)
    assert qemu.run("kept[0].read()") == "image"


@pytest.mark.root
def test_a_file_system_of_the_host_can_be_unmounted_at_any_time_and_is_free_after_unbind(host: Path) -> None:
    """Not in the test's own namespace, and on a host whose mounts are shared, as systemd makes them."""

    def check() -> tuple[list[bool], list[int]]:
        process.unshare(process.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(host / "data")], check=True)
        subprocess.run(["mount", "--make-rshared", "/"], check=True)
        (host / "data/disk").write_text("disk")
        (host / "data/dir").mkdir()
        (host / "data/dir/file").write_text("file")
        found, counts = [], []
        before = Path("/proc/self/mountinfo").read_text()
        with stand_in(bind(host / "share", writable=True)) as qemu:
            shown = qemu.bind(bind(host / "data/disk"), bind(host / "data/dir"), bind(host / "share/dir"))
            found.append(Path("/proc/self/mountinfo").read_text() == before)
            found.append(not [line for line in qemu.mounts if " shared:" in line])
            # What is bound below a bind of the host is not seen on the host either.
            qemu.bind(bind(host / "share/dir/file"))
            found.append(Path("/proc/self/mountinfo").read_text() == before)
            # While it is bound, the host's unmount works, and the file system lives on for QEMU alone.
            device = os.stat(host / "data").st_dev
            subprocess.run(["umount", str(host / "data")], check=True)
            found.append(qemu.read(host / "data/disk") == "disk")
            qemu.unbind(shown)
            name = f"{os.major(device)}:{os.minor(device)}"
            counts.append(sum(line.split(" ")[2] == name for line in qemu.mounts))
        return found, counts

    assert in_child(check) == ([True, True, True, True], [0])


# --- what is not taken away -------------------------------------------------------------------------------------------


def test_a_later_bind_at_the_same_path_stays(qemu: StandIn, host: Path) -> None:
    image = host / "image"
    first = qemu.bind(bind(image))
    image.rename(host / "image.old")
    image.write_text("new")
    second = qemu.bind(bind(image))
    assert qemu.read(image) == "new"
    assert qemu.unbind(first) == first
    assert qemu.read(image) == "new"
    assert qemu.unbind(second) == ()
    assert qemu.read(image) == "image"
    assert qemu.unbind(first) == ()
    assert errno_in(qemu, f"open({str(image)!r})") == errno.ENOENT
    assert qemu.unbind(first) == ()


def test_what_the_launch_placed_stays(qemu: StandIn, host: Path) -> None:
    shown = qemu.bind(bind(host / "share"))
    assert errno_in(qemu, f"open({str(host / 'share/file')!r}, 'r+')") == errno.EROFS
    qemu.unbind(shown)
    assert errno_in(qemu, f"open({str(host / 'share/file')!r}, 'r+')") is None


def test_an_empty_directory_of_the_launch_stays(host: Path) -> None:
    """QEMU's working directory, an empty one in the view's root."""
    with stand_in(Private("cwd", str(host), tmpfs=False)) as qemu:
        qemu.unbind(qemu.bind(bind(host / "image")))
        assert qemu.run(f"os.listdir({str(host)!r})") == []


# --- failures ---------------------------------------------------------------------------------------------------------


def test_all_or_nothing(qemu: StandIn, host: Path) -> None:
    mounts = qemu.mounts
    qemu.run(f"os.symlink('/usr', {str(host / 'private/z')!r})")
    (host / "private/z").mkdir()
    (host / "private/z/file").touch()
    with pytest.raises(AssertionError, match=r"cannot place .*private/z/file in QEMU's view: Too many levels"):
        qemu.bind(bind(host / "data/sub/file"), bind(host / "private/z/file"))
    assert qemu.mounts == mounts
    assert errno_in(qemu, f"os.stat({str(host / 'data')!r})") == errno.ENOENT
    assert qemu.limit() == 0


def test_the_limit_is_zero_after_a_failure_at_each_step(qemu: StandIn, host: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for module, name in ((mount, "open_tree"), (mount, "move_mount"), (mount, "openat2"), (mount, "set_propagation")):
        if ROOT and name == "set_propagation":
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(AssertionError, match=r"SandboxError|ResourceError"):
                qemu.bind(bind(host / "data/sub/file"))
        assert qemu.limit() == 0
    assert errno_in(qemu, f"os.stat({str(host / 'data')!r})") == errno.ENOENT


def test_a_worker_that_is_killed_leaves_a_limit_that_gives_nothing_and_the_next_sets_it_back(qemu: StandIn, host: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "RunningView", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(AssertionError, match="the child was killed"):
            qemu.bind(bind(host / "image"))
    assert qemu.limit() > 0
    calls = "__import__('ctypes').CDLL(None, use_errno=True)"
    for flags in (process.CLONE_NEWNS, process.CLONE_NEWUSER, process.CLONE_NEWUSER | process.CLONE_NEWNS):
        refused = qemu.run(f"(lambda c: (c.unshare({flags}), __import__('ctypes').get_errno()))({calls})")
        assert refused in ([-1, errno.EPERM], [-1, errno.ENOSPC])
    opened = qemu.run(f"(lambda c: (c.syscall(428, -100, b'/', 1), __import__('ctypes').get_errno()))({calls})")
    assert opened == [-1, errno.EPERM]
    qemu.unbind(qemu.bind(bind(host / "image")))


def test_open_namespaces_checks_whose_they_are(qemu: StandIn) -> None:
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    pidfd = os.pidfd_open(ended)
    os.waitpid(ended, 0)
    with pytest.raises(SandboxError, match="QEMU has ended"):
        open_namespaces(qemu.pid, pidfd, qemu.identity)
    os.close(pidfd)
    for pid, who in ((os.getpid(), identity()), (qemu.pid, identity().replace(uid=12345))):
        pidfd = os.pidfd_open(pid)
        with pytest.raises(SandboxError, match="cannot open QEMU's namespaces"):
            open_namespaces(pid, pidfd, who)
        os.close(pidfd)


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["file", "symlink", "gone", "parent"])
def test_a_source_that_was_replaced_between_plan_and_bind(qemu: StandIn, host: Path, how: str) -> None:
    mounts = qemu.mounts
    source = host / "data/sub/file"
    grant = bind(source)
    (host / "evil").mkdir()
    (host / "evil/file").write_text("secret")
    if how == "parent":
        (host / "data/sub").rename(host / "data/sub.old")
        (host / "data/sub").symlink_to(host / "evil")
    else:
        source.rename(host / "file.old")
        if how == "file":
            source.write_text("another")
        elif how == "symlink":
            source.symlink_to(host / "evil/file")
    with pytest.raises(AssertionError, match="ResourceError"):
        qemu.bind(grant)
    assert qemu.mounts == mounts
    assert qemu.limit() == 0


@pytest.mark.parametrize("target", ["/usr", "../share", "/proc/self/root/usr", "nowhere", "/proc/1/cwd"])
@pytest.mark.parametrize("where", ["place", "parent"])
def test_a_symlink_that_qemu_planted_is_not_followed(qemu: StandIn, host: Path, target: str, where: str) -> None:
    mounts = qemu.mounts
    place = host / "private/dir/bin"
    place.parent.mkdir()
    place.write_text("the host's")
    if where == "parent":
        qemu.run(f"os.symlink({target!r}, {str(place.parent)!r})")
    else:
        qemu.run(f"(os.mkdir({str(place.parent)!r}), os.symlink({target!r}, {str(place)!r}))")
    with pytest.raises(AssertionError, match=f"SandboxError: cannot place .*: {os.strerror(errno.ELOOP)}"):
        qemu.bind(bind(place))
    assert qemu.mounts == mounts
    assert sorted(path.name for path in (host / "share").iterdir()) == ["dir", "file"]


@pytest.mark.parametrize(("planted", "source"), [("mkdir", "file"), ("file", "directory"), ("fifo", "directory")])
def test_what_does_not_fit_is_refused(qemu: StandIn, host: Path, planted: str, source: str) -> None:
    place = host / "private/place"
    place.touch() if source == "file" else place.mkdir()
    make = {"mkdir": "os.mkdir({})", "file": "open({}, 'w').close()", "fifo": "os.mkfifo({})"}[planted]
    qemu.run(make.format(repr(str(place))))
    with pytest.raises(AssertionError, match=r"SandboxError: cannot place"):
        qemu.bind(bind(place))


@pytest.mark.parametrize("make", ["open({}, 'w').write('planted')", "os.mkfifo({})"])
def test_a_file_that_qemu_planted_is_covered_and_comes_back(qemu: StandIn, host: Path, make: str) -> None:
    place = host / "private/place"
    place.write_text("the host's")
    qemu.run(make.format(repr(str(place))))
    shown = qemu.bind(bind(place))
    assert qemu.read(place) == "the host's"
    qemu.unbind(shown)
    assert qemu.run(f"os.listdir({str(place.parent)!r})") == ["place"]


def test_a_directory_that_qemu_renamed_with_the_mount_in_it_hides_nothing(qemu: StandIn, host: Path) -> None:
    place = host / "private/dir/disk"
    place.parent.mkdir()
    place.write_text("disk")
    mounts = qemu.mounts
    shown = qemu.bind(bind(place))
    moved = str(host / "private/mo ved")
    qemu.run(f"os.rename({str(place.parent)!r}, {moved!r})")
    qemu.run(f"os.mkdir({str(place.parent)!r})")
    qemu.run(f"open({str(place)!r}, 'w').close()")
    assert qemu.read(f"{moved}/disk") == "disk"
    assert qemu.unbind(shown) == ()
    assert qemu.mounts == mounts
    assert qemu.run(f"os.path.exists('{moved}/disk')") is False


def test_a_parent_that_qemu_swaps_for_a_symlink_between_look_and_mount(qemu: StandIn, host: Path) -> None:
    """The swap happens in the worker, where move_mount is about to be called."""
    place = host / "private/dir/disk"
    place.parent.mkdir()
    place.write_text("disk")
    move = mount.move_mount

    def attack(fd: int, path: str, target: int, target_path: str, flags: int) -> None:
        if flags & mount.MOVE_MOUNT_T_EMPTY_PATH:
            os.rename(place.parent, host / "private/old")
            os.symlink(host / "share/dir", place.parent)
        move(fd, path, target, target_path, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mount, "move_mount", attack)
        shown = qemu.bind(bind(place))
    assert qemu.run(f"os.listdir({str(host / 'share/dir')!r})") == ["file"]
    assert qemu.read(host / "private/old/disk") == "disk"
    assert qemu.unbind(shown) == ()
    assert not [line for line in qemu.mounts if line.split(" ")[4].endswith("/disk")]


SWAPPER = """
import os, threading
def swap(directory, target):
    link, aside = directory + ".link", directory + ".aside"
    os.mkdir(directory)
    os.symlink(target, link)
    while not stopped:
        os.rename(directory, aside); os.rename(link, directory)
        os.rename(directory, link); os.rename(aside, directory)
stopped = []
"""


def test_a_directory_that_qemu_swaps_for_a_symlink_all_the_time(qemu: StandIn, host: Path) -> None:
    place = host / "private/dir/file"
    place.parent.mkdir()
    place.write_text("mine")
    mounts = qemu.mounts
    qemu.run(f"exec({SWAPPER!r}, globals())")
    swapper = f"threading.Thread(target=swap, args=({str(place.parent)!r}, {str(host / 'share/dir')!r}), daemon=True)"
    qemu.run(f"kept.append({swapper}) or kept[0].start()")
    outcomes = set()
    for _ in range(50):
        try:
            shown = qemu.bind(bind(place))
        except AssertionError as err:
            outcomes.add("refused" if "SandboxError: cannot place" in str(err) else str(err))
            continue
        outcomes.add("bound")
        added = [line.split(" ")[4] for line in qemu.mounts if line not in mounts]
        assert all(path.startswith(str(host / "private/dir")) for path in added)
        assert (host / "share/dir/file").read_text() == "share/dir/file"
        # Its directory may have another name by the time that it is looked at.
        assert any(not qemu.unbind(shown) for _ in range(1000))
    qemu.run("stopped.append(1) or kept[0].join()")
    assert qemu.mounts == mounts
    assert outcomes <= {"bound", "refused"}
    assert "bound" in outcomes
    assert [path.name for path in (host / "share/dir").iterdir()] == ["file"]


def test_the_root_stays_read_only_while_places_are_made(qemu: StandIn, host: Path) -> None:
    attach = mount.move_mount
    seen: Path = host / "seen"

    def look(*arguments: Any) -> None:
        # In the worker, when the writable copy of the root is open.
        found = [errno_in(qemu, "os.mkdir('/made')"), errno_in(qemu, f"os.mkdir({str(host / 'made')!r})")]
        os.write(log, repr(found).encode())
        attach(*arguments)

    log = os.open(seen, os.O_CREAT | os.O_WRONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mount, "move_mount", look)
        qemu.bind(bind(host / "data/sub/file"))
    os.close(log)
    assert set(re.findall(r"\d+", seen.read_text())) == {str(errno.EROFS)}
    assert "ro" in qemu.options("/")


def test_qemu_cannot_look_into_the_worker(qemu: StandIn, host: Path) -> None:
    results = host / "results"
    log = os.open(results, os.O_CREAT | os.O_WRONLY)
    attach = places.RunningView.attach

    def look(view: places.RunningView, path: str, fd: int) -> places.Shown:
        own = f"/proc/{os.getpid()}"
        looks = [f"os.listdir('{own}/fd')", f"os.listdir('{own}/map_files')", f"open('{own}/mem')"]
        looks += [f"os.readlink('{own}/{name}')" for name in ("root", "cwd", "ns/mnt")]
        os.write(log, " ".join(str(errno_in(qemu, expression)) for expression in looks).encode())
        return attach(view, path, fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places.RunningView, "attach", look)
        qemu.bind(bind(host / "image"))
    os.close(log)
    found = results.read_text().split()
    assert len(found) == 6
    assert set(found) <= {str(errno.EACCES), str(errno.EPERM)}


def test_the_modes_of_what_is_made(qemu: StandIn, host: Path) -> None:
    os.umask(0o077)
    qemu.bind(bind(host / "data/sub/file"))
    assert stat.S_IMODE(qemu.run(f"os.stat({str(host / 'data/sub')!r}).st_mode")) == 0o1755
