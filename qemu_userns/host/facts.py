"""Look at the host once, for everything that a plan is made from."""

import errno
import fcntl
import os
import stat
import struct

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.buses import RENDER_NODES, RENDER_PREFIX, find_cancel_files, find_sys_directory
from qemu_userns.catalogue.images import find_layer
from qemu_userns.catalogue.needs import names_tap
from qemu_userns.host.paths import PathWalker
from qemu_userns.linux.landlock import probe_landlock
from qemu_userns.linux.seccomp import knows_machine
from qemu_userns.plan.base import BASE, KVM, PTMX
from qemu_userns.plan.facts import BLOCK, CHARACTER, DIRECTORY, REGULAR, HostFacts, ImageFact, PathFact, directory_of
from qemu_userns.plan.grants import READ, SEARCH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import Object
    from qemu_userns.plan.facts import Caller
    from qemu_userns.plan.grants import TapSettings
    from qemu_userns.plan.identity import Identity

_XATTR = "user.virtfs.qemu-userns"
_NOT_PATHS = (ways.FD, ways.NAME, ways.RUN, ways.CONSUME, ways.REFUSE, ways.KVM, ways.STAND_IN, ways.LOCK, ways.HOST_TREE)
_LOCKING = (ways.LOCK, ways.VFIO)


def look_at_host(
    needs: "Sequence[Need]",
    objects: "Sequence[Object]",
    caller: "Caller",
    identity: "Identity",
    environ: "Mapping[str, str]",
    program: str,
    extra: "Iterable[str]",
    taps: "Sequence[TapSettings]" = (),
) -> HostFacts:
    """Look up every path that the needs name, the headers of images, and what every view holds.

    Args:
        needs: of the command line.
        objects: of the command line.
        caller: with whose rights this process looks.
        identity: with whose rights it follows what only an image's header names.
        environ: the caller's.
        program: path of the real QEMU.
        extra: directories that this QEMU needs besides the system's, and where the settings want sockets.
        taps: what the settings say of taps.
    """
    walker = PathWalker(caller.cwd, caller.root)
    paths: "dict[str, PathFact]" = {}
    images: "dict[str, tuple[ImageFact, ...]]" = {}

    def look(path: str) -> PathFact:
        if path not in paths:
            paths[path] = walker.look(path)
        return paths[path]

    locks = False
    for need in needs:
        locks = locks or need.way in _LOCKING
        if need.way == ways.KVM:
            _name_group(look(KVM), paths)
        if need.way not in _NOT_PATHS:
            for path in _candidates(need):
                fact = look(path)
                _name_group(fact, paths)
            _look_closer(need, fact, paths)
            if need.row.entries and fact.kind == DIRECTORY and fact.fd is None:
                paths[need.path] = fact.replace(entries=_find_entries(fact.real, caller, identity))
            for path in need.find_entries(paths[need.path].entries):
                look(path)
            if need.way == ways.IMAGE and fact.kind in (REGULAR, BLOCK) and fact.readable and fact.fd is None:
                images[need.path] = _look_at_chain(need, objects, _reader(caller, identity))
                for image in images[need.path]:
                    look(image.path)
    for path in (program, PTMX, KVM, *extra, *_temporary(environ)):
        look(path)
    refused_taps = _find_refused_taps([need.obj.get("ifname") or "" for need in needs if need.way == ways.TAP], caller)
    refused_helpers = _find_refused_helpers(needs, paths)
    refused_settings = _find_refused_settings(needs, taps)
    not_taps = _find_others(needs)
    base = tuple(walker.look(entry.path, to_write=False) for entry in BASE)
    limit = (-1, -1)
    if locks:
        from qemu_userns.host.memory import find_lock_limit

        limit = find_lock_limit()
    return HostFacts(
        caller,
        paths,
        images,
        base,
        environ,
        probe_landlock(),
        refused_taps,
        refused_helpers,
        refused_settings,
        knows_machine(),
        limit,
        not_taps=not_taps,
    )


