"""Who QEMU is: its ids outside, its id maps, its groups, and the leases that root's VMs hold."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.leftovers import is_held, processes
from integration.talk import (
    DEADLINE_S,
    IDLE,
    UUID,
    Running,
    as_user,
    home_of,
    map_of,
    outcome,
    running,
    started,
    wait_until,
    words_of,
)
from tests.conftest import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

LEASES = Path("/run/qemu-userns/leases")
COUNT = 65536
POOL = (524288, 1879048191)
STRANGER = 54321  # a uid without a name and without subordinate ids


def ids(qemu: Running, kind: str) -> set[int]:
    """Return the real, effective, saved and file system id of every thread."""
    found = set()
    for task in (qemu.proc / "task").iterdir():
        line = next(line for line in (task / "status").read_text().splitlines() if line.startswith(f"{kind}:"))
        found |= {int(word) for word in line.split()[1:]}
    return found


def subordinate(kind: str, user: pwd.struct_passwd) -> list[tuple[int, int]]:
    """Return the ranges of a user in /etc/subuid or /etc/subgid."""
    entries = [line.split(":") for line in Path(f"/etc/sub{kind}").read_text().splitlines() if line]
    return [(int(start), int(count)) for owner, start, count in entries if owner in (user.pw_name, str(user.pw_uid))]


def wanted_map(own: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return the map with 0 as the own id, and the ranges from 1 on."""
    entries, inside = [(0, own, 1)], 1
    for first, count in ranges:
        entries.append((inside, first, count))
        inside += count
    return entries


def test_an_unprivileged_caller_is_root_inside_and_its_subordinate_ids_follow(dropin: list[str], unprivileged_user: str) -> None:
    user = pwd.getpwnam(unprivileged_user)
    with running(as_user(unprivileged_user, *dropin), env=home_of(unprivileged_user)) as qemu:
        assert map_of(qemu.pid, "uid") == wanted_map(user.pw_uid, subordinate("uid", user))
        assert map_of(qemu.pid, "gid") == wanted_map(user.pw_gid, subordinate("gid", user))
        assert (qemu.proc / "setgroups").read_text() == "deny\n"
        assert (ids(qemu, "Uid"), ids(qemu, "Gid")) == ({user.pw_uid}, {user.pw_gid})
        assert {int(word) for word in qemu.status["Groups"].split()} == set(os.getgrouplist(user.pw_name, user.pw_gid))


def test_only_root_may_name_another_user(dropin: list[str], unprivileged_user: str) -> None:
    words = [*as_user(unprivileged_user, *dropin), *IDLE, "-runas", "daemon"]
    status, stdout, stderr = outcome(words, env=home_of(unprivileged_user))
    assert (status, stdout) == (1, "")
    assert stderr.startswith("qemu-userns: user daemon: ")


