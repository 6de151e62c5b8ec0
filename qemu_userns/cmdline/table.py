"""QEMU's options: which take a value, and in which grammar.

The union of qemu-options.hx from 7.2 to 11.0 for all targets: an option that the binary at hand lacks is refused by it, not
by us. What a newer binary has on top is learned from its -help.
"""

from qemu_userns.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Grammars. "word": verbatim; "opts", "keyval": comma lists, "-json" if it may be JSON instead; others are an option of their own.
NONE, WORD, OPTS, KEYVAL, OPTS_JSON, KEYVAL_JSON = "none", "word", "opts", "keyval", "opts-json", "keyval-json"

FLAGS = (
    "help version mem-prealloc audio-help snapshot usb nographic portrait full-screen win2k-hack no-fd-bootchk no-acpi no-hpet "
    "singlestep preconfig S s enable-kvm xen-attach xen-domid-restrict no-reboot no-shutdown daemonize only-migratable "
    "nodefaults semihosting old-param no-user-config async-teardown enable-sync-profile perfmap jitdump"
)
WORDS = (
    "cpu mem-path k uuid fda fdb hda hdb hdc hdd cdrom mtdblock sd usbdevice rotate vga g bios pflash kernel append initrd shim "
    "dtb serial parallel monitor qmp qmp-pretty debugcon pidfile gdb d D dfilter seed L xen-domid loadvm watchdog-action echr "
    "chroot runas prom-env readconfig qtest qtest-log dump-vmstate"
)
# kind -> grammar, implied key of the first value
LISTS: "dict[str, tuple[str, str | None]]" = {
    "machine": (KEYVAL, "type"),
    "smp": (KEYVAL, "cpus"),
    "boot": (KEYVAL, "order"),
    "audio": (KEYVAL, "driver"),
    "audiodev": (KEYVAL_JSON, "driver"),
    "blockdev": (KEYVAL_JSON, "driver"),
    "compat": (KEYVAL_JSON, None),
    "display": ("display", "type"),
    "incoming": ("incoming", "channel-type"),
    "netdev": ("netdev", "type"),
    "device": (OPTS_JSON, "driver"),
    "object": (OPTS_JSON, "qom-type"),
    "global": ("global", None),
    "set": ("set", None),
    "accel": (OPTS, "accel"),
    "acpitable": (OPTS, "data"),
    "action": (OPTS, None),
    "add-fd": (OPTS, None),
    "chardev": (OPTS, "backend"),
    "drive": (OPTS, None),
    "fsdev": (OPTS, "fsdriver"),
    "virtfs": (OPTS, "fsdriver"),
    "fw_cfg": (OPTS, "name"),
    "icount": (OPTS, "shift"),
    "iscsi": (OPTS, None),
    "memory": (OPTS, "size"),
    "mon": (OPTS, "chardev"),
    "msg": (OPTS, None),
    "name": (OPTS, "guest"),
    "net": (OPTS, "type"),
    "nic": (OPTS, "type"),
    "numa": (OPTS, "type"),
    "option-rom": (OPTS, "romfile"),
    "overcommit": (OPTS, None),
    "plugin": (OPTS, "file"),
    "rtc": (OPTS, None),
    "run-with": (OPTS, None),
    "sandbox": (OPTS, "enable"),
    "semihosting-config": (OPTS, None),
    "smbios": (OPTS, None),
    "spice": (OPTS, None),
    "tpmdev": (OPTS, "type"),
    "trace": (OPTS, "enable"),
    "vnc": (OPTS, "vnc"),
    "userns": (OPTS, None),
}
# Sections of -readconfig and groups of -set go by the names of QemuOpts groups.
GROUPS = {"smp-opts": "smp", "boot-opts": "boot", "acpi": "acpitable"}


class Entry(Record):
    """One option: the `kind` of object that it makes, its grammar, the key of a first value without one."""

    kind: str
    grammar: str
    implied: str | None = None


class OptionTable(Record):
    """Name of an option, without dashes, to what is known of it."""

    entries: "dict[str, Entry]"

    def find(self, name: str) -> "Entry | None":
        """Return the entry of an option."""
        return self.entries.get(name)

    def with_learned(self, learned: "Mapping[str, bool]") -> "OptionTable":
        """Return a table that also has the options of a binary at hand; what is built in is known better."""
        extra = {name: Entry(name, WORD if has_value else NONE) for name, has_value in learned.items()}
        return OptionTable({**extra, **self.entries})


def _build_table() -> OptionTable:
    entries = {name: Entry(name, NONE, None) for name in FLAGS.split()}
    entries |= {name: Entry(name, WORD, None) for name in WORDS.split()}
    entries |= {name: Entry(name, grammar, implied) for name, (grammar, implied) in LISTS.items()}
    # Spelled -m; there is no -memory.
    entries["m"] = entries.pop("memory")
    return OptionTable({**entries, "h": entries["help"], "M": entries["machine"]})


BUILTIN = _build_table()

# Where the descriptions of -help begin.
HELP_COLUMN = 16


def parse_help(text: str) -> "dict[str, bool]":
    """Return the options that a binary's -help names, and whether they take a value.

    Where an option has several lines, one with a value decides.
    """
    learned: dict[str, bool] = {}
    for line in text.splitlines():
        if not line.startswith("-"):
            continue
        spelled, _, rest = line.partition(" ")
        while rest.startswith("or -"):
            also, _, rest = rest.removeprefix("or ").partition(" ")
            spelled += f"/{also}"
        description = rest.strip()
        if description.startswith("as -"):  # QEMU 11: `-M              as -machine`
            has_value = learned.get(description.removeprefix("as -"), False)
        else:
            has_value = _has_value(line, rest)
        for word in spelled.split("/"):
            name = word[2:] if word.startswith("--") else word[1:]
            if name:
                learned[name] = learned.get(name, False) or has_value
    return learned


def _has_value(line: str, rest: str) -> bool:
    """Tell `-dtb    file    use it`, `-seed number   seed it` and `-runas user change it` from `-S      freeze it`."""
    if not rest.strip() or len(line) - len(rest) == HELP_COLUMN:
        return False
    word, _, description = rest.strip().partition(" ")
    return not rest.startswith(" ") or (description.startswith(" ") and bool(word))
