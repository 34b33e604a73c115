"""The benchmarks that the project publishes: ``python -m benchmarks recurrent``, ``stream``, ``norms``."""