def test_an_id_that_is_not_the_callers_is_refused_by_newuidmap(dropin: list[str], unprivileged_user: str) -> None:
    options = [*IDLE, "-userns", "idmap=both 1 1"]
    status, stdout, stderr = outcome(as_user(unprivileged_user, *dropin), *options, env=home_of(unprivileged_user))
    assert (status, stdout) == (1, "")
    lines = stderr.splitlines()
    assert lines[0].startswith("qemu-userns: cannot write the id maps: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2


def test_without_newuidmap_in_the_path_the_launch_stops_with_the_packages_name(
    dropin: list[str], unprivileged_user: str, shared_tmp: Path
) -> None:
    (shared_tmp / "qemu-system-x86_64").symlink_to("/usr/bin/qemu-system-x86_64")
    environ = {**home_of(unprivileged_user), "PATH": str(shared_tmp)}
    prefix = ["/usr/bin/" + word if word == "setpriv" else word for word in as_user(unprivileged_user, *dropin)]
    status, stdout, stderr = outcome(prefix, *IDLE, env=environ)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("qemu-userns: newuidmap: not found")
    assert "\nhint: install the package uidmap" in stderr


def test_a_caller_with_no_new_privs_gets_a_hint(dropin: list[str], unprivileged_user: str) -> None:
    words = as_user(unprivileged_user, "setpriv", "--no-new-privs", *dropin)
    status, stdout, stderr = outcome(words, *IDLE, env=home_of(unprivileged_user))
    assert (status, stdout) == (1, "")
    assert stderr.startswith("qemu-userns: cannot write the id maps: ")
    assert "no_new_privs" in stderr.splitlines()[1]


# --- root -------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("option", ["-runas name", "-runas UID:GID", "-run-with"])
def test_roots_runas_is_consumed_and_nothing_of_root_is_left(
    dropin: list[str], unprivileged_user: str, option: str, shared_tmp: Path
) -> None:
    user = pwd.getpwnam(unprivileged_user)
    groups = set(os.getgrouplist(user.pw_name, user.pw_gid))
    words = ["-runas", user.pw_name]
    if option == "-runas UID:GID":
        words, groups = ["-runas", f"{user.pw_uid}:{user.pw_gid}"], {user.pw_gid}
    elif option == "-run-with":
        words = ["-run-with", f"user={user.pw_name}"]
    pidfile = shared_tmp / "pid"
    with running(dropin, *words, "-pidfile", str(pidfile)) as qemu:
        assert not {"-runas", "-run-with"} & set(words_of(qemu.pid))
        assert (ids(qemu, "Uid"), ids(qemu, "Gid")) == ({user.pw_uid}, {user.pw_gid})
        assert {int(word) for word in qemu.status["Groups"].split()} == groups
        assert map_of(qemu.pid, "uid") == wanted_map(user.pw_uid, subordinate("uid", user))
        assert map_of(qemu.pid, "gid") == wanted_map(user.pw_gid, subordinate("gid", user))
        assert (qemu.proc / "setgroups").read_text() == "deny\n"
        assert qemu.proc.owner() == user.pw_name
        assert pidfile.owner() == user.pw_name
        assert not [path for path in LEASES.glob("*") if path.name == str(user.pw_uid)]
        assert qemu.quit() == 0


@pytest.mark.root
@pytest.mark.parametrize("option", ["-runas nosuch-user", "-run-with user=nosuch-user", "-runas root", "-runas 0:0"])
def test_a_runas_user_that_does_not_exist_or_is_root_is_refused(dropin: list[str], option: str) -> None:
    status, stdout, stderr = outcome(dropin, *IDLE, *option.split())
    assert (status, stdout) == (1, "")
    assert stderr.startswith("qemu-userns: user ")
    assert stderr.splitlines()[1].startswith("hint: ")


@pytest.mark.root
def test_chroot_is_consumed(dropin: list[str]) -> None:
    with running(dropin, "-chroot", "/var/empty", "-run-with", "chroot=/var/empty") as qemu:
        assert not {"-chroot", "-run-with"} & set(words_of(qemu.pid))
        assert qemu.quit() == 0


def leased(qemu: Running) -> int:
    """Return the first id of a VM's leased range, having checked the range."""
    first = map_of(qemu.pid, "uid")[0][1]
    assert map_of(qemu.pid, "uid") == map_of(qemu.pid, "gid") == [(0, first, 1), (1, first + 1, COUNT - 1)]
    return first


@pytest.mark.root
def test_roots_vm_gets_a_leased_range_that_nobody_else_has(dropin: list[str]) -> None:
    with running(dropin) as qemu:
        first = leased(qemu)
        assert POOL[0] <= first <= POOL[1] - COUNT + 1
        for kind in ("uid", "gid"):
            for line in Path(f"/etc/sub{kind}").read_text().splitlines():
                _, start, count = line.split(":")
                assert first + COUNT <= int(start) or int(start) + int(count) <= first
        assert (ids(qemu, "Uid"), ids(qemu, "Gid")) == ({first}, {first})
        assert qemu.status["Groups"] == ""
        assert (LEASES / str(first)).exists()
        assert qemu.quit() == 0
    wait_until(lambda: not (LEASES / str(first)).exists(), "the lease given back")


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_lease_is_given_back_however_qemu_ends(dropin: list[str], number: signal.Signals) -> None:
    with running(dropin) as qemu:
        first = leased(qemu)
        os.kill(qemu.pid, number)
        qemu.process.wait(DEADLINE_S)
        wait_until(lambda: not (LEASES / str(first)).exists(), "the lease given back")


@pytest.mark.root
def test_a_lease_is_given_back_when_qemu_does_not_start(dropin: list[str]) -> None:
    pool = ("-userns", "pool=1000000000-1000065535")
    for _ in range(2):
        status, _, stderr = outcome(dropin, *IDLE, *pool, "-device", "nosuch")
        assert (status, stderr.startswith("qemu-userns")) == (1, False)


@pytest.mark.root
def test_without_a_monitor_qemu_alone_holds_the_lease(dropin: list[str]) -> None:
    before = processes()
    with started([*dropin, *IDLE, "-userns", "pool=1000000000-1000065535"]) as process:
        path = LEASES / "1000000000"
        wait_until(lambda: "qemu-system" in os.readlink(f"/proc/{process.pid}/exe"), "QEMU runs")
        wait_until(lambda: {pid for pid, _ in processes() - before} == {process.pid}, "no supervisor")
        assert is_held(path)
        process.kill()
        process.wait()
        assert not is_held(path)
    assert outcome(dropin, *IDLE, "-device", "nosuch")[0] == 1
    assert not path.exists()  # the next launch has swept it


@pytest.mark.root
def test_a_qemu_that_gives_up_its_lock_shares_its_ids_with_nobody(dropin: list[str]) -> None:
    pool = ("-userns", "pool=1000000000-1000065535")
    with running(dropin, *pool) as qemu:
        assert leased(qemu) == 1000000000
        (LEASES / "1000000000").unlink()  # for the next launch it is as if it had closed the fd, and the file had been swept
        status, _, stderr = outcome(dropin, *IDLE, *pool)
        assert (status, stderr.partition("\n")[0]) == (1, "qemu-userns: ids: no free range of 65536")


@pytest.mark.root
def test_vms_at_the_same_time_never_share_ids(dropin: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        firsts = [leased(stack.enter_context(running(dropin, "-name", "the same name"))) for _ in range(4)]
    assert len(set(firsts)) == 4
    assert all(abs(a - b) >= COUNT for a in firsts for b in firsts if a != b)


@pytest.mark.root
@pytest.mark.parametrize("name", [["-name", "a vm"], ["-uuid", UUID], ["-name", "guest=other,debug-threads=on"]])
def test_a_named_vm_gets_the_same_ids_again(dropin: list[str], name: list[str]) -> None:
    firsts = []
    for _ in range(3):
        with running(dropin, *name) as qemu:
            firsts.append(leased(qemu))
            assert qemu.quit() == 0
        wait_until(lambda: not (LEASES / str(firsts[-1])).exists(), "the lease given back")
    with running(dropin, "-name", "yet another") as qemu:
        assert leased(qemu) not in firsts
    assert len(set(firsts)) == 1


@pytest.mark.root
def test_a_pool_of_one_range_serves_one_vm(dropin: list[str]) -> None:
    pool = ("-userns", "pool=1000000000-1000065535")
    with running(dropin, *pool) as qemu:
        assert leased(qemu) == 1000000000
        status, stdout, stderr = outcome(dropin, *IDLE, *pool)
        assert (status, stdout) == (1, "")
        assert stderr.startswith("qemu-userns: ids: no free range of 65536\nhint: ")
        assert qemu.quit() == 0
    wait_until(lambda: not (LEASES / "1000000000").exists(), "the lease given back")
    with running(dropin, *pool) as qemu:
        assert leased(qemu) == 1000000000


@pytest.mark.root
def test_an_extra_idmap_entry_maps_the_callers_ids(dropin: list[str]) -> None:
    with running(dropin, "-userns", "idmap=both 1234 1234") as qemu:
        for kind in ("uid", "gid"):
            assert (1234, 1234, 1) in map_of(qemu.pid, kind)
            assert sum(count for _, _, count in map_of(qemu.pid, kind)) == COUNT
        assert "-userns" not in words_of(qemu.pid)


@pytest.mark.root
def test_host_root_is_never_mapped(dropin: list[str]) -> None:
    status, stdout, stderr = outcome(dropin, *IDLE, "-userns", "idmap=both 0 5")
    assert (status, stdout) == (1, "")
    assert "maps host root" in stderr


@pytest.mark.root
def test_a_caller_without_subordinate_ids_is_warned_and_has_one_id(dropin: list[str], shared_tmp: Path) -> None:
    shared_tmp.chmod(0o777)
    words = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *dropin]
    log = shared_tmp / "stderr"
    with log.open("wb") as file, running(words, env={**os.environ, "HOME": "/nonexistent"}, stderr=file) as qemu:
        assert map_of(qemu.pid, "uid") == map_of(qemu.pid, "gid") == [(0, STRANGER, 1)]
        assert (qemu.proc / "setgroups").read_text() == "deny\n"
        assert qemu.quit() == 0
    text = log.read_text()
    assert text.startswith(f"qemu-userns: warning: {STRANGER} has no subordinate ids in /etc/subuid")
    assert text.count("\n") == 1


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{user}:165536:65536\nother:200000:65536\n", "/etc/subuid:1: the range of {user} overlaps that of other in line 2"),
        ("{user}:165536:0\n", "/etc/subuid:1: the range is empty"),
        ("{user}:0:65536\n", "/etc/subuid:1: the range contains id 0"),
        ("{user}:4294960000:65536\n", "/etc/subuid:1: the range ends at"),
        ("# comment\nnonsense\n", "/etc/subuid:2: not `owner:start:count`"),
    ],
)
def test_a_broken_subuid_file_is_named_by_line(
    dropin: list[str], unprivileged_user: str, shared_tmp: Path, text: str, problem: str
) -> None:
    file = shared_tmp / "subuid"
    file.write_text(text.format(user=unprivileged_user))
    covered = ["unshare", "-m", "sh", "-c", f'mount --bind {file} /etc/subuid && exec "$@"', "sh"]
    words = [*covered, *as_user(unprivileged_user, *dropin)]
    status, stdout, stderr = outcome(words, *IDLE, env=home_of(unprivileged_user))
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"qemu-userns: {problem.format(user=unprivileged_user)}")
    assert stderr.splitlines()[1].startswith("hint: ")


