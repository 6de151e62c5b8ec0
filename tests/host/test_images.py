"""Image headers, against images that qemu-img has made."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_userns.host.images import ImageFile, ImageHeader, find_chain, read_header

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img (package qemu-utils)")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names of the tests lie in tmp_path."""
    monkeypatch.chdir(tmp_path)


def qemu_img(*args: "str | Path") -> str:
    return subprocess.run(["qemu-img", *args], check=True, capture_output=True, text=True).stdout


def create(path: "str | Path", image_format: str, *args: "str | Path", size: str = "1M") -> str:
    qemu_img("create", "-q", "-f", image_format, *args, path, size)
    return str(path)


def chain(path: str, image_format: "str | None" = None) -> "tuple[ImageFile, ...]":
    return find_chain(path, format=image_format, may_open=lambda _: True)


def header(path: "str | Path") -> ImageHeader:
    with open(path, "rb") as file:
        return read_header(file.fileno(), os.stat(path).st_size)


@needs_qemu_img
@pytest.mark.parametrize("image_format", ["qcow2", "qed", "vmdk", "qcow", "raw", "vdi", "vpc", "vhdx"])
def test_an_image_without_other_files(image_format: str) -> None:
    path = create("a.img", image_format)
    known = image_format if image_format in ("qcow2", "qed", "vmdk", "qcow") else "raw"
    assert header(path) == ImageHeader(known)
    assert chain(path) == (ImageFile(path, known, "image"),)
    assert chain(path, image_format) == (ImageFile(path, image_format, "image"),)


@needs_qemu_img
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "compat=1.1,cluster_size=2M", "compat=1.1,cluster_size=512"])
def test_qcow2_backing(options: str) -> None:
    base = create("base.raw", "raw")
    top = create("top.qcow2", "qcow2", "-o", options, "-b", base, "-F", "raw")
    assert header(top) == ImageHeader("qcow2", backing="base.raw", backing_format="raw")
    assert chain(top) == (ImageFile(top, "qcow2", "image"), ImageFile("base.raw", "raw", "backing"))


@needs_qemu_img
def test_names_are_relative_to_the_image_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    base = create(tmp_path / "base.qcow2", "qcow2")
    create("a/middle.qcow2", "qcow2", "-b", "../base.qcow2", "-F", "qcow2")
    create("a/b/top.qcow2", "qcow2", "-b", tmp_path / "a/middle.qcow2", "-F", "qcow2")
    assert [file.path for file in chain("a/b/top.qcow2")] == [
        "a/b/top.qcow2",
        f"{tmp_path}/a/middle.qcow2",
        f"{tmp_path}/a/../base.qcow2",
    ]
    os.symlink("a/b/top.qcow2", "link.qcow2")
    create("a/b/top.qcow2", "qcow2", "-u", "-b", "base.qcow2", "-F", "qcow2")
    assert [file.path for file in chain("link.qcow2")] == ["link.qcow2", "base.qcow2"]
    assert chain(f"{tmp_path}/link.qcow2")[1].path == base
    info = json.loads(qemu_img("info", "--output=json", "--backing-chain", "link.qcow2"))
    assert [image["filename"] for image in info] == ["link.qcow2", "base.qcow2"]


@needs_qemu_img
@pytest.mark.parametrize(
    ("name", "path"),
    [("file:base.raw", "base.raw"), ("file:/abs/base.raw", "/abs/base.raw"), ("./a:b", "sub/./a:b"), ("d/a:b", "sub/d/a:b")],
)
def test_protocol_of_files(tmp_path: Path, name: str, path: str) -> None:
    (tmp_path / "sub/d").mkdir(parents=True)
    for existing in ("base.raw", "sub/a:b", "sub/d/a:b"):
        (tmp_path / existing).touch()
    top = create("sub/top.qcow2", "qcow2", "-u", "-b", name, "-F", "raw")
    assert chain(top)[1:] == (ImageFile(path, "raw", "backing"),)


@needs_qemu_img
@pytest.mark.parametrize(
    "name", ["nbd://host/export", "nbd:unix:/run/x", "https://h/x", "json:{}", "json:[1]", "json:{", 'json:{"driver":"nbd"}']
)
def test_what_is_no_file_is_unresolved(name: str) -> None:
    top = create("top.qcow2", "qcow2", "-u", "-b", name, "-F", "raw")
    assert chain(top)[1:] == (ImageFile(name, "raw", "backing", unresolved=True),)


