"""Monitors that are objects: -object monitor-qmp, which QEMU has from 11.1 on, and -mon before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from integration.plugged import BARE, Client
from integration.shares import Launch, dropin_words
from integration.talk import connected, outcome, started, version_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin, pytest.mark.host]

FIRST = (11, 1)  # QEMU that has them
SECTION = '[object "o"]\n  qom-type = "monitor-qmp"\n  chardev = "m"\n'


@pytest.mark.parametrize("form", ["options", "json", "readconfig"])
def test_a_monitor_that_is_an_object_is_served(form: str, launch: Launch, shared_tmp: Path) -> None:
    """It has several clients, what they name is opened outside, and none makes a monitor past the supervisor."""
    words = [*dropin_words(), *launch.options]
    config, disk, place = shared_tmp / "config", shared_tmp / "disk", shared_tmp / "qmp"
    config.write_text(SECTION)
    disk.write_bytes(bytes(512))
    disk.chmod(0o600)
    monitor = {
        "options": ["-object", "monitor-qmp,id=o,chardev=m"],
        "json": ["-object", '{"qom-type": "monitor-qmp", "id": "o", "chardev": "m"}'],
        "readconfig": ["-readconfig", str(config)],
    }[form]
    options = [*BARE, "-chardev", f"socket,id=m,path={place},server=on,wait=off", *monitor]
    if version_of(*words) < FIRST:
        status, _, stderr = outcome(words, *options)
        assert status == 1
        assert "monitor-qmp" in stderr
        return
    with started([*words, *options]), connected(place) as first, connected(place) as second:
        one, two = Client(first), Client(second)
        one.execute("blockdev-add", driver="file", node_name="n", filename=str(disk))
        assert [node["node-name"] for node in two.execute("query-named-block-nodes")] == ["n"]
        one.execute("chardev-add", id="c", backend={"type": "null", "data": {}})
        assert "past the rights" in two.refused("object-add", qom_type="monitor-qmp", id="p", chardev="c")
        two.execute("quit")
