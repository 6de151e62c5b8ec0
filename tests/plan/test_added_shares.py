"""The words of shares that the settings add."""

import pytest

from qemu_userns.plan.added_shares import BOTH, VIRTIOFS, AddedShare, build_words
from qemu_userns.plan.build import Settings
from qemu_userns.plan.facts import VirtiofsdFact
from qemu_userns.plan.grants import Bind, Refuse, Reserved, Virtiofsd
from qemu_userns.plan.identity import MapEntry
from qemu_userns.plan.idmaps import ShareMap
from qemu_userns.plan.plan import Plan
from qemu_userns.plan.shares import is_reached
from qemu_userns.plan.virtiofs import build_argv, build_view
from tests.plans import VIRTIOFSD, asked_for, plan_of, read

X86, S390X = "/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-s390x"


@pytest.mark.parametrize(
    ("words", "program", "bus"),
    [
        ((), X86, "pci"),
        (("-M", "q35"), X86, "pci"),
        (("-M", "microvm"), X86, "device"),
        (("-M", "microvm", "-machine", "acpi=off"), X86, "device"),
        (("-M", "microvm,pcie=on"), X86, "pci"),
        ((), f"{X86}-microvm", "device"),
        (("-machine", "type=q35"), f"{X86}-microvm", "pci"),
        ((), S390X, "ccw"),
        (("-M", "virt"), "/usr/bin/qemu-system-m68k", "device"),
        (("-M", "virt"), "/usr/bin/qemu-system-aarch64", "pci"),
    ],
)
def test_9p_is_on_the_machines_bus(words: tuple[str, ...], program: str, bus: str) -> None:
    assert list(build_words([AddedShare("t", "/a")], read(*words).objects, program)) == [
        *("-fsdev", "local,id=userns-share0,path=/a,security_model=passthrough"),
        *("-device", f"virtio-9p-{bus},id=userns-share0,fsdev=userns-share0,mount_tag=t"),
    ]


def test_what_the_settings_say_is_in_the_words() -> None:
    share = AddedShare("t,u", "/a,b", readonly=True, model="mapped-file")
    assert list(build_words([AddedShare("t", "/a"), share], (), X86))[4:] == [
        *("-fsdev", "local,id=userns-share1,path=/a,,b,security_model=mapped-file,readonly=on"),
        *("-device", "virtio-9p-pci,id=userns-share1,fsdev=userns-share1,mount_tag=t,,u"),
    ]


def test_a_machine_without_devices_has_none() -> None:
    assert not list(build_words([AddedShare("t", "/a")], read("-M", "none").objects, X86))


def test_the_plan_shows_them_as_added() -> None:
    added = tuple(build_words([AddedShare("t", "/x/dir")], (), X86))
    plan = plan_of("-nodefaults", *added, settings=Settings(sandbox="off", added=added))
    assert "rw /x/dir" in asked_for(plan)
    assert [rewrite.after for rewrite in plan.rewrites] == [" ".join(added[:2]), " ".join(added[2:])]
    assert plan.words[-4:] == added


# --- virtiofs --------------------------------------------------------------------------------------------------------

MEMORY = ("-object", "memory-backend-memfd,id=userns-memory,size=128M,share=on", "-machine", "memory-backend=userns-memory")
DEVICE = ("-device", "vhost-user-fs-pci,id=userns-share0-fs,chardev=userns-share0-fs,tag=t")


def plan_share(
    share: AddedShare,
    *words: str,
    root: bool = False,
    maps: tuple[ShareMap, ...] = (),
    virtiofsd: VirtiofsdFact | None = VIRTIOFSD,
) -> Plan:
    """Plan a command line with a share added to it."""
    added = tuple(build_words([share], read(*words).objects, X86))
    settings = Settings(sandbox="off", added=added, shares=(share,), share_maps=maps)
    return plan_of("-nodefaults", *words, *added, root=root, settings=settings, virtiofsd=virtiofsd)


def test_virtiofs_has_shared_memory_and_a_device() -> None:
    assert tuple(build_words([AddedShare("t", "/a", VIRTIOFS)], (), X86)) == (*MEMORY, *DEVICE)


