"""Measure: `scripts/bench launch` and `scripts/bench qmp`. Nothing is asserted about time."""

import argparse

from bench_launch import bench_launch
from bench_qmp import bench_qmp


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure; nothing is asserted about time.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, what in (
        ("launch", bench_launch, "from start to execve, and to QEMU's greeting"),
        ("qmp", bench_qmp, "what the broker costs a client, and the host"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--json", metavar="FILE", help="write the figures there too")
        command.add_argument("--rounds", type=int, metavar="N", help="instead of as many as fit into half a minute")
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options.rounds, options.json)


if __name__ == "__main__":
    main()
