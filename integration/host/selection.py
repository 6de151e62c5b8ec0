"""What is tested in the test host, and how long that may take: the one place that says so.

In each of them: what only it can show (`test_*_host.py`), and, of what runs on any machine, the core of what its kernel or its
version of QEMU could make different. Names are pytest's.
"""

from __future__ import annotations

from typing import NamedTuple

CORE = (
    # KVM, vhost-net, vhost-vsock, vfio, SCSI and limits: devices that other machines lack.
    "integration/test_kvm_host.py",
    "integration/test_net_host.py",
    "integration/test_devices_host.py",
    "integration/test_kvm.py",
    "integration/test_monitors_host.py",
    "integration/test_apparmor_host.py",
    # Taps, and what runs for them.
    "integration/test_net.py::test_a_tap_is_what_plain_qemu_makes",
    "integration/test_net.py::test_the_scripts_run_outside",
    "integration/test_net.py::test_a_bridge_gets_a_tap",
    "integration/test_net.py::test_a_user_has_taps_of_his_own_only",
    "integration/test_net.py::test_a_tap_is_plugged_in_and_out",
    "integration/test_net.py::test_the_network_that_the_operator_names",
    # Mounts, idmapped ones and a running view, and Landlock: the kernel's.
    "integration/test_running_view.py",
    "integration/test_confinement.py::test_it_has_user_mount_and_ipc_namespaces_of_its_own_and_shares_the_others",
    "integration/test_confinement.py::test_files_outside_the_view_are_not_there",
    # Shares, by the kernel's own client of 9p in a guest under KVM.
    "integration/test_shares.py::test_mapped_xattr",
    "integration/test_shares.py::test_mapped_file",
    "integration/test_shares.py::test_passthrough_ids_are_the_mapped_ones",
    "integration/test_shares.py::test_unmapped_ids_are_refused",
    "integration/test_shares.py::test_device_nodes_are_refused",
    "integration/test_shares.py::test_read_only_stays_read_only",
    "integration/test_stand_in.py::test_a_share_of_lxds_has_the_ids_of_its_namespace",
    "integration/test_stand_in.py::test_a_socket_by_its_path",
)


# What QEMU offers: options, commands and their members, another set in each version. That of bookworm is tested everywhere else.
TABLES = (
    "tests/cmdline/test_cmdline_table.py",
    "tests/catalogue/test_commands.py",
)


# What QEMU has since 9.0, and Linux since 6.9; and what QEMU could take in another way than 7.2, which is tested everywhere else.
NEWER = (
    "integration/test_vdpa_host.py",
    "integration/test_passt.py",
    "integration/test_hotplug_devices.py::test_iommufd_and_a_device_of_it_come_by_fd",
    "integration/test_hotplug_devices.py::test_qemu_gets_what_its_id_may_not_open",
    "integration/test_hotplug_devices.py::test_a_vsock_is_plugged_in",
    "integration/test_hotplug_devices.py::test_a_usb_device_is_plugged_in",
    "integration/test_hotplug_devices.py::test_a_vfio_device_is_plugged_in",
    "integration/test_hotplug_devices.py::test_a_mediated_device_has_the_driver_that_divides_the_real_one",
    "integration/test_devices.py::test_a_tpm_of_swtpm",
    "integration/test_devices.py::test_memory_in_huge_pages",
    "integration/test_devices.py::test_memory_is_bound_to_a_node",
    "integration/test_displays.py::test_vnc_in_a_directory_of_the_callers_alone",
    "integration/test_displays.py::test_display_update_and_display_reload",
    "integration/test_netdevs.py::test_what_takes_rights_over_the_host_is_refused",
    "integration/test_netdevs.py::test_a_back_end_connects_to_qemu",
    "integration/test_netdevs.py::test_a_nic_of_vhost_user_is_plugged_in",
)

# The virtiofsd that bookworm does not have, and backports bring no package of.
VIRTIOFSD = ("integration/test_virtiofsd_host.py",)

# LXD's two versions of QEMU, Incus, and libvirt. They and their VMs: five minutes on a quiet machine.
DAEMONS = ("integration/test_lxd_host.py", "integration/test_libvirt_host.py")


class Selection(NamedTuple):
    """Tests and their time."""

    tests: tuple[str, ...]
    limit_s: int
    """For the host from its boot to its end, on a machine that others use too; a quiet one takes a third of it."""


SELECTIONS = {
    "bookworm": Selection((*CORE, *DAEMONS), 3000),
    # QEMU 10 and 11 are slower to start, and more so where a processor is emulated.
    "trixie": Selection((*CORE, *TABLES, *NEWER, *VIRTIOFSD, *DAEMONS), 3600),
    "trixie-backports": Selection((*CORE, *TABLES, *NEWER), 3000),
}
