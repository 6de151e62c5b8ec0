"""Dialogues with QEMU, one at a time: what is sent for a client's command, and what becomes of the replies.

Each is a generator that yields bytes and fds for QEMU and is sent the reply. A client that leaves meanwhile changes nothing but
that it is told nothing more, and that what is only being prepared for it is undone.
"""

from qemu_userns.qmp.clients import Turn, list_fds
from qemu_userns.qmp.message import (
    GENERIC,
    NEGOTIATED,
    NOT_FOUND,
    build_command,
    build_error,
    build_return,
    get_dict,
    not_found,
)
from qemu_userns.qmp.policy import HMP
from qemu_userns.qmp.shared import Chore, DisplaySocket, is_own, restore_names, takes_rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qemu_userns.qmp.actions import Owner, Prepared
    from qemu_userns.qmp.clients import Client, Opening
    from qemu_userns.qmp.message import Command, Reply
    from qemu_userns.qmp.shared import Job, Shared

_NOWHERE = "qemu-userns.nowhere-"  # begins the name of an fd that is never passed
_DISPLAY = "qemu-userns.display"  # the name of its socket while QEMU takes it
INT64 = range(-(1 << 63), 1 << 63)


def greet(shared: "Shared") -> "Job":
    """Negotiate the session's own capabilities with QEMU."""
    enable: dict[str, object] = {"enable": ["oob"]} if "oob" in shared.offered else {}
    reply = yield shared.ask("qmp_capabilities", **enable), ()
    shared.ready = reply.kind == "return"


