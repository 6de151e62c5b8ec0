"""The edge: where errors become lines on stderr and an exit status, once."""

import os
import sys

from qemu_userns.errors import QemuUsernsError, describe_bug, format_error, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn


def run_at_edge(function: "Callable[[], int]") -> "NoReturn":
    """Run a program's main function and exit; no traceback reaches the user."""
    sys.excepthook = _report_bug
    try:
        status = function()
    except QemuUsernsError as err:
        _print(format_error(err))
        status = err.exit_status
    except OSError as err:
        _print(f"qemu-userns: {printable(str(err.filename or 'system call'))}: {err.strerror or err}\n")
        status = 1
    sys.exit(status)


def _print(text: str) -> None:
    """Write to stderr, which may be closed."""
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:
        return


def _report_bug(_kind: "type[BaseException]", error: BaseException, _: "TracebackType | None") -> None:
    """Say in one line what no other error said, and where."""
    _print(f"qemu-userns: {describe_bug(error)}\nhint: please report this line\n")
