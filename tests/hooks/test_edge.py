"""What the edge says besides the error: which rule an AppArmor profile lacks."""

from __future__ import annotations

import errno

import pytest

from qemu_userns.errors import HostError, QemuUsernsError, SandboxError
from qemu_userns.hooks.edge import explain_denial


def denied(code: int, rule: str | None) -> QemuUsernsError:
    """Return an error with its cause."""
    error = SandboxError("cannot make a root for QEMU", "why", rule=rule)
    error.__cause__ = OSError(code, "why")
    return error


@pytest.mark.parametrize(
    ("profile", "command"),
    [
        (
            "lxd-v-1_</var/lib/lxd>",
            'lxc config set v-1 raw.apparmor "$(cat /etc/qemu-userns/lxd.apparmor)", which qemu-userns hook lxd --apply writes',
        ),
        (
            "incus-p_v1_</var/lib/incus>",
            'incus config set --project p v1 raw.apparmor "$(cat /etc/qemu-userns/incus.apparmor)", '
            "which qemu-userns hook incus --apply writes",
        ),
        (
            "lxd-p-1_v-1_</var/snap/lxd/common/lxd>",
            'lxc config set --project p-1 v-1 raw.apparmor "$(cat /etc/qemu-userns/lxd.apparmor)", '
            "which qemu-userns hook lxd --apply writes",
        ),
        (
            "lxd-0123456789abcdef",
            'lxc config set INSTANCE raw.apparmor "$(cat /etc/qemu-userns/lxd.apparmor)", '
            "which qemu-userns hook lxd --apply writes",
        ),
        ("libvirt-c0ffee", "add it to /etc/apparmor.d/local/abstractions/libvirt-qemu"),
        ("/usr/bin/mine", "add it to the profile, and load that with apparmor_parser -r"),
    ],
)
def test_a_confined_caller_is_told_the_rule_and_the_command(profile: str, command: str) -> None:
    said = explain_denial(denied(errno.EACCES, "mount,"), profile)
    assert said == f"hint: where it is AppArmor that forbids this, its profile {profile} lacks `mount,`: {command}\n"


def test_a_namespace_that_is_refused_names_its_rule() -> None:
    assert "lacks `userns,`" in explain_denial(HostError("cannot make a user namespace", "no", rule="userns,"), "p")


@pytest.mark.parametrize(
    ("error", "profile"),
    [
        (denied(errno.EACCES, "mount,"), None),
        (denied(errno.ENOSPC, "mount,"), "p"),
        (denied(errno.EACCES, None), "p"),
    ],
)
def test_what_apparmor_has_not_forbidden(error: QemuUsernsError, profile: str | None) -> None:
    assert explain_denial(error, profile) == ""
