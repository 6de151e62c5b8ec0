"""What hooks know of AppArmor: the lines that a profile of QEMU needs besides, and Ubuntu's restriction of user namespaces."""

import os
import shlex

from qemu_userns.hooks.files import read_text
from qemu_userns.hooks.steps import Fault

# For the launcher and the supervisor: QEMU has no capability outside its user namespace. The view is built below a root that
# AppArmor sees as "/": from then on the view says what QEMU can reach, not the profile. unshare.so is python-unshare's.
_PROFILE = """\
{userns}capability chown,
capability fowner,
capability fsetid,
capability mknod,
capability setpcap,
capability sys_admin,
capability sys_chroot,
capability sys_ptrace,
capability sys_resource,
mount,
umount,
pivot_root,
ptrace (read),
unix,
/ r,
/** rwlk,
/**/unshare*.so m,
"{directory}/qemu-system-*" ix,
"{python}" ix,
/{{,usr/,usr/local/}}bin/qemu-system-* mrix,
"""
_SPECIAL = '\\"*?[]{}^,'  # apparmor.d(5), "Globbing" and "Quoting"
RESTRICTION = "kernel.apparmor_restrict_unprivileged_userns"


def is_apparmor_enabled(root: str) -> bool:
    """Say whether AppArmor confines programs here; of the files of another system, whether it is installed there."""
    if root:
        return os.path.isdir(f"{root}/etc/apparmor.d")
    return (read_text("/sys/module/apparmor/parameters/enabled") or "").startswith("Y")


def build_profile(directory: str, python: str, root: str) -> str:
    """Return the lines for a profile; `userns` only where the parser knows it: apparmor.d(5), from 4.0 on.

    Args:
        directory: of the entries, as a pattern: see `escape_path`.
        python: the interpreter, likewise.
        root: where the host's files are; "" for this host.
    """
    userns = "userns,\n" if os.path.exists(f"{root}/etc/apparmor.d/abi/4.0") else ""
    return _PROFILE.format(userns=userns, directory=directory, python=python)


def escape_path(path: str) -> str:
    """Return a path as it stands between the quotes of a rule, where it means no other one."""
    return "".join(f"\\{character}" if character in _SPECIAL else character for character in path)


def is_userns_restricted(root: str) -> bool:
    """Say whether who is no root and has no profile may make no user namespace, as on Ubuntu from 23.10 on.

    Of the files of another system, whether the profile is there that such programs get on Ubuntu from 24.04 on.
    """
    if root:
        return os.path.exists(f"{root}/etc/apparmor.d/unprivileged_userns")
    return (read_text(f"/proc/sys/{RESTRICTION.replace('.', '/')}") or "").strip() == "1"


def find_restriction(name: str, program: str, root: str) -> "Fault | None":
    """Return what to do where user namespaces are restricted, until it is done.

    Root's VMs meet it too: the launcher makes the namespace as the id that QEMU gets.

    Args:
        name: of the hook.
        program: that starts QEMU; `*` stands for itself.
        root: where the host's files are; "" for this host.
    """
    path = f"/etc/apparmor.d/qemu-userns-{name}"
    if not is_userns_restricted(root) or os.path.exists(root + path):
        return None
    directory, _, last = program.rpartition("/")
    rule = f'profile qemu-userns-{name} "{escape_path(directory)}/{last}" flags=(unconfined) {{ userns, }}'
    lines = " ".join(shlex.quote(line) for line in ("abi <abi/4.0>,", rule))
    hint = f"printf '%s\\n' {lines} > {path} && apparmor_parser --replace {path}; or, for all programs: sysctl {RESTRICTION}=0"
    return Fault(RESTRICTION, "is 1, and QEMU's launcher has no profile that allows user namespaces", hint)
