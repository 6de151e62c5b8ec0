"""A range of 65,536 ids for each VM that root starts, held as long as its QEMU lives.

A lease is the file RUN_DIR/leases/FIRST_ID, locked with flock(2). QEMU inherits the locked fd, so that the kernel gives the
lease back when QEMU is gone, however it died. A QEMU that a guest has taken over may unlock the file, though: a
range is free only if its lock is obtained AND no process of the host has an id in it.

The file is removed under its own lock: by the supervisor at QEMU's end if there is one, else by the next launch that leases. Who
has opened it just before then locks a file that no longer has a name, sees so, and opens it anew. Who sweeps locks the directory:
a range whose file is only being removed must not look leased, or its VM would move to another one.
"""

import errno
import fcntl
import os
import stat

from qemu_userns.errors import HostError
from qemu_userns.host.subids import IdRange, all_ranges, find_unshared_ranges, intersect_ranges, overlaps
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

LEASE_COUNT = 65536
CONTAINER_POOL = IdRange(524288, 1879048192 - 524288)  # systemd, "Users, Groups, UIDs and GIDs on systemd Systems"


class Lease(Record):
    """A leased range; the holder of the record owns `fd`, which holds the lock."""

    first_id: int
    count: int
    fd: int
    path: str


def find_pools(
    subuid_path: str, subgid_path: str, configured: "IdRange | None"
) -> "tuple[tuple[IdRange, ...], tuple[IdRange, ...]]":
    """Find where root may lease from.

    Args:
        subuid_path: /etc/subuid.
        subgid_path: /etc/subgid.
        configured: the configured pool, used where root has no range of its own in both files.

    Returns:
        The pools, and the ranges in them that belong to somebody else.

    Raises:
        HostError: one of the files is malformed, or root's ranges cannot be used.
    """
    own = intersect_ranges(find_unshared_ranges(subuid_path, "root", 0), find_unshared_ranges(subgid_path, "root", 0))
    own = tuple(pool for pool in own if pool.count >= LEASE_COUNT)
    if own:
        return own, ()
    return (configured or CONTAINER_POOL,), (*all_ranges(subuid_path), *all_ranges(subgid_path))


def lease_range(
    run_dir: str, pools: "tuple[IdRange, ...]", taken: "tuple[IdRange, ...]", preferred: str, owner_uid: int = 0
) -> Lease:
    """Lease a range that nobody uses; a VM gets the same one each time if it is free.

    Args:
        run_dir: the run directory, /run/qemu-userns; made if it is missing.
        pools: where to search.
        taken: ranges that the lease must not overlap.
        preferred: what the search starts from, the VM's uuid or name; may be empty.
        owner_uid: who must own `run_dir`.

    Returns:
        The lease with an owned fd, which is to be inherited by QEMU.

    Raises:
        HostError: no range is free, or the run directory is not safe or not writable.
    """
    directory = _open_lease_dir(run_dir, owner_uid)
    try:
        _sweep(directory, run_dir)
        leased = _leased_ids(directory)
        uids: frozenset[int] | None = None
        for first in _candidates(pools, preferred):
            if not _allowed(first, taken, leased):
                continue
            fcntl.flock(directory, fcntl.LOCK_SH)  # a sweep has none in its hands now: what is locked is leased
            lease = _take(directory, run_dir, first)
            fcntl.flock(directory, fcntl.LOCK_UN)
            if lease is None:
                continue
            try:
                uids = _uids_in_use() if uids is None else uids
            except BaseException:
                release(lease)
                raise
            if not any(first <= uid < first + LEASE_COUNT for uid in uids):
                return lease
            release(lease)
    except OSError as err:
        raise HostError(f"{run_dir}/leases", f"no ids can be leased: {err.strerror}") from err
    finally:
        os.close(directory)
    raise _none_free()


def _none_free() -> HostError:
    return HostError("ids", f"no free range of {LEASE_COUNT}", "set a larger `pool` in /etc/qemu-userns/config.toml")


def preview_range(pools: "tuple[IdRange, ...]", taken: "tuple[IdRange, ...]", preferred: str) -> int:
    """Return the first id that `lease_range` tries first, without leasing it.

    Raises:
        HostError: the pools have no range that is not taken.
    """
    for first in _candidates(pools, preferred):
        if _allowed(first, taken, ()):
            return first
    raise _none_free()


def count_ranges(pools: "tuple[IdRange, ...]", taken: "tuple[IdRange, ...]") -> int:
    """Return how many ranges `lease_range` could lease at once."""
    return sum(_allowed(first, taken, ()) for first in _candidates(pools, ""))


def release(lease: Lease) -> None:
    """Give a lease back; takes ownership of its fd.

    The lock is taken once more, which changes nothing while it is ours: if QEMU had unlocked it, somebody else may
    hold the file now, and it is theirs.
    """
    try:
        fcntl.flock(lease.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lease.fd), os.stat(lease.path, follow_symlinks=False)):
            os.unlink(lease.path)
    except OSError:
        pass  # an unlocked file that remains is a free lease
    finally:
        os.close(lease.fd)


