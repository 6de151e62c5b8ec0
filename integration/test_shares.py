"""9p shares of QEMU in its namespaces: what the guest sees, and what the host has.

One boot per way of starting QEMU serves most tests (module fixture `vm`), so that they stay quick.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.shares import (
    Launch,
    SharedVm,
    dropin_words,
    fsdev,
    mapped_ids,
    metadata,
    module_folder,
    mount_options,
    shared_vm,
    virtfs,
    virtfs_attributes,
)
from integration.talk import unmount
from integration.vm import running_guest
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.dropin, pytest.mark.newuidmap, pytest.mark.xattr, pytest.mark.slow]

UNMAPPED = 200000  # inside; no range here is that long
MODELS = ("mx", "mapped", "mf", "pt", "vpt", "none", "ro", "vro", "fd", "throttled", "multi")
PLACES = ("link", "comma", "cwd", "relative", "outer", "inner", "roouter", "rwinner", "gone", "replaced", "both", "both2")


def make_shares(folder: Path, launch: Launch) -> list[str]:
    """Make the shares of `vm` and return their options."""

    def new(name: str) -> Path:
        path = folder / name
        path.mkdir(parents=True)
        launch.own(path)
        (path / "hello").write_text(f"hello from {name}\n")
        return path

    home = folder / "home"  # the working directory of QEMU is a folder of vm.py's: paths relative to it begin with ../
    new("home/linked")
    (folder / "symlink").symlink_to("home/linked")
    new("ro/below")
    launch.own(folder / "ro")
    new("outer/inner")
    launch.own(folder / "outer")
    new("roouter/rwinner")
    launch.own(folder / "roouter")
    launch.own(home)
    (folder / "ro/hello").write_text("hello from ro\n")
    return [
        *fsdev("mx", new("mx"), "mapped-xattr"),
        *virtfs("mapped", new("mapped"), "mapped", ",id=an-id"),
        *fsdev("mf", new("mf"), "mapped-file"),
        *fsdev("pt", new("pt"), "passthrough"),
        *virtfs("vpt", new("vpt"), "passthrough"),
        *fsdev("none", new("none"), "none"),
        *fsdev("ro", folder / "ro", "passthrough", ",readonly=on"),
        *virtfs("vro", new("vro"), "mapped-xattr", ",readonly=on"),
        *fsdev("fd", new("fd"), "mapped-xattr", ",fmode=0640,dmode=0750"),
        *fsdev("throttled", new("throttled"), "mapped-xattr", ",throttling.bps-total=50000000,throttling.iops-total=5000"),
        *fsdev("multi", new("multi"), "none", ",multidevs=remap,writeout=immediate"),
        *fsdev("link", folder / "symlink", "mapped-xattr"),
        *fsdev("comma", new("with, comma and ,two"), "mapped-xattr"),
        *fsdev("cwd", ".", "none", ",readonly=on"),
        *fsdev("relative", "../home/linked", "none"),
        *fsdev("outer", folder / "outer", "mapped-xattr"),
        *fsdev("inner", folder / "outer/inner", "mapped-xattr", ",readonly=on"),
        *fsdev("roouter", folder / "roouter", "none", ",readonly=on"),
        *fsdev("rwinner", folder / "roouter/rwinner", "none"),
        *fsdev("gone", new("gone"), "mapped-xattr"),
        *fsdev("replaced", new("replaced"), "mapped-xattr"),
        *fsdev("both", new("both"), "mapped-xattr"),
        *fsdev("both2", folder / "both", "mapped-xattr"),
    ]


@pytest.fixture(scope="module")
def vm(launch: Launch) -> Iterator[SharedVm]:
    with module_folder() as folder, shared_vm(launch, make_shares(folder, launch), folder) as vm:
        vm.mount(*MODELS, *PLACES)
        yield vm


# --- mapped ---------------------------------------------------------------------------------------------------------

CHANGE_ALL = """set -e
    cd /{tag}
    cat hello
    echo data >made
    chown 1000:1001 made
    chmod 4711 made
    mkdir folder
    chown 200000:0 folder
    chmod 1770 folder
    mknod char c 1 3
    mknod block b 7 9
    mkfifo pipe
    ln -s /etc/shadow symlink
    ln made hardlink
    for name in made folder char block pipe symlink; do stat -c '%n %u %g %a %F %t:%T' $name; done
    readlink symlink
