"""What each norm averages, in pictures and numbers, and what follows for batches and for time steps."""

from layernorm.experiments.studies.explain.study import STUDY

__all__ = ["STUDY"]