def _candidates(need: "Need") -> "tuple[str, ...]":
    """Return the paths that QEMU may mean; the last one is the plain reading."""
    if need.way == ways.PIPE:
        return (f"{need.path}.in", f"{need.path}.out", need.path)
    if need.way in (ways.MADE, ways.DISPLAY, ways.SOCKET, ways.LISTEN, ways.WRITE):
        return (directory_of(need.path), need.path)
    if need.way == ways.BRIDGE:
        from qemu_userns.plan.taps import HELPERS

        return HELPERS
    if need.way == ways.PASST:
        from qemu_userns.plan.passt import list_programs

        return (*list_programs(need.path), need.path)
    if need.way == ways.READ_MODULES:
        return (*(module.partition(" ")[0] for module in need.path.split(",")), need.path)
    if need.way == ways.TPM:
        return (*find_cancel_files(need.path), need.path)
    if need.way == ways.RENDER:
        nodes = [f"{RENDER_NODES}/{name}" for name in _list_render_nodes()] if need.path == RENDER_NODES else [need.path]
        return (*(path for node in nodes for path in (*_find_sys_directory(node), node)), need.path)
    if need.way == ways.VFIO:
        from qemu_userns.host.vfio import find_nodes

        return (f"{need.path}/subsystem", *find_nodes(need.path), need.path)
    return (need.path,)


def _name_group(fact: PathFact, paths: "dict[str, PathFact]") -> None:
    """Add the group's name to a device that the caller may not open: it may be what is missing."""
    if fact.kind not in (CHARACTER, BLOCK) or (fact.readable and fact.writable) or fact.group:
        return
    import grp

    try:
        name = grp.getgrgid(fact.gid).gr_name
    except KeyError:
        name = str(fact.gid)
    paths[fact.given] = fact.replace(group=name)


def _list_render_nodes() -> "tuple[str, ...]":
    """Return the names of the render nodes."""
    try:
        names = os.listdir(RENDER_NODES)
    except OSError:
        return ()
    return tuple(sorted(name for name in names if name.startswith(RENDER_PREFIX)))


def _find_sys_directory(node: str) -> "tuple[str, ...]":
    """Return the directory of a device node in /sys, if it is one."""
    try:
        found = os.stat(node)
    except OSError:
        return ()
    return (find_sys_directory(found.st_rdev),) if stat.S_ISCHR(found.st_mode) else ()


def _find_others(needs: "Iterable[Need]") -> "frozenset[int]":
    """Return which fds the command line names as taps, and are none."""
    numbers = [int(need.path) for need in needs if names_tap(need) and need.path.isdecimal()]
    if not numbers:
        return frozenset()
    from qemu_userns.host.taps import find_others

    return find_others(numbers)


def _find_refused_taps(names: "Sequence[str]", caller: "Caller") -> "tuple[tuple[str, str], ...]":
    """Return which taps the caller may not open, and why."""
    if not names:
        return ()
    from qemu_userns.host.taps import find_refused

    return find_refused(names, caller)


def _find_refused_helpers(needs: "Sequence[Need]", paths: "Mapping[str, PathFact]") -> "tuple[tuple[str, str, str, str], ...]":
    """Return which programs cannot make a tap for QEMU, their bridges, why, and what would help."""
    found = [need.obj for need in needs if need.way == ways.BRIDGE]
    if not found:
        return ()
    from qemu_userns.host.taps import find_refused_helpers
    from qemu_userns.plan.taps import read_helper

    return find_refused_helpers([read_helper(obj, paths) for obj in found])


def _find_refused_settings(needs: "Sequence[Need]", taps: "Sequence[TapSettings]") -> "tuple[tuple[str, str, str], ...]":
    """Return which taps cannot be made as the settings say, by id, why, and what would help."""
    if not taps:
        return ()
    from qemu_userns.host.tap_settings import find_refused_settings
    from qemu_userns.plan.taps import find_settings

    found = [(find_settings(taps, need.obj), need.obj.get("ifname") or "") for need in needs if need.way == ways.TAP]
    return find_refused_settings([(settings, name) for settings, name in found if settings is not None])


