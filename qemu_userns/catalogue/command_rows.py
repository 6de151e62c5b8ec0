"""The rows of the catalogue for QMP commands that are no twin of an option: kind is the command's name. Pure.

One row supports a command: its arguments are members with dotted keys, but for the "data" in which QAPI wraps addresses and
character devices. Commands that make the same objects as the command line (blockdev-add, netdev_add...) have its rows.

Source: QEMU's qapi/*.json and hmp-commands.hx, 7.2 to 11.0.
"""

from qemu_userns.catalogue import ways
from qemu_userns.catalogue.rows import ROWS, Row

_FILES_WRITTEN = "screendump memsave pmemsave dump-skeys xen-save-devices-state logfile trace-file"
_MACHINE_FILES = ("kernel", "initrd", "dtb", "shim")
_NOT_ABSTRACT = ("abstract", ("", "off"))
_OWN_MONITOR = "a monitor that is made while QEMU runs would be QEMU's own, past the rights of this one's clients"
_OWN_MONITOR_HINT = "connect to this monitor once more: it has any number of clients; or name it on the command line"

_ROWS: "tuple[Row, ...]" = (
    # Block jobs, snapshots and media
    Row("blockdev-snapshot-sync", "snapshot-file", ways.IMAGE, (("mode", ("existing",)),)),
    Row("blockdev-snapshot-sync", "snapshot-file", ways.NEW_IMAGE),
    *(
        Row(command, "target", way, when)
        for command in ("drive-mirror", "drive-backup")
        for way, when in ((ways.IMAGE, (("mode", ("existing",)),)), (ways.NEW_IMAGE, ()))
    ),
    Row("blockdev-change-medium", "file", ways.IMAGE),
    Row("blockdev-create", "options.filename", ways.WRITE, (("options.driver", ("file",)),)),
    Row("blockdev-create", "options.filename", ways.DEVICE, (("options.driver", ("host_device",)),)),
    Row("blockdev-create", "options.location.server.0.path", ways.SOCKET, (("options.driver", ("gluster",)),)),
    Row("blockdev-create", "options.location.logfile", ways.APPEND, (("options.driver", ("gluster",)),)),
    # Exports
    Row("nbd-server-start", "addr.path", ways.LISTEN, (("addr.abstract", ("", "off")),)),
    Row("nbd-server-start", "uri", ways.EXPORT),
    Row("block-export-add", "addr.path", ways.LISTEN, (("addr.abstract", ("", "off")),)),
    Row(
        "block-export-add",
        "mountpoint",
        ways.REFUSE,
        reason="a FUSE export would be mounted where only this QEMU sees it",
        hint="export by NBD (nbd-server-start, block-export-add type=nbd), or from a qemu-storage-daemon outside",
    ),
    # Migration
    Row("migrate", "uri", ways.MIGRATE),
    Row("migrate-incoming", "uri", ways.INCOMING),
    Row("migrate-recover", "uri", ways.INCOMING),
    Row("migrate", "**.addr.path", ways.SOCKET, (("addr.transport", ("socket",)), ("addr.abstract", ("", "off")))),
    Row("migrate-incoming", "**.addr.path", ways.MADE, (("addr.transport", ("socket",)), ("addr.abstract", ("", "off")))),
    Row("migrate", "**.addr.filename", ways.WRITE, (("addr.transport", ("file",)), ("addr.offset", ("", "0")))),
    Row("migrate", "**.addr.filename", ways.APPEND, (("addr.transport", ("file",)),)),
    Row("migrate-incoming", "**.addr.filename", ways.READ, (("addr.transport", ("file",)),)),
    *(Row(command, "**.addr.args.0", ways.RUN, (("addr.transport", ("exec",)),)) for command in ("migrate", "migrate-incoming")),
    Row("migrate-set-parameters", "cpr-exec-command.0", ways.READ),
    # Files
    Row("dump-guest-memory", "protocol", ways.DUMP),
    Row("dump-guest-memory", "filename", ways.WRITE),
    *(Row(command, "filename", ways.WRITE) for command in _FILES_WRITTEN.split()),
    Row("dumpdtb", "filename", ways.MADE),  # g_file_set_contents(3) writes another file, and renames it
    Row("xen-load-devices-state", "filename", ways.READ),
    Row("wavcapture", "path", ways.WRITE),
    Row("qom-set", "value", ways.READ, (("property", _MACHINE_FILES),)),
    Row("qom-set", "value", ways.FIRMWARE, (("property", ("firmware", "romfile")),)),
    # Displays, monitors, fds
    Row("display-update", "**.path", ways.LISTEN, (_NOT_ABSTRACT,)),
    Row("gdbserver", "device", ways.CHARDEV),
    Row("object", "qom-type", ways.REFUSE, (("qom-type", ("monitor-qmp", "monitor-hmp")),), _OWN_MONITOR, _OWN_MONITOR_HINT),
    *(Row(command, "fdname", ways.NAME) for command in ("add_client", "getfd", "closefd")),
)

COMMAND_ROWS: "tuple[Row, ...]" = (*_ROWS, *ROWS)
