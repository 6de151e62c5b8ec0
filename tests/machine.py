"""What the machine that runs the tests is like: a usual one, or the test host, where nearly all is emulated."""

from __future__ import annotations

import os

TEST_HOST = "QEMU_USERNS_TEST_HOST"  # integration/host/init sets it
IN_TEST_HOST = bool(os.environ.get(TEST_HOST))

PATIENCE = 4 if IN_TEST_HOST else 1
"""By what the time limits of waits are multiplied."""
ACCELERATOR = "kvm" if IN_TEST_HOST else "tcg,thread=single"
"""What guests run by where it is not the point: software emulation in the emulated would take minutes a guest.

A thread for each of a guest's four processors boots a quarter slower on two of the machine's, and once a guest did not boot.
"""
