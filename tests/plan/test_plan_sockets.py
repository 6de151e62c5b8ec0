"""Sockets that are made outside: what becomes of the words that name them."""

from __future__ import annotations

import pytest

from qemu_userns.plan.facts import SOCKET, PathFact
from tests.plans import asked_for, plan_of

CLIENT = "-netdev stream,id=n,addr.type=unix,addr.path=/x/sock-root,addr.abstract=off"
SERVER_JSON = '-netdev {"type":"stream","id":"n","server":true,"addr":{"path":"/x/new","tight":true,"type":"unix"}}'
NBD = "-blockdev nbd,node-name=d,server.type=unix,server.path=/x/sock-root,export=e"
NBD_DRIVE = "-drive if=none,file.driver=nbd,file.server.type=unix,file.server.path=/x/sock-root"
NBD_JSON = '-blockdev {"driver":"nbd","node-name":"d","server":{"type":"unix","path":"/x/sock-root"}}'


@pytest.mark.parametrize(
    ("words", "grant", "after"),
    [
        (CLIENT, "connect /x/sock-root", "stream,id=n,addr.type=fd,addr.str=301"),
        (SERVER_JSON, "listen /x/new", '{"type":"stream","id":"n","server":true,"addr":{"str":"301","type":"fd"}}'),
        (NBD, "connect /x/sock-root", "nbd,node-name=d,server.type=fd,server.str=301,export=e"),
        (NBD_DRIVE, "connect /x/sock-root", "if=none,file.driver=nbd,file.server.type=fd,file.server.str=301"),
        (NBD_JSON, "connect /x/sock-root", '{"driver":"nbd","node-name":"d","server":{"type":"fd","str":"301"}}'),
        (
            "-netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0",
            "open /dev/vhost-vdpa-0 rw alone",
            "vhost-vdpa,id=n,vhostfd=301",
        ),
        (
            '-netdev {"type":"vhost-vdpa","vhostdev":"/dev/vhost-vdpa-0","id":"n"}',
            "open /dev/vhost-vdpa-0 rw alone",
            '{"type":"vhost-vdpa","id":"n","vhostfd":"301"}',
        ),
    ],
)
def test_an_address_becomes_the_number_of_an_fd(words: str, grant: str, after: str) -> None:
    plan = plan_of(*words.split(), root=True)
    assert asked_for(plan) == [grant]
    assert plan.words[-1] == after


@pytest.mark.parametrize(
    "words",
    [
        f"{CLIENT},reconnect=1",
        f"{NBD},reconnect-delay=5",
        "-drive file=nbd:unix:/x/sock-root",
        "-netdev dgram,id=n,remote.type=unix,remote.path=/x/sock-root",
        "-netdev user,id=n,guestfwd=tcp:10.0.2.100:1-unix:/x/sock-root",
        "-vnc unix:/x/sock-root,reverse=on",
    ],
)
def test_what_connects_again_or_takes_no_fd_keeps_its_path(words: str) -> None:
    plan = plan_of(*words.split(), root=True)
    assert plan.words[-1] == words.partition(" ")[2]
    assert asked_for(plan) == (["ro /x"] if "reconnect=1" in words else ["ro /x/sock-root as owner"])
    if "reconnect=1" not in words:
        assert asked_for(plan_of(*words.split())) == ["refuse: QEMU's id 1000 may not connect to it"]


def test_a_socket_that_its_owner_may_not_connect_to_is_refused() -> None:
    closed = PathFact("/x/sock", "/x/sock", SOCKET, mode=0o140444, readable=True, writable=True)
    netdev = ("-chardev", "socket,id=c,path=/x/sock", "-netdev", "vhost-user,id=n,chardev=c")
    (refused,) = plan_of(*netdev, root=True, paths={"/x/sock": closed}).find_refusals()
    assert refused.reason == "QEMU's id 600000 may not connect to it"
    assert refused.hint == "it belongs to 0:0 and has mode 0444; change that, or use -run-with user="
    closed = closed.replace(writable=False)
    (refused,) = plan_of(*netdev, paths={"/x/sock": closed}).find_refusals()
    assert refused.hint == "it belongs to 0:0 and has mode 0444; be its owner, in its group, or change the mode"


@pytest.mark.parametrize("ours", ["/y", "/x"])
@pytest.mark.parametrize("theirs", ["/x/new", "/x/sock"])
def test_the_other_end_of_datagrams_may_come_later_and_anew(ours: str, theirs: str) -> None:
    words = f"dgram,id=n,local.type=unix,local.path={ours}/new,remote.type=unix,remote.path={theirs}"
    plan = plan_of("-netdev", words)
    assert (asked_for(plan), plan.words[-1]) == ([f"rw {ours}", "ro /x"], words)


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("-vnc unix:/x/new,password=on", "none,password=on"),
        ("-vnc password=on,vnc=unix:/x/new", "password=on,vnc=none"),
        ("-display vnc=unix:/x/new,lossy=on", "vnc=none,lossy=on"),
        ("-spice unix=on,addr=/x/new,disable-ticketing=on", "addr=/x/new,disable-ticketing=on"),
        ("-spice addr=/x/new,unix,seamless-migration=on", "addr=/x/new,seamless-migration=on"),
    ],
)
def test_a_display_starts_without_its_socket(words: str, after: str) -> None:
    plan = plan_of(*words.split())
    assert plan.words[-1] == after
    assert f"/dev/fd/{plan.find_number('config of qemu-userns')}" in plan.words
    assert plan.needs_supervisor


def test_a_display_takes_a_monitor_that_is_there() -> None:
    monitor = ("-qmp", "unix:/x/new,server=on,wait=off")
    assert asked_for(plan_of(*monitor, "-vnc", "unix:/y/new"))[-1] == "vnc /y/new by compat_monitor0"
    waits = ("-qmp", "unix:/x/new,server=on")
    assert asked_for(plan_of(*waits, "-vnc", "unix:/y/new"))[-1] == "vnc /y/new by qemu-userns"
