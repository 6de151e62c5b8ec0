"""Frozen values."""

from __future__ import annotations

import pytest

from qemu_userns.record import Record


class Point(Record):
    """A record with a default."""

    x: int
    y: int = 2


class Named(Point):
    """A record that adds a field with a default."""

    name: str = "n"


def test_fields_come_by_place_or_by_name() -> None:
    for point in (Point(1), Point(x=1), Point(1, 2), Point(1, y=2), Point(y=2, x=1)):
        assert (point.x, point.y) == (1, 2)
    assert (Named(1, 3, "x").name, Named(1).name, Named(1, name="y").y) == ("x", "n", 2)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1}), ((), {"y": 1, "z": 2})]
)
def test_wrong_arguments(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point has the fields x, y"):
        Point(*args, **kwargs)


def test_a_record_is_a_value() -> None:
    assert Point(1) == Point(1, 2)
    assert Point(1) != Point(2)
    assert Point(1) != Named(1)
    assert hash(Point(1)) == hash(Point(y=2, x=1))
    assert len({Point(1), Point(1), Named(1)}) == 2
    assert repr(Point(1)) == "Point(x=1, y=2)"


def test_a_record_is_frozen() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        point.z = 2


def test_replace_makes_another_one() -> None:
    point = Named(1)
    assert point.replace(y=5) == Named(1, 5)
    assert point == Named(1)
    with pytest.raises(TypeError, match="Named has the fields x, y, name"):
        point.replace(z=1)
