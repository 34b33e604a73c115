"""The attentive reader of Hermann et al. 2015 (arXiv 1506.03340), the paper's §6.2 and figure 2."""

from layernorm.experiments.tasks.attentive_reader.task import TASK

__all__ = ["TASK"]
