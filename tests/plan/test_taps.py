"""Plans of taps: what QEMU reads in place of the caller's words, at launch and by a command, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qemu_userns.catalogue.commands import HMP, find_command_needs, read_command
from qemu_userns.catalogue.twins import find_twin
from qemu_userns.plan.build import Settings
from qemu_userns.plan.command import CommandPlan, build_command_plan
from qemu_userns.plan.facts import ABSENT, CHARACTER, MISSING, PathFact
from qemu_userns.plan.grants import OpenFd, Reserved, Tap, TapSettings
from qemu_userns.plan.refusals import NO_NODE as NO_NODE_THERE
from qemu_userns.plan.taps import HELPERS
from tests.plans import USER, asked_for, brief, make_facts, plan_of

HELPER = "/usr/lib/qemu/qemu-bridge-helper --use-vnet --fd=3"
NO_NODE = PathFact("/dev/net/tun", "/dev/net/tun", ABSENT)
CLOSED = PathFact("/dev/net/tun", "/dev/net/tun", CHARACTER, mode=0o20600, readable=False)
N = "qemu-userns.7"
MAC = "52:54:00:00:00:01"


def last_word(*words: str, **more: Any) -> str:
    return plan_of(*words, **more).words[-1]


@pytest.mark.parametrize(
    ("option", "before", "after", "grants"),
    [
        ("netdev", "tap,id=n", "tap,id=n,fd=301", ["tap any x1"]),
        ("netdev", "tap,id=n,ifname=t0,script=no,downscript=no", "tap,id=n,fd=301", ["tap t0 x1 no no None"]),
        ("netdev", "tap,ifname=t0,script=,id=n,sndbuf=1M", "tap,id=n,sndbuf=1M,fd=301", ["tap t0 x1 no /etc/qemu-ifdown None"]),
        ("netdev", "tap,id=n,vnet_hdr=off", "tap,id=n,fd=301", ["tap any x1 /etc/qemu-ifup /etc/qemu-ifdown False"]),
        ("netdev", "tap,vnet_hdr,id=n", "tap,id=n,fd=301", ["tap any x1 /etc/qemu-ifup /etc/qemu-ifdown True"]),
        ("netdev", "tap,id=n,script=up,downscript=/x/down", "tap,id=n,fd=301", ["tap any x1 /home/user/up /x/down None"]),
        ("netdev", "tap,id=n,queues=3,ifname=t0", "tap,id=n,fds=301:302:303", ["tap t0 x3"]),
        ("netdev", "tap,id=n,queues=1", "tap,id=n,fd=301", ["tap any x1"]),
        ("netdev", "tap,id=n,ifname=a-name-that-is-too-long", "tap,id=n,fd=301", ["tap a-name-that-is- x1"]),
        ("nic", "tap,queues=2,model=virtio", "tap,model=virtio,fds=301:302", ["tap any x2"]),
        ("net", "tap,ifname=t0", "tap,fd=301", ["tap t0 x1"]),
        ("netdev", "tap,id=n,vhost=on", "tap,id=n,vhost=on,fd=301,vhostfd=302", ["tap any x1", "open /dev/vhost-net rw alone"]),
        (
            "netdev",
            "tap,id=n,vhostforce=on,queues=2",
            "tap,id=n,vhostforce=on,fds=301:302,vhostfds=303:304",
            ["tap any x2", *["open /dev/vhost-net rw alone"] * 2],
        ),
        ("netdev", "tap,id=n,vhost=off,vhostforce=on", "tap,id=n,vhost=off,vhostforce=on,fd=301", ["tap any x1"]),
        (
            "netdev",
            "tap,id=n,fds=8:9,vhost=on",
            "tap,id=n,fds=8:9,vhost=on,vhostfds=301:302",
            ["fd 8", "fd 9", *["open /dev/vhost-net rw alone"] * 2],
        ),
        ("netdev", "tap,id=n,fd=9,vhost=on,vhostfd=8", "tap,id=n,fd=9,vhost=on,vhostfd=8", ["fd 9", "fd 8"]),
        ("netdev", "bridge,id=n", "tap,id=n,fd=301", [f"{HELPER} --br=br0"]),
        ("netdev", "bridge,br=b,id=n,helper=/x/h", "tap,id=n,fd=301", ["/x/h --use-vnet --fd=3 --br=b"]),
        ("netdev", "type=bridge,id=n", "type=tap,id=n,fd=301", [f"{HELPER} --br=br0"]),
        ("net", "bridge", "tap,fd=301", [f"{HELPER} --br=br0"]),
        ("nic", "tap,helper=h a,br=b", "tap,fd=301", ["/bin/sh -c h a --use-vnet --fd=3 --br=b"]),
        ("nic", "tap,helper=h --br=x", "tap,fd=301", ["/bin/sh -c h --br=x --use-vnet --fd=3"]),
        (
            "netdev",
            '{"type":"tap","id":"n","queues":2,"vnet_hdr":false}',
            '{"type":"tap","id":"n","fds":"301:302"}',
            ["tap any x2 /etc/qemu-ifup /etc/qemu-ifdown False"],
        ),
        ("netdev", '{"type":"bridge","id":"n","br":"b"}', '{"type":"tap","id":"n","fd":"301"}', [f"{HELPER} --br=b"]),
    ],
)
def test_a_tap_is_opened_outside(option: str, before: str, after: str, grants: list[str]) -> None:
    plan = plan_of(f"-{option}", before, fds=(8, 9))
    assert (plan.words[-1], asked_for(plan)) == (after, grants)


def test_a_tap_of_a_configuration_file_and_of_set() -> None:
    text = '[netdev "n"]\n  type = "tap"\n  ifname = "t0"\n  vhost = "on"\n'
    plan = plan_of("-readconfig", "/x/file", "-set", "netdev.n.script=no", configs={1: text})
    assert plan.words[-2:] == ("-readconfig", "/x/file")
    copy = next(grant for grant in plan.grants if type(grant).__name__ == "Copy")
    expected = '[netdev "n"]\n  type = "tap"\n#\n  vhost = "on"\n  fd = "301"\n  vhostfd = "302"\n'
    assert getattr(copy, "content", None) == expected
    assert [grant.script for grant in plan.grants if isinstance(grant, Tap)] == [""]


@pytest.mark.parametrize(
    "words",
    [
        ("-netdev", "tap,id=n,queues=x"),
        ("-netdev", "tap,id=n,queues=0"),
        ("-netdev", "tap,id=n,queues=257"),
        ("-netdev", "tap,id=n,vnet_hdr=maybe"),
        ("-net", "tap,queues=2"),
        ("-netdev", "tap,id=n,helper=/x/h,ifname=t0"),
        ("-netdev", "bridge,id=n,ifname=t0"),
    ],
)
def test_what_qemu_refuses_is_left_to_it(words: tuple[str, ...]) -> None:
    assert (last_word(*words), asked_for(plan_of(*words))) == (words[-1], [])


def test_without_vhost_net_qemu_says_so_or_goes_on() -> None:
    words = ("-netdev", "tap,id=n,fd=9,vhost=on")
    absent = PathFact("/dev/vhost-net", "/dev/vhost-net", ABSENT)
    closed = PathFact("/dev/vhost-net", "/dev/vhost-net", CHARACTER, mode=0o20600)
    for fact, grants in ((absent, []), (closed, ["device /dev/vhost-net"])):
        plan = plan_of(*words, fds=(9,), paths={"/dev/vhost-net": fact})
        assert (plan.words[-1], asked_for(plan)) == (words[-1], ["fd 9", *grants])


def refusal(*words: str, **more: Any) -> tuple[str, str, str | None]:
    (found,) = plan_of(*words, **more).find_refusals()
    return found.why, found.reason, found.hint


def test_a_missing_right_is_named_before_anything_is_opened() -> None:
    tap = ("-netdev", "tap,id=n,ifname=t0")
    node = "-netdev tap /dev/net/tun"
    assert refusal(*tap, paths={"/dev/net/tun": NO_NODE}) == (node, NO_NODE_THERE, "load the kernel's module tun: modprobe tun")
    hint = "it belongs to 0:0 and has mode 0600; be its owner, in its group, or change the mode"
    assert refusal(*tap, paths={"/dev/net/tun": CLOSED}) == (node, "Permission denied", hint)
    hint = "have root make one: ip tuntap add dev t0 mode tap user user"
    assert refusal(*tap, refused_taps=(("", "new"), ("t0", "it belongs to uid 7"))) == (
        "-netdev tap t0",
        "it belongs to uid 7",
        hint,
    )
    found = refusal("-nic", "tap,queues=2", refused_taps=(("", "new"),))
    hint = "have root make one: ip tuntap add dev tap0 mode tap user user multi_queue, and name it by ifname=tap0"
    assert found == ("-nic tap", "new", hint)


@pytest.mark.parametrize("option", ["-netdev", "-nic", "-net"])
def test_a_helper_that_is_not_there_is_named_before_anything_is_opened(option: str) -> None:
    gone = {path: PathFact(path, path, ABSENT) for path in HELPERS}
    value = "bridge,id=n" if option == "-netdev" else "bridge"
    found = refusal(option, value, paths=gone)
    hint = "install it (Debian: qemu-system-common), or name another by helper="
    assert found == (f"{option} bridge {HELPERS[0]}", MISSING, hint)
    plan = plan_of(option, f"{value},helper=/x/h", paths=gone)
    assert asked_for(plan) == ["/x/h --use-vnet --fd=3 --br=br0"]


def test_a_helper_that_cannot_is_named_before_anything_is_opened() -> None:
    refused = (("/x/h", "b", "it cannot", "make it so"),)
    found = refusal("-netdev", "bridge,id=n,helper=/x/h,br=b", refused_helpers=refused)
    assert found == ("-netdev bridge /x/h", "it cannot", "make it so")
    plan = plan_of("-netdev", "bridge,id=n,helper=/x/h,br=c", refused_helpers=refused)
    assert asked_for(plan) == ["/x/h --use-vnet --fd=3 --br=c"]


def test_the_first_helper_that_is_there_is_run() -> None:
    gone = PathFact(HELPERS[0], HELPERS[0], ABSENT)
    plan = plan_of("-netdev", "bridge,id=n", paths={HELPERS[0]: gone})
    assert asked_for(plan) == [f"{HELPERS[1]} --use-vnet --fd=3 --br=br0"]


def test_the_supervisor_stays_for_a_downscript_alone() -> None:
    def stays(tap: str) -> bool:
        return any(isinstance(grant, Reserved) and grant.what == "supervisor" for grant in plan_of("-netdev", tap).grants)

    assert stays("tap,id=n,script=no")
    assert not stays("tap,id=n,downscript=no")
    assert not stays("bridge,id=n")


def test_what_is_handed_over_is_described() -> None:
    plan = plan_of("-netdev", "tap,id=n,ifname=t0,queues=2", "-netdev", "bridge,id=b")
    assert [grant.describe() for grant in plan.grants if type(grant).__name__ in ("Tap", "Helper")] == [
        "fds 301, 302: tap t0, 2 queues, /etc/qemu-ifup run outside, /etc/qemu-ifdown run outside at its end",
        f"fd 303: the tap that {HELPER} --br=br0 opens, run outside",
    ]
    assert "`info network`" in plan.rewrites[0].why


# --- with settings ----------------------------------------------------------------------------------------------------

TAP = TapSettings("n", "br0", 9000, "52:54:00:12:34:56", 7)
SET = Settings(taps=(TAP,))


@pytest.mark.parametrize(
    ("words", "scripts"),
    [
        (("-netdev", "tap,id=n"), ("", "")),
        (("-nic", "tap,id=n"), ("", "")),
        (("-net", "tap,id=n,ifname=t0,script=/x/up"), ("/x/up", "")),
        (("-netdev", '{"type":"tap","id":"n","downscript":"down"}'), ("", "/home/user/down")),
    ],
)
def test_settings_stand_in_for_the_scripts_that_nobody_has_named(words: tuple[str, ...], scripts: tuple[str, str]) -> None:
    (tap,) = [grant for grant in plan_of(*words, settings=SET).grants if isinstance(grant, Tap)]
    assert (tap.settings, (tap.script, tap.downscript)) == (TAP, scripts)
    assert ", in bridge br0, mtu 9000, mac 52:54:00:12:34:56, of uid 7, up" in tap.describe()


def test_settings_of_others_change_nothing() -> None:
    assert plan_of("-netdev", "tap,id=m", settings=SET) == plan_of("-netdev", "tap,id=m")


@pytest.mark.parametrize(
    "words", [("-netdev", "tap,id=n,fd=9"), ("-netdev", "bridge,id=n"), ("-netdev", "user,id=n"), ("-nic", "user,id=n")]
)
def test_settings_of_what_is_not_made_here_are_refused(words: tuple[str, ...]) -> None:
    hint = "leave the settings out, or have one made: -netdev tap,id=n"
    assert refusal(*words, settings=SET, fds=(9,)) == (f"{words[0]} n", "tap.n is for a tap that is made for the VM", hint)


def test_settings_that_cannot_be_had_are_refused_before_anything_is_opened() -> None:
    facts = make_facts().replace(refused_settings=(("m", "other", "no"), ("n", "there is no bridge br0", "make one")))
    text = json.dumps({"execute": "netdev_add", "arguments": {"type": "tap", "id": "n"}})
    objects = read_command("netdev_add", text)
    needs = find_command_needs("netdev_add", objects)
    found = build_command_plan("netdev_add", text, objects, needs, facts, USER, 7, taps=(TAP,))
    assert [(it.why, it.reason, it.hint) for it in found.find_refusals()] == [
        ("netdev_add tap tap.n", "there is no bridge br0", "make one")
    ]
    (tap,) = build_command_plan("netdev_add", text, objects, needs, make_facts(), USER, 7, taps=(TAP,)).grants
    assert isinstance(tap, Tap)
    assert tap.settings == TAP


# --- by a command -----------------------------------------------------------------------------------------------------


def add(text: str) -> CommandPlan:
    objects = read_command("netdev_add", text)
    return build_command_plan("netdev_add", text, objects, find_command_needs("netdev_add", objects), make_facts(), USER, 7)


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ({"type": "tap", "id": "n", "ifname": "t0"}, {"type": "tap", "id": "n", "fd": N}, 1),
        (
            {"type": "tap", "id": "n", "queues": 2, "vhost": True},
            {"type": "tap", "id": "n", "vhost": True, "fds": f"{N}:qemu-userns.8", "vhostfds": "qemu-userns.9:qemu-userns.10"},
            4,
        ),
        ({"type": "bridge", "id": "n", "br": "b"}, {"type": "tap", "id": "n", "fd": N}, 1),
        (
            {"type": "tap", "id": "n", "fd": "mine", "vhost": True},
            {"type": "tap", "id": "n", "fd": "mine", "vhost": True, "vhostfd": N},
            1,
        ),
        ({"type": "tap", "id": "n", "queues": 65}, {"type": "tap", "id": "n", "queues": 65}, 0),
    ],
)
def test_a_command_names_its_fds(before: dict[str, Any], after: dict[str, Any], count: int) -> None:
    found = add(json.dumps({"execute": "netdev_add", "arguments": before, "id": 1}))
    assert json.loads(found.text) == {"execute": "netdev_add", "arguments": after, "id": 1}
    assert found.find_names() == tuple((f"qemu-userns.{7 + number}", number) for number in range(count))
    assert all(isinstance(grant, OpenFd) or brief(grant) for grant in found.grants)


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("netdev_add tap,id=n", {"type": "tap", "id": "n"}),
        (
            "netdev_add tap,id=n,queues=4,vhost=on,sndbuf=1M,novnet_hdr",
            {"type": "tap", "id": "n", "queues": 4, "vhost": True, "sndbuf": 1 << 20, "vnet_hdr": False},
        ),
        ("netdev_add bridge,id=n,br=b,id=m", {"type": "bridge", "id": "n", "br": "b"}),
        (
            "netdev_add passt,id=n,mtu=1400,notcp,param=-4,param=--trace,mac=52:54:00:00:00:01",
            {"type": "passt", "id": "n", "mtu": 1400, "tcp": False, "param": [{"str": "-4"}, {"str": "--trace"}], "mac": MAC},
        ),
        ("netdev_add passt,id=n,ifname=x", None),
        ("netdev_add tap,id=n,mtu=1400", None),
        ("netdev_add tap,id=n,fd=9", None),
        ("netdev_add tap,id=n,bogus=9", None),
        ("netdev_add tap,id=n,queues=x", None),
        ("netdev_add tap,id=n,vhost=maybe", None),
        ("netdev_add user,id=n", None),
        ("info network", None),
    ],
)
def test_the_twin_of_an_hmp_command(line: str, arguments: dict[str, Any] | None) -> None:
    found = find_twin(read_command(HMP, json.dumps({"execute": HMP, "arguments": {"command-line": line}})))
    assert (found and json.loads(found)) == (arguments and {"execute": "netdev_add", "arguments": arguments})
