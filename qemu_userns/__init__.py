"""qemu-userns: QEMU in its own user and mount namespace."""
