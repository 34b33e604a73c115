"""Cells of reinforcement learning: world models and recurrent policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from layernorm.interop.source import Constant, Layout, Part, Source
from layernorm.variants import PRESETS, Cell, Variant

_DREAMER = PRESETS["sheeprl"]["gru"]
_UPDATE_BIAS = {"update_bias": Constant("z", -1.0)}
_DREAMER_FORMULA = (
    "r, n, u = norm(W [{order}]) over all 3H; h' = u·tanh(r·n) + (1 - u)·h, r = σ(r), u = σ(u + update_bias)"
)

SOURCES: Final[Mapping[str, Mapping[Cell, Source]]] = {
    "sheeprl": {
        "gru": Source(
            cell="gru",
            origin="Eclectic-Sheep/sheeprl, sheeprl/models/models.py, LayerNormGRUCell",
            formula=_DREAMER_FORMULA.format(order="h, x") + "\nDreamer V2's has linear.bias and eps 1e-5.",
            variant=_DREAMER,
            order="rnz",
            keys={
                "linear.weight": Part(("weight_hh", "weight_ih")),
                "linear.bias": Part("bias_ih", optional=True),
                "layer_norm.weight": Part("gain"),
                "layer_norm.bias": Part("bias"),
            },
            update="candidate",
            constants=_UPDATE_BIAS,
            classes=("LayerNormGRUCell",),
        )
    },
    "dreamerv3-torch": {
        "gru": Source(
            cell="gru",
            origin="NM512/dreamerv3-torch, networks.py, GRUCell with norm=True",
            formula=_DREAMER_FORMULA.format(order="x, h"),
            variant=_DREAMER,
            order="rnz",
            keys={
                "GRU_linear.weight": Part(("weight_ih", "weight_hh")),
                "GRU_norm.weight": Part("gain"),
                "GRU_norm.bias": Part("bias"),
            },
            layouts=(
                Layout("layers.{key}", is_cell=True),
                Layout(
                    is_cell=True,
                    renamed={
                        "GRU_linear.weight": "_layer.weight",
                        "GRU_norm.weight": "_norm.weight",
                        "GRU_norm.bias": "_norm.bias",
                    },
                ),
            ),
            update="candidate",
            constants={"update_bias": Constant("z", -1.0, ("_update_bias",))},
        )
    },
    "dreamerv2": {
        "gru": Source(
            cell="gru",
            origin="danijar/dreamerv2, dreamerv2/common/nets.py, GRUCell with norm=True",
            formula=_DREAMER_FORMULA.format(order="x, h") + "\nThe product has a bias, inside the norm.",
            variant=_DREAMER,
            order="rnz",
            keys={
                "dense/kernel": Part(("weight_ih", "weight_hh"), transposed=True),
                "dense/bias": Part("bias_ih"),
                "layer_normalization/gamma": Part("gain"),
                "layer_normalization/beta": Part("bias"),
            },
            update="candidate",
            constants=_UPDATE_BIAS,
        )
    },
    "dreamerv3": {
        "gru": Source(
            cell="gru",
            origin="danijar/dreamerv3 of 2023, nets.py, RSSM",
            formula=_DREAMER_FORMULA.format(order="h, x"),
            variant=_DREAMER,
            order="rnz",
            keys={
                "gru/kernel": Part(("weight_hh", "weight_ih"), transposed=True),
                "gru/norm/scale": Part("gain"),
                "gru/norm/bias": Part("bias"),
            },
            update="candidate",
            constants=_UPDATE_BIAS,
        )
    },
    "innereye": {
        "gru": Source(
            cell="gru",
            origin="microsoft/InnerEye-DeepLearning, InnerEye/ML/models/architectures/sequential/gru.py, "
            "LayerNormGRUCell and LayerNormGRU with use_layer_norm=True",
            formula="r, z = σ(norm(W_ih x + W_hh h)), n = tanh(norm(W_in x + r·W_hn h)), each over H; "
            "h' = (1 - z)·n + z·h",
            variant=Variant(inputs="summed", scope="gate"),
            order="rzn",
            keys={
                "weight_ih": Part("weight_ih"),
                "weight_hh": Part("weight_hh"),
                **{
                    f"ln_{gate}.{name}": Part(to, gates=gate)
                    for gate in "rzn"
                    for name, to in (("weight", "gain"), ("bias", "bias"))
                },
            },
            layouts=(Layout(is_cell=True), Layout("cells.{layer}.{key}")),
            classes=("LayerNormGRUCell",),
        )
    },
}

__all__ = ["SOURCES"]
