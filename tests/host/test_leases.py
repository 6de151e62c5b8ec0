"""Leases of id ranges."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_userns.errors import HostError
from qemu_userns.host import leases
from qemu_userns.host.leases import LEASE_COUNT, Lease, find_pools, lease_range, preview_range, release, sweep_leases
from qemu_userns.host.subids import IdRange
from tests.forked import first_thread_ended

UID = os.geteuid()
POOL = (IdRange(1_000_000_000, 4 * LEASE_COUNT),)


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def lease(run_dir: str, preferred: str = "", pools: "tuple[IdRange, ...]" = POOL, taken: "tuple[IdRange, ...]" = ()) -> Lease:
    return lease_range(run_dir, pools, taken, preferred, owner_uid=UID)


def test_a_lease_is_a_locked_file(run_dir: str) -> None:
    held = lease(run_dir)
    try:
        assert held.count == LEASE_COUNT
        assert (held.first_id - POOL[0].start) % LEASE_COUNT == 0
        assert held.path == f"{run_dir}/leases/{held.first_id}"
        assert os.path.samestat(os.stat(held.path), os.fstat(held.fd))
        assert os.stat(held.path).st_mode & 0o777 == 0o600
        assert os.stat(run_dir).st_mode & 0o777 == 0o755
        assert os.stat(f"{run_dir}/leases").st_mode & 0o777 == 0o700
        assert fcntl.fcntl(held.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with open(held.path) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        release(held)
    assert os.listdir(f"{run_dir}/leases") == []


def test_modes_do_not_depend_on_the_umask(run_dir: str) -> None:
    before = os.umask(0o077)
    try:
        release(lease(run_dir))
    finally:
        os.umask(before)
    assert os.stat(run_dir).st_mode & 0o777 == 0o755


def test_each_vm_has_its_own_until_none_is_left(run_dir: str) -> None:
    held = [lease(run_dir, "same name") for _ in range(4)]
    try:
        assert len({one.first_id for one in held}) == 4
        with pytest.raises(HostError, match="no free range") as caught:
            lease(run_dir)
        assert caught.value.hint
    finally:
        for one in held:
            release(one)


def test_the_same_vm_gets_the_same_range_again(run_dir: str) -> None:
    pool = (IdRange(1_000_000_000, 10_000 * LEASE_COUNT),)
    firsts = []
    for name in ("a", "b", "a", "b"):
        held = lease(run_dir, name, pool)
        firsts.append(held.first_id)
        release(held)
    assert firsts[:2] == firsts[2:]
    assert firsts[0] != firsts[1]


def test_several_pools_and_what_is_taken(run_dir: str) -> None:
    pools = (IdRange(1_000_000_000, LEASE_COUNT), IdRange(1_100_000_000, 65535), IdRange(1_200_000_000, 2 * LEASE_COUNT))
    taken = (IdRange(1_000_065_535, 1), IdRange(1_199_999_999, 2))
    held = lease(run_dir, "x", pools, taken)
    try:
        assert held.first_id == 1_200_065_536
        with pytest.raises(HostError, match="no free range"):
            lease(run_dir, "x", pools, taken)
    finally:
        release(held)


def test_no_pool_is_large_enough(run_dir: str) -> None:
    with pytest.raises(HostError, match="no free range"):
        lease(run_dir, "x", (IdRange(100000, 65535),))


def test_leases_of_a_pool_with_other_bounds_do_not_overlap(run_dir: str) -> None:
    held = lease(run_dir, "x", (IdRange(1_000_000_000, LEASE_COUNT),))
    try:
        with pytest.raises(HostError, match="no free range"):
            lease(run_dir, "x", (IdRange(1_000_000_001, LEASE_COUNT),))
    finally:
        release(held)


HOLDER = """
import os, sys
from qemu_userns.host.leases import lease_range
from qemu_userns.host.subids import IdRange
lease = lease_range(sys.argv[1], (IdRange(1_000_000_000, int(sys.argv[2]) * 65536),), (), "", owner_uid=os.geteuid())
print(lease.first_id, flush=True)
sys.stdin.read()
"""


def start_holder(run_dir: str, slots: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, run_dir, str(slots)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(holder: "subprocess.Popen[str]") -> str:
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


def test_a_killed_holder_frees_its_lease(run_dir: str) -> None:
    pool = (IdRange(1_000_000_000, LEASE_COUNT),)
    with start_holder(run_dir, 1) as holder:
        assert first_line(holder) == "1000000000"
        with pytest.raises(HostError, match="no free range"):
            lease(run_dir, "", pool)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    held = lease(run_dir, "", pool)
    assert held.first_id == 1_000_000_000
    release(held)


def test_processes_that_contend_get_different_ranges(run_dir: str) -> None:
    holders = [start_holder(run_dir, 4) for _ in range(4)]
    assert len({first_line(holder) for holder in holders}) == 4
    for holder in holders:
        holder.communicate()


def test_the_lock_outlives_its_maker_in_who_inherits_it(run_dir: str) -> None:
    pool = (IdRange(1_000_000_000, LEASE_COUNT),)
    held = lease(run_dir, "", pool)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[held.fd]) as heir:
        os.close(held.fd)
        with pytest.raises(HostError, match="no free range"):
            lease(run_dir, "", pool)
        heir.communicate()
    release(lease(run_dir, "", pool))


def test_an_unlocked_range_with_a_process_in_it_is_not_free(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_uids_in_use", lambda: frozenset({0, 1_000_000_000 + 65535}))
    pool = (IdRange(1_000_000_000, 2 * LEASE_COUNT),)
    held = lease(run_dir, "", pool)
    try:
        assert held.first_id == 1_000_065_536
        with pytest.raises(HostError, match="no free range"):
            lease(run_dir, "", pool)
        assert os.listdir(f"{run_dir}/leases") == ["1000065536"]
    finally:
        release(held)


@pytest.mark.root
@pytest.mark.parametrize("uids", [(5, 0, 0), (0, 5, 0), (0, 0, 5)])
def test_all_three_uids_of_a_process_are_seen(uids: "tuple[int, int, int]") -> None:
    first = 1_900_000_000
    real, effective, saved = (first + uid if uid else 1_800_000_000 for uid in uids)
    code = f"import os, sys; os.setresuid({real}, {effective}, {saved}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        first_line(process)
        assert first + 5 in leases._uids_in_use()
        process.communicate()


@pytest.mark.root
def test_a_process_whose_first_thread_has_ended_is_seen() -> None:
    """A QEMU that a guest has taken over could hide so, and share its ids with the next VM; what has ended is not seen."""
    uid = 1_900_000_007
    with first_thread_ended(f"os.setresuid({uid}, {uid}, {uid})") as process:
        assert uid in leases._uids_in_use()
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert "State:\tZ" in Path(f"/proc/{process.pid}/status").read_text()
        assert uid not in leases._uids_in_use()


def test_own_uid_is_in_use() -> None:
    assert UID == 0 or UID in leases._uids_in_use()  # root is in no map


def test_no_fd_is_left_without_proc(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc() -> "frozenset[int]":
        raise FileNotFoundError(2, "No such file or directory", "/proc")

    monkeypatch.setattr(leases, "_uids_in_use", no_proc)
    with pytest.raises(HostError, match="no ids can be leased"):
        lease(run_dir)
    assert os.listdir(f"{run_dir}/leases") == []


def test_a_file_removed_between_open_and_lock_is_opened_anew(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def remove_then_lock(fd: int, operation: int, flock: object = fcntl.flock) -> None:
        if not removed and stat.S_ISREG(os.fstat(fd).st_mode):
            removed.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(removed[0])
        assert callable(flock)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    held = lease(run_dir)
    assert removed == [held.path]
    assert os.path.samestat(os.stat(held.path), os.fstat(held.fd))
    release(held)


def test_release_leaves_what_became_anothers(run_dir: str) -> None:
    pool = (IdRange(1_000_000_000, LEASE_COUNT),)
    held = lease(run_dir, "", pool)
    fcntl.flock(held.fd, fcntl.LOCK_UN)  # as a QEMU that a guest has taken over could
    other = lease(run_dir, "", pool)
    release(held)
    assert os.path.exists(other.path)
    release(other)
    assert not os.path.exists(other.path)


def test_sweep_removes_only_what_is_free(run_dir: str) -> None:
    held = lease(run_dir, "", POOL)
    stale = Path(run_dir, "leases", "1000000001")
    stale.touch()
    sweep_leases(run_dir, owner_uid=UID)
    assert os.listdir(f"{run_dir}/leases") == [str(held.first_id)]
    release(held)


def test_the_next_lease_sweeps_what_nobody_holds(run_dir: str) -> None:
    held = lease(run_dir, "a")
    for name in ("1000000001", "1000000002"):
        Path(run_dir, "leases", name).touch()
    other = lease(run_dir, "b")
    assert sorted(os.listdir(f"{run_dir}/leases")) == sorted([str(held.first_id), str(other.first_id)])
    release(held)
    release(other)


def test_a_vm_gets_its_range_again_while_others_sweep(run_dir: str) -> None:
    """Sixteen VMs that have ended are started again at once; each start sweeps the files of all."""
    release(lease(run_dir))
    pool = (IdRange(1_000_000_000, 256 * LEASE_COUNT),)
    wanted = {preview_range(pool, (), name): name for name in "abcdefghijklmnop"}
    assert len(wanted) == 16
    moved = 0
    for _ in range(25):
        for first in wanted:
            Path(run_dir, "leases", str(first)).touch()
        go_read, go_write = os.pipe()
        children = [fork_leasing(run_dir, pool, first, name, (go_read, go_write)) for first, name in wanted.items()]
        os.close(go_read)
        os.close(go_write)
        moved += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert moved == 0


def fork_leasing(run_dir: str, pools: "tuple[IdRange, ...]", first: int, name: str, go: "tuple[int, int]") -> int:
    """Start a child that leases a range once the pipe has ended, and exits with 1 if it is not the one that it shall be."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(go[1])
            os.read(go[0], 1)
            status = int(lease(run_dir, name, pools).first_id != first)
        finally:
            os._exit(status)
    return child


