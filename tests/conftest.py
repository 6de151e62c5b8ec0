"""What the tests share: capability marks that are probed by doing, and clean-up checks. integration/conftest.py takes it over.

A test says what it needs: `@pytest.mark.userns`. A missing capability skips it, with the reason; where the environment
variable QEMU_USERNS_MUST_RUN is `all`, or lists the mark (`userns,qemu`), it fails instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.machine import IN_TEST_HOST, TEST_HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

CHECKOUT = Path(__file__).resolve().parent.parent
TEST_USER = "qemu-userns-test"  # scripts/setup creates it
DAEMONS = ("lxd", "incus")
KVM = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12


# --- probes: None, or the reason why not ------------------------------------------------------------------------------


def probe_userns() -> str | None:
    return try_command("unshare", "--user", "--map-root-user", "true")


def probe_mount() -> str | None:
    return try_command("unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt")


def probe_newuidmap() -> str | None:
    """Map the unprivileged user's subordinate ids; as root, do it as the test user."""
    name = unprivileged_user_name()
    if name is None:
        return f"there is no user {TEST_USER} (scripts/setup creates it)"
    return try_command("unshare", "--user", "--map-root-user", "--map-auto", "true", user=name)


def probe_qemu() -> str | None:
    return try_command("qemu-system-x86_64", "-version")


def probe_kvm() -> str | None:
    try:
        with KVM.open("r+b", buffering=0) as kvm:
            version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    except OSError as err:
        return f"{KVM}: {err.strerror}"
    return None if version == KVM_API_VERSION else f"{KVM}: API version {version}"


def probe_strace() -> str | None:
    return try_command("strace", "-f", "-e", "trace=none", "true")


def probe_xattr() -> str | None:
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.qemu-userns-test", b"1")
        except OSError as err:
            return f"user xattrs in {tempfile.gettempdir()}: {err.strerror}"
    return None


def probe_libvirt() -> str | None:
    return try_command("/usr/sbin/libvirtd", "--version") or try_command("virsh", "--version")


