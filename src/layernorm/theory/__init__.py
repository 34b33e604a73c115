"""The paper's analysis (§5), checked numerically: invariances, geometry, implicit learning rates."""

from layernorm.theory.growth import Step, weight_growth
from layernorm.theory.information import Block, compare_blocks, fisher, fisher_equation, kl_divergence
from layernorm.theory.invariances import (
    TRANSFORMATIONS,
    Invariance,
    invariance,
    invariance_table,
    network,
    weights,
)
from layernorm.theory.metric import (
    GainMetric,
    Scaling,
    compare_gain_metric,
    gain_metric,
    gain_metric_equation,
    scale_weights,
)
from layernorm.theory.models import FAMILIES, Family, Model, features, model, statistics

__all__ = [
    "FAMILIES",
    "TRANSFORMATIONS",
    "Block",
    "Family",
    "GainMetric",
    "Invariance",
    "Model",
    "Scaling",
    "Step",
    "compare_blocks",
    "compare_gain_metric",
    "features",
    "fisher",
    "fisher_equation",
    "gain_metric",
    "gain_metric_equation",
    "invariance",
    "invariance_table",
    "kl_divergence",
    "model",
    "network",
    "scale_weights",
    "statistics",
    "weight_growth",
    "weights",
]
