"""Start a virtfs-proxy-helper as LXD does: connected to what QEMU gets, and in a user namespace with a map."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_userns.host.usernamespace import Holder, write_map
from qemu_userns.linux import process
from qemu_userns.plan.identity import MapEntry
from tests.conftest import dropin_folder
from tests.machine import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LXD_MAP = (MapEntry(0, 65534, 1), MapEntry(1000, 1000, 1))
"""What LXD makes of `raw.idmap = both 1000 1000`."""
DEADLINE_S = 20 * PATIENCE


class Helper:
    """A stand-in that runs, and QEMU's end of its socket."""

    def __init__(self, command: subprocess.Popen[str], channel: socket.socket) -> None:
        self.command = command
        self.channel = channel

    @property
    def fd(self) -> int:
        return self.channel.fileno()

    def wait(self) -> tuple[int, str]:
        """Wait for its end; return its exit status, and what it said."""
        _, said = self.command.communicate(timeout=DEADLINE_S)
        return self.command.returncode, said


@contextlib.contextmanager
def helper(path: Path, id_map: Sequence[MapEntry] = (), program: str = "") -> Iterator[Helper]:
    """Start a stand-in as LXD does: in a user namespace with a map, or as the caller itself."""
    ours, theirs = connected_pair()
    program = program or str(dropin_folder() / "virtfs-proxy-helper")
    words = [program, "--nodaemon", "--fd", str(theirs.fileno()), "--path", str(path)]
    with ours:
        with entering(id_map) as enter:
            command = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, pass_fds=(theirs.fileno(),), preexec_fn=enter)
        theirs.close()
        try:
            yield Helper(command, ours)
        finally:
            command.kill()
            command.communicate()


@contextlib.contextmanager
def entering(id_map: Sequence[MapEntry]) -> Iterator[Callable[[], None]]:
    """Have what a process calls before it executes a program, to be root in a user namespace with a map, if there is one."""
    namespace = open_namespace(id_map) if id_map else None

    def enter() -> None:
        if namespace is not None:
            process.setns(namespace, process.CLONE_NEWUSER)
            os.setgid(0)
            os.setuid(0)

    try:
        yield enter
    finally:
        if namespace is not None:
            os.close(namespace)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return QEMU's end and the helper's, which LXD makes with a listener that has an abstract address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen(1)
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def open_namespace(id_map: Sequence[MapEntry]) -> int:
    """Return an owned fd of a new user namespace with a map."""
    holder = Holder(None)
    try:
        for name in ("uid_map", "gid_map"):
            write_map(f"/proc/{holder.pid}/{name}", id_map)
        return os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        holder.let_go()
