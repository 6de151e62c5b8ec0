"""The tree of a content snap with the drop-in, for LXD's own snap.

LXD's snap runs the QEMU of a snap that is connected to its plug `qemu-external`, from PREFIX/bin, with the libraries of
PREFIX/lib and the data of PREFIX/share (LXD 5.21.3 and 6.2 on; its snapcraft/commands/daemon.start). The interpreter there is of
the snap's base, which has to be Python 3.12 (core24) or later: the package unshare is compiled for one interpreter.
"""

import os
import shutil

import qemu_userns
from qemu_userns.errors import ResourceError
from qemu_userns.hooks.install import write_entries

NAME, SLOT = "qemu-for-lxd", "qemu-external"
_PREFIX = "/snap/lxd/current/external/qemu"
_LIBRARY = "lib/python"
_PYTHON = "/usr/bin/python3"
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
        write_entries(binaries, names, _PYTHON, [f"{_PREFIX}/{_LIBRARY}"])
    except OSError as err:
        raise ResourceError(str(err.filename or directory), err.strerror or str(err)) from err
    return (
        *(f"cp -L QEMU {binaries}/{name}.distrib    # built for the snap's base" for name in names),
        f"cp -rL ITS-LIBRARIES {directory}/lib; cp -rL ITS-DATA {directory}/share",
        f"snap pack {directory} && snap install --dangerous {NAME}_1_*.snap",
        f"snap connect lxd:{SLOT} {NAME}:{SLOT} && snap restart lxd",
    )
