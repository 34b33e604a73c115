"""The benchmarks that the project publishes: ``python -m benchmarks NAME``.

To add one, make a folder with

- ``measure.py``: the point of its grid (a dataclass), a ``BENCHMARK`` that declares axes, peers, rounds and
  columns, and the function that measures a point: it makes the peers ``ready``, takes a ``sample`` of them,
  and returns ``peer_rows``. The file ends with ``serve(measure)``, since it is run as a worker.
- ``peers.py``: ``PEERS``, by name what makes each peer ready for a point.
- ``report.py``: ``REPORT``, its section of the page: parts of ``core.sections``, or a ``Part`` of its own.

and add its ``COMMAND`` to ``registry.py``. Options, resuming, tables, summaries, pictures and the page follow
from what is declared (``core``), in ``results/NAME.csv`` and ``docs/benchmarks.md``.
"""
