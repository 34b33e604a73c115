"""Order-embeddings of images and captions: the paper's §6.1, figure 1 and table 2."""

from layernorm.experiments.tasks.order_embeddings.task import TASK

__all__ = ["TASK"]
