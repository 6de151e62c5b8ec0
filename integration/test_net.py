"""Taps, their scripts, bridges and vhost-net, in a network namespace of the test's own; against plain QEMU."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from integration.networks import Scripts, flags_of, interfaces, ip, own_network
from integration.plugged import Client, Vm, compared, plugged
from integration.shares import Launch, dropin_words, launches
from integration.talk import PLAIN, as_user, connected, fds_of, home_of, is_alive, running, started, supervisor_of, wait_until
from integration.test_devices import unviable
from integration.test_hotplug_guest import Guest, unplug, wait_for
from integration.vm import GuestTimeoutError, RunningGuest, machine_options, port_options
from qemu_userns.host.taps import open_queue
from qemu_userns.plan.grants import Tap
from qemu_userns.plan.refusals import NO_NODE
from tests.conftest import CHECKOUT
from tests.machine import ACCELERATOR, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.userns, pytest.mark.newuidmap, pytest.mark.dropin]

IDLE = ["-nodefaults", "-display", "none", "-M", "none"]
LIMIT_S = 30 * PATIENCE
OURS = str(CHECKOUT / ".venv/bin/qemu-userns")
NO_SCRIPTS = "script=no,downscript=no"
HELPER = "/usr/lib/qemu/qemu-bridge-helper"
LIBC = ctypes.CDLL(None, use_errno=True)
PIDFD_GETFD = 438  # its system call's number, on every machine
TUNGETSNDBUF, INT_MAX = 0x800454D3, 0x7FFFFFFF


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> Iterator[None]:
    with own_network(tmp_path):
        yield


@pytest.fixture
def scripts(shared_tmp: Path) -> Scripts:
    return Scripts(shared_tmp)


@pytest.fixture(params=launches(), ids=str)
def launch(request: pytest.FixtureRequest) -> Launch:
    assert isinstance(request.param, Launch)
    return request.param


def find_send_buffers(pid: int) -> list[int]:
    """Return how much each queue of a QEMU's taps keeps of what nobody has read yet."""
    pidfd, sizes = os.pidfd_open(pid), []
    for number, target in fds_of(pid).items():
        if target == "/dev/net/tun":
            queue = LIBC.syscall(PIDFD_GETFD, pidfd, number, 0)
            assert queue >= 0, os.strerror(ctypes.get_errno())
            sizes.append(int.from_bytes(fcntl.ioctl(queue, TUNGETSNDBUF, bytes(4)), sys.byteorder))
            os.close(queue)
    os.close(pidfd)
    return sizes


def words_of(launch: Launch | None) -> list[str]:
    return [*(PLAIN if launch is None else [*dropin_words(), *launch.options]), *IDLE]


def said(launch: Launch | None, *options: str) -> str:
    """Return why QEMU does not start, without who says it."""
    words = [*words_of(launch), *options]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1, ended
    return re.sub(r"^qemu-\S+: ", "", ended.stderr, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "members",
    ["", ",ifname=t0", ",ifname=t0,vnet_hdr=off", ",ifname=t0,vnet_hdr=on,sndbuf=4096", ",ifname=t0,queues=4"],
)
def test_a_tap_is_what_plain_qemu_makes(launch: Launch, members: str) -> None:
    found: list[list[object]] = []
    for way in (None, launch):
        with running(words_of(way), "-netdev", f"tap,id=n,{NO_SCRIPTS}{members}", idle=False) as vm:
            shown = re.sub("fds?=.*|ifname=.*", "", vm.qmp.hmp("info network"))
            found.append([interfaces(), [flags_of(name) for name in interfaces()], shown, find_send_buffers(vm.pid)])
            vm.quit()
        wait_until(lambda: interfaces() == [], "the end of the tap")
    assert found[0] == found[1]
    assert found[0][0] == (["t0"] if "ifname" in members else ["tap0"])
    assert found[0][3] == [4096 if "sndbuf" in members else INT_MAX] * (4 if "queues" in members else 1)


@pytest.mark.parametrize("option", ["-netdev", "-nic", "-net"])
def test_the_scripts_run_outside(launch: Launch, scripts: Scripts, option: str) -> None:
    value = f"tap,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    value += ",id=n" if option == "-netdev" else ""
    for way in (None, launch):
        with running(words_of(way), option, value, idle=False) as vm:
            assert scripts.said() == ["up 1 t0 there"]
            vm.quit()
        wait_until(lambda: len(scripts.said()) == 2, "the downscript")
        wait_until(lambda: interfaces() == [], "the end of the tap")
        assert scripts.take() == ["up 1 t0 there", "down 1 t0 there"]


