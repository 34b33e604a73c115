"""Show what each norm averages, and what follows for batches and for time steps."""

from layernorm.experiments.studies.explain.study import STUDY

__all__ = ["STUDY"]
