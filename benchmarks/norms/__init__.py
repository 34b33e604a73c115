"""The norms on CPUs."""
