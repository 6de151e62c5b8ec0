"""Read what somebody asks for: the configuration, QEMU's command line, and from both who QEMU will be."""

import os

from qemu_userns.cmdline.objects import find_readconfigs, parse
from qemu_userns.cmdline.opts import parse_opts
from qemu_userns.cmdline.source import drop
from qemu_userns.cmdline.table import BUILTIN
from qemu_userns.errors import ResourceError, UsageError
from qemu_userns.host.accounts import find_account, look_at_caller
from qemu_userns.host.cache import cache_dir
from qemu_userns.host.config import Config, config_paths, configured_qemu, load_config, parse_userns_option
from qemu_userns.host.identity import find_identity
from qemu_userns.host.paths import find_fd
from qemu_userns.host.qemu import find_qemu, probe_qemu
from qemu_userns.plan.identity import CALLERS_NETWORK, NO_NETWORK
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.cmdline.objects import CommandLine, Object
    from qemu_userns.host.leases import Lease
    from qemu_userns.host.qemu import QemuFacts
    from qemu_userns.plan.facts import Account, Caller, StandIn
    from qemu_userns.plan.identity import Identity
    from qemu_userns.plan.idmaps import ShareMap

_CONFIG_MAX_BYTES = 16 << 20


class Request(Record):
    """What somebody asks for: QEMU's command line, and our own options beside it."""

    argv: "tuple[str, ...]"  # QEMU's, argv[0] included
    environ: "Mapping[str, str]"
    invoked: "str | None" = None  # the drop-in entry that was started
    settings: "tuple[tuple[str, str], ...]" = ()  # our own options, as key and value
    preview: bool = False  # nothing is leased


class Asked(Record):
    """A command line, read."""

    qemu: "QemuFacts"
    config: "Config"  # with what -userns says
    commandline: "CommandLine"
    added: "tuple[str, ...]" = ()  # the last words of it, which the settings add


class Start(Record):
    """What is known once it is read: enough for the supervisor to begin."""

    asked: Asked
    caller: "Caller"
    identity: "Identity"
    lease: "Lease | None"  # its fd is owned
    share_maps: "tuple[ShareMap, ...]" = ()  # of the settings, and of the stand-ins
    stand_ins: "Mapping[Object, StandIn]" = {}  # noqa: RUF012 (never changed) for virtfs-proxy-helper, by the share


def find_program(request: Request, config: "Config") -> str:
    """Return the path of the real QEMU."""
    name = os.path.basename(request.argv[0])
    wanted = request.argv[0] if request.invoked is None and "/" in request.argv[0] else name
    return find_qemu(wanted, request.environ.get("PATH", os.defpath), request.invoked, configured_qemu(config, name))


def read_settings(request: Request) -> "Config":
    """Return the configuration files' settings, overridden by those of the environment and by the request's own."""
    config = load_config(config_paths(request.environ), cache_dir(request.environ, os.geteuid()))
    words = request.environ.get("QEMU_USERNS", "")
    if words not in ("", "off"):
        config = parse_userns_option([(member.key, member.value) for member in parse_opts(words)], config, "QEMU_USERNS")
    return parse_userns_option(request.settings, config, "qemu-userns run")


def read_settings_if_sound(request: Request) -> "Config":
    """Return the settings, or none where a file is broken: the way out (QEMU_USERNS=off) must not depend on it."""
    try:
        return read_settings(request)
    except UsageError:
        return Config()


def read_request(request: Request, config: "Config") -> Asked:
    """Read the command line with the caller's rights.

    Raises:
        QemuUsernsError: any of its kinds, for what is wrong with the request or the host.
    """
    qemu = probe_qemu(find_program(request, config), cache_dir(request.environ, os.geteuid()))
    commandline = read_commandline(request.argv[1:], qemu)
    ours = [(member.key, member.value) for obj in commandline.objects if obj.kind == "userns" for member in obj.members]
    if ours:
        changed = parse_userns_option(ours, config)
        if changed.qemu != config.qemu:
            qemu = probe_qemu(find_program(request, changed), cache_dir(request.environ, os.geteuid()))
            commandline = read_commandline(request.argv[1:], qemu)
        config = changed
    added: "tuple[str, ...]" = ()
    if config.shares and not config.off:
        added = _find_added(config, commandline, qemu)
        commandline = read_commandline((*request.argv[1:], *added), qemu)
    if any(key.startswith("share.") for key, _ in (*request.settings, *ours)):
        from qemu_userns.host.shares import check_names

        check_names((key for key, _ in (*request.settings, *ours)), commandline.objects, config.shares)
    return Asked(qemu, config, commandline, added)


