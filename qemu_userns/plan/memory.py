"""How much memory QEMU takes, and whether it may: locked, or in huge pages. Pure.

CAP_IPC_LOCK counts only outside of the namespace, so that RLIMIT_MEMLOCK is what allows QEMU to lock memory: root has it raised,
everybody else needs one that is enough.
"""

from qemu_userns.plan.grants import LockLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qemu_userns.catalogue.needs import Need
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import PagesFact

_MIB = 1 << 20
_DEFAULT_BYTES = 128 * _MIB
_SHIFTS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_NO_LIMIT = -1  # RLIM_INFINITY as Python has it


def lock_memory(draft: "Draft", need: "Need") -> None:
    """Allow QEMU to lock all its memory; a limit of an ordinary caller's stays, and has to be enough."""
    soft, hard = draft.facts.lock_limit
    if soft == _NO_LIMIT:
        return
    if draft.facts.caller.root and hard == _NO_LIMIT:
        draft.add(LockLimit(need.describe(), None))
    else:
        check_limit(draft, need, (soft, "soft"), count_guest_bytes(draft.memory))


def is_enough(limit: int, wanted: int) -> bool:
    """Say whether a limit allows so many bytes."""
    return limit == _NO_LIMIT or limit >= wanted


def check_limit(draft: "Draft", need: "Need", limit: "tuple[int, str]", wanted: int) -> bool:
    """Refuse what a limit of the caller's, soft or hard, does not allow; return whether it does."""
    value, kind = limit
    if is_enough(value, wanted):
        return True
    draft.refuse(
        need.describe(),
        f"RLIMIT_MEMLOCK ({kind}) is {value >> 10} KiB, and {wanted >> 10} KiB of memory are to be locked",
        "raise it: memlock in /etc/security/limits.conf, LimitMEMLOCK= of a systemd unit, or prlimit --memlock= "
        "with CAP_SYS_RESOURCE",
    )
    return False


def check_pages(draft: "Draft", need: "Need", pages: "PagesFact") -> bool:
    """Refuse more huge pages than are to be had; return whether there are enough."""
    size = need.obj.get("size") or ""
    wanted = _read_size(size, 1) if need.obj.kind == "object" else count_guest_bytes(draft.memory)
    count = -(-(wanted or 0) // pages.size_bytes)
    if count <= pages.free:
        return True
    kib = pages.size_bytes >> 10
    draft.refuse(
        f"{need.describe()} {need.path}",
        f"{count} huge pages of {kib} KiB are needed, and {pages.free} are to be had",
        f"sysctl vm.nr_hugepages={pages.total + count - pages.free}, or /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages",
    )
    return False


def count_guest_bytes(memory: "Sequence[str]") -> int:
    """Return the most memory that the guest may have, from the values of -m: size, which is in MiB, and maxmem, in bytes."""
    return max(_read_size(text, unit) or 0 for text, unit in zip(memory, (_MIB, 1), strict=True)) or _DEFAULT_BYTES


def _read_size(text: str, unit: int) -> "int | None":
    """Return a size in bytes, None for what QEMU would refuse; `unit` is that of a number without one."""
    number, shift = (text[:-1], _SHIFTS[text[-1:].lower()]) if text[-1:].lower() in _SHIFTS else (text, None)
    try:
        value = float(number)
    except ValueError:
        return None
    return int(value * (unit if shift is None else 1 << shift))
