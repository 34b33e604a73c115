"""What all benchmarks share: timing, workers, tables, plots and pages."""
