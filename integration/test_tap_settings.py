"""Taps that our settings set up: bridge, MTU, MAC address, owner; in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.networks import Scripts, interfaces, ip, own_network
from integration.plugged import plugged
from integration.shares import Launch, dropin_words, launches
from integration.talk import as_user, home_of, is_alive, outcome, running, started, supervisor_of, wait_until
from integration.test_net import LIMIT_S, NO_SCRIPTS, OURS, Booted, Nic, another_network, said, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

MAC = "52:54:00:12:34:56"


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> Iterator[None]:
    with own_network(tmp_path):
        ip("link", "add", "b0", "type", "bridge")
        ip("link", "set", "b0", "up")
        yield


@pytest.fixture
def scripts(shared_tmp: Path) -> Scripts:
    return Scripts(shared_tmp)


@pytest.fixture(params=launches(), ids=str)
def launch(request: pytest.FixtureRequest) -> Launch:
    assert isinstance(request.param, Launch)
    return request.param


def link(name: str) -> dict[str, Any]:
    (found,) = json.loads(ip("-json", "-details", "link", "show", "dev", name))
    assert isinstance(found, dict)
    return found


def brief(name: str) -> list[object]:
    """Return what the settings set, and whether the tap is persistent."""
    found = link(name)
    info = found["linkinfo"]["info_data"]
    return [
        *(found.get(key) for key in ("master", "mtu", "address")),
        info.get("user"),
        "UP" in found["flags"],
        info["persist"],
    ]


def test_a_tap_is_set_up(launch: Launch, scripts: Scripts) -> None:
    scripts.make("default", path=Path("/etc/qemu-ifup"))
    words = ("-userns", f"tap.n.bridge=b0,tap.n.mtu=9000,tap.n.mac={MAC},tap.n.owner=daemon", "-netdev")
    for value in ("tap,id=n,queues=2", f"tap,id=n,ifname=t0,script={scripts.make('up')}"):
        with running(words_of(launch), *words, value, idle=False) as vm:
            (name,) = set(interfaces()) - {"b0"}
            assert name == ("t0" if "ifname" in value else "tap0")
            assert brief(name) == ["b0", 9000, MAC, "daemon", True, False]
            vm.quit()
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
    assert scripts.said() == ["up 1 t0 there"]


def test_a_tap_that_is_killed_goes_too(launch: Launch) -> None:
    with started([*words_of(launch), "-userns", "tap.n.bridge=b0,tap.n.up=off", "-netdev", "tap,id=n"]) as process:
        wait_until(lambda: "qemu-system" in os.readlink(f"/proc/{process.pid}/exe"), "QEMU")
        assert brief("tap0")[0::4] == ["b0", False]
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: interfaces() == ["b0"], "the end of the tap")


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        ("tap.n.bridge=none", "there is no bridge none", "ip link add none type bridge"),
        ("tap.n.bridge=lo", "Operation not supported", "name a bridge"),
        ("tap.n.mtu=1500,tap.n.bridge=b0", "there is such an interface already", "leave ifname= out"),
    ],
)
def test_what_cannot_be_set_up_stops_the_launch(launch: Launch, settings: str, reason: str, hint: str) -> None:
    ip("tuntap", "add", "dev", "mine", "mode", "tap")
    name = ",ifname=mine" if "already" in reason else ",ifname=t0"
    text = said(launch, "-userns", settings, "-netdev", f"tap,id=n{name}")
    assert re.search(f"-netdev tap.* tap.n.*{reason}", text), text
    assert f"hint: {hint}" in text
    assert interfaces() == ["b0", "mine"]
    assert link("mine")["mtu"] == 1500


def test_only_settings_take_pyroute2(launch: Launch) -> None:
    """Without it, which is to say with nothing where it is installed, there are taps, and a bridge's by its helper."""
    package = find_spec("pyroute2")
    assert package is not None
    assert package.origin is not None
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {Path(package.origin).parents[1]} && exec "$@"', "sh"]
    words = [*hide, *words_of(launch)]
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")
    for value in (f"tap,id=n,ifname=t0,{NO_SCRIPTS}", f"tap,id=n,{NO_SCRIPTS}", "bridge,id=n,br=b0"):
        with running(words, "-netdev", value, idle=False) as vm:
            assert interfaces() == ["b0", "t0" if "ifname" in value else "tap0"]
            vm.quit()
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
    status, _, stderr = outcome(words, "-userns", "tap.n.bridge=b0", "-netdev", "tap,id=n")
    reason = "qemu-userns: -netdev tap tap.n: the Python package pyroute2 is missing\nhint: Debian: python3-pyroute2; "
    assert (status, stderr[: len(reason)]) == (1, reason)


