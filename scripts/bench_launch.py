"""How long a launch takes, compared with plain QEMU, bubblewrap and an empty interpreter: `scripts/bench launch`.

Every way of starting is measured once per round, in an order that is shuffled anew, so that what else the machine does falls on
all of them alike. The figures are medians with their median absolute deviation; nothing is asserted about them.

From the start of the drop-in to execve: a small C program stands first in PATH under QEMU's name, so that it is what the
drop-in executes in the end. Given an fd (`-add-fd`) it writes the time there and exits; asked anything else it becomes the real
QEMU.

What a device costs is the difference between launches with DEVICES of them: disks on files, each of which is looked up and shown,
and nics in turn. As root these have taps, which are opened outside.
"""

import json
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench_common import CHECKOUT, DROPIN, NAME, describe_host, find_real, write_json

from qemu_userns.linux.process import CLONE_NEWNET, CLONE_NEWNS, setns, unshare

TEST_USER = "qemu-userns-test"
MOUNTS, AT_ONCE = 500, 16
DEVICES = (1, 8, 32)
DEVICES_PER_SLOT, FIRST_SLOT = 8, 4
DISK_BYTES = 1 << 20
BUDGET_S, MOST_ROUNDS, FEWEST_ROUNDS = 32, 60, 5
ROUNDS_PER_BURST = 8
END_TIMEOUT_S = 10
PAUSE_S = 0.02  # for the kernel, and for a supervisor that gives a lease back, to be done with the start before
BWRAP = ["--unshare-user", "--dev-bind", "/", "/", "--die-with-parent"]
MACHINE = ["-M", "q35", "-S", "-nodefaults", "-display", "none"]
GREETINGS = {"control": b'"QMP"', "readline": b"QEMU "}  # what a monitor says first, by its mode

STUB_SOURCE = r"""
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i - 1], "-add-fd")) {
            long long ns = now.tv_sec * 1000000000LL + now.tv_nsec;
            return write(atoi(argv[i] + strlen("fd=")), &ns, sizeof ns) != sizeof ns;
        }
    }
    execv(REAL, argv);
    return 127;
}
"""


class Way(NamedTuple):
    """One way of starting something, and what is measured of it."""

    key: str
    label: str
    command: list[str]
    until: str = "greeting"  # or "stub", "exit"
    crowded: bool = False  # in the mount namespace with MOUNTS more mounts
    mode: str = "control"  # of the monitor: QMP, which the supervisor serves, or "readline", which QEMU serves by itself
    devices: int = 0

    @property
    def where(self) -> str:
        """What is special about the host or the VM."""
        return f"+{MOUNTS} mounts" if self.crowded else f"{self.devices} device{'s' * (self.devices > 1)}" if self.devices else ""


