"""What a share costs a guest: `scripts/bench share`.

Each way to share has a guest of its own, under TCG, and a directory of its own on the same file system. All guests run the whole
time, and stand still while one of them is measured. In each round all of them do one step after the other, in pieces of a
fraction of a second and in an order that is shuffled for each piece, so that what else the machine does falls on all of them
alike; ratios are those of one piece. What the guest has cached is dropped first, and what it writes is flushed.

Plain `local` is there twice: what the second differs from the first by is what the machine does, and no smaller one counts.
"""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench_common import DROPIN, describe_host, find_real, write_json

from integration.vm import RunningGuest, running_guest
from qemu_userns.host.virtiofsd import find_virtiofsd

HELPER = "/usr/lib/qemu/virtfs-proxy-helper"
BUDGET_S, MOST_ROUNDS = 330, 15
SIZE_MIB, FILES = 256, 2000
MSIZE = 512 << 10
GUEST_MIB = 512
BOOT_TIMEOUT_S, STEP_TIMEOUT_S = 120, 300
NOBODY = 65534
MOST_RATIO = 1.02

MOUNT_9P = f"mount -t 9p -o trans=virtio,version=9p2000.L,msize={MSIZE} bench /mnt"
MOUNT_VIRTIOFS = "mount -t virtiofs bench /mnt"
TIMES, PIECE = 5, 200


def divide_names(command: str) -> tuple[str, ...]:
    """Return what gives a command the names of all files, a piece at a time."""
    return tuple(f"cd /mnt; seq {first} {first + PIECE - 1} | xargs {command}" for first in range(1, FILES, PIECE))


# Each with its name and the commands whose time counts, in this order: a step needs what an earlier one leaves.
STEPS = (
    (f"write {SIZE_MIB} MiB", (f"dd if=/dev/zero of=/mnt/large bs=1M count={SIZE_MIB} conv=fsync",) * TIMES),
    (f"read {SIZE_MIB} MiB", ("dd if=/mnt/large of=/dev/null bs=1M",) * TIMES),
    (f"create {FILES} files, {PIECE} at a time", divide_names("touch")),
    (f"stat {FILES} files, {PIECE} at a time", divide_names("stat -c %i >/dev/null")),
    (f"unlink {FILES} files, {PIECE} at a time", divide_names("rm")),
)

PLAIN, PROXY, PLAIN_VIRTIOFS = "plain -fsdev local", "plain -fsdev proxy", "plain virtiofsd"
AGAIN = "plain local, once more"
OURS, MAPPED, OURS_VIRTIOFS = "drop-in 9p", "drop-in 9p, idmapped", "drop-in virtiofsd"
Parts = tuple[list[str], list[str], str, tuple[int, ...]]  # QEMU's first words, its options, the mount, the fds that it gets


class Way(NamedTuple):
    """A way to share a directory, which `make` begins: it yields what QEMU is started with."""

    name: str
    make: "Callable[[Path], AbstractContextManager[Parts]]"


def bench_share(rounds: int | None, json_file: str | None) -> None:
    """Measure all ways that this user has, and print their times and ratios."""
    real = find_real()
    print("\n".join(describe_host(real)), flush=True)
    ways, left_out = choose_ways(real)
    for line in left_out:
        print(f"left out: {line}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-share-", dir="/var/tmp")))
        folder.chmod(0o755)
        guests = {way.name: stack.enter_context(start_guest(way, folder)) for way in ways}
        times = measure(guests, rounds)
    report(times)
    write_json(json_file, seconds=times)


def choose_ways(real: str) -> tuple[list[Way], list[str]]:
    """Return the ways that this user has, and why there are not more."""
    model = "passthrough" if os.geteuid() == 0 else "none"
    added = f"share={{}},tag=bench,security_model={model}"
    plain = make_plain(real, model)
    ways = [Way(PLAIN, plain), Way(AGAIN, plain), Way(OURS, make_dropin(added, MOUNT_9P))]
    left_out = []
    if os.geteuid() != 0:
        left_out.append("plain proxy, plain virtiofsd and idmapped shares, which take root; 9p is with security_model=none here")
    else:
        ways.append(Way(MAPPED, make_dropin(f"share={{}},tag=bench,map=both {NOBODY} 0", MOUNT_9P, NOBODY)))
        if os.access(HELPER, os.X_OK):
            ways.append(Way(PROXY, make_proxy(real)))
        else:
            left_out.append(f"plain proxy: there is no {HELPER}")
    if find_virtiofsd(None) is None:
        left_out.append("virtiofsd: there is none")
    else:
        ways.append(Way(OURS_VIRTIOFS, make_dropin("share={},tag=bench,driver=virtiofs", MOUNT_VIRTIOFS)))
        if os.geteuid() == 0:
            ways.append(Way(PLAIN_VIRTIOFS, make_virtiofs(real)))
    return ways, left_out


def make_plain(real: str, model: str) -> "Callable[[Path], AbstractContextManager[Parts]]":
    """Return what makes a share of QEMU's own."""

    @contextmanager
    def make(path: Path) -> Iterator[Parts]:
        yield [real], ["-virtfs", f"local,path={path},mount_tag=bench,security_model={model}"], MOUNT_9P, ()

    return make


def make_dropin(option: str, mount: str, owner: int | None = None) -> "Callable[[Path], AbstractContextManager[Parts]]":
    """Return what makes a share of ours; `owner` is whom its root belongs to."""

    @contextmanager
    def make(path: Path) -> Iterator[Parts]:
        path.chmod(0o777)  # leased ids are not known beforehand
        if owner is not None:
            os.chown(path, owner, owner)
        yield [str(DROPIN)], ["-userns", option.format(path)], mount, ()

    return make


