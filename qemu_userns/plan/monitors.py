"""Hand over QMP monitors: the public end is the supervisor's, QEMU gets a private socket in its place. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.monitors import find_monitors, find_untouched
from qemu_userns.cmdline.objects import as_switch
from qemu_userns.cmdline.source import append, remove, replace
from qemu_userns.plan.draft import MONITOR_OBJECTS, count_numbered
from qemu_userns.plan.facts import ABSENT, SOCKET
from qemu_userns.plan.grants import CONNECT, FD, LISTEN, OWN, STDIO, Listen, Monitor, Notify, QmpSocket, Reserved
from qemu_userns.plan.rights import expand_path, find_rights

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.catalogue.monitors import MonitorDevice
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.build import Settings
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.rights import MonitorRights, SocketRights

# What says where a socket leads, and how it behaves, which is the supervisor's affair now.
_ADDRESS = ("path", "host", "port", "fd", "abstract", "tight", "to", "ipv4", "ipv6", "keep-alive", "mptcp", "nodelay", "delay")
_BEHAVIOUR = ("server", "wait", "reconnect", "reconnect-ms", "signal")
OWN_LABEL = "qemu-userns"
PASSTHROUGH_LABEL = "qemu-userns-passthrough"


def serve_monitors(
    draft: "Draft", commandline: "CommandLine", needs: "Sequence[Need]", settings: "Settings"
) -> "Sequence[Need]":
    """Plan all QMP monitors: the caller's, our own sockets, and the one that is passed through.

    Returns:
        The needs that are still to be handed over: without those of where a monitor leads.
    """
    served = [device.obj for device in find_monitors(commandline) if serve_monitor(draft, device, settings.monitors)]
    for monitor in find_untouched(commandline):
        label = _label(draft, monitor.device)
        _note_untouched(draft, label, monitor.why)
        if monitor.qmp and find_rights(settings.monitors, label).restricted:
            draft.refuse(
                f"monitor {label}",
                "the settings restrict it, and it is one that QEMU serves by itself",
                "give it a plain socket of its own, without TLS, telnet, websocket or mux, or leave it out of [[qmp.monitor]]",
            )
    _name_others(draft)
    if settings.sockets:
        add_sockets(draft, settings.sockets)
    if settings.notify:
        draft.add(Notify("notify=on", find_plain_label(draft), settings.notify))
    if settings.passthrough:
        add_passthrough(draft, settings.passthrough)
    return [need for need in needs if need.row.way not in (ways.SOCKET, ways.FD, ways.CHARDEV) or need.obj not in served]


def _name_others(draft: "Draft") -> None:
    """Give the monitors without an id the one that QEMU gives them: the next after those in the old language.

    These name their character devices now, and from 11.1 on QEMU would number the others as if there were none of them.
    """
    first = count_numbered(draft.objects)
    if draft.version >= MONITOR_OBJECTS and first:
        nameless = [obj for obj in draft.objects if obj.kind == "mon" and obj.id is None]
        draft.edits += [
            append(obj, "id", f"compat_monitor{number}", "the id that QEMU would give it")
            for number, obj in enumerate(nameless, first)
        ]


def _note_untouched(draft: "Draft", label: str, why: str) -> None:
    """Have explain say what it means that a monitor is QEMU's own affair."""
    draft.notes.append(
        f"monitor {label}: {why}, which QEMU serves by itself: a path that is first named there is not in its view"
    )


def serve_monitor(draft: "Draft", device: "MonitorDevice", rules: "Sequence[MonitorRights]" = ()) -> bool:
    """Give QEMU a private socket in place of a monitor's own; return whether the caller's needs no other handover."""
    grant = _build_grant(draft, device)
    if grant is None:
        return False
    grant = grant.replace(rights=find_rights(rules, grant.label))
    if grant.rights.users and (grant.kind == STDIO or "port" in dict(grant.options)):
        # An fd may be of such a kind too; the supervisor looks.
        reason = f"the settings name its users, and {'stdio' if grant.kind == STDIO else 'a peer over TCP'} has no uid"
        draft.refuse(f"monitor {grant.label}", reason, "use a unix socket, or leave users out of its [[qmp.monitor]]")
    draft.add(grant)
    why = f"the supervisor serves this monitor; QEMU gets fd {grant.number}"
    members = (("fd", str(grant.number)), ("server", "on"), ("wait", "on" if grant.wait else "off"))
    if device.legacy is not None:
        kept = tuple((key, value) for key, value in device.legacy.members if key not in (*_ADDRESS, *_BEHAVIOUR))
        draft.legacy_to_chardev(device.obj, device.legacy.replace(backend="socket", members=(*members, *kept)), why)
        return True
    obj = device.obj
    if device.backend != "socket":
        draft.edits += [replace(member, "socket", why) for member in obj.find_all("backend")[-1:]]
    draft.edits += [remove(obj, member, why) for member in obj.members if member.key in (*_ADDRESS, *_BEHAVIOUR)]
    draft.edits += [append(obj, key, value, why) for key, value in members]
    return True


def add_sockets(draft: "Draft", asked: "Sequence[SocketRights]") -> None:
    """Add sockets of ours, on a monitor of the caller's that is like a new one, else on one of our own.

    A client of such a socket must not count as the one that a monitor with `wait=on` has QEMU wait for.
    """
    label = find_plain_label(draft)
    caller = draft.facts.caller.account.uid
    for socket in asked:
        users = socket.rights.users or tuple(sorted({0, caller}))
        place = _find_place(draft, "QMP socket", socket.path)
        if place is not None:
            rights = socket.rights.replace(users=users)
            draft.add(QmpSocket("a QMP socket of the settings", label, place[1], place[0], socket.mode, rights))


