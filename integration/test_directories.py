"""Directories whose entries are symlinks that lead out of them: credentials of TLS, firmware, keyboard layouts.

Every case is started by plain QEMU too.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from integration.rom import EXIT_DEVICE, build_rom, exit_status
from integration.talk import IDLE, PLAIN, outcome, running
from integration.test_same_objects import make_rom
from tests.conftest import lacking

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.dropin]

SERVER = "tls-creds-x509,id=t,dir={},endpoint=server,verify-peer=no"
CLIENT = "tls-creds-x509,id=t,dir={},endpoint=client"
PSK = "tls-creds-psk,id=t,dir={},endpoint={}"
STRANGER = 54321  # a uid without a name


def make_certificates(folder: Path) -> None:
    """Make an authority, and what it signs for a server and a client, with the names that QEMU looks for."""
    if shutil.which("openssl") is None:
        lacking("openssl", "not found")
    for name, options in (
        ("ca", ["-addext", "basicConstraints=critical,CA:TRUE"]),
        *((end, ["-addext", "basicConstraints=critical,CA:FALSE", *signed_by_ca(folder)]) for end in ("server", "client")),
    ):
        key, certificate = folder / f"{name}-key.pem", folder / f"{name}-cert.pem"
        files = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-subj", f"/CN={name}"]
        subprocess.run(["openssl", "req", "-x509", "-days", "2", *files, *options], check=True, capture_output=True)
        key.chmod(0o600)


def signed_by_ca(folder: Path) -> list[str]:
    return ["-CA", str(folder / "ca-cert.pem"), "-CAkey", str(folder / "ca-key.pem")]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with credentials, keys for their owner alone; they take a second to make."""
    folder = tmp_path_factory.mktemp("certificates").resolve()
    make_certificates(folder)
    (folder / "keys.psk").write_text("qemu:0123456789abcdef0123456789abcdef\n")
    (folder / "keys.psk").chmod(0o600)
    return folder


@pytest.fixture
def linked(certificates: Path, shared_tmp: Path) -> Path:
    """A directory D of symlinks, as certbot makes them: D/server-key.pem -> ../archive/new/..., and new a symlink too."""
    archive, folder = shared_tmp / "archive", shared_tmp / "live/D"
    shutil.copytree(certificates, archive / "2")
    archive.chmod(0o700)
    (archive / "new").symlink_to("2")
    folder.mkdir(parents=True)
    for path in certificates.iterdir():
        (folder / path.name).symlink_to(f"../../archive/new/{path.name}")
    return folder


def load_credentials(words: list[str], options: str, cwd: Path | None = None) -> list[str]:
    """Start QEMU with credentials, which it loads at once; return its objects."""
    with running(words, "-object", options, cwd=cwd) as qemu:
        names = [item["name"] for item in qemu.qmp.execute("qom-list", path="/objects")]
        assert qemu.quit() == 0
    return sorted(names)


@pytest.mark.parametrize(
    "options", [SERVER, CLIENT, PSK.format("{}", "server"), PSK.format("{}", "client")], ids=lambda text: text.replace("{}", "D")
)
def test_credentials_behind_symlinks_are_loaded(dropin: list[str], linked: Path, options: str) -> None:
    objects = load_credentials(PLAIN, options.format(linked))
    assert "t" in objects
    assert load_credentials(dropin, options.format(linked)) == objects


def test_a_relative_directory_of_credentials(dropin: list[str], linked: Path) -> None:
    assert "t" in load_credentials(dropin, SERVER.format("D"), cwd=linked.parent)


def test_only_the_files_of_this_end_are_in_the_view(dropin: list[str], linked: Path) -> None:
    with running(dropin, "-object", SERVER.format(linked)) as qemu:
        seen = sorted(path.name for path in (qemu.proc / f"root{linked.parents[1]}/archive/2").iterdir())
    assert seen == ["ca-cert.pem", "server-cert.pem", "server-key.pem"]


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=oct)
def test_keys_that_only_root_may_read_are_loaded_and_stay_so(
    dropin: list[str], certificates: Path, shared_tmp: Path, mode: int
) -> None:
    folder = shared_tmp / "D"
    shutil.copytree(certificates, folder)
    folder.chmod(mode)
    before = {path.name: (path.stat().st_mode, path.stat().st_uid, path.stat().st_ctime_ns) for path in folder.iterdir()}
    assert "t" in load_credentials(dropin, SERVER.format(folder))
    assert "t" in load_credentials(dropin, PSK.format(folder, "server"))
    assert before == {path.name: (path.stat().st_mode, path.stat().st_uid, path.stat().st_ctime_ns) for path in folder.iterdir()}


