"""What is raised on purpose, and what the user reads of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_userns import errors
from qemu_userns.errors import HostError, LaunchError, QemuUsernsError, format_error, printable

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, QemuUsernsError)]


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not LaunchError])
def test_an_error_has_three_parts(kind: type[QemuUsernsError]) -> None:
    error = kind("what", "why", "remedy")
    assert (error.what, error.why, error.hint, error.exit_status) == ("what", "why", "remedy", 1)
    assert format_error(error) == "qemu-userns: what: why\nhint: remedy\n"
    assert format_error(kind("what", "why")) == "qemu-userns: what: why\n"


@pytest.mark.parametrize("status", [126, 127])
def test_a_launch_error_has_a_shells_exit_status(status: int) -> None:
    assert LaunchError("what", "why", exit_status=status).exit_status == status


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e4", "plain \u00e4"),
        ("a\nqemu-userns: forged", "a\\nqemu-userns: forged"),
        ("\x1b[31m\r\t\0\x7f", "\\x1b[31m\\r\\t\\x00\\x7f"),
        ("\udcff", "\\udcff"),
        ("\u202e\u2028", "\\u202e\\u2028"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(codec=None)), st.text(st.characters(codec=None)))
def test_a_text_never_forges_a_line(what: str, hint: str) -> None:
    text = format_error(HostError(what, "why", f"x{hint}"))
    assert text.count("\n") == 2
    text.encode()
    assert all(c.isprintable() or c == "\n" for c in text)
