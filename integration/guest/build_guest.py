"""Build the test guest from Debian's packages: `python3 build_guest.py [CACHE]` prints the folder that holds it.

    CACHE/KERNELVERSION-SOURCES/vmlinux        the uncompressed kernel: QEMU boots it by PVH in a third of the bzImage's time
                                initramfs      static busybox, the kernel modules below, `init` from this folder

Packages are downloaded and unpacked, never installed, so any user can do it. SOURCES is a hash of this file and of `init`: a
changed builder builds anew, an unchanged one finds its guest without asking apt. Standard library only.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
INIT = HERE / "init"
SYSTEM_CACHE = Path("/var/cache/qemu-userns-guest")
KEPT_BUILDS = 3

# What tests load, each with what it depends on; /init loads what the devices ask for, scripts `modprobe` the rest.
# fmt: off
MODULES = [
    "virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_scsi", "virtio_balloon", "virtio_rng",
    "virtio_mmio", "qemu_fw_cfg",
    "9p", "9pnet_virtio", "virtiofs", "overlay", "ext4", "erofs", "isofs", "vfat", "nls_cp437", "nls_ascii", "loop",
    "crc32c_generic", "crc32c_intel",
    "ahci", "sd_mod", "sr_mod", "nvme", "e1000", "e1000e", "usb_storage", "xhci_pci", "nbd",
    "tun", "bridge", "veth", "macvtap", "vhost_net", "vhost_vsock", "vsock", "vmw_vsock_virtio_transport", "vhost_scsi",
    "kvm_intel", "kvm_amd", "vfio_pci",
]
# fmt: on


class BuildError(Exception):
    """The guest cannot be built; str() is one line for the user."""


class GuestFiles(NamedTuple):
    """Where a built guest lies."""

    kernel: Path
    initramfs: Path


def find_guest() -> GuestFiles | None:
    """Return the newest guest that this builder made in any cache, None if there is none."""
    built = [path for cache in caches() for path in cache.glob(f"*-{source_hash()}") if (path / "initramfs").is_file()]
    return guest_files(max(built, key=lambda path: path.stat().st_mtime)) if built else None


def build_guest(cache: Path | None = None) -> GuestFiles:
    """Return the guest of the newest kernel package, built now unless `cache` (by default: any cache) has it.

    Raises:
        BuildError: a package or a tool is missing.
    """
    package, version = newest_kernel_package()
    name = f"{version}-{source_hash()}"
    if cache is None:
        cache = next((place for place in caches() if (place / name).is_dir()), writable_cache())
    made = cache / name
    if not made.is_dir():
        make_folder(cache)
        with (cache / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as work:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would only take twice as long
            if not made.is_dir():
                os.rename(build_in(Path(work), package, version), made)
        forget_old_builds(cache)
    return guest_files(made)


def build_in(work: Path, package: str, version: str) -> Path:
    """Download, unpack and convert below `work`; return the folder with the two files."""
    result = work / "guest"
    make_folder(result)
    with progress(f"downloading {package} {version} and busybox-static"):
        kernel_tree = unpack(work, f"{package}={version}", "kernel")
        busybox_tree = unpack(work, "busybox-static", "busybox")
    with progress("extracting vmlinux"):
        bzimage = next(kernel_tree.glob("boot/vmlinuz-*"))
        write_file(result / "vmlinux", extract_vmlinux(bzimage.read_bytes()))
    with progress("building the initramfs"):
        busybox = next(path for path in (busybox_tree / "bin/busybox", busybox_tree / "usr/bin/busybox") if path.is_file())
        # Not compressed: QEMU reads 20 MB sooner than a guest under TCG decompresses five.
        write_file(result / "initramfs", build_initramfs(kernel_tree, busybox, MODULES, INIT))
    return result


# --- the cache ------------------------------------------------------------------------------------------------------


def caches() -> list[Path]:
    """Return the folders that may hold a guest, the preferred one first."""
    if named := os.environ.get("QEMU_USERNS_CACHE"):
        return [Path(named)]
    return [SYSTEM_CACHE, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qemu-userns-guest"]


def writable_cache() -> Path:
    """Return the first cache that this user may write: root's is read by everybody."""
    return next((cache for cache in caches() if os.access(cache if cache.exists() else cache.parent, os.W_OK)), caches()[-1])


