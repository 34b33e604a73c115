"""``python -m benchmarks norms``: ``layernorm bench norms`` that writes what the project publishes."""

from __future__ import annotations

import sys
from pathlib import Path

from layernorm.arguments import Parser
from layernorm.bench import command

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m benchmarks"


def main() -> int:
    parser = Parser(prog=PROGRAM, description="The benchmarks that the project publishes.")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    command.add_norms_to(commands, "the published files, in benchmarks/results and docs")
    options = parser.parse_args()
    outputs = command.in_folder(options.out) if options.out else command.in_checkout(ROOT)
    return command.run(options, outputs, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
