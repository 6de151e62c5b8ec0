"""Hand over taps: opened outside, with their scripts, helpers and vhost-net, and passed as fds. Pure.

What QEMU will refuse is left alone, so that it says so itself.

Source: net/tap.c, net/tap-linux.c and net/net.c of QEMU, 7.2 to 11.0.
"""

from qemu_userns.catalogue import ways
from qemu_userns.cmdline.objects import as_switch
from qemu_userns.cmdline.source import replace
from qemu_userns.plan.facts import ABSENT, CHARACTER, MISSING, REGULAR
from qemu_userns.plan.grants import HELPER_FD, READ, WRITE, Helper, OpenFd, Refuse, Tap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import Object
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PathFact
    from qemu_userns.plan.grants import TapSettings

_O_RDWR = 2
_NAME_MAX_BYTES = 15  # QEMU cuts what is longer: IFNAMSIZ
_SCRIPT, _DOWNSCRIPT = "/etc/qemu-ifup", "/etc/qemu-ifdown"
_NETWORKS = ("netdev", "nic", "net")
_BRIDGE = "br0"
# Where builds of QEMU have it, the first one of them that is there.
HELPERS = ("/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper", "/usr/local/libexec/qemu-bridge-helper")
NAME_HELPER = "name another by helper="
# What QEMU refuses beside fd= and fds=.
_TAP_KEYS = ("ifname", "script", "downscript", "vnet_hdr", "queues")
_HELPER_KEYS = ("br", "helper")


def hand_over(draft: "Draft", need: "Need") -> None:
    """Add what a tap, the helper that makes one, or its vhost-net takes."""
    match need.way:
        case ways.TAP:
            _open_tap(draft, need)
        case ways.BRIDGE:
            _run_helper(draft, need)
        case ways.VHOST:
            _open_vhost(draft, need)


def read_helper(obj: "Object", paths: "Mapping[str, PathFact]") -> "tuple[str, str]":
    """Return the program that makes a tap for QEMU, "" for none, and the bridge that it is for."""
    default = next((path for path in HELPERS if paths[path].kind == REGULAR), "")
    return obj.get("helper") or default, obj.get("br") or _BRIDGE


def is_command(helper: str) -> bool:
    """Tell a line for the shell from a path; net/tap.c."""
    return " " in helper or "\t" in helper


def find_settings(taps: "Sequence[TapSettings]", obj: "Object") -> "TapSettings | None":
    """Return what the settings say of a nic's tap, None for nothing."""
    return next((settings for settings in taps if settings.name == obj.id), None)


def refuse_unused(draft: "Draft") -> None:
    """Refuse settings for a tap where the nic that they name has another back end, or a tap that is made elsewhere."""
    used = {grant.settings.name for grant in draft.grants if isinstance(grant, Tap) and grant.settings}
    if any(isinstance(grant, Refuse) for grant in draft.grants):
        return
    for obj in draft.objects:
        settings = find_settings(draft.taps, obj) if obj.kind in _NETWORKS else None
        if settings and settings.name not in used:
            hint = f"leave the settings out, or have one made: -netdev tap,id={settings.name}"
            draft.refuse(f"-{obj.kind} {settings.name}", f"tap.{settings.name} is for a tap that is made for the VM", hint)


def _open_tap(draft: "Draft", need: "Need") -> None:
    obj = need.obj
    queues = _count_queues(obj)
    vnet_hdr = as_switch(obj.get("vnet_hdr"))
    if not 0 < queues <= draft.most_queues or vnet_hdr not in (None, "on", "off") or obj.get("vhostfds"):
        return
    if obj.kind == "net" and obj.get("queues"):  # QEMU knows no queues behind a hub
        return
    fact = draft.path(need.path)
    if fact.kind == ABSENT and fact.error in (None, MISSING):
        draft.refuse_missing(need)
        return
    if not draft.check(need, fact, READ | WRITE):
        return
    name, settings = _cut(obj.get("ifname") or ""), find_settings(draft.taps, obj)
    for refused, reason, hint in draft.facts.refused_settings if settings else ():
        if refused == obj.id:
            draft.refuse(f"{need.describe()} tap.{refused}", reason, hint)
            return
    for refused, reason in draft.facts.refused_taps:
        if refused == name:
            draft.refuse(f"{need.describe()} {name}".rstrip(), reason, _hint(draft, name, queues))
            return
    numbers = tuple(draft.next_fd() for _ in range(queues))
    defaults = ("", "") if settings else (_SCRIPT, _DOWNSCRIPT)  # these stand in for the scripts that nobody has named
    script, downscript = (_find_script(draft, obj, *named) for named in zip(("script", "downscript"), defaults, strict=True))
    header = None if vnet_hdr is None else vnet_hdr == "on"
    draft.add(Tap(need.describe(), name, numbers, header, script, downscript, settings))
    _give(draft, obj, numbers, _TAP_KEYS)


