"""The recurrent layers on GPUs, in CUDA: the weights stay on the chip for a whole sequence."""