def guest_files(folder: Path) -> GuestFiles:
    return GuestFiles(kernel=folder / "vmlinux", initramfs=folder / "initramfs")


def source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes() + INIT.read_bytes()).hexdigest()[:12]


def forget_old_builds(cache: Path) -> None:
    """Keep the newest few: another checkout may be testing with its own."""
    builds = sorted((path for path in cache.iterdir() if (path / "vmlinux").exists()), key=lambda path: path.stat().st_mtime)
    for path in builds[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder that any user can read, whatever the umask."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)


def write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)


# --- Debian packages ------------------------------------------------------------------------------------------------


def newest_kernel_package() -> tuple[str, str]:
    """Return name and version of the package that linux-image-amd64 stands for."""
    fields = run_tool("apt-cache", "show", "--no-all-versions", "linux-image-amd64")
    found = re.search(r"^Depends: (linux-image-\S+) \(= ([^)]+)\)", fields, re.MULTILINE)
    if not found:
        raise BuildError("apt knows no linux-image-amd64 package (run: apt-get update)")
    return found[1], found[2]


def unpack(work: Path, package: str, name: str) -> Path:
    """Download `package` and return the folder that its files are unpacked in."""
    downloads = work / f"{name}.download"
    downloads.mkdir()
    # As root, apt would drop to the user _apt, who cannot write here, and warn.
    run_tool("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=downloads)
    tree = work / name
    run_tool("dpkg", "-x", str(next(downloads.glob("*.deb"))), str(tree))
    return tree


def run_tool(*command: str, cwd: Path | None = None, stdin: bytes | None = None) -> str:
    return run_tool_binary(*command, cwd=cwd, stdin=stdin).decode(errors="replace")


def run_tool_binary(*command: str, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Return what `command` prints.

    Raises:
        BuildError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, check=True, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError as err:
        raise BuildError(f"{command[0]} is not installed") from err
    except subprocess.CalledProcessError as err:
        raise BuildError(f"{' '.join(command)}: {err.stderr.decode(errors='replace').strip()}") from err
    return done.stdout


# --- the kernel -----------------------------------------------------------------------------------------------------


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Return the ELF kernel inside a bzImage.

    Source: Linux, Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset, payload_length.
    """
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    vmlinux = decompress(bzimage[start : start + length])
    if not vmlinux.startswith(b"\x7fELF"):
        raise BuildError("the kernel's payload is not an ELF file")
    return vmlinux


def decompress(payload: bytes) -> bytes:
    """Decompress a kernel payload: all formats but gzip have four bytes of length after their end."""
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)  # which leaves the rest alone
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return run_tool_binary("zstd", "-dcq", stdin=payload[:-4])
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload)
    raise BuildError(f"the kernel is compressed in an unknown way: {payload[:6].hex()}")


# --- kernel modules -------------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """One kernel module: where it is installed, its uncompressed content and what its .modinfo section says."""

    path: str
    content: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def read_modules(modules_root: Path, wanted: list[str]) -> dict[str, Module]:
    """Return the wanted modules and all that they depend on; what this kernel does not have is left out."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in modules_root.rglob("*.ko*")}
    found: dict[str, Module] = {}
    missing: list[str] = []
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        if name not in files:
            missing.append(name)
            continue
        content = read_module_file(files[name])
        info = modinfo(content)
        depends = tuple(word.replace("-", "_") for line in info.get("depends", []) for word in line.split(",") if word)
        path = str(files[name].relative_to(modules_root)).split(".ko")[0] + ".ko"
        found[name] = Module(path, content, depends, tuple(info.get("alias", [])))
        pending.extend(depends)
    builtin = (modules_root / "modules.builtin").read_text().replace("-", "_")
    for name in missing:
        if f"/{name}.ko" not in builtin:
            print(f"guest: this kernel has no module {name}", file=sys.stderr)
    return found


def read_module_file(path: Path) -> bytes:
    """Return a module's content; Debian 13 compresses them."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return run_tool_binary("zstd", "-dcq", str(path))
    return path.read_bytes()


def modinfo(elf: bytes) -> dict[str, list[str]]:
    """Return the key=value strings of an ELF64 module's .modinfo section (depmod does not run: nothing is installed)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries, names_index = struct.unpack_from("<HHH", elf, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry_size)
        return name, offset, size

    names = section(names_index)[1]
    info: dict[str, list[str]] = {}
    for name, offset, size in map(section, range(entries)):
        if elf[names + name : names + name + 9] == b".modinfo\0":
            for text in elf[offset : offset + size].decode("ascii", "replace").split("\0"):
                key, _, value = text.partition("=")
                info.setdefault(key, []).append(value)
    return info


def dependency_lines(modules: dict[str, Module]) -> str:
    """Return modules.dep: after the colon everything that a module needs, what is loaded first last."""

    def needed(name: str) -> list[str]:
        order: list[str] = []
        for dependency in modules[name].depends:
            if dependency in modules:
                order = [m for m in order if m not in needed(dependency)] + [dependency, *needed(dependency)]
        return list(reversed(dict.fromkeys(reversed(order))))

    return "".join(f"{m.path}: {' '.join(modules[n].path for n in needed(name))}\n" for name, m in sorted(modules.items()))


# --- the initramfs --------------------------------------------------------------------------------------------------


def compress(initramfs: bytes) -> bytes:
    return gzip.compress(initramfs, compresslevel=6, mtime=0)


def build_initramfs(kernel_tree: Path, busybox: Path, wanted: list[str], init: Path) -> bytes:
    """Return the cpio archive of busybox, `init` and the wanted kernel modules."""
    modules_root = next(path for path in kernel_tree.glob("**/lib/modules/*") if path.is_dir())
    modules = read_modules(modules_root, wanted)
    folder = f"lib/modules/{modules_root.name}"

    archive = Cpio()
    for name in ("bin", "dev", "proc", "sys", "etc", "usr", "lib/modules"):
        archive.add_folder(name)
    for name in ("sbin", "usr/bin", "usr/sbin"):
        archive.add_symlink(name, "/bin")
    archive.add_device("dev/console", 5, 1)
    archive.add_device("dev/null", 1, 3)
    archive.add_file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.add_file("etc/group", b"root:x:0:\n")
    archive.add_file("bin/busybox", busybox.read_bytes(), mode=0o755)
    archive.add_file("init", init.read_bytes(), mode=0o755)
    for module in modules.values():
        archive.add_file(f"{folder}/{module.path}", module.content)
    aliases = "".join(f"alias {alias} {name}\n" for name, module in sorted(modules.items()) for alias in module.aliases)
    archive.add_file(f"{folder}/modules.dep", dependency_lines(modules).encode())
    archive.add_file(f"{folder}/modules.alias", aliases.encode())
    archive.add_file(f"{folder}/modules.symbols", b"")
    return archive.finish()


class Cpio:
    """A "newc" cpio archive, written by hand: device nodes need no root then. Everything in it belongs to root.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._folders: set[str] = set()
        self._inode = 0

    def add_folder(self, name: str) -> None:
        """Add a folder, and those above it."""
        if name and name != "." and name not in self._folders:
            self.add_folder(str(Path(name).parent))
            self._folders.add(name)
            self._add(name, stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self.add_folder(str(Path(name).parent))
        self._add(name, stat.S_IFREG | mode, content)

    def add_symlink(self, name: str, target: str) -> None:
        self.add_folder(str(Path(name).parent))
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return bytes(self._data)

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        raw_name = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw_name), 0)
        self._data += b"070701" + b"".join(b"%08X" % number for number in numbers) + raw_name
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


# --- the command ----------------------------------------------------------------------------------------------------


class progress:
    """`with progress("doing this"):` prints a line on stderr, and then how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        print(f"guest: {self._what} ...", end="", file=sys.stderr, flush=True)
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        print(f" {time.monotonic() - self._start:.1f} s", file=sys.stderr, flush=True)


def main() -> int:
    try:
        print(build_guest(Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None).kernel.parent)
    except BuildError as err:
        print(f"guest: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
