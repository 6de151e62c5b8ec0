"""Plans of whole command lines on made-up hosts."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from qemu_userns.plan.build import Settings
from qemu_userns.plan.draft import LOWEST_OWN_FD
from qemu_userns.plan.facts import SOCKET, ImageFact, PathFact
from qemu_userns.plan.grants import Bind, Copy, Monitor, OpenFd, Private, Refuse, Reserved
from qemu_userns.plan.plan import READ_ONLY_HOST, WHOLE_HOST
from tests.plans import LEASED, asked_for, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKING = {"/x/file": (ImageFact("/x/file-base", "qcow2", "backing", "/x/file", True),)}
DATA = {"/x/file": (ImageFact("/x/file-data", "raw", "data-file", "/x/file", True),)}


def words(*argv: str, **options: object) -> list[str]:
    """Return the words for QEMU, without argv[0] and -sandbox."""
    plan = plan_of(*argv, **options)  # type: ignore[arg-type]
    assert plan.words[0] == "qemu"
    return [word for word in plan.words[1:] if word not in ("-sandbox", plan.confinement.sandbox)]


def reserved(*argv: str, **options: object) -> list[str]:
    return [grant.what for grant in plan_of(*argv, **options).grants if isinstance(grant, Reserved)]  # type: ignore[arg-type]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("-S", "-nodefaults"),
        ("/x/file", "-kernel", "/x/file", "-unknown", "-m", "1G"),
        ("-drive", "file=/x/file,,x,if=none,id=a", "-blockdev", '{"driver": "file", "node-name": "a", "filename":"/x/file"}'),
        ("-chardev", "file,id=a,path=/x/new", "-serial", "chardev:a", "-pidfile", "/x/new2", "-D", "/x/new3"),
    ],
)
def test_an_unprivileged_callers_words_stay(argv: tuple[str, ...]) -> None:
    assert words(*argv) == list(argv)
    assert all(rewrite.where == "added" for rewrite in plan_of(*argv).rewrites)


def test_unknown_options_are_named() -> None:
    assert plan_of("-unknown", "-S").unknown == ("-unknown",)


@pytest.mark.parametrize(
    ("argv", "left"),
    [
        (("-runas", "user", "-S"), ["-S"]),
        (("-run-with", "user=user"), []),
        (("-run-with", "user=user,async-teardown=on"), ["-run-with", "async-teardown=on"]),
        (("-run-with", "chroot=/x/dir,user=user"), ["-run-with", ""]),
        (("-chroot", "/x/dir"), []),
        (("-userns", "fs=view", "-S"), ["-S"]),
    ],
)
def test_what_this_program_does_is_taken_out(argv: tuple[str, ...], left: list[str]) -> None:
    assert words(*argv) == left


def test_a_readconfig_file_is_copied() -> None:
    text = '[chardev "c"]\n  backend = "socket"\n  path = "/x/new"\n  server = "on"\n'
    plan = plan_of("-readconfig", "/x/file", configs={1: text})
    (copy,) = [grant for grant in plan.grants if isinstance(grant, Copy)]
    assert copy.path == "/x/file"
    assert copy.content == f'[chardev "c"]\n  backend = "socket"\n#\n  server = "on"\n  fd = "{LOWEST_OWN_FD + 1}"\n'


def test_a_readconfig_file_on_an_fd_is_copied_to_the_fd() -> None:
    plan = plan_of("-readconfig", "/dev/fd/9", configs={1: '[name]\n  guest = "x"\n'}, fds=(9,))
    (copy,) = [grant for grant in plan.grants if isinstance(grant, Reserved) and grant.content is not None]
    assert (copy.number, copy.content) == (9, '[name]\n  guest = "x"\n')


# --- sockets ----------------------------------------------------------------------------------------------------------


def test_a_listening_socket_is_made_outside() -> None:
    number = LOWEST_OWN_FD + 1
    assert words("-chardev", "socket,id=c,path=/x/new,server=on,wait=off") == [
        "-chardev",
        f"socket,id=c,server=on,wait=off,fd={number}",
    ]
    assert "supervisor" in reserved("-chardev", "socket,id=c,path=/x/new,server=on")


@pytest.mark.parametrize(
    ("argv", "chardevs", "left"),
    [
        (("-serial", "unix:/x/new,server"), ["socket,id=serial0,fd=301,server=on"], ["-serial", "chardev:serial0"]),
        (
            ("-serial", "null", "-serial", "unix:/x/new,server"),
            ["socket,id=serial1,fd=301,server=on"],
            ["-serial", "null", "-serial", "chardev:serial1"],
        ),
        (
            ("-qmp", "unix:/x/new,server,nowait"),
            ["socket,id=compat_monitor0,fd=301,server=on,wait=off"],
            ["-qmp", "chardev:compat_monitor0"],
        ),
        (("-gdb", "unix:/x/new,server"), ["socket,id=gdb,fd=301,server=on"], ["-gdb", "chardev:gdb"]),
    ],
)
def test_the_old_spelling_becomes_a_chardev(argv: tuple[str, ...], chardevs: list[str], left: list[str]) -> None:
    assert words(*argv) == [*(word for chardev in chardevs for word in ("-chardev", chardev)), *left]


def test_a_vhost_user_server_makes_its_socket_itself() -> None:
    argv = ("-chardev", "socket,id=c,path=/x/new,server=on", "-netdev", "vhost-user,id=n,chardev=c")
    assert words(*argv) == list(argv)
    assert asked_for(plan_of(*argv)) == ["rw /x"]


def test_a_root_owned_socket_is_connected_outside() -> None:
    argv = ("-chardev", "socket,id=c,path=/x/sock-root")
    assert words(*argv) == list(argv)
    assert asked_for(plan_of(*argv, root=True)) == ["connect /x/sock-root"]
    assert words(*argv, root=True)[:2] == ["-chardev", "socket,id=c,fd=301"]


@pytest.mark.parametrize(("mode", "connected"), [(0o755, True), (0o777, False)])
def test_a_socket_by_an_fd_is_connected_to_with_the_callers_rights(mode: int, connected: bool) -> None:
    """LXD names virtiofsd's so, by an O_PATH fd: QEMU would need the right to write the socket."""
    fact = PathFact("/dev/fd/7", "/proc/self/fd/7", SOCKET, mode=stat.S_IFSOCK | mode, readable=True, writable=True, fd=7)
    argv = ("-chardev", "socket,id=c,path=/dev/fd/7")
    plan = plan_of(*argv, root=True, paths={"/dev/fd/7": fact}, fds=(7,))
    assert asked_for(plan) == (["connect /proc/self/fd/7"] if connected else ["fd 7 reopened"])
    assert f"socket,id=c,{'fd=301' if connected else 'path=/dev/fd/7'}" in plan.words


