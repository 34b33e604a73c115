"""The norms on GPUs."""
