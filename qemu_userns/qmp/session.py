"""One monitor of QEMU and its clients: bytes and fds in, actions out; no sockets.

At most one in-band command is at QEMU at any time, so a reply that is no event is that command's, byte for byte, and so is
what the client sent. Clients take turns. What happens when somebody leaves:

1. A client, with a part of a message or commands that wait: QEMU never sees them; their fds are closed.
2. A client whose command is at QEMU: the command runs, as without us, and its reply is dropped.
3. A client whose command is being prepared: what is prepared is closed and released when it comes. Fds that QEMU has got for
   a command that it has not got are taken back.
4. A client that gave fds names: they become the monitor's, as in QEMU.
5. QEMU: every client gets EOF, every fd that is still ours is closed, what was being handed over is released.

QEMU is not trusted: what it sends that makes no sense ends the session, and it cannot make this hold more than bounds say.
"""

from qemu_userns.qmp.actions import CloseClient, Log, Prepare, Prepared, SendQemu
from qemu_userns.qmp.clients import Client, Line, Opening, Turn, list_fds
from qemu_userns.qmp.jobs import ask_first, do_chore, greet, hand_over, negotiate, pass_malformed, run_command
from qemu_userns.qmp.message import (
    GENERIC,
    NEGOTIATE_FIRST,
    NOT_FOUND,
    OOB_UNEXPECTED,
    build_command,
    build_error,
    find_fault,
    get_dict,
    mentions_oob,
    parse_command,
    read_reply,
)
from qemu_userns.qmp.oob import OutOfBand
from qemu_userns.qmp.shared import Chore, Shared, takes_rules
from qemu_userns.qmp.stream import ReplyStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.qmp.actions import Action, Owner, Refused, Rules
    from qemu_userns.qmp.message import Command, Reply
    from qemu_userns.qmp.policy import Policy
    from qemu_userns.qmp.shared import DeviceNames, Job
    from qemu_userns.qmp.stream import Item


