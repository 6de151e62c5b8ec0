"""Files that QEMU makes beside others and gives their name at last, so that it is shown their directory; against plain QEMU.

And its temporary ones, for the data of snapshots.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from pathlib import Path

import pytest

from integration.plugged import Client
from integration.shares import Launch, dropin_words
from integration.talk import DEADLINE_S, IDLE, connected, outcome, started, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

NAME = "qemu-system-aarch64"
MACHINE = ["-M", "virt", "-cpu", "cortex-a57", "-nodefaults", "-display", "none"]


@pytest.fixture
def place(launch: Launch, shared_tmp: Path) -> Path:
    """A folder that QEMU's id may write, where it has a name."""
    folder = shared_tmp / "place"
    folder.mkdir()
    if launch.user is not None:
        os.chown(folder, *pwd.getpwnam(launch.user)[2:4])
    folder.chmod(0o777)
    return folder


def words(launch: Launch) -> list[str]:
    path, *more = dropin_words()
    return [f"{path.rpartition('/')[0]}/{NAME}", *more, *launch.options]


def test_a_device_tree_is_written(launch: Launch, place: Path) -> None:
    for who, name in (([NAME], "plain"), (words(launch), "ours")):
        machine = [*MACHINE[2:], "-M", f"virt,dumpdtb={place / name}"]
        status, _, stderr = outcome(who, *machine)
        assert status == 0, stderr
    trees = [(place / name).read_bytes() for name in ("plain", "ours")]
    assert [tree[:4] for tree in trees] == [b"\xd0\x0d\xfe\xed"] * 2
    assert len(trees[0]) == len(trees[1])


def test_a_device_tree_is_written_while_qemu_runs(launch: Launch, place: Path) -> None:
    monitor = place / "qmp"
    command = [*words(launch), *MACHINE, "-S", "-qmp", f"unix:{monitor},server=on,wait=off"]
    with started(command), connected(monitor) as connection:
        client = Client(connection)
        for _ in range(2):  # the second one replaces the first
            client.execute("dumpdtb", filename=str(place / "qmp-tree"))
        client.hmp(f"dumpdtb {place / 'hmp-tree'}")
        client.execute("quit")
    trees = [(place / name).read_bytes() for name in ("qmp-tree", "hmp-tree")]
    assert trees[0] == trees[1]
    assert trees[0][:4] == b"\xd0\x0d\xfe\xed"
    assert sorted(path.name for path in place.iterdir() if path.name.endswith("tree")) == ["hmp-tree", "qmp-tree"]


@pytest.mark.parametrize("beside", [False, True], ids=["", "TMPDIR"])
def test_the_data_of_a_snapshot_where_everything_is_below_the_directory_of_temporary_files(launch: Launch, beside: bool) -> None:
    """The working directory, the image and the log, and the directory that TMPDIR names."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        folder.chmod(0o1777)
        image, log, monitor = folder / "image", folder / "log", folder / "qmp"
        image.write_bytes(bytes(65536))
        env = {**os.environ, **({"TMPDIR": str(folder)} if beside else {})}
        files = ["-D", str(log), "-d", "unimp", "-qmp", f"unix:{monitor},server=on,wait=off"]
        drive = [
            "-snapshot",
            "-drive",
            f"file={image},if=none,id=d,format=raw",
            "-device",
            "virtio-scsi",
            "-device",
            "scsi-hd,drive=d",
        ]
        command = [*dropin_words(), *launch.options, *IDLE, "-M", "q35", *drive, *files]
        with started(command, cwd=folder, env=env, stdout=subprocess.PIPE) as process:
            with connected(monitor) as connection:
                client = Client(connection)
                for verb in ("write", "read"):
                    assert client.hmp(f'qemu-io d "{verb} -P 0x5a 0 4096"') == ""
                assert log.exists()
                client.execute("quit")
            said = process.communicate(timeout=DEADLINE_S)[0].decode()
            assert process.returncode == 0
        assert [line for line in said.splitlines() if "4096" in line] == [
            f"{did} 4096/4096 bytes at offset 0" for did in ("wrote", "read")
        ]
        wait_until(lambda: sorted(path.name for path in folder.iterdir()) == ["image", "log"], "the end of what was temporary")
        assert image.read_bytes() == bytes(65536)


def test_a_directory_that_is_given_is_no_place_for_temporary_files_of_the_vms_own(launch: Launch) -> None:
    """What is made there stays."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        folder.chmod(0o1777)
        share = f"local,path={folder},mount_tag=t,security_model=mapped-xattr"
        command = [*dropin_words(), *launch.options, *IDLE, "-M", "q35", "-snapshot", "-virtfs", share]
        with started(command, env={**os.environ, "TMPDIR": str(folder)}) as process:
            inside = Path(f"/proc/{process.pid}/root{folder}")
            wait_until(inside.exists, "the view")
            (folder / "made").touch()
            assert (inside / "made").exists()


def test_a_directory_of_temporary_files_does_not_grow_too_old(launch: Launch) -> None:
    """systemd clears /var/tmp of what has not been used for a month, but for directories that somebody has locked."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        folder = Path(made)
        folder.chmod(0o1777)
        rule, old, monitor = folder / "rule.conf", folder / "old", folder / "qmp"
        rule.write_text(f"e {folder} - - - 0\nx {rule}\nx {monitor}\n")
        options = ["-M", "q35", "-snapshot", "-qmp", f"unix:{monitor},server=on,wait=off"]
        command = [*dropin_words(), *launch.options, *IDLE, *options]
        with started(command, env={**os.environ, "TMPDIR": str(folder)}), connected(monitor) as connection:
            client = Client(connection)
            old.mkdir()
            (own,) = folder.glob("qemu-userns.*")
            subprocess.run(["systemd-tmpfiles", "--clean", rule], check=True)
            assert not old.exists()
            assert own.exists()
            client.execute("quit")
        wait_until(lambda: not own.exists(), "the end of what was temporary")