def negotiate(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Let QEMU look at a client's qmp_capabilities: with nothing wrong in it, it says that the session has negotiated already."""
    reply = yield command.encode(), ()
    error = get_dict(reply.value, "error")
    if error.get("class") != NOT_FOUND or error.get("desc") != NEGOTIATED:
        shared.tell(client, reply.line)
        return
    listed = command.arguments.get("enable")
    enable = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    missing = [name for name in enable if name not in shared.offered]
    if missing:
        shared.tell_error(client, GENERIC, f"Capability {', '.join(missing)} not available", command.id)
        return
    client.negotiated = True
    client.oob = "oob" in enable
    shared.tell(client, build_return({}, command.id, shared.pretty))


def pass_malformed(shared: "Shared", client: "Client", raw: bytes) -> "Job":
    """Let QEMU answer what is no command.

    Whatever state its lexer is in then, 0xFF makes it report an error and start anew; the reply to our command behind it tells
    that all replies have come. The client gets them but for that last error.
    """
    sentinel = shared.next_id()
    reply = yield raw + b"\n\xff" + build_command("qmp_capabilities", {}, sentinel), ()
    before: Reply | None = None
    while sentinel.encode() not in reply.line:
        if before:
            shared.tell(client, before.line)
        before = reply
        reply = yield b"", ()


def run_command(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Send a command and pass the reply on."""
    special = _SPECIAL.get(command.name)
    if special:
        return special(shared, client, command)
    return _relay(shared, client, command)


def _relay(shared: "Shared", client: "Client", command: "Command") -> "Job":
    if not takes_rules(command) and command.name.startswith("query-"):  # most commands: it names and changes nothing
        reply = yield command.encode(), ()
        shared.tell(client, reply.line)
        return
    rewritten = shared.rewrite(client, command)
    reply = yield rewritten.text.encode("utf-8", "surrogateescape"), ()
    if reply.kind == "return":
        shared.conclude(client, command, rewritten.names)
        shared.tell(client, reply.line)
    else:
        shared.tell(client, restore_names(reply.line, rewritten.renamed))


def _get_fd(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass getfd on with the client's pending fd; wrong arguments leave that pending, as QEMU does."""
    name = command.arguments.get("fdname")
    if not isinstance(name, str) or len(command.arguments) != 1:
        yield from _relay(shared, client, command)
        return
    fds = client.replace_pending(None)
    suffix = shared.names.choose(client.number, name)
    data = build_command("getfd", {"fdname": name + suffix}, command.id) if suffix else command.encode()
    reply = yield data, fds
    if reply.kind == "return":
        shared.names.hold(shared.get_holder(client), name, suffix)
    shared.tell(client, reply.line)
    if fds and reply.kind != "return":
        yield from _drain(shared)


def _add_fd(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass add-fd on with the client's pending fd, except into an fdset of ours."""
    fdset = command.arguments.get("fdset-id", 0)
    known = command.arguments.keys() <= {"fdset-id", "opaque"} and isinstance(command.arguments.get("opaque", ""), str)
    if not known or isinstance(fdset, bool) or not isinstance(fdset, int) or fdset not in INT64:
        yield from _relay(shared, client, command)
        return
    fds = client.replace_pending(None)
    if fds and is_own(fdset):
        shared.close(fds)
        shared.tell_error(client, GENERIC, not_found(f"fdset-id:{fdset}"), command.id)
        return
    reply = yield command.encode(), fds
    shared.tell(client, reply.line)
    if fds and reply.kind != "return":
        yield from _drain(shared)


def _drain(shared: "Shared") -> "Job":
    """Make QEMU close an fd that a refused command has left pending: getfd takes it before it looks at the name."""
    yield shared.ask("getfd", fdname="0"), ()


def _close_fd(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass closefd on for a name of the client's or nobody's."""
    name = command.arguments.get("fdname")
    if not isinstance(name, str) or len(command.arguments) != 1:
        yield from _relay(shared, client, command)
        return
    found = shared.names.find(client.number, name)
    if found.missing:
        shared.tell_error(client, GENERIC, not_found(name), command.id)
        return
    data = build_command("closefd", {"fdname": name + found.suffix}, command.id) if found.suffix else command.encode()
    reply = yield data, ()
    shared.names.forget(shared.get_holder(client), name)
    shared.tell(client, restore_names(reply.line, ((name + found.suffix, name),) if found.suffix else ()))


def _remove_fd(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass remove-fd on, except of an fdset of ours."""
    fdset, fd = command.arguments.get("fdset-id"), command.arguments.get("fd", 0)
    known = command.arguments.keys() <= {"fdset-id", "fd"}
    if not known or isinstance(fd, bool) or not isinstance(fd, int) or fd not in INT64 or not is_own(fdset):
        yield from _relay(shared, client, command)
        return
    what = f"fdset-id:{fdset}, fd:{fd}" if "fd" in command.arguments else f"fdset-id:{fdset}"
    shared.tell_error(client, GENERIC, not_found(what), command.id)


def _query_fdsets(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass query-fdsets on, and its reply without the fdsets of ours."""
    reply = yield command.encode(), ()
    line = reply.line
    fdsets = reply.value.get("return")
    if isinstance(fdsets, list):
        shown = [fdset for fdset in fdsets if not (isinstance(fdset, dict) and is_own(fdset.get("fdset-id")))]
        if len(shown) != len(fdsets):
            line = build_return(shown, command.id, shared.pretty)
    shared.tell(client, line)


def _query_chardev(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass query-chardev on, and its reply with the clients' addresses of monitors in place of ours."""
    reply = yield command.encode(), ()
    line = reply.line
    devices, names = reply.value.get("return"), shared.device_names()
    if isinstance(devices, list) and names:
        shown = [_rename_device(device, names) for device in devices]
        if shown != devices:
            line = build_return(shown, command.id, shared.pretty)
    shared.tell(client, line)


def _run_hmp(shared: "Shared", client: "Client", command: "Command") -> "Job":
    """Pass an HMP command on; what `info chardev` prints names the monitors as query-chardev does."""
    line = command.arguments.get("command-line")
    if not isinstance(line, str) or line.split() != ["info", "chardev"]:
        yield from _relay(shared, client, command)
        return
    reply = yield command.encode(), ()
    text, names = reply.value.get("return"), shared.device_names()
    if not isinstance(text, str):
        shared.tell(client, reply.line)
        return
    lines = text.split("\r\n")
    for index, item in enumerate(lines):
        label, separator, _ = item.partition(": filename=")
        if separator and label in names:
            lines[index] = f"{label}{separator}{names[label]}"
    shared.tell(client, build_return("\r\n".join(lines), command.id, shared.pretty))


def _rename_device(device: object, names: "Mapping[str, str]") -> object:
    """Return an item of query-chardev's with the file name that the clients know."""
    if not isinstance(device, dict) or device.get("label") not in names:
        return device
    return {**device, "filename": names[device["label"]]}


_SPECIAL: "dict[str, Callable[[Shared, Client, Command], Job]]" = {
    "getfd": _get_fd,
    "closefd": _close_fd,
    "add-fd": _add_fd,
    "remove-fd": _remove_fd,
    "human-monitor-command": _run_hmp,
    "query-chardev": _query_chardev,
    "query-fdsets": _query_fdsets,
}


def ask_first(shared: "Shared", client: "Client", command: "Command", owner: "Owner") -> "Job | None":
    """Return how QEMU is asked what it would say of a command, None where it need not be asked.

    It is before a tap is made for nothing, or a socket takes the place of what is at its path. QEMU looks at the id first
    (net_client_init1() of net/net.c, qmp_chardev_add() of chardev/char.c), or at the server that it has (nbd_server_start() of
    blockdev-nbd.c), and then for an fd that is never there. Where chardev-change fails, QEMU 7.2 forgets the device: it is asked
    for those that there are.
    """
    kind, name = owner
    nowhere = f"{_NOWHERE}{shared.token}"
    address = {"type": "fd", "data": {"str": nowhere}}
    if kind == "nbd-server":
        return _ask(shared, client, command, shared.ask("nbd-server-start", addr=address), nowhere)
    if kind not in ("netdev", "chardev"):
        return None
    if not name:
        return run_command(shared, client, command)  # QEMU refuses it
    if kind == "chardev" and command.name != "chardev-add":
        return _look_for_chardev(shared, client, command, name)
    if kind == "netdev":
        question = shared.ask("netdev_add", type="tap", id=name, fd=nowhere)
    else:
        question = shared.ask("chardev-add", id=name, backend={"type": "socket", "data": {"addr": address, "server": False}})
    return _ask(shared, client, command, question, nowhere)


def _ask(shared: "Shared", client: "Client", command: "Command", question: bytes, nowhere: str) -> "Job":
    """Ask; where QEMU says something else than that the fd is not there, this is what it would say of the command."""
    reply = yield question, ()
    error = get_dict(reply.value, "error")
    error_class, desc = error.get("class"), error.get("desc")
    if not isinstance(error_class, str) or not isinstance(desc, str) or nowhere in desc:
        if not client.gone:
            client.push_first(Turn(command, free=True))
    elif command.name != HMP:
        shared.tell_error(client, error_class, desc, command.id)
    else:
        shared.tell(client, build_return(f"Error: {desc}\r\n", command.id, shared.pretty))


def _look_for_chardev(shared: "Shared", client: "Client", command: "Command", name: str) -> "Job":
    """Have QEMU refuse to change a character device that is not there, and HMP to add one that is."""
    reply = yield shared.ask("query-chardev"), ()
    devices = reply.value.get("return")
    there = isinstance(devices, list) and any(isinstance(device, dict) and device.get("label") == name for device in devices)
    changes = "chardev-change" in (command.name, *str(command.arguments.get("command-line")).split()[:1])
    if there != changes:
        yield from run_command(shared, client, command)
    elif not client.gone:
        client.push_first(Turn(command, free=True))


def hand_over(shared: "Shared", opening: "Opening", prepared: "Prepared") -> "Job":
    """Give QEMU what was prepared, then the command; take everything back if that fails."""
    client = opening.client
    shared.unsent.extend(list_fds(prepared))
    shared.handed, shared.failed = prepared.handed, True
    given = [shared.ask("add-fd", fdset_id=fdset, opaque=opaque) for fdset, _, opaque in prepared.fdsets]
    given += [shared.ask("getfd", fdname=name) for name, _ in prepared.names]
    done = 0
    for data in given:
        if client.gone:
            break
        reply = yield data, (shared.unsent.popleft(),)
        if reply.kind != "return":
            _tell_failure(shared, opening, reply)
            yield from _drain(shared)
            break
        done += 1
    if done == len(given) and not client.gone:
        shared.failed = False
        shared.awaited = shared.rules.owner_of(opening.command.name, opening.command.arguments)
        reply = yield prepared.text, ()
        owner, shared.awaited = shared.awaited, None
        if reply.kind == "return":
            shared.conclude(client, opening.command, opening.names)
            if owner is not None:
                # Written down before the client knows, so that a supervisor that is killed then has forgotten nothing.
                shared.handed = 0
                shared.keep(owner, prepared)
            shared.tell(client, _say_as_hmp(shared, opening, reply) if prepared.twin else reply.line)
            if owner is None:
                yield from _undo(shared, prepared, done, failed=False)
            return
        line = _say_as_hmp(shared, opening, reply) if prepared.twin else reply.line
        shared.tell(client, restore_names(line, opening.renamed))
    yield from _undo(shared, prepared, done, failed=True)


def _say_as_hmp(shared: "Shared", opening: "Opening", reply: "Reply") -> bytes:
    """Return the reply to a QMP command as the one to its HMP twin, which prints nothing, or what went wrong."""
    desc = get_dict(reply.value, "error").get("desc")
    return build_return("" if reply.kind == "return" else f"Error: {desc}\r\n", opening.command.id, shared.pretty)


def _undo(shared: "Shared", prepared: "Prepared", done: int, failed: bool) -> "Job":
    """Take back the first `done` things that QEMU was given, and the rest."""
    shared.close(tuple(shared.unsent))
    shared.unsent.clear()
    fdsets = tuple(dict.fromkeys(fdset for fdset, _, _ in prepared.fdsets[:done]))
    names = tuple(name for name, _ in prepared.names[: max(0, done - len(prepared.fdsets))])
    yield from take_back(shared, Chore(fdsets, names, shared.handed, failed))


def do_chore(shared: "Shared", chore: "Chore | DisplaySocket") -> "Job":
    """Do what no client asks for."""
    return _give_display(shared, chore) if isinstance(chore, DisplaySocket) else take_back(shared, chore)


def _give_display(shared: "Shared", display: DisplaySocket) -> "Job":
    """Give VNC its listening socket, SPICE a client; both take it by a name of getfd."""
    reply = yield shared.ask("getfd", fdname=_DISPLAY), (display.fd,)
    if reply.kind != "return":
        yield from _drain(shared)
    else:
        if display.protocol == "vnc":
            command = shared.ask("display-update", type="vnc", addresses=[{"type": "fd", "str": _DISPLAY}])
        else:
            command = shared.ask("add_client", protocol=display.protocol, fdname=_DISPLAY)
        reply = yield command, ()
    if reply.kind == "return":
        return
    shared.log_once(f"{display.protocol}: QEMU does not take a socket: {get_dict(reply.value, 'error').get('desc')}")
    yield shared.ask("closefd", fdname=_DISPLAY), ()


def take_back(shared: "Shared", chore: Chore) -> "Job":
    """Remove what QEMU was handed; it may have gone by itself, so errors mean nothing."""
    shared.handed, shared.failed = chore.handed, chore.failed
    for fdset in chore.fdsets:
        yield shared.ask("remove-fd", fdset_id=fdset), ()
    for name in chore.names:
        yield shared.ask("closefd", fdname=name), ()
    shared.handed = 0
    shared.release(chore.handed, chore.failed)


def _tell_failure(shared: "Shared", opening: "Opening", reply: "Reply") -> None:
    """Tell the client why QEMU did not take what the command needs, with the command's id."""
    error = get_dict(reply.value, "error")
    error_class, desc = error.get("class"), error.get("desc")
    if not isinstance(error_class, str) or not isinstance(desc, str):
        error_class, desc = GENERIC, "QEMU did not take a file descriptor"
    shared.tell(opening.client, build_error(error_class, desc, opening.command.id, shared.pretty))