class Session:
    """See the module. Each method returns what is to be done, in order."""

    def __init__(self, token: str, pretty: bool, rules: "Rules", device_names: "DeviceNames" = dict) -> None:
        """Begin before QEMU's greeting.

        Args:
            token: random printable ASCII without quotes or backslashes, new for each session; marks the ids of our own.
            pretty: the monitor prints on several lines.
            rules: what the catalogue knows.
            device_names: what query-chardev shows for the monitors that we serve, by label.
        """
        self._shared = Shared(token, pretty, rules, device_names)
        self._oob = OutOfBand(self._shared)
        self._replies = ReplyStream(pretty)
        self._greeting: bytes | None = None
        self._closed = False
        self._clients: dict[int, Client] = {}
        self._line = Line()
        self._job: Job | None = None
        self._job_client: Client | None = None
        self._openings: dict[int, Opening] = {}
        self._ticket = 0

    def open_client(self, client: int, policy: "Policy") -> "list[Action]":
        """Begin with a client; numbers are not used again while a client of that number is there."""
        if self._closed:
            return [CloseClient(client, "")]
        self._clients[client] = Client(client, policy)
        self._greet(self._clients[client])
        return self._flush()

    def close_client(self, client: int) -> "list[Action]":
        """Forget a client that has gone."""
        found = self._clients.pop(client, None)
        if found:
            self._drop(found)
            replaced = tuple(self._shared.names.leave(client))
            if replaced:
                self._shared.chores.append(Chore((), replaced, 0))
            self._pump()
        return self._flush()

    def receive_client(self, client: int, data: bytes, fds: "tuple[int, ...]") -> "list[Action]":
        """Take what one recvmsg of a client's gave; takes ownership of the fds."""
        found = self._clients.get(client)
        if found is None:
            self._shared.close(fds)
            return self._flush()
        if fds:
            self._shared.close(fds[1:])
            found.push(Turn(fd=fds[0]))
            self._line.add(found)
        for item in found.stream.feed(data):
            self._accept(found, item)
        self._pump()
        return self._flush()

    def receive_qemu(self, data: bytes) -> "list[Action]":
        """Take bytes of QEMU's."""
        if not self._closed:
            for line in self._replies.feed(data):
                self._receive(line)
                if self._closed:
                    break
            if self._replies.overflowed:
                self._fail("QEMU sends a message without end")
        return self._flush()

    def close_qemu(self) -> "list[Action]":
        """Take the end of QEMU's stream: nothing more comes of this session."""
        self._close("")
        return self._flush()

    def answer(self, ticket: int, prepared: "Prepared | Refused") -> "list[Action]":
        """Take the answer to a `Prepare`; takes ownership of the fds."""
        opening = self._openings.pop(ticket, None)
        lost = self._closed or opening is None or opening.client.gone
        if isinstance(prepared, Prepared):
            if lost or opening is None:
                self._shared.close(list_fds(prepared))
                self._shared.release(prepared.handed, failed=True)
            else:
                opening.client.prepared = (opening, prepared)
        elif opening:
            self._shared.tell_error(opening.client, prepared.error_class, prepared.desc, opening.command.id)
        if opening and not lost:
            opening.client.busy = False
            self._line.add(opening.client)
            self._pump()
        return self._flush()

    def wants_input(self, client: int) -> bool:
        """Tell whether to read from a client; the supervisor also waits where much output waits for it."""
        found = self._clients.get(client)
        return found is not None and found.wants_input()

    def is_idle(self, client: int) -> bool:
        """Tell whether everything that a client has sent has been answered (but for an unfinished message)."""
        found = self._clients.get(client)
        return found is None or found.is_idle()

    def keep(self, owner: "Owner", handed: int, fdsets: "tuple[int, ...]") -> None:
        """Note a `Keep` of an earlier session of this monitor."""
        self._shared.restore(owner, handed, fdsets)

    def remove_owner(self, owner: "Owner") -> "list[Action]":
        """Take back what belongs to an object that another session saw go (`Removed`)."""
        if not self._closed:
            self._shared.remove(owner, elsewhere=False)
            self._pump()
        return self._flush()

    def give_display(self, protocol: str, fd: int) -> "list[Action]":
        """Give QEMU a socket of a display, once there is time for it; takes ownership of the fd."""
        if self._closed:
            self._shared.close((fd,))
        else:
            self._shared.add_display(protocol, fd)
            self._pump()
        return self._flush()

    # --- clients ------------------------------------------------------------------------------------------------------

    def _greet(self, client: Client) -> None:
        if self._greeting is not None and not client.greeted:
            client.greeted = True
            self._shared.tell(client, self._greeting)

    def _accept(self, client: Client, item: "Item") -> None:
        """Take an item of a client's: have it wait for its turn, or run it at once where it is out-of-band."""
        if item.kind == "excess":
            client.push(Turn(answer=build_error(GENERIC, item.text.decode(), None, self._shared.pretty)))
        elif item.kind == "garbage" or (command := parse_command(item.text)) is None:
            client.push(Turn(raw=item.text))
        else:
            if client.restricted:  # as it was understood, whatever QEMU would have understood
                text = build_command(command.name, command.arguments, command.id, command.oob).decode()
                command = command.replace(text=text)
            if command.oob and client.oob:
                if self._is_allowed(client, command):
                    self._oob.push(client, command)
                return
            if self._is_free(client):
                self._serve_command(client, command)
                return
            client.push(Turn(command))
        self._line.add(client)

    def _is_free(self, client: Client) -> bool:
        """Tell whether a client's command would be the next one: nothing is at QEMU, and nothing waits."""
        shared = self._shared
        return self._job is None and shared.ready and not (client.busy or self._line or shared.chores or self._closed)

    def _drop(self, client: Client) -> None:
        """Give up everything of a client that leaves."""
        self._line.remove(client)
        self._oob.forget(client)
        if client.prepared:
            self._shared.release(client.prepared[1].handed, failed=True)
        self._shared.close(client.leave())

    # --- turns --------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Serve clients until a command is at QEMU or nobody has anything."""
        if not self._shared.ready or self._closed:
            return
        while self._job is None:
            if self._shared.chores:
                self._start(do_chore(self._shared, self._shared.chores.popleft()), None)
            elif self._line:
                client = self._line.pop()
                if client.has_work():
                    self._serve(client)
                    self._line.add(client)
            else:
                return

    def _start(self, job: "Job", client: "Client | None") -> None:
        self._job, self._job_client = job, client
        if client:
            client.busy = True
        self._advance(None)

    def _advance(self, reply: "Reply | None") -> None:
        """Go on with the dialogue, to the next thing to send or to its end."""
        assert self._job
        try:
            data, fds = next(self._job) if reply is None else self._job.send(reply)
        except StopIteration:
            client, self._job, self._job_client = self._job_client, None, None
            if client:
                client.busy = False
                for command in client.take_oob() if client.oob else ():
                    if self._is_allowed(client, command):
                        self._oob.push(client, command)
                self._line.add(client)
            return
        if data:
            self._shared.actions.append(SendQemu(data, fds))

    def _serve(self, client: Client) -> None:
        """Do what waited longest of a client."""
        shared = self._shared
        if client.prepared:
            (opening, prepared), client.prepared = client.prepared, None
            self._start(hand_over(shared, opening, prepared), client)
            return
        turn = client.pop()
        if turn.command:
            self._serve_command(client, turn.command, turn.free)
        elif turn.answer is not None:
            shared.tell(client, turn.answer)
        elif turn.fd is not None:
            shared.close(client.replace_pending(turn.fd))
        elif turn.raw is not None:
            if client.restricted or (not client.oob and mentions_oob(turn.raw)):
                desc, echo = find_fault(turn.raw, client.oob)
                shared.tell_error(client, GENERIC, desc, echo)
            else:
                self._start(pass_malformed(shared, client, turn.raw), client)

    def _serve_command(self, client: Client, command: "Command", free: bool = False) -> None:
        """Refuse a command, have it prepared, or begin its dialogue with QEMU; one whose id is free needs no asking for that."""
        shared = self._shared
        if command.oob:
            shared.tell_error(client, GENERIC, OOB_UNEXPECTED, command.id)
        elif not client.negotiated:
            if command.name == "qmp_capabilities":
                self._start(negotiate(shared, client, command), client)
            else:
                shared.tell_error(client, NOT_FOUND, NEGOTIATE_FIRST, command.id)
        elif self._is_allowed(client, command):
            if takes_rules(command) and shared.rules.needs_opening(command):
                owner = None if free else shared.rules.owner_of(command.name, command.arguments)
                job = None if owner is None else ask_first(shared, client, command, owner)
                if job is not None:
                    self._start(job, client)
                else:
                    self._prepare(client, command)
            else:
                self._start(run_command(shared, client, command), client)

    def _is_allowed(self, client: Client, command: "Command") -> bool:
        """Tell whether a client may run a command; if not, it is told so."""
        denied = client.policy.find_denied(command) if client.restricted else None
        if denied is not None:
            self._shared.tell_error(client, NOT_FOUND, f"The command {denied} is not allowed for this client", command.id)
        return denied is None

    def _prepare(self, client: Client, command: "Command") -> None:
        self._ticket += 1
        rewritten = self._shared.rewrite(client, command)
        client.busy = True
        self._openings[self._ticket] = Opening(client, command, rewritten.renamed, rewritten.names)
        self._shared.actions.append(Prepare(self._ticket, client.number, command.name, rewritten.text))

    # --- QEMU ---------------------------------------------------------------------------------------------------------

    def _receive(self, line: bytes) -> None:
        """Take a message of QEMU's."""
        reply = read_reply(line)
        if reply.kind == "event":
            for client in self._clients.values():
                if client.negotiated:
                    self._shared.tell(client, line)
            if self._shared.has_owners():
                value = reply.value
                self._shared.remove_by_event(value.get("event"), get_dict(value, "data"))
                self._pump()
        elif reply.kind == "QMP":
            self._receive_greeting(reply)
        elif not reply.kind:
            self._fail("QEMU sends what is no QMP")
        elif self._job is None:
            if not self._oob.receive(line):
                self._shared.log_once("QEMU sends a reply that nobody waits for")
        elif not self._oob.receive(line):
            self._advance(reply)
            if not self._shared.ready:
                self._fail("QEMU refuses its own capabilities")
            self._pump()

    def _receive_greeting(self, reply: "Reply") -> None:
        if self._greeting is not None:
            self._shared.log_once("QEMU greets again")
            return
        self._greeting = reply.line
        offered = get_dict(reply.value, "QMP").get("capabilities")
        if isinstance(offered, list):
            self._shared.offered = frozenset(name for name in offered if isinstance(name, str))
        for client in self._clients.values():
            self._greet(client)
        self._start(greet(self._shared), None)

    def _fail(self, reason: str) -> None:
        if not self._closed:
            self._shared.actions.append(Log(reason))
            self._close(reason)

    def _close(self, reason: str) -> None:
        """End the session: every client gets EOF, everything that is still ours is given back."""
        if self._closed:
            return
        self._closed = True
        self._job = None
        self._shared.give_up()
        for client in self._clients.values():
            self._drop(client)
            self._shared.actions.append(CloseClient(client.number, reason))
        self._clients.clear()

    def _flush(self) -> "list[Action]":
        """Return the actions since the last time."""
        actions, self._shared.actions = self._shared.actions, []
        return actions
