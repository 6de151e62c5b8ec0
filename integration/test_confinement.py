"""What QEMU can still do: capabilities, seccomp, namespaces, its view of the files, and what a monitor cannot make it reach."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.talk import PLAIN, Qmp, fds_of, running, running_raw, wait_until, words_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

NONE = "0" * 16
PASSTHROUGH = f"{0b11011:016x}"  # chown, dac_override, fowner, fsetid


def share(folder: Path, name: str, model: str, *more: str) -> list[str]:
    """Return the options of a share in a new folder."""
    (folder / name).mkdir()
    return ["-fsdev", ",".join([f"local,id={name},path={folder / name},security_model={model}", *more])]


@pytest.mark.parametrize(
    ("models", "capabilities"),
    [
        ([], NONE),
        (["none"], NONE),
        (["mapped-file"], NONE),
        pytest.param(["mapped-xattr"], NONE, marks=pytest.mark.xattr),
        (["passthrough"], PASSTHROUGH),
        (["mapped-file", "passthrough"], PASSTHROUGH),
    ],
    ids=str,
)
def test_only_a_passthrough_share_leaves_capabilities(
    dropin: list[str], shared_tmp: Path, models: list[str], capabilities: str
) -> None:
    options = [word for i, model in enumerate(models) for word in share(shared_tmp, f"s{i}", model)]
    with running(dropin, *options) as qemu:
        for task in (qemu.proc / "task").iterdir():
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            assert [status[f"Cap{name}"] for name in ("Eff", "Prm", "Bnd")] == [capabilities] * 3
            assert (status["CapInh"], status["CapAmb"]) == (NONE, NONE)
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("value", ["off", "on", "on,spawn=allow"])
def test_the_callers_own_sandbox_option_is_honoured(dropin: list[str], value: str) -> None:
    with running(dropin, "-sandbox", value) as qemu:
        assert words_of(qemu.pid).count("-sandbox") == 1
        own = int(qemu.status["Seccomp_filters"]) - (value != "off")
        assert own == our_filters(dropin)
        assert (qemu.status["NoNewPrivs"], qemu.status["CapEff"]) == ("1", NONE)


def test_sandbox_off_in_our_own_options_adds_none(dropin: list[str]) -> None:
    with running(dropin, "-userns", "sandbox=off") as qemu:
        assert "-sandbox" not in words_of(qemu.pid)
        assert (qemu.status["Seccomp_filters"], qemu.status["NoNewPrivs"]) == (str(our_filters(dropin)), "1")


def our_filters(dropin: list[str]) -> int:
    """Return how many seccomp filters there are besides the one that QEMU's -sandbox makes."""
    with running(dropin) as qemu:
        return int(qemu.status["Seccomp_filters"]) - 1


def test_it_has_user_mount_and_ipc_namespaces_of_its_own_and_shares_the_others(dropin: list[str]) -> None:
    with running(dropin) as qemu, running(dropin) as other:
        for name in ("user", "mnt", "ipc"):
            assert len({os.readlink(path / "ns" / name) for path in (qemu.proc, other.proc, Path("/proc/self"))}) == 3
        for name in ("pid", "net", "uts", "cgroup", "time"):
            assert os.readlink(qemu.proc / "ns" / name) == os.readlink(f"/proc/self/ns/{name}")


