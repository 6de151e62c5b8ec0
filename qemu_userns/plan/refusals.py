"""What is missing where a device of the host cannot be had: which module, which group, which mode. Pure.

One table says what makes a node; whose it is, the node itself says. The texts are for who can change that.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.facts import Account, PathFact

NO_NODE = "there is no such device node"


def _module(prefix: str, name: str) -> "tuple[str, str]":
    return prefix, f"load the kernel's module {name}: modprobe {name}"


# With what the paths of device nodes begin, and what makes those; the longest beginning counts.
_REMEDIES = (
    ("/dev/kvm", "load the kernel's module kvm_intel or kvm_amd, with virtualization switched on in the firmware"),
    _module("/dev/vhost-net", "vhost_net"),
    _module("/dev/vhost-vsock", "vhost_vsock"),
    _module("/dev/vhost-scsi", "vhost_scsi"),
    _module("/dev/vhost-vdpa-", "vhost_vdpa"),
    _module("/dev/net/tun", "tun"),
    _module("/dev/vfio/vfio", "vfio"),
    _module("/dev/vfio/", "vfio-pci"),
    ("/dev/vfio/devices/", "load vfio-pci of a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6)"),
    _module("/dev/iommu", "iommufd"),
    _module("/dev/udmabuf", "udmabuf"),
    ("/dev/dri", "load the graphics card's driver; `ls /dev/dri` shows the nodes of those that have one"),
    _module("/dev/input/", "evdev"),
    _module("/dev/uinput", "uinput"),
    ("/dev/hidraw", "plug the device in; `ls /dev/hidraw*` shows the nodes of those that are"),
    ("/dev/bus/usb/", "plug the device in; `lsusb` lists those that are, by bus and address"),
    ("/dev/tpm", "load the driver of the TPM (tpm_tis, tpm_crb), with the TPM switched on in the firmware"),
    ("/dev/sev", "load the kernel's module ccp, and kvm_amd with sev=1, with SEV switched on in the firmware"),
    ("/dev/sgx_", "boot a kernel with CONFIG_X86_SGX_KVM, with SGX switched on in the firmware"),
    _module("/dev/parport", "ppdev"),
    _module("/dev/nbd", "nbd"),
    _module("/dev/loop", "loop"),
    _module("/dev/sg", "sg"),
)


def find_remedy(path: str) -> "str | None":
    """Return what would make a device node that is not there, None where nobody knows."""
    found = [(len(prefix), remedy) for prefix, remedy in _REMEDIES if path.startswith(prefix)]
    return max(found)[1] if found else None


def explain_denied(fact: "PathFact", account: "Account", want: int) -> str:
    """Say whose a file or device node is, and what would open it.

    Args:
        fact: what the caller may not open.
        account: the caller's.
        want: a sum of 4 (read) and 2 (write).
    """
    whose = f"it belongs to {fact.uid}:{fact.gid} and has mode {fact.mode & 0o7777:04o}"
    if not fact.group:
        return f"{whose}; be its owner, in its group, or change the mode"
    if fact.mode >> 3 & want == want:
        group = fact.group
        return f"{whose}; its group is {group}: usermod -aG {group} {account.name}, and log in again"
    access = "".join(letter for bit, letter in ((4, "r"), (2, "w")) if want & bit)
    return f"{whose}; its group {fact.group} would need g+{access}, which a udev rule can set (MODE=)"
