"""Plans of our own QMP sockets, of what clients may do, and of the monitor that is passed through."""

from __future__ import annotations

import itertools
import json

import pytest

from qemu_userns.catalogue.commands import HMP, find_command_needs, read_command
from qemu_userns.cli.explain import describe_plan
from qemu_userns.plan.build import Settings
from qemu_userns.plan.command import build_command_plan
from qemu_userns.plan.grants import KeepFd, Listen, Monitor, QmpSocket, Refuse, Reserved
from qemu_userns.plan.plan import Plan
from qemu_userns.plan.rights import READ_ONLY, MonitorRights, Rights, SocketRights, expand_path, find_rights
from tests.plans import UID, USER, asked_for, make_facts, plan_of, read

PLAIN = ("-qmp", "unix:/x/new,server=on,wait=off")
LOOK = Rights(READ_ONLY)


def with_sockets(*words: str, paths: tuple[str, ...] = ("/x/new-ours",), root: bool = False) -> Plan:
    return plan_of(*words, settings=Settings(sockets=tuple(SocketRights(path) for path in paths)), root=root)


def configs(plan: Plan) -> list[str]:
    return [grant.content for grant in plan.grants if isinstance(grant, Reserved) and grant.content is not None]


# --- our own sockets --------------------------------------------------------------------------------------------------


def test_a_socket_joins_the_callers_monitor() -> None:
    plan = with_sockets(*PLAIN)
    assert asked_for(plan) == ["monitor listens on /x/new", "socket /x/new-ours for compat_monitor0"]
    assert not configs(plan)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-nodefaults", "-M", "none", "-S", "-daemonize"),
        ("-qmp", "unix:/x/new,server=on"),  # a client of ours must not be the one that QEMU waits for
        ("-qmp-pretty", "unix:/x/new,server=on,wait=off"),
        ("-monitor", "stdio"),
    ],
)
def test_else_a_monitor_is_added_beside_the_default_one(words: tuple[str, ...]) -> None:
    plan = with_sockets(*words)
    assert asked_for(plan)[-2:] == ["monitor serves it on sockets of ours alone", "socket /x/new-ours for qemu-userns"]
    (monitor,) = [grant for grant in plan.grants if isinstance(grant, Monitor) and grant.label == "qemu-userns"]
    (config,) = configs(plan)
    assert f'[chardev "qemu-userns"]\n  backend = "socket"\n  fd = "{monitor.number}"\n' in config
    assert "-qmp" not in plan.words[1:3]
    assert "-mon" not in plan.words
    index = plan.words.index("-readconfig")
    assert index < len(plan.words) - len(words)
    assert plan.words[index + 1] == f"/dev/fd/{plan.find_number('config of qemu-userns')}"


def test_sockets_follow_the_monitors_and_keep_their_order() -> None:
    other = ("-chardev", "socket,id=m,path=/x/new2,server=on", "-mon", "m,mode=control")
    plan = with_sockets(*PLAIN, *other, paths=("/x/new-b", "/x/new-a"))
    grants = [grant for grant in plan.grants if isinstance(grant, Monitor | QmpSocket)]
    assert [(type(grant), grant.path) for grant in grants] == [
        (Monitor, "/x/new"),
        (Monitor, "/x/new2"),
        (QmpSocket, "/x/new-b"),
        (QmpSocket, "/x/new-a"),
    ]


def test_the_supervisor_stays_for_them() -> None:
    assert with_sockets().needs_supervisor
    assert plan_of(settings=Settings(passthrough="/x/new")).needs_supervisor
    assert not plan_of().needs_supervisor


@pytest.mark.parametrize(("root", "users"), [(False, (0, UID)), (True, (0,))])
def test_by_default_the_caller_and_root_are_admitted(root: bool, users: tuple[int, ...]) -> None:
    (socket,) = [grant for grant in with_sockets(root=root).grants if isinstance(grant, QmpSocket)]
    assert (socket.rights, socket.mode) == (Rights(users=users), 0o600)


