"""Plans of passt's networks: what passt is given, what QEMU reads instead, and what is left to QEMU or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qemu_userns.catalogue.commands import find_command_needs, read_command
from qemu_userns.plan.command import build_command_plan
from qemu_userns.plan.facts import ABSENT, MISSING, PathFact
from qemu_userns.plan.grants import Refuse
from qemu_userns.plan.passt import list_programs
from tests.plans import USER, asked_for, make_facts, plan_of

SINCE = (10, 1)
PASST = "/usr/local/bin/passt --quiet"
ABSENT_PROGRAMS = {path: PathFact(path, path, ABSENT, error=MISSING) for path in (*list_programs("passt"), "passt")}
NAMES = '"param":[{"str":"--trace"},{"str":"-4"}]'


def refusal(words: str, **more: Any) -> tuple[str, str, str]:
    (found,) = (grant for grant in plan_of("-netdev", words, version=SINCE, **more).grants if isinstance(grant, Refuse))
    return found.why, found.reason, found.hint or ""


@pytest.mark.parametrize(
    ("option", "before", "after", "program"),
    [
        ("netdev", "passt,id=n", "socket,id=n,fd=301", PASST),
        ("netdev", "type=passt,id=n,path=/x/passt", "type=socket,id=n,fd=301", "/x/passt --quiet"),
        ("netdev", "passt,id=n,path=./passt", "socket,id=n,fd=301", "/home/user/./passt --quiet"),
        ("netdev", "passt,quiet=off,id=n", "socket,id=n,fd=301", "/usr/local/bin/passt"),
        ("netdev", "passt,id=n,mtu=1400,mac=a,dns=", "socket,id=n,fd=301", f"{PASST} --mtu=1400 --dns= --mac-addr=a"),
        ("netdev", "passt,id=n,outbound-if4=on,ipv6=off", "socket,id=n,fd=301", f"{PASST} --outbound-if4=on --ipv4-only"),
        ("netdev", "passt,id=n,notcp,udp=on,dhcp=off,freebind", "socket,id=n,fd=301", f"{PASST} --no-tcp --no-dhcp --freebind"),
        (
            "netdev",
            "passt,id=n,tcp-ports=2222:22,tcp-ports=80,param=--trace,param=-4,search=a,search=b",
            "socket,id=n,fd=301",
            f"{PASST} --search=a b --tcp-ports=2222:22,80 --trace -4",
        ),
        ("nic", "passt,mac=a,model=virtio,mtu=9", "socket,mac=a,model=virtio,fd=301", f"{PASST} --mtu=9"),
        ("net", "passt", "socket,fd=301", PASST),
        ("netdev", '{"type":"passt","id":"n","vhost-user":false}', '{"type":"socket","id":"n","fd":"301"}', PASST),
        (
            "netdev",
            f'{{{NAMES}, "type":"passt","tcp-ports": [ {{"str":"80"}} ] ,"id":"n","udp":false}}',
            '{"type":"socket" ,"id":"n","fd":"301"}',
            f"{PASST} --no-udp --tcp-ports=80 --trace -4",
        ),
    ],
)
def test_passt_runs_outside(option: str, before: str, after: str, program: str) -> None:
    plan = plan_of(f"-{option}", before, version=SINCE)
    assert asked_for(plan) == [f"{program} --fd=3"]
    assert plan.words[-1].replace(" ", "") == after.replace(" ", "")


@pytest.mark.parametrize(
    ("words", "version"),
    [
        ("passt,id=n", (10, 0)),
        ("passt,id=n,mtu=x", SINCE),
        ("passt,id=n,tcp=maybe", SINCE),
    ],
)
def test_what_qemu_refuses_is_left_to_it(words: str, version: tuple[int, int]) -> None:
    plan = plan_of("-netdev", words, version=version)
    assert (plan.words[-1], asked_for(plan)) == (words, [])


def test_what_is_no_option_of_passts_stays_for_qemu_to_refuse() -> None:
    assert plan_of("-netdev", "passt,id=n,bogus=1", version=SINCE).words[-1] == "socket,id=n,bogus=1,fd=301"


def test_a_passt_that_is_not_there_and_one_of_vhost_user_are_refused() -> None:
    hint = "install passt (Debian: passt), or name it by path="
    missing = "there is no such program"
    assert refusal("passt,id=n", paths=ABSENT_PROGRAMS) == ("-netdev passt passt", missing, hint)
    assert refusal("passt,id=n,path=/x/new") == ("-netdev path /x/new", missing, hint)
    why, reason, hint = refusal("passt,id=n,vhost-user=on")
    assert (why, reason[:31], hint[:26]) == ("-netdev passt", "a nic of vhost-user takes no fd", "leave vhost-user=on out, o")


def test_a_passt_of_a_command_is_passed_by_name() -> None:
    before: dict[str, Any] = {"type": "passt", "id": "n", "param": [{"str": "-4"}], "address": "10.0.2.15"}
    text = json.dumps({"execute": "netdev_add", "arguments": before, "id": 1})
    objects = read_command("netdev_add", text)
    needs = find_command_needs("netdev_add", objects)
    found = build_command_plan("netdev_add", text, objects, needs, make_facts(), USER, 7, version=SINCE)
    after = {"type": "socket", "id": "n", "fd": "qemu-userns.7"}
    assert json.loads(found.text) == {"execute": "netdev_add", "arguments": after, "id": 1}
    assert found.find_names() == (("qemu-userns.7", 0),)
    assert [grant.describe() for grant in found.grants] == [
        f"fd 0: a socket to {PASST} --address=10.0.2.15 -4 --fd=3, run outside, which ends with it"
    ]
