"""What the broker costs: `scripts/bench qmp`.

Every way to a monitor has a QEMU of its own, which stands still (-S). In each round each of them is asked `query-status` many
times, in an order that is shuffled anew, so that what else the machine does falls on all of them alike. The client is the same
everywhere, a blocking socket that does not parse; its own time is part of every figure, of the direct one too.
"""

import os
import random
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from bench_common import DROPIN, NAME, describe_host, find_real, write_json

CLIENTS = 16
TRIPS, BUDGET_S, MOST_ROUNDS = 100, 25, 200
PAIRS, WINDOW = 5000, 16  # stop and cont give two events; how many pairs may be on their way
START_TIMEOUT_S, END_TIMEOUT_S, EVENTS_TIMEOUT_S = 20, 20, 120
SETTLE_S = 1.0
MOST_P50, MOST_P99, MOST_PSS_MB = 1.6, 2.0, 14.0

QUERY = b'{"execute": "query-status"}\r\n'
PAIR = b'{"execute": "stop"}\r\n{"execute": "cont"}\r\n'
EVENTS = (b'"event": "STOP"', b'"event": "RESUME"')


class Client:
    """A client of a monitor."""

    def __init__(self, path: str) -> None:
        """Connect and negotiate."""
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.read()
        self.ask(b'{"execute": "qmp_capabilities"}\r\n')

    def ask(self, command: bytes) -> bytes:
        """Return the answer to a command."""
        self.socket.sendall(command)
        return self.read()

    def read(self) -> bytes:
        """Return what comes, up to the end of a line."""
        data = self.socket.recv(65536)
        while not data.endswith(b"\n"):
            more = self.socket.recv(65536)
            if not more:
                raise SystemExit("bench: a monitor has ended")
            data += more
        return data


class Way(NamedTuple):
    """A way to a monitor, and what is measured of it."""

    key: str
    label: str
    trip: Callable[[], None]
    trips: int = 1  # how many round trips that is


