"""The character device strings of -serial, -parallel, -monitor, -qmp, -debugcon, -gdb and -qtest.

Source: chardev/char.c of QEMU, qemu_chr_parse_compat().
"""

from qemu_userns.cmdline.opts import parse_opts
from qemu_userns.record import Record

BARE_BACKENDS = ("null", "pty", "msmouse", "wctablet", "braille", "testdev", "stdio", "none")
TCP_PROTOCOLS = ("telnet", "tn3270", "websocket")
# Lengths of QEMU's buffers: what is longer is cut or refused there.
HOST_MAX, PORT_MAX, SIZE_MAX = 64, 32, 7


class LegacyChardev(Record):
    """What a string means in the words of -chardev; "chardev" (with `id`) and "none" are no backends of -chardev."""

    backend: str
    members: tuple[tuple[str, str], ...] = ()
    mux: bool = False
    """The string began with "mon:": a monitor shares the device."""

    def get(self, key: str, default: "str | None" = None) -> "str | None":
        """Return the value of the last member `key`."""
        return dict(self.members).get(key, default)


def parse_legacy(text: str) -> "LegacyChardev | None":
    """Return what a character device string means, None if QEMU will refuse it."""
    if text.startswith("chardev:"):
        return LegacyChardev("chardev", (("id", text.removeprefix("chardev:")),))
    if not text.startswith("mon:"):
        return _parse_backend(text)
    text = text.removeprefix("mon:")
    device = _parse_backend(text)
    if device is None:
        return None
    # Ctrl-C goes to the guest where the monitor has another way in.
    signal = (("signal", "off"),) if text == "stdio" else ()
    return device.replace(mux=True, members=(*signal, *device.members))


def _parse_backend(text: str) -> "LegacyChardev | None":
    """Return what a string without "mon:" means."""
    if text in BARE_BACKENDS:
        return LegacyChardev(text)
    scheme, colon, rest = text.partition(":")
    if text.startswith(("/dev/", "COM")):
        kind = "parallel" if text.startswith(("/dev/parport", "/dev/ppi")) else "serial"
        return LegacyChardev(kind, (("path", text),))
    if text.startswith("vc"):
        return _parse_vc(text[2:])
    if text == "con:":
        return LegacyChardev("console")
    if not colon:
        return None
    if scheme in ("file", "pipe", "pty"):
        return LegacyChardev(scheme, (("path", rest),))
    if scheme == "unix":
        return LegacyChardev("socket", _parse_members(rest, "path"))
    if scheme == "tcp" or scheme in TCP_PROTOCOLS:
        return _parse_tcp(scheme, rest)
    return _parse_udp(rest) if scheme == "udp" else None


def _parse_members(text: str, implied: "str | None" = None) -> "tuple[tuple[str, str], ...]":
    return tuple((member.key, member.value) for member in parse_opts(text, implied=implied))


def _parse_vc(size: str) -> "LegacyChardev | None":
    """Read what follows "vc": nothing, `:800x600` pixels or `:80Cx24C` characters."""
    if not size.startswith(":"):
        return LegacyChardev("vc")
    width, _, height = size[1:].partition("x")
    names = ("width", "height")
    if width.endswith("C"):
        width, names = width[:-1], ("cols", "rows")
    height = height[: len(height) - len(height.lstrip("0123456789"))]
    if not (width.isascii() and width.isdecimal() and len(width) <= SIZE_MAX and height):
        return None
    return LegacyChardev("vc", ((names[0], width), (names[1], height[:SIZE_MAX])))


def _parse_tcp(scheme: str, text: str) -> "LegacyChardev | None":
    """Read `HOST:PORT[,members]`."""
    address = _read_address(text, ",")
    if address is None:
        return None
    host, port, rest = address
    members = (("host", host), ("port", port), *(_parse_members(rest[1:]) if rest.startswith(",") else ()))
    return LegacyChardev("socket", members if scheme == "tcp" else (*members, (scheme, "on")))


def _parse_udp(text: str) -> "LegacyChardev | None":
    """Read `HOST:PORT[@HOST:PORT]`."""
    remote = _read_address(text, "@,")
    if remote is None:
        return None
    members = (("host", remote[0]), ("port", remote[1]))
    if not remote[2].startswith("@"):
        return LegacyChardev("udp", members)
    local = _read_address(remote[2][1:], ",")
    return local and LegacyChardev("udp", (*members, ("localaddr", local[0]), ("localport", local[1])))


def _read_address(text: str, stops: str) -> "tuple[str, str, str] | None":
    """Return host, port and what is left; the host ends at the first colon, so IPv6 has no place here."""
    host, colon, rest = text.partition(":")
    end = 0
    while end < len(rest) and end < PORT_MAX and rest[end] not in stops:
        end += 1
    if not colon or not end or len(host) > HOST_MAX:
        return None
    return host, rest[:end], rest[end:]