# --- images -----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_chain_are_shown() -> None:
    assert asked_for(plan_of("-drive", "file=/x/file", images=BACKING)) == ["rw /x/file", "rw /x/file-base"]
    assert asked_for(plan_of("-drive", "file=/x/file,readonly=on", images=BACKING)) == ["ro /x/file", "ro /x/file-base"]
    assert asked_for(plan_of("-drive", "file=/x/file", "-snapshot", images=DATA)) == [
        "ro /x/file",
        "ro /x/file-data",
        "createdir /var/tmp",
    ]


@pytest.mark.parametrize("images", [BACKING, DATA])
def test_root_never_opens_what_only_a_header_names(images: dict[str, tuple[ImageFact, ...]]) -> None:
    (image,) = images["/x/file"]
    hostile = {"/x/file": (image.replace(path="/etc/file-root-deny", readable=False),)}
    plan = plan_of("-drive", "file=/x/file,readonly=on", root=True, images=hostile)
    assert not [brief for brief in asked_for(plan) if "deny" in brief]
    assert any("/etc/file-root-deny" in warning for warning in (*plan.warnings, *plan.notes))


def test_a_root_owned_disk_comes_in_an_fdset() -> None:
    plan = plan_of("-drive", "file=/x/file-root,if=none,id=a", root=True)
    assert asked_for(plan) == ["open /x/file-root r", "open /x/file-root rw"]
    added = words("-drive", "file=/x/file-root,if=none,id=a", root=True)
    assert added[-2:] == ["-drive", "file=/dev/fdset/2000000001,if=none,id=a"]
    assert [word.split(",")[1:] for word in added[1:4:2]] == [["set=2000000001", "opaque=/x/file-root"]] * 2


