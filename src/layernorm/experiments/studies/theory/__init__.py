"""The paper's analysis, checked numerically: table 1, the geometry of §5.2, the implicit learning rates."""

from layernorm.experiments.studies.theory.study import STUDY

__all__ = ["STUDY"]
