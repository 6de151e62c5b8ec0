"""Find out whether a QEMU that is told of no display would open a window: it takes the first of gtk and sdl that it has.

Source: qemu_display_find_default() of ui/console.c, module_load() of util/module.c.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MODULES = ("ui-gtk.so", "ui-sdl.so")


def opens_window(program: str, environ: "Mapping[str, str]") -> bool:
    """Say whether the modules of a QEMU have a window among them; distributions have these in packages of their own.

    Args:
        program: the real QEMU.
        environ: the caller's, which may name a folder of modules.
    """
    folders = (environ.get("QEMU_MODULE_DIR") or "", *_list_folders(os.path.dirname(os.path.dirname(os.path.realpath(program)))))
    return any(os.path.exists(f"{folder}/{name}") for folder in folders if folder for name in _MODULES)


def _list_folders(prefix: str) -> "Iterator[str]":
    """Yield where QEMUs of a prefix have their modules: libdir/qemu, with Debian's directories for each architecture."""
    yield from (f"{prefix}/{name}/qemu" for name in ("lib", "lib64"))
    try:
        names = os.listdir(f"{prefix}/lib")
    except OSError:
        return
    yield from (f"{prefix}/lib/{name}/qemu" for name in names if "-linux-" in name)
