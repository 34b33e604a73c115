"""The norms on GPUs, in Triton."""