def test_a_root_owned_disk_that_is_only_read_is_shown() -> None:
    assert asked_for(plan_of("-drive", "file=/x/file-root,readonly=on", root=True)) == ["ro /x/file-root as owner"]


def test_an_image_that_is_not_there_is_qemus_to_complain_about() -> None:
    assert asked_for(plan_of("-drive", "file=/x/new")) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("-kernel", "/x/new"), "-kernel /x/new: No such file or directory"),
        (("-kernel", "/x/file-deny"), "-kernel /x/file-deny: Permission denied"),
        (("-drive", "file=/x/file-deny"), "-drive file /x/file-deny: Permission denied"),
        (
            ("-fsdev", "local,id=f,path=/x/file,security_model=none"),
            "-fsdev path /x/file: it is a file, and a share is a directory",
        ),
        (("-pidfile", "/x/dir"), "-pidfile /x/dir: Is a directory"),
        (("-D", "/x-root/new-root"), "-D /x-root/new-root: Permission denied"),
        (("-chardev", "socket,id=c,path=/x-root/new,server=on"), "-chardev path /x-root/new: Permission denied"),
        (("-readconfig", "/x/new"), "-readconfig /x/new: No such file or directory"),
    ],
)
def test_refusals_name_the_word_and_the_reason(argv: tuple[str, ...], why: str) -> None:
    found = [f"{grant.why}: {grant.reason}" for grant in plan_of(*argv).grants if isinstance(grant, Refuse)]
    assert found == [why]


# --- confinement ------------------------------------------------------------------------------------------------------


def test_passthrough_shares_keep_four_capabilities() -> None:
    share = "local,id=f,path=/x/dir,security_model={}"
    for model, kept in (("passthrough", {0, 1, 3, 4}), ("mapped", set()), ("mapped-file", set()), ("none", set())):
        assert plan_of("-fsdev", share.format(model)).confinement.capabilities == kept


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (("-nodefaults",), ("deny", "deny")),
        (("-nodefaults", "-daemonize"), ("allow", "allow")),
        (("-nodefaults", "-netdev", "tap,id=n"), ("deny", "deny")),
        (("-nodefaults", "-netdev", "bridge,id=n"), ("deny", "deny")),
        (("-nodefaults", "-netdev", "user,id=n,smb=/x/dir"), ("allow", "allow")),
        (("-nodefaults", "-incoming", "exec:cat"), ("allow", "allow")),
        (("-nodefaults", "-monitor", "stdio"), ("deny", "allow")),
    ],
)
def test_seccomp_is_added(argv: tuple[str, ...], setting: tuple[str, str]) -> None:
    privileges, spawn = setting
    expected = f"on,obsolete=deny,elevateprivileges={privileges},spawn={spawn},resourcecontrol=deny"
    plan = plan_of(*argv)
    assert plan.confinement.sandbox == expected
    assert plan.words[1:3] == ("-sandbox", expected)


def test_seccomp_is_left_to_who_says_so_or_has_none() -> None:
    assert plan_of("-sandbox", "on").confinement.sandbox is None
    assert plan_of("-sandbox", "off").words[1:] == ("-sandbox", "off")
    assert plan_of(seccomp=False).confinement.sandbox is None
    assert plan_of(settings=Settings(sandbox="off")).confinement.sandbox is None
    assert plan_of(settings=Settings(sandbox="on,spawn=deny")).words[1:3] == ("-sandbox", "on,spawn=deny")


def test_abstract_sockets_are_scoped_unless_one_is_named() -> None:
    assert plan_of().confinement.scoped == 3
    assert plan_of("-chardev", "socket,id=c,path=x,abstract=on").confinement.scoped == 2
    assert plan_of("-display", "gtk").confinement.scoped == 2


# --- fds --------------------------------------------------------------------------------------------------------------


