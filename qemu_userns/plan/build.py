"""Build the plan from the command line, the catalogue's reading of it, and the facts. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.monitors import OBJECTS
from qemu_userns.cmdline.objects import as_switch
from qemu_userns.cmdline.source import apply_edits, drop
from qemu_userns.cmdline.table import BUILTIN
from qemu_userns.plan.base import BASE, LINKS, PRIVATE, PTMX
from qemu_userns.plan.devices import add_kvm
from qemu_userns.plan.draft import Draft, find_memory
from qemu_userns.plan.facts import ABSENT, CHARACTER, DIRECTORY, LANDLOCK_ABI_WITH_SCOPES
from qemu_userns.plan.grants import (
    READ,
    Bind,
    Consume,
    Copy,
    CreateDir,
    Display,
    Link,
    Listen,
    Monitor,
    Private,
    QmpSocket,
    Reserved,
    Virtiofsd,
)
from qemu_userns.plan.handover import hand_over
from qemu_userns.plan.identity import CALLERS_NETWORK
from qemu_userns.plan.monitors import serve_monitors
from qemu_userns.plan.plan import NO_HOST, WHOLE_HOST, Confinement, Plan, Rewrite
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.cmdline.source import Edit
    from qemu_userns.plan.added_shares import AddedShare
    from qemu_userns.plan.facts import HostFacts
    from qemu_userns.plan.grants import TapSettings
    from qemu_userns.plan.identity import Identity
    from qemu_userns.plan.idmaps import ShareMap
    from qemu_userns.plan.rights import MonitorRights, SocketRights

_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
# On ABI 1 (Linux 5.13 to 5.18) every rename between directories is refused, which breaks 9p shares.
_LOWEST_LANDLOCK_ABI = 2
_DISPLAYS_WITH_SOCKETS = ("gtk", "sdl", "dbus", "spice-app")
# The options after which QEMU looks for no display by itself, and what it falls back to; system/vl.c.
_DISPLAYS = frozenset(("display", "nographic", "vnc", "spice", "sdl", "curses"))
_DEFAULT_VNC = "localhost:0,to=99,id=default"
_SPAWNING_OPTIONS = frozenset(("daemonize", "async-teardown"))


class Program(Record):
    """The real QEMU, as far as a plan depends on it."""

    path: str
    version: "tuple[int, ...]"
    sandbox: bool  # its build has -sandbox
    extra_dirs: "tuple[str, ...]"  # libraries and data outside the system's directories


class Settings(Record):
    """The configuration, as far as a plan depends on it."""

    whole_host: bool = False
    sandbox: str = "auto"
    require_landlock: bool = False
    sockets: "tuple[SocketRights, ...]" = ()
    monitors: "tuple[MonitorRights, ...]" = ()
    passthrough: str = ""
    share_maps: "tuple[ShareMap, ...]" = ()
    network: str = CALLERS_NETWORK
    taps: "tuple[TapSettings, ...]" = ()
    added: "tuple[str, ...]" = ()  # the last words of the command line, which the settings add
    shares: "tuple[AddedShare, ...]" = ()  # whose words these are
    notify: str = ""  # where the service manager wants to be told of QEMU's state


def build_plan(
    argv0: str,
    commandline: "CommandLine",
    needs: "Sequence[Need]",
    facts: "HostFacts",
    identity: "Identity",
    program: Program,
    settings: Settings,
    leased: bool,
) -> Plan:
    """Build the plan of a launch.

    Args:
        argv0: name under which QEMU is started.
        commandline: the caller's words.
        needs: what the catalogue found in them.
        facts: the host, with everything looked up that the needs name.
        identity: who QEMU will be.
        program: the real QEMU.
        settings: the configuration.
        leased: whether the identity holds a lease, whose fd QEMU keeps.
    """
    draft = Draft(commandline.objects, facts, identity, _find_named_fds(needs), settings.share_maps)
    draft.host_tree = WHOLE_HOST if settings.whole_host else NO_HOST
    draft.version, draft.memory, draft.taps = program.version, find_memory(commandline.objects), settings.taps
    _add_base(draft, program)
    for need in serve_monitors(draft, commandline, needs, settings):
        hand_over(draft, need, commandline)
    if settings.taps:
        from qemu_userns.plan.taps import refuse_unused

        refuse_unused(draft)
    if settings.shares:
        from qemu_userns.plan.virtiofs import add_daemons

        add_daemons(draft, settings.shares)
    _keep_for_incoming(draft, commandline)
    _add_default_kvm(draft, commandline, program)
    _add_default_display(draft)
    _add_temporary(draft, commandline)
    _consume_own(draft, commandline)
    sandbox = _add_sandbox(draft, commandline, program, settings)
    _reserve_fds(draft, leased)
    draft.check_fd_limit()
    confinement = _choose_confinement(draft, commandline, settings, sandbox)
    words, rewrites = _rewrite(draft, commandline, settings.added)
    return Plan(
        tuple(draft.grants),
        draft.host_tree,
        program.path,
        (argv0, *draft.words, *words),
        facts.caller.cwd,
        identity,
        rewrites,
        _find_unknown(commandline),
        confinement,
        tuple(([identity.warning] if identity.warning else []) + draft.warnings),
        tuple(draft.notes),
        settings.network,
        tuple(draft.logged),
    )


def _find_named_fds(needs: "Sequence[Need]") -> "frozenset[int]":
    """Return the numbers of fds that the command line names."""
    return frozenset(int(need.path) for need in needs if need.way == ways.FD and need.path.isdecimal())


def _keep_for_incoming(draft: Draft, commandline: "CommandLine") -> None:
    """Keep the fds that no option names where a command may name one later: libvirt restores with `migrate-incoming fd:N`."""
    named = {grant.number for grant in draft.grants if isinstance(grant, Monitor)}
    if any(obj.kind == "incoming" and obj.get("value") == "defer" for obj in commandline.objects):
        for number in sorted(draft.facts.caller.open_fds - named):
            draft.keep_fd(number, "-incoming defer: migrate-incoming may name it")


def _reserve_fds(draft: Draft, leased: bool) -> None:
    """Reserve numbers for the fds by which a lease, and what is to be removed, end with QEMU.

    A lease alone needs no supervisor: its lock ends with QEMU, and its file goes with the next launch.
    """
    if leased:
        draft.add(Reserved("the lease of QEMU's ids ends when its last process does", "lease", draft.next_fd()))
    stays = (CreateDir, Display, Listen, Monitor, QmpSocket, Virtiofsd)
    fates = ("temporary", "downscript")
    if any(isinstance(grant, stays) or any(getattr(grant, fate, False) for fate in fates) for grant in draft.grants):
        draft.add(Reserved("its end tells the supervisor that QEMU has ended", "supervisor", draft.next_fd()))


def _consume_own(draft: Draft, commandline: "CommandLine") -> None:
    """Take our own options out."""
    for option in commandline.options:
        if option.name == "userns":
            draft.edits.append(drop(option, "it is ours"))
            draft.add(Consume("-userns", "it is ours"))


def _add_default_kvm(draft: Draft, commandline: "CommandLine", program: Program) -> None:
    """Give KVM to a QEMU that is built for it and left to choose its accelerator."""
    name = program.path.rpartition("/")[2]
    if not name.endswith(("-microvm", "kvm")):
        return
    named = any(obj.kind == "accel" or (obj.kind == "machine" and obj.get("accel")) for obj in commandline.objects)
    if not named and all(option.name != "enable-kvm" for option in commandline.options):
        add_kvm(draft, "the accelerator that this QEMU takes by itself")


def names_display(commandline: "CommandLine") -> bool:
    """Say whether the command line says what QEMU shall show, and so keeps it from looking for something by itself."""
    return any(option.name in _DISPLAYS for option in commandline.options)


def _add_default_display(draft: Draft) -> None:
    """Have QEMU do without a window what it does where it has none to open: VNC for this host (qemu_init_displays() of vl.c)."""
    if not draft.facts.window or draft.host_tree != NO_HOST:
        return
    draft.words[:0] = ["-display", "none", "-vnc", _DEFAULT_VNC]
    if any(draft.facts.environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        draft.warnings.append(
            "QEMU does not see the desktop, so it opens no window: it is a VNC server for this host instead; "
            "-display none, -nographic, -vnc, -spice or fs=host says what is wanted"
        )


def _find_unknown(commandline: "CommandLine") -> "tuple[str, ...]":
    """Return the options that our own table does not have; -help of the QEMU at hand may have told of them."""
    return tuple(option.spelled for option in commandline.options if option.name and not BUILTIN.find(option.spelled.lstrip("-")))


def _add_base(draft: Draft, program: Program) -> None:
    """Add what every view holds."""
    for entry, fact in zip(BASE, draft.facts.base, strict=True):
        # What QEMU may not read is left out: to QEMU an absent /etc/qemu/qemu.conf is fine, an unreadable one is fatal.
        if fact.error is None and fact.kind != ABSENT and (entry.device or draft.may(fact, READ)):
            draft.way_to(fact, entry.why)
            draft.add(Bind(entry.why, fact.real, entry.writable, entry.device, fact.inode))
    draft.add(*(Link("standard streams", path, target) for path, target in LINKS))
    draft.add(*(Private("private to this VM", path, mode) for path, mode in PRIVATE))
    draft.add(Private("the caller's working directory", draft.facts.caller.cwd, tmpfs=False))
    ptmx = draft.facts.paths[PTMX]
    if ptmx.kind == CHARACTER:
        # A bind of /dev/ptmx alone cannot be opened: the kernel looks for "pts" beside it in its own mount (devpts).
        number = draft.next_fd()
        draft.add(Reserved("pseudo terminals; an fd that is only a path", "ptmx", number))
        draft.add(Link("pseudo terminals", PTMX, f"/proc/self/fd/{number}"))
    for path in (program.path, *program.extra_dirs):
        fact = draft.facts.paths[path]
        if fact.error is None and fact.kind != ABSENT:
            draft.bind(fact, False, "QEMU itself")


def _add_temporary(draft: Draft, commandline: "CommandLine") -> None:
    """Give QEMU a place for its temporary files: in memory, or on disk where they hold the data of a snapshot."""
    environment = draft.facts.environment.get("TMPDIR")
    snapshot = any(option.name == "snapshot" for option in commandline.options) or any(
        obj.is_on("snapshot") or ":rw:" in (obj.get("file") or "") for obj in commandline.objects
    )
    why = "temporary files of snapshots"
    for path in ("/var/tmp", environment) if environment else ("/var/tmp",):
        fact = draft.facts.paths[path]
        if fact.kind != DIRECTORY or fact.real == "/":
            continue
        draft.way_to(fact, why)
        if snapshot and fact.writable and draft.host_tree == NO_HOST:
            draft.add(CreateDir(why, fact.real))
        else:
            draft.add(Private("temporary files", fact.real, 0o1777))


def _add_sandbox(draft: Draft, commandline: "CommandLine", program: Program, settings: Settings) -> "str | None":
    """Add a -sandbox option, if any; return its value."""
    value = _choose_sandbox(commandline, program, settings)
    if value is not None:
        draft.words[:0] = ["-sandbox", value]
    return value


def _choose_sandbox(commandline: "CommandLine", program: Program, settings: Settings) -> "str | None":
    """Return the value of a -sandbox option to add, None for none.

    The settings are those that libvirt gives to every QEMU, but for what the command line itself needs. -daemonize forks and
    calls setsid. A spawn that is denied kills QEMU 7.2, so it is allowed where a monitor could ask for one (migrate exec:).
    """
    if not program.sandbox or settings.sandbox == "off" or any(obj.kind == "sandbox" for obj in commandline.objects):
        return None
    if settings.sandbox != "auto":
        return settings.sandbox
    names = {option.name for option in commandline.options}
    spawns = bool(names & _SPAWNING_OPTIONS) or _spawns(commandline)
    privileges = "allow" if spawns else "deny"
    has_monitor = bool(settings.sockets or settings.passthrough) or _has_monitor(commandline)
    spawn = "allow" if spawns or has_monitor else "deny"
    return f"on,obsolete=deny,elevateprivileges={privileges},spawn={spawn},resourcecontrol=deny"


def _has_monitor(commandline: "CommandLine") -> bool:
    """Say whether somebody can give QEMU commands: by a monitor that is named, or by the default one."""
    if any(obj.kind == "mon" or (obj.kind == "object" and obj.get("qom-type") in OBJECTS) for obj in commandline.objects):
        return True
    named = [obj for obj in commandline.objects if obj.kind in ("monitor", "qmp", "qmp-pretty")]
    if named:
        return any(obj.get("value") != "none" for obj in named)
    return all(option.name != "nodefaults" for option in commandline.options)


def _spawns(commandline: "CommandLine") -> bool:
    """Say whether QEMU will start other programs by itself."""
    return any(
        (obj.kind in ("netdev", "nic", "net") and obj.get("smb"))
        or any("-cmd:" in member.value and member.key.startswith("guestfwd") for member in obj.members)
        or (obj.kind == "incoming" and (obj.get("value") or "").startswith("exec:"))
        or (obj.kind == "run-with" and obj.is_on("async-teardown"))
        or (obj.kind == "display" and obj.get("type") == "spice-app")
        or (obj.get("value") or "").startswith("mon:")
        for obj in commandline.objects
    )


def _choose_confinement(draft: Draft, commandline: "CommandLine", settings: Settings, sandbox: "str | None") -> Confinement:
    """Choose what this kernel can confine with; refuse or warn where it cannot do enough."""
    abi = draft.facts.landlock_abi if draft.facts.landlock_abi >= _LOWEST_LANDLOCK_ABI else 0
    if not abi and settings.require_landlock:
        draft.refuse("require=landlock", "this kernel does not offer it", "boot Linux 5.19 or later with lsm=landlock,...")
    keys = any(obj.kind == "object" and obj.get("qom-type") == "secret_keyring" for obj in commandline.objects)
    if abi >= LANDLOCK_ABI_WITH_SCOPES:
        return Confinement(draft.capabilities, abi, _choose_scopes(commandline), draft.facts.call_filter, False, keys, sandbox)
    # The child of -daemonize has a pid that the filter cannot know.
    filtered = draft.facts.call_filter and all(option.name != "daemonize" for option in commandline.options)
    if not filtered and draft.identity.uid == draft.facts.caller.account.uid:
        draft.warnings.append(
            "QEMU can signal the caller's other processes: this kernel's Landlock does not scope signals (Linux 6.12 does), and "
            "a seccomp filter does not go with -daemonize"
        )
    return Confinement(draft.capabilities, abi, 0, draft.facts.call_filter, filtered, keys, sandbox)


def _choose_scopes(commandline: "CommandLine") -> int:
    """Return Landlock's scopes: signals never leave the VM, abstract sockets only where the command line has one."""
    for obj in commandline.objects:
        abstract = any(member.key.rpartition(".")[2] == "abstract" and as_switch(member.value) == "on" for member in obj.members)
        if abstract or (obj.kind == "display" and obj.get("type") in _DISPLAYS_WITH_SOCKETS):
            return _SCOPE_SIGNALS
    return _SCOPE_SIGNALS | _SCOPE_ABSTRACT_SOCKETS


