"""Give the stages what they share: sizes, a clock, and the lines that they print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

#: Those first by which it is decided whether the persistent kernels stay.
HIDDEN: Final = (256, 512, 128, 1024)
BATCHES: Final = (16, 64)


@dataclass(frozen=True)
class Setting:
    """Describe what a stage measures.

    Attributes:
        stage: its name.
        rehearse: tiny sizes on the CPU, where Triton's kernels are interpreted.
        only_right: few steps, and no times.
        hidden: sizes.
        batches: sequences.
    """

    stage: str
    rehearse: bool = False
    only_right: bool = False
    hidden: tuple[int, ...] = HIDDEN
    batches: tuple[int, ...] = BATCHES

    @property
    def device(self) -> str:
        """Return where its tensors are."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Hidden size and batch of each point."""
        if self.rehearse:
            return ((16, 2),)
        return tuple((hidden, batch) for hidden in self.hidden for batch in self.batches)

    @property
    def steps(self) -> int:
        """Return the steps of the sequences that are timed."""
        return 3 if self.rehearse else 512

    def emit(self, **fields: Any) -> None:
        """Print a line of figures; one of a rehearsal says so."""
        mark = {"rehearsal": True} if self.rehearse else {}
        sys.stdout.write(json.dumps({"stage": self.stage, **mark, **fields}) + "\n")
        sys.stdout.flush()

    def microseconds(self, call: Callable[[], object]) -> float:
        """Return the median time of a call, which is one call's in a rehearsal."""
        if self.rehearse:
            began = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - began)
        from triton import testing

        return 1e3 * float(testing.do_bench(call, warmup=30, rep=100, return_mode="median"))

    def a_step(self, call: Callable[[], object]) -> float:
        """Return the microseconds of a step where a call takes all of them."""
        return round(self.microseconds(call) / self.steps, 3)


def off(found: Tensor, exact: Tensor) -> float | None:
    """Return the error relative to the norm of what is exact; None where a number is not finite."""
    wide, right = found.double(), exact.double()
    if not wide.isfinite().all():
        return None
    return float(f"{float((wide - right).norm() / right.norm().clamp_min(1e-30)):.2e}")
