"""Where the host keeps a device that is named by its place on a bus. Pure."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.cmdline.objects import Object

USB_NODES = "/dev/bus/usb"
RENDER_NODES = "/dev/dri"
RENDER_PREFIX = "renderD"
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def find_pci_directory(address: str) -> "str | None":
    """Return the directory of a PCI device from its address as QEMU reads it: [DOMAIN:]BUS:SLOT.FUNCTION."""
    rest, _, function = address.rpartition(".")
    parts = ["0", *rest.split(":"), function]
    if len(parts) not in (4, 5) or not all(part and _HEX_DIGITS.issuperset(part) for part in parts):
        return None
    domain, bus, slot, number = (int(part, 16) for part in parts[-4:])
    return f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.{number:x}"


def find_sys_directory(device: int) -> str:
    """Return where /sys has what a character device is a node of, from its st_rdev: makedev(3), sysfs(5)."""
    major = (device >> 8 & 0xFFF) | (device >> 32 & ~0xFFF)
    minor = (device & 0xFF) | (device >> 12 & ~0xFF)
    return f"/sys/dev/char/{major}:{minor}/device"


def find_cancel_files(node: str) -> "tuple[str, ...]":
    """Return where QEMU looks for the file that cancels a TPM's command; tpm_passthrough_open_sysfs_cancel."""
    name = node.rpartition("/")[2]
    return tuple(f"/sys/class/{kind}/{name}/device/cancel" for kind in ("tpm", "misc"))


def find_usb_node(obj: "Object") -> "str | None":
    """Return the node of a USB device that is named by bus and address, or the directory of all where it is named otherwise."""
    bus, address, *others = (_read_number(obj.get(key)) for key in ("hostbus", "hostaddr", "vendorid", "productid"))
    if bus and address and not any(others) and not obj.get("hostport"):
        return f"{USB_NODES}/{bus:03}/{address:03}"
    return USB_NODES if bus or address or any(others) or obj.get("hostport") else None


def _read_number(text: "str | None") -> int:
    """Return a number as QEMU reads it, 0 for what is none."""
    try:
        return int(text or "0", 0)
    except ValueError:
        return 0