@pytest.mark.skipif(Path("/dev/vhost-net").exists(), reason="this kernel has vhost-net")
@pytest.mark.parametrize("vhost", ["vhost=on", "vhost=on,vhostforce=on", "vhostforce=on"])
def test_without_vhost_net_qemu_says_what_it_says_without_us(launch: Launch, vhost: str) -> None:
    """It warns, after which QEMU 7.2 ends by an assertion of its own, or it fails."""
    tap = ("-netdev", f"tap,id=n,ifname=t0,{NO_SCRIPTS},{vhost}", "-monitor", "stdio")
    found = []
    for way in (None, launch):
        words = [*words_of(way), *tap]
        ended = subprocess.run(words, input="quit\n", capture_output=True, text=True, timeout=LIMIT_S, check=False)
        found.append((ended.returncode, re.findall("(?:warning: )?tap: open vhost char device failed: .*", ended.stderr)))
        wait_until(lambda: interfaces() == [], "the end of the tap")
    assert found[0] == found[1]
    assert found[0][1] == [
        f"{'' if 'force' in vhost else 'warning: '}tap: open vhost char device failed: No such file or directory"
    ]


def test_the_default_scripts_run(launch: Launch, scripts: Scripts) -> None:
    scripts.make("up", path=Path("/etc/qemu-ifup"))
    scripts.make("down", path=Path("/etc/qemu-ifdown"))
    for way in (None, launch):
        with running(words_of(way), "-netdev", "tap,id=n,queues=2", idle=False) as vm:
            assert scripts.said() == ["up 1 tap0 there"]
            vm.quit()
        wait_until(lambda: scripts.said()[1:] == ["down 1 tap0 there"], "the downscript")
        wait_until(lambda: interfaces() == [], "the end of the tap")
        scripts.take()


def test_a_tap_is_there_again_at_once(launch: Launch, scripts: Scripts) -> None:
    """The next VM of the same tap waits for the downscript of the one before."""
    ip("tuntap", "add", "dev", "t0", "mode", "tap")
    value = f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    for _ in range(3):
        with running(words_of(launch), "-netdev", value, idle=False) as vm:
            vm.quit()
    wait_until(lambda: len(scripts.said()) == 6, "the last downscript")
    assert scripts.take() == ["up 1 t0 there", "down 1 t0 there"] * 3


def test_without_a_monitor_the_downscript_runs(launch: Launch, scripts: Scripts) -> None:
    value = f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    with started([*words_of(launch), "-netdev", value]) as process:
        wait_until(lambda: "qemu-system" in os.readlink(f"/proc/{process.pid}/exe"), "QEMU")
        assert scripts.said() == ["up 1 t0 there"]
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: scripts.said()[1:] == ["down 1 t0 there"], "the downscript")


def test_a_script_that_fails_stops_the_launch(launch: Launch, scripts: Scripts) -> None:
    up, down = scripts.make("up", status=3), scripts.make("down")
    for path in (str(up), "/nowhere/up"):
        tap = ("-netdev", f"tap,id=n,ifname=t0,script={path},downscript={down}")
        plain, ours = said(None, *tap), said(launch, *tap)
        text = plain.partition(": ")[2].strip()
        assert "failed with status" in text
        assert text in ours
    assert scripts.take() == ["up 1 t0 there"] * 2
    assert interfaces() == []


@pytest.mark.parametrize("more", [("-device", "no-such-device"), ("-kernel", "/nowhere/kernel"), ("-chardev", "bogus,id=c")])
def test_what_a_failed_launch_did_is_taken_back(launch: Launch, scripts: Scripts, more: tuple[str, ...]) -> None:
    tap = ("-netdev", f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}")
    said(launch, *tap, *more)
    ran = scripts.said()
    wait_until(lambda: interfaces() == [], "the end of the tap")
    assert not ran or wait_until(lambda: scripts.said()[1:] == ["down 1 t0 there"], "the downscript")


@pytest.mark.parametrize("option", ["bridge,id=n,br=b0", f"tap,id=n,helper={HELPER},br=b0", f"tap,id=n,helper={HELPER} --br=b0"])
def test_a_bridge_gets_a_tap(launch: Launch, option: str) -> None:
    ip("link", "add", "b0", "type", "bridge")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")
    found = []
    for way in (None, launch):
        with running(words_of(way), "-netdev", option, idle=False) as vm:
            (name,) = os.listdir("/sys/class/net/b0/brif")
            found.append((name, flags_of(name)))
            vm.quit()
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
    assert found[0] == found[1]


