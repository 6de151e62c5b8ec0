"""Fuzz the QMP streams and sessions with atheris: `python tests/fuzz_qmp.py -max_total_time=600 [corpus]`."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["qemu_userns"]):
    from qemu_userns.qmp.message import find_fault, mentions_oob, parse_command, read_object, read_reply
    from qemu_userns.qmp.stream import CommandStream, ReplyStream
    from tests.qmp.machine import Machine


def try_streams(source: "atheris.FuzzedDataProvider") -> None:
    """Any split gives the same items, and each of them can be looked at."""
    size = source.ConsumeIntInRange(1, 50)
    data = source.ConsumeBytes(4096)
    whole = CommandStream().feed(data)
    stream = CommandStream()
    assert [item for begin in range(0, len(data), size) for item in stream.feed(data[begin : begin + size])] == whole
    for item in whole:
        parse_command(item.text)
        find_fault(item.text, size % 2 == 0)
        mentions_oob(item.text)
    for line in ReplyStream(size % 3 == 0).feed(data):
        read_reply(line)
        read_object(line)


def try_session(source: "atheris.FuzzedDataProvider") -> None:
    """What holds of any session holds of this."""
    machine = Machine(source.ConsumeBool())
    while source.remaining_bytes():
        machine.step(lambda n: source.ConsumeIntInRange(0, n - 1), lambda: source.ConsumeBytes(source.ConsumeIntInRange(0, 60)))
    machine.finish()


def try_input(data: bytes) -> None:
    """Fuzz the one or the other."""
    source = atheris.FuzzedDataProvider(data)
    (try_streams if source.ConsumeBool() else try_session)(source)


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_input)
    atheris.Fuzz()
