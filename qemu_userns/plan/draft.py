"""A plan in the making: what the handovers add to, in the order of the command line. Pure."""

from qemu_userns.catalogue.ways import OWN_FDSET_BASE
from qemu_userns.cmdline.source import Edit, append, remove, replace
from qemu_userns.plan.facts import ABSENT, DIRECTORY, MISSING, directory_of
from qemu_userns.plan.grants import READ, SEARCH, WRITE, Bind, Create, CreateDir, Grant, KeepFd, Link, Private, Refuse
from qemu_userns.plan.identity import build_owner_map
from qemu_userns.plan.layout import is_below
from qemu_userns.plan.plan import NO_HOST, READ_ONLY_HOST, WHOLE_HOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.chardev import LegacyChardev
    from qemu_userns.cmdline.objects import Object
    from qemu_userns.cmdline.source import Member
    from qemu_userns.plan.facts import HostFacts, PathFact
    from qemu_userns.plan.grants import OpenFd, TapSettings
    from qemu_userns.plan.identity import Identity, MountMap
    from qemu_userns.plan.idmaps import ShareMap

# With these an NBD client connects again.
_ANEW = ("reconnect-delay", "open-timeout")
MONITOR_OBJECTS = (11, 1)  # from this version on QEMU warns of -mon
MONITORS = ("monitor", "qmp", "qmp-pretty")
LOWEST_OWN_FD = 300  # fds that the plan adds are numbered from here, out of the way of those that callers count from 3
_LOW_FD_LIMIT = LOWEST_OWN_FD + 64  # below it they are numbered from as low as can be
_LAUNCHERS_FDS = 32  # that it opens besides: the lowest numbers that are free