def _run_helper(draft: "Draft", need: "Need") -> None:
    """Have the helper run outside, where set-uid means something, and make a tap of QEMU's of what it opens."""
    obj, kind = need.obj, need.member
    if any(obj.get(key) for key in _TAP_KEYS) or kind is None:
        return
    helper, bridge = read_helper(obj, draft.facts.paths)
    if not helper:
        draft.refuse(f"{need.describe()} {need.path}", MISSING, f"install it (Debian: qemu-system-common), or {NAME_HELPER}")
        return
    for *refused, reason, hint in draft.facts.refused_helpers:
        if refused == [helper, bridge]:
            draft.refuse(f"{need.describe()} {helper}", reason, hint)
            return
    options = ("--use-vnet", f"--fd={HELPER_FD}")
    if is_command(helper):
        words = (helper, *options, *(() if "--br=" in helper else (f"--br={bridge}",)))
        argv: "tuple[str, ...]" = ("/bin/sh", "-c", " ".join(words))
    else:
        argv = (_make_absolute(draft, helper), *options, f"--br={bridge}")
    number = draft.next_fd()
    draft.add(Helper(need.describe(), argv, number))
    if kind.value != "tap":
        draft.edits.append(replace(kind, "tap", "a bridge's tap is one like others once it is open"))
    _give(draft, obj, (number,), _HELPER_KEYS)


def _open_vhost(draft: "Draft", need: "Need") -> None:
    """Open vhost-net for each queue; where the caller may not, QEMU goes on without it, or says so."""
    obj, fact = need.obj, draft.path(need.path)
    fds = obj.get("fds") or ""
    queues = len(fds.split(":")) if fds else _count_queues(obj)
    if fact.kind != CHARACTER or not 0 < queues <= draft.most_queues:
        return
    if not draft.caller_may(fact, READ | WRITE):
        draft.bind(fact, True, need.describe(), device=True)
        return
    numbers = tuple(draft.next_fd() for _ in range(queues))
    why = need.describe()
    draft.add(*(OpenFd(why, fact.real, need.path, _O_RDWR, number, None, fact.inode, fact.device) for number in numbers))
    key = "vhostfds" if fds or queues > 1 else "vhostfd"
    draft.give_fds(obj, key, numbers, (), f"{need.path} is opened outside, once for each queue")


def _give(draft: "Draft", obj: "Object", numbers: "tuple[int, ...]", gone: "tuple[str, ...]") -> None:
    """Name the fds of a tap."""
    names = ":".join(map(draft.name_fd, numbers))
    why = f"the tap is opened outside and passed as {names}, which is what `info network` shows of it"
    draft.give_fds(obj, "fds" if len(numbers) > 1 else "fd", numbers, gone, why)


def _count_queues(obj: "Object") -> int:
    """Return how many queues a tap has, 0 if QEMU will refuse the number."""
    text = obj.get("queues") or "1"
    return int(text) if text.isdecimal() and text.isascii() else 0


def _cut(name: str) -> str:
    """Return the part of an interface's name that QEMU reads."""
    return name.encode("utf-8", "surrogateescape")[:_NAME_MAX_BYTES].decode("utf-8", "surrogateescape")


def _find_script(draft: "Draft", obj: "Object", key: str, default: str) -> str:
    """Return the path of a script, "" for none."""
    path = obj.get(key, default) or ""
    return "" if path in ("", "no") else _make_absolute(draft, path)


def _make_absolute(draft: "Draft", path: str) -> str:
    """Return a path that leads to the same from elsewhere; QEMU does not look in PATH."""
    return path if path.startswith("/") else f"{draft.facts.caller.cwd.rstrip('/')}/{path}"


def _hint(draft: "Draft", name: str, queues: int) -> str:
    """Say how root gives a tap to the caller."""
    return (
        f"have root make one: ip tuntap add dev {name or 'tap0'} mode tap user {draft.facts.caller.account.name}"
        + (" multi_queue" if queues > 1 else "")
        + ("" if name else ", and name it by ifname=tap0")
    )
