"""QEMU's command-line language, parsed losslessly. Pure: touches no operating system."""