def test_users_mode_and_rights_are_the_settings() -> None:
    rights = Rights(READ_ONLY, ("query-*",), ("query-fdsets",), (7,))
    plan = plan_of(settings=Settings(sockets=(SocketRights("/x/new", rights, 0o666),)))
    (socket,) = [grant for grant in plan.grants if isinstance(grant, QmpSocket)]
    assert (socket.rights, socket.mode) == (rights, 0o666)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/x/file", "there is a file"),
        ("/x/dir", "there is a directory"),
        ("/x-root/new", "Permission denied"),
        ("/x/%n", "does not say"),
        ("/x/new", "another socket"),
    ],
)
def test_where_no_socket_can_be_is_refused(path: str, reason: str) -> None:
    for settings in (Settings(sockets=(SocketRights(path),)), Settings(passthrough=path)):
        (refusal,) = plan_of(*PLAIN, settings=settings).find_refusals()
        assert reason in refusal.reason
        assert refusal.hint


def test_an_old_socket_is_replaced() -> None:
    assert not with_sockets(paths=("/x/sock",)).find_refusals()


def test_one_path_is_given_once() -> None:
    settings = Settings(sockets=(SocketRights("/x/new"),), passthrough="/x/new")
    assert [grant.reason for grant in plan_of(settings=settings).grants if isinstance(grant, Refuse)] == [
        "another socket of this VM has this path"
    ]


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ((), None),
        (("-name", "a%u", "-uuid", "b"), "/a%u/b/%n"),
        (("-name", "guest=a%,process=c", "-uuid", "b"), "/a%/b/%n"),
        (("-name", "a"), None),
        (("-name", "a/b", "-uuid", "c"), None),
        (("-name", "..", "-uuid", "c"), None),
        (("-name", "a", "-name", "b", "-uuid", "c", "-uuid", "d"), "/b/d/%n"),
    ],
)
def test_a_path_names_the_vm(words: tuple[str, ...], path: str | None) -> None:
    assert expand_path("/%n/%u/%%n", read(*words).objects) == path


# --- rights of the caller's monitors ----------------------------------------------------------------------------------


def test_the_last_rule_of_the_name_counts() -> None:
    rules = [
        MonitorRights("a", LOOK),
        MonitorRights("*", Rights(deny=("quit",))),
        MonitorRights("b", LOOK),
        MonitorRights("b", Rights()),
    ]
    assert find_rights(rules, "a") == LOOK
    assert find_rights(rules, "b") == Rights()
    assert find_rights(rules, "c") == Rights(deny=("quit",))
    assert find_rights((), "a") == Rights()


def test_monitors_get_their_rights() -> None:
    words = (*PLAIN, "-chardev", "socket,id=m,path=/x/new2,server=on", "-mon", "m,mode=control")
    plan = plan_of(*words, settings=Settings(monitors=(MonitorRights("m", LOOK),)))
    assert {grant.label: grant.rights for grant in plan.grants if isinstance(grant, Monitor)} == {
        "compat_monitor0": Rights(),
        "m": LOOK,
    }


@pytest.mark.parametrize(
    "words",
    [
        ("-chardev", "socket,id=m,host=h,port=1,server=on,telnet=on", "-mon", "m,mode=control"),
        ("-chardev", "stdio,id=m,mux=on", "-mon", "m,mode=control", "-serial", "chardev:m"),
        ("-chardev", "pty,id=m", "-mon", "m,mode=control"),
    ],
)
def test_a_monitor_that_nobody_can_restrict_is_refused(words: tuple[str, ...]) -> None:
    for name in ("m", "*"):
        plan = plan_of(*words, settings=Settings(monitors=(MonitorRights(name, LOOK),)))
        assert [refusal.why for refusal in plan.find_refusals()] == ["monitor m"]
    assert not plan_of(*words, settings=Settings(monitors=(MonitorRights("m", Rights()),))).find_refusals()
    assert not plan_of(*words).find_refusals()


