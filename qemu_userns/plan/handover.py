"""How each way of the catalogue becomes grants: one function per way. Pure.

Path first: a file that QEMU may open with its own rights is shown at its path. Only what cannot work that way becomes an fd.
"""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.needs import names_tap
from qemu_userns.cmdline.source import drop, remove
from qemu_userns.plan import devices, images, shares
from qemu_userns.plan.draft import is_shown
from qemu_userns.plan.facts import ABSENT, CHARACTER, DIRECTORY, FIFO, MISSING, REGULAR, SOCKET, directory_of
from qemu_userns.plan.grants import READ, SEARCH, WRITE, Connect, Consume, Create, CreateDir, Listen, Reserved
from qemu_userns.plan.plan import NO_HOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PathFact

    Handover = Callable[[Draft, Need, CommandLine], None]

_OWNER_WRITES = 0o200


def hand_over(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Add what one need takes."""
    if need.way in _PATH_WAYS:
        fact = draft.path(need.path)
        if fact.fd is not None:
            _reopen_fd(draft, need, fact.fd, commandline)
            return
    _HANDOVERS[need.way](draft, need, commandline)


def _reopen_fd(draft: "Draft", need: "Need", number: int, commandline: "CommandLine") -> None:
    """Keep an fd of the caller that is named as a path; QEMU opens its file again, or gets what it may not open otherwise."""
    fact = draft.path(need.path)
    if need.way == ways.SHARE:
        shares.keep_fd(draft, need, fact)
    if fact.kind == SOCKET and need.way == ways.SOCKET and not need.listens and not draft.may(fact, WRITE):
        _connect(draft, need, fact)  # connect(2) by an O_PATH fd takes the same rights as by the path
    elif _takes_output_fd(need) and fact.kind in (REGULAR, FIFO, CHARACTER) and not draft.may(fact, WRITE):
        devices.pass_in_fdset(draft, need)
    elif fact.kind != REGULAR or draft.may(fact, READ):
        draft.keep_fd(number, need.describe(), reopened=True)
    elif need.way == ways.IMAGE:
        images.hand_over(draft, need, commandline)
    else:
        draft.add(Reserved(need.describe(), "copy", number))


def _takes_output_fd(need: "Need") -> bool:
    """Return whether this is the file of a character device, which may be one of an fdset."""
    return need.way in (ways.WRITE, ways.APPEND) and (need.obj.kind == "chardev" or need.legacy is not None)


def _read(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    fact = draft.path(need.path)
    if draft.check(need, fact, READ):
        draft.bind(fact, False, need.describe())


def _read_modules(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show an initrd, or the modules of a multiboot kernel, each with arguments after a blank."""
    if draft.path(need.path).kind != ABSENT or ("," not in need.path and " " not in need.path):
        _read(draft, need, commandline)
        return
    for module in need.path.split(","):
        _read(draft, need.replace(path=module.partition(" ")[0]), commandline)


def _firmware(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show a file that is there; any other name QEMU looks for in its data directories, which are shown anyway."""
    fact = draft.path(need.path)
    if fact.error is None and fact.kind == REGULAR and fact.readable:
        draft.bind(fact, False, need.describe())
    elif fact.error not in (None, MISSING):
        draft.notes.append(f"{need.describe()} {need.path}: {fact.error}")


def _directory(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a directory, and what QEMU looks for in it and a bind of the directory alone does not serve."""
    fact = draft.path(need.path)
    if (need.obj.kind == "L" and fact.kind == ABSENT) or not draft.check(need, fact, READ):
        return
    draft.bind(fact, False, need.describe())
    for path in need.find_entries(fact.entries):
        found = draft.path(path)
        if need.obj.kind == "L":  # much may lie there that this QEMU never looks for
            _firmware(draft, need.replace(path=path), commandline)
        elif found.kind == REGULAR or found.error not in (None, MISSING):
            _read(draft, need.replace(path=path), commandline)


def _write_directory(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    fact = draft.path(need.path)
    if not draft.check(need, fact, READ):
        return
    if need.obj.get("type") == "vde" and fact.kind == DIRECTORY and not draft.may(fact, WRITE | SEARCH):
        # libvdeplug would go on with a socket in /tmp, which is the view's own, and hear nothing.
        draft.refuse_access(need, "make its end of the connection in it")
        return
    draft.bind(fact, True, need.describe())


def _made(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show the directory in which QEMU makes a socket or symlink itself."""
    directory = directory_of(need.path)
    fact = draft.path(directory)
    if draft.check(need.replace(path=directory), fact, READ | WRITE):
        if draft.may(fact, READ | WRITE | SEARCH):
            draft.bind(fact, True, need.describe())
        else:
            draft.refuse_access(need.replace(path=directory), "make anything in it")


def _write(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a file that QEMU creates or truncates, made beforehand where it is not there."""
    fact = draft.path(need.path)
    if need.obj.kind == "D" and "%d" in need.path:  # QEMU's pid is not known before it runs, with -daemonize not even then
        _made(draft, need, commandline)
    elif fact.kind not in (ABSENT, REGULAR, DIRECTORY):
        devices.show_node(draft, need, commandline)
    elif fact.kind == REGULAR and draft.may(fact, WRITE):
        draft.bind(fact, True, need.describe())
    elif need.way == ways.APPEND and fact.kind == REGULAR:
        draft.refuse(
            f"{need.describe()} {need.path}",
            f"QEMU's id {draft.identity.uid} may not write it",
            "make it that id's, or start with a new file",
        )
    else:
        mode = 0o600 if need.obj.kind == "dump-guest-memory" else 0o666  # QEMU's is 0400, which its id could not open again
        _create(draft, need, mode & ~draft.facts.caller.umask, temporary=False)


def _pidfile(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show the pidfile, a new one unless QEMU may write the one that is there; it goes when QEMU ends."""
    fact = draft.path(need.path)
    why = need.describe()
    if fact.kind == REGULAR and draft.may(fact, WRITE):
        if fact.locked:
            draft.bind(fact, True, why)  # QEMU says so itself
        else:
            draft.way_to(fact, why)
            draft.add(Create(why, fact.real, 0o600, temporary=True))
    elif fact.locked:
        draft.refuse(f"{why} {need.path}", "another process holds its lock", "the QEMU that wrote it is still running")
    else:
        _create(draft, need, 0o600, temporary=True)


def _create(draft: "Draft", need: "Need", mode: int, temporary: bool) -> None:
    """Have a file created where the caller may do so; one that is there and not QEMU's gives way."""
    fact = draft.path(need.path)
    what = f"{need.describe()} {need.path}"
    if fact.error is not None:
        draft.refuse(what, fact.error)
    elif fact.kind == DIRECTORY:
        draft.refuse(what, "Is a directory")
    elif not fact.parent_writable or (fact.kind == REGULAR and not fact.writable):
        draft.refuse(what, "Permission denied", "the caller may not create it there")
    else:
        draft.way_to(fact, need.describe())
        draft.add(Create(need.describe(), fact.real, mode, fact.inode if fact.kind == REGULAR else None, temporary))


def _memory(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a file that backs memory, or the directory (hugetlbfs) in which QEMU makes an unnamed one."""
    fact = draft.path(need.path)
    if fact.pages is not None:
        from qemu_userns.plan.memory import check_pages

        if not check_pages(draft, need, fact.pages):
            return
    if fact.kind != DIRECTORY:
        _write(draft, need, commandline)
    elif draft.check(need, fact, READ | WRITE):
        if is_shown(fact.real) or draft.may(fact, READ | WRITE | SEARCH):
            draft.bind(fact, True, need.describe())
        elif not any(isinstance(grant, CreateDir) and grant.path == fact.real for grant in draft.grants):
            # It is root's alone, as /dev/hugepages is.
            draft.way_to(fact, need.describe())
            draft.add(CreateDir(need.describe(), fact.real))


def _socket(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Listen outside and pass the socket, or show the one that QEMU connects to."""
    if need.listens:
        _listen(draft, need, commandline)
        return
    fact = draft.path(need.path)
    datagrams = need.obj.get("type") == "dgram" and (fact.kind != SOCKET or draft.may(fact, WRITE))
    if need.reconnects or datagrams:  # its server may make it later, or anew; each datagram looks for it again
        directory = draft.path(directory_of(need.path))
        if directory.kind == ABSENT and directory.error in (None, MISSING):
            draft.way_to(directory, need.describe())
            draft.notes.append(f"{need.describe()} {need.path}: its directory is not there, and stays unseen if it is made later")
        elif draft.check(need.replace(path=directory.given), directory, READ):
            draft.bind(directory, False, need.describe())
    elif fact.kind == SOCKET and draft.may(fact, WRITE):
        draft.bind(fact, True, need.describe())
    elif fact.kind == SOCKET:
        _connect(draft, need, fact)
    elif fact.kind == ABSENT and fact.error in (None, MISSING):
        draft.way_to(fact, need.describe())  # QEMU says that nobody is there
    elif fact.error is not None:
        draft.refuse(f"{need.describe()} {need.path}", fact.error)


def _connect(draft: "Draft", need: "Need", fact: "PathFact") -> None:
    """Connect outside to a socket that QEMU may not connect to, or where none can be passed have root show it as QEMU's own."""
    if draft.caller_may(fact, WRITE) and draft.takes_fd(need):
        number = draft.next_fd()
        draft.add(Connect(need.describe(), fact.real, number, fact.inode))
        draft.pass_socket(need, number)
    elif draft.facts.caller.root and fact.mode & _OWNER_WRITES:
        draft.bind_as_own(fact, need.describe())
    else:
        draft.refuse_access(need, "connect to it")


def _listen(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Have a socket bound outside at the caller's path, or by QEMU itself where it takes none."""
    if not draft.takes_fd(need):
        _made(draft, need, commandline)
        return
    real, error = draft.find_entry(need.path)
    if error is not None:
        draft.refuse(f"{need.describe()} {need.path}", error, "the caller cannot make a socket there")
        return
    number = draft.next_fd()
    draft.add(Listen(need.describe(), real, need.path, number))
    draft.pass_socket(need, number)


def _display(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Have the socket of a display bound outside, or by QEMU itself where none can be passed."""
    from qemu_userns.plan import displays  # only here: most QEMUs have none

    if need.obj.is_on("reverse"):  # VNC connects to a viewer that listens
        _socket(draft, need, commandline)
    elif displays.takes_socket(draft, need, commandline):
        displays.listen(draft, need)
    else:
        _made(draft, need, commandline)


def _host_tree(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Refuse what the view has too little for; with the host's whole tree it is QEMU's own affair."""
    if draft.host_tree == NO_HOST:
        draft.refuse(need.describe(), need.row.reason, need.row.hint)


def _pipe(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    ends = [path for path in (f"{need.path}.in", f"{need.path}.out") if draft.path(path).kind != ABSENT]
    for path in ends or [need.path]:
        devices.show_node(draft, need.replace(path=path), commandline)


def _fd(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    if not need.path.isdecimal():
        return
    if int(need.path) in draft.facts.not_taps and names_tap(need):
        draft.refuse(f"{need.describe()} {need.path}", "it is no tap", "pass one of /dev/net/tun after TUNSETIFF, or /dev/tapN")
    draft.keep_fd(int(need.path), need.describe())


def _run(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    draft.run(need)


def _name(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Leave a name to QEMU, which has the fd already."""


def _config(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show the copy that build_plan makes; nothing else is needed of the file."""
    draft.check(need, draft.path(need.path), READ)


def _network(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    from qemu_userns.plan import taps  # only those launches need it that have a tap

    taps.hand_over(draft, need)


def _passt(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    from qemu_userns.plan import passt  # as above

    passt.hand_over(draft, need, commandline)


def _consume(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Take an option out."""
    draft.add(Consume(need.describe(), need.row.reason))
    consumed = [] if need.member is None else need.obj.find_all(need.member.key)
    if need.obj.form in ("word", "opts") and len(consumed) == len(need.obj.members):
        draft.edits.append(drop(commandline.options[need.obj.option], need.row.reason))
    else:
        draft.edits += (remove(need.obj, member, need.row.reason) for member in consumed)


def _refuse(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    draft.refuse(need.describe(), need.row.reason, need.row.hint or None)


_HANDOVERS: "dict[str, Handover]" = {
    ways.READ: _read,
    ways.READ_MODULES: _read_modules,
    ways.FIRMWARE: _firmware,
    ways.DIRECTORY: _directory,
    ways.WRITE_DIRECTORY: _write_directory,
    ways.MADE: _made,
    ways.WRITE: _write,
    ways.APPEND: _write,
    ways.PIDFILE: _pidfile,
    ways.MEMORY: _memory,
    ways.IMAGE: images.hand_over,
    ways.SHARE: shares.show_share,
    ways.STAND_IN: shares.serve_stand_in,
    ways.DISPLAY: _display,
    ways.HOST_TREE: _host_tree,
    ways.SOCKET: _socket,
    ways.LISTEN: _listen,
    ways.PIPE: _pipe,
    ways.DEVICE: devices.show_node,
    ways.OPEN: devices.open_node,
    ways.TAP: _network,
    ways.BRIDGE: _network,
    ways.VHOST: _network,
    ways.PASST: _passt,
    ways.USB: devices.show_usb,
    ways.TPM: devices.show_tpm,
    ways.RENDER: devices.show_render_node,
    ways.VFIO: devices.show_vfio,
    ways.LOCK: devices.lock_memory,
    ways.FD: _fd,
    ways.NAME: _name,
    ways.RUN: _run,
    ways.CONFIG: _config,
    ways.KVM: devices.show_kvm,
    ways.CONSUME: _consume,
    ways.REFUSE: _refuse,
}
_NOT_FILES = {ways.FD, ways.NAME, ways.RUN, ways.KVM, ways.LOCK, ways.HOST_TREE}
_PATH_WAYS = frozenset(_HANDOVERS) - _NOT_FILES - {ways.CONSUME, ways.REFUSE, ways.CONFIG, ways.STAND_IN}