def _temporary(environ: "Mapping[str, str]") -> "tuple[str, ...]":
    """Return where QEMU makes temporary files."""
    return ("/var/tmp", environ["TMPDIR"]) if environ.get("TMPDIR") else ("/var/tmp",)


def _look_closer(need: "Need", fact: PathFact, paths: "dict[str, PathFact]") -> None:
    """Add what only some ways ask for."""
    if need.way == ways.SHARE and fact.error is None:
        paths[need.path] = fact.replace(xattrs=_probe_xattrs(fact.real), above=find_above(fact.real))
    elif need.way == ways.PIDFILE and fact.kind == REGULAR and fact.fd is None:
        paths[need.path] = fact.replace(locked=_probe_lock(fact.real))
    elif need.way == ways.MEMORY and fact.error is None and fact.kind in (DIRECTORY, REGULAR):
        from qemu_userns.host.memory import look_at_pages

        paths[need.path] = fact.replace(pages=look_at_pages(fact.real))
    elif need.way == ways.RENDER and fact.kind == DIRECTORY:
        paths[need.path] = fact.replace(entries=_list_render_nodes())
    elif need.way == ways.VFIO and fact.error is None and fact.kind == DIRECTORY:
        from qemu_userns.host.vfio import look_at_vfio

        paths[need.path] = fact.replace(vfio=look_at_vfio(fact.real))


def _find_entries(directory: str, caller: "Caller", identity: "Identity") -> "tuple[str, ...]":
    """Return the entries that a bind of the directory does not serve: symlinks, and files of root's that QEMU may not read."""
    try:
        with os.scandir(directory) as entries:
            found = [entry.name for entry in entries if entry.is_symlink() or (caller.root and not _may_read(entry, identity))]
    except OSError:
        return ()
    return tuple(sorted(found))


def _may_read(entry: "os.DirEntry[str]", identity: "Identity") -> bool:
    """Say whether QEMU may read an entry with its own rights."""
    found = entry.stat(follow_symlinks=False)
    return identity.may(found.st_mode, found.st_uid, found.st_gid, READ)


def _probe_xattrs(path: str) -> bool:
    """Say whether the file system has user.* attributes: asking for one that is not there ends in ENODATA."""
    try:
        os.getxattr(path, _XATTR)
    except OSError as err:
        return err.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def _probe_lock(path: str) -> bool:
    """Say whether a process holds the lock that QEMU takes on its pidfile; fcntl(2), F_GETLK."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, request)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def find_above(path: str) -> "tuple[tuple[int, int, int], ...]":
    """Return mode, uid and gid of the directories above a real path; () where the caller cannot look at one."""
    try:
        found = [os.stat(directory) for directory in _ancestors(path)]
    except OSError:
        return ()
    return tuple((status.st_mode, status.st_uid, status.st_gid) for status in found)


def _ancestors(path: str) -> "Iterator[str]":
    """Yield the directories that a walk to a real path passes."""
    while path != "/":
        path = os.path.dirname(path)
        yield path


def _reader(caller: "Caller", identity: "Identity") -> "Callable[[str], bool]":
    """Return what says whether QEMU may read a file with its own rights."""

    def may_read(path: str) -> bool:
        if not caller.root:
            return os.access(path, os.R_OK)
        real = os.path.realpath(path)
        try:
            return may(real, READ) and all(may(directory, SEARCH) for directory in _ancestors(real))
        except OSError:
            return False

    def may(path: str, want: int) -> bool:
        found = os.stat(path)
        return identity.may(found.st_mode, found.st_uid, found.st_gid, want)

    return may_read


def _look_at_chain(need: "Need", objects: "Iterable[Object]", may_open: "Callable[[str], bool]") -> "tuple[ImageFact, ...]":
    """Read which further files the header of an image names, with QEMU's probing rules: format=raw is never read."""
    from qemu_userns.host.images import find_chain

    layer = None if need.member is None else find_layer(need.obj, need.member.key, objects)
    chain = find_chain(need.path, format="raw" if layer is None else layer.format, may_open=may_open)
    named = [file for file in chain if file.role != "image" and not file.unresolved]
    return tuple(ImageFact(file.path, file.format, file.role, need.path, may_open(file.path)) for file in named)