@needs_qemu_img
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}, "qcow2"),
        ({"driver": "qcow2", "file.driver": "file", "file.filename": "base.qcow2"}, "qcow2"),
        ({"file.filename": "base.qcow2"}, "qcow2"),
        ({"driver": "raw", "file": {"driver": "file", "filename": "base.qcow2"}}, "raw"),
        ({"driver": "file", "filename": "base.qcow2"}, "raw"),
    ],
)
def test_json_name(tmp_path: Path, options: "dict[str, object]", found: str) -> None:
    create("bottom.raw", "raw")
    create("base.qcow2", "qcow2", "-b", "bottom.raw", "-F", "raw")
    (tmp_path / "sub").mkdir()
    Path("sub/top.qcow2").write_bytes(qcow2(backing=f"json:{json.dumps(options)}".encode()))
    top = "sub/top.qcow2"
    expected = [("base.qcow2", found)] + ([("bottom.raw", "raw")] if found == "qcow2" else [])
    assert [(file.path, file.format) for file in chain(top)[1:]] == expected


@needs_qemu_img
def test_json_name_as_qemu_takes_it(tmp_path: Path) -> None:
    create("base.qcow2", "qcow2")
    (tmp_path / "sub").mkdir()
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"base.qcow2"}}'
    for image_format in ("qcow2", "raw"):
        top = create("sub/top.qcow2", "qcow2", "-u", "-b", name, "-F", image_format)
        info = json.loads(qemu_img("info", "--output=json", "--backing-chain", top))
        assert [(image["filename"], image["format"]) for image in info][1:] == [("base.qcow2", image_format)]
        assert [(file.path, file.format) for file in chain(top)][1:] == [("base.qcow2", image_format)]


@pytest.mark.parametrize(
    "text",
    [
        '{"file":{"filename":"a\\u0000b"}}',
        '{"file":{"filename":"\\ud800"}}',
        '{"a.filename":"x","b":{"filename":"y"}}',
        "[" * 1000,
    ],
)
def test_hostile_json_name(text: str) -> None:
    Path("top").write_bytes(qcow2(backing=b"json:" + text.encode()))
    assert all(file.unresolved for file in chain("top")[1:])


@needs_qemu_img
def test_external_data_file_is_relative_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    top = create("sub/a.qcow2", "qcow2", "-o", "data_file=sub/data.raw")
    assert chain(top) == (ImageFile(top, "qcow2", "image"), ImageFile("sub/data.raw", "raw", "data-file"))
    assert json.loads(qemu_img("info", "--output=json", top))["format-specific"]["data"]["data-file"] == "sub/data.raw"


@needs_qemu_img
def test_qed_backing() -> None:
    create("base.qed", "qed")
    create("base.raw", "raw")
    probed = create("a.qed", "qed", "-b", "base.qed", "-F", "qed")
    raw = create("b.qed", "qed", "-b", "base.raw", "-F", "raw")
    assert chain(probed)[1:] == (ImageFile("base.qed", "qed", "backing"),)
    assert header(raw) == ImageHeader("qed", "base.raw", "raw")


@needs_qemu_img
def test_qcow1_backing() -> None:
    create("base.raw", "raw")
    top = create("a.qcow", "qcow", "-b", "base.raw", "-F", "raw")
    assert header(top) == ImageHeader("qcow", "base.raw")


@needs_qemu_img
@pytest.mark.parametrize(
    ("subformat", "extents"),
    [
        ("monolithicSparse", []),
        ("streamOptimized", []),
        ("monolithicFlat", ["a-flat.vmdk"]),
        ("twoGbMaxExtentFlat", ["a-f001.vmdk", "a-f002.vmdk"]),
        ("twoGbMaxExtentSparse", ["a-s001.vmdk", "a-s002.vmdk"]),
    ],
)
def test_vmdk_extents(tmp_path: Path, subformat: str, extents: "list[str]") -> None:
    (tmp_path / "sub").mkdir()
    top = create("sub/a.vmdk", "vmdk", "-o", f"subformat={subformat}", size="3G")
    assert chain(top) == (ImageFile(top, "vmdk", "image"), *(ImageFile(f"sub/{name}", "raw", "extent") for name in extents))


@needs_qemu_img
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_vmdk_parent(tmp_path: Path, subformat: str) -> None:
    (tmp_path / "sub").mkdir()
    create("sub/base.vmdk", "vmdk")
    top = create("sub/a.vmdk", "vmdk", "-o", f"subformat={subformat}", "-b", "base.vmdk", "-F", "vmdk")
    assert ImageFile("sub/base.vmdk", "vmdk", "backing") in chain(top)


