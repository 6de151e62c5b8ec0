"""Build the test host of a Debian suite from its packages: `python3 -m integration.host.build_host SUITE` prints its folder.

    CACHE/SUITE-SOURCES/vmlinux         the suite's kernel, uncompressed
                        initramfs       mounts the root and goes on with `init` of this folder
                        root.ext4       the suite's system with QEMU, Python and what the tests import; the project is not in it

SOURCES is a hash of what it is built by: a changed builder builds anew. Nothing is installed on this machine and root is not
needed. The mirror is the one that this machine's apt uses. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from integration.guest import build_guest
from integration.guest.build_guest import BuildError, make_folder, progress, run_tool, write_file

HERE = Path(__file__).resolve().parent
CUSTOMIZE, INITRAMFS_INIT = HERE / "customize", HERE / "initramfs_init"
SYSTEM_CACHE = Path("/var/cache/qemu-userns-host")
KEPT_BUILDS = 2
ROOT_SIZE = "6G"  # sparse
DEFAULT_MIRROR = "http://deb.debian.org/debian/"

PACKAGES = [
    *("python3", "qemu-system-x86", "qemu-utils", "uidmap", "kmod", "busybox-static"),
    *("iproute2", "iputils-ping", "procps", "mount", "e2fsprogs", "passwd", "util-linux", "acl", "attr", "strace", "swtpm"),
    *("apparmor", "passt"),
]
# `unshare` is compiled in the host, where Python lacks os.unshare.
COMPILER = ["gcc", "libc6-dev", "python3-dev"]
WHEELS = ["pytest", "hypothesis", "qemu.qmp", "psutil", "pyroute2"]
WHEEL_PLATFORMS = ["manylinux_2_28_x86_64", "manylinux2014_x86_64"]
INITRAMFS_MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "ext4", "crc32c_generic", "crc32c_intel"]


class Suite(NamedTuple):
    """A flavour of the test host."""

    name: str
    """Of the Debian suite; with `-backports`, QEMU is taken from there."""
    python: str
    daemons: tuple[str, ...] = ()
    """Packages that start QEMU themselves, with what they need."""

    @property
    def base(self) -> str:
        return self.name.removesuffix("-backports")


LXD, INCUS = ("lxd", "lxd-client", "gdisk", "seabios"), ("incus", "qemu-system-modules-spice", "virtiofsd")
LIBVIRT = ("libvirt-daemon-system", "libvirt-clients")
SUITES = {
    suite.name: suite
    for suite in (
        Suite("bookworm", "3.11", (*LXD, *LIBVIRT)),
        Suite("trixie", "3.13", (*LXD, *INCUS, *LIBVIRT)),
        Suite("trixie-backports", "3.13"),
    )
}


class HostFiles(NamedTuple):
    """Where a built host lies."""

    kernel: Path
    initramfs: Path
    root: Path


def build_host(suite: Suite) -> HostFiles:
    """Return the host of a suite, built now unless a cache has it.

    Raises:
        BuildError: a package or a tool is missing.
    """
    name = f"{suite.name}-{source_hash()}"
    cache = next((place for place in caches() if (place / name).is_dir()), writable_cache())
    made = cache / name
    if not made.is_dir():
        make_folder(cache)
        with (cache / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as work:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.is_dir():
                os.chmod(work, 0o755)  # mmdebstrap's hooks run with other ids
                os.rename(build_in(Path(work), suite), made)
        forget_old_builds(cache, suite)
    return HostFiles(made / "vmlinux", made / "initramfs", made / "root.ext4")


def build_in(work: Path, suite: Suite) -> Path:
    """Download, unpack and convert below `work`; return the folder with the files."""
    result = work / "host"
    make_folder(result)
    with progress(f"downloading the Python packages of {suite.name}"):
        download_python_packages(work / "site", suite)
    tree = work / "root.tar"
    with progress(f"installing {suite.name} (takes minutes)"):
        install_debian(tree, work / "site", suite)
    with progress("building kernel, initramfs and root.ext4"):
        boot = work / "boot"
        boot.mkdir()
        run_tool("tar", "-xf", str(tree), "-C", str(boot), "./boot", "./usr/lib/modules", "./usr/bin/busybox")
        bzimage = next(boot.glob("boot/vmlinuz-*"))
        write_file(result / "vmlinux", build_guest.extract_vmlinux(bzimage.read_bytes()))
        initramfs = build_guest.build_initramfs(boot, boot / "usr/bin/busybox", INITRAMFS_MODULES, INITRAMFS_INIT)
        write_file(result / "initramfs", initramfs)
        build_ext4(tree, result / "root.ext4", work)
    return result


def download_python_packages(folder: Path, suite: Suite) -> None:
    """Put what the tests import into `folder`: Debian's pytest of Debian 12 is too old for them."""
    folder.mkdir()
    folder.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    platforms = [word for platform in WHEEL_PLATFORMS for word in ("--platform", platform)]
    wheels = ["install", "--target", str(folder), "--python-version", suite.python, "--only-binary=:all:", *platforms, *WHEELS]
    run_tool(*pip, *wheels)
    if suite.python == "3.11":
        run_tool(*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), "unshare")
    run_tool("chmod", "-R", "a+rX", str(folder))


