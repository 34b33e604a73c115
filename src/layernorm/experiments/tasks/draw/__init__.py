"""DRAW on binarized MNIST, the paper's §6.4 and figure 4: layer norm on the LSTMs' cells alone."""

from layernorm.experiments.tasks.draw.task import TASK

__all__ = ["TASK"]
