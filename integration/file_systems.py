"""File systems that tests mount, for root."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from integration.talk import unmount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAPPABLE = ("tmpfs", "ext4", "xfs", "btrfs")
SIZE_MIB = {"ext4": 16, "xfs": 300, "btrfs": 120}  # the smallest that mkfs makes


@contextlib.contextmanager
def file_systems(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Mount new file systems at folders of their names."""
    mounted: list[Path] = []
    try:
        for name in names:
            place = folder / name
            place.mkdir()
            subprocess.run(["mount", *mount_words(name, folder), place], check=True, capture_output=True)
            mounted.append(place)
        yield
    finally:
        for place in reversed(mounted):
            unmount(place)


def mount_words(name: str, folder: Path) -> list[str]:
    if name in SIZE_MIB:
        image = folder / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(SIZE_MIB[name] << 20)
        subprocess.run([f"mkfs.{name}", "-q", image], check=True, capture_output=True)
        return ["-t", name, "-o", "loop", str(image)]
    if name == "overlay":
        for part in ("lower", "upper", "work"):
            (folder / part).mkdir()
        return ["-t", name, "-o", f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work", name]
    return ["-t", name, name]