@pytest.mark.root
def test_a_key_that_this_end_does_not_look_for_stays_out_of_reach(
    dropin: list[str], certificates: Path, shared_tmp: Path
) -> None:
    folder = shared_tmp / "D"
    shutil.copytree(certificates, folder)
    folder.chmod(0o755)
    with running(dropin, "-object", SERVER.format(folder)) as qemu:
        owners = {path.name: path.stat().st_uid for path in (qemu.proc / f"root{folder}").glob("*-key.pem")}
        uid = int(qemu.status["Uid"].split()[0])
    assert owners == {"server-key.pem": uid, "client-key.pem": 0, "ca-key.pem": 0}


@pytest.mark.root
def test_root_does_not_follow_a_credential_that_is_somebody_elses_symlink(dropin: list[str], linked: Path) -> None:
    link = linked / "server-key.pem"
    shutil.chown(link.parent, STRANGER)
    subprocess.run(["chown", "--no-dereference", str(STRANGER), str(link)], check=True)
    status, stdout, stderr = outcome(dropin, *IDLE, "-object", SERVER.format(linked))
    assert (status, stdout) == (1, "")
    assert f"{link} is a symlink of uid {STRANGER}, which root does not follow" in stderr


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-key.pem"])
def test_a_credential_that_is_not_there_is_qemus_own_error(dropin: list[str], linked: Path, name: str) -> None:
    (linked / name).unlink()
    for _ in ("missing", "dangling"):
        plain = outcome(PLAIN, *IDLE, "-object", SERVER.format(linked))
        assert plain[0] == 1
        assert outcome(dropin, *IDLE, "-object", SERVER.format(linked)) == plain
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to("../nowhere")


# --- -L ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(shared_tmp: Path) -> Path:
    """A -L directory whose entries are symlinks, with a folder of keyboard layouts that is one too."""
    files, folder = shared_tmp / "files", shared_tmp / "D"
    (files / "layouts").mkdir(parents=True)
    folder.mkdir()
    (files / "firmware").write_bytes(build_rom("from D", 3))
    (files / "option-rom").write_bytes(make_rom())
    (files / "layout").write_text("a 0x1e\n")
    (files / "layouts/odd").symlink_to("../layout")
    (folder / "x.bin").symlink_to("../files/firmware")
    (folder / "r.rom").symlink_to(files / "option-rom")
    (folder / "keymaps").symlink_to("../files/layouts")
    return folder


def test_firmware_behind_a_symlink_of_a_data_directory_runs(dropin: list[str], data: Path) -> None:
    options = ["-nodefaults", "-display", "none", "-m", "16", "-serial", "stdio", *EXIT_DEVICE, "-L", str(data), "-bios", "x.bin"]
    plain = outcome(PLAIN, *options)
    assert plain == (exit_status(3), "from D\n", "")
    assert outcome(dropin, *options) == plain


def test_an_option_rom_behind_a_symlink_of_a_data_directory_is_loaded(dropin: list[str], data: Path) -> None:
    options = ["-nodefaults", "-display", "none", "-S", "-L", str(data), "-device", "virtio-net-pci,id=n,romfile=r.rom"]
    blocks = []
    for words in (PLAIN, dropin):
        with running(words, *options, idle=False) as qemu:
            lines = qemu.qmp.hmp("info ramblock").splitlines()
            blocks.append([line.split()[:5] for line in lines if "virtio-net-pci.rom" in line])
            assert qemu.quit() == 0
    assert blocks[0] == blocks[1] != []


def test_a_keyboard_layout_behind_symlinks_is_read(dropin: list[str], data: Path) -> None:
    options = ["-L", str(data), "-vnc", "127.0.0.1:4000,to=4999", "-k"]
    missing = outcome(PLAIN, *IDLE, *options, "nosuch")
    assert missing[0] == 1
    assert outcome(dropin, *IDLE, *options, "nosuch") == missing
    for words in (PLAIN, dropin):
        with running(words, *options, "odd") as qemu:
            assert qemu.quit() == 0


@pytest.mark.root
def test_firmware_that_only_root_may_read_runs(dropin: list[str], data: Path) -> None:
    options = ["-nodefaults", "-display", "none", "-m", "16", "-serial", "stdio", *EXIT_DEVICE, "-L", str(data), "-bios"]
    shutil.copy(data / "x.bin", data / "y.bin")
    for path in (data / "x.bin", data / "y.bin"):
        path.chmod(0o600)
        assert outcome(dropin, *options, path.name) == (exit_status(3), "from D\n", "")


@pytest.mark.root
def test_explain_says_which_symlink_of_a_data_directory_root_does_not_follow(dropin: list[str], data: Path) -> None:
    subprocess.run(["chown", "--no-dereference", str(STRANGER), str(data / "r.rom")], check=True)
    command = [dropin[0].rpartition("/dropin/")[0] + "/bin/qemu-userns", "explain", "qemu-system-x86_64", "-L", str(data)]
    assert f"-L {data / 'r.rom'}: {data / 'r.rom'} is a symlink of uid {STRANGER}" in outcome(command)[1]