def test_the_helper_says_what_is_wrong(launch: Launch) -> None:
    """Here that no file allows the bridge."""
    ip("link", "add", "b0", "type", "bridge")
    plain, ours = (said(how, "-netdev", "bridge,id=n,br=b0") for how in (None, launch))
    assert plain.splitlines()[0] in ours
    for text in (plain, ours):
        assert re.search("bridge helper failed|failed to recv file descriptor", text), text


@pytest.mark.parametrize(
    ("bridge", "error"),
    [
        ("bridge,id=b,br=none", f"-netdev bridge {HELPER}: there is no bridge none\nhint: ip link add none type bridge\n"),
        (
            "tap,id=b,helper=/nowhere/helper",
            "-netdev tap /nowhere/helper: No such file or directory\nhint: name another by helper=\n",
        ),
        (
            "tap,id=b,helper=/etc/passwd",
            "-netdev tap /etc/passwd: Permission denied\nhint: it belongs to 0:0 and has mode 0644\n",
        ),
    ],
)
def test_what_no_helper_can_do_is_refused_before_anything_is_opened(
    launch: Launch, scripts: Scripts, bridge: str, error: str
) -> None:
    tap = ("-netdev", f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}")
    assert said(launch, *tap, "-netdev", bridge) == error
    assert (interfaces(), scripts.said()) == ([], [])


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (option, error)
        for node, option, error in (
            ("/dev/vhost-scsi", "-device vhost-scsi-pci,wwpn=naa.5001", f"/dev/vhost-scsi: {NO_NODE}"),
            ("/dev/dri", "-display egl-headless", f"/dev/dri: {NO_NODE}"),
            (None, "-device vfio-pci,sysfsdev={device}", "iommu group 7 is not viable"),
        )
        if node is None or not Path(node).exists()
    ],
)
def test_a_device_that_is_not_to_be_had_is_refused_before_anything_is_opened(
    launch: Launch, scripts: Scripts, shared_tmp: Path, option: str, error: str
) -> None:
    made = shared_tmp / "made"
    made.mkdir()
    launch.own(made)
    tap = ("-netdev", f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}")
    files = ("-pidfile", f"{made}/pid", "-chardev", f"file,id=c,path={made}/out")
    text = said(launch, *tap, *files, *option.format(device=unviable(shared_tmp)[0]).split())
    assert error in text.splitlines()[0], text
    assert (interfaces(), scripts.said(), list(made.iterdir())) == ([], [], [])