"""
CHANGED = """hello from {tag}
made 1000 1001 4711 regular file 0:0
folder 200000 0 1770 directory 0:0
char 0 0 644 character special file 1:3
block 0 0 644 block special file 7:9
pipe 0 0 644 fifo 0:0
symlink 0 0 777 symbolic link 0:0
/etc/shadow
"""


@pytest.mark.parametrize("tag", ["mx", "mapped"])
def test_mapped_xattr(vm: SharedVm, tag: str) -> None:
    assert vm.guest.check(CHANGE_ALL.format(tag=tag)) == CHANGED.format(tag=tag)
    share = vm.folder / tag
    expected = {
        "made": (1000, 1001, stat.S_IFREG | 0o4711),
        "folder": (200000, 0, stat.S_IFDIR | 0o1770),
        "char": (0, 0, stat.S_IFCHR | 0o644),
        "block": (0, 0, stat.S_IFBLK | 0o644),
        "pipe": (0, 0, stat.S_IFIFO | 0o644),
        "symlink": (0, 0, stat.S_IFLNK | 0o777),
    }
    for name, (uid, gid, mode) in expected.items():
        check_owner_and_mode(vm, share / name)
        if readable(vm):
            found = virtfs_attributes(share / name)
            assert (found["uid"], found["gid"], found["mode"]) == (uid, gid, mode), name
    if readable(vm):
        assert virtfs_attributes(share / "block")["rdev"] == os.makedev(7, 9)
        assert (share / "symlink").read_text() == "/etc/shadow"
        assert (share / "hardlink").read_text() == "data\n"


def test_mapped_file(vm: SharedVm) -> None:
    assert vm.guest.check(CHANGE_ALL.format(tag="mf")) == CHANGED.format(tag="mf")
    for name, uid, gid, mode in (("made", 1000, 1001, 0o104711), ("folder", UNMAPPED, 0, 0o41770), ("char", 0, 0, 0o20644)):
        path = vm.folder / "mf" / name
        check_owner_and_mode(vm, path)
        if readable(vm):
            assert not virtfs_attributes(path)
            assert (metadata(path)["uid"], metadata(path)["gid"], metadata(path)["mode"]) == (uid, gid, mode)
    assert ".virtfs_metadata" not in vm.guest.check("ls -a /mf")


def test_fmode_and_dmode(vm: SharedVm) -> None:
    vm.guest.check("cd /fd; echo >file; mkdir folder; chmod 777 file folder")
    assert stat.S_IMODE((vm.folder / "fd/file").stat().st_mode) == 0o640
    assert stat.S_IMODE((vm.folder / "fd/folder").stat().st_mode) == 0o750


def test_throttled_and_multidevs_shares_work(vm: SharedVm) -> None:
    script = """set -e; dd if=/dev/urandom of=/tmp/data bs=64k count=32
        for tag in throttled multi; do cp /tmp/data /$tag/data; cmp /tmp/data /$tag/data; done"""
    vm.guest.check(script)
    assert (vm.folder / "throttled/data").stat().st_size == (vm.folder / "multi/data").stat().st_size == 2 << 20


def check_owner_and_mode(vm: SharedVm, path: Path) -> None:
    """A mapped file is QEMU's and nobody else's, whatever it is to the guest."""
    found = path.lstat()
    assert (found.st_uid, found.st_gid) == (vm.uid(0), vm.gid(0)), path
    expected = stat.S_IFDIR | 0o700 if path.name == "folder" else stat.S_IFREG | 0o600
    assert stat.filemode(found.st_mode) == stat.filemode(expected), path


def readable(vm: SharedVm) -> bool:
    """May the tester look into files that belong to QEMU alone?"""
    return os.geteuid() in (0, vm.uid(0))


# --- passthrough and none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["pt", "vpt", "none"])
def test_passthrough_ids_are_the_mapped_ones(vm: SharedVm, tag: str) -> None:
    script = f"""set -e
        cd /{tag}
        echo data >made
        stat -c '%u %g %a' made
        chown 1000:1001 made
        chmod 640 made
        stat -c '%u %g %a' made
        mkdir folder
        chown 65535:65535 folder
        stat -c '%u %g' folder
        cp made copy; chown 1:2 copy; chown 3:4 copy; chown 0:0 copy; chown -h 5:6 copy
        ln -s made symlink; chown -h 7:8 symlink
        stat -c '%u %g' copy symlink
    """
    assert vm.guest.check(script) == "0 0 644\n1000 1001 640\n65535 65535\n5 6\n7 8\n"
    share = vm.folder / tag
    made = (share / "made").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (vm.uid(1000), vm.gid(1001), 0o640)
    assert (vm.uid(1000), vm.uid(65535)) == (vm.uid(1) + 999, vm.uid(1) + 65534)
    for name, uid, gid in (("folder", 65535, 65535), ("copy", 5, 6), ("symlink", 7, 8)):
        found = (share / name).lstat()
        assert (found.st_uid, found.st_gid) == (vm.uid(uid), vm.gid(gid)), name
    assert (share / "symlink").is_symlink()


def test_guest_users_own_what_they_create(vm: SharedVm) -> None:
    script = f"""
        grep -q user /etc/passwd || printf 'user:x:1000:1000::/:/bin/sh\\nbig:x:{UNMAPPED}:{UNMAPPED}::/:/bin/sh\\n' >>/etc/passwd
        mkdir -m 777 /pt/open /none/open
        for tag in pt none; do for user in user big; do
            su $user -c "echo data >/$tag/open/of-$user" 2>/dev/null; echo $tag $user $?
        done; done
        cd /pt/open; ls; stat -c '%u %g' of-user
        cd /none/open; ls; stat -c '%u %g' of-user
    """
    answer = vm.guest.check(script)
    # Passthrough takes a file back whose owner cannot be told to the host, "none" keeps it as QEMU's.
    assert answer == "pt user 0\npt big 1\nnone user 0\nnone big 0\nof-user\n1000 1000\nof-big\nof-user\n1000 1000\n"
    assert (vm.folder / "pt/open/of-user").stat().st_uid == vm.uid(1000)
    assert (vm.folder / "none/open/of-big").stat().st_uid == vm.uid(0)


@pytest.mark.parametrize("tag", ["pt", "none"])
def test_unmapped_ids_are_refused(vm: SharedVm, tag: str) -> None:
    script = f"""cd /{tag}; echo >unmapped; chown {UNMAPPED} unmapped; chown :{UNMAPPED} unmapped; chown 70000:70000 unmapped
        stat -c '%u %g' unmapped"""
    assert vm.guest.check(script) == "chown: unmapped: Invalid argument\n" * 3 + "0 0\n"


@pytest.mark.parametrize("tag", ["pt", "none"])
def test_device_nodes_are_refused(vm: SharedVm, tag: str) -> None:
    answer = vm.guest.check(f"cd /{tag}; mknod char c 1 3; mknod block b 8 0; ls char block; true")
    assert answer.count("Operation not permitted") == 2
    assert answer.count("No such file") == 2
    assert not [path for path in (vm.folder / tag).iterdir() if path.is_char_device() or path.is_block_device()]


# --- ro, renames, paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["ro", "vro"])
def test_read_only_stays_read_only(vm: SharedVm, tag: str) -> None:
    assert vm.guest.check(f"cat /{tag}/hello") == f"hello from {tag}\n"
    script = f"""
        mount -o remount,rw /{tag}
        cd /{tag}
        echo x >new; echo x >>hello; mkdir folder; rm hello; mv hello hi
        chmod 600 hello; chown 1 hello; ln hello h; ln -s a b; touch hello
        true
    """
    answer = vm.guest.check(script)
    assert answer.count("Read-only file system") == 10, answer
    assert (vm.folder / tag / "hello").read_text() == f"hello from {tag}\n"
    assert {"new", "folder", "hi", "h", "b"}.isdisjoint(os.listdir(vm.folder / tag))


def test_mounts_of_the_shares(vm: SharedVm) -> None:
    """Read-only for the kernel too, where QEMU was told so; set-id bits and devices never count."""
    for name, access in (("ro", "ro"), ("vro", "ro"), ("pt", "rw"), ("mx", "rw"), ("roouter", "ro"), ("roouter/rwinner", "rw")):
        options = mount_options(vm.guest.proc, vm.folder / name)
        assert {access, "nosuid", "nodev"} <= options, (name, options)


@pytest.mark.parametrize("tag", ["mx", "mf", "pt", "none"])
def test_renames_between_folders(vm: SharedVm, tag: str) -> None:
    """Landlock refuses them unless it is told otherwise (LANDLOCK_ACCESS_FS_REFER)."""
    script = f"""set -e
        mkdir -p /{tag}/rename/a/b /{tag}/rename/c; cd /{tag}/rename
        echo file >a/file; ln -s x a/symlink
        mv a/file c/renamed; mv a/symlink .; mv a/b c; ln c/renamed a/linked; mv c a/; echo other >other; mv other a/linked
        find . | sort; cat a/c/renamed a/linked
    """
    expected = ". ./a ./a/c ./a/c/b ./a/c/renamed ./a/linked ./symlink file other"
    assert vm.guest.check(script).split() == expected.split()


def test_paths_of_all_sorts(vm: SharedVm) -> None:
    names = {"link": "home/linked", "comma": "with, comma and ,two", "relative": "home/linked"}
    for tag, name in names.items():
        assert vm.guest.check(f"cat /{tag}/hello; echo {tag} >/{tag}/from-{tag}") == f"hello from {name}\n"
        assert (vm.folder / name / f"from-{tag}").exists()
    assert vm.guest.check("ls /cwd").split() == sorted(path.name for path in vm.guest.home.iterdir())


def test_nested_shares(vm: SharedVm) -> None:
    assert vm.guest.check("cat /outer/inner/hello /inner/hello") == "hello from outer/inner\n" * 2
    assert vm.guest.check("echo new >/outer/inner/new; cat /inner/new") == "new\n"
    assert vm.guest.run("echo x >/inner/hello")[0] != 0
    assert vm.guest.check("echo new >/rwinner/new; cat /roouter/rwinner/new") == "new\n"
    assert vm.guest.run("echo x >/roouter/rwinner/new")[0] != 0
    assert (vm.folder / "roouter/rwinner/new").read_text() == "new\n"


def test_one_folder_as_two_shares(vm: SharedVm) -> None:
    script = """set -e
        echo data >/both/file; chown 12:34 /both/file; stat -c '%u %g' /both2/file
        mv /both2/file /both2/moved; cat /both/moved"""
    assert vm.guest.check(script) == "12 34\ndata\n"


def test_share_replaced_while_running(vm: SharedVm) -> None:
    """QEMU keeps what it was given: a folder that is put in its place afterwards is not the share."""
    (vm.folder / "replaced").rename(vm.folder / "old")
    (vm.folder / "replaced").mkdir(mode=0o777)
    (vm.folder / "replaced/hello").write_text("somebody else's\n")
    assert vm.guest.check("cat /replaced/hello; echo new >/replaced/new; cat /replaced/new") == "hello from replaced\nnew\n"
    assert (vm.folder / "old/new").exists()
    assert not (vm.folder / "replaced/new").exists()


def test_share_removed_while_running(vm: SharedVm) -> None:
    (vm.folder / "gone/hello").unlink()
    (vm.folder / "gone").rmdir()
    assert vm.guest.run("echo x >/gone/new")[0] != 0
    assert vm.guest.check("ls /gone; cat /mx/hello") == "hello from mx\n"


# --- QEMU -----------------------------------------------------------------------------------------------------------


def test_capabilities_for_passthrough_and_none_outside(vm: SharedVm) -> None:
    status = dict(line.split(":\t", 1) for line in (vm.guest.proc / "status").read_text().splitlines() if ":\t" in line)
    chown_dac_override_fowner_fsetid = "000000000000001b"
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert status[name] == chown_dac_override_fowner_fsetid, name
    assert status["CapInh"] == status["CapAmb"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == [str(vm.uid(0))] * 4
    assert not any(0 in ids for name in ("uid_map", "gid_map") for ids in mapped_ids(vm.guest.proc / name))


def test_two_vms_on_one_share(vm: SharedVm) -> None:
    """With a user's ids both VMs share files; with ids leased per VM what is in them stays each VM's own."""
    vm.guest.check("echo one >/both/one; mkdir /both/folder-one")
    extra = [*fsdev("both", vm.folder / "both", "mapped-xattr"), *vm.launch.options]
    with running_guest(dropin_words(), tmp=vm.folder, extra=extra) as guest:
        second = SharedVm(vm.launch, vm.folder, guest)
        second.mount("both")
        guest.check("echo two >/both/two")
        assert {"one", "two", "hello"} <= set(guest.check("ls /both").split())
        assert {"one", "two", "hello"} <= set(vm.guest.check("ls /both").split())
        leased = vm.launch.user is None
        assert guest.run("cat /both/one")[0] == (1 if leased else 0)
        assert vm.guest.run("cat /both/two")[0] == (1 if leased else 0)
        if leased:
            assert mapped_ids(guest.proc / "uid_map").isdisjoint(mapped_ids(vm.guest.proc / "uid_map"))
            assert not set(range(second.uid(0), second.uid(0) + 65536)) & set(range(vm.uid(0), vm.uid(0) + 65536))


# --- without a guest: what happens at the start ---------------------------------------------------------------------


def start(launch: Launch, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Start QEMU through the drop-in and let it end at once."""
    words = [*dropin_words(), "-nodefaults", "-display", "none", "-monitor", "stdio", *options, *launch.options]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(words, input="quit\n", capture_output=True, text=True, timeout=60, env=environment)


