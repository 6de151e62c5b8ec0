"""Launch QEMU: the numbered list of the design, from a request to execve.

1 parse the command line, 2 look at the host, 3 build the plan (prepare.py); 4 open what is to be opened; 5 fork the
supervisor; 6 become the outside identity and unshare; 7 have the maps written; 8 build the view; 9 confine; 10 execve.
"""

import errno
import os

from qemu_userns.errors import LaunchError, ResourceError, printable
from qemu_userns.host.leases import release
from qemu_userns.host.opening import Opened, open_grants
from qemu_userns.linux.process import SIGPIPE, SIGXFSZ, reset_signal
from qemu_userns.plan.grants import Bind, KeepFd, Refuse, Reserved
from qemu_userns.plan.identity import SELF
from qemu_userns.prepare import find_program, prepare, read_settings
from qemu_userns.sandbox.confine import confine, pass_fds
from qemu_userns.sandbox.namespaces import become, enter, map_self
from qemu_userns.sandbox.view import build_view, overlay_host
from qemu_userns.supervisor.process import IdmappedMount, fork_supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from qemu_userns.plan.plan import Plan
    from qemu_userns.prepare import Prepared, Request
    from qemu_userns.supervisor.process import Supervisor


def launch(request: "Request") -> "NoReturn":
    """Become QEMU, confined; or the plain QEMU, where the caller or the configuration says so.

    Raises:
        QemuUsernsError: nothing was left behind on the host.
    """
    switched_off = request.environ.get("QEMU_USERNS") == "off"
    config = read_settings(request)
    if switched_off or config.off:
        execute(find_program(request, config), request.argv, request.environ)
    prepared = prepare(request, config)
    opened = Opened()
    try:
        _launch(prepared, opened, request)
    except BaseException:
        opened.undo()
        if prepared.lease is not None:
            release(prepared.lease)
        raise


def _launch(prepared: "Prepared", opened: Opened, request: "Request") -> "NoReturn":
    """Carry the plan out."""
    plan = prepared.plan
    stop_if_refused(plan)
    lease_fd = None if prepared.lease is None else prepared.lease.fd
    open_grants(plan, lease_fd, opened)
    supervisor = _start_supervisor(plan, opened, lease_fd is not None)
    for warning in plan.warnings:
        os.write(2, f"qemu-userns: warning: {printable(warning)}\n".encode())
    if plan.identity.switch:
        become(plan.identity)
    enter()
    if supervisor is None or plan.identity.method == SELF:
        map_self(plan.identity)
    else:
        supervisor.write_maps()
    (overlay_host if plan.whole_host else build_view)(opened, plan.cwd)
    confine(plan.confinement, [grant.number for grant in plan.grants if _is_reopened(grant)])
    if supervisor is not None:
        supervisor.commit()
    pass_fds(opened.passed)
    execute(plan.program, plan.words, request.environ)


def stop_if_refused(plan: "Plan") -> None:
    """Stop before anything is touched when the plan holds a refusal.

    Raises:
        ResourceError: the first one.
    """
    for grant in plan.grants:
        if isinstance(grant, Refuse):
            raise ResourceError(grant.why, grant.reason, grant.hint)


def execute(program: str, argv: "tuple[str, ...]", environ: "Mapping[str, str]") -> "NoReturn":
    """Become a program, with the signals that the interpreter took for itself given back.

    Raises:
        LaunchError: it cannot be executed.
    """
    for number in (SIGPIPE, SIGXFSZ):
        # The interpreter ignores them from its start, and whether the caller did cannot be told by then. QEMU ignores SIGPIPE.
        reset_signal(number)
    try:
        os.execve(program, argv, environ)
    except OSError as err:
        status = 127 if err.errno == errno.ENOENT else 126
        raise LaunchError(program, f"cannot be executed: {err.strerror}", exit_status=status) from err


def _start_supervisor(plan: "Plan", opened: Opened, leased: bool) -> "Supervisor | None":
    """Fork the supervisor if anything has to be done outside, now or at QEMU's end."""
    mounts = [
        IdmappedMount(opened.sources[placed.path], placed.owner, placed.path)
        for placed in opened.layout
        if isinstance(placed, Bind) and placed.owner is not None
    ]
    if plan.identity.method == SELF and not opened.leftovers:
        return None
    supervisor = fork_supervisor(plan.identity, mounts, opened.leftovers, leased)
    if supervisor.waits:
        number = next(grant.number for grant in plan.grants if isinstance(grant, Reserved) and grant.what == "supervisor")
        os.dup2(supervisor.request_fd, number, inheritable=False)
        opened.passed.append(number)
    return supervisor


def _is_reopened(grant: object) -> bool:
    """Say whether QEMU will open the file of a passed fd again by its /proc/self/fd name."""
    return (isinstance(grant, KeepFd) and grant.reopened) or (isinstance(grant, Reserved) and grant.what == "ptmx")