class Draft:
    """Grants, edits and words so far, and the facts that they are decided from."""

    most_queues = 256  # of a tap: the kernel's limit

    def __init__(
        self,
        objects: "Sequence[Object]",
        facts: "HostFacts",
        identity: "Identity",
        named_fds: "frozenset[int]",
        share_maps: "tuple[ShareMap, ...]" = (),
    ) -> None:
        """Start with nothing.

        Args:
            objects: of the command line.
            facts: what the host looks like.
            identity: who QEMU will be.
            named_fds: numbers that the command line names, open or not; never given to anything else.
            share_maps: id maps of shares that the settings name.
        """
        self.objects = objects
        self.facts = facts
        self.identity = identity
        self.share_maps = share_maps
        self.grants: "list[Grant]" = []
        self.edits: "list[Edit]" = []
        self.words: "list[str]" = []  # added before the caller's
        self.warnings: "list[str]" = []  # said at every launch
        self.logged: "list[str]" = []  # warnings that explain and the VM's log say
        self.notes: "list[str]" = []  # said by explain
        self.capabilities: "frozenset[int]" = frozenset()
        self.host_tree = NO_HOST
        self.version: "tuple[int, ...]" = ()  # of the real QEMU
        self.taps: "tuple[TapSettings, ...]" = ()
        self.memory = ("", "")  # the values of -m: size and maxmem
        self._parts: "dict[Member, list[tuple[int, int, str, str]]]" = {}
        self._taken = set(facts.caller.open_fds | named_fds)
        self._fdset = 0
        self._busy_fds = len(facts.caller.open_fds) + _LAUNCHERS_FDS
        self._lowest_fd = max(self._busy_fds, LOWEST_OWN_FD if facts.caller.fd_limit >= _LOW_FD_LIMIT else 0)
        self._own_fds: "set[int]" = set()

    def add(self, *grants: Grant) -> None:
        """Add grants."""
        self.grants += grants

    def refuse(self, why: str, reason: str, hint: "str | None" = None) -> None:
        """Add a refusal."""
        self.grants.append(Refuse(why, reason, hint))

    def refuse_open(self, need: "Need", reason: str, hint: "str | None" = None) -> None:
        """Refuse a path that leads nowhere, or that the caller may not open."""
        self.refuse(f"{need.describe()} {need.path}", reason, hint)

    def refuse_missing(self, need: "Need") -> None:
        """Refuse what is not there, a device with what would make it."""
        from qemu_userns.plan.refusals import NO_NODE, find_remedy

        remedy = find_remedy(need.path)
        if remedy is not None:
            self.refuse(f"{need.describe()} {need.path}", NO_NODE, remedy)
        else:
            self.refuse_open(need, MISSING, missing_hint(need, self.facts.caller.cwd))

    def refuse_access(self, need: "Need", what: str) -> None:
        """Refuse what QEMU's id may not do, and what no fd can stand in for."""
        fact, account = self.path(need.path), self.facts.caller.account
        if self.facts.caller.root:
            owner = f"it belongs to {fact.uid}:{fact.gid} and has mode {fact.mode & 0o7777:04o}"
            hint = f"{owner}; change that, or use -run-with user="
        else:
            from qemu_userns.plan.refusals import explain_denied

            hint = explain_denied(fact, account, WRITE)
        self.refuse(f"{need.describe()} {need.path}", f"QEMU's id {self.identity.uid} may not {what}", hint)

    def show_host(self, read_only: bool) -> None:
        """Show the whole host tree, writable if any of those who ask for it need it so."""
        self.host_tree = READ_ONLY_HOST if read_only and self.host_tree != WHOLE_HOST else WHOLE_HOST

    def replace_part(self, member: "Member", start: int, end: int, text: str, why: str) -> None:
        """Replace a part of a member's decoded value; several parts of one become one edit."""
        self._parts.setdefault(member, []).append((start, end, text, why))

    def join_parts(self) -> None:
        """Make edits of the replaced parts."""
        for member, parts in self._parts.items():
            value = member.value
            for start, end, text, _ in sorted(parts, reverse=True):
                value = value[:start] + text + value[end:]
            self.edits.append(replace(member, value, "; ".join(why for _, _, _, why in parts)))

    def next_fd(self) -> int:
        """Return a number for an fd of our own."""
        number = self._lowest_fd
        while number in self._taken or number in self._own_fds:
            number += 1
        self._own_fds.add(number)
        return number

    def check_fd_limit(self) -> None:
        """Refuse where the fds are more than the caller may open; root holds one for each place of the view meanwhile."""
        limit = self.facts.caller.fd_limit
        places = sum(isinstance(grant, Bind | Create | CreateDir) for grant in self.grants) if self.identity.switch else 0
        needed = max((*self._own_fds, self._busy_fds + len(self._own_fds) + places)) + 1
        if limit < needed:
            self.refuse("open files", f"ulimit -n is {limit}", f"raise it to at least {needed}")

    def next_fdset(self) -> int:
        """Return a number for an fdset of our own, high so that it does not meet the caller's -add-fd."""
        self._fdset += 1
        return OWN_FDSET_BASE + self._fdset

    def pass_file(self, grant: "OpenFd") -> None:
        """Add a file to its fdset."""
        self.add(grant)
        self.words += ("-add-fd", f"fd={grant.number},set={grant.fdset},opaque={grant.given.replace(',', ',,')}")

    def name_fd(self, number: int) -> str:
        """Return how QEMU is told of an fd."""
        return str(number)

    def give_fds(self, obj: "Object", key: str, numbers: "Sequence[int]", gone: "Sequence[str]", why: str) -> None:
        """Name fds that are opened outside.

        Args:
            obj: which takes them.
            key: the member that names them.
            numbers: of the fds.
            gone: members that QEMU refuses beside them.
            why: for `explain`.
        """
        self.edits += (remove(obj, member, why) for name in gone for member in obj.find_all(name))
        self.edits.append(append(obj, key, ":".join(map(self.name_fd, numbers)), why))

    def pass_node(self, need: "Need", grant: "OpenFd") -> bool:
        """Name the fd of a device node that is opened outside; return whether there is a place for it."""
        why = f"{grant.path} is opened outside and passed as fd {grant.number}"
        self.edits.append(append(need.obj, need.row.fd_key, str(grant.number), why))
        return True

    def takes_fd(self, need: "Need") -> bool:
        """Say whether a socket can be passed instead of its path: a chardev's, but vhost-user network backends refuse such."""
        users = (obj for obj in self.objects if obj.kind == "netdev" and obj.get("type") == "vhost-user")
        if need.legacy is not None or (need.obj.kind == "chardev" and all(obj.get("chardev") != need.obj.id for obj in users)):
            return True
        return self._find_family(need) is not None

    def pass_socket(self, need: "Need", number: int) -> None:
        """Rewrite a chardev from `path=` to `fd=`, one in the old language to -chardev and its id."""
        why = f"{need.path} is made outside and passed as fd {number}"
        if need.legacy is not None:
            members = (("fd", str(number)), *((key, value) for key, value in need.legacy.members if key != "path"))
            self.legacy_to_chardev(need.obj, need.legacy.replace(members=members), why)
        elif need.member is not None and need.obj.kind == "chardev":
            self.edits += (remove(need.obj, member, why) for member in need.obj.find_all(need.member.key))
            self.edits.append(append(need.obj, "fd", str(number), why))
        elif need.member is not None:
            self._pass_address(need, need.member, number, why)

    def _find_family(self, need: "Need") -> "Member | None":
        """Return the "type" beside a "path", if they are an address that may be the number of an fd as well.

        A stream's may. An NBD client's may too where it connects once; -drive has no place for it but in members of its own.
        """
        if need.member is None or need.part is not None or need.member.form not in ("opts", "json"):
            return None
        stream = need.obj.kind == "netdev" and need.obj.get("type") == "stream"
        once = not any(member.key.rpartition(".")[2] in _ANEW for member in need.obj.members)
        nbd = need.obj.kind in ("blockdev", "drive") and need.member.key.endswith("server.path") and once
        return need.obj.find(f"{need.member.key.removesuffix('path')}type") if stream or nbd else None

    def _pass_address(self, need: "Need", path: "Member", number: int, why: str) -> None:
        """Rewrite {"type": "unix", "path": PATH} to {"type": "fd", "str": NUMBER}, as members or in JSON."""
        address = path.key.removesuffix("path")
        family = self._find_family(need)
        if family is None:
            return
        unix_only = [member for key in ("abstract", "tight") for member in need.obj.find_all(f"{address}{key}")]
        text = f'"str":"{number}"' if path.form == "json" else f"{address}str={number}"
        self.edits += [
            replace(family, "fd", why),
            Edit(path.source, path.item, path.end, text, why),
            *(remove(need.obj, member, why) for member in unix_only),
        ]

    def run(self, need: "Need") -> None:
        """Leave a program to QEMU, which starts it in its view."""

    def path(self, path: str) -> "PathFact":
        """Return the fact of a path."""
        return self.facts.paths[path]

    def find_entry(self, path: str) -> "tuple[str, str | None]":
        """Return where a new socket lies, and why the caller cannot make it there.

        A symlink at the path itself is replaced, as QEMU does, not followed.
        """
        directory = self.path(directory_of(path))
        error = directory.error or (None if directory.kind != ABSENT else MISSING)
        if error is None and not directory.writable:
            error = "Permission denied"
        return f"{directory.real.rstrip('/')}/{path.rpartition('/')[2]}", error

    def may(self, fact: "PathFact", want: int) -> bool:
        """Say whether QEMU may open an existing file with its own rights; `want` as in Identity.may."""
        if self.identity.uid == self.facts.caller.account.uid:
            return self.caller_may(fact, want)
        return self.identity.may(fact.mode, fact.uid, fact.gid, want)

    def caller_may(self, fact: "PathFact", want: int) -> bool:
        """Say whether the caller may."""
        return (fact.readable or not want & READ) and (fact.writable or not want & WRITE)

    def way_to(self, fact: "PathFact", why: str) -> None:
        """Show what a path passes on its way: symlinks, and directories that a ".." leaves again."""
        self.add(*(Link(why, path, target) for path, target in fact.links))
        self.add(*(Private(why, path, tmpfs=False) for path in fact.passed))

    def bind(self, fact: "PathFact", writable: bool, why: str, device: bool = False, idmap: "MountMap | None" = None) -> None:
        """Show an existing path, idmapped where that is asked for, or QEMU could not read it otherwise and it is not writable."""
        if is_shown(fact.real) and not (device and is_below(fact.real, "/dev/pts")):  # the view's terminals are no devices
            return
        self.way_to(fact, why)
        want = READ | SEARCH if fact.kind == DIRECTORY else READ
        if idmap is None and not writable and not device and self.facts.caller.root and not self.may(fact, want):
            idmap = build_owner_map(fact.uid, fact.gid, self.identity)
        self.add(Bind(why, fact.real, writable, device, fact.inode, idmap))

    def bind_as_own(self, fact: "PathFact", why: str) -> None:
        """Show what QEMU's id is the owner of there, and nowhere else; only root can. A socket needs no writable mount."""
        self.bind(fact, False, why, idmap=build_owner_map(fact.uid, fact.gid, self.identity))

    def legacy_to_chardev(self, obj: "Object", legacy: "LegacyChardev", why: str) -> None:
        """Rewrite a character device in the old language to a -chardev of the same label, and `chardev:LABEL`.

        QEMU gives such devices labels by their kind and order, and so does this, for query-chardev to stay the same.

        Args:
            obj: the option in the old language.
            legacy: what shall become of it.
            why: for `explain`.
        """
        member = obj.find("value")
        if member is None:
            return
        label = self.label(obj)
        members = [f"{key}={value.replace(',', ',,')}" for key, value in legacy.members]
        mux = ["mux=on"] if legacy.mux else []
        self.words += ("-chardev", ",".join([legacy.backend, f"id={label}", *members, *mux]))
        if legacy.mux:
            if self.version >= MONITOR_OBJECTS:
                self.words += ("-object", f"monitor-hmp,id=qemu-userns-{label},chardev={label}")
            else:
                self.words += ("-mon", f"chardev={label},mode=readline")
        self.edits.append(replace(member, f"chardev:{label}", why))

    def label(self, obj: "Object") -> str:
        """Return the label that QEMU would give to an old style character device."""
        before = [other for other in self.objects if other.option < obj.option]
        if obj.kind in MONITORS:
            return f"compat_monitor{count_numbered(before)}"
        if obj.kind not in ("serial", "parallel"):
            return obj.kind
        return f"{obj.kind}{sum(other.kind == obj.kind and other.get('value') != 'none' for other in before)}"

    def keep_fd(self, number: int, why: str, reopened: bool = False) -> None:
        """Keep an fd of the caller under its number; one that is not open is QEMU's to complain about."""
        if (number > 2 or reopened) and number in self.facts.caller.open_fds:
            self.add(KeepFd(why, number, reopened))

    def check(self, need: "Need", fact: "PathFact", want: int) -> bool:
        """Refuse what does not exist or what the caller may not open; return whether it may."""
        if fact.error is not None and fact.error != MISSING:
            self.refuse_open(need, fact.error)
        elif fact.kind == ABSENT:
            self.refuse_missing(need)
        elif not self.caller_may(fact, want):
            self.refuse_denied(need, fact, want)
        else:
            return True
        return False

    def refuse_denied(self, need: "Need", fact: "PathFact", want: int) -> None:
        """Refuse what the caller may not open, with what would open it."""
        from qemu_userns.plan.refusals import explain_denied

        self.refuse_open(need, "Permission denied", explain_denied(fact, self.facts.caller.account, want))


def find_memory(objects: "Sequence[Object]") -> "tuple[str, str]":
    """Return the values of -m: size and maxmem, "" for none; the last of each counts."""
    found = {key: obj.get(key) for obj in objects if obj.kind == "memory" for key in ("size", "maxmem") if obj.get(key)}
    return found.get("size") or "", found.get("maxmem") or ""


def is_shown(path: str) -> bool:
    """Say whether every view shows a path already: processes, pseudo terminals, memory that is the VM's own."""
    return any(is_below(path, shown) for shown in ("/proc", "/dev/pts", "/dev/fd")) or path == "/dev/shm"


def missing_hint(need: "Need", cwd: str) -> str:
    """Say what a relative path is relative to."""
    return "check the path" if need.path.startswith("/") else f"the path is relative to {cwd}"


def count_numbered(objects: "Iterable[Object]") -> int:
    """Return how many monitors in the old language are numbered by QEMU: not those that name a character device."""
    monitors = [obj.get("value") or "" for obj in objects if obj.kind in MONITORS]
    return sum(value != "none" and not value.startswith("chardev:") for value in monitors)
