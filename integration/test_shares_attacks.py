"""Attacks on 9p shares: by root in a real guest, and by a guest whose kernel sends what it likes.

Each item that can be tested of shared/contracts/attacks.md, 17 to 18, has a test; the numbers stand in their docstrings.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.raw9p import ROOT_FID, NineError, RawShare, raw_share
from integration.shares import Launch, SharedVm, dropin_words, fsdev, launches, mapped_ids, module_folder, shared_vm, tree

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.xattr, pytest.mark.slow]

SECRET = "what no guest may read"
MODELS = ("mapped-xattr", "mapped-file", "passthrough", "none")
REAL_IDS = ("passthrough", "none")


# --- root in a real guest -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vm(launch: Launch) -> Iterator[SharedVm]:
    """A guest with shares pt, pt2 (the same folder), none and mx; beside them lies what is not shared."""
    with module_folder() as folder:
        make_secret(folder)
        for name in ("pt", "none", "mx"):
            (folder / name).mkdir()
            launch.own(folder / name)
        extra = [
            *fsdev("pt", folder / "pt", "passthrough"),
            *fsdev("pt2", folder / "pt", "passthrough"),
            *fsdev("none", folder / "none", "none"),
            *fsdev("mx", folder / "mx", "mapped-xattr"),
        ]
        with shared_vm(launch, extra, folder) as vm:
            vm.mount("pt", "pt2", "none", "mx")
            yield vm


def make_secret(folder: Path) -> None:
    """Put a file beside the shares that everybody on the host may read and write."""
    (folder / "outside").mkdir()
    (folder / "outside").chmod(0o777)
    (folder / "outside/secret").write_text(SECRET)
    (folder / "outside/secret").chmod(0o666)


def check_outside(folder: Path) -> None:
    assert os.listdir(folder / "outside") == ["secret"]
    assert (folder / "outside/secret").read_text() == SECRET
    assert stat.S_IMODE((folder / "outside/secret").stat().st_mode) == 0o666


def check_owners(proc: Path, share: Path) -> None:
    """Nothing below a share belongs to an id that the VM does not have, least of all to root, and nothing is a device."""
    uids, gids = mapped_ids(proc / "uid_map"), mapped_ids(proc / "gid_map")
    for path, found in tree(share):
        assert any(found.st_uid in ids for ids in uids), (path, found)
        assert any(found.st_gid in ids for ids in gids), (path, found)
        assert found.st_uid != 0
        assert found.st_gid != 0
        assert not stat.S_ISCHR(found.st_mode), path
        assert not stat.S_ISBLK(found.st_mode), path


@pytest.mark.parametrize("tag", ["pt", "none", "mx"])
def test_symlinks_of_the_guest_lead_nowhere_on_the_host(vm: SharedVm, tag: str) -> None:
    """18: absolute, relative and looping symlinks are resolved by the guest, in the guest."""
    script = f"""
        echo guest >/tmp/inside; mkdir -p /{tag}/links; cd /{tag}/links
        ln -s {vm.folder}/outside/secret absolute; ln -s ../../outside/secret relative; ln -s ../../../../../../../etc/shadow dots
        ln -s /proc/self/root/etc/shadow proc; ln -s {vm.folder}/outside folder; ln -s loop loop; ln -s /tmp/inside inside
        for name in absolute relative dots proc loop folder/secret; do cat $name; done 2>/dev/null
        for name in absolute relative loop folder/secret; do echo x >>$name; chmod 600 $name; done 2>/dev/null
        rm -f folder/secret
        cat inside; cd ..; rm -rf links
    """
    assert vm.guest.check(script) == "guest\n"
    check_outside(vm.folder)


@pytest.mark.parametrize("tag", ["pt", "none", "mx"])
def test_symlinks_of_the_host_do_not_leave_the_share(vm: SharedVm, tag: str) -> None:
    """18: what somebody on the host plants in the share is not followed by QEMU either."""
    share = vm.folder / tag
    (share / "host-file").symlink_to(vm.folder / "outside/secret")
    (share / "host-folder").symlink_to("../outside")
    script = f"""cd /{tag}
        for name in host-file host-folder/secret host-folder/../outside/secret; do
            cat $name && echo READ; echo x >>$name && echo WRITTEN; chmod 600 $name; truncate -s 0 $name; rm -f host-folder/secret
        done
        ln host-file hardlink; cat hardlink && echo READ; chown 1000 host-file
        ls host-folder/ && echo LISTED; touch host-folder/new; true
    """
    answer = vm.guest.check(script)
    assert SECRET not in answer
    assert not {"READ", "WRITTEN", "LISTED"} & set(answer.split())
    check_outside(vm.folder)


def test_folder_swapped_for_a_symlink_by_the_guest(vm: SharedVm) -> None:
    """18, CVE-2016-9602, CVE-2021-20181: one mount holds a folder, the other one puts a symlink in its place."""
    script = f"""
        mkdir /pt/victim; echo inside >/pt/victim/secret; cd /pt/victim; cat secret
        mv /pt2/victim /pt2/moved; ln -s {vm.folder}/outside /pt2/victim
        cat secret && echo READ; echo x >>secret && echo WRITTEN; echo x >new; rm secret; mv secret away
        chmod 777 secret; chown 5 secret; ls; true
    """
    answer = vm.guest.check(script)
    assert answer.startswith("inside\n")
    assert SECRET not in answer
    check_outside(vm.folder)


@pytest.mark.parametrize("tag", ["pt", "none", "mx"])
def test_set_id_files_belong_to_the_vm(vm: SharedVm, tag: str) -> None:
    """17: a set-id file never belongs to an id outside the maps; on a mapped share it is not even executable."""
    script = f"""cd /{tag}; mkdir -p planted; chmod 6777 planted; cp /bin/busybox planted/shell
        chown 0:0 planted/shell; chmod 6755 planted/shell; stat -c %a planted/shell
        cp planted/shell planted/other; chown 1000:1000 planted/other; chmod 6755 planted/other; stat -c %a planted/other"""
    assert vm.guest.check(script) == "6755\n6755\n"
    check_owners(vm.guest.proc, vm.folder / tag / "planted")
    if tag == "mx":
        assert not [path for path, found in tree(vm.folder / tag) if found.st_mode & 0o6000]


def test_hardlinks_stay_within_a_share(vm: SharedVm) -> None:
    """18: no hardlink, and no rename, from one share into another."""
    vm.guest.check("echo data >/pt/source; echo data >/none/source")
    for source in ("/none/source", f"{vm.folder}/outside/secret", "/etc/passwd", "/pt/..", "/pt/../../etc/passwd"):
        assert vm.guest.run(f"ln {source} /pt/linked")[0] != 0, source
    assert not (vm.folder / "pt/linked").exists()
    assert vm.guest.check("cd /pt; cat ../etc/passwd ../../../etc/passwd").count("root:x:0:0") == 2  # the guest's own


@pytest.mark.parametrize("tag", ["pt", "none"])
def test_special_files_are_not_opened_on_the_host(vm: SharedVm, tag: str) -> None:
    """18, CVE-2023-2861: a fifo that somebody made on the host is the guest's own pipe to the guest, no way to the host."""
    os.mkfifo(vm.folder / tag / "fifo")
    reader = os.open(vm.folder / tag / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        vm.guest.check(f"cd /{tag}; (echo message >fifo) & sleep 0.3; kill $! 2>/dev/null; true")
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)
    (vm.folder / tag / "fifo").unlink()


