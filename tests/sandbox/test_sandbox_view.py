"""Views of hand-made grants, looked at from inside."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_userns.host.opening import Opened
from qemu_userns.plan.grants import Bind, Copy, Create, CreateDir, Grant, Link, Private
from qemu_userns.plan.layout import build_layout
from qemu_userns.sandbox import view
from qemu_userns.sandbox.view import build_view, overlay_host
from tests.forked import errno_of, in_namespaces

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.mount


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A part of the host: files that are granted in the tests, and `secret`, which is not."""
    real = tmp_path.resolve()
    for name in ("data/sub/file", "data/other", "secret", "image"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).write_text(name)
    return real


def opened_for(grants: list[Grant]) -> Opened:
    opened = Opened((), lambda _: None)
    opened.layout = build_layout(
        [Bind("python", path) for path in ("/usr", "/lib", "/lib64") if not os.path.islink(path)] + grants
    )
    return opened


def inside(grants: list[Grant], look: Callable[[], Any], cwd: str = "/", opened: Opened | None = None) -> Any:
    """Return what `look` finds in a view of the grants."""

    def enter() -> Any:
        build_view(opened or opened_for([*grants, Private("cwd", cwd, tmpfs=False)]), cwd)
        return look()

    return in_namespaces(enter)


def bind(path: Path, **options: Any) -> Bind:
    status = path.lstat()
    return Bind("test", str(path), inode=(status.st_dev, status.st_ino), **options)


def test_only_what_is_granted_is_there(host: Path) -> None:
    def look() -> tuple[list[str], list[str], list[str]]:
        return sorted(os.listdir("/")), os.listdir(host), sorted(os.listdir(host / "data"))

    root, shown, data = inside([bind(host / "data")], look)
    assert set(root) <= {"usr", "lib", "lib64", str(host).split("/")[1]}
    assert shown == ["data"]
    assert data == ["other", "sub"]


def test_a_file_is_shown_alone(host: Path) -> None:
    shown, text = inside(
        [bind(host / "data/sub/file")], lambda: (os.listdir(host / "data/sub"), (host / "data/sub/file").read_text())
    )
    assert (shown, text) == (["file"], "data/sub/file")


def test_read_only_and_writable(host: Path) -> None:
    def look() -> list[int | None]:
        return [
            errno_of((host / "data/other").write_text, "x"),
            errno_of((host / "data/new").touch),
            errno_of(os.chmod, host / "data/other", 0o600),
            errno_of((host / "image").write_text, "written"),
            errno_of((host / "new").touch),
            errno_of(Path("/new").touch),
            errno_of(os.mkdir, "/usr/new"),
        ]

    readonly = errno.EROFS
    found = inside([bind(host / "data"), bind(host / "image", writable=True)], look)
    assert found == [readonly, readonly, readonly, None, readonly, readonly, readonly]
    assert (host / "image").read_text() == "written"
    assert (host / "data/other").read_text() == "data/other"


def test_a_writable_file_in_a_read_only_directory(host: Path) -> None:
    def look() -> list[int | None]:
        return [errno_of((host / "data/other").write_text, "x"), errno_of((host / "data/sub/file").write_text, "x")]

    assert inside([bind(host / "data"), bind(host / "data/other", writable=True)], look) == [None, errno.EROFS]


def test_mount_flags(host: Path) -> None:
    def look() -> dict[str, set[str]]:
        lines = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return {fields[4]: set(fields[5].split(",")) for fields in lines}

    grants = [
        bind(host / "data"),
        bind(host / "image", writable=True),
        Bind("dev", "/dev/null", True, True),
        Bind("proc", "/proc", True, True),
        Private("tmp", "/tmp", 0o1777),
    ]
    found = inside([grant for grant in grants if not (isinstance(grant, Private) and str(host).startswith("/tmp"))], look)
    assert all("nosuid" in options for options in found.values())
    assert {"ro", "nodev"} <= found[str(host / "data")]
    assert "nodev" in found[str(host / "image")]
    assert "ro" not in found[str(host / "image")]
    assert "nodev" not in found["/dev/null"] or in_a_nodev_host("/dev/null")
    assert "ro" in found["/"]
    assert next(iter(found)) == "/"