def _rewrite(draft: Draft, commandline: "CommandLine", added: "tuple[str, ...]") -> "tuple[list[str], tuple[Rewrite, ...]]":
    """Return the caller's words as QEMU gets them, and what is changed and added."""
    draft.join_parts()
    words, copies = commandline.print_words(draft.edits)
    rewrites = _find_rewrites(commandline, draft.edits, words, copies)
    _add_copies(draft, commandline, copies)
    return words, (*rewrites, *_find_added((*draft.words, *added)))


def _find_added(words: "Sequence[str]") -> "tuple[Rewrite, ...]":
    """Say which options are added, each with its value."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return tuple(Rewrite("added", "", f"{option} {value}", "") for option, value in pairs)


def _find_rewrites(
    commandline: "CommandLine", edits: "Sequence[Edit]", words: "Sequence[str]", copies: "dict[int, str]"
) -> "tuple[Rewrite, ...]":
    """Say what the edits change, one line per word and per file."""
    reasons: "dict[int, list[str]]" = {}
    for edit in edits:
        reasons.setdefault(edit.source, []).append(edit.why)
    rewrites = []
    for index in sorted(reasons):
        source = commandline.sources[index]
        mine = [edit for edit in edits if edit.source == index]
        dropped = any(edit.form == "option" for edit in mine)
        after = copies[index] if index in copies else "" if dropped else apply_edits(source.text, mine)
        rewrites.append(Rewrite(source.where, source.text, after, "; ".join(dict.fromkeys(reasons[index]))))
    return tuple(rewrites)


def _add_copies(draft: Draft, commandline: "CommandLine", copies: "dict[int, str]") -> None:
    """Show QEMU a copy of each -readconfig file at the file's own path."""
    for index, text in copies.items():
        name = commandline.sources[index].where
        fact = draft.facts.paths.get(name)
        if fact is None or fact.error is not None:
            continue
        if fact.fd is not None:
            draft.add(Reserved("a copy of the -readconfig file that the caller passed", "copy", fact.fd, content=text))
            continue
        draft.way_to(fact, "-readconfig")
        draft.add(Copy("-readconfig", fact.real, text))