@pytest.mark.parametrize(
    ("device", "refused"),
    [
        ("tcp:localhost:1,server=on,wait=off", True),
        ("tcp:localhost:1", True),
        ("stdio", True),
        ("unix:/x/new,server=on,wait=off", False),
        ("unix:/x/sock", False),
    ],
)
def test_only_peers_with_a_uid_can_be_told_apart(device: str, refused: bool) -> None:
    rules = Settings(monitors=(MonitorRights("*", Rights(users=(7,))),))
    refusals = plan_of("-qmp", device, settings=rules).find_refusals()
    assert [refusal.why for refusal in refusals] == ["monitor compat_monitor0"] * refused
    assert all("has no uid" in refusal.reason and refusal.hint for refusal in refusals)


def test_hmp_is_not_meant() -> None:
    rules = Settings(monitors=(MonitorRights("*", LOOK),))
    assert not plan_of("-monitor", "stdio", "-qmp", "none", settings=rules).find_refusals()


# --- monitors that QEMU serves by itself ------------------------------------------------------------------------------

TLS = ("-object", "tls-creds-anon,id=t,endpoint=server")


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (("-monitor", "stdio"), {"compat_monitor0": "HMP"}),
        (("-monitor", "unix:/x/new,server=on,wait=off", *PLAIN), {"compat_monitor0": "HMP"}),
        ((*PLAIN, "-monitor", "vc"), {"compat_monitor1": "HMP"}),
        (("-chardev", "stdio,id=m", "-mon", "m"), {"m": "HMP"}),
        (("-chardev", "stdio,id=m", "-mon", "chardev=m,mode=readline"), {"m": "HMP"}),
        (("-chardev", "stdio,id=m", "-monitor", "chardev:m"), {"m": "HMP"}),
        (("-serial", "mon:stdio"), {"serial0": "HMP"}),
        (("-qmp", "tcp:localhost:1,server=on,wait=off,telnet=on"), {"compat_monitor0": "QMP over telnet"}),
        (("-qmp", "telnet:localhost:1,server=on,wait=off"), {"compat_monitor0": "QMP over telnet"}),
        (("-qmp-pretty", "websocket:localhost:1,server=on,wait=off"), {"compat_monitor0": "QMP over websocket"}),
        (("-qmp", "pty"), {"compat_monitor0": "QMP on a pty"}),
        ((*TLS, "-qmp", "tcp:localhost:1,server=on,wait=off,tls-creds=t"), {"compat_monitor0": "QMP over TLS"}),
        (("-chardev", "stdio,id=m,mux=on", "-mon", "m,mode=control"), {"m": "QMP on a mux"}),
        (("-chardev", "stdio,id=m", "-mon", "m,mode=control", "-serial", "chardev:m"), {"m": "QMP on a shared device"}),
        (("-monitor", "stdio", "-qmp", "pty"), {"compat_monitor0": "HMP", "compat_monitor1": "QMP on a pty"}),
        (PLAIN, {}),
        ((), {}),
        (("-monitor", "none", "-qmp", "null", "-serial", "stdio"), {}),
    ],
)
def test_a_note_says_which_and_what_that_means(words: tuple[str, ...], labels: dict[str, str]) -> None:
    plan = plan_of(*words)
    assert list(plan.notes) == [
        f"monitor {label}: {what}, which QEMU serves by itself: a path that is first named there is not in its view"
        for label, what in labels.items()
    ]
    assert describe_plan(plan)["notes"] == [{"note": note} for note in plan.notes]
    served = {grant.label for grant in plan.grants if isinstance(grant, Monitor)}
    assert not served & labels.keys()


# --- -object in place of -mon, from QEMU 11.1 on ------------------------------------------------------------------------

CHARDEV = ("-chardev", "socket,id=m,path=/x/new,server=on,wait=off")
SECTION = '[object "o"]\n  qom-type = "monitor-qmp"\n  chardev = "m"\n  pretty = "on"\n'