def test_no_namespace_can_be_made_inside(dropin: list[str]) -> None:
    with running(dropin) as qemu:
        inside = ["nsenter", f"--target={qemu.pid}", "--user", "--preserve-credentials"]
        for kind in ("user", "mnt", "net"):
            command = [*inside, "cat", f"/proc/sys/user/max_{kind}_namespaces"]
            assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "0\n"
        done = subprocess.run([*inside, "unshare", "--user", "true"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr


def mounts_of(pid: int) -> dict[str, tuple[set[str], list[str]]]:
    """Return mount point, options of the mount and optional fields (propagation) of everything that a process sees."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        before, _, _ = line.partition(" - ")
        fields = before.split()
        found[fields[4].replace("\\040", " ")] = (set(fields[5].split(",")), fields[6:])
    return found


def test_the_view_has_the_planned_mounts_and_none_is_shared(dropin: list[str], shared_tmp: Path) -> None:
    image, shown = shared_tmp / "image", shared_tmp / "ro"
    temporary = {os.environ["TMPDIR"]} if "TMPDIR" in os.environ else set()
    image.write_bytes(bytes(65536))
    options = [*share(shared_tmp, "rw", "mapped-file"), *share(shared_tmp, "ro", "mapped-file", "readonly=on")]
    with running(dropin, *options, "-drive", f"file={image},format=raw,if=none,read-only=on") as qemu:
        mounts = mounts_of(qemu.pid)
        assert not [fields for _, fields in mounts.values() if any(field.startswith("shared") for field in fields)]
        rest = {path for path in mounts if not path.startswith(("/etc/", "/dev/", "/proc/"))}
        usual = {"/", "/usr", "/proc", "/run", "/tmp", "/var/tmp"}
        assert rest == usual | temporary | {str(image), str(shown), str(shared_tmp / "rw")}
        writable = {path for path, (flags, _) in mounts.items() if "rw" in flags and not path.startswith(("/dev/", "/proc"))}
        assert writable == {"/run", "/tmp", "/var/tmp", str(shared_tmp / "rw")} | temporary
        assert not [path for path, (flags, _) in mounts.items() if "nosuid" not in flags]
        devices = {path for path, (flags, _) in mounts.items() if "nodev" not in flags and path != "/proc"}
        assert all(path.startswith("/dev/") for path in devices), devices


def test_files_outside_the_view_are_not_there(dropin: list[str], shared_tmp: Path) -> None:
    image = shared_tmp / "image"
    image.write_bytes(bytes(65536))
    (shared_tmp / "neighbour").write_text("secret")
    with running(dropin, "-drive", f"file={image},format=raw,if=none,read-only=on") as qemu:
        root = qemu.proc / "root"
        top = {path.name for path in root.iterdir()}
        usual = "bin dev etc lib lib32 lib64 libx32 proc run sbin tmp usr var"
        assert top <= {*usual.split(), image.parts[1], Path.cwd().parts[1]}
        assert {path.name for path in (root / str(shared_tmp)[1:]).iterdir()} == {"image"}
        assert not list((root / "run").iterdir())
        hidden = "etc/shadow etc/gshadow etc/ssh etc/sudoers etc/subuid etc/machine-id root home boot sys var/lib var/log opt srv"
        assert not [name for name in hidden.split() if (root / name).exists()]
        devices = "fd full null ptmx pts random shm stderr stdin stdout tty urandom userfaultfd zero"
        assert {path.name for path in (root / "dev").iterdir()} <= set(devices.split())
        assert os.readlink(root) == "/"
        assert os.readlink(qemu.proc / "cwd") == str(Path.cwd())
        assert not list((qemu.proc / "cwd").iterdir())


def test_the_lease_and_the_channel_are_the_only_fds_of_ours(dropin: list[str]) -> None:
    with running(dropin) as qemu, running(PLAIN) as plain:
        ours = [target for number, target in fds_of(qemu.pid).items() if number >= 300]
        kinds = sorted(target.rstrip("0123456789[]:") for target in ours if "/.qemu-userns." not in target)
        assert kinds == ["/dev/ptmx", *(["/run/qemu-userns/leases/"] if os.geteuid() == 0 else []), "socket"]
        assert len(ours) == len(kinds) + 1  # the way in to the monitor's socket, for the next supervisor
        others = [target.partition("[")[0] for number, target in fds_of(qemu.pid).items() if number < 300]
        # Besides the listening socket that stands in for the caller's there is the connection that it has accepted.
        assert sorted(others) == sorted([*(target.partition("[")[0] for target in fds_of(plain.pid).values()), "socket:"])


def hmp(line: str) -> Callable[[Qmp, Path], object]:
    return lambda qmp, path: qmp.hmp(line.format(path))


def ask(command: str, key: str, **arguments: object) -> Callable[[Qmp, Path], dict[str, Any]]:
    return lambda qmp, path: qmp.ask(command, **arguments, **{key: str(path)})


def add_chardev(qmp: Qmp, path: Path) -> object:
    return qmp.ask("chardev-add", id="c", backend={"type": "file", "data": {"out": str(path)}})


def add_listener(qmp: Qmp, path: Path) -> object:
    address = {"type": "unix", "data": {"path": str(path)}}
    return qmp.ask("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "server": True, "wait": False}})


def create_image(qmp: Qmp, path: Path) -> object:
    options = {"driver": "file", "filename": str(path), "size": 65536}
    reply = qmp.ask("blockdev-create", **{"job-id": "j", "options": options})
    wait_until(lambda: all(job["status"] == "concluded" for job in qmp.execute("query-jobs")), "the end of the job")
    return reply


def run_program(qmp: Qmp, path: Path) -> object:
    qmp.hmp(f'migrate -d "exec:cat >{path}"')
    return wait_until(lambda: qmp.execute("query-migrate").get("status") not in ("setup", "active"), "the end of the migration")


WRITERS: dict[str, Callable[[Qmp, Path], object]] = {
    "pmemsave": hmp('pmemsave 0 4096 "{}"'),
    "memsave": hmp('memsave 0 4096 "{}"'),
    "dump-guest-memory": hmp('dump-guest-memory "{}"'),
    "logfile": lambda qmp, path: (qmp.hmp(f'logfile "{path}"'), qmp.hmp("log int")),
    "chardev file": add_chardev,
    "chardev socket": add_listener,
    "blockdev-create": create_image,
    "object memory-backend-file": hmp("object_add memory-backend-file,id=m,size=4096,share=on,mem-path={}"),
    "migrate exec": run_program,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_monitor_cannot_make_qemu_write_a_file_outside_its_view(dropin: list[str], shared_tmp: Path, name: str) -> None:
    shared_tmp.chmod(0o777)
    machine = ["-nodefaults", "-display", "none", "-S", "-M", "pc", "-m", "16"]
    for words, made in ((PLAIN, True), (dropin, False)):
        path = shared_tmp / f"made by {'plain' if made else 'ours'}".replace(" ", "-")
        with running_raw(words, *machine, idle=False) as qemu:
            try:
                WRITERS[name](qemu.qmp, path)
            except ConnectionError:
                assert not made  # seccomp has killed it
            assert path.exists() == made, name


def read_keys(qmp: Qmp, path: Path) -> dict[str, Any]:
    """Have keys read; the file in the folder is always called keys.psk."""
    return qmp.ask("object-add", id="s", dir=str(path.parent), endpoint="server", **{"qom-type": "tls-creds-psk"})


READERS: dict[str, Callable[[Qmp, Path], dict[str, Any]]] = {
    "blockdev-add": ask("blockdev-add", "filename", driver="file", **{"node-name": "n", "read-only": True}),
    "object secret": ask("object-add", "file", id="s", **{"qom-type": "secret"}),
    "object tls-creds-psk": read_keys,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("place", ["beside what it may see", "/etc", "through /proc/PID/root", "through /proc/self/root/.."])
def test_a_monitor_cannot_make_qemu_read_a_file_outside_its_view(
    dropin: list[str], shared_tmp: Path, name: str, place: str
) -> None:
    path = shared_tmp / "keys.psk"
    path.write_text("user:0123456789abcdef\n")
    if place == "/etc":
        path = Path("/etc/subuid")
    if name != "object tls-creds-psk" or place != "/etc":
        with running_raw(PLAIN) as qemu:
            assert "return" in READERS[name](qemu.qmp, path)
    if place.startswith("through"):
        path = Path(place.removeprefix("through ").replace("PID", str(os.getpid())) + str(path))
    with running_raw(dropin) as qemu:
        assert "error" in READERS[name](qemu.qmp, path)


def test_what_qemu_writes_to_its_own_tmp_stays_its_own(dropin: list[str]) -> None:
    machine = ["-nodefaults", "-display", "none", "-S", "-M", "pc", "-m", "16"]
    path = Path("/tmp/qemu-userns-test-of-a-private-file")
    with running_raw(dropin, *machine, idle=False) as qemu:
        assert qemu.qmp.hmp(f'pmemsave 0 4096 "{path}"') == ""
        assert (qemu.proc / f"root{path}").stat().st_size == 4096
        assert not path.exists()
