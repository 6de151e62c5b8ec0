"""What the drop-in costs a guest's network: `scripts/bench net`, as root.

Each way (plain QEMU and the drop-in, without and with vhost-net where the kernel has it) has a guest of its own with a tap of its
own, in a network namespace of the benchmark's. In each round each guest sends the host some data by TCP, in an order that is
shuffled anew, while the others stand still. The guests are started anew a few times: how a QEMU lies in memory stays the same as
long as it runs. Ratios are those within one round.
"""

import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench_common import describe_host, find_real, write_json

from integration.plugged import Vm, plugged
from integration.shares import Launch
from integration.test_hotplug_guest import Guest, wait_for
from integration.vm import machine_options, port_options
from qemu_userns.linux.process import CLONE_NEWNET, unshare

STARTS, BUDGET_S, MOST_ROUNDS = 3, 150, 60
MOST_S = 900  # no guest is started anew after that, nor ahead of its share of it; a boot takes half a minute in the test host
TRANSFER_S, TRIAL_S, BLOCK = 1.0, 0.1, 1 << 16
TRIAL_BLOCKS, MIB = 4, 1 << 20
TIMEOUT_S = 60
MOST_DIFFERENCE = 0.03
LEASED = Launch("lease", (), None)


class Way(NamedTuple):
    """A way to a network."""

    label: str
    launch: Launch | None
    vhost: bool


class Sender(NamedTuple):
    """A guest that sends."""

    vm: Vm
    guest: Guest
    listener: socket.socket

    def send(self, blocks: int) -> float:
        """Return how fast some data comes, in MiB/s."""
        self.vm.qmp.execute("cont")
        host, port = self.listener.getsockname()
        self.guest.check(f"(dd if=/dev/zero bs={BLOCK} count={blocks} 2>/dev/null | nc {host} {port} >/dev/null 2>&1) &")
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(TIMEOUT_S)
            buffer = bytearray(MIB)
            size = first = connection.recv_into(buffer)
            start = time.monotonic()
            while count := connection.recv_into(buffer):
                size += count
            seconds = time.monotonic() - start
        self.vm.qmp.execute("stop")
        if size != blocks * BLOCK:
            raise SystemExit(f"bench: {size} of {blocks * BLOCK} bytes came")
        return (size - first) / MIB / seconds