@pytest.mark.parametrize(
    ("words", "configs"),
    [
        (("-object", "monitor-qmp,id=o,chardev=m,pretty=on"), {}),
        (("-object", '{"qom-type":"monitor-qmp","id":"o","chardev":"m","pretty":true,"close-action":"none"}'), {}),
        (("-readconfig", "/x/file"), {3: SECTION}),
    ],
)
def test_a_monitor_that_is_an_object_is_served_as_one_of_mon(words: tuple[str, ...], configs: dict[int, str]) -> None:
    mon = plan_of(*CHARDEV, "-mon", "m,mode=control,pretty=on")
    plan = plan_of(*CHARDEV, *words, configs=configs)
    assert [grant for grant in plan.grants if isinstance(grant, Monitor)] == [
        grant for grant in mon.grants if isinstance(grant, Monitor)
    ]
    assert (plan.words[-3], plan.words[-2:]) == (mon.words[-3], words)
    assert plan.confinement.sandbox == mon.confinement.sandbox


def test_objects_that_stay_qemus_own() -> None:
    hmp = plan_of(*CHARDEV, "-object", "monitor-hmp,id=o,chardev=m")
    ends = plan_of(*CHARDEV, "-object", "monitor-qmp,id=o,chardev=m,close-action=delete")
    notes = [note.split(",")[0] for note in (*hmp.notes, *ends.notes)]
    assert notes == ["monitor m: HMP", "monitor m: QMP that ends with its client"]
    assert not [grant for grant in (*hmp.grants, *ends.grants) if isinstance(grant, Monitor)]
    rules = Settings(monitors=(MonitorRights("m", LOOK),))
    (refusal,) = plan_of(*CHARDEV, "-object", "monitor-qmp,id=o,chardev=m,close-action=delete", settings=rules).find_refusals()
    assert refusal.why == "monitor m"


@pytest.mark.parametrize(
    ("version", "added"),
    [
        ((11, 0, 9), ("-mon", "chardev=serial0,mode=readline")),
        ((11, 1, 0), ("-object", "monitor-hmp,id=qemu-userns-serial0,chardev=serial0")),
    ],
)
def test_the_monitor_of_a_mux_is_made_as_qemu_wants_it(version: tuple[int, ...], added: tuple[str, str]) -> None:
    words = plan_of("-serial", "mon:unix:/rootdir/new,server=on,wait=off", root=True, version=version).words
    assert [pair for pair in itertools.pairwise(words) if pair[0] in ("-mon", "-object")] == [added]


@pytest.mark.parametrize(
    ("version", "names"),
    [((11, 0, 9), ["h,mode=readline", "m,id=x"]), ((11, 1, 0), ["h,mode=readline,id=compat_monitor2", "m,id=x"])],
)
def test_a_monitor_without_an_id_has_the_one_of_plain_qemu(version: tuple[int, ...], names: list[str]) -> None:
    """QEMU 11.1 would number it as if there were no -qmp, since ours name a character device."""
    argv = ("-chardev", "null,id=h", "-mon", "h,mode=readline", "-qmp", "unix:/rootdir/q0,server=on", "-monitor", "none")
    words = plan_of(*argv, "-qmp", "unix:/rootdir/q1,server=on", *CHARDEV, "-mon", "m,id=x", root=True, version=version).words
    assert [word for option, word in itertools.pairwise(words) if option == "-mon"] == names
    assert [word for option, word in itertools.pairwise(words) if option == "-qmp"] == [
        "chardev:compat_monitor0",
        "chardev:compat_monitor1",
    ]


def test_a_monitor_that_names_its_device_is_not_numbered() -> None:
    words = plan_of(*CHARDEV, "-monitor", "chardev:m", "-qmp", "unix:/rootdir/q,server=on", root=True).words
    assert [word for option, word in itertools.pairwise(words) if option == "-qmp"] == ["chardev:compat_monitor0"]