def test_many_open_files_leave_qemu_running(vm: SharedVm) -> None:
    """18: more open files than QEMU may have fds; it takes some back."""
    script = """mkdir -p /mx/many; cd /mx/many; i=0; set --
        while [ $i -lt 1200 ]; do echo $i >f$i; i=$((i+1)); done
        (i=10; while [ $i -lt 900 ]; do eval "exec $i<f$i" || break; i=$((i+1)); done; read line <&899; echo $line)
        cat f1199"""
    answer = vm.guest.check(script)
    assert answer == "899\n1199\n"


# --- a guest whose kernel is the attacker's -------------------------------------------------------------------------


class RawAttack:
    """A raw session, and the folder that holds the share `share` and what lies beside it."""

    def __init__(self, folder: Path, model: str, client: RawShare) -> None:
        self.folder = folder
        self.model = model
        self.client = client
        self.share = folder / "share"


@pytest.fixture(params=[(launch, model) for launch in launches() for model in MODELS], ids=lambda pair: "-".join(map(str, pair)))
def raw(request: pytest.FixtureRequest, shared_tmp: Path) -> Iterator[RawAttack]:
    launch, model = request.param
    make_secret(shared_tmp)
    share = shared_tmp / "share"
    share.mkdir()
    (share / "file").write_text("shared\n")
    (share / "folder").mkdir()
    launch.own(share / "folder")
    launch.own(share / "file")
    (share / "out").symlink_to(shared_tmp / "outside/secret")
    (share / "outfolder").symlink_to("../outside")
    launch.own(share)
    with raw_share(dropin_words(), share, model, launch.options) as client:
        yield RawAttack(shared_tmp, model, client)
    check_outside(shared_tmp)
    assert {path.name for path in shared_tmp.iterdir()} == {"outside", "share"}