def test_without_a_helper_nothing_is_opened(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", str(Path(HELPER).parent)], check=True)
    tap = f"tap,id=n,ifname=t0,script={scripts.make('up')},downscript={scripts.make('down')}"
    text = said(launch, "-netdev", tap, "-netdev", "bridge,id=b,br=b0")
    assert text.startswith(f"-netdev bridge {HELPER}: No such file or directory\nhint: install it")
    assert (interfaces(), scripts.said()) == ([], [])
    compared(shared_tmp, launch, lambda vm: [vm.qmp.ask("netdev_add", type="bridge", id="b", br="b0")["error"]["desc"]])


# --- an unprivileged caller -------------------------------------------------------------------------------------------


def as_caller(user: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = as_user(user, *dropin_words(), *IDLE, "-monitor", "none", *options)
    environment = home_of(user)
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment, cwd="/")


def test_a_user_has_taps_of_his_own_only(unprivileged_user: str, scripts: Scripts) -> None:
    ip("tuntap", "add", "dev", "mine", "mode", "tap", "user", unprivileged_user)
    ip("tuntap", "add", "dev", "many", "mode", "tap", "user", unprivileged_user, "multi_queue")
    ip("tuntap", "add", "dev", "roots", "mode", "tap", "user", "root")
    down = scripts.make("down")
    for value in ("ifname=mine", "ifname=many,queues=2"):
        words = as_user(unprivileged_user, *dropin_words())
        tap = f"tap,id=n,script=no,downscript={down},{value}"
        with running(words, "-netdev", tap, env=home_of(unprivileged_user), cwd="/") as vm:
            assert vm.qmp.execute("query-status")
            vm.quit()
    wait_until(lambda: scripts.said() == ["down 1 mine there", "down 1 many there"], "the downscripts")
    hint = f"mode tap user {unprivileged_user}"
    for name, why in (("roots", "it belongs to uid 0"), ("none", "there is no such interface"), ("", "takes CAP_NET_ADMIN")):
        ended = as_caller(unprivileged_user, "-netdev", f"tap,id=n,{NO_SCRIPTS}" + (f",ifname={name}" if name else ""))
        assert ended.returncode == 1
        assert why in ended.stderr, ended.stderr
        assert hint in ended.stderr
    Path("/dev/net/tun").chmod(0o600)
    ended = as_caller(unprivileged_user, "-netdev", f"tap,id=n,{NO_SCRIPTS},ifname=mine")
    assert "/dev/net/tun: Permission denied" in ended.stderr
    assert "mode 0600" in ended.stderr


def test_a_user_gets_a_tap_of_a_bridge_by_the_set_uid_helper(unprivileged_user: str, shared_tmp: Path) -> None:
    """At launch and plugged in; the helper runs outside, since in QEMU's namespace set-uid means nothing."""
    ip("link", "add", "b0", "type", "bridge")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")
    helper = Path("/etc/qemu/qemu-bridge-helper")
    shutil.copy(HELPER, helper)
    helper.chmod(0o4755)
    shared_tmp.chmod(0o1777)
    monitor = ("-qmp", f"unix:{shared_tmp}/qmp,server=on,wait=off")
    words = as_user(unprivileged_user, *dropin_words(), *IDLE, *monitor, "-netdev", f"bridge,id=n,br=b0,helper={helper}")
    with started(words, env=home_of(unprivileged_user), cwd="/"), connected(shared_tmp / "qmp") as connection:
        client = Client(connection)
        assert os.listdir("/sys/class/net/b0/brif") == ["tap0"]
        client.execute("netdev_add", type="bridge", id="m", br="b0", helper=str(helper))
        assert sorted(os.listdir("/sys/class/net/b0/brif")) == ["tap0", "tap1"]
        client.execute("netdev_del", id="m")
        wait_until(lambda: os.listdir("/sys/class/net/b0/brif") == ["tap0"], "the end of the second tap")
        assert client.hmp(f"netdev_add tap,id=m,br=b0,helper={helper}") == ""
        assert len(os.listdir("/sys/class/net/b0/brif")) == 2
    wait_until(lambda: interfaces() == ["b0"], "the end of the taps")


@pytest.mark.parametrize(
    ("options", "mode", "lacks", "hint"),
    [
        ("suid", 0o755, "the helper is not set-uid root", "chmod u+s {helper}; on Debian"),
        ("nosuid", 0o4755, "the helper is on a file system that is mounted nosuid", "name another by helper="),
    ],
)
def test_a_user_is_told_what_the_helper_lacks(
    unprivileged_user: str, shared_tmp: Path, options: str, mode: int, lacks: str, hint: str
) -> None:
    ip("link", "add", "b0", "type", "bridge")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,{options}", "none", shared_tmp], check=True)
    helper = shared_tmp / "qemu-bridge-helper"
    shutil.copy(HELPER, helper)
    helper.chmod(mode)
    ended = as_caller(unprivileged_user, "-netdev", f"bridge,id=n,br=b0,helper={helper}")
    error = f"qemu-userns: -netdev bridge {helper}: to make a tap takes CAP_NET_ADMIN, and {lacks}\n"
    assert ended.stderr.startswith(f"{error}hint: {hint.format(helper=helper)}")


# --- while QEMU runs --------------------------------------------------------------------------------------------------


def test_a_tap_is_plugged_in_and_out(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    bad = str(scripts.make("bad", status=1))
    ip("link", "add", "b0", "type", "bridge")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")

    def dialogue(vm: Vm) -> list[Any]:
        seen: list[Any] = []
        cases: list[dict[str, Any]] = [{"ifname": "t0"}, {"ifname": "t0", "queues": 2}, {"sndbuf": 4096}]
        for more in cases:
            seen.append(vm.qmp.ask("netdev_add", type="tap", id="n", script=up, downscript=down, **more))
            seen.append([(name, flags_of(name)) for name in interfaces() if name != "b0"])
            seen.append(vm.qmp.ask("netdev_del", id="n"))
            wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
            wait_until(lambda: len(scripts.said()) == 2, "the downscript")
            seen.append(scripts.take())
        seen.append(vm.qmp.hmp(f"netdev_add tap,id=n,ifname=t0,sndbuf=1M,script={up},downscript={down}"))
        seen.append(vm.qmp.hmp("netdev_del n"))
        wait_until(lambda: interfaces() == ["b0"], "the end of the tap")
        wait_until(lambda: len(scripts.said()) == 2, "the downscript")
        seen.append(scripts.take())
        seen.append("error" in vm.qmp.ask("netdev_add", type="tap", id="n", script=bad, downscript=down))
        seen.append(scripts.take())
        seen.append(vm.qmp.ask("netdev_add", type="bridge", id="b", br="b0"))
        seen.append(len(os.listdir("/sys/class/net/b0/brif")))
        seen.append(vm.qmp.ask("netdev_del", id="b"))
        wait_until(lambda: interfaces() == ["b0"], "the end of the bridge's tap")
        seen.append("error" in vm.qmp.ask("netdev_add", type="bridge", id="b", br="nowhere"))
        return seen

    compared(shared_tmp, launch, dialogue)


def test_an_id_that_is_taken_is_refused_before_anything_is_opened(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    ip("link", "add", "b0", "type", "bridge")
    ip("tuntap", "add", "dev", "t1", "mode", "tap")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")

    def dialogue(vm: Vm) -> list[Any]:
        seen: list[Any] = []
        for taken in ("there", "plugged"):
            for more in ({}, {"ifname": "t1"}, {"queues": 2, "vhost": True}):
                seen.append(vm.qmp.ask("netdev_add", type="tap", id=taken, script=up, downscript=down, **more))
            seen.append(vm.qmp.ask("netdev_add", type="bridge", id=taken, br="b0"))
            seen.append(vm.qmp.ask("netdev_add", type="user", id="plugged"))
        # Where the id is the command line's, QEMU says so on its stderr.
        seen.append(vm.qmp.hmp(f"netdev_add tap,id=plugged,script={up},downscript={down}"))
        seen.append("error" in vm.qmp.ask("netdev_add", type="tap", script=up, downscript=down))
        seen.append("error" in vm.qmp.ask("netdev_add", type="tap", id="no id!", script=up, downscript=down))
        seen += [interfaces(), scripts.said()]
        return seen

    compared(shared_tmp, launch, dialogue, "-netdev", "user,id=there")
    assert scripts.said() == []


def test_what_was_plugged_in_is_taken_back_at_the_end(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    with plugged(shared_tmp / "vm", launch) as vm:
        vm.qmp.execute("netdev_add", type="tap", id="n", ifname="t0", script=up, downscript=down)
        vm.process.kill()
    wait_until(lambda: scripts.said() == ["up 1 t0 there", "down 1 t0 there"], "the downscript")


def test_a_supervisor_that_takes_over_runs_the_downscripts(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up, down = str(scripts.make("up")), str(scripts.make("down"))
    tap = f"tap,id=a,ifname=ta,script={up},downscript={down}"
    with plugged(shared_tmp / "vm", launch, "-netdev", tap) as vm:
        vm.qmp.execute("netdev_add", type="tap", id="b", ifname="tb", script=up, downscript=down)
        supervisor = supervisor_of(vm.process.pid)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
        done = subprocess.run([OURS, "adopt", str(vm.process.pid)], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        vm.process.kill()
    wait_until(lambda: len(scripts.said()) == 4, "the downscripts")
    assert sorted(scripts.said()) == ["down 1 ta gone", "down 1 tb gone", "up 1 ta there", "up 1 tb there"]


# --- which network ----------------------------------------------------------------------------------------------------


def network_of(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def interfaces_of(pid: int) -> list[str]:
    """Return the interfaces of a process's network namespace."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return sorted(line.split(":")[0].strip() for line in lines)


@contextlib.contextmanager
def another_network() -> Iterator[int]:
    """Make a network namespace; yield the pid of a process in it."""
    with subprocess.Popen(["unshare", "--net", "sleep", "1000"]) as process:
        wait_until(lambda: network_of(process.pid) != network_of("self"), "another network namespace")
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_network_of_its_own_is_empty_and_taps_are_the_callers(launch: Launch) -> None:
    words = ("-userns", "net=none", "-netdev", f"tap,id=n,ifname=t0,{NO_SCRIPTS}", "-netdev", "user,id=u")
    with running(words_of(launch), *words, idle=False) as vm:
        assert network_of(vm.pid) != network_of("self")
        assert interfaces_of(vm.pid) == ["lo"]
        assert interfaces() == ["t0"]
        vm.quit()


def test_an_unprivileged_caller_has_none_as_well(unprivileged_user: str) -> None:
    words = as_user(unprivileged_user, *dropin_words())
    with running(words, "-userns", "net=none", env=home_of(unprivileged_user), cwd="/") as vm:
        assert interfaces_of(vm.pid) == ["lo"]
        vm.quit()


def test_the_network_that_the_operator_names(launch: Launch, scripts: Scripts, shared_tmp: Path) -> None:
    up = str(scripts.make("up"))
    with another_network() as other:
        words = ("-userns", f"net=/proc/{other}/ns/net", "-netdev", f"tap,id=n,ifname=t0,{NO_SCRIPTS}")
        with plugged(shared_tmp / "vm", launch, *words) as vm:
            assert network_of(vm.process.pid) == network_of(other)
            assert interfaces_of(other) == ["lo", "t0"]
            vm.qmp.execute("netdev_add", type="tap", id="b", ifname="t1", script=up, downscript="no")
            assert interfaces_of(other) == ["lo", "t0", "t1"]
            assert scripts.said() == ["up 1 t1 there"]
            os.kill(supervisor := supervisor_of(vm.process.pid), signal.SIGKILL)
            wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
            subprocess.run([OURS, "adopt", str(vm.process.pid)], timeout=LIMIT_S, check=True)
            again = vm.client(5)
            again.execute("netdev_add", type="tap", id="c", ifname="t2", script="no", downscript="no")
            assert interfaces_of(other) == ["lo", "t0", "t1", "t2"]
    assert interfaces() == []


def test_a_network_of_ip_netns(launch: Launch) -> None:
    name = f"qemu-userns-{os.getpid()}"
    ip("netns", "add", name)
    try:
        words = ("-userns", f"net=/run/netns/{name}", "-netdev", f"tap,id=n,ifname=t0,{NO_SCRIPTS}")
        with running(words_of(launch), *words, idle=False) as vm:
            assert Path(f"/run/netns/{name}").stat().st_ino == Path(f"/proc/{vm.pid}/ns/net").stat().st_ino
            assert "t0:" in ip("netns", "exec", name, "ip", "-o", "link", "show")
            assert interfaces() == []
            vm.quit()
    finally:
        ip("netns", "del", name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/run/netns/none", "No such file or directory\nhint: ip netns add NAME"),
        ("/dev/null", "Invalid argument\nhint: name a network namespace"),
        ("/proc/self/ns/mnt", "Invalid argument\nhint: name a network namespace"),
        ("some", "'some' is not a choice\nhint: choose caller or none"),
    ],
)
def test_what_is_no_network_stops_the_launch(launch: Launch, name: str, reason: str) -> None:
    assert reason in said(launch, "-userns", f"net={name}")


def test_a_user_may_not_join_roots_network(unprivileged_user: str) -> None:
    with another_network() as other:
        os.symlink(f"/proc/{other}/ns/net", "/etc/net")
        ended = as_caller(unprivileged_user, "-userns", "net=/etc/net")
    assert ended.returncode == 1
    assert "hint: to join it takes CAP_SYS_ADMIN; net=none takes nothing" in ended.stderr


def test_fds_that_are_no_taps_are_refused(launch: Launch) -> None:
    with open("/dev/null") as null, open("/dev/net/tun") as tun:
        for file, key in ((null, "fd"), (tun, "fd"), (null, "fds")):
            words = [*words_of(launch), "-netdev", f"tap,id=n,{key}={file.fileno()}"]
            ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, pass_fds=(file.fileno(),))
            assert ended.returncode == 1
            assert ended.stderr.startswith(f"qemu-userns: -netdev {key} {file.fileno()}: it is no tap\nhint: ")


def test_a_named_fd_that_is_no_tap_is_refused_by_qemu(launch: Launch, shared_tmp: Path) -> None:
    """That of a client, by netdev_add."""

    def add(vm: Vm) -> list[Any]:
        with open("/dev/null") as null:
            vm.qmp.execute("getfd", null.fileno(), fdname="mine")
        desc = vm.qmp.ask("netdev_add", type="tap", id="n", fd="mine")["error"]["desc"]
        return [re.sub(r"FD \d+", "FD", desc)]

    compared(shared_tmp, launch, add)


@pytest.mark.parametrize("count", [1, 2])
def test_fds_of_the_caller_are_kept(launch: Launch, count: int) -> None:
    """As LXD and libvirt pass them: opened and configured already."""
    grants = Tap("test", "t0", tuple(range(count)), None)
    fds = [open_queue(grants, "t0")[0] for _ in range(count)]
    value = f"tap,id=n,{'fds' if count > 1 else 'fd'}={':'.join(map(str, fds))}"
    with running(words_of(launch), "-netdev", value, idle=False, pass_fds=tuple(fds)) as vm:
        assert f"fd={fds[0]}" in vm.qmp.hmp("info network")
        vm.quit()
    for fd in fds:
        os.close(fd)


# --- traffic ----------------------------------------------------------------------------------------------------------


class Nic:
    """A tap with an address, and what the guest has of it."""

    def __init__(self, number: int, queues: int = 1, user: str | None = None) -> None:
        """Make the tap, root's or a user's."""
        self.number, self.queues = number, queues
        self.name, self.mac = f"t{number}", f"52:54:00:00:00:0{number}"
        many = ("multi_queue",) if queues > 1 else ()
        ip("tuntap", "add", "dev", self.name, "mode", "tap", *many, *(("user", user) if user else ()))
        ip("addr", "add", f"10.7.{number}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def netdev(self) -> dict[str, Any]:
        many = {"queues": self.queues} if self.queues > 1 else {}
        return {"type": "tap", "id": self.name, "ifname": self.name, "script": "no", "downscript": "no", **many}

    def device(self) -> dict[str, Any]:
        many = {"mq": True, "vectors": 2 * self.queues + 2} if self.queues > 1 else {}
        return {"driver": "virtio-net-pci", "netdev": self.name, "id": f"d{self.number}", "mac": self.mac, **many}

    def words(self) -> list[str]:
        return ["-netdev", json.dumps(self.netdev()), "-device", json.dumps(self.device())]

    def find(self, guest: Guest | RunningGuest, address: str) -> str:
        """Give the guest's end an address; return its name."""
        find = f'dev=$(grep -l "^{self.mac}$" /sys/class/net/*/address | cut -d/ -f5); [ -n "$dev" ]'
        up = f"ip addr add {address} dev $dev && ip link set $dev up && echo $dev"
        return guest.check(f"modprobe virtio_net; {wait_for(find)}; {up}").strip()

    def check(self, guest: Guest | RunningGuest) -> None:
        """Have packets go there and back from each of the guest's processors, which have queues of their own.

        With -A ping does not wait a second before the next one.
        """
        name = self.find(guest, f"10.7.{self.number}.2/24")
        found = guest.check(
            f"for cpu in 1 2 4 8; do taskset $cpu ping -A -c 2 -W 5 -s 1400 10.7.{self.number}.1 >/dev/null || exit 1; done; "
            f"ls -d /sys/class/net/{name}/queues/rx-* | wc -l"
        )
        assert int(found) == self.queues


class BridgedNic(Nic):
    """A tap that qemu-bridge-helper makes and puts into the bridge b0."""

    def __init__(self, number: int) -> None:
        """Give the bridge an address for it."""
        self.number, self.queues = number, 1
        self.name, self.mac = f"n{number}", f"52:54:00:00:00:0{number}"
        ip("addr", "add", f"10.7.{number}.1/24", "dev", "b0")

    def netdev(self) -> dict[str, Any]:
        return {"type": "bridge", "id": self.name, "br": "b0"}


class Booted:
    """A guest with four processors, and the VM that it runs in."""

    def __init__(
        self, stack: contextlib.ExitStack, folder: Path, launch: Launch, nics: Sequence[Nic], more: Sequence[str] = ()
    ) -> None:
        home = folder / "home"
        home.mkdir(parents=True)
        slots = [word for n in range(2) for word in ("-device", f"pcie-root-port,id=slot{n},chassis={n + 1},bus=pcie.0")]
        words = [word for nic in nics for word in nic.words()]
        machine = [*machine_options(home, ACCELERATOR, 256, "qemu_userns_serve"), "-smp", "4", *words, *slots, *more]
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            command = port_options("command", f"socket,fd={theirs.fileno()}")
            vm = plugged(folder / "vm", launch, *command, machine=machine, pass_fds=(theirs.fileno(),))
            self.qmp = stack.enter_context(vm).qmp
        try:
            self.guest = Guest(ours, home)
        except GuestTimeoutError as err:
            err.add_note(self.qmp.hmp("info registers -a"))
            raise

    def plug(self, nic: Nic, slot: int) -> None:
        self.qmp.execute("netdev_add", **nic.netdev())
        self.qmp.execute("device_add", bus=f"slot{slot}", **nic.device())

    def unplug(self, nic: Nic) -> None:
        unplug(self.qmp, f"d{nic.number}")
        self.qmp.execute("netdev_del", id=nic.name)


def test_a_guest_talks_over_taps(launch: Launch, shared_tmp: Path) -> None:
    nics = [Nic(1), Nic(2, queues=4), Nic(3), Nic(4, queues=4)]
    with contextlib.ExitStack() as stack:
        booted = Booted(stack, shared_tmp, launch, nics[:2])
        for nic in nics[:2]:
            nic.check(booted.guest)
        for slot, nic in enumerate(nics[2:]):
            booted.plug(nic, slot)
            nic.check(booted.guest)
            booted.unplug(nic)


def test_a_guest_talks_over_taps_of_the_bridge_helper(launch: Launch, shared_tmp: Path) -> None:
    ip("link", "add", "b0", "type", "bridge")
    ip("link", "set", "b0", "up")
    Path("/etc/qemu/bridge.conf").write_text("allow b0\n")
    first, second = BridgedNic(1), BridgedNic(2)
    with contextlib.ExitStack() as stack:
        booted = Booted(stack, shared_tmp, launch, [first])
        first.check(booted.guest)
        booted.plug(second, 0)
        second.check(booted.guest)
        booted.unplug(second)
        assert len(os.listdir("/sys/class/net/b0/brif")) == 1


def test_a_guest_without_the_callers_network_talks_over_its_taps(shared_tmp: Path) -> None:
    first, second = Nic(1), Nic(2, queues=4)
    with contextlib.ExitStack() as stack:
        booted = Booted(stack, shared_tmp, launches()[0], [first], ("-userns", "net=none"))
        first.check(booted.guest)
        booted.plug(second, 0)
        second.check(booted.guest)


def test_two_guests_talk_through_a_bridge(shared_tmp: Path) -> None:
    """Over taps with one queue and with four, that are there from the start and that are plugged in: ping, and 4 MiB of data.

    And with another network over a veth.

    The ids of one are leased, where root tests, and the other is somebody's.
    """
    ip("link", "add", "b0", "type", "bridge")
    ip("link", "set", "b0", "up")
    sides = [[Nic(1), Nic(2, queues=4)], [Nic(3), Nic(4, queues=4)]]
    for nic in (*sides[0], *sides[1]):
        ip("addr", "flush", "dev", nic.name)
        ip("link", "set", nic.name, "master", "b0")
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(another_network())
        ip("link", "add", "v0", "master", "b0", "up", "type", "veth", "peer", "v1", "netns", str(far))
        subprocess.run(["nsenter", f"--net=/proc/{far}/ns/net", "ip", "addr", "add", "10.8.1.9/24", "dev", "v1"], check=True)
        subprocess.run(["nsenter", f"--net=/proc/{far}/ns/net", "ip", "link", "set", "v1", "up"], check=True)
        first = Booted(stack, shared_tmp / "1", launches()[0], sides[0])
        second = Booted(stack, shared_tmp / "2", launches()[-1], [])
        for slot, nic in enumerate(sides[1]):
            second.plug(nic, slot)
        for one, other in zip(*sides, strict=True):
            for booted, nic in ((first, one), (second, other)):
                nic.find(booted.guest, f"10.8.{one.number}.{nic.number}/24")
            first.guest.check(f"ping -A -c 2 -W 5 -s 1400 10.8.{one.number}.{other.number} >/dev/null")
            first.guest.check("dd if=/dev/urandom of=/sent bs=64k count=64 2>/dev/null")
            second.guest.check("rm -f /got; (sleep 1000 | nc -l -p 9000 >/got 2>/dev/null) & sleep 1")
            first.guest.check(f"nc 10.8.{one.number}.{other.number} 9000 </sent")
            second.guest.check("while pidof nc >/dev/null; do sleep 0.1; done")
            digests = [booted.guest.check(f"sha1sum <{file}") for booted, file in ((first, "/sent"), (second, "/got"))]
            assert digests[0] == digests[1]
        first.guest.check("ping -A -c 2 -W 5 -s 1400 10.8.1.9 >/dev/null")
        for nic in sides[1]:
            second.unplug(nic)
