"""The option table against the QEMU binaries of this machine."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_userns.cmdline.table import BUILTIN, NONE, parse_help


def find_binaries() -> Iterator[Path]:
    """Yield the QEMU binaries, not the scripts and links to them; a drop-in of ours may stand in their place."""
    seen = set()
    for path in sorted(Path("/usr/bin").glob("qemu-system-*")):
        real = path.resolve()
        with real.open("rb") as file:
            is_program = file.read(4) == b"\x7fELF"
        if real not in seen and is_program and os.access(real, os.X_OK):
            seen.add(real)
            yield path


BINARIES = list(find_binaries())
needs_qemu = pytest.mark.skipif(not BINARIES, reason="no qemu-system-* in /usr/bin")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout + done.stderr


def takes_value(name: str) -> bool:
    entry = BUILTIN.find(name)
    assert entry, f"-{name} is unknown"
    return entry.grammar != NONE


def test_parse_help() -> None:
    text = """usage: qemu [options]
-h or -help     display this help and exit
-machine [type=]name[,prop[=value][,...]]
                selects emulated machine ('-machine help' for list)
-M              as -machine
-fda/-fdb file  use 'file' as floppy disk 0/1 image
-dtb    file    use 'file' as device tree image
--preconfig     pause QEMU before machine is initialized (experimental)
-S              freeze CPU at startup (use 'c' to start execution)
-s              shorthand for -gdb tcp::1234
-dfilter range,..  filter debug output
-seed number       seed the pseudo-random number generator
-xen-domid-restrict     restrict set of available xen operations
-async-teardown enable asynchronous teardown
-no-user-config
                do not load default user-provided config files at startup
-chardev help
-chardev null,id=id
-runas user     change to user id user just before starting the VM
"""
    flags = ["h", "help", "preconfig", "S", "s", "xen-domid-restrict", "async-teardown", "no-user-config"]
    values = ["machine", "M", "fda", "fdb", "dtb", "dfilter", "seed", "chardev", "runas"]
    assert parse_help(text) == {**dict.fromkeys(flags, False), **dict.fromkeys(values, True)}


@needs_qemu
@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name)
def test_every_option_in_help_is_known(binary: Path) -> None:
    learned = parse_help(run(binary, "-help"))
    assert len(learned) > 90
    assert learned == {name: takes_value(name) for name in learned}


@needs_qemu
@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name)
def test_options_take_what_the_table_says(binary: Path) -> None:
    # QEMU validates every option before it acts on one, so its complaint tells which word it took for a value.
    wrong, known = [], 0
    for name in BUILTIN.entries:
        complaint = run(binary, f"-{name}", "-invalidX", "-invalidY")
        if f"-{name}: invalid option" not in complaint:
            known += 1
            refused = "-invalidY" if takes_value(name) else "-invalidX"
            wrong += [name] * (f"{refused}: invalid option" not in complaint)
    assert not wrong
    assert known > 100