def test_both_is_one_tag_over_the_two() -> None:
    words = list(build_words([AddedShare("t", "/a", BOTH)], (), X86))
    assert words[:4] == list(MEMORY)
    assert [word for word in words if "tag=t" in word] == [
        "virtio-9p-pci,id=userns-share0,fsdev=userns-share0,mount_tag=t",
        "vhost-user-fs-pci,id=userns-share0-fs,chardev=userns-share0-fs,tag=t",
    ]


@pytest.mark.parametrize(
    ("words", "size"),
    [(("-m", "512"), "512M"), (("-m", "2G"), "2G"), (("-m", "size=1G,slots=2,maxmem=4G"), "1G"), (("-m", "0"), "128M")],
)
def test_the_memory_is_as_large_as_the_command_line_says(words: tuple[str, ...], size: str) -> None:
    found = list(build_words([AddedShare("t", "/a", VIRTIOFS)], read(*words).objects, X86))
    assert found[1] == f"memory-backend-memfd,id=userns-memory,size={size},share=on"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("-object", "memory-backend-memfd,id=m,size=1G", "-machine", "memory-backend=m"), None),
        (("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm,share=on", "-numa", "node,memdev=m"), None),
        (("-object", "memory-backend-memfd,id=m,size=1G,share=off", "-machine", "memory-backend=m"), "add share=on to it"),
        (("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm", "-numa", "node,memdev=m"), "add share=on to it"),
        (("-object", "memory-backend-ram,id=m,size=1G,share=on", "-numa", "node,memdev=m"), "memory-backend-memfd,share=on"),
        (("-mem-path", "/dev/shm"), "memory-backend-file,id=ID"),
    ],
)
def test_memory_of_the_command_lines_own_has_to_be_shared(words: tuple[str, ...], error: str | None) -> None:
    plan = plan_share(AddedShare("t", "/x/dir", VIRTIOFS), *words)
    refused = [grant for grant in plan.grants if isinstance(grant, Refuse)]
    assert [error in (grant.hint or "") for grant in refused if error] == ([True] if error else [])
    assert bool(refused) == bool(error)
    assert words[0] == "-mem-path" or "userns-memory" not in " ".join(plan.words)


@pytest.mark.parametrize("root", [False, True])
def test_a_virtiofsd_is_planned(root: bool) -> None:
    plan = plan_share(AddedShare("t", "/x/dir", VIRTIOFS), root=root)
    assert asked_for(plan) == ["virtiofsd rw /x/dir"]
    (grant,) = [grant for grant in plan.grants if isinstance(grant, Virtiofsd)]
    assert ("-chardev", f"socket,id=userns-share0-fs,fd={grant.number}") in zip(plan.words, plan.words[1:], strict=False)
    assert any(isinstance(grant, Reserved) and grant.what == "supervisor" for grant in plan.grants)
    assert not any(isinstance(grant, Bind) and grant.path == "/x/dir" for grant in plan.grants)  # QEMU itself does not see it


def test_both_see_the_same_map() -> None:
    entries = (MapEntry(0, 65534, 1), MapEntry(1000, 1000, 1))
    plan = plan_share(AddedShare("t", "/x/dir", BOTH), root=True, maps=(ShareMap("t", entries, entries),))
    maps = [grant.idmap for grant in plan.grants if isinstance(grant, Bind | Virtiofsd) and grant.path == "/x/dir"]
    assert len(maps) == 2
    assert maps[0] == maps[1] is not None


def test_root_shows_what_qemu_may_not_read_as_its_own_only_read_only() -> None:
    assert asked_for(plan_share(AddedShare("t", "/x/dirroot", VIRTIOFS, readonly=True), root=True)) == ["virtiofsd ro /x/dirroot"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/x/file", "it is a file"),
        ("/x/new", "No such file or directory"),
        ("/", "the whole host"),
        ("/x/dir-deny", "Permission denied"),
    ],
)
def test_what_cannot_be_shared_by_virtiofs(path: str, error: str) -> None:
    (refusal,) = plan_share(AddedShare("t", path, VIRTIOFS)).find_refusals()
    assert error in refusal.reason


def test_without_a_virtiofsd_the_launch_stops() -> None:
    (refusal,) = plan_share(AddedShare("t", "/x/dir", BOTH), virtiofsd=None).find_refusals()
    assert (refusal.why, refusal.reason) == ("share t", "there is no virtiofsd")


