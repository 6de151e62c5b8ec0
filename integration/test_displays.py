"""Displays on unix sockets: VNC and SPICE, whose sockets are bound outside, and displays that need the caller's desktop."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from integration.brokered import served
from integration.plugged import Client
from integration.talk import (
    DEADLINE_S,
    IDLE,
    PLAIN,
    Running,
    connected,
    outcome,
    running,
    started,
    supervisor_of,
    wait_until,
    words_of,
)

if TYPE_CHECKING:
    from integration.shares import Launch

pytestmark = [pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

VERSION = b"RFB 003.008\n"
NO_AUTHENTICATION, VNC_AUTHENTICATION = 1, 2
# A SpiceLinkHeader with a SpiceLinkMess of the main channel, no capabilities; spice/protocol.h.
SPICE_HELLO = b"REDQ" + b"".join(n.to_bytes(4, "little") for n in (2, 2, 18, 0)) + b"\1\0" + bytes(8) + b"\x12\0\0\0"
QUERIES = ("query-vnc", "query-vnc-servers")


def receive(client: socket.socket, count: int) -> bytes:
    """Read as many bytes."""
    client.settimeout(DEADLINE_S)
    received = b""
    while len(received) < count:
        data = client.recv(count - len(received))
        assert data, f"the end after {received!r}"
        received += data
    return received


def shake_hands(client: socket.socket) -> bytes:
    """Begin with RFB; return the security types that are offered."""
    assert receive(client, len(VERSION)) == VERSION
    client.sendall(VERSION)
    return receive(client, receive(client, 1)[0])


def see_screen(path: Path) -> bytes:
    """Be an RFB client without a password; return what the server calls itself."""
    with connected(path) as client:
        assert shake_hands(client) == bytes([NO_AUTHENTICATION])
        client.sendall(bytes([NO_AUTHENTICATION]))
        assert receive(client, 4) == bytes(4)  # SecurityResult: OK
        client.sendall(b"\1")  # ClientInit: shared
        header = receive(client, 24)
        return receive(client, int.from_bytes(header[-4:], "big"))


def link_spice(path: Path) -> bytes:
    """Begin with SPICE; return the magic of the answer."""
    with connected(path) as client:
        return greet_spice(client)


def greet_spice(client: socket.socket) -> bytes:
    client.sendall(SPICE_HELLO)
    return receive(client, 4)


def has_vnc(qemu: Running) -> bool:
    """Tell whether VNC has its socket; QEMU with its own has it from the start."""
    return bool(qemu.qmp.execute("query-vnc")["enabled"])


def look(qemu: Running) -> list[object]:
    """Return what QEMU says of its displays."""
    return [*(qemu.qmp.execute(query) for query in QUERIES), qemu.qmp.hmp("info vnc")]


@pytest.mark.parametrize("options", ["", ",password=on", ",share=force-shared,lossy=on"])
def test_vnc_on_a_socket_says_and_offers_what_it_does_without_us(dropin: list[str], shared_tmp: Path, options: str) -> None:
    path = shared_tmp / "vnc"
    seen = []
    for words in (dropin, PLAIN):
        with running(words, "-vnc", f"unix:{path}{options}", umask=0o027) as qemu:
            wait_until(lambda: has_vnc(qemu), "VNC's socket")
            mode = stat.S_IMODE(path.stat().st_mode)
            with connected(path) as client:
                offered = shake_hands(client)
                wait_until(lambda: qemu.qmp.execute("query-vnc")["clients"], "the client is known")
                seen.append((mode, path.stat().st_uid, offered, look(qemu)))
            assert qemu.quit() == 0
        if words is dropin:  # QEMU itself leaves its own behind
            wait_until(lambda: not path.exists(), "the socket gone")
    assert seen[0] == seen[1]
    assert seen[0][2] == bytes([VNC_AUTHENTICATION if "password" in options else NO_AUTHENTICATION])


@pytest.mark.parametrize("monitor", [[], ["-qmp", "unix:{}/qmp,server=on,wait=off"]], ids=["no monitor", "monitor"])
def test_vnc_in_a_directory_of_the_callers_alone(dropin: list[str], shared_tmp: Path, launch: Launch, monitor: list[str]) -> None:
    folder = shared_tmp / "private"
    folder.mkdir(mode=0o700)
    (folder / "secret").write_text("x")
    path = folder / "vnc"
    path.write_text("stale")  # gives way, as QEMU has it
    options = ["-vnc", f"unix:{path}", *(word.format(shared_tmp) for word in monitor), *launch.options]
    with started([*dropin, *IDLE, *options]) as process:
        for _ in range(2):
            assert see_screen(path) == b"QEMU"
        assert not Path(f"/proc/{process.pid}/root{folder}/secret").exists()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    wait_until(lambda: not path.exists(), "the socket gone")


def test_spice_on_a_socket_is_served_and_reported_as_without_us(dropin: list[str], shared_tmp: Path, launch: Launch) -> None:
    path = shared_tmp / "private/spice"
    path.parent.mkdir(mode=0o700)
    seen = []
    for words in (dropin, PLAIN):
        who = launch.options if words is dropin else []
        with running(words, "-spice", f"unix=on,addr={path},disable-ticketing=on", *who) as qemu:
            assert [link_spice(path) for _ in range(3)] == [b"REDQ"] * 3
            seen.append((qemu.qmp.execute("query-spice"), qemu.qmp.hmp("info spice"), stat.S_IMODE(path.stat().st_mode)))
            assert qemu.quit() == 0
        if words is dropin:
            wait_until(lambda: not path.exists(), "the socket gone")
    assert seen[0] == seen[1]


def test_displays_on_the_network_are_qemus_own(dropin: list[str]) -> None:
    for words in (dropin, PLAIN):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        displays = ["-vnc", "127.0.0.1:100,to=899", "-spice", f"port={port},addr=127.0.0.1,disable-ticketing=on"]
        with running(words, *displays) as qemu:
            assert [word for word in words_of(qemu.pid) if word in displays] == displays
            vnc, spice = qemu.qmp.execute("query-vnc"), qemu.qmp.execute("query-spice")
            assert (vnc["host"], spice["host"], spice["port"]) == ("127.0.0.1", "127.0.0.1", port)
            with socket.create_connection(("127.0.0.1", int(vnc["service"]))) as client:
                assert shake_hands(client) == bytes([NO_AUTHENTICATION])
            with socket.create_connection(("127.0.0.1", port)) as client:
                assert greet_spice(client) == b"REDQ"
            assert qemu.quit() == 0


def test_only_the_first_of_two_displays_can_be_passed_a_socket(dropin: list[str], shared_tmp: Path) -> None:
    (shared_tmp / "second").mkdir(mode=0o777)
    (shared_tmp / "second").chmod(0o777)
    paths = (shared_tmp / "vnc", shared_tmp / "second/vnc")
    with running(dropin, "-vnc", f"unix:{paths[0]}", "-vnc", f"unix:{paths[1]},id=two") as qemu:
        wait_until(lambda: has_vnc(qemu), "VNC's socket")
        assert [see_screen(path) for path in paths] == [b"QEMU", b"QEMU"]
        assert not (qemu.proc / f"root{paths[0]}").exists()
        assert (qemu.proc / f"root{paths[1]}").exists()
        assert qemu.quit() == 0
    paths[1].unlink(missing_ok=True)


def test_a_display_stays_when_its_supervisor_is_replaced(dropin: list[str], shared_tmp: Path) -> None:
    vnc, spice = shared_tmp / "vnc", shared_tmp / "spice"
    options = ["-vnc", f"unix:{vnc}", "-spice", f"unix=on,addr={spice},disable-ticketing=on"]
    with started([*dropin, *IDLE, *options]) as process:
        assert (see_screen(vnc), link_spice(spice)) == (b"QEMU", b"REDQ")
        first = supervisor_of(process.pid)
        ours = Path(dropin[0]).parent.parent / "bin/qemu-userns"
        subprocess.run([ours, "adopt", "--replace", str(process.pid)], check=True, capture_output=True)
        assert supervisor_of(process.pid) != first
        assert (see_screen(vnc), link_spice(spice)) == (b"QEMU", b"REDQ")
    for path in (vnc, spice):
        wait_until(lambda: not path.exists(), f"{path} gone")  # noqa: B023


def test_explain_shows_where_a_display_listens(dropin: list[str], shared_tmp: Path) -> None:
    ours = Path(dropin[0]).parent.parent / "bin/qemu-userns"
    options = ["-vnc", f"unix:{shared_tmp}/vnc", "-spice", f"unix=on,addr={shared_tmp}/spice"]
    status, stdout, stderr = outcome([str(ours), "explain", "--", PLAIN[0]], *IDLE, *options)
    assert (status, stderr) == (0, "")
    assert f"listens on {shared_tmp}/vnc, passed to QEMU by monitor qemu-userns, removed at QEMU's end" in stdout
    assert f"listens on {shared_tmp}/spice, each client passed to QEMU by monitor qemu-userns, removed at QEMU's end" in stdout


def test_display_update_and_display_reload(dropin: list[str], shared_tmp: Path) -> None:
    folder = shared_tmp / "private"
    folder.mkdir(mode=0o700)
    with running(dropin, "-vnc", f"unix:{shared_tmp / 'first'}") as qemu:
        wait_until(lambda: has_vnc(qemu), "VNC's socket")
        addresses = [{"type": "unix", "path": str(folder / "later")}]
        qemu.qmp.execute("display-update", type="vnc", addresses=addresses)
        assert qemu.qmp.execute("query-vnc")["service"] == str(folder / "later")
        assert see_screen(folder / "later") == b"QEMU"
        plain = "vnc tls is not enabled"
        assert qemu.qmp.ask("display-reload", type="vnc", **{"tls-certs": True})["error"]["desc"] == plain
        assert qemu.quit() == 0


def test_a_directory_where_the_caller_may_make_nothing(dropin: list[str]) -> None:
    for options in (["-vnc", "unix:/proc/vnc"], ["-spice", "unix=on,addr=/proc/spice"], ["-vnc", "unix:/nowhere/vnc"]):
        status, stdout, stderr = outcome(dropin, *IDLE, *options)
        assert (status, stdout) == (1, "")
        assert stderr.startswith(f"qemu-userns: {options[0]}"), stderr
        assert "hint: the caller cannot make a socket there" in stderr or os.geteuid() == 0, stderr


@pytest.mark.parametrize("value", ["gtk", "sdl,gl=on", "spice-app"])
def test_a_window_on_the_callers_desktop_is_refused_with_the_reason(dropin: list[str], value: str) -> None:
    status, stdout, stderr = outcome(dropin, "-nodefaults", "-M", "none", "-display", value)
    assert (status, stdout) == (1, "")
    assert stderr == (
        f"qemu-userns: -display {value.partition(',')[0]}: it needs the caller's desktop (X or Wayland, D-Bus, /dev/dri), "
        "which QEMU does not see\nhint: use -vnc or -spice on a unix socket with a viewer outside, or -userns fs=host\n"
    )


def test_a_window_is_qemus_own_affair_where_it_sees_the_host(dropin: list[str]) -> None:
    options = ["-nodefaults", "-M", "none", "-display", "gtk"]
    assert outcome([*dropin, "-userns", "fs=host"], *options)[2] == outcome(PLAIN, *options)[2]


def test_without_a_display_it_is_vnc_where_plain_qemu_would_open_a_window(dropin: list[str], shared_tmp: Path) -> None:
    """The module is one in name only: QEMU is not to try it."""
    (shared_tmp / "ui-gtk.so").touch()
    place = shared_tmp / "qmp"
    environ = {**os.environ, "QEMU_MODULE_DIR": str(shared_tmp)}
    words = [*dropin, "-nodefaults", "-M", "none", "-qmp", f"unix:{place},server=on,wait=off"]
    with started(words, env=environ, stdout=subprocess.DEVNULL), connected(place) as connection:
        client = Client(connection)
        shown = client.execute("query-vnc")
        assert (shown["enabled"], shown["host"] in ("127.0.0.1", "::1")) == (True, True)
        assert client.execute("query-display-options") == {"type": "none"}
        client.execute("quit")


def test_dbus_on_a_bus_is_refused(dropin: list[str]) -> None:
    status, _, stderr = outcome(dropin, *IDLE[:1], "-M", "none", "-S", "-display", "dbus,addr=unix:path=/run/bus")
    assert status == 1
    assert stderr.startswith("qemu-userns: -display ")
    assert ": a bus takes the caller only under its own uid" in stderr
    assert "hint: use -display dbus,p2p=on" in stderr


def test_dbus_from_peer_to_peer(dropin: list[str], shared_tmp: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, served(dropin, shared_tmp, "-display", "dbus,p2p=on") as qemu, qemu.client() as client:
        assert client.ask(b'{"execute": "getfd", "arguments": {"fdname": "bus"}}', theirs.fileno()) == {"return": {}}
        client.execute("add_client", protocol="@dbus-display", fdname="bus")
        ours.settimeout(DEADLINE_S)
        ours.sendall(b"\0AUTH\r\n")  # QEMU is the authenticating server; D-Bus specification, "Authentication Protocol"
        assert ours.recv(64).startswith(b"REJECTED")
