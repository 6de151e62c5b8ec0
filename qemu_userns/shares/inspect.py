"""Look at a share: what the host has, and what a guest sees under each security model."""

import os
import stat

from qemu_userns.record import Record
from qemu_userns.shares.idmap import OVERFLOW_ID
from qemu_userns.shares.stores import MODELS, STORES
from qemu_userns.shares.tree import walk
from qemu_userns.shares.virtfs import META_DIR, META_ROOT, Kept, Seen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qemu_userns.shares.idmap import Translation
    from qemu_userns.shares.tree import Entry


class Found(Record):
    """One entry, for people."""

    path: str
    host: Seen
    guests: "dict[str, Seen]"  # by security model
    keeps: "tuple[str, ...]"  # the models of which it has attributes


def inspect(root: int, ids: "Translation", fault: "Callable[[str, str], None]") -> "Iterator[Found]":
    """Yield what is seen of each entry.

    Args:
        root: fd of the directory; borrowed.
        ids: the map of the share; of the host's ids, that is, for those in attributes are the guest's own.
        fault: is called with a path and a reason for what cannot be looked at.
    """
    for entry in walk(root, (META_DIR, META_ROOT), fault=fault):
        status = entry.status
        host = Seen(status.st_uid, status.st_gid, status.st_mode, status.st_rdev)
        kept = {model: _read(entry, model, fault) for model in MODELS}
        guests = {model: _merge(host, found, ids) for model, found in kept.items()}
        yield Found(entry.path, host, guests, tuple(model for model, found in kept.items() if found != Kept()))


def _read(entry: "Entry", model: str, fault: "Callable[[str, str], None]") -> Kept:
    try:
        return STORES[model].read(entry)
    except OSError as err:
        fault(entry.path, f"its attributes cannot be read: {os.strerror(err.errno or 0)}")
        return Kept()


def _merge(host: Seen, kept: Kept, ids: "Translation") -> Seen:
    """Return what a guest sees: attributes, and what they lack of the host's file."""
    uid, gid = ids.to_guest("uid", host.uid), ids.to_guest("gid", host.gid)
    return Seen(
        kept.uid if kept.uid is not None else OVERFLOW_ID if uid is None else uid,
        kept.gid if kept.gid is not None else OVERFLOW_ID if gid is None else gid,
        kept.mode if kept.mode is not None else host.mode,
        kept.rdev if kept.rdev is not None else host.rdev,
    )


def describe(seen: Seen) -> str:
    """Say type, permissions and owner in a few columns, as ls -ln does."""
    text = f"{stat.filemode(seen.mode)} {seen.uid}:{seen.gid}"
    if seen.kind in (stat.S_IFCHR, stat.S_IFBLK):
        text += f" {os.major(seen.rdev)},{os.minor(seen.rdev)}"
    return text
