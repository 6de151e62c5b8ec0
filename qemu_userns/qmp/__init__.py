"""QMP without sockets: the stream of messages, what a client and QEMU say, and one session between them."""