def test_numbers_of_our_own_avoid_the_callers_and_those_that_are_named() -> None:
    taken = (LOWEST_OWN_FD, LOWEST_OWN_FD + 1)
    plan = plan_of("-chardev", f"socket,id=c,fd={LOWEST_OWN_FD + 2}", "-pidfile", "/x/new", fds=taken)
    numbers = [grant.number for grant in plan.grants if isinstance(grant, Reserved)]
    assert numbers
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & {*taken, LOWEST_OWN_FD + 2}


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("fds", [(), range(3, 40), range(3, 500)])
def test_where_few_files_may_be_open_the_numbers_are_low_or_the_limit_is_named(root: bool, fds: Sequence[int]) -> None:
    words = ("-pidfile", "/x/new", "-qmp", "unix:/x/newer,server=on", "-drive", "file=/x/block")
    refused = 0
    for limit in (*range(3, 100), 256, 363, 364, 365, 400, 1024):
        plan = plan_of(*words, root=root, fds=fds, fd_limit=limit)
        if refusals := plan.find_refusals():
            refused += 1
            assert [(found.why, found.reason) for found in refusals] == [("open files", f"ulimit -n is {limit}")]
            enough = int((refusals[0].hint or "").removeprefix("raise it to at least "))
            assert enough > limit
            assert not plan_of(*words, root=root, fds=fds, fd_limit=enough).find_refusals()
        else:
            numbers = [grant.number for grant in plan.grants if isinstance(grant, Reserved | OpenFd | Monitor)]
            assert len(set(numbers)) == len(numbers) >= 3
            assert all(len(fds) + 20 < number < limit for number in numbers)
    assert refused


def test_standard_fds_are_not_ours_to_keep() -> None:
    assert asked_for(plan_of("-chardev", "socket,id=c,fd=0", fds=(0,))) == []
    assert asked_for(plan_of("-chardev", "socket,id=c,fd=x")) == []


def test_a_pidfile_keeps_the_supervisor_and_a_lease_does_not() -> None:
    assert reserved() == ["ptmx"]
    assert reserved("-pidfile", "/x/new") == ["ptmx", "supervisor"]
    assert reserved(root=True) == ["ptmx", "lease"]
    assert reserved("-pidfile", "/x/new", root=True) == ["ptmx", "lease", "supervisor"]
    assert plan_of(root=True).identity is LEASED


# --- the view ---------------------------------------------------------------------------------------------------------


def test_every_view_has_its_private_directories() -> None:
    found = {grant.path: grant.mode for grant in plan_of().grants if isinstance(grant, Private) and grant.tmpfs}
    assert found["/tmp"] == found["/var/tmp"] == found["/dev/shm"] == 0o1777
    assert found["/run"] == 0o755


def test_tmpdir_is_there() -> None:
    assert any(
        isinstance(grant, Private) and grant.path == "/x/dir-tmp" for grant in plan_of(environ={"TMPDIR": "/x/dir-tmp"}).grants
    )


@pytest.mark.parametrize(("readonly", "tree"), [("on", READ_ONLY_HOST), ("yes", READ_ONLY_HOST), ("off", WHOLE_HOST)])
def test_a_share_of_the_root_shows_the_whole_host_and_says_so(readonly: str, tree: str) -> None:
    plan = plan_of("-fsdev", f"local,id=f,path=/,security_model=none,readonly={readonly}")
    assert plan.host_tree == tree
    assert bool(plan.warnings) == (tree == WHOLE_HOST)


def test_every_grant_describes_itself() -> None:
    plan = plan_of(
        *("-drive", "file=/x/file-root", "-chardev", "socket,id=c,path=/x/new,server=on", "-pidfile", "/x/new2", "-snapshot"),
        *("-chardev", "socket,id=d,path=/x/sock-root", "-serial", "/dev/char-root", "-runas", "user", "-kernel", "/x/new"),
        *("-netdev", "tap,id=n,fd=9", "-readconfig", "/x/file2"),
        root=True,
        fds=(9,),
        configs={19: "# nothing\n"},
    )
    for grant in plan.grants:
        assert grant.describe().strip()
        assert "\n" not in grant.describe()
        assert grant.why
    for bind in plan.grants:
        if isinstance(bind, Bind):
            assert bind.path in bind.describe()
