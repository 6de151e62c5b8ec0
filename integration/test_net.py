"""Taps, their scripts, bridges and vhost-net, in a network namespace of the test's own; against plain QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.networks import Scripts, flags_of, interfaces, ip, own_network
from integration.plugged import Vm, compared, plugged
from integration.shares import Launch, dropin_words, launches
from integration.talk import PLAIN, as_user, home_of, running, started, wait_until
from integration.test_hotplug_guest import Guest, unplug, wait_for
from integration.vm import machine_options, port_options

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

IDLE = ["-nodefaults", "-display", "none", "-M", "none"]
LIMIT_S = 30
NO_SCRIPTS = "script=no,downscript=no"
HELPER = "/usr/lib/qemu/qemu-bridge-helper"


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> Iterator[None]:
    with own_network(tmp_path):
        yield


@pytest.fixture
def scripts(shared_tmp: Path) -> Scripts:
    return Scripts(shared_tmp)


@pytest.fixture(params=launches(), ids=str)
def launch(request: pytest.FixtureRequest) -> Launch:
    assert isinstance(request.param, Launch)
    return request.param


def words_of(launch: Launch | None) -> list[str]:
    return [*(PLAIN if launch is None else [*dropin_words(), *launch.options]), *IDLE]


def said(launch: Launch | None, *options: str) -> str:
    """Return why QEMU does not start, without who says it."""
    words = [*words_of(launch), *options]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1, ended
    return re.sub(r"^qemu-\S+: ", "", ended.stderr, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "members",
    ["", ",ifname=t0", ",ifname=t0,vnet_hdr=off", ",ifname=t0,vnet_hdr=on,sndbuf=4096", ",ifname=t0,queues=4"],
)
def test_a_tap_is_what_plain_qemu_makes(launch: Launch, members: str) -> None:
    found: list[list[object]] = []
    for way in (None, launch):
        with running(words_of(way), "-netdev", f"tap,id=n,{NO_SCRIPTS}{members}", idle=False) as vm:
            shown = re.sub("fds?=.*|ifname=.*", "", vm.qmp.hmp("info network"))
            found.append([interfaces(), [flags_of(name) for name in interfaces()], shown])
            vm.quit()
        wait_until(lambda: interfaces() == [], "the end of the tap")
    assert found[0] == found[1]
    assert found[0][0] == (["t0"] if "ifname" in members else ["tap0"])


@pytest.mark.parametrize("option", ["-netdev", "-nic", "-net"])
def test_the_scripts_run_outside(launch: Launch, scripts: Scripts, option: str) -> None:
    value = f"tap,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    value += ",id=n" if option == "-netdev" else ""
    for way in (None, launch):
        with running(words_of(way), option, value, idle=False) as vm:
            assert scripts.said() == ["up 1 t0 there"]
            vm.quit()
        wait_until(lambda: len(scripts.said()) == 2, "the downscript")
        wait_until(lambda: interfaces() == [], "the end of the tap")
        assert scripts.take() == ["up 1 t0 there", "down 1 t0 there"]


def test_the_default_scripts_run(launch: Launch, scripts: Scripts) -> None:
    scripts.make("up", path=Path("/etc/qemu-ifup"))
    scripts.make("down", path=Path("/etc/qemu-ifdown"))
    for way in (None, launch):
        with running(words_of(way), "-netdev", "tap,id=n,queues=2", idle=False) as vm:
            assert scripts.said() == ["up 1 tap0 there"]
            vm.quit()
        wait_until(lambda: scripts.said()[1:] == ["down 1 tap0 there"], "the downscript")
        wait_until(lambda: interfaces() == [], "the end of the tap")
        scripts.take()


def test_a_tap_is_there_again_at_once(launch: Launch, scripts: Scripts) -> None:
    """The next VM of the same tap waits for the downscript of the one before."""
    ip("tuntap", "add", "dev", "t0", "mode", "tap")
    value = f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    for _ in range(3):
        with running(words_of(launch), "-netdev", value, idle=False) as vm:
            vm.quit()
    wait_until(lambda: len(scripts.said()) == 6, "the last downscript")
    assert scripts.take() == ["up 1 t0 there", "down 1 t0 there"] * 3


def test_without_a_monitor_the_downscript_runs(launch: Launch, scripts: Scripts) -> None:
    value = f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    with started([*words_of(launch), "-netdev", value]) as process:
        wait_until(lambda: "qemu-system" in os.readlink(f"/proc/{process.pid}/exe"), "QEMU")
        assert scripts.said() == ["up 1 t0 there"]
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: scripts.said()[1:] == ["down 1 t0 there"], "the downscript")


def test_a_script_that_fails_stops_the_launch(launch: Launch, scripts: Scripts) -> None:
    up, down = scripts.make("up", status=3), scripts.make("down")
    for path in (str(up), "/nowhere/up"):
        tap = ("-netdev", f"tap,id=n,ifname=t0,script={path},downscript={down}")
        plain, ours = said(None, *tap), said(launch, *tap)
        text = plain.partition(": ")[2].strip()
        assert "failed with status" in text
        assert text in ours
    assert scripts.take() == ["up 1 t0 there"] * 2
    assert interfaces() == []


@pytest.mark.parametrize("more", [("-device", "no-such-device"), ("-kernel", "/nowhere/kernel"), ("-chardev", "bogus,id=c")])
def test_what_a_failed_launch_did_is_taken_back(launch: Launch, scripts: Scripts, more: tuple[str, ...]) -> None:
    tap = ("-netdev", f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}")
    said(launch, *tap, *more)
    ran = scripts.said()
    wait_until(lambda: interfaces() == [], "the end of the tap")
    assert not ran or wait_until(lambda: scripts.said()[1:] == ["down 1 t0 there"], "the downscript")


@pytest.mark.parametrize("option", ["bridge,id=n,br=b0", f"tap,id=n,helper={HELPER},br=b0", f"tap,id=n,helper={HELPER} --br=b0"])
def test_a_bridge_gets_a_tap(launch: Launch, option: str) -> None:
    ip("link", "add", "b0", "type", "bridge")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")
    found = []
    for way in (None, launch):
        with running(words_of(way), "-netdev", option, idle=False) as vm:
            (name,) = os.listdir("/sys/class/net/b0/brif")
            found.append((name, flags_of(name)))
            vm.quit()
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
    assert found[0] == found[1]


def test_the_helper_says_what_is_wrong(launch: Launch) -> None:
    ip("link", "add", "b0", "type", "bridge")
    for option in ("bridge,id=n,br=b0", "tap,id=n,helper=/nowhere/helper"):
        plain, ours = said(None, "-netdev", option), said(launch, "-netdev", option)
        if "nowhere" not in option:
            assert plain.splitlines()[0] in ours
        assert re.search("bridge helper failed|failed to recv file descriptor", plain), plain
        assert re.search("bridge helper failed|failed to recv file descriptor", ours), ours


# --- an unprivileged caller -------------------------------------------------------------------------------------------


def as_caller(user: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = as_user(user, *dropin_words(), *IDLE, "-monitor", "none", *options)
    environment = home_of(user)
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment, cwd="/")


def test_a_user_has_taps_of_his_own_only(unprivileged_user: str, scripts: Scripts) -> None:
    ip("tuntap", "add", "dev", "mine", "mode", "tap", "user", unprivileged_user)
    ip("tuntap", "add", "dev", "many", "mode", "tap", "user", unprivileged_user, "multi_queue")
    ip("tuntap", "add", "dev", "roots", "mode", "tap", "user", "root")
    down = scripts.make("down")
    for value in ("ifname=mine", "ifname=many,queues=2"):
        words = as_user(unprivileged_user, *dropin_words())
        tap = f"tap,id=n,script=no,downscript={down},{value}"
        with running(words, "-netdev", tap, env=home_of(unprivileged_user), cwd="/") as vm:
            assert vm.qmp.execute("query-status")
            vm.quit()
    wait_until(lambda: scripts.said() == ["down 1 mine there", "down 1 many there"], "the downscripts")
    hint = f"mode tap user {unprivileged_user}"
    for name, why in (("roots", "it belongs to uid 0"), ("none", "there is no such interface"), ("", "takes CAP_NET_ADMIN")):
        ended = as_caller(unprivileged_user, "-netdev", f"tap,id=n,{NO_SCRIPTS}" + (f",ifname={name}" if name else ""))
        assert ended.returncode == 1
        assert why in ended.stderr, ended.stderr
        assert hint in ended.stderr
    Path("/dev/net/tun").chmod(0o600)
    ended = as_caller(unprivileged_user, "-netdev", f"tap,id=n,{NO_SCRIPTS},ifname=mine")
    assert "/dev/net/tun: Permission denied" in ended.stderr
    assert "mode 0600" in ended.stderr


# --- while QEMU runs --------------------------------------------------------------------------------------------------


def test_a_tap_is_plugged_in_and_out(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    bad = str(scripts.make("bad", status=1))
    ip("link", "add", "b0", "type", "bridge")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")

    def dialogue(vm: Vm) -> list[Any]:
        seen: list[Any] = []
        cases: list[dict[str, Any]] = [{"ifname": "t0"}, {"ifname": "t0", "queues": 2}, {"sndbuf": 4096}]
        for more in cases:
            seen.append(vm.qmp.ask("netdev_add", type="tap", id="n", script=up, downscript=down, **more))
            seen.append([(name, flags_of(name)) for name in interfaces() if name != "b0"])
            seen.append(vm.qmp.ask("netdev_del", id="n"))
            wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
            if vm.confined:
                wait_until(lambda: len(scripts.said()) == 2, "the downscript")
            seen.append(scripts.take()[:1])
        seen.append(vm.qmp.hmp(f"netdev_add tap,id=n,ifname=t0,sndbuf=1M,script={up},downscript={down}"))
        seen.append(vm.qmp.hmp("netdev_del n"))
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
        if vm.confined:
            wait_until(lambda: scripts.said()[-1:] == ["down 1 t0 there"], "the downscript")
        scripts.take()
        seen.append("error" in vm.qmp.ask("netdev_add", type="tap", id="n", script=bad, downscript=down))
        seen.append(scripts.take())
        seen.append(vm.qmp.ask("netdev_add", type="bridge", id="b", br="b0"))
        seen.append(len(os.listdir("/sys/class/net/b0/brif")))
        seen.append(vm.qmp.ask("netdev_del", id="b"))
        wait_until(lambda: interfaces() == ["b0"], "the end of the bridge's tap")
        seen.append("error" in vm.qmp.ask("netdev_add", type="bridge", id="b", br="nowhere"))
        return seen

    compared(shared_tmp, launch, dialogue)


def test_what_was_plugged_in_is_taken_back_at_the_end(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    with plugged(shared_tmp / "vm", launch) as vm:
        vm.qmp.execute("netdev_add", type="tap", id="n", ifname="t0", script=up, downscript=down)
        vm.process.kill()
    wait_until(lambda: scripts.said() == ["up 1 t0 there", "down 1 t0 there"], "the downscript")


# --- traffic ----------------------------------------------------------------------------------------------------------


class Nic:
    """A tap with an address, and what the guest has of it."""

    def __init__(self, number: int, queues: int = 1) -> None:
        self.number, self.queues = number, queues
        self.name, self.mac = f"t{number}", f"52:54:00:00:00:0{number}"
        many = ("multi_queue",) if queues > 1 else ()
        ip("tuntap", "add", "dev", self.name, "mode", "tap", *many)
        ip("addr", "add", f"10.7.{number}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def netdev(self) -> dict[str, Any]:
        many = {"queues": self.queues} if self.queues > 1 else {}
        return {"type": "tap", "id": self.name, "ifname": self.name, "script": "no", "downscript": "no", **many}

    def device(self) -> dict[str, Any]:
        many = {"mq": True, "vectors": 2 * self.queues + 2} if self.queues > 1 else {}
        return {"driver": "virtio-net-pci", "netdev": self.name, "id": f"d{self.number}", "mac": self.mac, **many}

    def words(self) -> list[str]:
        return ["-netdev", json.dumps(self.netdev()), "-device", json.dumps(self.device())]

    def check(self, guest: Guest) -> None:
        """Have packets go there and back from each of the guest's processors, which have queues of their own."""
        find = f'dev=$(grep -l "^{self.mac}$" /sys/class/net/*/address | cut -d/ -f5); [ -n "$dev" ]'
        address = f"10.7.{self.number}.2"
        found = guest.check(
            f"modprobe virtio_net; {wait_for(find)}; ip addr add {address}/24 dev $dev && ip link set $dev up && "
            f"for cpu in 1 2 4 8; do taskset $cpu ping -c 2 -W 5 -s 1400 10.7.{self.number}.1 >/dev/null || exit 1; done; "
            "ls -d /sys/class/net/$dev/queues/rx-* | wc -l"
        )
        assert int(found) == self.queues


def test_a_guest_talks_over_taps(launch: Launch, shared_tmp: Path) -> None:
    nics = [Nic(1), Nic(2, queues=4), Nic(3), Nic(4, queues=4)]
    home = shared_tmp / "home"
    home.mkdir()
    slots = [word for n in range(2) for word in ("-device", f"pcie-root-port,id=slot{n},chassis={n + 1},bus=pcie.0")]
    machine = [*machine_options(home, "tcg", 256, "qemu_userns_serve"), "-smp", "4", *nics[0].words(), *nics[1].words(), *slots]
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as stack:
        with theirs:
            command = port_options("command", f"socket,fd={theirs.fileno()}")
            vm = stack.enter_context(
                plugged(shared_tmp / "vm", launch, *command, machine=machine, pass_fds=(theirs.fileno(),))
            )
        guest = Guest(ours)
        for nic in nics[:2]:
            nic.check(guest)
        for slot, nic in enumerate(nics[2:]):
            vm.qmp.execute("netdev_add", **nic.netdev())
            vm.qmp.execute("device_add", bus=f"slot{slot}", **nic.device())
            nic.check(guest)
            unplug(vm.qmp, f"d{nic.number}")
            vm.qmp.execute("netdev_del", id=nic.name)
