"""Kernels for GPUs, in Triton. Importing this package imports no Triton; ``kernels.norm`` does."""
