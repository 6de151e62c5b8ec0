"""Launch QEMU: the numbered list of the design, from a request to execve.

1 parse the command line and find the identity; 2 fork the supervisor, which makes the user namespace meanwhile; 3 look at the
host and build the plan (planning.py); 4 open what is to be opened, with the caller's rights; 5 take the namespaces with their
maps from the supervisor, and hand the monitors over to it; 6 become the outside identity and join them; 7 build the view;
8 forbid further namespaces and confine; 9 pass the fds; 10 execve.
"""

import errno
import os

from qemu_userns.errors import LaunchError, ResourceError, printable
from qemu_userns.linux.process import SIGPIPE, SIGXFSZ, reset_signal
from qemu_userns.request import find_program, find_start, plain_words, read_request, read_settings, read_settings_if_sound
from qemu_userns.supervisor.process import fork_supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from qemu_userns.request import Request, Start
    from qemu_userns.supervisor.process import Supervisor


def launch(request: "Request") -> "NoReturn":
    """Become QEMU, confined; or the plain QEMU, where the caller or the configuration says so.

    Raises:
        QemuUsernsError: nothing was left behind on the host.
    """
    if request.environ.get("QEMU_USERNS") == "off":
        execute(find_program(request, read_settings_if_sound(request)), request.argv, request.environ)
    config = read_settings(request)
    if config.off:
        execute(find_program(request, config), request.argv, request.environ)
    asked = read_request(request, config)
    if asked.config.off:
        execute(asked.qemu.path, plain_words(request, asked), request.environ)
    start = find_start(asked, request)
    supervisor = fork_supervisor(start.identity, "" if start.lease is None else start.lease.path)
    try:
        _carry_out(start, supervisor, request)
    except BaseException:
        if start.lease is not None:
            from qemu_userns.host.leases import release

            release(start.lease)
        raise


def _carry_out(start: "Start", supervisor: "Supervisor", request: "Request") -> "NoReturn":
    """Plan, and do what the plan says."""
    # Imported only here: loading these takes as long as the supervisor needs for the id maps, on another core.
    from qemu_userns.host.opening import Opened, open_grants
    from qemu_userns.plan.identity import NO_NETWORK
    from qemu_userns.plan.plan import NO_HOST, READ_ONLY_HOST
    from qemu_userns.planning import make_plan
    from qemu_userns.sandbox.confine import confine, pass_fds
    from qemu_userns.sandbox.namespaces import NamespaceLimits, become, join, leave_network
    from qemu_userns.sandbox.view import build_view, overlay_host

    plan = make_plan(start, request)
    for refusal in plan.find_refusals():
        raise ResourceError(refusal.why, refusal.reason, refusal.hint)
    opened = Opened(plan.build_layout(), supervisor.note)
    try:
        open_grants(plan.grants, plan.identity, None if start.lease is None else start.lease.fd, opened)
        namespaces = supervisor.open_namespaces()
        if plan.has_daemons:
            from qemu_userns.sandbox.daemons import start_daemons

            start_daemons(plan, namespaces, None if start.lease is None else start.lease.fd, opened)
        if plan.needs_supervisor:
            from qemu_userns.supervisor.state import build_state, write_state

            state = build_state(start, plan, opened)
            supervisor.hand_over([write_state(state), *opened.served], state.title)
        else:
            supervisor.hand_over(())
    except BaseException:
        opened.undo()
        raise
    # From here on the host is out of reach, and what was created is the supervisor's to remove if this process fails.
    for warning in plan.warnings:
        os.write(2, f"qemu-userns: warning: {printable(warning)}\n".encode())
    if plan.identity.switch:
        become(plan.identity)
    join(namespaces)
    if plan.network == NO_NETWORK:
        leave_network()
    limits = NamespaceLimits()
    if plan.host_tree == NO_HOST:
        build_view(opened, plan.cwd)
    else:
        overlay_host(opened, plan.cwd, plan.host_tree == READ_ONLY_HOST)
    limits.forbid_all()
    confine(plan.confinement, plan.find_reopened_fds())
    if plan.needs_supervisor:
        opened.take_over(os.dup(supervisor.channel_fd), plan.find_number("supervisor"))
    pass_fds(opened.passed)
    supervisor.commit()
    try:
        execute(plan.program, plan.words, request.environ)
    except LaunchError:
        supervisor.fail()
        raise


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
        why = err.strerror or str(err)
        if err.errno == errno.ENOENT and os.path.exists(program):
            why = "the interpreter or loader that it names is not in QEMU's view"
        raise LaunchError(program, f"cannot be executed: {why}", exit_status=status) from err
