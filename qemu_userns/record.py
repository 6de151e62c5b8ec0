"""Small frozen values.

The standard library's `dataclasses` costs two interpreter starts to import (14 ms where `python3 -I -S -c pass` takes 7),
`typing.NamedTuple` nearly as much, and all of it would be paid before QEMU's execve. `Record` is the part of a frozen
dataclass that this program uses: fields from annotations, defaults, keyword arguments, equality, hash, repr, `replace`.
Type checkers see it as a frozen dataclass (PEP 681).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self, dataclass_transform

    Plain = None | bool | int | float | str | bytes | list["Plain"] | dict[str, "Plain"]
else:

    def dataclass_transform(**_):  # noqa: ANN003, ANN201
        """Stand in for `typing.dataclass_transform` without importing typing."""
        return lambda cls: cls


@dataclass_transform(frozen_default=True, eq_default=True)
class Record:
    """Base class of frozen values; each annotation of a subclass is a field, in order, after the inherited ones."""

    _fields: "tuple[str, ...]" = ()
    _names: "frozenset[str]" = frozenset()
    _defaults: "dict[str, Any]" = {}  # noqa: RUF012 (PEP 681 would make a ClassVar of it, at the price of typing)

    def __init_subclass__(cls) -> None:
        """Collect the fields that the subclass adds, and their defaults."""
        own = cls.__dict__.get("__annotations__", {})  # noqa: RUF063 (inspect costs more than all of this program)
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls._names = frozenset(cls._fields)
        cls._defaults = cls._defaults | {name: cls.__dict__[name] for name in own if name in cls.__dict__}

    def __init__(self, *args: "Any", **kwargs: "Any") -> None:  # noqa: ANN401 (the fields' own types are checked)
        """Set each field from its positional or keyword argument, else from its default.

        Raises:
            TypeError: a field has no value or two, or an argument no field.
        """
        fields = self._fields
        values = self.__dict__
        if not kwargs and len(args) == len(fields):
            values.update(zip(fields, args, strict=False))
            return
        known = True
        if len(args) < len(fields):
            values.update(self._defaults)
        values.update(zip(fields, args, strict=False))
        if kwargs:
            values.update(kwargs)
            known = kwargs.keys() <= self._names and kwargs.keys().isdisjoint(fields[: len(args)])
        if not known or len(values) != len(fields) or len(args) > len(fields):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(fields)}")

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a record is a value."""
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        """Compare as values of one class."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """Hash over the fields."""
        return hash((type(self), *(self.__dict__[name] for name in self._fields)))

    def __repr__(self) -> str:
        """Show as a call that makes the value."""
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self._fields)})"

    def replace(self, **changes: "Any") -> "Self":  # noqa: ANN401
        """Return a copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})


def to_plain(value: object) -> "Plain":
    """Return a value made of records and tuples as dicts and lists, which marshal and JSON take.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, Record):
        return {"is": type(value).__name__, **{name: to_plain(getattr(value, name)) for name in value._fields}}
    if isinstance(value, tuple | list | frozenset):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise TypeError(type(value).__name__)


def from_plain(value: object, classes: "dict[str, type[Record]]") -> "Any":  # noqa: ANN401
    """Return what `to_plain` was given; sets come back as tuples, and fields that the records do not have are left out.

    Args:
        value: what `to_plain` returned.
        classes: the records that may occur, by name.

    Raises:
        ValueError: it is not that.
    """
    if isinstance(value, list):
        return tuple(from_plain(item, classes) for item in value)
    if not isinstance(value, dict):
        return value
    cls = classes.get(str(value.get("is")))
    if cls is None:
        raise ValueError(f"unknown record: {value.get('is')}")
    return cls(**{str(name): from_plain(item, classes) for name, item in value.items() if name in cls._names})