def sweep_leases(run_dir: str, owner_uid: int = 0) -> None:
    """Remove the files of leases that nobody holds any more.

    Raises:
        HostError: the run directory is not safe.
    """
    directory = _open_lease_dir(run_dir, owner_uid)
    try:
        _sweep(directory, run_dir)
    except OSError as err:
        raise HostError(f"{run_dir}/leases", f"cannot be swept: {err.strerror}") from err
    finally:
        os.close(directory)


def _sweep(directory: int, run_dir: str) -> None:
    """Do so in an open directory, while nobody takes a lease; raises OSError."""
    fcntl.flock(directory, fcntl.LOCK_EX)
    for first in _leased_ids(directory):
        lease = _take(directory, run_dir, first)
        if lease is not None:
            release(lease)
    fcntl.flock(directory, fcntl.LOCK_UN)


def _allowed(first: int, taken: "tuple[IdRange, ...]", leased: "tuple[int, ...]") -> bool:
    """Tell whether a range meets neither a taken one nor a lease that begins elsewhere (from a pool of other bounds)."""
    if any(first != other and abs(first - other) < LEASE_COUNT for other in leased):
        return False
    return not any(overlaps(first, LEASE_COUNT, other.start, other.count) for other in taken)


def _candidates(pools: "tuple[IdRange, ...]", preferred: str) -> "Iterator[int]":
    """Yield the first id of each possible lease once, from a start that depends on `preferred`."""
    total = sum(pool.count // LEASE_COUNT for pool in pools)
    begin = _fnv1a(preferred)
    for step in range(total):
        slot = (begin + step) % total
        for pool in pools:
            if slot < pool.count // LEASE_COUNT:
                yield pool.start + slot * LEASE_COUNT
                break
            slot -= pool.count // LEASE_COUNT


def _fnv1a(text: str) -> int:
    """Hash a string alike in every process (FNV-1a); `hash()` differs from one to the next."""
    value = 2166136261
    for byte in os.fsencode(text):
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def _take(directory: int, run_dir: str, first: int) -> "Lease | None":
    """Lock one lease, whoever may still have an id in its range; returns an owned fd in it; raises OSError."""
    fd = _lock(directory, str(first))
    return None if fd is None else Lease(first, LEASE_COUNT, fd, f"{run_dir}/leases/{first}")


def _lock(directory: int, name: str) -> "int | None":
    """Lock the file of a lease; returns an owned fd, None if somebody holds the lease; raises OSError."""
    while True:
        fd = os.open(name, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=directory, follow_symlinks=False)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # removed by its last holder after our open
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _uids_in_use() -> "frozenset[int]":
    """Return the real, effective and saved uid of every process; raises OSError if there is no /proc.

    /proc/PID belongs to the effective uid, which costs a fifth of reading its status. Status is not read where that is 0:
    host root is never mapped, so no QEMU of ours can have become it.
    """
    uids = set()
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid:
                uids.update(_status_uids(name))
        except OSError:
            continue  # gone meanwhile
    return frozenset(uids)


def _status_uids(pid: str) -> "list[int]":
    """Read the Uid: line of a process, none for a zombie, which can do nothing any more; raises OSError.

    A process whose first thread alone has ended is called a zombie too, and its other threads run on.
    """
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 4096)
    finally:
        os.close(fd)
    if b"\nState:\tZ" in text and b"\nThreads:\t1\n" in text:
        return []
    return [int(uid) for uid in text.partition(b"\nUid:")[2].partition(b"\n")[0].split()]


def _leased_ids(directory: int) -> "tuple[int, ...]":
    """Return the first ids of the leases that have a file; raises OSError."""
    return tuple(int(name) for name in os.listdir(directory) if name.isdecimal())


def _open_lease_dir(run_dir: str, owner_uid: int) -> int:
    """Open RUN_DIR/leases; returns an owned fd; raises HostError."""
    parent = _open_own_dir(run_dir, 0o755, owner_uid)
    try:
        return _open_own_dir(f"{run_dir}/leases", 0o700, owner_uid)
    finally:
        os.close(parent)


def _make_dir(path: str, mode: int) -> None:
    """Make a directory if it is missing, with `mode` whatever the umask; raises OSError."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    os.chmod(path, mode)


def _open_own_dir(path: str, mode: int, owner_uid: int) -> int:
    """Open a directory that nobody but its owner can change, made if it is missing; returns an owned fd; raises HostError."""
    try:
        _make_dir(path, mode)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        why = "is not a directory" if err.errno in (errno.ENOTDIR, errno.ELOOP) else f"cannot be used: {err.strerror}"
        raise HostError(path, why, f"{path} must be a directory of uid {owner_uid}") from err
    status = os.fstat(fd)
    if status.st_uid != owner_uid or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        raise HostError(path, "others may change it", f"chown {owner_uid} {path}; chmod go-w {path}")
    return fd
