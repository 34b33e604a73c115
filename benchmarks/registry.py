"""All benchmarks, in the order of the page."""

from __future__ import annotations

from typing import Final

from benchmarks.cells.measure import COMMAND as CELLS
from benchmarks.core.benchmark import Benchmark, Command
from benchmarks.gpu_norms.measure import COMMAND as GPU
from benchmarks.norms.measure import COMMAND as NORMS
from benchmarks.recurrent.measure import COMMAND as RECURRENT
from benchmarks.short_calls.measure import COMMAND as SHORT_CALLS
from benchmarks.stream.measure import COMMAND as STREAM
from benchmarks.updates.measure import COMMAND as UPDATES

#: A new benchmark is a command here.
COMMANDS: Final[tuple[Command, ...]] = (RECURRENT, SHORT_CALLS, STREAM, CELLS, UPDATES, NORMS, GPU)
#: Their tables.
BENCHMARKS: Final[tuple[Benchmark, ...]] = tuple(each for one in COMMANDS for each in one.benchmarks)
