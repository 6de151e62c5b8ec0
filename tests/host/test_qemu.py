"""Finding QEMU and learning what it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_userns.errors import HostError, LaunchError
from qemu_userns.host import qemu_probe
from qemu_userns.host.qemu import find_qemu, is_own_entry, probe_qemu

NAME = "qemu-system-x86_64"
REAL = [
    path
    for name in (NAME, "qemu-system-aarch64", "qemu-system-x86_64-microvm")
    if (path := shutil.which(name)) and not is_own_entry(path)
]

FAKE = """#!/bin/sh
echo "$*" >> {log}
[ "$SLOW" ] && exec sleep 10
case "$*" in
*-sandbox*) [ {sandbox} = yes ] || {{ echo "-sandbox support is not enabled" >&2; exit 1; }} ;;
esac
case "$*" in
*-version) echo "QEMU emulator version {version}"; echo "Copyright" ;;
-help) printf '%s\\n' '-S              freeze CPU at startup' '-m [size=]megs   configure guest RAM' ;;
"-L help") echo {data}/../data; echo /usr/bin/../share/seabios; pwd > {log}.cwd ;;
esac
"""


def program(path: Path, text: str = "#!/bin/sh\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return str(path)


def fake_qemu(path: Path, *, version: str = "7.2.22 (Debian 1:7.2)", sandbox: str = "yes") -> str:
    data = path.parent.parent / "data"
    data.mkdir(parents=True, exist_ok=True)
    return program(path, FAKE.format(log=path.parent.parent / "log", version=version, sandbox=sandbox, data=data))


def runs(tmp_path: Path) -> "list[str]":
    return (tmp_path / "log").read_text().splitlines()


def own_entry(path: Path) -> str:
    return program(path, "#!/usr/bin/python3 -IS\n# qemu-userns drop-in\n")


def test_the_next_in_path_that_is_not_us(tmp_path: Path) -> None:
    ours = own_entry(tmp_path / "own" / NAME)
    own_entry(tmp_path / "own2" / NAME)
    (tmp_path / "dir" / NAME).mkdir(parents=True)
    Path(program(tmp_path / "noexec" / NAME)).chmod(0o644)
    real = program(tmp_path / "real" / NAME)
    program(tmp_path / "later" / NAME)
    path_env = ":".join(f"{tmp_path}/{name}" for name in ("own", "absent", "own2", "dir", "noexec", "real", "later"))
    assert find_qemu(NAME, path_env, ours) == real


def test_the_started_script_is_us_by_whatever_name(tmp_path: Path) -> None:
    script = program(tmp_path / "script")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / NAME).symlink_to(script)
    with pytest.raises(HostError, match="no QEMU of this name") as caught:
        find_qemu(NAME, f"{tmp_path}/bin", script)
    assert caught.value.hint


def test_relative_and_empty_path_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = program(tmp_path / "bin" / NAME)
    monkeypatch.chdir(tmp_path)
    assert find_qemu(NAME, "bin") == real
    monkeypatch.chdir(tmp_path / "bin")
    assert find_qemu(NAME, "/absent:") == real


def test_name_with_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = program(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert find_qemu(f"./{NAME}", "") == real
    with pytest.raises(HostError, match="entry of qemu-userns"):
        find_qemu(own_entry(tmp_path / "own"), "")
    with pytest.raises(HostError, match="not an executable file"):
        find_qemu("./absent", "")


def test_configured(tmp_path: Path) -> None:
    real = program(tmp_path / "opt" / NAME)
    program(tmp_path / "bin" / NAME)
    assert find_qemu(NAME, f"{tmp_path}/bin", configured=real) == real
    assert find_qemu(NAME, f"{tmp_path}/bin", configured=f"{tmp_path}/opt") == real
    with pytest.raises(HostError, match="not an executable file"):
        find_qemu("qemu-system-arm", f"{tmp_path}/bin", configured=f"{tmp_path}/opt")
    with pytest.raises(HostError, match="entry of qemu-userns"):
        find_qemu(NAME, f"{tmp_path}/bin", configured=own_entry(tmp_path / "own"))


def test_marker_must_be_at_the_beginning(tmp_path: Path) -> None:
    assert is_own_entry(own_entry(tmp_path / "a"))
    assert not is_own_entry(program(tmp_path / "b", "#!/bin/sh\n" + "#" * 300 + "\n# qemu-userns drop-in\n"))
    assert not is_own_entry(f"{tmp_path}/absent")


def test_facts_of_a_fake(tmp_path: Path) -> None:
    path = fake_qemu(tmp_path / "bin" / NAME)
    for modules in ("lib/qemu", "lib/x86_64-linux-gnu/qemu", "lib64/other"):
        (tmp_path / modules).mkdir(parents=True)
    (tmp_path / "firmware").mkdir()
    (tmp_path / "firmware/bios").touch()
    (tmp_path / "data/bios").symlink_to("../firmware/bios")
    facts = probe_qemu(path, None)
    assert facts.path == path
    assert facts.version == (7, 2, 22)
    assert facts.version_text == "QEMU emulator version 7.2.22 (Debian 1:7.2)"
    assert facts.sandbox
    assert dict(facts.options) == {"S": False, "m": True}
    assert facts.data_dirs == (f"{tmp_path}/data", "/usr/share/seabios")
    assert facts.library_dirs == (f"{tmp_path}/firmware", f"{tmp_path}/lib/qemu", f"{tmp_path}/lib/x86_64-linux-gnu/qemu")
    assert (tmp_path / "log.cwd").read_text() == "/\n"


def test_a_build_tree_is_shown(tmp_path: Path) -> None:
    path = fake_qemu(tmp_path / "build" / NAME)
    assert f"{tmp_path}/build" not in probe_qemu(path, None).library_dirs
    (tmp_path / "build/qemu-bundle").mkdir()
    assert f"{tmp_path}/build" in probe_qemu(path, None).library_dirs


def test_search_paths_are_shown_where_they_hold_libraries_and_never_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_qemu(tmp_path / "bin" / NAME)
    for name in ("libs/libx.so.1", "rel/liby.so", "none/readme", "cwd.so", "modules/a.so", "prefix/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.so").touch()
    (tmp_path / "modules/b.so").symlink_to("../far/b.so")
    (tmp_path / "etc/qemu").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}/libs;rel:{tmp_path}/none::/usr/lib:$ORIGIN/x:")
    monkeypatch.setenv("QEMU_MODULE_DIR", "modules")
    shown = probe_qemu(path, None).library_dirs
    assert shown == tuple(f"{tmp_path}/{name}" for name in ("etc/qemu", "far", "libs", "modules", "rel"))


def test_a_library_that_only_a_module_names_is_shown(tmp_path: Path) -> None:
    """As in a prefix without LD_LIBRARY_PATH, whose modules say themselves where their libraries are."""
    copy = tmp_path / "bin" / NAME
    copy.parent.mkdir()
    shutil.copy("/bin/true", copy)  # a dynamic program: nothing of it is run to trace
    for folder in ("lib/qemu", "own"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "empty.c").write_text("int late(void);\nint early(void) { return late(); }\n")
    (tmp_path / "late.c").write_text("int late(void) { return 0; }\n")
    own, module = tmp_path / "own/liblate.so", tmp_path / "lib/qemu/block-x.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", own, "-Wl,-soname,liblate.so", tmp_path / "late.c"], check=True)
    runpath = "-Wl,-rpath,$ORIGIN/../../own"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", module, tmp_path / "empty.c", own, runpath], check=True)
    assert qemu_probe._find_library_dirs(str(copy), ()) == [f"{tmp_path}/lib/qemu", f"{tmp_path}/own"]


def test_a_build_without_seccomp(tmp_path: Path) -> None:
    facts = probe_qemu(fake_qemu(tmp_path / "bin" / NAME, sandbox="no"), None)
    assert not facts.sandbox
    assert facts.version == (7, 2, 22)


@pytest.mark.parametrize(
    ("text", "version"),
    [("10.0.2", (10, 0, 2)), ("9.1.50 (v9.1.0-12-gabc)", (9, 1, 50)), ("2.5.0, Copyright", (2, 5, 0)), ("8.2.0-rc1", (8, 2, 0))],
)
def test_versions(tmp_path: Path, text: str, version: "tuple[int, ...]") -> None:
    assert probe_qemu(fake_qemu(tmp_path / "bin" / NAME, version=text), None).version == version


def test_a_warm_start_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_qemu(tmp_path / "bin" / NAME)
    cache = f"{tmp_path}/cache"
    cold = probe_qemu(path, cache)
    before = runs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "subprocess", None)  # an import would fail
        assert probe_qemu(path, cache) == cold
    assert runs(tmp_path) == before
    os.utime(path, (1_700_000_001, 1_700_000_001))
    assert probe_qemu(path, cache) == cold
    assert len(runs(tmp_path)) == 2 * len(before)


def test_a_cache_for_another_name_or_library_path_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_qemu(tmp_path / "bin" / NAME)
    cache = f"{tmp_path}/cache"
    probe_qemu(path, cache)
    once = len(runs(tmp_path))
    os.link(path, f"{path}-2")
    assert probe_qemu(f"{path}-2", cache).path == f"{path}-2"
    assert len(runs(tmp_path)) == 2 * once
    for times, name in enumerate(("LD_LIBRARY_PATH", "QEMU_MODULE_DIR", "LD_PRELOAD"), 3):
        monkeypatch.setenv(name, "/nonexistent/libx.so")
        probe_qemu(f"{path}-2", cache)
        assert len(runs(tmp_path)) == times * once


def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"does not work as QEMU: .*cannot open shared object"):
        probe_qemu(program(tmp_path / "broken", "#!/bin/sh\necho libx.so: cannot open shared object file >&2; exit 127\n"), None)
    with pytest.raises(LaunchError) as caught:
        probe_qemu(f"{tmp_path}/absent", None)
    assert caught.value.exit_status == 127
    with pytest.raises(LaunchError) as caught:
        probe_qemu(program(tmp_path / "bad", "#!/absent/interpreter\n"), None)
    assert caught.value.exit_status == 127
    with pytest.raises(LaunchError) as caught:
        probe_qemu(program(tmp_path / "garbage", "\x7fELF"), None)
    assert caught.value.exit_status == 126


def test_a_qemu_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_probe, "PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setenv("SLOW", "1")
    with pytest.raises(HostError, match="no answer within"):
        probe_qemu(fake_qemu(tmp_path / "bin" / NAME), None)


@pytest.mark.qemu
@pytest.mark.parametrize("path", REAL)
def test_real_qemu(path: str, tmp_path: Path) -> None:
    cold = probe_qemu(path, str(tmp_path))
    assert cold.version >= (5,)
    options = dict(cold.options)
    assert options["S"] is False
    assert options["device"] is True
    assert len(options) > 50
    started = subprocess.run([path, "-sandbox", "on", "-machine", "help"], capture_output=True, check=False)
    assert cold.sandbox == (started.returncode == 0)  # -machine help comes after the filter is installed
    assert any(os.path.isdir(directory) for directory in cold.data_dirs)
    assert all(os.path.normpath(directory) == directory for directory in cold.data_dirs)
    if os.path.realpath(path).startswith("/usr/"):
        assert cold.library_dirs == ()
    assert probe_qemu(path, str(tmp_path)) == cold


@pytest.mark.qemu
@pytest.mark.skipif(not REAL, reason="no QEMU in PATH")
def test_real_qemu_elsewhere(tmp_path: Path) -> None:
    """A copy under /opt with a library of its own, as in a snap: what it needs is found."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    path = str(shutil.copy(REAL[0], tmp_path / "bin" / NAME))
    traced = subprocess.run([REAL[0]], env={"LD_TRACE_LOADED_OBJECTS": "1"}, capture_output=True, text=True, check=True).stdout
    library = next(line.split()[2] for line in traced.splitlines() if "libglib-2.0" in line)
    shutil.copy(library, tmp_path / "lib" / "libglib-2.0.so.0")
    os.environ["LD_LIBRARY_PATH"] = f"{tmp_path}/lib"
    facts = probe_qemu(path, None)
    assert facts.library_dirs == (f"{tmp_path}/lib",)
    assert f"{tmp_path}/share/qemu" in facts.data_dirs
