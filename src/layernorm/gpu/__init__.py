"""Kernels for GPUs. Importing this package imports no Triton; the operators inside do."""
