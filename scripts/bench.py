"""Measure: `scripts/bench launch`, `qmp`, `share` and `net`. Nothing is asserted about time."""

import argparse

from bench_launch import bench_launch
from bench_net import bench_net
from bench_qmp import bench_qmp
from bench_share import bench_share


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure; nothing is asserted about time.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, what in (
        ("launch", bench_launch, "from start to execve, and to QEMU's greeting"),
        ("qmp", bench_qmp, "what the broker costs a client, and the host"),
        ("net", bench_net, "how fast a guest sends over a tap, with and without vhost-net; as root"),
        ("share", bench_share, "what a 9p or virtiofs share costs a guest"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--json", dest="json_file", metavar="FILE", help="write the figures there too")
        command.add_argument("--rounds", type=int, metavar="N", help="instead of as many as there is time for")
        if run is bench_net:
            command.add_argument("--accel", dest="accelerator", choices=("tcg", "kvm"), default="tcg", help="of the guests")
        command.set_defaults(run=run)
    options = vars(parser.parse_args())
    options.pop("run")(**options)


if __name__ == "__main__":
    main()