def make_grant(modern: bool) -> Virtiofsd:
    return Virtiofsd("share t", "t", "/x,y -o source=/", (1, 2), True, None, "/usr/libexec/virtiofsd", modern, 301)


def test_no_word_of_the_callers_is_in_a_virtiofsds_command_line() -> None:
    """Arguments that are read as lists are where others were injected: Kata's GHSA-rr59-xxvx-96qr."""
    program = "/usr/libexec/virtiofsd"
    assert build_argv(make_grant(modern=True), 3) == (
        *(program, "--fd=3", "--rlimit-nofile=0", "--shared-dir=/share", "--sandbox=chroot", "--cache=auto", "--xattr"),
        "--log-level=warn",
    )
    old = build_argv(make_grant(modern=False), 3)
    assert old[:5] == (program, "--fd=3", "--rlimit-nofile=0", "-o", "source=/share")
    assert not any("x,y" in word for word in old)


def test_a_virtiofsd_sees_programs_and_its_share() -> None:
    grants = [
        Bind("programs and libraries", "/usr"),
        Bind("standard device", "/dev/null", True, True),
        Bind("standard device", "/dev/tty", True, True),
        Bind("-kernel", "/boot/vmlinuz"),
        Bind("processes", "/proc"),
    ]
    found = build_view(make_grant(modern=True), grants)
    assert [(placed.path, getattr(placed, "writable", False)) for placed in found] == [
        ("/dev/null", True),
        ("/proc", False),
        ("/share", True),
        ("/usr", False),
    ]


# --- set-uid files of the caller -------------------------------------------------------------------------------------

OPEN, SHUT, GROUP = (0o755, 0, 0), (0o700, 1000, 1000), (0o750, 1000, 1000)


@pytest.mark.parametrize(
    ("root", "above", "reached"),
    [
        (OPEN, (OPEN, OPEN), True),
        (OPEN, (SHUT, OPEN), False),
        (OPEN, (GROUP, OPEN), False),  # a group of the user's own
        (OPEN, ((0o750, 1000, 100), OPEN), True),  # others may be in it
        (SHUT, (OPEN,), True),  # the guest can open what is its own
        ((0o700, 0, 0), (OPEN,), False),
        ((0o700, 1001, 1001), (OPEN,), False),
        ((0o711, 1001, 1001), ((0o711, 0, 0),), True),
    ],
)
def test_who_can_walk_to_a_share(root: tuple[int, int, int], above: tuple[tuple[int, int, int], ...], reached: bool) -> None:
    assert is_reached(root, above, 1000) == reached


@pytest.mark.parametrize(
    ("share", "root", "warned"),
    [
        (AddedShare("t", "/x/dir"), False, True),
        (AddedShare("t", "/x/dir", model="none"), False, True),
        (AddedShare("t", "/x/dir", VIRTIOFS), False, True),
        (AddedShare("t", "/x/dir", BOTH), False, True),
        (AddedShare("t", "/x/dir", model="mapped-xattr"), False, False),
        (AddedShare("t", "/x/dir", readonly=True), False, False),
        (AddedShare("t", "/x/dir", VIRTIOFS, readonly=True), False, False),
        (AddedShare("t", "/x/dir"), True, False),  # leased ids
    ],
)
def test_an_added_share_that_others_reach_is_warned_of(share: AddedShare, root: bool, warned: bool) -> None:
    plan = plan_share(share, root=root)
    assert [warning for warning in plan.warnings if "set-uid" in warning] == []
    assert ["set-uid program of user" in warning for warning in plan.logged] == ([True] if warned else [])


@pytest.mark.parametrize(
    ("option", "value", "warned"),
    [
        ("-virtfs", "local,path=/x/dir,mount_tag=t,security_model=none", True),
        ("-virtfs", "local,path=/x/dir,mount_tag=t,security_model=passthrough", True),
        ("-fsdev", "local,id=t,path=/x/dir,security_model=passthrough", True),
        ("-fsdev", "local,id=t,path=/x/dir,security_model=passthrough,readonly=on", False),
        ("-fsdev", "local,id=t,path=/x/dir,security_model=mapped-file", False),
    ],
)
def test_a_share_of_the_command_lines_that_others_reach_is_warned_of(option: str, value: str, warned: bool) -> None:
    plan = plan_of("-nodefaults", option, value)
    assert ["set-uid program of user" in warning for warning in plan.logged] == ([True] if warned else [])
