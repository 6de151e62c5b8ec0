"""The names that `getfd` gave fds: one table at QEMU, but a client must not take, close or replace another client's.

A name that another client holds becomes NAME#NUMBER at QEMU. What a client leaves behind belongs to the monitor, as it does
without a broker: any later client may use it.
"""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NAMES = 4096
"""Beyond it the oldest are forgotten: no fd is lost by that, only its protection."""


class Found(Record):
    """What a client's name is at QEMU."""

    suffix: str
    """To be appended to the name."""
    missing: bool = False
    """Only other clients hold fds of that name: `suffix` makes one that nobody has."""


class FdNames:
    """Who holds which name."""

    def __init__(self) -> None:
        """Begin without names."""
        self._suffixes: dict[tuple[int | None, str], str] = {}
        """By client (None: the monitor's own) and name."""
        self._used: dict[str, int] = {}
        """How many of them there are with each name at QEMU."""
        self._number = 0

    def choose(self, client: int, name: str) -> str:
        """Return the suffix for a name that a client gives by getfd: the fd that it replaces is its own or nobody's."""
        for holder in (client, None):
            if (holder, name) in self._suffixes:
                return self._suffixes[holder, name]
        return self._invent(name) if name in self._used else ""

    def hold(self, client: "int | None", name: str, suffix: str) -> None:
        """Note that a client has given a name."""
        self._drop(None, name, suffix)
        self._drop(client, name)
        while len(self._suffixes) >= MAX_NAMES:
            self._drop(*next(iter(self._suffixes)))
        self._suffixes[client, name] = suffix
        self._used[name + suffix] = self._used.get(name + suffix, 0) + 1

    def find(self, client: int, name: str) -> Found:
        """Return what a name is that a client refers to; one that nobody gave is left as it is."""
        for holder in (client, None):
            if (holder, name) in self._suffixes:
                return Found(self._suffixes[holder, name])
        return Found(self._invent(name), missing=True) if name in self._used else Found("")

    def forget(self, client: "int | None", name: str) -> None:
        """Note that the fd of a name that a client referred to has been used or closed."""
        if not self._drop(client, name):
            self._drop(None, name)

    def leave(self, client: int) -> "list[str]":
        """Make a client's names the monitor's; return those at QEMU whose fds have to be closed, as another takes their place."""
        replaced: list[str] = []
        for holder, name in [key for key in self._suffixes if key[0] == client]:
            suffix = self._suffixes[holder, name]
            self._drop(holder, name)
            before = self._suffixes.get((None, name))
            if before is not None and before != suffix:
                replaced.append(name + before)
                self._drop(None, name)
            self.hold(None, name, suffix)
        return replaced

    def restore(self, names: "Iterable[str]") -> None:
        """Note names that the monitor has from before this session."""
        for name in names:
            self.hold(None, name, "")

    def _invent(self, name: str) -> str:
        while True:
            self._number += 1
            suffix = f"#{self._number}"
            if name + suffix not in self._used:
                return suffix

    def _drop(self, holder: "int | None", name: str, suffix: "str | None" = None) -> bool:
        """Remove an entry (if `suffix` is given, only one with it); tell whether there was one."""
        found = self._suffixes.get((holder, name))
        if found is None or suffix not in (None, found):
            return False
        del self._suffixes[holder, name]
        self._used[name + found] -= 1
        if not self._used[name + found]:
            del self._used[name + found]
        return True