def find_plain_label(draft: "Draft") -> str:
    """Return the label of a monitor on which more clients make no difference, of a new one of our own where there is none."""
    plain = _find_plain(draft)
    if not plain:
        add_own_monitor(draft)
        plain = _find_plain(draft)
    return plain[0].label


def _find_plain(draft: "Draft") -> "list[Monitor]":
    """Return the monitors on which more clients make no difference."""
    return [grant for grant in draft.grants if isinstance(grant, Monitor) and not grant.wait and not grant.pretty]


def add_passthrough(draft: "Draft", path: str) -> None:
    """Add a monitor of QEMU's own on a socket that is made outside."""
    place = _find_place(draft, "passthrough", path)
    if place is not None:
        number, config = draft.next_fd(), draft.next_fd()
        draft.add(Listen("passthrough: a monitor that QEMU serves by itself", place[1], place[0], number))
        add_monitor_config(draft, PASSTHROUGH_LABEL, number, config)
        _note_untouched(draft, PASSTHROUGH_LABEL, "passthrough")


def _find_place(draft: "Draft", what: str, path: str) -> "tuple[str, str] | None":
    """Return a socket's path for this VM, as it is spelled and the real one; None if it is refused."""
    given = expand_path(path, draft.objects)
    if given is None:
        hint = "give -name and -uuid, the name without a slash, or a path without %n and %u"
        draft.refuse(f"{what} {path}", "the command line does not say the name or uuid in it", hint)
        return None
    fact = draft.path(given)
    taken = [grant.path for grant in draft.grants if isinstance(grant, Listen | Monitor | QmpSocket)]
    real, error = draft.find_entry(given)
    if error is not None:
        draft.refuse(f"{what} {given}", error, "the caller cannot make a socket there")
    elif fact.kind not in (ABSENT, SOCKET):
        draft.refuse(f"{what} {given}", f"there is a {fact.kind}", "name a path where nothing is, or an old socket")
    elif real in taken:
        draft.refuse(f"{what} {given}", "another socket of this VM has this path", "name another one")
    else:
        return given, real
    return None


def add_own_monitor(draft: "Draft") -> None:
    """Add a monitor of our own, in a configuration file: as an option it would take the default monitor away (vl.c)."""
    number, way_in, config = draft.next_fd(), draft.next_fd(), draft.next_fd()
    draft.add(Monitor("our own QMP sockets", OWN, OWN_LABEL, False, number, way_in))
    add_monitor_config(draft, OWN_LABEL, number, config)


def add_monitor_config(draft: "Draft", label: str, number: int, config: int) -> None:
    """Have QEMU read a configuration file with a QMP monitor on a listening socket."""
    sections = f'[chardev "{label}"]\n  backend = "socket"\n  fd = "{number}"\n  server = "on"\n  wait = "off"\n'
    sections += f'[mon "{label}"]\n  chardev = "{label}"\n  mode = "control"\n'
    draft.add(Reserved(f"a configuration file that adds the monitor {label}", f"config of {label}", config, content=sections))
    draft.words += ("-readconfig", f"/dev/fd/{config}")


def _label(draft: "Draft", device: "MonitorDevice") -> str:
    """Return the label of a monitor's character device."""
    return draft.label(device.obj) if device.legacy is not None else device.obj.id or ""


def _build_grant(draft: "Draft", device: "MonitorDevice") -> "Monitor | None":
    """Return the grant of a monitor; None where it is left to the handover of any other device, which refuses what cannot be."""
    obj = device.obj
    why = f"-{obj.kind}" if device.legacy is not None else f"-chardev {obj.id}"
    label = _label(draft, device)
    number = draft.next_fd()
    options = tuple((key, device.get(key)) for key in (*_ADDRESS, *_BEHAVIOUR) if device.get(key))
    grant = Monitor(why, STDIO, label, device.pretty, number, draft.next_fd(), options=options)
    if device.backend == "stdio":
        return grant
    # QEMU waits for a client unless it is told not to.
    wait = device.listens and as_switch(device.get("wait") or "on") == "on"
    grant = grant.replace(kind=LISTEN if device.listens else CONNECT, listens=device.listens, wait=wait)
    if device.get("fd"):
        if not device.get("fd").isdecimal() or int(device.get("fd")) not in draft.facts.caller.open_fds:
            return None
        # The private socket takes the number of the caller's fd, which goes to the supervisor.
        return grant.replace(kind=FD, given=device.get("fd"), number=int(device.get("fd")))
    if device.get("port"):
        return grant.replace(given=f"{device.get('host')}:{device.get('port')}")
    path = device.get("path")
    if not path:
        return None
    if as_switch(device.get("abstract")) == "on":
        return grant.replace(given=path)
    return _check_path(draft, grant.replace(given=path))


def _check_path(draft: "Draft", grant: Monitor) -> "Monitor | None":
    """Return the grant with the real path of a socket, None where the caller cannot make the one to be listened on."""
    if not grant.listens:
        return grant.replace(path=draft.path(grant.given).real)
    real, error = draft.find_entry(grant.given)
    return grant.replace(path=real) if error is None else None
