"""Where packets to an address go: rtnetlink(7)."""

import struct

RTM_NEWROUTE = 24
RTM_GETROUTE = 26
NLM_F_REQUEST = 1
RTA_DST = 1
RTN_UNICAST = 1

_REQUEST = struct.Struct("=IHHII BBBBBBBBI HH")  # nlmsghdr, rtmsg, rtattr
_ANSWER = struct.Struct("=IHHII BBBBBBBBI")
_KIND, _TYPE = 1, 12  # indices of _ANSWER's members


def leads_elsewhere(family: int, address: bytes) -> bool:
    """Tell whether packets to an address leave this network namespace.

    The kernel answers by its rules and tables. Addresses that are bound, or connected from, do not tell as much: of a subnet the
    kernel prefers the first address; bind(2) refuses those of an IPv6 `local` route, and link-local ones without an interface.

    Args:
        family: AF_INET or AF_INET6.
        address: in so many bytes as the family has.

    Raises:
        OSError: no netlink socket can be had.
    """
    import _socket

    header = (_REQUEST.size + len(address), RTM_GETROUTE, NLM_F_REQUEST, 0, 0)
    route = (family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0)
    netlink = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC)  # protocol 0: NETLINK_ROUTE
    try:
        netlink.send(_REQUEST.pack(*header, *route, _REQUEST.size + len(address) - _ANSWER.size, RTA_DST) + address)
        data = netlink.recv(_ANSWER.size)
    finally:
        netlink.close()
    if len(data) < _ANSWER.size:
        return False
    found = _ANSWER.unpack(data)
    return (found[_KIND], found[_TYPE]) == (RTM_NEWROUTE, RTN_UNICAST)
