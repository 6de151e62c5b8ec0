"""What a hook was applied with: a file of its own, the first that it writes and the last that it removes.

So --check and --remove find what --apply has done, also where it was killed, without its options.
"""

from qemu_userns.errors import ResourceError
from qemu_userns.hooks.files import read_text
from qemu_userns.hooks.host import Options
from qemu_userns.hooks.steps_files import File

NAMES = ("lxd", "incus", "libvirt")  # the hooks that have entries
_DIRECTORY = "/usr/local/lib/qemu-userns"


def find_options(name: str, directory: "str | None", divert: bool, root: str, python: str) -> Options:
    """Return the options of a hook: the operator's, else those that it was applied with, else the default.

    Args:
        name: of the hook.
        directory: that the operator names.
        divert: whether the operator says so.
        root: where the host's files are; "" for this host.
        python: our interpreter.

    Raises:
        ResourceError: the directory is not that which it was applied with, or is another hook's; a file cannot be read.
    """
    if name not in NAMES:
        return Options(name, "", root, python)
    applied, diverted = _read(name, root)
    if directory is not None and applied not in (None, directory):
        hint = f"qemu-userns hook {name} --remove, and then --apply with the other one"
        raise ResourceError(directory, f"is not the directory that hook {name} was applied with, {applied}", hint)
    found = applied or directory or f"{_DIRECTORY}/{name}"
    for other in NAMES:
        if other != name and _read(other, root)[0] == found:
            raise ResourceError(found, f"has the entries of hook {other}", f"qemu-userns hook {name} --dir DIR")
    return Options(name, found, root, python, divert or diverted)


def build_step(options: Options) -> File:
    """Return the step that notes the options."""
    text = f"directory={options.directory}\ndivert={'yes' if options.divert else 'no'}\n"
    return File("what --check and --remove go by", _build_path(options.name), text)


def _read(name: str, root: str) -> "tuple[str | None, bool]":
    """Return the directory that a hook was applied with, None if it was not, and whether it diverts."""
    lines = (read_text(root + _build_path(name)) or "").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return values.get("directory"), values.get("divert") == "yes"


def _build_path(name: str) -> str:
    return f"/etc/qemu-userns/{name}.hook"