class Bench:
    """What all measurements share."""

    def __init__(self, crowd: int | None, stub_dir: str | None, disks: list[str], taps: list[str]) -> None:
        """Keep fds of the mount namespaces: this one, and the crowded one if there is any; and what is for devices."""
        self.own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        self.crowd = crowd
        self.disks, self.taps = disks, taps
        self.env = {key: value for key, value in os.environ.items() if key != "QEMU_USERNS"}
        path = f"{stub_dir}:{self.env.get('PATH', os.defpath)}"
        self.stub_env = {**self.env, "PATH": path, "XDG_CACHE_HOME": f"{stub_dir}/cache"}  # root's is a fixed one

    def measure(self, way: Way) -> float:
        """Start it once; return the milliseconds from before its spawn."""
        measures: dict[str, Callable[[Way], float]] = {
            "greeting": lambda way: self.burst(way, 1),
            "stub": self._until_stub,
            "exit": self._until_exit,
        }
        try:
            if way.crowded and self.crowd is not None:
                setns(self.crowd, CLONE_NEWNS)
            return measures[way.until](way)
        finally:
            if way.crowded:
                setns(self.own, CLONE_NEWNS)
            time.sleep(PAUSE_S)

    def burst(self, way: Way, count: int) -> float:
        """Start QEMU `count` times at once; return the milliseconds up to the last greeting. None of them is left running."""
        poll, ours, pids = select.poll(), {}, []
        pairs = [socket.socketpair() for _ in range(count)]
        try:
            began = time.monotonic_ns()
            for mine, theirs in pairs:
                pids.append(self._spawn(way, theirs.fileno(), self.env))
                theirs.close()
                ours[mine.fileno()] = mine
                poll.register(mine, select.POLLIN)
            while ours:
                for number, _ in poll.poll():
                    if GREETINGS[way.mode] not in ours[number].recv(4096):
                        raise SystemExit(f"bench: no greeting from: {' '.join(way.command)}")
                    poll.unregister(number)
                    ours.pop(number)
            return (time.monotonic_ns() - began) / 1e6
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for mine, _ in pairs[: len(pids)]:
                self._drain(mine)

    def _until_stub(self, way: Way) -> float:
        """Start the drop-in, or the stub itself; return the milliseconds up to the stub's main()."""
        (reader, writer), (mine, theirs) = os.pipe(), socket.socketpair()
        os.set_inheritable(writer, True)
        began = time.monotonic_ns()
        pid = self._spawn(way, theirs.fileno(), self.stub_env, "-add-fd", f"fd={writer},set=1")
        os.close(writer)
        theirs.close()
        told = os.read(reader, 8)
        os.close(reader)
        os.waitpid(pid, 0)
        self._drain(mine)
        if len(told) != 8:
            raise SystemExit(f"bench: the stand-in for QEMU was not executed by: {' '.join(way.command)}")
        return (int.from_bytes(told, sys.byteorder) - began) / 1e6

    def _until_exit(self, way: Way) -> float:
        began = time.monotonic_ns()
        os.waitpid(os.posix_spawn(way.command[0], way.command, self.env), 0)
        return (time.monotonic_ns() - began) / 1e6

    @staticmethod
    def _drain(monitor: socket.socket) -> None:
        """Wait for the end of who serves a monitor: a QEMU that is not the process that was started (bwrap's), a supervisor."""
        monitor.settimeout(END_TIMEOUT_S)
        while monitor.recv(4096):
            pass
        monitor.close()

    def _spawn(self, way: Way, fd: int, env: dict[str, str], *words: str) -> int:
        os.set_inheritable(fd, True)
        monitor = ["-chardev", f"socket,id=m,fd={fd}", "-mon", f"chardev=m,mode={way.mode}"]
        devices = list_devices(self.disks[: way.devices], self.taps)
        return os.posix_spawn(way.command[0], [*way.command, *MACHINE, *devices, *monitor, *words], env)


def find_ways(real: str, stub: str | None, crowded: bool, identities: dict[str, list[str]]) -> Iterator[Way]:
    """Yield what is to be measured."""
    python = DROPIN.read_text().split("\n", 1)[0][2:].split()[0]
    yield Way("python", "python3 -I -S -c pass", [python, "-I", "-S", "-c", "pass"], "exit")
    yield Way("plain", "plain QEMU", [real])
    yield Way("plain:hmp", "plain QEMU, HMP", [real], mode="readline")
    if sandbox := find_sandbox():
        yield Way("plain+sandbox", "plain QEMU, with the -sandbox that the drop-in adds", [real, "-sandbox", sandbox])
    if bwrap := shutil.which("bwrap"):
        yield Way("bwrap", "bwrap --unshare-user", [bwrap, *BWRAP, "--", real])
    if stub:
        yield Way("stub", "stand-in for QEMU, by itself", [stub], "stub")
    if crowded:
        yield Way("plain@crowd", "plain QEMU", [real], crowded=True)
    for name, words in identities.items():
        command = [str(DROPIN), *words]
        for more in (False, True) if crowded else (False,):
            suffix = "@crowd" if more else ""
            yield Way(f"{name}{suffix}", name, command, crowded=more)
            if not more:
                yield Way(f"{name}:hmp", f"{name}, HMP", command, mode="readline")
            if stub:
                yield Way(f"{name}:execve{suffix}", f"{name}, to execve", command, "stub", more)
        for count in DEVICES if stub else ():
            yield Way(f"{name}:execve/{count}", f"{name}, to execve", command, "stub", devices=count)