def test_a_monitor_is_not_made_while_qemu_runs() -> None:
    for kind in ("monitor-qmp", "monitor-hmp"):
        text = json.dumps({"execute": "object-add", "arguments": {"qom-type": kind, "id": "o", "chardev": "m"}})
        line = json.dumps({"execute": HMP, "arguments": {"command-line": f"object_add {kind},id=o,chardev=m"}})
        for name, command in (("object-add", text), (HMP, line)):
            objects = read_command(name, command)
            plan = build_command_plan(name, command, objects, find_command_needs(name, objects), make_facts(), USER, 7)
            (refusal,) = plan.find_refusals()
            assert "past the rights" in refusal.reason
            assert "any number of clients" in (refusal.hint or "")


# --- passthrough ------------------------------------------------------------------------------------------------------


def test_passthrough_is_a_monitor_of_qemus_own() -> None:
    plan = plan_of(*PLAIN, settings=Settings(passthrough="/x/new-raw"))
    (listen,) = [grant for grant in plan.grants if isinstance(grant, Listen)]
    assert listen.path == "/x/new-raw"
    (config,) = configs(plan)
    assert [note.partition(",")[0] for note in plan.notes] == ["monitor qemu-userns-passthrough: passthrough"]
    assert config.startswith(f'[chardev "qemu-userns-passthrough"]\n  backend = "socket"\n  fd = "{listen.number}"\n')
    assert [grant.label for grant in plan.grants if isinstance(grant, Monitor)] == ["compat_monitor0"]


@pytest.mark.parametrize("settings", [Settings(passthrough="/x/new"), Settings(sockets=(SocketRights("/x/new"),))])
def test_a_monitor_may_ask_for_a_program(settings: Settings) -> None:
    assert "spawn=allow" in (plan_of("-nodefaults", settings=settings).confinement.sandbox or "")


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rights", "text"),
    [
        (Rights(), "every command"),
        (LOOK, "commands that change nothing"),
        (Rights(READ_ONLY, ("a",), ("b",)), "commands that change nothing, only a but not b"),
        (Rights(deny=("quit", "system_*")), "every command but not quit, system_*"),
        (Rights(allow=("a", "b"), deny=("c",), users=(0, 7)), "only a, b but not c; for uid 0, 7 alone"),
    ],
)
def test_rights_are_said(rights: Rights, text: str) -> None:
    assert rights.describe() == text
    rules = Settings(sockets=(SocketRights("/x/new-ours", rights),), monitors=(MonitorRights("*", rights),))
    monitor, socket = describe_plan(plan_of(*PLAIN, settings=rules))["monitors"]
    assert monitor["clients"] == text
    assert socket["what"] == "/x/new-ours (mode 0600), where the supervisor serves QMP monitor compat_monitor0"
    assert socket["clients"].startswith(text)


def test_fds_that_a_later_migrate_incoming_may_name_are_kept() -> None:
    kept = [
        grant.number for grant in plan_of("-incoming", "defer", "-qmp", "stdio", fds=(7, 9)).grants if isinstance(grant, KeepFd)
    ]
    assert kept == [7, 9]
    assert not any(isinstance(grant, KeepFd) for grant in plan_of("-incoming", "tcp:0:1", fds=(7, 9)).grants)


# --- the service manager ----------------------------------------------------------------------------------------------


def test_the_service_manager_is_told_by_the_callers_monitor_or_one_of_ours() -> None:
    settings = Settings(notify="/run/systemd/notify")
    assert asked_for(plan_of(*PLAIN, settings=settings))[-1] == "notify /run/systemd/notify by compat_monitor0"
    own = plan_of(settings=settings)
    assert asked_for(own)[-1] == "notify /run/systemd/notify by qemu-userns"
    assert own.needs_supervisor
    (row,) = describe_plan(own)["service manager"]
    assert row["what"].startswith("/run/systemd/notify is told when QMP monitor qemu-userns answers")
