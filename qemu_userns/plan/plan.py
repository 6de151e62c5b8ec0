"""The plan of a launch, a value: what `explain` prints and launch.py carries out."""

from qemu_userns.plan.grants import KeepFd, Refuse, Reserved, Virtiofsd
from qemu_userns.plan.identity import CALLERS_NETWORK
from qemu_userns.plan.layout import build_layout, build_overlay
from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.grants import Grant
    from qemu_userns.plan.identity import Identity
    from qemu_userns.plan.layout import Placed


NO_HOST, READ_ONLY_HOST, WHOLE_HOST = "no", "read-only", "whole"


class Rewrite(Record):
    """One word of QEMU's command line, or one file that it names, before and after."""

    where: str
    before: str
    after: str
    why: str


class Confinement(Record):
    """What QEMU may do once it runs."""

    capabilities: "frozenset[int]"  # kept inside the namespace; none of them reaches outside it
    landlock_abi: int  # level of the kernel's Landlock that is used, 0 for none
    scoped: int  # Landlock scopes
    filter_calls: bool  # a seccomp filter keeps QEMU from the caller's terminal, keyrings and other processes' limits
    filter_signals: bool  # and from signalling others, where Landlock does not scope signals
    keys: bool  # the command line names a secret in a keyring
    sandbox: (
        "str | None"  # value of the -sandbox option that is added, None when the command line says its own or the build lacks it
    )


class Granted(Record):
    """What the host gives, for a launch or for one command."""

    grants: "tuple[Grant, ...]"
    host_tree: str  # NO_HOST: a view of its own; else the host's whole tree (fs=host, or a share of /), writable or not

    def build_layout(self) -> "tuple[Placed, ...]":
        """Return what is placed in the view, or over the host's tree."""
        if self.host_tree == NO_HOST:
            return build_layout(self.grants)
        return build_overlay(self.grants, self.host_tree == READ_ONLY_HOST)

    def find_refusals(self) -> "tuple[Refuse, ...]":
        """Return what stops it before anything is touched."""
        return tuple(grant for grant in self.grants if isinstance(grant, Refuse))


class Plan(Granted):
    """Everything a launch does, decided."""

    program: str  # path of the real QEMU
    words: "tuple[str, ...]"  # its arguments, argv[0] included
    cwd: str
    identity: "Identity"
    rewrites: "tuple[Rewrite, ...]"
    unknown: "tuple[str, ...]"  # options that no table knows, passed through
    confinement: Confinement
    warnings: "tuple[str, ...]" = ()  # for stderr, at every launch
    notes: "tuple[str, ...]" = ()  # for a reader of the plan
    network: str = CALLERS_NETWORK  # or NO_NETWORK, or the path of a network namespace
    logged: "tuple[str, ...]" = ()  # warnings for a reader of the plan and for the VM's log

    @property
    def needs_supervisor(self) -> bool:
        """Whether anything is left to do outside once QEMU runs."""
        return any(isinstance(grant, Reserved) and grant.what == "supervisor" for grant in self.grants)

    @property
    def has_daemons(self) -> bool:
        """Whether programs run beside QEMU for it."""
        return any(isinstance(grant, Virtiofsd) for grant in self.grants)

    def find_number(self, what: str) -> int:
        """Return the number of an fd that the launcher itself opens; `what` as in Reserved."""
        return next(grant.number for grant in self.grants if isinstance(grant, Reserved) and grant.what == what)

    def find_reopened_fds(self) -> "tuple[int, ...]":
        """Return the fds whose files QEMU will open again by their names in /proc/self/fd."""
        kept = [grant.number for grant in self.grants if isinstance(grant, KeepFd) and grant.reopened]
        return (*kept, *(grant.number for grant in self.grants if isinstance(grant, Reserved) and grant.what == "ptmx"))
