"""Run a command as root of a container, as LXD makes an unprivileged one: `python3 -m integration.container COUNT COMMAND...`.

Its ids 0 to COUNT - 1 are FIRST_ID and up outside. It has the host's root, /dev and this checkout under an idmapped mount, and a
/tmp and a /run of its own. The exit status is the command's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from qemu_userns.host.usernamespace import Holder, open_namespace, write_map
from qemu_userns.linux import mount
from qemu_userns.linux.process import CLONE_NEWNS, CLONE_NEWUSER, set_ids, setns, unshare
from qemu_userns.plan.identity import MapEntry
from tests.conftest import CHECKOUT

FIRST_ID = 1_000_000_000
OWN = ("/tmp", "/run")  # the container's
HOSTS = ("/dev", "/proc", "/sys")


def main(count: int, command: list[str]) -> int:
    """Make the container, and run the command in it."""
    unshare(CLONE_NEWNS)
    mount.set_propagation("/", mount.MS_SLAVE | mount.MS_REC)
    holder = Holder(None)
    for kind in ("uid", "gid"):
        write_map(f"/proc/{holder.pid}/{kind}_map", [MapEntry(0, FIRST_ID, count)])
    namespace = open_namespace(holder.pid, "user")
    root = tempfile.mkdtemp(prefix="container-")
    try:
        child = os.fork()
        if child == 0:
            build_root(root, namespace)
            enter(root, namespace)
            os.execvp(command[0], command)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        holder.let_go()
        os.rmdir(root)


def build_root(root: str, namespace: int) -> None:
    """Mount what the container sees, in a mount namespace that goes with it."""
    unshare(CLONE_NEWNS)
    show("/", root, namespace)
    for path in HOSTS:
        subprocess.run(["mount", "--rbind", path, root + path], check=True)
    for path in OWN:
        options = f"mode=1777,uid={FIRST_ID},gid={FIRST_ID}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", root + path], check=True)
    os.makedirs(f"{root}{CHECKOUT}", exist_ok=True)
    show(str(CHECKOUT), f"{root}{CHECKOUT}", namespace)


def show(path: str, place: str, namespace: int) -> None:
    """Mount a file system at a place, with the ids of the container."""
    copy = mount.open_tree(mount.AT_FDCWD, path, mount.OPEN_TREE_CLONE)
    mount.mount_setattr(copy, "", mount.AT_EMPTY_PATH, mount.MOUNT_ATTR_IDMAP, namespace)
    mount.move_mount(copy, "", mount.AT_FDCWD, place, mount.MOVE_MOUNT_F_EMPTY_PATH)


def enter(root: str, namespace: int) -> None:
    """Become root of the container, in a mount namespace of its own."""
    setns(namespace, CLONE_NEWUSER)
    set_ids(0, 0, ())
    unshare(CLONE_NEWNS)
    subprocess.run(["mount", "--rbind", root, root], check=True)  # those from outside are locked
    os.chdir(root)
    mount.pivot_root(".", ".")
    mount.umount2(".", mount.MNT_DETACH)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