@contextmanager
def qemu(program: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a QEMU with nothing in it."""
    common = ["-nodefaults", "-display", "none"]
    with subprocess.Popen([program, *common, *words], stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def relay(path: str, target: str) -> Iterator[None]:
    """Run socat for one client."""
    with subprocess.Popen(["socat", f"UNIX-LISTEN:{path}", f"UNIX-CONNECT:{target}"]) as process:
        try:
            yield
        finally:
            process.kill()


def monitor(path: str) -> tuple[str, str]:
    """Return the words of a monitor."""
    return "-qmp", f"unix:{path},server=on,wait=off"


def bench_qmp(rounds: int | None, json_file: str | None) -> None:
    """Measure, and print the figures."""
    real = find_real()
    about = describe_host(real)
    if not shutil.which("socat"):
        about.append("left out: socat, which is not installed (apt-get install socat)")
    with tempfile.TemporaryDirectory(prefix="qemu-userns-bench-") as folder:
        trips, done = measure_trips(real, folder, rounds)
        memory = measure_memory(folder)
        events = [measure_events("plain QEMU", real, folder, 1, 0), measure_events("broker", str(DROPIN), folder, CLIENTS - 1, 1)]
    about.append(f"{done} rounds of {TRIPS} round trips each")
    if os.geteuid() == 0:
        about.append("as root: QEMU's ids are leased, and a supervisor that serves nothing stays to give them back")
    report(about, trips, events, memory, json_file)


# --- round trips ----------------------------------------------------------------------------------------------------------


def measure_trips(real: str, folder: str, rounds: int | None) -> tuple[list[tuple[Way, list[float]]], int]:
    """Return the microseconds of each round trip of each way, and the number of rounds."""
    with ExitStack() as stack:
        ways = []
        for key in ("direct", "socat", "one", "many") if shutil.which("socat") else ("direct", "one", "many"):
            program = str(DROPIN) if key in ("one", "many") else real
            stack.enter_context(qemu(program, "-M", "q35", "-S", *monitor(path := f"{folder}/{key}")))
            if key == "socat":
                wait_for(path)
                stack.enter_context(relay(path := f"{folder}/relayed", f"{folder}/socat"))
            clients = [Client(path) for _ in range(CLIENTS if key == "many" else 1)]
            ways += list(find_ways(key, clients))
        samples: list[tuple[Way, list[float]]] = [(way, []) for way in ways]
        for way, _ in samples:
            measure(way)
        began, done = time.monotonic(), 0
        while done < rounds if rounds else done < MOST_ROUNDS and time.monotonic() - began < BUDGET_S:
            for way, values in random.sample(samples, len(samples)):
                values += measure(way)
            done += 1
    return samples, done


def find_ways(key: str, clients: list[Client]) -> Iterator[Way]:
    """Yield what is measured of one monitor."""
    labels = {"direct": "plain QEMU", "socat": "through socat", "one": "broker, 1 client"}
    label = labels.get(key, f"broker, {CLIENTS} clients, {CLIENTS - 1} of them idle")

    def ask_one() -> None:
        clients[-1].ask(QUERY)

    def ask_all() -> None:
        for client in clients:
            client.socket.sendall(QUERY)
        for client in clients:
            client.read()

    yield Way(key, label, ask_one)
    if len(clients) > 1:
        yield Way("all", f"broker, {len(clients)} clients that ask at once, each command", ask_all, len(clients))


def measure(way: Way) -> list[float]:
    """Go one way some times; return the microseconds of each."""
    values = []
    for _ in range(TRIPS // way.trips):
        began = time.monotonic_ns()
        way.trip()
        values.append((time.monotonic_ns() - began) / 1000 / way.trips)
    return values


def wait_for(path: str) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)


# --- events ---------------------------------------------------------------------------------------------------------------


class Events(NamedTuple):
    """What became of the events."""

    label: str
    seconds: float  # up to the last event at the last client
    clients: int
    lost: int  # that did not come or came out of order, of all clients but the stuck ones
    stuck: str  # what became of those


def measure_events(label: str, program: str, folder: str, reading: int, stuck: int) -> Events:
    """Cause events; some of the clients never read."""
    path = f"{folder}/{label.split()[0]}-events"
    with qemu(program, "-M", "none", *monitor(path)):
        idle = [Client(path) for _ in range(stuck)]
        clients = [Client(path) for _ in range(reading)]
        began = time.monotonic()
        received = cause_events(clients)
        seconds = time.monotonic() - began
        ended = sum(is_closed(client) for client in idle)
    lost = sum(map(count_lost, received))
    fate = f"the one that never reads is {'disconnected' if ended else 'still there'}" if stuck else ""
    return Events(label, seconds, reading, lost, fate)


def cause_events(clients: list[Client]) -> list[list[bytes]]:
    """Have the first client say stop and cont; return the events that each gets, up to the last one or the time limit."""
    events: list[list[bytes]] = [[] for _ in clients]
    unfinished = [b""] * len(clients)
    numbers = {client.socket.fileno(): number for number, client in enumerate(clients)}
    poll = select.poll()
    for fd in numbers:
        poll.register(fd, select.POLLIN)
    sent = replies = 0
    deadline = time.monotonic() + EVENTS_TIMEOUT_S
    while min(map(len, events)) < 2 * PAIRS and time.monotonic() < deadline:
        more = min(PAIRS, replies // 2 + WINDOW) - sent
        clients[0].socket.sendall(PAIR * more)
        sent += more
        for fd, _ in poll.poll(1000):
            number = numbers[fd]
            data = clients[number].socket.recv(1 << 20)
            if not data:
                poll.unregister(fd)
            *lines, unfinished[number] = (unfinished[number] + data).split(b"\n")
            events[number] += (line for line in lines if b'"event"' in line)
            if number == 0:
                replies += sum(b'"return"' in line for line in lines)
    return events


def count_lost(events: list[bytes]) -> int:
    """Return how many of the events are missing or at another place than they should be."""
    wrong = sum(EVENTS[place % 2] not in line for place, line in enumerate(events))
    return abs(2 * PAIRS - len(events)) + wrong


def is_closed(client: Client) -> bool:
    """Say whether the other end of a client that has not read has been closed."""
    poll = select.poll()
    poll.register(client.socket.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


# --- memory ---------------------------------------------------------------------------------------------------------------


def measure_memory(folder: str) -> dict[str, float]:
    """Return the supervisor's memory in MB, idle and after hot-plug; and how many there are where there is no monitor."""
    tag = f"bench-{os.urandom(6).hex()}"
    path, disk = f"{folder}/memory", f"{folder}/disk"
    Path(disk).write_bytes(bytes(1 << 20))
    figures: dict[str, float] = {}
    with qemu(str(DROPIN), "-M", "q35", "-S", "-name", tag, *monitor(path)):
        client = Client(path)
        time.sleep(SETTLE_S)
        (supervisor,) = find_supervisors(tag)
        figures |= read_memory(supervisor, "idle, after start")
        node = b'{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "d", "filename": "%s"}}\r\n'
        answer = client.ask(node % os.fsencode(disk))
        if b'"return"' not in answer:
            raise SystemExit(f"bench: no hot-plug: {answer.decode()}")
        time.sleep(SETTLE_S)
        figures |= read_memory(supervisor, "idle, after one hot-plug")
    with qemu(str(DROPIN), "-M", "q35", "-S", "-name", tag + "-alone") as process:
        wait_until_running(process.pid)
        time.sleep(SETTLE_S)
        figures["supervisors where there is no monitor"] = float(len(find_supervisors(tag + "-alone")))
    return figures


def wait_until_running(pid: int) -> None:
    """Wait until a process is QEMU."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while os.path.basename(os.readlink(f"/proc/{pid}/exe")) != NAME and time.monotonic() < deadline:
        time.sleep(0.01)


def find_supervisors(name: str) -> list[int]:
    """Return the pids of the supervisors whose command line names a VM."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if words[0] == f"qemu-userns-supervisor: {name}".encode():
            found.append(int(pid))
    return found


def read_memory(pid: int, when: str) -> dict[str, float]:
    """Return a process's share of memory, and what of it is its own alone."""
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {row[0]: int(row[1]) for row in rows}
    return {
        f"PSS {when}, MB": kib["Pss:"] * 1024 / 1e6,
        f"private {when}, MB": (kib["Private_Clean:"] + kib["Private_Dirty:"]) * 1024 / 1e6,
    }


# --- figures --------------------------------------------------------------------------------------------------------------


def report(
    about: list[str],
    trips: list[tuple[Way, list[float]]],
    events: list[Events],
    memory: dict[str, float],
    json_file: str | None,
) -> None:
    """Print the tables, and write them to a file if asked."""
    print("\n".join(about), end="\n\n")
    figures: dict[str, dict[str, float]] = {}
    labels = {way.key: way.label for way, _ in trips}
    print(f"{'query-status, microseconds':58} {'p50':>8} {'p99':>8}   {'/ direct':>8} {'/ direct':>8}")
    for way, values in trips:
        p50, p99 = median(values), quantiles(values, n=100)[98]
        direct = figures.get("direct", {"p50_us": p50, "p99_us": p99})
        ratios = {"p50_ratio": p50 / direct["p50_us"], "p99_ratio": p99 / direct["p99_us"]}
        figures[way.key] = {"p50_us": p50, "p99_us": p99, "count": len(values), **ratios}
        print(f"{way.label:58} {p50:8.0f} {p99:8.0f}   {ratios['p50_ratio']:8.2f} {ratios['p99_ratio']:8.2f}")
    print()
    for row in events:
        print(
            f"{2 * PAIRS} events to {row.clients:2} clients, {row.label:20} {row.seconds:8.2f} s, {row.lost} lost"
            + (f"; {row.stuck}" if row.stuck else "")
        )
    print()
    for label, value in memory.items():
        print(f"{label:58} {value:8.1f}")
    print()
    goals = {
        f"p50 at most {MOST_P50} x direct": max(figures[key]["p50_ratio"] for key in ("one", "many")) <= MOST_P50,
        f"p99 at most {MOST_P99} x direct": max(figures[key]["p99_ratio"] for key in ("one", "many")) <= MOST_P99,
        "no event lost": not any(row.lost for row in events),
        f"PSS at most {MOST_PSS_MB} MB": max(memory[key] for key in memory if key.startswith("PSS")) <= MOST_PSS_MB,
        "no supervisor where there is no monitor": not memory["supervisors where there is no monitor"],
    }
    for goal, reached in goals.items():
        print(f"{goal:58} {'reached' if reached else 'NOT REACHED':>8}")
    rows = [row._asdict() for row in events]
    write_json(json_file, about=about, labels=labels, trips=figures, events=rows, memory=memory, goals=goals)
