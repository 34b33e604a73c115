"""Write the part of the page that says what the benchmark of a world model's updates found."""

from __future__ import annotations

from typing import Final

from benchmarks.core import sections
from benchmarks.world_model.measure import BENCHMARK
from benchmarks.world_model.peers import ACTIONS, RATE

_METHOD: Final = """\
### How a world model's updates are measured

- The model is the recurrence of Dreamer and its like without what surrounds it: in each of {steps} steps
  x = elu(A [z, a]), h = cell(x, h) and z = B h, from zeros and with given actions of {actions} features;
  x, h and z have as many features as the table's column says.
- A call is one whole update in float32: forward, the mean squared error of all z to given targets,
  backward, and `torch.optim.Adam` with a rate of {rate:g} and its other defaults.
- `layernorm` has `LayerNormGRUCell(variant="sheeprl")`, `torch` that cell as sheeprl writes it: a linear
  layer of state and input, a layer norm of all gates, pointwise functions.
- Both begin with the same weights. Before they are measured, outputs and gradients, and the outputs after an
  update, are compared; column `difference` has by how much they differ. Learning continues from call to call.
- Both run in one process and are sampled in turn, in an order that changes from round to round. {rounds}
  Times are medians, and so are ratios, of those within a round.
- There is a process for each number of threads. With one thread it may run on one CPU only.
"""

REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Training updates of a world model",
    order=("threads", "batch", "hidden", "steps"),
    parts=(
        sections.Environments(packages={}),
        sections.Summary(
            sections.as_given("threads"),
            (sections.Against("the cell by hand", value=sections.in_rounds),),
            "world model, {keys}: speed over {all}",
        ),
        sections.Points(
            sections.as_given("threads", "batch", "hidden", "steps", "kernel"),
            (sections.RATIO,),
            "Times of one update in µs; the ratio is `layernorm`'s speed over `torch`'s, by hand.",
        ),
    ),
    method=_METHOD,
    facts={"actions": ACTIONS, "rate": RATE},
)
