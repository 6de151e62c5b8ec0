"""TCP sockets as QEMU makes them: inet_listen_saddr() and inet_connect_saddr() of util/qemu-sockets.c.

Not on the path of a launch without such a monitor: `socket` costs as much as an interpreter.
"""

import socket

from qemu_userns.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_BACKLOG = 16
_ON = ("on", "yes", "true", "y")
_CONNECT_TIMEOUT_S = 30


def listen_tcp(options: "Mapping[str, str]") -> int:
    """Listen on `host` and the first free port from `port` up to `to`; return an owned fd.

    Raises:
        ResourceError: no address can be bound.
    """
    port = options["port"]
    last = int(options.get("to", port)) if port.isdecimal() else 0
    error: "OSError | None" = None
    for number in range(int(port), max(int(port), last) + 1) if port.isdecimal() else (port,):
        for family, address in _resolve(options, number, socket.AI_PASSIVE):
            found = socket.socket(family, socket.SOCK_STREAM)
            try:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                found.bind(address)
                found.listen(_BACKLOG)
            except OSError as err:
                found.close()
                error = err
            else:
                return found.detach()
    raise ResourceError(_name(options), f"Failed to find an available port: {error.strerror if error else 'no address'}")


def connect_tcp(options: "Mapping[str, str]") -> int:
    """Connect to `host` and `port`; return an owned fd.

    Raises:
        ResourceError: nobody is there.
    """
    error: "OSError | None" = None
    for family, address in _resolve(options, options["port"], 0):
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.settimeout(_CONNECT_TIMEOUT_S)
            found.connect(address)
            found.settimeout(None)
        except OSError as err:
            found.close()
            error = err
        else:
            return found.detach()
    raise ResourceError(_name(options), f"Failed to connect: {error.strerror if error else 'no address'}")


def _name(options: "Mapping[str, str]") -> str:
    """Return what the caller calls the socket."""
    return f"{options.get('host', '')}:{options['port']}"


def _resolve(
    options: "Mapping[str, str]", port: "int | str", flags: int
) -> "Iterator[tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]]":
    """Yield the addresses of a host."""
    wanted = socket.AF_UNSPEC
    if options.get("ipv4") in _ON and options.get("ipv6") not in _ON:
        wanted = socket.AF_INET
    elif options.get("ipv6") in _ON and options.get("ipv4") not in _ON:
        wanted = socket.AF_INET6
    try:
        found = socket.getaddrinfo(options.get("host") or None, port, wanted, socket.SOCK_STREAM, 0, flags)
    except socket.gaierror as err:
        raise ResourceError(_name(options), f"address resolution failed: {err.strerror}") from err
    for family, _, _, _, address in found:
        yield family, address
