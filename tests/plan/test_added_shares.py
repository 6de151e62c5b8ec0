"""The words of shares that the settings add."""

import pytest

from qemu_userns.plan.added_shares import AddedShare, build_words
from qemu_userns.plan.build import Settings
from tests.plans import asked_for, plan_of, read

X86, S390X = "/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-s390x"


@pytest.mark.parametrize(
    ("words", "program", "bus"),
    [
        ((), X86, "pci"),
        (("-M", "q35"), X86, "pci"),
        (("-M", "microvm"), X86, "device"),
        (("-M", "microvm", "-machine", "acpi=off"), X86, "device"),
        (("-M", "microvm,pcie=on"), X86, "pci"),
        ((), f"{X86}-microvm", "device"),
        (("-machine", "type=q35"), f"{X86}-microvm", "pci"),
        ((), S390X, "ccw"),
        (("-M", "virt"), "/usr/bin/qemu-system-m68k", "device"),
        (("-M", "virt"), "/usr/bin/qemu-system-aarch64", "pci"),
    ],
)
def test_9p_is_on_the_machines_bus(words: tuple[str, ...], program: str, bus: str) -> None:
    assert list(build_words([AddedShare("t", "/a")], read(*words).objects, program)) == [
        *("-fsdev", "local,id=userns-share0,path=/a,security_model=passthrough"),
        *("-device", f"virtio-9p-{bus},id=userns-share0,fsdev=userns-share0,mount_tag=t"),
    ]


def test_what_the_settings_say_is_in_the_words() -> None:
    share = AddedShare("t,u", "/a,b", readonly=True, model="mapped-file")
    assert list(build_words([AddedShare("t", "/a"), share], (), X86))[4:] == [
        *("-fsdev", "local,id=userns-share1,path=/a,,b,security_model=mapped-file,readonly=on"),
        *("-device", "virtio-9p-pci,id=userns-share1,fsdev=userns-share1,mount_tag=t,,u"),
    ]


def test_a_machine_without_devices_has_none() -> None:
    assert not list(build_words([AddedShare("t", "/a")], read("-M", "none").objects, X86))


def test_the_plan_shows_them_as_added() -> None:
    added = tuple(build_words([AddedShare("t", "/x/dir")], (), X86))
    plan = plan_of("-nodefaults", *added, settings=Settings(sandbox="off", added=added))
    assert "rw /x/dir" in asked_for(plan)
    assert [rewrite.after for rewrite in plan.rewrites] == [" ".join(added[:2]), " ".join(added[2:])]
    assert plan.words[-4:] == added
