"""Look at the host, and build the plan: for `run` to carry out and for `explain` to print."""

import os

from qemu_userns.catalogue.needs import find_needs
from qemu_userns.host.cache import cache_dir
from qemu_userns.host.facts import find_above, look_at_host
from qemu_userns.plan.build import Program, Settings, build_plan, names_display
from qemu_userns.plan.facts import directory_of
from qemu_userns.plan.rights import expand_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.host.config import Config
    from qemu_userns.plan.plan import Plan
    from qemu_userns.request import Request, Start


def make_plan(start: "Start", request: "Request") -> "Plan":
    """Look at the host and build the plan; no side effects.

    Raises:
        QemuUsernsError: as `read_request`.
    """
    qemu, config, commandline = start.asked.qemu, start.asked.config, start.asked.commandline
    needs = find_needs(commandline)
    extra_dirs = (*qemu.library_dirs, *qemu.data_dirs, *_module_dirs(request.environ))
    served = [share.path for share in config.shares if start.asked.added and share.by_virtiofs]
    extra = (*extra_dirs, *served, *_places(config, commandline), *(met.path for met in start.stand_ins.values()))
    facts = look_at_host(needs, commandline.objects, start.caller, start.identity, request.environ, qemu.path, extra, config.taps)
    facts = facts.replace(stand_ins=start.stand_ins) if start.stand_ins else facts
    if not names_display(commandline):
        from qemu_userns.host.windows import opens_window

        facts = facts.replace(window=opens_window(qemu.path, request.environ))
    if served:
        from qemu_userns.host.virtiofsd import find_virtiofsd

        looked = {path: facts.paths[path].replace(above=find_above(facts.paths[path].real)) for path in served}
        facts = facts.replace(paths={**facts.paths, **looked}, virtiofsd=find_virtiofsd(cache_dir(request.environ, os.geteuid())))
    program = Program(qemu.path, qemu.version, qemu.sandbox, extra_dirs)
    settings = Settings(
        config.fs == "host",
        config.sandbox,
        "landlock" in config.require,
        config.sockets,
        config.monitors,
        config.passthrough,
        start.share_maps,
        config.net,
        config.taps,
        start.asked.added,
        config.shares if start.asked.added else (),
        request.environ.get("NOTIFY_SOCKET", "") if config.notify else "",
    )
    return build_plan(request.argv[0], commandline, needs, facts, start.identity, program, settings, start.lease is not None)


def _places(config: "Config", commandline: "CommandLine") -> "list[str]":
    """Return where the settings want sockets, and the directories of these."""
    paths = (*(socket.path for socket in config.sockets), *filter(None, (config.passthrough,)))
    places = [place for path in paths if (place := expand_path(path, commandline.objects)) is not None]
    return [*map(directory_of, places), *places]


def _module_dirs(environ: "Mapping[str, str]") -> "list[str]":
    """Return where the caller has QEMU look for modules."""
    return [path for path in (environ.get("QEMU_MODULE_DIR"),) if path]
