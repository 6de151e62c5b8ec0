"""The process beside QEMU."""
