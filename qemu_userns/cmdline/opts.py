"""The two comma lists of QEMU: QemuOpts and keyval.

Sources: util/qemu-option.c and util/keyval.c of QEMU. Both spell a literal comma ",,", allow a trailing comma and know
neither quotes nor an escape for "=". QemuOpts also takes bare words: `foo` is foo=on and `nofoo` is foo=off.
"""

from qemu_userns.cmdline.source import Member


def parse_opts(text: str, source: int = 0, start: int = 0, implied: "str | None" = None) -> "tuple[Member, ...]":
    """Return the members of a QemuOpts list, which starts at `start`; never fails, as QEMU's does not."""
    members: list[Member] = []
    while start < len(text):
        stop = _find_key_end(text, start)
        if text[stop : stop + 1] == "=":
            value, end = _read_value(text, stop + 1)
            members.append(Member(text[start:stop], value, source, stop + 1, end, "opts", 0, start))
        elif implied:
            value, end = _read_value(text, start)
            members.append(Member(implied, value, source, start, end, "implied", 0, start))
        else:
            members.append(_read_flag(text[start:stop], source, start))
            end = stop
        implied = None
        start = end + 1
    return tuple(members)


def parse_keyval(text: str, source: int = 0, start: int = 0, implied: "str | None" = None) -> "tuple[Member, ...]":
    """Return the members of a keyval list.

    It differs from QemuOpts in the implied first value, which ends at the first comma, doubled or not. A bare word
    elsewhere is QEMU's to refuse.
    """
    stop = _find_key_end(text, start)
    if not implied or stop == start or text[stop : stop + 1] == "=":
        return parse_opts(text, source, start)
    first = Member(implied, text[start:stop], source, start, stop, "implied", 0, start)
    return (first, *parse_opts(text, source, stop + 1))


def _find_key_end(text: str, start: int) -> int:
    """Return the index of the next "=" or ",", or the end."""
    comma = text.find(",", start)
    end = len(text) if comma < 0 else comma
    equals = text.find("=", start, end)
    return end if equals < 0 else equals


def _read_value(text: str, start: int) -> "tuple[str, int]":
    """Return the value that starts at `start`, and where it ends."""
    end = text.find(",", start)
    while end >= 0 and text.startswith(",", end + 1):
        end = text.find(",", end + 2)
    if end < 0:
        end = len(text)
    return text[start:end].replace(",,", ","), end


def _read_flag(word: str, source: int, start: int) -> Member:
    """Return what a bare word means; QEMU strips any leading "no", of "node" too."""
    key, value = (word[2:], "off") if word.startswith("no") else (word, "on")
    return Member(key, value, source, start, start + len(word), "flag", 0, start)