@pytest.mark.root
def test_several_ranges_and_entries_by_number_follow_each_other(
    dropin: list[str], unprivileged_user: str, shared_tmp: Path
) -> None:
    user = pwd.getpwnam(unprivileged_user)
    file = shared_tmp / "subuid"
    file.write_text(f"{user.pw_name}:700000:1000\nother:800000:1000\n{user.pw_uid}:900000:10\n")
    covered = ["unshare", "-m", "sh", "-c", f'mount --bind {file} /etc/subuid && exec "$@"', "sh"]
    with running([*covered, *as_user(unprivileged_user, *dropin)], env=home_of(unprivileged_user)) as qemu:
        assert map_of(qemu.pid, "uid") == wanted_map(user.pw_uid, [(700000, 1000), (900000, 10)])


# --- root of a container ----------------------------------------------------------------------------------------------

START = """set -e
"$0" -nodefaults -display none -M none -S -daemonize -pidfile /tmp/pid "$@"
awk '/^Uid:/ { print $2, $3, $4, $5 }' "/proc/$(cat /tmp/pid)/status"
kill "$(cat /tmp/pid)"
"""


def in_container(dropin: list[str], count: int, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start QEMU as root of a container with so many ids; what it prints is the ids of QEMU there."""
    command = [sys.executable, "-m", "integration.container", str(count), "sh", "-c", START, *dropin, *options]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.mark.root
def test_in_a_container_root_leases_of_the_ids_that_it_has(dropin: list[str]) -> None:
    done = in_container(dropin, 1_000_000)
    assert (done.returncode, done.stderr) == (0, "")
    (uid,) = set(done.stdout.split())
    assert POOL[0] <= int(uid) < 1_000_000


@pytest.mark.root
def test_a_container_with_few_ids_has_none_to_lease(dropin: list[str]) -> None:
    done = in_container(dropin, COUNT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-userns: ids: the pool has no 65536 that this user namespace has as well\nhint: ")


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ((), {"QEMU_USERNS": "user=nobody"}),
        (("-userns", "user=nobody"), {"QEMU_USERNS": "user=daemon"}),
        (("-runas", "nobody"), {}),
    ],
    ids=["environment", "option", "runas"],
)
def test_a_container_with_few_ids_can_have_a_user_for_qemu(
    dropin: list[str], options: tuple[str, ...], environment: dict[str, str]
) -> None:
    done = in_container(dropin, COUNT, *options, **environment)
    assert (done.returncode, set(done.stdout.split())) == (0, {"65534"}), done.stderr


# --- the setting `user` -----------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("options", [[], ["-runas", "nobody"]])
def test_the_setting_names_the_user_of_roots_qemu_unless_the_command_line_does(dropin: list[str], options: list[str]) -> None:
    with running([*dropin, "-userns", "user=daemon"], *options) as qemu:
        assert ids(qemu, "Uid") == {pwd.getpwnam("nobody" if options else "daemon").pw_uid}


def test_the_setting_is_nothing_to_an_ordinary_caller(dropin: list[str], unprivileged_user: str) -> None:
    status, _, stderr = outcome(as_user(unprivileged_user, *dropin, "-userns", "user=daemon"), "-version")
    assert (status, stderr) == (0, "")


def test_the_environment_is_checked_as_other_settings_are(dropin: list[str]) -> None:
    environment = {**os.environ, "QEMU_USERNS": "usr=daemon"}
    done = subprocess.run([*dropin, "-version"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-userns: QEMU_USERNS: usr: there is no such setting\nhint: ")
