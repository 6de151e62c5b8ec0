"""The view's layout: which grants become mounts, in which order, without what another one shows already. Pure."""

from qemu_userns.plan.grants import Bind, Copy, Create, CreateDir, Grant, Link, Node, Private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Placed = Bind | Copy | Create | CreateDir | Link | Node | Private


def build_layout(grants: "Iterable[Grant]") -> "tuple[Placed, ...]":
    """Order the grants that have a place in the view so that a parent comes before what lies in it.

    Left out is what a bind above it shows already with the same access: a symlink of the host, the caller's working
    directory, a file below a directory that is bound. Of two grants at one path the one that gives more stays.
    """
    placed: "dict[str, Placed]" = {}
    for grant in grants:
        if isinstance(grant, Bind | Copy | Create | CreateDir | Link | Node | Private):
            other = placed.get(grant.path)
            placed[grant.path] = grant if other is None else _stronger(other, grant)
    layout: "list[Placed]" = []
    above: "list[Placed]" = []  # the chain of grants whose paths are prefixes of the current one
    for path in sorted(placed, key=lambda path: path.split("/")):
        grant = placed[path]
        while above and not is_below(path, above[-1].path):
            above.pop()
        if above and _shown_by(grant, above[-1]):
            continue
        layout.append(grant)
        if not isinstance(grant, Link):
            above.append(grant)
    return tuple(layout)


def build_overlay(grants: "Iterable[Grant]", read_only: bool) -> "tuple[Placed, ...]":
    """Return what is placed over the host's own tree (fs=host, or a share of /).

    Files and nodes of our own; and what QEMU writes, where the tree itself is read-only.
    """
    layout = build_layout([Bind("the host", "/"), *grants])
    kinds = (Bind, Copy, Create, CreateDir, Node) if read_only else (Copy, Node)
    return tuple(grant for grant in layout if grant.path != "/" and isinstance(grant, kinds))


def find_shown(layout: "Iterable[Placed]", grant: "Placed") -> "Placed | None":
    """Return what of a layout shows already what a grant would show, with no less access; None if it has to be placed.

    Args:
        layout: of the launch, followed by what was placed since.
        grant: of a hot-plug.
    """
    nearest: "Placed | None" = None
    for placed in layout:
        if isinstance(placed, Link) and placed.path != grant.path:
            continue
        if is_below(grant.path, placed.path) and (nearest is None or len(placed.path) >= len(nearest.path)):
            nearest = placed
    if nearest is None:
        return None
    shown = _equals(nearest, grant) if nearest.path == grant.path else _shown_by(grant, nearest)
    return nearest if shown else None


def find_covered(layout: "Iterable[Placed]", directory: str) -> "tuple[Placed, ...]":
    """Return what of a layout lies below a directory, and would be covered by a mount of it."""
    return tuple(placed for placed in layout if placed.path != directory and is_below(placed.path, directory))


def is_below(path: str, directory: str) -> bool:
    """Say whether a normal path lies below a directory (or is it)."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _stronger(first: "Placed", second: "Placed") -> "Placed":
    """Return the one of two grants of a path that gives more, so that both readers are served."""
    if isinstance(first, Bind) and isinstance(second, Bind):
        return first.replace(
            writable=first.writable or second.writable,
            device=first.device or second.device,
            why=first.why if first.why == second.why else f"{first.why}, {second.why}",
            idmap=first.idmap if first.idmap is not None else second.idmap,
        )
    # What the caller's files are in is no place for temporary ones that end with QEMU.
    strength = (Link, Private, CreateDir, Bind, Copy, Node, Create)
    return max(first, second, key=lambda grant: strength.index(type(grant)))


def _equals(placed: "Placed", grant: "Placed") -> bool:
    """Say whether what is placed at a path gives no less than a grant of that path; of a file created anew it never does."""
    if isinstance(placed, Bind) and isinstance(grant, Bind):
        same_file = grant.inode is None or placed.inode in (None, grant.inode)
        access = placed.writable >= grant.writable and placed.device >= grant.device
        return same_file and access and placed.idmap == grant.idmap
    if isinstance(placed, Link) and isinstance(grant, Link):
        return placed.target == grant.target
    if isinstance(placed, Node) and isinstance(grant, Node):
        return (placed.device, placed.block) == (grant.device, grant.block)
    return False


def _shown_by(grant: "Placed", above: "Placed") -> bool:
    """Say whether a grant adds nothing to the one above it, or would hide a part of it.

    A CreateDir shows nothing of what the host has there.
    """
    if not isinstance(above, Bind):
        return False
    if isinstance(grant, Link | Private):
        return True
    if isinstance(grant, Create | CreateDir):
        return above.writable
    if isinstance(grant, Bind) and not grant.device:
        return grant.idmap == above.idmap and (above.writable or not grant.writable)
    return False
