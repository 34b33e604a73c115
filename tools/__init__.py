"""Programs for developers, run in a checkout as ``python -m tools.NAME``."""
