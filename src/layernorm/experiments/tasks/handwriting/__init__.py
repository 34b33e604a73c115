"""Handwriting of a given text: the paper's §6.5 and figure 5, long sequences in small batches."""

from layernorm.experiments.tasks.handwriting.task import TASK

__all__ = ["TASK"]
