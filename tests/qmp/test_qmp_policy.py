"""Rights of clients, and the names of fds."""

import pytest

from qemu_userns.qmp.message import build_command, parse_command
from qemu_userns.qmp.names import MAX_NAMES, FdNames, Found
from qemu_userns.qmp.policy import FULL, Policy, read_hmp_names

READ_ONLY = Policy(read_only=True)


def find_denied(policy: Policy, name: str, **arguments: object) -> str | None:
    command = parse_command(build_command(name, {key.replace("_", "-"): value for key, value in arguments.items()}))
    assert command
    return policy.find_denied(command)


@pytest.mark.parametrize(
    ("policy", "name", "denied"),
    [
        (READ_ONLY, "query-status", None),
        (READ_ONLY, "qmp_capabilities", None),
        (READ_ONLY, "qom-get", None),
        (READ_ONLY, "qom-set", "qom-set"),
        (READ_ONLY, "qom-list-get", "qom-list-get"),
        (READ_ONLY, "quit", "quit"),
        (READ_ONLY, "ringbuf-read", "ringbuf-read"),
        (READ_ONLY, "transaction", "transaction"),
        (READ_ONLY, "querystatus", "querystatus"),
        (READ_ONLY, "query-*", None),
        (Policy(allow=frozenset(["stop"])), "stop", None),
        (Policy(allow=frozenset(["stop"])), "qmp_capabilities", None),
        (Policy(allow=frozenset(["stop"])), "query-status", "query-status"),
        (Policy(allow=frozenset(["query-*"])), "query-status", None),
        (Policy(deny=frozenset(["quit"])), "quit", "quit"),
        (Policy(deny=frozenset(["quit"])), "stop", None),
        (Policy(deny=frozenset(["quit"])), "human-monitor-command", "human-monitor-command"),
        (Policy(read_only=True, deny=frozenset(["query-fdsets"])), "query-fdsets", "query-fdsets"),
        (Policy(read_only=True, allow=frozenset(["quit"])), "quit", "quit"),
    ],
)
def test_commands(policy: Policy, name: str, denied: str | None) -> None:
    assert find_denied(policy, name) == denied
    assert policy.restricted


def test_looking_shows_no_secret() -> None:
    assert find_denied(READ_ONLY, "qom-get", path="/objects/s", property="data") == "qom-get"
    assert find_denied(READ_ONLY, "qom-get", path="/objects/s", property="type") is None
    assert find_denied(Policy(allow=frozenset(["qom-get"])), "qom-get", path="/objects/s", property="data") is None


def test_full_rights_are_not_looked_at() -> None:
    assert not FULL.restricted
    assert find_denied(FULL, "quit") is None


@pytest.mark.parametrize(
    ("types", "denied"),
    [(["blockdev-backup"], None), (["blockdev-backup", "drive-backup"], "drive-backup"), ([5], ""), ([], None)],
)
def test_actions_of_a_transaction(types: list[object], denied: str | None) -> None:
    policy = Policy(allow=frozenset(["transaction", "blockdev-backup"]))
    assert find_denied(policy, "transaction", actions=[{"type": kind, "data": {}} for kind in types]) == denied
    assert find_denied(policy, "transaction", actions=["blockdev-backup"]) == ""


