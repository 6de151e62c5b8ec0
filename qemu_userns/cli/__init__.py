"""The qemu-userns command."""