@contextlib.contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The server answers with an error (one of `numbers`), and goes on."""
    with pytest.raises(NineError) as caught:
        yield
    assert not numbers or caught.value.errno in numbers, caught.value


EVIL_NAMES = ("../outside/secret", "/etc/shadow", "folder/../../outside", "a/b", "../x", "..", ".", "")


def test_evil_names(raw: RawAttack) -> None:
    """18, CVE-2016-7116: a name with a slash, "..", "." or nothing is no name."""
    client = raw.client
    for name in EVIL_NAMES:
        client.walk(1)
        for call, *arguments in (
            (client.create, 1, name),
            (client.mkdir, name),
            (client.symlink, name, "x"),
            (client.mknod, name, stat.S_IFREG | 0o644),
            (client.link, 1, name),
            (client.rename, "file", name),
            (client.rename, name, "moved"),
            (client.unlink, name),
        ):
            with refused():
                call(*arguments)
        client.clunk(1)
    assert set(os.listdir(raw.share)) - {".virtfs_metadata", ".virtfs_metadata_root"} == {"file", "folder", "out", "outfolder"}


def test_walks_end_at_the_root(raw: RawAttack) -> None:
    """18, CVE-2017-7471: `..` from the root is the root, by one step or by many, and a path is no name to walk."""
    client = raw.client
    inode = raw.share.stat().st_ino
    for names in (("..",), ("..", "..", "..", ".."), ("folder", "..", "..", "..")):
        fid = 10
        client.walk(fid, *names)
        assert client.inode(fid) == inode
        client.clunk(fid)
    for name in ("../outside", "folder/..", "/etc", "/"):
        with refused():
            client.walk(11, name)
    assert client.walk(12, "folder", "nothing", "..") == 1
    assert client.walk(15, "folder\0/../../outside") == 1  # a string ends at its NUL
    with refused():
        client.walk(16, "secret", fid=15)
    for name in ("/etc", "../outside", str(raw.folder)):  # the name to attach to is not a path of the host's
        client.attach(13, name)
        assert client.walk(14, "file", fid=13) == 1
        client.clunk(14)
        client.clunk(13)


def test_symlinks_are_not_followed(raw: RawAttack) -> None:
    """18, CVE-2016-9602: neither to open, nor on the way, nor to change what they name."""
    client = raw.client
    client.walk(1, "out")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_DIRECTORY):
        with refused():
            client.open(1, flags)
    client.walk(2, "outfolder")
    with contextlib.suppress(NineError):  # a partial walk is no error
        assert client.walk(3, "outfolder", "secret") < 2
    with refused():
        client.walk(4, "secret", fid=2)
    with refused():
        client.create(2, "new")
    for valid in (1, 8):
        with contextlib.suppress(NineError):
            client.set_attributes(1, valid, mode=0o600, size=0)
    with contextlib.suppress(NineError):
        client.set_xattr("user.planted", b"1", "out")
    assert not [name for name in os.listxattr(raw.folder / "outside/secret") if name.startswith("user.")]


def test_folder_swapped_under_a_fid(raw: RawAttack) -> None:
    """18, CVE-2018-19489, CVE-2021-20181: the host swaps a folder for a symlink while a fid names a file in it."""
    client = raw.client
    (raw.share / "folder/secret").write_text("inside")
    client.walk(1, "folder")
    client.walk(2, "folder", "secret")
    (raw.share / "folder").rename(raw.share / "moved")
    (raw.share / "folder").symlink_to(raw.folder / "outside")
    with refused(errno.ELOOP, errno.ENOTDIR):
        client.open(2)
    with refused(errno.ELOOP, errno.ENOTDIR):
        client.open(1)
    with refused(errno.ELOOP, errno.ENOTDIR):
        client.create(1, "new")
    with refused(errno.ELOOP, errno.ENOTDIR):
        client.set_attributes(2, 8, size=0)
    with refused(errno.ELOOP, errno.ENOTDIR):
        client.set_attributes(2, 1, mode=0o777)


def test_special_files_are_not_opened(raw: RawAttack) -> None:
    """18, CVE-2023-2861: fifos, sockets and (made by root) device nodes of the host."""
    os.mkfifo(raw.share / "fifo")
    special = ["fifo"]
    if os.geteuid() == 0:
        os.mknod(raw.share / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(raw.share / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 0))
        special += ["null", "disk"]
    for number, name in enumerate(special):
        raw.client.walk(20 + number, name)
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_NONBLOCK):
            with refused():
                raw.client.open(20 + number, flags)


def test_planted_owners_modes_and_devices(raw: RawAttack) -> None:
    """17: whatever ids and types the guest asks for, the host's files are QEMU's, and devices and foreign ids are refused."""
    client = raw.client
    client.walk(1)
    client.create(1, "planted", 0o6777)
    client.walk(2, "planted")
    client.set_attributes(2, 2 | 4, uid=0, gid=0)
    client.set_attributes(2, 1, mode=0o6777)
    real = raw.model in REAL_IDS
    for uid in (200000, 1733623808, 2**31 + 5):
        if real:
            with refused(errno.EINVAL):
                client.set_attributes(2, 2, uid=uid)
            with refused(errno.EINVAL):
                client.set_attributes(2, 4, gid=uid)
    for name, mode in (("char", stat.S_IFCHR), ("block", stat.S_IFBLK)):
        if real:
            with refused(errno.EPERM):
                client.mknod(name, mode | 0o666, 1, 3)
        else:
            client.mknod(name, mode | 0o666, 1, 3)
    planted = [(path, found) for path, found in tree(raw.share) if path.name in ("planted", "char", "block", ".virtfs_metadata")]
    uids, gids = mapped_ids(proc_of(client, "uid_map")), mapped_ids(proc_of(client, "gid_map"))
    for path, found in planted:
        assert found.st_uid != 0, path
        assert any(found.st_uid in ids for ids in uids), path
        assert any(found.st_gid in ids for ids in gids), path
        assert stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode), path
        assert real or not found.st_mode & 0o6000, path
    assert (raw.share / "planted").exists()


def test_planted_attributes(raw: RawAttack) -> None:
    """17: no file capability, no trusted or security attribute reaches the host; nor the ones that hold the mapped ids."""
    for name in ("security.capability", "trusted.overlay.opaque", "security.selinux"):
        with contextlib.suppress(NineError):
            raw.client.set_xattr(name, b"\1\0\0\2\xff\xff\xff\xff" + bytes(12), "file")
    with contextlib.suppress(NineError):
        raw.client.set_xattr("user.virtfs.uid", b"\0\0\0\0", "file")
    found = {name for name in os.listxattr(raw.share / "file") if not name.startswith("security.selinux")}
    assert found <= ({"user.virtfs.uid"} if raw.model != "mapped-xattr" else set()), found


@pytest.mark.parametrize("raw", [(launch, "mapped-file") for launch in launches()], ids=lambda pair: str(pair[0]), indirect=True)
def test_metadata_of_mapped_file_is_hidden(raw: RawAttack) -> None:
    """18, CVE-2017-7493: the guest cannot reach the files that hold its own ids."""
    client = raw.client
    client.mkdir("made")
    for name in (".virtfs_metadata", ".virtfs_metadata_root"):
        with refused():
            client.walk(1, name)
        client.walk(2)
        with refused():
            client.create(2, name)
        with refused():
            client.mkdir(name)
        with refused():
            client.rename("file", name)
        with refused():
            client.rename(name, "moved")
        with refused():
            client.unlink(name)
        client.clunk(2)


def test_links_to_the_root_and_above(raw: RawAttack) -> None:
    """18: no hardlink to a folder; one to a symlink is the symlink itself."""
    client = raw.client
    with refused():
        client.link(ROOT_FID, "root")
    client.walk(1, "out")
    with contextlib.suppress(NineError):
        client.link(1, "linked")
        assert (raw.share / "linked").is_symlink()
    assert (raw.folder / "outside/secret").stat().st_nlink == 1


def proc_of(client: RawShare, name: str) -> Path:
    return Path(f"/proc/{client.pid}") / name
