"""qemu-userns adopt: a new supervisor for VMs that have lost theirs, or for all, of a newer version of this program."""

import os
import signal
import subprocess
import sys
import time

from qemu_userns.cli.vms import Vm, find_vm, is_supervised, read_vms
from qemu_userns.errors import HostError, UsageError
from qemu_userns.hooks.install import find_import_path
from qemu_userns.supervisor import registry
from qemu_userns.supervisor.process import STANDARD_PATH

_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(registry.__file__)), "main.py")
_END_TIMEOUT_S = 5
_PAUSE_S = 0.01


def adopt(words: "list[str]") -> int:
    """Adopt one VM, or with --all those that have no supervisor; --replace ends the supervisor that there is.

    Raises:
        UsageError: the words make no sense, or there is no such VM.
    """
    replace = "--replace" in words
    rest = [word for word in words if word != "--replace"]
    if rest == ["--all"]:
        vms = [vm for vm in read_vms() if replace or not is_supervised(vm)]
    elif len(rest) == 1 and not rest[0].startswith("-"):
        vms = [find_vm(rest[0])]
    else:
        raise UsageError(" ".join(["adopt", *words]), "not understood", "qemu-userns adopt [--replace] VM|--all")
    status = 0
    for vm in vms:
        if replace:
            _end_supervisor(vm)
        answer = _start_supervisor(vm)
        if answer:
            os.write(2, answer)
            status = 1
        else:
            print(vm.describe())
    return status


def _start_supervisor(vm: Vm) -> bytes:
    """Start a supervisor that adopts a VM; return what it says when it cannot, nothing when it serves."""
    ours, theirs = os.pipe()
    words = [sys.executable, "-I", "-S", _SCRIPT, os.path.dirname(vm.socket), str(vm.pid), str(theirs), *find_import_path()]
    try:
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
            cwd="/",
            env={"PATH": STANDARD_PATH},
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        return file.read()


def _end_supervisor(vm: Vm) -> None:
    """End the supervisor of a VM, whose clients see one end of file.

    Raises:
        HostError: it does not end.
    """
    if not is_supervised(vm):
        return
    entry = registry.read_entry(os.path.dirname(vm.socket), vm.pid)
    os.kill(entry.supervisor, signal.SIGKILL)
    deadline = time.monotonic() + _END_TIMEOUT_S
    while is_supervised(vm):
        if time.monotonic() > deadline:
            raise HostError(vm.describe(), f"its supervisor {entry.supervisor} does not end")
        time.sleep(_PAUSE_S)
