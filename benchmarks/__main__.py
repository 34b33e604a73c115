"""``python -m benchmarks NAME``; without ``--out`` it writes what the project publishes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.first_contact import first_contact


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["first_contact"]:
        return first_contact.main(given[1:])
    from benchmarks.core import command
    from benchmarks.registry import COMMANDS

    return command.main(COMMANDS, given)


if __name__ == "__main__":
    sys.exit(main())
