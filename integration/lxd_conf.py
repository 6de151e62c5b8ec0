"""qemu.conf as LXD writes it (contracts/lxd.md 1.6, 3.1 and 3.2), and what differs between LXD's versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PORTS = 12
MEMORY_MIB = 256

Values = dict[str, str | int]
Section = tuple[str, str, Values]
"""Comment, the words between the brackets, and what stands below them."""


@dataclass(frozen=True)
class Shape:
    """What differs between LXD's versions."""

    version: str
    numbered: bool = False
    """Its own QMP client, every command of which has a numeric id; else go-qemu's, which has none."""
    single_quoted: tuple[str, ...] = ()
    """Commands whose text is written by hand, in single quotes."""
    proxy: bool = True
    """Directories are shared over 9p, by virtfs-proxy-helper."""
    numbers_sockets: bool = True
    """Sockets of virtiofsd are named by /dev/fd/N, an O_PATH fd; else by their path."""
    hands_vsock_over: bool = True
    """/dev/vhost-vsock is opened by LXD; else by QEMU."""
    debugcon: bool = False
    sole_serial: bool = False
    """Only the old name of the serial device."""
    accel_checked: bool = True
    """The feature check has -accel, and the firmware in a flash device; else it has -bios."""

    def __str__(self) -> str:
        return self.version


SHAPES = (
    Shape(
        "5.0.2",
        single_quoted=("add-fd", "query-version"),
        numbers_sockets=False,
        hands_vsock_over=False,
        sole_serial=True,
        accel_checked=False,
    ),
    Shape("5.21.4", single_quoted=("query-version",)),
    Shape("6.6", numbered=True),
    Shape("HEAD", numbered=True, proxy=False, debugcon=True),
)


