"""The seccomp filter that keeps signals inside one process, on the running kernel."""

import ctypes
import fcntl
import os
import resource
import signal
import struct
import termios
import threading
from collections.abc import Callable

import pytest

from qemu_userns.linux import process, seccomp


def errno_in_filtered_child(action: "Callable[[], object]", signals: bool = True, keys: bool = False) -> int:
    """Run `action` in a child under the filter; return 0, or the errno that it met."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.filter_calls(os.getpid() if signals else None, keys)
            action()
            code = 0
        except OSError as err:
            code = err.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> None:
    if getattr(LIBC, name)(*(ctypes.c_long(argument) for argument in arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)


def read_session_keyring() -> None:
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    call("syscall", number, 0, -3, 1)  # KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, create


def signal_own_thread() -> None:
    worker = threading.Thread(target=signal.pthread_kill, args=(threading.get_ident(), 0))
    worker.start()
    worker.join()


def hide_and_count() -> None:
    seccomp.hide_groups()
    if os.getgroups():
        raise OSError(1, "there are groups")


@pytest.mark.skipif(not seccomp.knows_machine(), reason="system call numbers of this machine are not known")
def test_groups_can_be_hidden() -> None:
    assert errno_in_filtered_child(hide_and_count) == 0


@pytest.mark.skipif(not seccomp.knows_machine(), reason="system call numbers of this machine are not known")
@pytest.mark.parametrize(
    ("action", "errno"),
    [
        pytest.param(lambda: os.kill(os.getpid(), 0), 0, id="kill itself"),
        pytest.param(lambda: signal.raise_signal(signal.SIGCHLD), 0, id="raise"),
        pytest.param(signal_own_thread, 0, id="signal its own thread"),
        pytest.param(lambda: fcntl.fcntl(2, fcntl.F_GETFL), 0, id="fcntl"),
        pytest.param(lambda: os.kill(os.getppid(), 0), 1, id="kill its parent"),
        pytest.param(lambda: os.kill(-1, 0), 1, id="kill all"),
        pytest.param(lambda: os.killpg(0, 0), 1, id="kill its group"),
        pytest.param(lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0), 1, id="signal by pidfd"),
        pytest.param(lambda: fcntl.fcntl(2, fcntl.F_SETOWN, os.getppid()), 1, id="own an fd for another process"),
    ],
)
def test_signals_stay_inside_the_process(action: "Callable[[], object]", errno: int) -> None:
    assert errno_in_filtered_child(action) == errno


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="keyctl has no number here")
@pytest.mark.parametrize(("keys", "errno"), [(False, 1), (True, 0)])
def test_keyrings_only_where_the_command_line_names_one(keys: bool, errno: int) -> None:
    found = errno_in_filtered_child(read_session_keyring, keys=keys)
    assert found in ((errno, 38) if keys else (errno,))  # 38: a kernel without keyrings


@pytest.mark.skipif(not seccomp.knows_machine(), reason="system call numbers of this machine are not known")
@pytest.mark.parametrize(
    ("action", "errno"),
    [
        pytest.param(lambda: resource.getrlimit(resource.RLIMIT_NOFILE), 0, id="own limits"),
        pytest.param(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU), 1, id="limits of its parent"),
    ],
)
def test_limits_of_no_other_process(action: "Callable[[], object]", errno: int) -> None:
    assert errno_in_filtered_child(action, signals=False) == errno


@pytest.mark.skipif(not seccomp.knows_machine(), reason="system call numbers of this machine are not known")
@pytest.mark.parametrize("signals", [True, False])
@pytest.mark.parametrize(
    ("request_number", "errno"),
    [(termios.TIOCSTI, 1), (0x541C, 1), (termios.FIONREAD, 0), (termios.TIOCSTI | 1 << 32, 1)],
    ids=["TIOCSTI", "TIOCLINUX", "FIONREAD", "TIOCSTI with high bits"],
)
def test_nothing_is_typed_into_a_terminal(request_number: int, errno: int, signals: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    read_end, write_end = os.pipe()

    def ask() -> None:
        if libc.ioctl(read_end, ctypes.c_ulong(request_number), ctypes.create_string_buffer(8)) < 0:
            raise OSError(ctypes.get_errno(), "ioctl")

    assert errno_in_filtered_child(ask, signals) == errno
    os.close(read_end)
    os.close(write_end)


@pytest.mark.skipif(not seccomp.knows_machine(), reason="system call numbers of this machine are not known")
def test_signals_are_left_alone_where_landlock_scopes_them() -> None:
    assert errno_in_filtered_child(lambda: os.kill(os.getppid(), 0), signals=False) == 0


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "loongarch64", "ppc64le", "s390x"])
@pytest.mark.parametrize("pid", [None, 4242])
def test_jumps_of_the_filter_stay_in_it_and_it_ends_in_a_return(machine: str, pid: "int | None") -> None:
    program = seccomp.build_filter(machine, pid, keys=False)
    lines = list(struct.iter_unpack("HBBI", program))
    for index, (code, true, false, _) in enumerate(lines):
        if code in (0x15, 0x35):
            assert index + 1 + max(true, false) < len(lines)
    assert lines[-1][0] == 0x06