def bench_net(rounds: int | None, json_file: str | None, accelerator: str) -> None:
    """Measure, and print the figures; `accelerator` is the value of -accel."""
    if os.geteuid() != 0:
        raise SystemExit("bench: net takes root, for taps in a network namespace of its own")
    about = describe_host(find_real())
    vhosts = (False, True) if os.access("/dev/vhost-net", os.R_OK | os.W_OK) else (False,)
    if len(vhosts) == 1:
        about.append("left out: vhost-net, since there is no /dev/vhost-net here (scripts/bench net in the test host has it)")
    ways = [
        Way(f"{who}{', vhost-net' if vhost else ''}", launch, vhost)
        for vhost in vhosts
        for who, launch in (("plain QEMU", None), ("drop-in", LEASED))
    ]
    unshare(CLONE_NEWNET)
    rates: dict[str, list[float]] = {way.label: [] for way in ways}
    start, starts = time.monotonic(), 0
    while starts < STARTS and (starts == 0 or time.monotonic() - start < MOST_S * starts / STARTS):
        most = MOST_ROUNDS if rounds is None else -(-rounds // STARTS)
        measure(ways, accelerator, most, BUDGET_S / STARTS if rounds is None else None, rates)
        starts += 1
    about.append(f"{len(rates[ways[0].label])} rounds, {starts} starts of each guest, by {accelerator}")
    report(about, ways, rates, json_file)


def measure(ways: list[Way], accelerator: str, most: int, budget_s: float | None, rates: dict[str, list[float]]) -> None:
    """Start the guests, and add the rates of as many rounds as there is time for."""
    with tempfile.TemporaryDirectory(prefix="qemu-userns-bench-") as folder, ExitStack() as stack:
        senders = {}
        for number, way in enumerate(random.sample(ways, len(ways))):
            senders[way.label] = stack.enter_context(sender(Path(folder), number, way, accelerator))
        blocks = choose_blocks(list(senders.values()))
        start = time.monotonic()
        for _ in range(most):
            for label in random.sample(sorted(senders), len(senders)):
                rates[label].append(senders[label].send(blocks))
            if budget_s is not None and time.monotonic() - start > budget_s:
                return


def choose_blocks(senders: list[Sender]) -> int:
    """Return how much the fastest of them sends in the time of one transfer."""
    blocks = TRIAL_BLOCKS
    while True:
        blocks_per_s = max(sender.send(blocks) for sender in senders) * MIB / BLOCK
        if blocks > blocks_per_s * TRIAL_S:
            return max(blocks, round(blocks_per_s * TRANSFER_S))
        blocks *= 16


@contextmanager
def sender(folder: Path, number: int, way: Way, accelerator: str) -> Iterator[Sender]:
    """Boot a guest with a tap; it stands still when it is ready."""
    tap, address, mac = f"bench{number}", f"10.9.{number}", f"52:54:00:00:09:{number:02x}"
    home = folder / f"home{number}"
    home.mkdir()
    ip("tuntap", "add", "dev", tap, "mode", "tap")
    ip("addr", "add", f"{address}.1/24", "dev", tap)
    ip("link", "set", tap, "up")
    netdev = f"tap,id=n,ifname={tap},script=no,downscript=no,vhost={'on' if way.vhost else 'off'}"
    nic = ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=n,mac={mac}"]
    ours, theirs = socket.socketpair()
    try:
        with ours, ExitStack() as stack:
            with theirs:
                machine = [*machine_options(home, accelerator, 128, "qemu_userns_serve"), *nic]
                command = port_options("command", f"socket,fd={theirs.fileno()}")
                started = plugged(folder / f"vm{number}", way.launch, *command, machine=machine, pass_fds=(theirs.fileno(),))
                vm = stack.enter_context(started)
            guest = Guest(ours, home)
            find = f'dev=$(grep -l "^{mac}$" /sys/class/net/*/address | cut -d/ -f5); [ -n "$dev" ]'
            guest.check(f"modprobe virtio_net; {wait_for(find)}; ip addr add {address}.2/24 dev $dev && ip link set $dev up")
            listener = stack.enter_context(socket.create_server((f"{address}.1", 0)))
            listener.settimeout(TIMEOUT_S)
            vm.qmp.execute("stop")
            yield Sender(vm, guest, listener)
    finally:
        ip("link", "del", tap)


def ip(*words: str) -> None:
    """Configure the network with iproute2."""
    subprocess.run(["ip", *words], check=True)


def report(about: list[str], ways: list[Way], rates: dict[str, list[float]], json_file: str | None) -> None:
    """Print the tables, and write them to a file if asked."""
    print("\n".join(about), end="\n\n")
    print(f"{'guest to host by TCP over a tap, MiB/s: median and MAD':58}")
    for label, values in rates.items():
        print(f"{label:58} {median(values):8.1f} +- {deviation(values):.1f}")
    print()
    ratios, goals = {}, {}
    for plain, ours in zip(ways[::2], ways[1::2], strict=True):
        values = [one / other for one, other in zip(rates[ours.label], rates[plain.label], strict=True)]
        label = f"{ours.label} / {plain.label}, within a round"
        ratios[label] = {"median": median(values), "mad": deviation(values), "count": len(values)}
        print(f"{label:58} {median(values):8.3f} +- {deviation(values):.3f}")
        goals[f"{ours.label}: within {MOST_DIFFERENCE:.0%} of {plain.label}"] = abs(median(values) - 1) <= MOST_DIFFERENCE
    print()
    for goal, reached in goals.items():
        print(f"{goal:58} {'reached' if reached else 'NOT REACHED':>8}")
    write_json(json_file, about=about, rates_mib_per_s=rates, ratios=ratios, goals=goals)


def deviation(values: list[float]) -> float:
    """Return the median absolute deviation."""
    middle = median(values)
    return median(abs(value - middle) for value in values)
