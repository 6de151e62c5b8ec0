"""The qemu-userns command."""

import os
import signal
import sys

from qemu_userns.cli.explain import explain
from qemu_userns.errors import UsageError
from qemu_userns.hooks.edge import run_at_edge
from qemu_userns.hooks.install import install
from qemu_userns.launch import launch
from qemu_userns.linux.process import read_environ
from qemu_userns.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_USAGE = """\
usage: qemu-userns run [--KEY=VALUE...] [--] qemu-system-ARCH [QEMU's arguments]
       qemu-userns explain [--json] [--KEY=VALUE...] [--] qemu-system-ARCH [QEMU's arguments]
       qemu-userns install DIR
       qemu-userns hook lxd|incus|libvirt|systemd [--apply | --remove | --check] [--divert] [--dir DIR] [--root DIR]
       qemu-userns hook lxd --snap DIR
       qemu-userns ps [--json]
       qemu-userns qmp [--compact] [--events] [--pass-fd N] (VM | --socket PATH) [COMMAND [KEY=VALUE...]]
       qemu-userns adopt [--replace] (VM | --all)
       qemu-userns share inspect [--json] [--map MAP] DIR
       qemu-userns share convert DIR --from MODEL --to MODEL [--map MAP] [--owner UID[:GID]] [--privileged] [--dry-run]
       qemu-userns --version | --help

run      start QEMU in its own user and mount namespace, becoming it
explain  print what run would do, and do nothing
install  put a drop-in for every qemu-system-* of this host into DIR
hook     set up LXD, Incus, libvirt or systemd to start the drop-in, undo or check that; else say what would be done
ps       list the caller's VMs that have a QMP monitor
qmp      send a command to a VM (name, uuid or pid) and print the reply; without one a shell; with --events its events
adopt    give a VM whose supervisor was killed a new one; --replace ends the one there is, for a newer version of this program
share    show what a guest sees of a 9p share, or convert it: passthrough, mapped-xattr, mapped-file

--share=PATH,tag=TAG[,driver=9p|virtiofs|both][,map=MAP]...[,readonly=on][,security_model=MODEL] adds a share
KEY=VALUE: fs=view|host, net=caller|none|PATH, sandbox=auto|off|VALUE, require=landlock, idmap=MAP, share.NAME.idmap=MAP,
  pool=START-END, qemu=PATH, off=on, qmp=PATH (a QMP socket more; may be repeated), passthrough=PATH (a monitor that QEMU serves
  by itself)
"""


def main() -> "NoReturn":
    """Run the command that the first word names; Ctrl-C ends it at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_at_edge(lambda: _main(sys.argv[1:]))


def _main(words: "list[str]") -> int:
    """Return the exit status."""
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(f"qemu-userns {version('qemu-userns')}")
    elif command == "run":
        settings, argv = parse_settings(rest)
        launch(Request(argv, read_environ(), None, settings))
    elif command == "explain":
        as_json = "--json" in rest[: _find_program(rest)]
        settings, argv = parse_settings([word for i, word in enumerate(rest) if word != "--json" or i >= _find_program(rest)])
        return explain(Request(argv, read_environ(), None, settings, preview=True), as_json)
    elif command == "install" and len(rest) == 1:
        for name in install(rest[0], os.environ.get("PATH", os.defpath)):
            print(os.path.join(rest[0], name))
    elif command == "ps" and rest in ([], ["--json"]):
        from qemu_userns.cli.ps import ps

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads our output may have enough of it
        return ps(bool(rest))
    elif command == "qmp":
        from qemu_userns.cli.qmp import qmp

        return qmp(rest)
    elif command == "adopt":
        from qemu_userns.cli.adopt import adopt

        return adopt(rest)
    elif command == "hook":
        from qemu_userns.cli.hook import hook

        return hook(rest)
    elif command == "share":
        from qemu_userns.cli.share import share

        return share(rest)
    else:
        raise UsageError(" ".join(words), "not understood", "qemu-userns --help lists the commands")
    return 0


def parse_settings(words: "list[str]") -> "tuple[tuple[tuple[str, str], ...], tuple[str, ...]]":
    """Split the words after `run` into our own options and QEMU's command line.

    Raises:
        UsageError: no program is named, or an option of ours is not --KEY=VALUE.
    """
    end = _find_program(words)
    settings: "list[tuple[str, str]]" = []
    for word in words[:end]:
        if word == "--":
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            raise UsageError(word, "not understood", "our own options are --KEY=VALUE, before the name of QEMU")
        if key == "share":
            from qemu_userns.host.settings_shares import split_option

            settings += split_option(value)
        else:
            settings.append((key, value))
    if end == len(words):
        raise UsageError("qemu-userns", "no QEMU is named", "qemu-userns run qemu-system-x86_64 ...")
    return tuple(settings), tuple(words[end:])


def _find_program(words: "list[str]") -> int:
    """Return the index of the first word that is not an option of ours."""
    for index, word in enumerate(words):
        if word == "--":
            return index + 1
        if not word.startswith("--"):
            return index
    return len(words)