def in_a_nodev_host(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_NODEV)


def test_devices(host: Path) -> None:
    grants: list[Grant] = [Bind("dev", f"/dev/{name}", True, True) for name in ("null", "zero")]
    assert inside(grants, lambda: Path("/dev/null").read_bytes()) == b""
    assert inside(grants, lambda: sorted(os.listdir("/dev"))) == ["null", "zero"]


def test_links_and_copies(host: Path) -> None:
    grants = [
        Link("test", str(host / "link"), "data/other"),
        bind(host / "data"),
        Copy("test", str(host / "secret"), "a copy\n\udcff"),
    ]

    def look() -> tuple[str, str, bytes, int | None]:
        copy = host / "secret"
        return os.readlink(host / "link"), (host / "link").read_text(), copy.read_bytes(), errno_of(copy.write_text, "x")

    assert inside(grants, look) == ("data/other", "data/other", b"a copy\n\xff", errno.EROFS)
    assert (host / "secret").read_text() == "secret"


def test_private_directories(host: Path) -> None:
    grants: list[Grant] = [Private("test", str(host / "tmp"), 0o1777), Private("test", str(host / "empty"), tmpfs=False)]

    def look() -> tuple[int, int | None, int | None]:
        mode = stat.S_IMODE(os.stat(host / "tmp").st_mode)
        return mode, errno_of((host / "tmp/file").write_text, "x"), errno_of((host / "empty/file").write_text, "x")

    assert inside(grants, look) == (0o1777, None, errno.EROFS)
    assert sorted(path.name for path in host.iterdir()) == ["data", "image", "secret"]


def test_a_bind_in_a_private_directory(host: Path) -> None:
    grants = [Private("test", str(host), 0o1777), bind(host / "image")]
    assert inside(grants, lambda: os.listdir(host)) == ["image"]


def test_created_files_and_directories(host: Path) -> None:
    """What open_grants made beforehand: a log in a read-only directory, and a directory that lies elsewhere on the host."""
    (host / "data/log").touch()
    (host / "data/private").mkdir()
    grants = [bind(host / "data"), Create("test", str(host / "data/log"), 0o600), CreateDir("test", str(host / "data/sub"))]
    opened = opened_for([*grants, Private("cwd", "/", tmpfs=False)])
    opened.places[str(host / "data/sub")] = str(host / "data/private")

    def look() -> None:
        (host / "data/log").write_text("logged")
        (host / "data/sub/made").touch()

    inside([], look, opened=opened)
    assert (host / "data/log").read_text() == "logged"
    assert (host / "data/private/made").exists()
    assert not (host / "data/sub/made").exists()


def test_the_old_root_is_gone(host: Path) -> None:
    def look() -> dict[str, Any]:
        points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        up = "/".join([".."] * 40)
        return {
            "points": points,
            "up": os.path.samefile(up, "/"),
            "secret": (host / "secret").exists() or Path(up + str(host / "secret")).exists(),
            "fds": [
                os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")
            ],
        }

    found = inside([bind(host / "data"), Bind("proc", "/proc", True, True)], look, cwd=str(host))
    assert found["points"].count("/") == 1
    assert not found["secret"]
    assert found["up"]
    assert not [target for target in found["fds"] if target.startswith(str(host))]


def test_the_working_directory(host: Path) -> None:
    assert inside([bind(host / "data")], os.getcwd, cwd=str(host / "data/sub")) == str(host / "data/sub")
    assert inside([], os.getcwd, cwd=str(host)) == str(host)


