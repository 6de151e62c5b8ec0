"""TCP sockets as QEMU makes them: inet_listen_saddr() and inet_connect_saddr() of util/qemu-sockets.c.

Not on the path of a launch without such a monitor: `socket` costs as much as an interpreter.
"""

import socket

from qemu_userns.cmdline.objects import as_switch
from qemu_userns.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Address = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
    Place = tuple[socket.AddressFamily, Address]

_BACKLOG = 16
_CONNECT_TIMEOUT_S = 30


def listen_tcp(options: "Mapping[str, str]") -> int:
    """Listen on `host` and the first free port from `port` up to `to`; return an owned fd.

    Raises:
        ResourceError: no address can be bound.
    """

    def listen(found: socket.socket, address: "Address") -> None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)

    port = options["port"]
    last = int(options.get("to", port)) if port.isdecimal() else 0
    ports = range(int(port), max(int(port), last) + 1) if port.isdecimal() else (port,)
    addresses = (place for number in ports for place in _resolve(options, number, socket.AI_PASSIVE))
    return _open_first(addresses, listen, _name(options), "Failed to find an available port")


def connect_tcp(options: "Mapping[str, str]") -> int:
    """Connect to `host` and `port`; return an owned fd.

    Raises:
        ResourceError: nobody is there.
    """

    def connect(found: socket.socket, address: "Address") -> None:
        found.settimeout(_CONNECT_TIMEOUT_S)
        found.connect(address)
        found.settimeout(None)

    return _open_first(_resolve(options, options["port"], 0), connect, _name(options), "Failed to connect")


def _open_first(places: "Iterable[Place]", start: "Callable[[socket.socket, Address], None]", name: str, failed: str) -> int:
    """Return an owned fd of a socket at the first address where it can be had."""
    error: "OSError | None" = None
    for family, address in places:
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            start(found, address)
        except OSError as err:
            found.close()
            error = err
        else:
            return found.detach()
    raise ResourceError(name, f"{failed}: {(error.strerror or error) if error else 'no address'}")


def _name(options: "Mapping[str, str]") -> str:
    """Return what the caller calls the socket."""
    return f"{options.get('host', '')}:{options['port']}"


def _resolve(options: "Mapping[str, str]", port: "int | str", flags: int) -> "Iterator[Place]":
    """Yield the addresses of a host."""
    wanted = socket.AF_UNSPEC
    ipv4, ipv6 = (as_switch(options.get(key)) == "on" for key in ("ipv4", "ipv6"))
    if ipv4 != ipv6:
        wanted = socket.AF_INET if ipv4 else socket.AF_INET6
    try:
        found = socket.getaddrinfo(options.get("host") or None, port, wanted, socket.SOCK_STREAM, 0, flags)
    except socket.gaierror as err:
        raise ResourceError(_name(options), f"address resolution failed: {err.strerror}") from err
    for family, _, _, _, address in found:
        yield family, address