def probe_network_drives() -> str | None:
    """Ask for a file of a server that is not there: what has no module for it knows no such protocol."""
    done = subprocess.run(["qemu-img", "info", "http://127.0.0.1:1/"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if "nknown protocol" in done.stderr else None


def probe_root() -> str | None:
    return None if os.geteuid() == 0 else f"{os.strerror(errno.EPERM)}: not root (scripts/test runs it as root too)"


def probe_dropin() -> str | None:
    dropin = dropin_folder() / "qemu-system-x86_64"
    return None if os.access(dropin, os.X_OK) else f"{dropin} is not there (scripts/setup installs it)"


PROBES: dict[str, tuple[str, Callable[[], str | None]]] = {
    "userns": ("unprivileged user namespaces", probe_userns),
    "mount": ("mounts in a user namespace", probe_mount),
    "newuidmap": ("subordinate ids of an unprivileged user", probe_newuidmap),
    "qemu": ("qemu-system-x86_64", probe_qemu),
    "dropin": ("the installed drop-in", probe_dropin),
    "kvm": ("a usable /dev/kvm", probe_kvm),
    "strace": ("strace", probe_strace),
    "xattr": ("user xattrs in the folder for temporary files", probe_xattr),
    "libvirt": ("libvirt's session daemon and virsh", probe_libvirt),
    "systemd": ("systemd and nsenter", lambda: try_command("/usr/lib/systemd/systemd", "--version")),
    "apparmor_parser": ("apparmor_parser", lambda: try_command("/usr/sbin/apparmor_parser", "--version")),
    "guestfish": ("guestfish", lambda: try_command("guestfish", "--version")),
    "mkosi": ("mkosi", lambda: try_command("mkosi", "--version")),
    "passt": ("passt", lambda: try_command("passt", "--version")),
    "network_drives": ("QEMU's modules for network drives", probe_network_drives),
    "vde": ("vde_switch", lambda: try_command("vde_switch", "--version")),
    "root": ("a root caller", probe_root),
}


def try_command(*command: str, user: str | None = None) -> str | None:
    """Run `command`; return None if it works, else why it does not."""
    entry = pwd.getpwnam(user) if user is not None and os.geteuid() == 0 else None
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            cwd="/",
            user=entry and entry.pw_uid,
            group=entry and entry.pw_gid,
            extra_groups=entry and os.getgrouplist(entry.pw_name, entry.pw_gid),
        )
    except OSError as err:
        return f"{command[0]}: {err.strerror}"
    return None if done.returncode == 0 else (done.stderr.decode(errors="replace").strip() or f"{command[0]} fails")


@functools.cache
def missing(name: str) -> str | None:
    """Return why the capability `name` is missing, None if it is there; probed once per session."""
    return PROBES[name][1]()


def must_run(name: str) -> bool:
    """Tell whether a test that lacks `name` has to fail.

    `all` leaves out what is no fault of the set-up: not being root (the tests run as both), and a machine without /dev/kvm.
    """
    listed = os.environ.get("QEMU_USERNS_MUST_RUN", "").replace(",", " ").split()
    return name in listed or ("all" in listed and name != "root" and (name != "kvm" or KVM.exists()))


def lacking(name: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where it must run."""
    if must_run(name):
        pytest.fail(f"{name}: {reason} (QEMU_USERNS_MUST_RUN)", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    for name, (description, _) in PROBES.items():
        config.addinivalue_line("markers", f"{name}: needs {description}")
    config.addinivalue_line("markers", "ordinary: not for a root caller")
    config.addinivalue_line("markers", f"host: needs devices or rights that the test host has, where {TEST_HOST} is set")
    for daemon in DAEMONS:
        config.addinivalue_line("markers", f"{daemon}: where it is installed; not every test host has it")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not for this caller: the tests run as root and as an ordinary user, some in the test host only."""
    others = ["ordinary" if os.geteuid() == 0 else "root", *(() if IN_TEST_HOST else ("host",))]
    others += [daemon for daemon in DAEMONS if shutil.which(daemon) is None]
    left_out = [item for item in items if any(map(item.get_closest_marker, others))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a failure of a skip where everything must run, whatever its reason."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and must_run("skips") and isinstance(report.longrepr, tuple):
        kvm = "kvm: " in report.longrepr[2] and not KVM.exists()
        report.outcome = "skipped" if kvm else "failed"
        report.longrepr = report.longrepr if kvm else f"{item.nodeid}: {report.longrepr[2]} (QEMU_USERNS_MUST_RUN)"
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in PROBES:
        if item.get_closest_marker(name) and (reason := missing(name)):
            lacking(name, reason)


# --- fixtures ---------------------------------------------------------------------------------------------------------


def unprivileged_user_name() -> str | None:
    """Return who "an unprivileged user" is: the one running the tests, or the test user that root can become."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    return TEST_USER if any(entry.pw_name == TEST_USER for entry in pwd.getpwall()) else None


def dropin_folder() -> Path:
    return Path(os.environ.get("QEMU_USERNS_DROPIN") or CHECKOUT / ".venv/dropin")


@pytest.fixture
def unprivileged_user() -> str:
    """The unprivileged user that a test starts things as: `user=` of integration.vm; the tester's own name if not root."""
    name = unprivileged_user_name()
    if name is None:
        lacking("newuidmap", f"there is no user {TEST_USER} (scripts/setup creates it)")
    return name


@pytest.fixture
def shared_tmp() -> Iterator[Path]:
    """A temporary folder that every user can pass through (pytest's tmp_path is its owner's alone), emptied even of files
    that belong to subordinate ids."""
    folder = Path(tempfile.mkdtemp(prefix="test-")).resolve()
    folder.chmod(0o755)
    yield folder
    remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder in which QEMU may have created files of mapped ids: root can, a user has to map them again."""
    try:
        shutil.rmtree(folder)
    except PermissionError:
        command = ["unshare", "--user", "--map-root-user", "--map-auto", "rm", "-rf", str(folder)]
        subprocess.run(command, check=True, cwd="/")


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Put environment, working directory and umask back, and fail a test that leaves fds open or children behind."""
    environment, folder, umask = dict(os.environ), Path.cwd(), os.umask(0o022)
    fds, children = open_fds(), child_pids()
    yield
    os.umask(umask)
    os.chdir(folder)
    changed = dict(os.environ)
    changed.pop("PYTEST_CURRENT_TEST", None)
    for name in changed.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"})
    if open_fds().keys() - fds.keys():
        gc.collect()  # takes 100 ms; what a cycle of objects holds is not left open
    left = {fd: target for fd, target in open_fds().items() if fd not in fds}
    assert not left, f"fds left open: {left}"
    assert not child_pids() - children, "child processes left, or not waited for"


def open_fds() -> dict[int, str]:
    """Return number and target of every open fd of this process."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the fd of the listing itself
            continue
    return found


def child_pids() -> set[int]:
    """Return the children of this process, zombies too."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended, pytest's faulthandler has one
            found.update(map(int, (task / "children").read_text().split()))
    return found