def test_a_user_is_told_which_right_is_missing(unprivileged_user: str) -> None:
    ip("tuntap", "add", "dev", "mine", "mode", "tap", "user", unprivileged_user)
    words = as_user(unprivileged_user, *dropin_words(), "-M", "none", "-userns", "tap.n.bridge=b0", "-netdev")
    for value in ("tap,id=n", "tap,id=n,ifname=mine"):
        ended = subprocess.run(
            [*words, value], capture_output=True, text=True, timeout=LIMIT_S, env=home_of(unprivileged_user), cwd="/", check=False
        )
        assert ended.returncode == 1
        assert "tap.n: to make a tap and to set it up takes CAP_NET_ADMIN\nhint: have root make" in ended.stderr


def test_explain_shows_it() -> None:
    words = [OURS, "explain", "--tap.n.bridge=b0", "--tap.n.mtu=1400", "qemu-system-x86_64", "-netdev", "tap,id=n,ifname=t0"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    assert re.search(
        r"fd \d+: tap t0, in bridge b0, mtu 1400, up$|fd \d+: tap t0, in bridge b0, mtu 1400, up ", shown, re.MULTILINE
    )
    assert interfaces() == ["b0"]


def test_a_tap_is_plugged_in_and_out(launch: Launch, shared_tmp: Path) -> None:
    """By netdev_add of QMP and HMP, and after another supervisor has taken over."""
    with plugged(shared_tmp / "vm", launch, "-userns", f"tap.n.bridge=b0,tap.n.mac={MAC}") as vm:
        for again in (False, True):
            client = vm.client(5) if again else vm.qmp
            client.execute("netdev_add", type="tap", id="n")
            assert brief("tap0") == ["b0", 1500, MAC, None, True, False]
            client.execute("netdev_del", id="n")
            wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
            assert client.hmp("netdev_add tap,id=n,ifname=t0") == ""
            assert brief("t0")[0] == "b0"
            assert client.hmp("netdev_del n") == ""
            wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
            if not again:
                os.kill(supervisor := supervisor_of(vm.process.pid), signal.SIGKILL)
                wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
                subprocess.run([OURS, "adopt", str(vm.process.pid)], timeout=LIMIT_S, check=True)
        ip("link", "del", "b0")
        assert "there is no bridge b0" in client.refused("netdev_add", type="tap", id="n")
        assert interfaces() == []


def test_it_is_set_up_in_the_network_that_is_named(launch: Launch) -> None:
    """A bridge of the same name is in both."""
    with another_network() as other:
        inside = ["nsenter", f"--net=/proc/{other}/ns/net", "ip"]
        subprocess.run([*inside, "link", "add", "b0", "type", "bridge"], check=True)
        words = ("-userns", f"net=/proc/{other}/ns/net,tap.n.bridge=b0", "-netdev", "tap,id=n,ifname=t0")
        with running(words_of(launch), *words, idle=False) as vm:
            shown = subprocess.run([*inside, "-json", "link", "show", "dev", "t0"], check=True, capture_output=True).stdout
            assert json.loads(shown)[0]["master"] == "b0"
            assert interfaces() == ["b0"]
            vm.quit()


class MadeNic(Nic):
    """A nic whose tap is made for it."""

    def __init__(self, number: int, queues: int = 1) -> None:
        self.number, self.queues = number, queues
        self.name, self.mac = f"t{number}", f"52:54:00:00:00:0{number}"

    def netdev(self) -> dict[str, Any]:
        return {"type": "tap", "id": self.name, **({"queues": self.queues} if self.queues > 1 else {})}

    def words(self) -> list[str]:
        return ["-userns", f"tap.{self.name}.bridge=b0", *super().words()]


def test_two_guests_talk_over_the_bridge(shared_tmp: Path) -> None:
    """One tap is there from the start, the other one is plugged in; the ids of one are leased, the other is somebody's."""
    first, second = MadeNic(1), MadeNic(2, queues=2)
    with contextlib.ExitStack() as stack:
        one = Booted(stack, shared_tmp / "1", launches()[0], [first])
        two = Booted(stack, shared_tmp / "2", launches()[-1], [], ["-userns", f"tap.{second.name}.bridge=b0"])
        two.plug(second, 0)
        for booted, nic in ((one, first), (two, second)):
            nic.find(booted.guest, f"10.8.0.{nic.number}/24")
        assert sorted(os.listdir("/sys/class/net/b0/brif")) == ["tap0", "tap1"]
        one.guest.check("ping -A -c 2 -W 5 -s 1400 10.8.0.2 >/dev/null")
        two.guest.check("ping -A -c 2 -W 5 -s 1400 10.8.0.1 >/dev/null")
        two.unplug(second)
        wait_until(lambda: os.listdir("/sys/class/net/b0/brif") == ["tap0"], "the end of the tap")
