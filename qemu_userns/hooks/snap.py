"""The tree of a content snap with the drop-in, for LXD's own snap.

LXD's snap runs the QEMU of a snap that is connected to its plug `qemu-external`, from PREFIX/bin, with the libraries of
PREFIX/lib and the data of PREFIX/share (LXD 5.21.3 and 6.2 on; its snapcraft/commands/daemon.start). Everything runs in LXD's
own mount namespace, so that the interpreter is of the base of LXD's snap, not of this one's: Python 3.12 in core24 (LXD 6.2 on),
and 3.10, which is too old, in core22 (LXD 5.21). The package unshare is compiled for one interpreter, and 3.12 does without.
"""

import os
import shutil

import qemu_userns
from qemu_userns.errors import ResourceError
from qemu_userns.hooks.apparmor import build_profile
from qemu_userns.hooks.install import write_entries

NAME, SLOT = "qemu-for-lxd", "qemu-external"
_PREFIX = "/snap/lxd/current/external/qemu"
_LIBRARY = "lib/python"
_PYTHON = "bin/python3"
_INTERPRETER = "/usr/bin/python3"  # what it is a symlink to: of LXD's base
_LINES = "raw.apparmor"
# As AppArmor sees them, with the revision of LXD's snap.
_PLACE = "/snap/lxd/*/external/qemu"
_INTERPRETERS = f"/{{usr,{_PLACE[1:]}/python}}/bin/python3*"
_YAML = f"""\
name: {NAME}
version: '1'
summary: QEMU in a user namespace, for LXD
description: The drop-in of qemu-userns, and the QEMU that it starts.
base: core24
slots:
  {SLOT}:
    interface: content
    content: qemu-external-binaries
    read: [$SNAP]
"""


def build_tree(directory: str, names: "list[str]") -> "tuple[str, ...]":
    """Write what the snap has of ours; return what is left to do, as commands.

    Args:
        directory: that is empty, or missing.
        names: of QEMU.

    Raises:
        ResourceError: there is something in it, or it cannot be written.
    """
    binaries, meta = os.path.join(directory, "bin"), os.path.join(directory, "meta")
    try:
        os.makedirs(directory, exist_ok=True)
        if os.listdir(directory):
            raise ResourceError(directory, "is not empty", "name a new directory")
        for path in (binaries, meta):
            os.mkdir(path)
        with open(os.path.join(meta, "snap.yaml"), "w", encoding="utf-8") as file:
            file.write(_YAML)
        package = os.path.dirname(qemu_userns.__file__)
        target = os.path.join(directory, _LIBRARY, "qemu_userns")
        shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
        write_entries(binaries, names, f"{_PREFIX}/{_PYTHON}", [f"{_PREFIX}/{_LIBRARY}"])
        os.symlink(_INTERPRETER, os.path.join(directory, _PYTHON))
        with open(os.path.join(directory, _LINES), "w", encoding="utf-8") as file:
            file.write(build_profile(f"{_PLACE}/bin", _INTERPRETERS, ""))
    except OSError as err:
        raise ResourceError(str(err.filename or directory), err.strerror or str(err)) from err
    return (
        *(f"cp -L QEMU {binaries}/{name}.distrib    # built for the base of LXD's snap" for name in names),
        f"cp -rL ITS-LIBRARIES {directory}/lib; cp -rL ITS-DATA {directory}/share",
        f"ln -sf ../python/bin/python3 {directory}/{_PYTHON}    # for LXD 5.21: a Python 3.12 or later that runs on core22",
        f"snap pack {directory} && snap install --dangerous {NAME}_1_*.snap",
        f"snap connect lxd:{SLOT} {NAME}:{SLOT} && snap restart lxd",
        f'lxc profile set default raw.apparmor "$(cat {os.path.join(directory, _LINES)})"    # for each profile that VMs use',
    )
