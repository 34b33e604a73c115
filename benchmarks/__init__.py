"""The benchmarks that the project publishes: ``python -m benchmarks norms``."""
