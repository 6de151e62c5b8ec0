"""The tree of errors that this program raises on purpose.

    QemuUsernsError          str() is one line for the user: WHAT: WHY
     +-- UsageError          our own option, environment or configuration is wrong
     +-- CommandLineError    QEMU's command line cannot be understood
     +-- HostError           the host lacks something (a sysctl, a package, a group, subordinate ids)
     +-- ResourceError       a file, disk or device that the command line names cannot be opened
     +-- SandboxError        a step between fork and execve failed
     +-- LaunchError         QEMU itself could not be executed

Only the edge (cli/, hooks/) prints them, with `format_error`, and only there does the process exit.
"""


class QemuUsernsError(Exception):
    """What went wrong (`what`), why (`why`), and what to do about it (`hint`)."""

    exit_status = 1

    def __init__(self, what: str, why: str, hint: "str | None" = None, *, rule: "str | None" = None) -> None:
        """Keep the parts; `what` names the thing (a path, an option, a step), `why` the reason.

        Args:
            what: see above.
            why: see above.
            hint: what to do about it.
            rule: that an AppArmor profile has to have where it is what forbids the step (apparmor.d(5)).
        """
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why
        self.hint = hint
        self.rule = rule

    def find_rule(self) -> "str | None":
        """Return the rule, if a system call that failed has not failed for another reason than rights."""
        other = isinstance(self.__cause__, OSError) and self.__cause__.errno not in (1, 13)  # EPERM, EACCES
        return None if other else self.rule


class UsageError(QemuUsernsError):
    """An option, an environment variable or a configuration file of ours is wrong."""


class CommandLineError(QemuUsernsError):
    """QEMU's command line, or a -readconfig file that it names, cannot be understood."""


class HostError(QemuUsernsError):
    """The host lacks something that a launch needs."""


class ResourceError(QemuUsernsError):
    """A file, disk or device that the command line names cannot be handed over."""


class SandboxError(QemuUsernsError):
    """A step that builds or confines the namespaces failed; nothing runs unconfined instead."""


class LaunchError(QemuUsernsError):
    """QEMU could not be executed; `exit_status` is 126 or 127, as a shell's."""

    def __init__(self, what: str, why: str, hint: "str | None" = None, *, exit_status: int) -> None:
        """Keep the parts and the exit status."""
        super().__init__(what, why, hint)
        self.exit_status = exit_status


def format_error(error: QemuUsernsError) -> str:
    """Return the lines for stderr: `qemu-userns: WHAT: WHY`, and `hint: REMEDY` where there is one.

    Control characters in a path must not forge a second line, so they are shown escaped.
    """
    lines = f"qemu-userns: {printable(str(error))}\n"
    return lines + f"hint: {printable(error.hint)}\n" if error.hint else lines


def printable(text: str) -> str:
    """Return `text` with what is not printable escaped, undecodable bytes of file names too."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe_bug(error: BaseException) -> str:
    """Return one line for an exception that nobody expected, with the place where it was raised."""
    at, line = "", 0
    trace = error.__traceback__
    while trace is not None:
        at, line = trace.tb_frame.f_code.co_filename.rpartition("/")[2], trace.tb_lineno
        trace = trace.tb_next
    return f"internal error: {type(error).__name__} at {at}:{line}: {printable(str(error))}"
