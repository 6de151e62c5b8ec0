"""Directories that QEMU looks for files in: what is shown of those that a bind of the directory does not serve."""

from __future__ import annotations

import pytest

from qemu_userns.plan.facts import ABSENT, MISSING, PathFact
from qemu_userns.plan.grants import Refuse
from qemu_userns.plan.layout import build_layout
from tests.plans import asked_for, brief, make_fact, plan_of

SERVER = "tls-creds-x509,id=t,dir=/x/dir,endpoint=server"
STRANGE = "/x/dir/server-key.pem is a symlink of uid 1001, which root does not follow"

NO_FOLDERS = {f"/x/dir/{name}": make_fact("/x/new") for name in ("keymaps", "dtb")}


def leads_to(path: str, real: str, *, root: bool = False) -> PathFact:
    """Return the fact of a symlink that leads to a file elsewhere."""
    return make_fact(real, root).replace(given=path, links=((path, real),))


def holding(*facts: PathFact, root: bool = False) -> dict[str, PathFact]:
    """Return what is known of /x/dir, and of what in it a bind does not serve."""
    names = tuple(fact.given.rpartition("/")[2] for fact in facts)
    return {"/x/dir": make_fact("/x/dir", root).replace(entries=names), **{fact.given: fact for fact in facts}}


def test_symlinks_to_credentials_are_shown_with_what_they_lead_to() -> None:
    paths = holding(leads_to("/x/dir/ca-cert.pem", "/y/file-ca"), leads_to("/x/dir/server-key.pem", "/z/file-key"))
    plan = plan_of("-object", SERVER, paths=paths)
    shown = ["link /x/dir/ca-cert.pem", "ro /y/file-ca", "link /x/dir/server-key.pem", "ro /z/file-key"]
    assert asked_for(plan) == ["ro /x/dir", *shown]
    assert not [grant for grant in plan.build_layout() if grant.path.startswith("/x/dir/")]  # the bind has the symlinks


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (SERVER, ["ca-cert.pem", "dh-params.pem", "server-key-0.pem", "server-key.pem"]),
        ("tls-creds-x509,id=t,dir=/x/dir,endpoint=client", ["ca-cert.pem", "client-key.pem"]),
        ("tls-creds-x509,id=t,dir=/x/dir", ["ca-cert.pem", "client-key.pem"]),
        ("tls-creds-psk,id=t,dir=/x/dir,endpoint=server", ["dh-params.pem", "keys.psk"]),
        ("tls-creds-psk,id=t,dir=/x/dir,endpoint=client", ["keys.psk"]),
        ("tls-creds-anon,id=t,dir=/x/dir,endpoint=server", ["dh-params.pem"]),
        ("tls-creds-anon,id=t,dir=/x/dir,endpoint=client", []),
    ],
)
def test_only_what_this_end_looks_for_is_shown(options: str, shown: list[str]) -> None:
    names = ("ca-cert.pem", "client-key.pem", "dh-params.pem", "keys.psk", "other", "server-key-0.pem", "server-key.pem")
    paths = holding(*(leads_to(f"/x/dir/{name}", f"/y/file-{name}") for name in names))
    found = [line for line in asked_for(plan_of("-object", options, paths=paths)) if line.startswith("ro /y")]
    assert found == [f"ro /y/file-{name}" for name in shown]


def test_spice_looks_for_three_files() -> None:
    names = ("ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem")
    paths = holding(*(leads_to(f"/x/dir/{name}", f"/y/file-{name}") for name in names))
    found = asked_for(plan_of("-spice", "x509-dir=/x/dir", paths=paths))
    assert [line for line in found if line.startswith("ro /y")] == [f"ro /y/file-{name}" for name in names if "crl" not in name]


@pytest.mark.parametrize("real", ["/x/dir/file-root-key", "/z/file-root-key"])
def test_a_key_that_only_root_may_read_is_mapped_and_the_directory_is_not(real: str) -> None:
    paths = holding(leads_to("/x/dir/server-key.pem", real, root=True), root=True)
    plan = plan_of("-object", SERVER, root=True, paths=paths)
    placed = [brief(grant) for grant in build_layout(plan.grants) if grant.path.startswith(("/x", "/z"))]
    assert placed == ["ro /x/dir", f"ro {real} as owner"]


@pytest.mark.parametrize(
    ("entry", "refusal"),
    [
        (PathFact("/x/dir/server-key.pem", "/y/new", ABSENT), None),
        (PathFact("/x/dir/server-key.pem", "/y/new", ABSENT, error=MISSING), None),
        (make_fact("/x/dir-key").replace(given="/x/dir/server-key.pem"), None),
        (PathFact("/x/dir/server-key.pem", "/y/new", ABSENT, error=STRANGE), f"-object dir /x/dir/server-key.pem: {STRANGE}"),
        (leads_to("/x/dir/server-key.pem", "/y/file-deny"), "-object dir /x/dir/server-key.pem: Permission denied"),
    ],
    ids=["dangling", "no directory", "no file", "somebody's symlink", "unreadable"],
)
def test_a_credential_that_cannot_be_shown(entry: PathFact, refusal: str | None) -> None:
    """What plain QEMU would not find either is QEMU's to complain about."""
    plan = plan_of("-object", SERVER, paths=holding(entry))
    refused = [f"{grant.why}: {grant.reason}" for grant in plan.grants if isinstance(grant, Refuse)]
    assert refused == ([] if refusal is None else [refusal])
    assert [line for line in asked_for(plan) if not line.startswith("refuse")] == ["ro /x/dir"]


def test_the_files_behind_the_symlinks_of_a_data_directory_are_shown() -> None:
    entries = (
        leads_to("/x/dir/bios.bin", "/y/file-bios"),
        leads_to("/x/dir/home", "/dir-home"),
        leads_to("/x/dir/locked", "/y/file-deny"),
        PathFact("/x/dir/odd", "/y/new", ABSENT, error=STRANGE),
        leads_to("/x/dir/vgabios.bin", "/y/file-vga"),
    )
    plan = plan_of("-L", "/x/dir", paths={**NO_FOLDERS, **holding(*entries)})
    shown = ["link /x/dir/bios.bin", "ro /y/file-bios", "link /x/dir/vgabios.bin", "ro /y/file-vga"]
    assert asked_for(plan) == ["ro /x/dir", *shown]
    assert plan.notes == (f"-L /x/dir/odd: {STRANGE}",)


def test_what_is_below_a_data_directory_is_shown_too() -> None:
    keymaps = leads_to("/x/dir/keymaps", "/y/dir-keymaps").replace(entries=("de",))
    layout = leads_to("/x/dir/keymaps/de", "/z/file-de")
    paths = {"/x/dir/keymaps": keymaps, "/x/dir/keymaps/de": layout}
    found = asked_for(plan_of("-L", "/x/dir", paths={**NO_FOLDERS, **paths}))
    assert found == ["ro /x/dir", "link /x/dir/keymaps", "ro /y/dir-keymaps", "link /x/dir/keymaps/de", "ro /z/file-de"]


@pytest.mark.parametrize("words", [("-netdev", "user,id=n,tftp=/x/dir"), ("-drive", "file=fat:/x/dir")])
def test_what_a_guest_asks_for_by_name_stays_within_the_directory(words: tuple[str, ...]) -> None:
    assert asked_for(plan_of(*words, paths=holding(leads_to("/x/dir/a", "/y/file")))) == ["ro /x/dir"]