@needs_qemu_img
def test_nothing_is_read_of_a_raw_image() -> None:
    top = create("a.qcow2", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw")
    assert chain(top, "raw") == (ImageFile(top, "raw", "image"),)


@needs_qemu_img
def test_a_backing_file_that_is_raw_names_nothing() -> None:
    create("base.qcow2", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw")
    top = create("a.qcow2", "qcow2", "-b", "base.qcow2", "-F", "raw")
    assert [file.path for file in chain(top)] == ["a.qcow2", "base.qcow2"]


@needs_qemu_img
def test_another_format_than_was_said_names_nothing() -> None:
    top = create("a.qcow2", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw")
    assert chain(top, "vmdk") == (ImageFile(top, "vmdk", "image"),)


@needs_qemu_img
def test_only_what_may_be_opened_is_opened() -> None:
    create("bottom.qcow2", "qcow2")
    create("base.qcow2", "qcow2", "-b", "bottom.qcow2", "-F", "qcow2")
    top = create("a.qcow2", "qcow2", "-b", "base.qcow2", "-F", "qcow2")
    asked = []

    def refuse(path: str) -> bool:
        asked.append(path)
        return False

    assert find_chain(top, format=None, may_open=refuse) == (
        ImageFile(top, "qcow2", "image"),
        ImageFile("base.qcow2", "qcow2", "backing"),
    )
    assert asked == ["base.qcow2"]


@needs_qemu_img
def test_missing_and_unreadable_files() -> None:
    assert chain("absent") == (ImageFile("absent", "raw", "image"),)
    top = create("a.qcow2", "qcow2", "-u", "-b", "absent", "-F", "qcow2")
    assert chain(top) == (ImageFile(top, "qcow2", "image"),)
    os.mkdir("absent")
    assert chain(top)[1:] == (ImageFile("absent", "qcow2", "backing"),)


@pytest.mark.parametrize("path", ["/dev/null", "fifo", "."])
def test_what_is_neither_file_nor_disk_is_not_opened(path: str) -> None:
    os.mkfifo("fifo")
    assert chain(path) == (ImageFile(path, "raw", "image"),)


def qcow2(
    backing: bytes = b"", extensions: bytes = b"", *, offset: "int | None" = None, length: "int | None" = None, features: int = 0
) -> bytes:
    """Make the header of a version 3 image."""
    start = 104 + len(extensions) + 8
    head = struct.pack(
        ">4sIQII", b"QFI\xfb", 3, start if offset is None else offset, len(backing) if length is None else length, 16
    )
    return head.ljust(72, b"\0") + struct.pack(">Q20xI", features, 104) + extensions + bytes(8) + backing


def test_loop_ends() -> None:
    Path("a").write_bytes(qcow2(b"b"))
    Path("b").write_bytes(qcow2(b"a"))
    assert [file.path for file in chain("a")] == ["a", "b", "a"]


def test_depth_is_limited() -> None:
    for number in range(300):
        Path(str(number)).write_bytes(qcow2(str(number + 1).encode()))
    assert len(chain("0")) == 200


@pytest.mark.parametrize(
    "data",
    [
        qcow2(b"x" * 1024),
        qcow2(b"a\0b"),
        qcow2(b"name", offset=2**64 - 1),
        qcow2(b"name", offset=2**63),
        qcow2(b"name", offset=65536) + bytes(70000),
        qcow2(b"name", length=2**32 - 1),
        qcow2(b"name")[:-1],
        qcow2(extensions=struct.pack(">II", 0x44415441, 4) + b"name" + bytes(4)),  # without the feature bit
        qcow2(extensions=struct.pack(">II", 0x44415441, 2**32 - 1), features=4),
        qcow2(extensions=struct.pack(">II", 0xE2792ACA, 2000) + bytes(2000), features=4),
    ],
)
def test_hostile_qcow2(data: bytes) -> None:
    Path("a").write_bytes(data)
    assert header("a") == ImageHeader("qcow2")


def test_longest_name() -> None:
    Path("a").write_bytes(qcow2(b"\xff" * 1023))
    assert header("a").backing == os.fsdecode(b"\xff" * 1023)


@pytest.mark.parametrize("size", range(0, 112, 7))
def test_cut_off(size: int) -> None:
    for data in (qcow2(b"name"), b"QED\0" + b"\xff" * 100, b"KDMV" + b"\xff" * 100, b"QFI\xfb\0\0\0\1" + b"\xff" * 100):
        Path("a").write_bytes(data[:size])
        assert header("a").backing is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    magic=st.sampled_from(
        [b"QFI\xfb\0\0\0\1", b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"QED\0", b"KDMV", b"COWD", b"version=1\n"]
    ),
    rest=st.binary(max_size=600),
)
def test_any_header_is_read(magic: bytes, rest: bytes) -> None:
    Path("a").write_bytes(magic + rest)
    assert header("a").extents == ()
    chain("a")


def test_hostile_descriptor() -> None:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'RW 1 FLAT "/etc/shadow" 0',
        'RW 1 FLAT "a\0b" 0',
        f'RW 1 FLAT "{"x" * 1024}" 0',
        'RW "y"',
    ]
    Path("a").write_text("\n".join(lines) + "\n" * 70000 + 'RW 1 FLAT "late" 0')
    assert header("a") == ImageHeader("vmdk", extents=("/etc/shadow",))
