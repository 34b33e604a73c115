"""One trained network in batches of any size, step by step, and in training mode: is it the same function?"""

from layernorm.experiments.studies.online.study import STUDY

__all__ = ["STUDY"]