def install_debian(tar: Path, site: Path, suite: Suite) -> None:
    """Install the suite's packages into a tar file."""
    mirror = find_mirror()
    sources = [f"deb {mirror} {suite.base} main"]
    packages = [*PACKAGES, *(COMPILER if suite.python == "3.11" else []), *suite.daemons]
    options = ["--quiet", "--variant=minbase", "--format=tar", f"--customize-hook={CUSTOMIZE}"]
    if suite.name != suite.base:
        sources.append(f"deb {mirror} {suite.name} main")
        options.append(f'--aptopt=APT::Default-Release "{suite.name}"')
    os.environ["QEMU_USERNS_SITE"] = str(site)
    run_tool("mmdebstrap", *options, f"--include={','.join(packages)}", suite.base, str(tar), *sources)


def find_mirror() -> str:
    """Return the address of Debian's archive in this machine's apt configuration."""
    lines = run_tool("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages").splitlines()
    return next((line.split()[1] for line in lines if line.startswith("Debian ")), DEFAULT_MIRROR)


def build_ext4(tar: Path, image: Path, work: Path) -> None:
    """Unpack and pack again as the ids of a user namespace, if not as root, so that owners and set-uid bits stay."""
    as_root = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--map-auto", "--"]
    script = (
        'mkdir "$3" && tar --numeric-owner --xattrs --exclude=./dev/* --exclude=./boot/* -xpf "$1" -C "$3"'
        ' && truncate -s "$4" "$2" && mke2fs -q -t ext4 -E lazy_itable_init=1 -d "$3" "$2"; status=$?; rm -rf "$3"; exit $status'
    )
    write_file(image, b"")
    run_tool(*as_root, "sh", "-c", script, "build", str(tar), str(image), str(work / "tree"), ROOT_SIZE)


# --- the cache ------------------------------------------------------------------------------------------------------


def caches() -> list[Path]:
    """Return the folders that may hold a host, the preferred one first."""
    return [SYSTEM_CACHE, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qemu-userns-host"]


def writable_cache() -> Path:
    return next((cache for cache in caches() if os.access(cache if cache.exists() else cache.parent, os.W_OK)), caches()[-1])


def source_hash() -> str:
    sources = (Path(__file__), Path(build_guest.__file__), CUSTOMIZE, INITRAMFS_INIT)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def forget_old_builds(cache: Path, suite: Suite) -> None:
    """Keep the newest few: another checkout may be testing with its own."""
    builds = [path for path in cache.iterdir() if path.name.rpartition("-")[0] == suite.name]
    for path in sorted(builds, key=lambda path: path.stat().st_mtime)[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    try:
        print(build_host(SUITES[sys.argv[1]]).kernel.parent)
    except BuildError as err:
        print(f"host: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
