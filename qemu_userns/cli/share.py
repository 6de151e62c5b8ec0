"""qemu-userns share: look at a shared directory, and convert it between 9p security models."""

import json
import os
import resource
import stat
import sys

from qemu_userns.errors import ResourceError, UsageError, printable
from qemu_userns.host.own_ids import enter_own_ids, find_own_ids
from qemu_userns.host.subids import parse_idmap
from qemu_userns.shares.convert import convert, scan
from qemu_userns.shares.idmap import Translation
from qemu_userns.shares.inspect import describe, inspect
from qemu_userns.shares.journal import Journal, find_journal
from qemu_userns.shares.served import check_not_served
from qemu_userns.shares.stores import MAPPED_XATTR, MODELS, PASSTHROUGH
from qemu_userns.shares.wanted import Job

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qemu_userns.shares.inspect import Found
    from qemu_userns.shares.wanted import Step

_USAGE = "qemu-userns share inspect [--json] [--map MAP] DIR | share convert DIR --from MODEL --to MODEL [--dry-run]"
_FLAGS = ("--json", "--dry-run", "--privileged", "--quiet")
_VALUES = ("--from", "--to", "--map", "--owner")
_ALLOWED = {"inspect": ("--json", "--map"), "convert": ("--dry-run", "--privileged", "--quiet", *_VALUES)}
_SHOWN_MAX = 20  # problems
_PROGRESS_STEP = 1000  # entries


