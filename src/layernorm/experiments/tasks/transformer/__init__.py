"""A transformer on characters."""

from layernorm.experiments.tasks.transformer.task import TASK

__all__ = ["TASK"]