def test_nothing_is_left_on_the_host(host: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    inside([bind(host / "data"), Private("test", str(host / "tmp"))], lambda: None)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert sorted(path.name for path in host.iterdir()) == ["data", "image", "secret"]


def test_the_whole_host_read_only_but_for_what_is_granted(host: Path) -> None:
    def look() -> tuple[str, str]:
        opened = Opened((), lambda _: None)
        opened.layout = (bind(host / "image", writable=True),)
        overlay_host(opened, str(host), read_only=True)
        (host / "image").write_text("written")
        try:
            (host / "new").touch()
        except OSError as err:
            return (host / "image").read_text(), os.strerror(err.errno or 0)
        return "", ""

    assert in_namespaces(look) == ("written", "Read-only file system")


def test_the_whole_host(host: Path) -> None:
    def look() -> tuple[str, str]:
        opened = Opened((), lambda _: None)
        opened.layout = (Copy("test", str(host / "secret"), "copy"),)
        overlay_host(opened, str(host), read_only=False)
        return Path("secret").read_text(), (host / "data/other").read_text()

    assert in_namespaces(look) == ("copy", "data/other")
    assert (host / "secret").read_text() == "secret"


# --- attacks ----------------------------------------------------------------------------------------------------------


def swap(path: Path, target: str) -> None:
    path.rename(path.with_name(path.name + ".old"))
    path.symlink_to(target)


def test_a_symlink_swapped_into_a_bound_directory_has_nothing_made_elsewhere(host: Path) -> None:
    """Attack 1: data/ is bound and its owner hostile; data/sub becomes a symlink when the plan is made already."""
    (host / "victim").mkdir()
    deep = str(host / "data/sub/deep")
    swap(host / "data/sub", str(host / "victim"))
    with pytest.raises(AssertionError, match=r"cannot place .*data/sub/deep in QEMU's view"):
        inside([bind(host / "data", writable=True), Copy("test", deep, "text")], lambda: None)
    assert list((host / "victim").iterdir()) == []


@pytest.mark.parametrize("target", ["victim", "../victim", "{host}/victim"])
def test_a_symlink_swapped_into_a_bound_directory_leads_no_mount_elsewhere(host: Path, target: str) -> None:
    (host / "victim").mkdir()
    (host / "victim/deep").write_text("theirs")
    swap(host / "data/sub", target.replace("{host}", str(host)))
    with pytest.raises(AssertionError, match=r"cannot place .*data/sub/deep in QEMU's view"):
        inside([bind(host / "data", writable=True), Copy("test", str(host / "data/sub/deep"), "text")], lambda: None)


def test_a_symlink_swapped_in_while_the_view_is_built(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same between the making of the directory and the mount upon it."""
    (host / "elsewhere").mkdir()
    attach = view._attach

    def attack(root: int, name: str, fd: int) -> None:
        if name.endswith("data/sub/file"):
            swap(host / "data/sub", str(host / "elsewhere"))
            (host / "elsewhere/file").touch()
        attach(root, name, fd)

    monkeypatch.setattr(view, "_attach", attack)
    with pytest.raises(AssertionError, match=f"SandboxError.*{os.strerror(errno.ELOOP)}"):
        inside([bind(host / "data"), bind(host / "data/sub/file", writable=True)], lambda: None)


def test_a_parent_on_the_way_to_the_source_is_swapped(host: Path) -> None:
    """The source's parent becomes a symlink to a directory with another file of that name."""
    grants: list[Grant] = [bind(host / "data/sub/file")]
    (host / "evil").mkdir()
    (host / "evil/file").write_text("secret")
    swap(host / "data/sub", str(host / "evil"))
    with pytest.raises(AssertionError, match="ResourceError"):
        inside(grants, lambda: None)


@pytest.mark.parametrize("how", ["file", "symlink", "gone"])
def test_a_source_that_was_replaced(host: Path, how: str) -> None:
    grants: list[Grant] = [bind(host / "image")]
    (host / "image").rename(host / "image.old")
    if how == "file":
        (host / "image").write_text("another")
    elif how == "symlink":
        (host / "image").symlink_to("secret")
    with pytest.raises(AssertionError, match="ResourceError"):
        inside(grants, lambda: None)
