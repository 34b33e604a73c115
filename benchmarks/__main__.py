"""``python -m benchmarks NAME``; without ``--out`` it writes what the project publishes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.core import command
from benchmarks.registry import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command.main(COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