@contextlib.contextmanager
def paused(launch: Launch, *options: str) -> Iterator[Path]:
    """Start a QEMU that runs nothing; yield its folder in /proc."""
    words = [*dropin_words(), "-nodefaults", "-display", "none", "-monitor", "stdio", "-S", *options, *launch.options]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        try:
            assert qemu.stdout is not None
            assert "QEMU" in qemu.stdout.readline()
            yield Path(f"/proc/{qemu.pid}")
            qemu.communicate("quit\n", timeout=60)
        finally:
            qemu.kill()


@pytest.mark.root
def test_what_is_mounted_on_a_share_later_arrives(launch: Launch, shared_tmp: Path) -> None:
    """As on most hosts, the share lies on a shared mount (mount_namespaces(7))."""
    subprocess.run(["mount", "--bind", shared_tmp, shared_tmp], check=True)
    subprocess.run(["mount", "--make-shared", shared_tmp], check=True)
    try:
        share = shared_tmp / "share"
        share.mkdir()
        (launch.own(share) / "mounted").mkdir()
        with paused(launch, *fsdev("tag", share, "passthrough")) as proc:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", share / "mounted"], check=True)
            mount_options(proc, share / "mounted")
            subprocess.run(["umount", share / "mounted"], check=True)  # nothing is pinned either
            with pytest.raises(AssertionError):
                mount_options(proc, share / "mounted")
    finally:
        subprocess.run(["umount", "-R", "-l", shared_tmp], check=True)


