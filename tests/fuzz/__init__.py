"""A differential fuzz of the package against float64 and wider: see ``CONTRIBUTING.md``."""
