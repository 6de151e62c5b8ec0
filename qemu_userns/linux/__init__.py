"""System calls, one thin typed wrapper each; no knowledge of QEMU."""
