"""What QEMU would call the character devices of its monitors, if it had the clients itself: char-socket.c of QEMU."""

from _socket import AF_INET6, AF_UNIX, SO_DOMAIN, SOL_SOCKET, socket

from qemu_userns.cmdline.objects import as_switch
from qemu_userns.plan.grants import FD, OWN, STDIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.grants import Monitor


def describe_device(monitor: "Monitor", client: "int | None") -> "str | None":
    """Return the file name that query-chardev shows for a monitor.

    Args:
        monitor: the monitor.
        client: fd of the client that it has, None if there is none; borrowed.

    Returns:
        None for a monitor of our own.
    """
    if monitor.kind == OWN:
        return None
    if monitor.kind == STDIO:
        return "stdio"
    server = ",server=on" if monitor.listens else ""
    if client is None:
        return f"disconnected:{_describe_address(monitor)}{server}"
    peer = socket(fileno=client)
    try:
        if peer.getsockopt(SOL_SOCKET, SO_DOMAIN) == AF_UNIX:
            name = peer.getsockname()
            return f"unix:{name if isinstance(name, str) else ''}{server}"
        return f"tcp:{_join(peer, peer.getsockname())}{server} <-> {_join(peer, peer.getpeername())}"
    except OSError:
        return f"disconnected:{_describe_address(monitor)}{server}"  # it has just gone
    finally:
        peer.detach()


def _describe_address(monitor: "Monitor") -> str:
    """Return an address as the command line gives it."""
    options = dict(monitor.options)
    if "port" in options:
        return f"tcp:{monitor.given}"
    if as_switch(options.get("abstract", "")) == "on":
        tight = ",tight=on" if as_switch(options.get("tight", "on")) == "on" else ""
        return f"unix:{monitor.given},abstract=on{tight}"
    return f"unix:{monitor.path if monitor.kind == FD else monitor.given}"


def _join(peer: socket, address: "tuple[str, int]") -> str:
    """Return host and port, an IPv6 address in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if peer.family == AF_INET6 else f"{host}:{port}"
