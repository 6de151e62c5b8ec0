"""Call the C library and the kernel, for the wrappers in this room.

`_ctypes` is the extension module under `ctypes`. Used directly it costs 0.4 ms to import where `ctypes` takes 3 to 5, which
is half an interpreter start before QEMU's execve. Every argument is one machine word: an int, or bytes passed by address.
"""

import os
from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr, _SimpleCData, addressof, dlopen, dlsym, get_errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Scalar = _SimpleCData[Any]
    Argument = int | bytes | None
else:
    Scalar = _SimpleCData

# System calls added since Linux 5.1 have one number on every architecture, but for these, which add an offset of their own.
_MACHINE = os.uname().machine
_NUMBERS_ARE_KNOWN = not _MACHINE.startswith(("alpha", "mips"))


class _Word(Scalar):
    """A void pointer: takes an int of either sign, bytes (their address) or None (NULL)."""

    _type_ = "P"


class _Int(Scalar):
    """A C int."""

    _type_ = "i"


class _Long(Scalar):
    """A C long."""

    _type_ = "l"


class _Function(CFuncPtr):
    """A C function that returns an int and sets errno. Read as a long, its -1 would be 4294967295 and no error."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _SystemCall(CFuncPtr):
    """The C function syscall(), which returns a long."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Long


# The handle of what this process has loaded, the C library with it: dlopen(3), "If filename is NULL".
_PROCESS = dlopen(None, 0)  # type: ignore[arg-type]  # typeshed does not know of NULL


def find_function(name: str, argument_count: int) -> "_Function":
    """Find a function of the C library.

    Args:
        name: its symbol.
        argument_count: how many word-sized arguments it takes.

    Returns:
        A callable for `call`.

    Raises:
        OSError: the C library has no such symbol.
    """
    function = _Function(dlsym(_PROCESS, name))
    function.argtypes = (_Word,) * argument_count
    return function


def call(function: "_Function | _SystemCall", *arguments: "Argument", path: "str | bytes | None" = None) -> int:
    """Call a function that returns -1 and errno on failure.

    Args:
        function: from `find_function`.
        arguments: machine words.
        path: what the call was about, for the error text.

    Returns:
        The result, not negative.

    Raises:
        OSError: with errno and `path`.
    """
    result = int(function(*arguments))
    if result < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path) if path is not None else None)
    return result


_syscall = _SystemCall(dlsym(_PROCESS, "syscall"))
_syscall.argtypes = (_Word,) * 7


def syscall(number: int, *arguments: "Argument", path: "str | bytes | None" = None) -> int:
    """Make a system call that came with Linux 5.1 or later, by its number.

    Raises:
        OSError: with errno and `path`; ENOSYS on an architecture that numbers these calls otherwise.
    """
    if not _NUMBERS_ARE_KNOWN:
        raise OSError(38, f"system call numbers of {_MACHINE} are not known to qemu-userns")
    return call(_syscall, number, *arguments, *(0,) * (6 - len(arguments)), path=path)


class IntResult(_Int):
    """A C int that the kernel writes a result to."""

    @property
    def address(self) -> int:
        """Where the int lies."""
        return addressof(self)


class _Text(Scalar):
    """A C string pointer, which keeps its bytes alive and in place."""

    _type_ = "z"


class Pinned:
    """Bytes at a known address, for a structure that points to another one."""

    def __init__(self, data: bytes) -> None:
        """Keep `data`."""
        self._pointer = _Text(data)
        self.address = int(_Word.from_address(addressof(self._pointer)).value)


def pin(data: bytes) -> Pinned:
    """Return bytes at a known address; they stay as long as the result."""
    return Pinned(data)