def make_proxy(real: str) -> "Callable[[Path], AbstractContextManager[Parts]]":
    """Return what makes a share of virtfs-proxy-helper's."""

    @contextmanager
    def make(path: Path) -> Iterator[Parts]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = theirs.fileno()
            command = [HELPER, "--nodaemon", "--fd", str(fd), "--path", str(path)]
            with subprocess.Popen(command, pass_fds=(fd,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as helper:
                theirs.close()
                number = ours.fileno()
                device = ["-device", "virtio-9p-pci,fsdev=bench,mount_tag=bench"]
                try:
                    yield [real], ["-fsdev", f"proxy,id=bench,sock_fd={number}", *device], MOUNT_9P, (number,)
                finally:
                    helper.kill()

    return make


def make_virtiofs(real: str) -> "Callable[[Path], AbstractContextManager[Parts]]":
    """Return what makes a share of a virtiofsd with the same options as ours, started by hand."""

    @contextmanager
    def make(path: Path) -> Iterator[Parts]:
        found = find_virtiofsd(None)
        assert found is not None
        place = f"{path}.socket"
        old = ["-o", f"source={path}", "-o", "sandbox=chroot", "-o", "cache=auto", "-o", "xattr"]
        new = [f"--shared-dir={path}", "--sandbox=chroot", "--cache=auto", "--xattr"]
        command = [found.path, f"--socket-path={place}", *(new if found.modern else old)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
            try:
                wait_socket(place, daemon)
                memory = ["-object", f"memory-backend-memfd,id=mem,size={GUEST_MIB}M,share=on", "-machine", "memory-backend=mem"]
                chardev = ["-chardev", f"socket,id=fs,path={place}", "-device", "vhost-user-fs-pci,chardev=fs,tag=bench"]
                yield [real], [*memory, *chardev], MOUNT_VIRTIOFS, ()
            finally:
                daemon.kill()

    return make


def wait_socket(place: str, daemon: "subprocess.Popen[bytes]") -> None:
    """Wait until a virtiofsd listens; a connection to try it would be the one that it takes."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while place not in Path("/proc/net/unix").read_text():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: virtiofsd does not listen at {place}")
        time.sleep(0.01)


@contextmanager
def start_guest(way: Way, folder: Path) -> Iterator[RunningGuest]:
    """Boot a guest, and mount its share at /mnt."""
    path = folder / way.name.replace(" ", "-").replace(",", "")
    path.mkdir()
    with (
        way.make(path) as (words, options, mount, fds),
        running_guest(words, tmp=folder, extra=options, timeout_s=BOOT_TIMEOUT_S, memory_mib=GUEST_MIB, pass_fds=fds) as guest,
    ):
        guest.check(mount)
        yield guest
    shutil.rmtree(path, ignore_errors=True)


def measure(guests: dict[str, RunningGuest], rounds: int | None) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each piece, by way and by step."""
    times: dict[str, dict[str, list[float]]] = {name: {step: [] for step, _ in STEPS} for name in guests}
    end = time.monotonic() + BUDGET_S
    longest = 0.0
    for number in range(rounds or MOST_ROUNDS):
        began = time.monotonic()
        if rounds is None and number and began + longest > end:
            break
        for step, commands in STEPS:
            for command in commands:
                for name in random.sample(list(guests), len(guests)):
                    times[name][step].append(time_step(guests[name], command))
        for guest in guests.values():
            guest.check("rm /mnt/large")
        longest = max(longest, time.monotonic() - began)
    return times


def time_step(guest: RunningGuest, command: str) -> float:
    """Return how many seconds a command takes by the host's clock: the guest's shell reads hundredths only."""
    guest.check("sync; echo 3 >/proc/sys/vm/drop_caches", STEP_TIMEOUT_S)
    begin = time.monotonic()
    guest.check(f"({command}) 2>/dev/null", STEP_TIMEOUT_S)
    return time.monotonic() - begin


def report(times: dict[str, dict[str, list[float]]]) -> None:
    """Print medians with median absolute deviations: seconds, and the ratio to plain local of the same piece."""
    last, commands = STEPS[-1]
    rounds = len(times[PLAIN][last]) // len(commands)
    print(f"{rounds} rounds, msize {MSIZE >> 10} KiB; seconds and ratio to {PLAIN}: median and median absolute deviation\n")
    for step, _ in STEPS:
        print(step)
        for name, found in times.items():
            seconds, ratios = spread(found[step]), spread(divide(found[step], times[PLAIN][step]))
            print(f"  {name:<24} {seconds[0]:8.2f} +- {seconds[1]:5.2f} {ratios[0]:9.2f} +- {ratios[1]:4.2f}")
    print()
    print_goals(times)


def print_goals(times: dict[str, dict[str, list[float]]]) -> None:
    """Print what is to be reached, and whether it is, in every row."""
    for ours, other, most in (
        (AGAIN, PLAIN, MOST_RATIO),
        (OURS, PLAIN, MOST_RATIO),
        (OURS, PROXY, 1.0),
        (MAPPED, OURS, MOST_RATIO),
    ):
        if ours not in times or other not in times:
            continue
        ratios = [(spread(divide(times[ours][step], times[other][step]))[0], step) for step, _ in STEPS]
        missed = [f"{step}: {ratio:.2f}" for ratio, step in ratios if ratio > most]
        print(f"{ours} / {other}, at most {most:.2f}: {'; '.join(missed) or 'reached'}")


def divide(above: list[float], below: list[float]) -> list[float]:
    """Return the ratios of the same pieces."""
    return [one / other for one, other in zip(above, below, strict=True)]


def spread(values: list[float]) -> tuple[float, float]:
    """Return the median, and the median absolute deviation from it."""
    middle = median(values)
    return middle, median(abs(value - middle) for value in values)
