"""Run a part of a test in a child process, which may give up everything it has."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_userns.linux import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def in_child(function: Callable[[], Any]) -> Any:
    """Run `function` in a fork; return what it returns.

    Raises:
        AssertionError: it raised; the text is its traceback.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            try:
                answer = pickle.dumps((True, function()))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            while answer:
                answer = answer[os.write(write, answer) :]
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    assert data, "the child was killed"
    worked, result = pickle.loads(data)
    assert worked, result
    return result


def in_namespaces(function: Callable[[], Any]) -> Any:
    """Run `function` in a fork, root in a user and a mount namespace of its own."""

    def enter() -> Any:
        uid, gid = os.geteuid(), os.getegid()
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return function()

    return in_child(enter)


@contextmanager
def first_thread_ended(before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process whose first thread alone has ended, which the kernel shows as a zombie; it goes on until its stdin is closed.

    Args:
        before: a statement that it runs first.
    """
    code = f"""
import ctypes, os, sys, threading
{before}
def run():
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=run).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status")
        while "State:\tZ" not in status.read_text():
            time.sleep(0.01)
        yield process


def errno_of(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Return the errno that a call ends with, None if it works."""
    try:
        function(*arguments)
    except OSError as err:
        return err.errno
    return None
