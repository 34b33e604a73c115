"""Skip-thought vectors: the paper's §6.3, figure 3 and table 3."""

from layernorm.experiments.tasks.skip_thoughts.task import TASK

__all__ = ["TASK"]