def list_devices(disks: list[str], taps: list[str]) -> list[str]:
    """Return the options of as many devices as there are files: disks on them, and nics in turn, on taps if there are any."""
    words = []
    for number, path in enumerate(disks):
        slot, function = divmod(number, DEVICES_PER_SLOT)
        address = f"addr={FIRST_SLOT + slot:x}.{function},multifunction=on"
        if number % 2:
            end = f"tap,ifname={taps[number // 2]},script=no,downscript=no" if taps else "user"
            words += ["-netdev", f"{end},id=b{number}", "-device", f"virtio-net-pci,netdev=b{number},{address}"]
        else:
            words += ["-drive", f"file={path},format=raw,if=none,id=b{number}"]
            words += ["-device", f"virtio-blk-pci,drive=b{number},{address}"]
    return words


@contextmanager
def made_disks() -> Iterator[list[str]]:
    """Make the files of disks, which anybody may write."""
    with tempfile.TemporaryDirectory(prefix="qemu-userns-bench-") as folder:
        os.chmod(folder, 0o755)
        paths = [f"{folder}/{number}" for number in range(max(DEVICES))]
        for path in paths:
            Path(path).touch()
            os.chmod(path, 0o666)
            os.truncate(path, DISK_BYTES)
        yield paths


def make_taps() -> list[str]:
    """Make taps in a network namespace that this process takes for its own; return their names, none where this user may not."""
    if os.geteuid() != 0:
        return []
    unshare(CLONE_NEWNET)
    names = [f"bench{number}" for number in range(max(DEVICES) // 2)]
    for name in names:
        subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    return names


def explain(*words: str) -> dict[str, list[dict[str, str]]]:
    """Return what qemu-userns says that it would do."""
    command = [str(CHECKOUT / ".venv/bin/qemu-userns"), "explain", "--json", NAME, "-M", "q35", "-nodefaults", "-qmp", "stdio"]
    done = subprocess.run([*command, *words], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return found


def find_sandbox() -> str | None:
    """Return the value of the -sandbox that the drop-in adds."""
    words = [row["word"] for row in explain()["command line"]]
    return words[words.index("-sandbox") + 1] if "-sandbox" in words else None


@contextmanager
def compiled_stub(real: str) -> Iterator[str | None]:
    """Compile the stand-in for QEMU into a folder of its own, and forget it in root's cache afterwards."""
    with tempfile.TemporaryDirectory(prefix="qemu-userns-bench-") as folder:
        os.chmod(folder, 0o755)
        path = f"{folder}/{NAME}"
        gcc = ["gcc", "-O2", "-static", f'-DREAL="{real}"', "-xc", "-", "-o", path]
        try:
            subprocess.run(gcc, input=STUB_SOURCE, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as err:
            print(f"bench: no figures up to execve: {err}", file=sys.stderr)
            yield None
            return
        time.sleep(0.1)  # facts about a file that changed just now are not cached
        yield path
        for file in Path("/var/cache/qemu-userns").glob("qemu-*") if os.geteuid() == 0 else ():
            if f"\t{path}\n" in file.read_text(errors="replace"):
                file.unlink()


@contextmanager
def crowded_namespace() -> Iterator[int | None]:
    """Make a mount namespace with MOUNTS more mounts; yield an fd of it, or None where this user may not."""
    if os.geteuid() != 0:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qemu-userns-bench-mounts-") as folder:
        script = f'for i in $(seq {MOUNTS}); do mkdir "$0/$i" && mount -t tmpfs tmpfs "$0/$i" || exit; done; echo; read x'
        command = ["unshare", "--mount", "sh", "-c", script, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            made = holder.stdout.readline()
            namespace = os.open(f"/proc/{holder.pid}/ns/mnt", os.O_RDONLY) if made else None
            yield namespace
            if namespace is not None:
                os.close(namespace)
            holder.communicate()


def find_identities() -> tuple[dict[str, list[str]], list[str]]:
    """Return the drop-in's ways of being called by this user with the words that they take, and lines about what they are."""
    if os.geteuid() != 0:
        identities: dict[str, list[str]] = {"drop-in": []}
    else:
        identities = {"drop-in, leased ids": []}
        if any(user.pw_name == TEST_USER for user in pwd.getpwall()):
            identities = {f"drop-in, -runas {TEST_USER}": ["-runas", TEST_USER], **identities}
    return identities, [f"{name}: {explain(*words)['program'][0]['identity']}" for name, words in identities.items()]


def bench_launch(rounds: int | None, json_file: str | None) -> None:
    """Measure, and print the figures."""
    real = find_real()
    about = describe_host(real)
    identities, described = find_identities()
    with ExitStack() as stack:
        stub, crowd = stack.enter_context(compiled_stub(real)), stack.enter_context(crowded_namespace())
        bench = Bench(crowd, stub and os.path.dirname(stub), stack.enter_context(made_disks()), make_taps())
        ways = list(find_ways(real, stub, crowd is not None, identities))
        samples: dict[str, list[float]] = {way.key: [] for way in ways}
        at_once = [way for way in ways if way.until == "greeting" and not way.crowded and way.mode == "control"]
        bursts: dict[str, list[float]] = {way.key: [] for way in at_once}
        for way in ways:
            bench.measure(way)  # caches: files, what is known of this QEMU
        began, done = time.monotonic(), 0
        while done < rounds if rounds else done < FEWEST_ROUNDS or (done < MOST_ROUNDS and time.monotonic() - began < BUDGET_S):
            for way in random.sample(ways, len(ways)):
                samples[way.key].append(bench.measure(way))
            if done % ROUNDS_PER_BURST == 0:
                for way in ways:
                    if way.key in bursts:
                        bursts[way.key].append(bench.burst(way, AT_ONCE))
                        time.sleep(AT_ONCE * PAUSE_S)
            done += 1
    rows = [(way.label, way.where, way.key, samples[way.key]) for way in ways]
    rows += [(way.label, f"{AT_ONCE} at once", f"{way.key}@{AT_ONCE}", bursts[way.key]) for way in ways if way.key in bursts]
    about += [*described, f"{done} rounds; milliseconds: median and median absolute deviation"]
    if crowd is None:
        about.append(f"left out: {MOUNTS} more mounts, which only root can make on the host")
    if "bwrap" not in samples:
        about.append("left out: bwrap, which is not installed")
    report(about, rows, list(identities), json_file)


def report(about: list[str], rows: list[tuple[str, str, str, list[float]]], names: list[str], json_file: str | None) -> None:
    """Print the table and the ratios, and write them to a file if asked."""
    medians = {key: median(values) for _, _, key, values in rows}
    spread = {key: median(abs(value - medians[key]) for value in values) for _, _, key, values in rows}
    print("\n".join(about), end="\n\n")
    for label, where, key, _ in rows:
        print(f"{label:52} {where:12} {medians[key]:8.1f} +- {spread[key]:.1f}")
    ratios: dict[str, float] = {}
    for name in names:
        execve = f"{name}:execve"
        if execve in medians:
            ratios[f"{name}: start to execve / python3 -I -S -c pass"] = medians[execve] / medians["python"]
            own = medians[execve] - medians["stub"]
            ratios[f"{name}: the same, without the stand-in's own start"] = own / medians["python"]
            ratios[f"{name}: execve to HMP banner / plain QEMU"] = (medians[f"{name}:hmp"] - own) / medians["plain:hmp"]
            ratios[f"{name}: execve to QMP greeting / plain QEMU"] = (medians[name] - own) / medians["plain"]
        ratios[f"{name}: spawn to greeting / plain QEMU"] = medians[name] / medians["plain"]
        ratios[f"{name}: {AT_ONCE} at once / {AT_ONCE} plain"] = medians[f"{name}@{AT_ONCE}"] / medians[f"plain@{AT_ONCE}"]
        few, many = min(DEVICES), max(DEVICES)
        if f"{execve}/{many}" in medians:
            cost = (medians[f"{execve}/{many}"] - medians[f"{execve}/{few}"]) / (many - few)
            ratios[f"{name}: to execve, milliseconds per device, {few} to {many}"] = cost
        for key, what in ((name, "to greeting"), (execve, "to execve")):
            if f"{key}@crowd" in medians:
                ratios[f"{name}: {what}, +{MOUNTS} mounts / without"] = medians[f"{key}@crowd"] / medians[key]
    print()
    for label, ratio in ratios.items():
        print(f"{label:78} {ratio:6.2f}")
    figures = {
        key: {"label": label, "where": where, "median_ms": medians[key], "mad_ms": spread[key], "count": len(values)}
        for label, where, key, values in rows
    }
    write_json(json_file, about=about, figures=figures, ratios=ratios)
