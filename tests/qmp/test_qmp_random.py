"""Sessions at random: no exception, no fd lost or given back twice, nothing handed over forgotten, memory bounded."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_userns.qmp.policy import FULL
from tests.qmp.dialogue import start
from tests.qmp.machine import CLIENT_BYTES, QEMU_BYTES, Machine

FUZZER = Path(__file__).resolve().parent.parent / "fuzz_qmp.py"


@given(st.data(), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_order_of_any_input(data: st.DataObject, pretty: bool) -> None:
    machine = Machine(pretty)
    pieces = st.one_of(st.binary(max_size=30), st.sampled_from(CLIENT_BYTES + QEMU_BYTES))
    for _ in range(data.draw(st.integers(1, 40))):
        machine.step(lambda n: data.draw(st.integers(0, n - 1)), lambda: data.draw(pieces))
    machine.finish()


def test_long_random_dialogues() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        machine = Machine(pretty=seed % 4 == 0)
        if seed % 4:
            machine.do(machine.session.receive_qemu(QEMU_BYTES[0]))
            machine.do(machine.session.receive_qemu(QEMU_BYTES[2]))
        for _ in range(rng.randrange(400)):
            machine.step(rng.randrange, lambda rng=rng: rng.randbytes(rng.randrange(20)))  # type: ignore[misc]
        machine.finish()


def test_a_stuck_qemu_costs_no_memory_beyond_the_bounds() -> None:
    """Reading only while the session wants input, as the supervisor does."""
    session = start(1)
    taken = 0
    while session.wants_input(1) and taken < 100 << 20:
        session.receive_client(1, b'{"execute":"x","id":"' + b"x" * 60000 + b'"}', ())
        taken += 60000
    assert taken < 2 << 20


def test_clients_that_come_and_go_leave_nothing() -> None:
    session = start()
    for number in range(1, 300):
        session.open_client(number, FULL)
        session.receive_client(number, b'{"execute":"getfd","arguments":{"fdname":"a"}}{"exec', (number,))
        session.close_client(number)
    assert not session._clients
    assert not session._line


@pytest.mark.slow
def test_atheris_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, str(FUZZER), "-runs=20000", "-seed=1", "-max_len=512"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
