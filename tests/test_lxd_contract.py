"""docs/lxd-contract.md names each of the 30 points once, with tests that there are."""

from __future__ import annotations

import re

from tests.conftest import CHECKOUT

ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", (CHECKOUT / "docs/lxd-contract.md").read_text(), re.MULTILINE)
POINTS = 30


def test_each_point_has_a_row_with_tests() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, POINTS + 1))
    for number, _, tests in ROWS:
        assert re.search(r"`[a-z_/]+\.py::test_\w+`", tests), number


def test_the_tests_are_there() -> None:
    for number, _, tests in ROWS:
        for file, _, name in re.findall(r"`([a-z_/]+\.py)(::(\w+))?`", tests):
            text = (CHECKOUT / file).read_text()
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{number}: {file}::{name}"
