"""``python -m benchmarks NAME``: ``layernorm bench NAME`` that writes what the project publishes."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.core import command
from benchmarks.core.benchmark import in_checkout
from layernorm.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m benchmarks"


def main() -> int:
    parser = Parser(prog=PROGRAM, description="The benchmarks that the project publishes.")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    command.add_benchmarks_to(commands, "the published files, in benchmarks/results and docs")
    options = parser.parse_args()
    return command.run(options, None if options.out else in_checkout(ROOT), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