@pytest.mark.parametrize("directory", ["", "leases"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_directory_that_others_may_change(run_dir: str, directory: str, mode: int) -> None:
    release(lease(run_dir))
    os.chmod(os.path.join(run_dir, directory), mode)
    with pytest.raises(HostError, match="others may change it") as caught:
        lease(run_dir)
    assert caught.value.hint


def test_directory_of_somebody_else(run_dir: str) -> None:
    release(lease(run_dir))
    with pytest.raises(HostError, match="others may change it"):
        lease_range(run_dir, POOL, (), "", owner_uid=UID + 1)


def test_directory_is_a_link(run_dir: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o755)
    os.symlink(tmp_path / "real", run_dir)
    with pytest.raises(HostError, match="not a directory"):
        lease(run_dir)


def test_link_in_place_of_a_lease_is_not_followed(run_dir: str, tmp_path: Path) -> None:
    release(lease(run_dir))
    os.symlink(tmp_path / "victim", f"{run_dir}/leases/1000000000")
    with pytest.raises(HostError, match="no ids can be leased"):
        lease(run_dir, "", (IdRange(1_000_000_000, LEASE_COUNT),))
    assert not (tmp_path / "victim").exists()


def test_pools(tmp_path: Path) -> None:
    subuid, subgid = tmp_path / "subuid", tmp_path / "subgid"
    paths = (str(subuid), str(subgid))
    assert find_pools(*paths, None) == ((leases.CONTAINER_POOL,), ())
    subuid.write_text("vm:100000:65536\nroot:1000:1\nroot:1000000:1000000\n")
    subgid.write_text("vm:200000:65536\n")
    configured = IdRange(600000, 65536)
    taken = (IdRange(100000, 65536), IdRange(1000, 1), IdRange(1000000, 1000000), IdRange(200000, 65536))
    assert find_pools(*paths, configured) == ((configured,), taken)
    subgid.write_text("root:1500000:1000000\n")
    assert find_pools(*paths, configured) == ((IdRange(1500000, 500000),), ())


def test_what_root_shares_with_others_is_not_leased(tmp_path: Path) -> None:
    """As Debian's package lxd leaves the files: the ids are those of its containers."""
    subuid = tmp_path / "subuid"
    subuid.write_text("_lxd:100000:10000001\nroot:100000:10000001\n")
    shared = IdRange(100000, 10000001)
    paths = (str(subuid), str(subuid))
    assert find_pools(*paths, None) == ((leases.CONTAINER_POOL,), (shared,) * 4)
    assert preview_range(*find_pools(*paths, None), "") >= shared.end
    subuid.write_text(subuid.read_text() + "root:20000000:65536\n")
    assert find_pools(*paths, None) == ((IdRange(20000000, 65536),), ())


def test_container_pool_is_systemds() -> None:
    assert leases.CONTAINER_POOL.end - 1 == 1879048191
