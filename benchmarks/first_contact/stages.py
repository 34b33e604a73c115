"""A stage of ``first_contact``: ``python -m benchmarks.first_contact.stages [options] STAGE``.

By itself, without the limits of ``first_contact``, it is what NVIDIA's checkers run:

    compute-sanitizer python3 -m benchmarks.first_contact.stages --only-right --hidden 256 --batches 9 STAGE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.first_contact.figures import BATCHES, HIDDEN, Setting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage that the arguments name; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact.stages", description=__doc__)
    parser.add_argument("stage", metavar="STAGE", help="its kind, and where there are several cell and dtype")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only-right", action="store_true", help="few steps, and no times")
    parser.add_argument("--hidden", type=_numbers, default=HIDDEN, metavar="H,…")
    parser.add_argument("--batches", type=_numbers, default=BATCHES, metavar="N,…")
    options = parser.parse_args(arguments)
    setting = Setting(
        options.stage, options.rehearse, options.only_right, tuple(options.hidden), tuple(options.batches)
    )
    run(setting)
    return 0


def run(setting: Setting) -> None:
    """Run a stage: a kind, and of some kinds a cell and a dtype."""
    kind, *of = setting.stage.split(":")
    # Each imports what it needs: where one cannot be imported the others still run.
    if kind in ("device", "exchange"):
        from benchmarks.first_contact import device

        (device.measure if kind == "device" else device.exchange)(setting)
    elif kind == "norms":
        from benchmarks.first_contact import norms

        norms.measure(setting, *of)
    else:
        from benchmarks.first_contact import recurrent

        if kind == "cudnn":
            recurrent.cudnn(setting)
        elif kind == "hand":
            recurrent.by_hand(setting, *of)
        elif kind == "dependent":
            recurrent.dependent(setting, *of)
        else:
            recurrent.ours(setting, kind, *of)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
