"""Hand over device nodes: shown where QEMU opens them, or opened outside. Pure."""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.buses import USB_NODES, find_cancel_files, find_sys_directory
from qemu_userns.cmdline.source import append, remove, replace
from qemu_userns.plan.base import KVM
from qemu_userns.plan.facts import ABSENT, BLOCK, CHARACTER, DIRECTORY, MISSING, REGULAR
from qemu_userns.plan.grants import READ, WRITE, Node, OpenFd
from qemu_userns.plan.layout import is_below
from qemu_userns.plan.plan import NO_HOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.catalogue.needs import Need
    from qemu_userns.cmdline.objects import CommandLine, Object
    from qemu_userns.plan.draft import Draft

_O_WRONLY, _O_RDWR = 1, 2
_WITH_KVM_DEVICE = (9, 0)  # -accel kvm,device=
_WITH_IOMMUFD = (9, 0)
_TERMINALS = "/dev/pts"
_VSOCK = "/dev/vhost-vsock"
_LOWEST_CID, _HIGHEST_CID = 3, 0xFFFFFFFE  # vsock(7); hw/virtio/vhost-vsock.c
_USB_KEYS = ("hostbus", "hostaddr")


def show_node(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Show a device node or FIFO; one that only root may open is made anew for QEMU's id."""
    fact = draft.path(need.path)
    want = READ if need.obj.get("qom-type") == "rng-random" else WRITE
    if not draft.check(need, fact, want):
        return
    if draft.facts.caller.root and fact.kind == CHARACTER and is_below(fact.real, _TERMINALS) and not draft.may(fact, want):
        pass_in_fdset(draft, need)  # a node of it that is made anew cannot be opened, since it lies in no devpts
    elif draft.facts.caller.root and fact.kind in (CHARACTER, BLOCK) and not draft.may(fact, READ | WRITE):
        draft.way_to(fact, need.describe())
        draft.add(Node(need.describe(), fact.real, fact.device, fact.kind == BLOCK))
    elif draft.facts.caller.root and not draft.may(fact, want):
        draft.refuse_access(need, "open it")
    else:
        draft.bind(fact, want == WRITE or fact.kind != REGULAR, need.describe(), device=fact.kind in (CHARACTER, BLOCK))


def pass_in_fdset(draft: "Draft", need: "Need") -> None:
    """Have what a character device names opened outside, and name the fdset instead.

    QEMU truncates the file of an fdset unless it appends, and fails where that cannot be done (util/osdep.c: qemu_dup_flags).
    """
    fact = draft.path(need.path)
    fdset = draft.next_fdset()
    name, why = f"/dev/fdset/{fdset}", f"{need.path} is opened outside"
    is_output = need.way in (ways.WRITE, ways.APPEND)
    appends = is_output and fact.kind != REGULAR
    flags = _O_WRONLY if is_output else _O_RDWR
    device = fact.device if fact.kind == CHARACTER else None
    draft.pass_file(OpenFd(need.describe(), fact.real, need.path, flags, draft.next_fd(), fdset, fact.inode, device))
    if need.legacy is not None:
        members = tuple((key, name if key == "path" else value) for key, value in need.legacy.members)
        more = (("append", "on"),) if appends else ()
        draft.legacy_to_chardev(need.obj, need.legacy.replace(members=members + more), why)
    elif need.member is not None:
        draft.edits.append(replace(need.member, name, why))
        if appends:
            draft.edits.append(append(need.obj, "append", True, "what it is cannot be truncated"))


def open_node(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Open a node outside that QEMU would open by itself, and pass the fd."""
    fact = draft.path(need.path)
    if need.obj.get("qom-type") == "iommufd" and fact.kind == ABSENT and draft.version < _WITH_IOMMUFD:
        return  # QEMU says that it has no such objects
    if not draft.check(need, fact, READ | WRITE):
        return
    if fact.kind != CHARACTER:
        draft.refuse_open(need, "is not a device")
        return
    cid = _read_cid(need.obj) if need.path == _VSOCK else None
    number = draft.next_fd()
    grant = OpenFd(need.describe(), fact.real, need.path, _O_RDWR, number, None, fact.inode, fact.device, cid)
    if draft.pass_node(need, grant):
        draft.add(grant)
        if need.way == ways.OPEN and not need.row.node and need.member is not None:  # it names the node: not with an fd too
            why = f"{need.path} is opened outside"
            draft.edits += (remove(need.obj, member, why) for member in need.obj.find_all(need.member.key))
    else:
        show_node(draft, need, commandline)


def _read_cid(obj: "Object") -> "int | None":
    """Return the number that a guest is to have on vsock, None for what QEMU will refuse."""
    try:
        cid = int(obj.get("guest-cid") or "", 0)
    except ValueError:
        return None
    return cid if _LOWEST_CID <= cid <= _HIGHEST_CID else None


def show_usb(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Name the node of a USB device instead of bus and address, by which QEMU would look for it in /sys."""
    if need.path == USB_NODES:
        if draft.host_tree == NO_HOST:
            reason = "QEMU would look for the USB device in /sys, which its view does not show"
            draft.refuse(need.describe(), reason, "name it by hostbus= and hostaddr=, as lsusb does, or by hostdevice=")
        return
    fact = draft.path(need.path)
    if fact.kind == ABSENT and fact.error in (None, MISSING):
        return  # QEMU says that it does not find it
    show_node(draft, need, commandline)
    why = f"the device is {need.path}, and QEMU's view has no /sys to look for it"
    draft.edits += (remove(need.obj, member, why) for key in _USB_KEYS for member in need.obj.find_all(key))
    draft.edits.append(append(need.obj, "hostdevice", need.path, why))


def show_render_node(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a graphics card's render node, or all that the caller may open, where QEMU takes the first one that it may.

    The libraries below QEMU ask /sys which card it is.
    """
    fact = draft.path(need.path)
    if fact.kind != DIRECTORY:
        nodes = [need] if draft.check(need, fact, READ | WRITE) else []
    else:
        found = [need.replace(path=f"{need.path}/{name}") for name in fact.entries]  # without any, QEMU says so
        nodes = [node for node in found if draft.caller_may(draft.path(node.path), READ | WRITE)]
        if found and not nodes:
            draft.refuse_denied(found[0], draft.path(found[0].path), READ | WRITE)
    for node in nodes:
        show_node(draft, node, commandline)
        card = draft.path(find_sys_directory(draft.path(node.path).device))
        if card.kind == DIRECTORY:
            draft.bind(card, False, need.describe())


def show_tpm(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a TPM, and unless it is named the file that cancels its commands; without one QEMU says so."""
    show_node(draft, need, commandline)
    if need.obj.get("cancel-path"):
        return
    why = need.describe()
    for path in find_cancel_files(need.path):
        fact = draft.path(path)
        if fact.kind != REGULAR or not draft.caller_may(fact, WRITE):
            continue
        if draft.may(fact, WRITE):
            draft.bind(fact, True, why)
        else:
            fdset = draft.next_fdset()
            draft.pass_file(OpenFd(why, fact.real, path, _O_WRONLY, draft.next_fd(), fdset, fact.inode))
            draft.edits.append(append(need.obj, "cancel-path", f"/dev/fdset/{fdset}", f"{path} is opened outside"))
        return


def show_vfio(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show a device that vfio gives to the guest."""
    from qemu_userns.plan import vfio  # only those launches need it that have one

    vfio.show_vfio(draft, need, commandline)


def lock_memory(draft: "Draft", need: "Need", _: "CommandLine") -> None:
    """Allow QEMU to lock its memory."""
    from qemu_userns.plan import memory  # as above

    memory.lock_memory(draft, need)


def show_kvm(draft: "Draft", need: "Need", commandline: "CommandLine") -> None:
    """Show /dev/kvm, or pass it; where the caller may not have it, QEMU goes on to the next accelerator, if there is one."""
    fact = draft.path(KVM)
    need = need.replace(path=KVM)
    may = fact.kind == CHARACTER and draft.caller_may(fact, READ | WRITE)
    if not may and not _has_other_accelerator(commandline):
        draft.check(need, fact, READ | WRITE)
    elif may and draft.version >= _WITH_KVM_DEVICE and need.obj.kind == "accel" and not draft.may(fact, READ | WRITE):
        fdset = draft.next_fdset()
        draft.pass_file(OpenFd(need.describe(), fact.real, KVM, _O_RDWR, draft.next_fd(), fdset, fact.inode, fact.device))
        draft.edits.append(append(need.obj, "device", f"/dev/fdset/{fdset}", f"{KVM} is opened outside"))
    else:
        add_kvm(draft, need.describe())


def _has_other_accelerator(commandline: "CommandLine") -> bool:
    """Say whether QEMU may use anything but KVM."""
    named = [obj.get("accel") or "" for obj in commandline.objects if obj.kind in ("accel", "machine")]
    return any(name not in ("", "kvm") for names in named for name in names.split(":"))


def add_kvm(draft: "Draft", why: str) -> None:
    """Show /dev/kvm as the caller would open it."""
    fact = draft.path(KVM)
    if fact.kind != CHARACTER:
        return
    if draft.facts.caller.root and not draft.may(fact, READ | WRITE):
        draft.way_to(fact, why)
        draft.add(Node(why, fact.real, fact.device, block=False))
    else:
        draft.bind(fact, True, why, device=True)
