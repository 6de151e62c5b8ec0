"""Hand over what the block layer opens. Pure."""

from qemu_userns.catalogue.images import find_layer
from qemu_userns.cmdline.objects import as_switch
from qemu_userns.cmdline.source import append, drop, replace
from qemu_userns.plan.facts import ABSENT, BLOCK, CHARACTER, MISSING, REGULAR
from qemu_userns.plan.grants import READ, WRITE, Node, OpenFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine
    from qemu_userns.plan.draft import Draft
    from qemu_userns.plan.facts import ImageFact, PathFact

_O_RDONLY, _O_RDWR = 0, 2
# What QEMU makes of the short options, and of a word without option.
_DRIVES = {
    "disk": "index=0,media=disk",
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "cdrom": "index=2,media=cdrom",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "mtdblock": "if=mtd",
    "sd": "if=sd",
    "pflash": "if=pflash",
}


def hand_over(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show an image and the files that its header names, or pass it in an fdset where its path cannot work.

    What only a header names is shown with QEMU's own rights and never opened with the caller's: headers are the guest's.
    """
    fact = draft.path(need.path)
    why = need.describe()
    if fact.kind == ABSENT and fact.error in (None, MISSING):
        draft.way_to(fact, why)  # QEMU says so itself, in the words that scripts look for
        return
    if fact.error is not None:
        draft.refuse_open(need, fact.error)
        return
    if not fact.readable:
        draft.check(need, fact, READ)
        return
    writable = _is_written(need, commandline) and fact.writable
    if fact.fd is None and draft.may(fact, READ | WRITE if writable else READ):
        draft.bind(fact, writable, why, device=fact.kind in (BLOCK, CHARACTER))
    elif fact.kind in (BLOCK, CHARACTER):
        draft.way_to(fact, why)
        draft.add(Node(why, fact.real, fact.device, fact.kind == BLOCK))
    elif not writable and fact.fd is None:
        draft.bind(fact, False, why)
    else:
        _pass_in_fdset(draft, need, fact, commandline, (_O_RDONLY, _O_RDWR) if writable else (_O_RDONLY,))
    for image in draft.facts.images.get(need.path, ()):
        _show_named_by_header(draft, need, image, writable)


def _show_named_by_header(draft: "Draft", need: "Need", image: "ImageFact", writable: bool) -> None:
    """Show a file that a header names: with QEMU's own rights, and writable only beside the image that the operator named.

    A guest can write any name into the header of its disk, for the next launch to follow.
    """
    fact = draft.path(image.path)
    if fact.kind not in (REGULAR, BLOCK):
        return
    if not image.readable:
        draft.notes.append(
            f"{image.path}: named by the header of {image.by} only, and QEMU's id {draft.identity.uid} may not read it; "
            "name it on the command line (backing.file.filename=) to have it opened with the caller's rights"
        )
        return
    beside = fact.real.rpartition("/")[0] == draft.path(need.path).real.rpartition("/")[0]
    writes = writable and beside and fact.kind == REGULAR and draft.may(fact, READ | WRITE)
    draft.bind(fact, writes, f"{image.role} of {need.path}")


def _is_written(need: "Need", commandline: "CommandLine") -> bool:
    """Say whether QEMU opens an image read-write."""
    obj = need.obj
    if obj.kind == "cdrom" or obj.get("media") == "cdrom" or obj.is_on("snapshot"):
        return False
    key = "" if need.member is None else need.member.key
    if key.startswith("backing.") or ".backing." in key:
        return False
    prefix = key.rpartition(".")[0]
    if obj.is_on(f"{prefix}.read-only" if prefix else "read-only"):
        return False
    if obj.is_on("read-only") or obj.is_on("readonly"):
        return False
    return not any(option.name == "snapshot" for option in commandline.options)


def _pass_in_fdset(draft: "Draft", need: "Need", fact: "PathFact", commandline: "CommandLine", modes: "tuple[int, ...]") -> None:
    """Open an image outside, read-only and, to be written, read-write, and name the fdset instead of the path.

    Both modes, because QEMU opens images read-only first and takes an fd only when its access mode is the same.
    """
    relative = [image for image in draft.facts.images.get(need.path, ()) if image.role == "backing"][:1]
    why = f"QEMU's id {draft.identity.uid} may not write {need.path}, so it is opened outside"
    fdset = draft.next_fdset()
    name = f"/dev/fdset/{fdset}"
    for flags in modes:
        number = draft.next_fd()
        draft.pass_file(OpenFd(need.describe(), fact.real, need.path, flags, number, fdset, fact.inode))
    if need.member is None:
        return
    if need.obj.form == "word":
        _turn_into_drive(draft, need, name, why, commandline, relative)
        return
    part = need.part
    if part is None:
        draft.edits.append(replace(need.member, name, why))
    else:
        draft.replace_part(need.member, part.start, part.end, f'"{name}"' if part.in_json else name, why)
    if len(modes) > 1:
        _open_once(draft, need)
    if relative:
        _name_backing(draft, need, relative[0])


def _open_once(draft: "Draft", need: "Need") -> None:
    """Have QEMU open an image of an fdset read-write at once, where it would change over whenever it gets or loses a writer.

    The locks that it holds on either descriptor would stay behind, for the fdset keeps both open: `blockdev-create` changes over
    twice, and would meet its own (file-posix.c: raw_reconfigure_getfd).
    """
    key = "" if need.member is None else need.member.key
    member = need.obj.find(f"{key.rpartition('.')[0]}.auto-read-only".lstrip("."))
    if member is not None and as_switch(member.value) == "on":
        draft.edits.append(replace(member, False, "the locks of a descriptor in an fdset outlive its use"))


def _turn_into_drive(
    draft: "Draft", need: "Need", name: str, why: str, commandline: "CommandLine", backing: "list[ImageFact]"
) -> None:
    """Write -hda FILE and its like as the -drive that QEMU makes of it, which can name a backing file too."""
    members = [_DRIVES[need.obj.kind], f"file={name}"]
    for image in backing:
        path = image.path.replace(",", ",,")
        members += [f"backing.driver={image.format or 'raw'}", "backing.file.driver=file", f"backing.file.filename={path}"]
    draft.words += ("-drive", ",".join(members))
    draft.edits.append(drop(commandline.options[need.obj.option], why))


def _name_backing(draft: "Draft", need: "Need", backing: "ImageFact") -> None:
    """Name the backing file of an image in an fdset: its header's name would be looked for beside /dev/fdset/N."""
    member = need.member
    nodes = need.obj.kind in ("blockdev", "drive")  # a command that only names a file has no place for another one
    layer = find_layer(need.obj, member.key, draft.objects) if member is not None and nodes else None
    if layer is None or any(layer.obj.find(f"{layer.prefix}{key}") for key in ("backing", "backing.file.filename")):
        return
    why = f"the backing file of {need.path}, which its fdset cannot lead to"
    driver = (("backing.driver", backing.format or "raw"), ("backing.file.driver", "file"))
    for key, value in (*driver, ("backing.file.filename", backing.path)):
        draft.edits.append(append(layer.obj, f"{layer.prefix}{key}", value, why))