def test_mapped_shares_need_no_capability(launch: Launch, shared_tmp: Path) -> None:
    extra = [option for model in ("mapped-xattr", "mapped-file") for option in fsdev(model, launch.own(shared_tmp), model)]
    with paused(launch, *extra) as proc:
        status = (proc / "status").read_text()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{name}:\t{'0' * 16}\n" in status, name


@pytest.mark.parametrize("option", ["fsdev", "virtfs"])
def test_no_xattrs_is_a_clear_error(launch: Launch, option: str) -> None:
    """/proc/sys has no user.* attributes, on any machine and for any user."""
    make = fsdev if option == "fsdev" else virtfs
    done = start(launch, *make("tag", "/proc/sys/kernel", "mapped-xattr"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"qemu-userns: -{option} path /proc/sys/kernel: its file system has no user.* attributes, "
        "which security_model=mapped-xattr keeps ids and modes in\nhint: use security_model=mapped-file\n"
    )


@pytest.mark.root
def test_ramfs_takes_mapped_file_only(launch: Launch, shared_tmp: Path) -> None:
    share = shared_tmp / "ramfs"
    share.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=777", "ramfs", share], check=True)
    try:
        launch.own(share)
        done = start(launch, *fsdev("tag", share, "mapped"))
        assert done.returncode == 1
        assert "no user.* attributes" in done.stderr
        assert done.stderr.endswith("hint: use security_model=mapped-file\n")
        for model in ("mapped-file", "passthrough", "none", "mapped-xattr,readonly=on"):
            done = start(launch, *fsdev("tag", share, model))
            assert (done.returncode, done.stderr) == (0, ""), model
    finally:
        unmount(share)


def test_bad_share_paths(launch: Launch, shared_tmp: Path) -> None:
    (shared_tmp / "file").write_text("")
    (shared_tmp / "dangling").symlink_to("nowhere")
    (shared_tmp / "loop").symlink_to("loop")
    reasons = {"file": "a share is a directory", "dangling": "No such file", "loop": "Too many levels", "none": "No such file"}
    for name, reason in reasons.items():
        done = start(launch, *fsdev("tag", shared_tmp / name, "none"))
        assert (done.returncode, done.stdout) == (1, ""), name
        assert done.stderr.startswith(f"qemu-userns: -fsdev path {shared_tmp / name}: "), done.stderr
        assert reason in done.stderr


def test_share_of_somebody_else_is_read_only_and_explain_says_so(launch: Launch, shared_tmp: Path) -> None:
    share = shared_tmp / "share"
    share.mkdir()
    if os.geteuid() != 0:
        share.chmod(0o555)
    done = start(launch, *fsdev("tag", share, "none"))
    assert (done.returncode, done.stderr) == (0, "")
    words = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", "qemu-system-x86_64", *fsdev("tag", share, "none")]
    words += launch.options
    assert "can only read it" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("readonly", ["on", "yes", "true", "y"])
def test_every_spelling_of_readonly_is_read_only(launch: Launch, shared_tmp: Path, readonly: str) -> None:
    share = shared_tmp / "share"
    share.mkdir()
    with paused(launch, *fsdev("tag", launch.own(share), "none", f",readonly={readonly}")) as proc:
        assert "ro" in mount_options(proc, share)


@pytest.mark.root
def test_user_without_subordinate_ids(shared_tmp: Path) -> None:
    """One id: passthrough holds the guest root's files, and the warning says what is missing."""
    share = shared_tmp / "share"
    launch = Launch("own", user="nobody")
    share.mkdir()
    launch.own(share)
    with running_guest(dropin_words(), tmp=shared_tmp, extra=fsdev("tag", share, "passthrough"), user="nobody") as guest:
        vm = SharedVm(launch, shared_tmp, guest)
        vm.mount("tag")
        answer = guest.check("cd /tag; echo data >made; chown 1000 made; chmod 4755 made; stat -c '%u %g %a' made")
        assert (guest.proc / "uid_map").read_text().split() == ["0", str(vm.uid(0)), "1"]
        result = guest.power_off()
    assert answer == "chown: made: Invalid argument\n0 0 4755\n"
    assert (share / "made").owner() == "nobody"
    assert result.stderr.startswith("qemu-userns: warning: nobody has no subordinate ids")
    assert result.stderr.count("\n") == 1
