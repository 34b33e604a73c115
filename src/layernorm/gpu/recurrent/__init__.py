"""The recurrent layers on GPUs, in Triton, for any size and variant."""
