"""qemu-userns explain: the plan in words, or as JSON."""

import json

from qemu_userns.plan.grants import (
    Connect,
    Consume,
    Display,
    Helper,
    KeepFd,
    Listen,
    LockLimit,
    Monitor,
    Notify,
    OpenFd,
    Passt,
    QmpSocket,
    Reserved,
    Tap,
    Virtiofsd,
)
from qemu_userns.plan.identity import CALLERS_NETWORK, NO_NETWORK
from qemu_userns.plan.plan import NO_HOST
from qemu_userns.planning import make_plan
from qemu_userns.request import find_start, read_request, read_settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.plan.grants import Grant
    from qemu_userns.plan.plan import Confinement, Plan
    from qemu_userns.request import Request

_FD_GRANTS = (KeepFd, OpenFd, Tap, Helper, Passt, Listen, Connect, Reserved, Virtiofsd)
_NETWORKS = {CALLERS_NETWORK: "the caller's", NO_NETWORK: "QEMU's own, without any interface"}
_CAPABILITIES = {0: "chown", 1: "dac_override", 3: "fowner", 4: "fsetid"}
_SCOPES = {1: "abstract sockets", 2: "signals"}


def explain(request: "Request", as_json: bool) -> int:
    """Print the plan of a request; return 1 when it would be refused."""
    plan = make_plan(find_start(read_request(request, read_settings(request)), request), request)
    facts = describe_plan(plan)
    print(json.dumps(facts, indent=2) if as_json else _format(facts))
    return 1 if facts["refused"] else 0


def describe_plan(plan: "Plan") -> "dict[str, list[dict[str, str]]]":
    """Return the plan as tables of text, in the order in which a launch goes."""
    identity = plan.identity
    host = (
        [] if plan.host_tree == NO_HOST else [{"what": f"the host's tree, {plan.host_tree}", "why": "fs=host, or a share of /"}]
    )
    return {
        "program": [{"path": plan.program, "name": plan.words[0], "identity": identity.why}],
        "uid map": [{"map": f"inside {entry.describe()} outside"} for entry in identity.uid_map],
        "gid map": [{"map": f"inside {entry.describe()} outside"} for entry in identity.gid_map],
        "network": [{"namespace": _NETWORKS.get(plan.network, plan.network)}],
        "view": host + [_describe(grant) for grant in plan.build_layout()],
        "fds": [_describe(grant) for grant in plan.grants if isinstance(grant, _FD_GRANTS)],
        "limits": [_describe(grant) for grant in plan.grants if isinstance(grant, LockLimit)],
        "monitors": [_describe_monitor(grant) for grant in plan.grants if isinstance(grant, Monitor | QmpSocket)],
        "service manager": [_describe(grant) for grant in plan.grants if isinstance(grant, Notify)],
        "displays": [_describe(grant) for grant in plan.grants if isinstance(grant, Display)],
        "taken over": [_describe(grant) for grant in plan.grants if isinstance(grant, Consume)],
        "rewritten": [{"where": r.where, "before": r.before, "after": r.after, "why": r.why} for r in plan.rewrites],
        "left alone": [{"option": option, "why": "no table knows it"} for option in plan.unknown],
        "confinement": _describe_confinement(plan),
        "warnings": [{"warning": warning} for warning in (*plan.warnings, *plan.logged)],
        "notes": [{"note": note} for note in plan.notes],
        "refused": [{"what": grant.why, "why": grant.reason, "hint": grant.hint or ""} for grant in plan.find_refusals()],
        "command line": [{"word": word} for word in plan.words],
    }


def _describe(grant: "Grant") -> "dict[str, str]":
    """Return a grant as text."""
    return {"what": grant.describe(), "why": grant.why}


def _describe_monitor(grant: "Monitor | QmpSocket") -> "dict[str, str]":
    """Return a monitor, or a socket of ours, with what its clients may do."""
    return {**_describe(grant), "clients": grant.rights.describe()}


def _describe_confinement(plan: "Plan") -> "list[dict[str, str]]":
    """Return what confines QEMU."""
    confinement = plan.confinement
    kept = ", ".join(_CAPABILITIES[number] for number in sorted(confinement.capabilities)) or "none"
    scopes = ", ".join(name for bit, name in _SCOPES.items() if confinement.scoped & bit)
    return [
        {"what": "capabilities inside", "value": kept},
        {"what": "no_new_privs", "value": "on"},
        {"what": "namespaces inside", "value": "forbidden"},
        {"what": "Landlock", "value": f"files: the view; scoped: {scopes or 'nothing'}" if confinement.landlock_abi else "no"},
        {"what": "seccomp filter", "value": _describe_filter(confinement)},
        {"what": "-sandbox added", "value": confinement.sandbox or "no"},
    ]


def _describe_filter(confinement: "Confinement") -> str:
    """Say what our own seccomp filter refuses."""
    if not confinement.filter_calls:
        return "no: the system calls of this machine are not known"
    refused = ["typing into the terminal", "limits and priorities of other processes"]
    refused += ["signals to other processes"] if confinement.filter_signals else []
    return "refuses " + ", ".join(refused + ([] if confinement.keys else ["keyrings"]))


def _format(facts: "dict[str, list[dict[str, str]]]") -> str:
    """Lay the tables out for a reader."""
    lines = []
    for title, rows in facts.items():
        if rows:
            lines.append(f"{title}:")
            lines += ["  " + _format_row(row) for row in rows]
    return "\n".join(lines)


def _format_row(row: "dict[str, str]") -> str:
    """Lay one row out: the first value, then the named rest where it says something new."""
    (_, first), *rest = row.items()
    return first + "".join(f"   {key}: {value}" for key, value in rest if value and not first.endswith(value))