def share(words: "list[str]") -> int:
    """Inspect or convert; return the exit status.

    Raises:
        UsageError: the words make no sense.
        ResourceError: the directory cannot be read, or not be converted.
    """
    command, rest = (words[0], words[1:]) if words else ("", [])
    options, paths = _parse(rest)
    if len(paths) != 1 or command not in _ALLOWED or not options.keys() <= set(_ALLOWED[command]):
        raise UsageError(" ".join(["share", *words]), "not understood", _USAGE)
    path = paths[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each level of directories
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise ResourceError(path, str(err.strerror)) from err
    try:
        if command == "inspect":
            return _inspect(root, options)
        return _convert(root, path, options)
    finally:
        os.close(root)


def _parse(words: "list[str]") -> "tuple[dict[str, list[str]], list[str]]":
    """Split options, each `--KEY VALUE` or `--KEY=VALUE`, from paths; raises UsageError."""
    options: dict[str, list[str]] = {}
    paths: list[str] = []
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if word == "--":
            paths += rest
        elif word in _FLAGS:
            options[word] = []
        elif key in _VALUES:
            found = value if equals else next(rest, None)
            if found is None:
                raise UsageError(word, "needs a value", _USAGE)
            options.setdefault(key, []).append(found)
        elif word.startswith("-"):
            raise UsageError(word, "not understood", _USAGE)
        else:
            paths.append(word)
    return options, paths


def _inspect(root: int, options: "dict[str, list[str]]") -> int:
    """Print each entry; return 1 if some could not be looked at."""
    faults: list[str] = []
    ids = _parse_map(options)
    if os.geteuid() != 0 and not _is_readable(root, ids) and (own := find_own_ids()) is not None:
        enter_own_ids(own)
    found = inspect(root, ids, lambda path, why: faults.append(f"{path}: {why}"))
    if "--json" in options:
        print(json.dumps([_describe(entry) for entry in found], indent=2))
    else:
        for entry in found:
            guests = [f"{model} {describe(entry.guests[model])}" for model in entry.keeps or (PASSTHROUGH,)]
            print(f"{printable(entry.path)}: host {describe(entry.host)}; guest: {', '.join(guests)}")
    for fault in faults:
        print(f"qemu-userns: {printable(fault)}", file=sys.stderr)
    return 1 if faults else 0


def _is_readable(root: int, ids: Translation) -> bool:
    """Say whether everything can be looked at."""
    faults: list[str] = []
    return all(not faults for _ in inspect(root, ids, lambda path, _: faults.append(path))) and not faults


def _describe(entry: "Found") -> "dict[str, object]":
    views = {"host": entry.host, **entry.guests}
    return {
        "path": entry.path,
        "keeps": list(entry.keeps),
        **{
            name: {"type": stat.filemode(seen.mode)[0], "mode": seen.mode, "uid": seen.uid, "gid": seen.gid, "rdev": seen.rdev}
            for name, seen in views.items()
        },
    }


def _convert(root: int, path: str, options: "dict[str, list[str]]") -> int:
    """Convert a share, or say what would become of it; return 1 if it cannot be."""
    job = _build_job(root, options)
    status = os.fstat(root)
    ids = None if job.ids.entries is None else [[e.kind, e.outside, e.inside, e.count] for e in job.ids.entries]
    # With passthrough DIR's owner changes in the end, and is nobody else's.
    owner = None if job.target == PASSTHROUGH else list(job.owner)
    asked = {"from": job.source, "to": job.target, "owner": owner, "map": ids, "privileged": job.privileged}
    journal = Journal(find_journal(path), {**asked, "device": status.st_dev, "inode": status.st_ino})
    dry = "--dry-run" in options
    if MAPPED_XATTR in (job.source, job.target):
        _check_xattrs(root, path)
    if not check_not_served(root, path):
        print("qemu-userns: another user's QEMU may serve it; only root can tell", file=sys.stderr)
    count, converted, problems = scan(root, job, journal)
    if converted < len(problems) and job.caller != 0 and (own := find_own_ids()) is not None:
        enter_own_ids(own)
        job = job.replace(own=own)
        count, converted, problems = scan(root, job, journal)
    if converted == len(problems) == count:
        print(f"{count} entries are {job.target} already")
        return 0
    for name, why in problems[:_SHOWN_MAX]:
        print(f"qemu-userns: {printable(name)}: {why}", file=sys.stderr)
    if problems:
        raise ResourceError(path, f"{len(problems)} of {count} entries cannot be converted", "this run has changed nothing")
    if dry:
        scan(root, job, journal, _show)
        print(f"{count} entries can be converted from {job.source} to {job.target}")
        return 0
    journal.start()
    done = False
    try:
        convert(root, job, journal, lambda number: _report(number, count, "--quiet" in options))
        done = True
    finally:
        journal.close(done)
    print(f"{count} entries converted from {job.source} to {job.target}")
    return 0


def _build_job(root: int, options: "dict[str, list[str]]") -> Job:
    """Return what is asked for; raises UsageError."""
    models = options.get("--from", []) + options.get("--to", [])
    models = [MAPPED_XATTR if model == "mapped" else model for model in models]
    if len(models) != 2 or len(options.get("--from", [])) != 1 or models[0] == models[1] or not set(models) <= set(MODELS):
        raise UsageError("share convert", f"--from and --to take two of {', '.join(MODELS)}", _USAGE)
    status = os.fstat(root)
    owner = (status.st_uid, status.st_gid)
    for text in options.get("--owner", []):
        parts = text.split(":")
        if len(parts) not in (1, 2) or not all(part.isascii() and part.isdecimal() for part in parts):
            raise UsageError(f"--owner {text}", "is not UID or UID:GID")
        owner = (int(parts[0]), int(parts[-1]))
    groups = frozenset((*os.getgroups(), os.getegid()))
    return Job(models[0], models[1], _parse_map(options), owner, "--privileged" in options, os.geteuid(), groups)


def _parse_map(options: "dict[str, list[str]]") -> Translation:
    """Return the id map; raises UsageError."""
    lines = options.get("--map")
    return Translation(None if lines is None else parse_idmap("\n".join(lines).replace(",", "\n"), "--map"))


def _check_xattrs(root: int, path: str) -> None:
    """Refuse a file system without user attributes."""
    try:
        os.getxattr(f"/proc/self/fd/{root}", "user.virtfs.mode")
    except OSError as err:
        if err.errno == 95:  # EOPNOTSUPP
            raise ResourceError(path, "its file system has no user attributes", "use mapped-file") from err


def _show(path: str, step: "Step") -> None:
    print(f"{printable(path)}: {step.describe()}")


def _report(number: int, count: int, quiet: bool) -> None:
    if not quiet and (number % _PROGRESS_STEP == 0 or number == count) and sys.stderr.isatty():
        print(f"\r{number} of {count}", end="\n" if number == count else "", file=sys.stderr, flush=True)
