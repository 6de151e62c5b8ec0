"""The test guest: Debian's kernel and a static busybox."""