def build_conf(sections: Iterable[Section]) -> str:
    """Write sections down; an empty value is left out."""
    blocks = []
    for comment, title, values in sections:
        lines = [f'{key} = "{value}"' for key, value in values.items() if value != ""]
        blocks.append("\n".join([*([f"# {comment}"] if comment else []), f"[{title}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def base_sections(shape: Shape, logs: Path, cpus: int, pages: Path | None) -> Iterator[Section]:
    """Return what every VM has, its memory in huge pages of a directory or not."""
    yield "Machine", "machine", {"graphics": "off", "type": "q35", "accel": "tcg", "usb": "off"}
    for state in ("s3", "s4"):
        yield "", "global", {"driver": "ICH9-LPC", "property": f"disable_{state}", "value": "1"}
    yield "", "boot-opts", {"strict": "on"}
    yield "Console", 'chardev "console"', listener(logs / "qemu.console")
    yield "QEMU machine protocol monitor", 'chardev "monitor"', listener(logs / "qemu.monitor")
    yield "", "mon", {"chardev": "monitor", "mode": "control"}
    yield "Memory", "memory", {"size": f"{MEMORY_MIB}M"}
    yield "CPU", "smp-opts", {"cpus": 1, "maxcpus": cpus, "sockets": cpus, "cores": 1, "threads": 1}
    yield "", 'object "mem0"', memory(pages)
    yield "", "numa", {"type": "node", "nodeid": 0, "memdev": "mem0"}
    for socket in range(cpus):
        numa_cpu: Values = {"type": "cpu", "node-id": 0, "socket-id": socket, "core-id": 0, "thread-id": 0}
        yield "", "numa", numa_cpu
    for index in range(PORTS):
        port: Values = {"driver": "pcie-root-port", "bus": "pcie.0", "addr": f"{1 + index // 8}.{index % 8}", "chassis": index}
        yield "", f'device "qemu_pcie{index}"', {**port, "multifunction": "" if index % 8 else "on"}
    yield from devices(shape)


def memory(pages: Path | None) -> Values:
    """Return a back end, that in huge pages bound to a node too, as where the processors are pinned."""
    common: Values = {"size": f"{MEMORY_MIB}M", "share": "on"}
    if pages is None:
        return {"qom-type": "memory-backend-memfd", **common}
    kept: Values = {"mem-path": str(pages), "prealloc": "on", "discard-data": "on"}
    return {"qom-type": "memory-backend-file", **kept, **common, "policy": "bind", "host-nodes.0": "0"}


def devices(shape: Shape) -> Iterator[Section]:
    yield "Balloon driver", 'device "qemu_balloon"', {**on_first_port("virtio-balloon-pci", 0), "multifunction": "on"}
    yield "Random number generator", 'object "qemu_rng"', {"qom-type": "rng-random", "filename": "/dev/urandom"}
    yield "", 'device "dev-qemu_rng"', {**on_first_port("virtio-rng-pci", 1), "rng": "qemu_rng"}
    yield "Input", 'device "qemu_keyboard"', on_first_port("virtio-keyboard-pci", 2)
    yield "", 'device "qemu_tablet"', on_first_port("virtio-tablet-pci", 3)
    yield "Virtual serial bus", 'device "dev-qemu_serial"', on_first_port("virtio-serial-pci", 5)
    yield "Serial identifier", 'chardev "qemu_serial-chardev"', {"backend": "ringbuf", "size": "16B"}
    names = ["org.linuxcontainers.lxd"] if shape.sole_serial else ["com.canonical.lxd", "org.linuxcontainers.lxd"]
    yield "", 'device "qemu_serial"', on_serial_bus(names[0], "qemu_serial-chardev")
    if not shape.sole_serial:
        yield "", 'chardev "qemu_serial_legacy-chardev"', {"backend": "ringbuf", "size": "16B"}
        yield "", 'device "qemu_serial_legacy"', on_serial_bus(names[1], "qemu_serial_legacy-chardev")
    yield "Spice agent", 'chardev "qemu_spice-chardev"', {"backend": "spicevmc", "name": "vdagent"}
    yield "", 'device "qemu_spice"', on_serial_bus("com.redhat.spice.0", "qemu_spice-chardev")
    yield "Spice folder", 'chardev "qemu_spicedir-chardev"', {"backend": "spiceport", "name": "org.spice-space.webdav.0"}
    yield "", 'device "qemu_spicedir"', on_serial_bus("org.spice-space.webdav.0", "qemu_spicedir-chardev")
    yield "USB controller", 'device "qemu_usb"', {"driver": "qemu-xhci", "bus": "qemu_pcie1", "addr": "00.0", "p2": 8, "p3": 8}
    for index in range(1, 4):
        yield "", f'chardev "qemu_spice-usb-chardev{index}"', {"backend": "spicevmc", "name": "usbredir"}
        yield "", f'device "qemu_spice-usb{index}"', {"driver": "usb-redir", "chardev": f"qemu_spice-usb-chardev{index}"}
    yield "SCSI controller", 'device "qemu_scsi"', {"driver": "virtio-scsi-pci", "bus": "qemu_pcie2", "addr": "00.0"}
    yield "GPU", 'device "qemu_gpu"', {"driver": "virtio-vga", "bus": "qemu_pcie3", "addr": "00.0"}


def on_first_port(driver: str, function: int) -> Values:
    return {"driver": driver, "bus": "qemu_pcie0", "addr": f"00.{function}"}


def on_serial_bus(name: str, chardev: str) -> Values:
    return {"driver": "virtserialport", "name": name, "chardev": chardev, "bus": "dev-qemu_serial.0"}


def listener(path: Path) -> Values:
    return {"backend": "socket", "path": str(path), "server": "on", "wait": "off"}


def firmware(code: Path, settings_fd: int) -> Iterator[Section]:
    yield "Firmware (read only)", "drive", {"file": str(code), "if": "pflash", "format": "raw", "unit": 0, "readonly": "on"}
    yield "Firmware settings (writable)", "drive", {"file": f"/dev/fd/{settings_fd}", "if": "pflash", "format": "raw", "unit": 1}


def vsock(cid: int, fd: int | None) -> Section:
    values = {**on_first_port("vhost-vsock-pci", 4), "guest-cid": cid, "vhostfd": "" if fd is None else fd}
    return "Vsock", 'device "qemu_vsock"', values


def config_drive(path: Path) -> Iterator[Section]:
    """Return the sections of the config drive, which is QEMU's own to serve in all versions."""
    values: Values = {"fsdriver": "local", "security_model": "none", "readonly": "on", "path": str(path)}
    yield "Config drive (9p)", 'fsdev "qemu_config"', values
    yield "", 'device "dev-qemu_config-drive-9p"', on_port("virtio-9p-pci", 4, mount_tag="config", fsdev="qemu_config")


def virtiofs(name: str, tag: str, address: str, port: int) -> Iterator[Section]:
    yield f"{tag} (virtio-fs)", f'chardev "{name}"', {"backend": "socket", "path": address}
    yield "", f'device "dev-{name}-virtio-fs"', on_port("vhost-user-fs-pci", port, tag=tag, chardev=name)


def tpm(name: str, address: str) -> Iterator[Section]:
    yield f"TPM {name}", f'chardev "qemu_tpm-chardev_{name}"', {"backend": "socket", "path": address}
    yield "", f'tpmdev "qemu_tpm-tpmdev_{name}"', {"type": "emulator", "chardev": f"qemu_tpm-chardev_{name}"}
    yield "", f'device "dev-lxd_{name}"', {"driver": "tpm-crb", "tpmdev": f"qemu_tpm-tpmdev_{name}"}


def proxy_share(name: str, fd: int, port: int, *, readonly: bool) -> Iterator[Section]:
    """Return the sections of a directory that is shared over 9p."""
    values: Values = {"fsdriver": "proxy", "sock_fd": fd, "readonly": "on" if readonly else "off"}
    yield f"{name} drive (9p)", f'fsdev "lxd_{name}"', values
    yield "", f'device "dev-lxd_{name}-9p"', on_port("virtio-9p-pci", port, mount_tag=f"lxd_{name}", fsdev=f"lxd_{name}")


def on_port(driver: str, port: int, **values: str) -> Values:
    return {"driver": driver, "bus": f"qemu_pcie{port}", "addr": "00.0", **values}