def _find_added(config: "Config", commandline: "CommandLine", qemu: "QemuFacts") -> "tuple[str, ...]":
    """Return the words of the shares that the settings add; raises UsageError."""
    from qemu_userns.host.settings_shares import check_shares
    from qemu_userns.plan.added_shares import build_words

    check_shares(config, commandline.objects)
    return tuple(build_words(config.shares, commandline.objects, qemu.path))


def find_start(asked: Asked, request: Request) -> Start:
    """Find out who the caller is and who QEMU will be, in the network namespace that QEMU will be in.

    Must not: change anything on the host but take a lease, and not even that for a preview.

    Raises:
        QemuUsernsError: any of its kinds, for what is wrong with the identities or the host.
    """
    if asked.config.net not in (CALLERS_NETWORK, NO_NETWORK):
        from qemu_userns.host.network import join_network

        join_network(asked.config.net)
    commandline = asked.commandline
    stand_ins, mapped = _meet_stand_ins(commandline, request.preview), None  # their fds are the caller's from here on
    caller = look_at_caller()
    user, preferred = _find_user(commandline), _preferred(commandline)
    if user is None and asked.config.user and caller.root:
        user = find_account(asked.config.user)
    share_maps = (*asked.config.share_maps, *(met.idmap for met in stand_ins.values() if met.idmap is not None))
    if share_maps:
        from qemu_userns.host.shares import find_mapped, list_mapped

        shares = asked.config.shares if asked.added else ()
        mapped = find_mapped(list_mapped(commandline.objects, share_maps, stand_ins, shares), caller.root)
    identity, lease = find_identity(caller, user, asked.config, preferred, request.preview, mapped)
    return Start(asked, caller, identity, lease, share_maps, stand_ins)


def _meet_stand_ins(commandline: "CommandLine", preview: bool) -> "dict[Object, StandIn]":
    """Return what the stand-ins for virtfs-proxy-helper hand over, by the share."""
    shares = [obj for obj in commandline.objects if obj.kind in ("fsdev", "virtfs") and obj.get("fsdriver") == "proxy"]
    if not shares:
        return {}
    from qemu_userns.host.stand_ins import meet

    return {share: meet(share, preview) for share in shares}


def plain_words(request: Request, asked: Asked) -> "tuple[str, ...]":
    """Return QEMU's words without our own option, for a QEMU that is executed as it is."""
    options = [option for option in asked.commandline.options if option.name == "userns"]
    words, _ = asked.commandline.print_words([drop(option, "it is ours") for option in options])
    return (request.argv[0], *words)


def read_commandline(words: "tuple[str, ...]", qemu: "QemuFacts") -> "CommandLine":
    """Parse the words of a command line and the -readconfig files that they name.

    Raises:
        ResourceError: such a file cannot be read.
        CommandLineError: such a file is malformed.
    """
    table = BUILTIN.with_learned(dict(qemu.options))
    configs = {index: _read_config(path) for index, path in find_readconfigs(words, table)}
    return parse(words, table, configs)


def _read_config(path: str) -> str:
    """Read a -readconfig file with the caller's rights, or an fd that the caller passed, whose content QEMU gets as a copy."""
    number = find_fd(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if number is None else os.dup(number)
        with os.fdopen(fd, "rb") as file:
            return os.fsdecode(file.read(_CONFIG_MAX_BYTES))
    except OSError as err:
        raise ResourceError(f"-readconfig {path}", err.strerror or str(err)) from err


def _find_user(commandline: "CommandLine") -> "Account | None":
    """Return the user that -runas or -run-with user= names; the last one counts."""
    user = None
    for obj in commandline.objects:
        text = obj.get("value") if obj.kind == "runas" else obj.get("user") if obj.kind == "run-with" else None
        if text:
            user = find_account(text)
    return user


def _preferred(commandline: "CommandLine") -> str:
    """Return what names the VM: its uuid, else its name."""
    found = {obj.kind: obj.get("value") or obj.get("guest") or "" for obj in commandline.objects if obj.kind in ("uuid", "name")}
    return found.get("uuid") or found.get("name") or ""