@pytest.mark.parametrize(
    ("policy", "line", "denied"),
    [
        (READ_ONLY, "info block", None),
        (READ_ONLY, " \tinfo", None),
        (READ_ONLY, "quit", "quit"),
        (READ_ONLY, "infoo", "infoo"),
        (READ_ONLY, "", "human-monitor-command"),
        (Policy(allow=frozenset(["*"])), "info block", "human-monitor-command"),
        (Policy(allow=frozenset(["*", "human-monitor-command"])), "quit", None),
        (Policy(allow=frozenset(["*", "human-monitor-command"]), deny=frozenset(["quit"])), "q", "q"),
        (Policy(allow=frozenset(["*", "human-monitor-command"]), deny=frozenset(["quit"])), "q/x", "q"),
        (Policy(allow=frozenset(["*", "human-monitor-command"]), deny=frozenset(["quit"])), "stop", None),
        (Policy(allow=frozenset(["human-monitor-command", "stop"])), "s", None),
        (Policy(allow=frozenset(["human-monitor-command", "stop"])), "cont", "cont"),
        (Policy(allow=frozenset(["human-monitor-command", "stop"])), "info x", None),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["info"])), "info x", "info"),
        (Policy(allow=frozenset(["human-monitor-command", "blockdev-change-medium"])), "change vnc password", "change"),
        (Policy(allow=frozenset(["human-monitor-command", "change"])), "change vnc password", None),
        (Policy(allow=frozenset(["human-monitor-command", "*"]), deny=frozenset(["change-vnc-password"])), "change a", "change"),
        (Policy(allow=frozenset(["human-monitor-command", "blockdev-change-medium", "change-vnc-password"])), "change a", None),
        (Policy(allow=frozenset(["human-monitor-command", "*"]), deny=frozenset(["object-add"])), "object_add x", "object_add"),
        (Policy(allow=frozenset(["human-monitor-command", "*"]), deny=frozenset(["device_*"])), "device_del x", "device_del"),
        (Policy(allow=frozenset(["human-monitor-command", "object-add"])), "object_add x", None),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["inf*"])), "info x", "info"),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["query-*"])), "info\tblock", "info"),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["query-block"])), "info  block", "info"),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["query-block"])), "info blockstats", None),
        (Policy(allow=frozenset(["human-monitor-command"]), deny=frozenset(["human-*"])), "info x", "human-monitor-command"),
    ],
)
def test_human_monitor_commands(policy: Policy, line: str, denied: str | None) -> None:
    assert find_denied(policy, "human-monitor-command", command_line=line) == denied
    assert find_denied(policy, "human-monitor-command", command_line=5) == "human-monitor-command"


def test_names_of_human_monitor_commands() -> None:
    lines = ("a", " a b", "a/b", "/a", "", " \v", "a\nb\tc")
    assert [read_hmp_names(line) for line in lines] == [
        ("a", ""),
        ("a", "b"),
        ("a", ""),
        ("", ""),
        ("", ""),
        ("", ""),
        ("a", "b"),
    ]


def test_names_of_one_client_stay_as_they_are() -> None:
    names = FdNames()
    assert names.choose(1, "a") == ""
    names.hold(1, "a", "")
    assert names.choose(1, "a") == ""
    assert names.find(1, "a") == Found("")
    assert names.find(1, "b") == Found("")


def test_clients_do_not_meet_in_a_name() -> None:
    names = FdNames()
    names.hold(1, "a", names.choose(1, "a"))
    names.hold(2, "a", names.choose(2, "a"))
    assert (names.find(1, "a"), names.find(2, "a")) == (Found(""), Found("#1"))
    assert names.find(3, "a").missing
    names.forget(1, "a")
    assert names.choose(3, "a") == ""
    assert names.leave(2) == []
    assert names.find(3, "a") == Found("#1")
    assert names.choose(3, "a") == "#1"


def test_what_a_client_leaves_replaces_what_was_left() -> None:
    names = FdNames()
    names.hold(1, "a", names.choose(1, "a"))
    names.hold(2, "a", names.choose(2, "a"))
    assert names.leave(1) == []
    assert names.leave(2) == ["a"]
    assert names.find(3, "a") == Found("#1")
    assert names.choose(3, "a") == "#1"
    names.hold(3, "a", "#1")
    assert names.find(4, "a") == Found("")


def test_names_are_bounded() -> None:
    names = FdNames()
    for number in range(MAX_NAMES + 10):
        names.hold(1, f"n{number}", "")
    assert len(names._suffixes) == len(names._used) == MAX_NAMES
    names.restore(["x"])
    assert names.find(2, "x") == Found("")
