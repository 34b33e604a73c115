"""Recurrent layers written for PyTorch, and the paper authors' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from layernorm.interop.source import Layout, Part, Source
from layernorm.variants import PRESETS, Cell, Variant

_TORCH_LAYOUTS = (Layout("{key}_l{layer}{direction}", ("", "_reverse")), Layout(is_cell=True))
_TORCH_KEYS = {
    "weight_ih": Part("weight_ih"),
    "weight_hh": Part("weight_hh"),
    "bias_ih": Part("bias_ih", optional=True),
    "bias_hh": Part("bias_hh", optional=True),
}
_TORCH_ORIGIN = "pytorch/pytorch, torch/nn/modules/rnn.py, {0} and {0}Cell"


def _norms(names: Mapping[str, tuple[str, str]]) -> dict[str, Part]:
    """Return the weight and bias of LayerNorm modules by name, and the parameters that they are."""
    return {
        f"{norm}.{name}": Part(to)
        for norm, parameters in names.items()
        for name, to in zip(("weight", "bias"), parameters, strict=True)
    }


def _norms_of_gates(template: str, gates: Mapping[str, str]) -> dict[str, Part]:
    """Return likewise what each gate has for itself, by what the source calls it."""
    return {
        f"{template.format(theirs)}.{name}": Part(to, gates=gate)
        for theirs, gate in gates.items()
        for name, to in (("weight", "gain"), ("bias", "bias"))
    }


_FASTRNNS_KEYS = {
    "weight_ih": Part("weight_ih"),
    "weight_hh": Part("weight_hh"),
    **_norms(
        {
            "layernorm_i": ("gain_ih", "bias"),
            "layernorm_h": ("gain_hh", "bias"),
            "layernorm_c": ("gain_cell", "bias_cell"),
        }
    ),
}
_FASTRNNS_FORMULA = (
    "i, f, g, o = norm(W_ih x) + norm(W_hh h), each norm over 4H; c' = norm(σ(f)·c + "
    "σ(i)·tanh(g)) is carried "
    "on; h' = σ(o)·tanh(c')"
)
_CELL_LAYOUTS = (Layout("layers.{layer}.cell.{key}"), Layout("cell.{key}"), Layout(is_cell=True))
_FASTRNNS_LAYOUTS = (
    Layout("layers.{layer}.directions.{direction}.cell.{key}", ("0", "1")),
    *_CELL_LAYOUTS,
)
_RNN_UTIL_LAYOUTS = (
    Layout("rnn_cells.{layer}.{direction}.{key}", ("0", "1")),
    Layout(is_cell=True),
)

SOURCES: Final[Mapping[str, Mapping[Cell, Source]]] = {
    "torch.nn": {
        "lstm": Source(
            cell="lstm",
            origin=_TORCH_ORIGIN.format("LSTM"),
            formula="i, f, g, o = W_ih x + b_ih + W_hh h + b_hh; c' = σ(f)·c + σ(i)·tanh(g); "
            "h' = σ(o)·tanh(c'), projected with proj_size",
            variant=PRESETS["none"]["lstm"],
            order="ifgo",
            keys={**_TORCH_KEYS, "weight_hr": Part("weight_hr", optional=True)},
            layouts=_TORCH_LAYOUTS,
        ),
        "gru": Source(
            cell="gru",
            origin=_TORCH_ORIGIN.format("GRU"),
            formula="r, z = σ(W_ih x + b_ih + W_hh h + b_hh); n = tanh(W_in x + b_in + r·(W_hn h + b_hn)); "
            "h' = (1 - z)·n + z·h",
            variant=PRESETS["none"]["gru"],
            order="rzn",
            keys=_TORCH_KEYS,
            layouts=_TORCH_LAYOUTS,
        ),
        "rnn": Source(
            cell="rnn",
            origin=_TORCH_ORIGIN.format("RNN"),
            formula="h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu",
            variant=PRESETS["none"]["rnn"],
            order="h",
            keys=_TORCH_KEYS,
            layouts=_TORCH_LAYOUTS,
        ),
    },
    "haste": {
        "lstm": Source(
            cell="lstm",
            origin="lmnt-com/haste, frameworks/pytorch/layer_norm_lstm.py, LayerNormLSTM",
            formula="i, g, f, o = norm(x·kernel) + norm(h·recurrent_kernel) + bias, each norm "
            "over 4H with a gain "
            "alone; c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(norm(c'))",
            variant=PRESETS["haste"]["lstm"],
            order="igfo",
            keys={
                "kernel": Part("weight_ih", transposed=True),
                "recurrent_kernel": Part("weight_hh", transposed=True),
                "bias": Part("bias"),
                "gamma": Part(("gain_ih", "gain_hh"), stacked=True),
                "gamma_h": Part("gain_cell"),
                "beta_h": Part("bias_cell"),
            },
            layouts=(Layout(),),
            classes=("LayerNormLSTM",),
        ),
        "gru": Source(
            cell="gru",
            origin="lmnt-com/haste, frameworks/pytorch/layer_norm_gru.py, LayerNormGRU",
            formula="z, r, g = norm(x·kernel) + bias and norm(h·recurrent_kernel) + "
            "recurrent_bias, each norm "
            "over 3H with a gain alone; h' = z·h + (1 - z)·tanh(g_x + r·g_h)",
            variant=PRESETS["haste"]["gru"],
            order="zrn",
            keys={
                "kernel": Part("weight_ih", transposed=True),
                "recurrent_kernel": Part("weight_hh", transposed=True),
                "bias": Part("bias"),
                "recurrent_bias": Part("bias_hn"),
                "gamma": Part(("gain_ih", "gain_hh"), stacked=True),
            },
            layouts=(Layout(),),
            classes=("LayerNormGRU",),
        ),
    },
    "kiros": {
        "lstm": Source(
            cell="lstm",
            origin="ryankiros/layer-norm, layers.py, lnlstm_layer",
            formula="i, f, o, g = norm(x·W + b)·s1 + b1 + norm(h·U)·s2 + b2 + b, each norm over "
            "4H: b is both "
            "inside and after; c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(norm(c')·s3 + b3)",
            variant=PRESETS["kiros"]["lstm"],
            order="ifog",
            keys={
                "W": Part("weight_ih", transposed=True),
                "U": Part("weight_hh", transposed=True),
                "b": (Part("bias_ih"), Part("bias")),
                "s1": Part("gain_ih"),
                "b1": Part("bias"),
                "s2": Part("gain_hh"),
                "b2": Part("bias"),
                "s3": Part("gain_cell"),
                "b3": Part("bias_cell"),
            },
            layouts=(Layout(),),
        ),
        "gru": Source(
            cell="gru",
            origin="ryankiros/layer-norm, layers.py, lngru_layer",
            formula="r, u = σ(norm(x·W + b)·s1 + b1 + norm(h·U)·s3 + b3), each norm over 2H; "
            "n = tanh(norm(x·Wx + bx)·s2 + b2 + r·(norm(h·Ux)·s4 + b4)), each over H; h' = u·h + (1 - u)·n",
            variant=PRESETS["kiros"]["gru"],
            order="rzn",
            keys={
                "W": Part("weight_ih", gates="rz", transposed=True),
                "b": Part("bias_ih", gates="rz"),
                "U": Part("weight_hh", gates="rz", transposed=True),
                "Wx": Part("weight_ih", gates="n", transposed=True),
                "bx": Part("bias_ih", gates="n"),
                "Ux": Part("weight_hh", gates="n", transposed=True),
                "s1": Part("gain_ih", gates="rz"),
                "b1": Part("bias", gates="rz"),
                "s2": Part("gain_ih", gates="n"),
                "b2": Part("bias", gates="n"),
                "s3": Part("gain_hh", gates="rz"),
                "b3": Part("bias", gates="rz"),
                "s4": Part("gain_hh", gates="n"),
                "b4": Part("bias_hn", gates="n"),
            },
            layouts=(Layout(),),
        ),
    },
    "fastrnns": {
        "lstm": Source(
            cell="lstm",
            origin="pytorch/pytorch, benchmarks/fastrnns/custom_lstms.py, LayerNormLSTMCell; "
            "DI-star has it too",
            formula=_FASTRNNS_FORMULA,
            variant=PRESETS["fastrnns"]["lstm"],
            order="ifgo",
            keys=_FASTRNNS_KEYS,
            layouts=_FASTRNNS_LAYOUTS,
        )
    },
    "nemo": {
        "lstm": Source(
            cell="lstm",
            origin="NVIDIA/NeMo, nemo/collections/common/parts/rnn.py, ln_lstm and LayerNormLSTMCell",
            formula=_FASTRNNS_FORMULA,
            variant=PRESETS["nemo"]["lstm"],
            order="ifgo",
            keys=_FASTRNNS_KEYS,
            layouts=_FASTRNNS_LAYOUTS,
        )
    },
    "torchaudio": {
        "lstm": Source(
            cell="lstm",
            origin="pytorch/audio, torchaudio/models/rnnt.py, _CustomLSTM with layer_norm=True",
            formula="i, f, c, o = norm(x2g x + p2g h) over 4H; c' = norm(σ(f)·c + σ(i)·tanh(c)) "
            "is carried on; "
            "h' = σ(o)·tanh(c')\nemformer_rnnt_base has an eps of 1e-3.",
            variant=PRESETS["torchaudio"]["lstm"],
            order="ifgo",
            keys={
                "x2g.weight": Part("weight_ih"),
                "p2g.weight": Part("weight_hh"),
                **_norms({"c_norm": ("gain_cell", "bias_cell"), "g_norm": ("gain", "bias")}),
            },
            layouts=(Layout(), Layout("lstm_layers.{layer}.{key}")),
            classes=("_CustomLSTM",),
        )
    },
    "icefall": {
        "lstm": Source(
            cell="lstm",
            origin="k2-fsa/icefall, egs/librispeech/ASR/transducer/rnn.py, LayerNormLSTM and "
            "LayerNormLSTMCell",
            formula="i, f, g, o = norm(W_ih x + b_ih + W_hh h + b_hh), each gate by itself; "
            "c' = norm(σ(f)·c + σ(i)·tanh(g)) is carried on; h' = σ(o)·tanh(c'), projected with proj_size",
            variant=PRESETS["icefall"]["lstm"],
            order="ifgo",
            keys={
                **_TORCH_KEYS,
                "weight_hr": Part("weight_hr", optional=True),
                **_norms_of_gates("layernorm_{}", {"i": "i", "f": "f", "cx": "g", "o": "o"}),
                **_norms({"layernorm_cy": ("gain_cell", "bias_cell")}),
            },
            layouts=_CELL_LAYOUTS,
            classes=("LayerNormLSTM", "LayerNormLSTMCell"),
        ),
        "gru": Source(
            cell="gru",
            origin="k2-fsa/icefall, egs/librispeech/ASR/transducer/rnn.py, LayerNormGRU and LayerNormGRUCell",
            formula="r, i = σ(norm(W_ih x + b_ih + W_hh h + b_hh)), n = tanh(norm(W_in x + b_in + "
            "r·(W_hn h + b_hn))), each over H; h' = n + i·(h - n)",
            variant=PRESETS["icefall"]["gru"],
            order="rzn",
            keys={
                **_TORCH_KEYS,
                **_norms_of_gates("layernorm_{}", {"r": "r", "i": "z", "n": "n"}),
            },
            layouts=_CELL_LAYOUTS,
            classes=("LayerNormGRU", "LayerNormGRUCell"),
        ),
    },
    "bertsum": {
        "lstm": Source(
            cell="lstm",
            origin="nlpyang/BertSum, src/models/rnn.py, LayerNormLSTMCell, which many have from "
            "PyTorch's issue 11335",
            formula="i, f, o, g = norm(W_ih x + b_ih) + norm(W_hh h + b_hh), each norm over 4H; "
            "c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(norm(c'))\nCopies that have g before o, or "
            "norm(tanh(c')), compute something else with the same names.",
            variant=PRESETS["kiros"]["lstm"],
            order="ifog",
            keys={
                **_TORCH_KEYS,
                **_norms(
                    {
                        "ln_ih": ("gain_ih", "bias"),
                        "ln_hh": ("gain_hh", "bias"),
                        "ln_ho": ("gain_cell", "bias_cell"),
                    }
                ),
            },
            classes=("LayerNormLSTMCell",),
        )
    },
    "labml": {
        "lstm": Source(
            cell="lstm",
            origin="labmlai/annotated_deep_learning_paper_implementations, labml_nn/lstm, LSTM and LSTMCell "
            "with layer_norm=True",
            formula="i, f, g, o = norm(W_h h + b + W_x x), each gate by itself; c' = σ(f)·c + σ(i)·tanh(g); "
            "h' = σ(o)·tanh(norm(c'))",
            variant=Variant(inputs="summed", scope="gate", projection_bias=True),
            order="ifgo",
            keys={
                "hidden_lin.weight": Part("weight_hh"),
                "hidden_lin.bias": Part("bias_ih"),
                "input_lin.weight": Part("weight_ih"),
                **_norms_of_gates("layer_norm.{}", dict(zip("0123", "ifgo", strict=True))),
                **_norms({"layer_norm_c": ("gain_cell", "bias_cell")}),
            },
            layouts=(Layout("cells.{layer}.{key}"), Layout(is_cell=True)),
        )
    },
    "di-engine": {
        "lstm": Source(
            cell="lstm",
            origin="opendilab/DI-engine, ding/torch_utils/network/rnn.py, LSTM with "
            "norm_type='LN'; DI-star has "
            "it too",
            formula="i, f, o, u = norm(x·wx) + norm(h·wh) + bias, each norm over 4H; c' = "
            "σ(f)·c + σ(i)·tanh(u); "
            "h' = σ(o)·tanh(c')",
            variant=Variant(cell="none"),
            order="ifog",
            keys={
                "wx.{layer}": Part("weight_ih", transposed=True),
                "wh.{layer}": Part("weight_hh", transposed=True),
                "bias": Part("bias"),
                **_norms({"norm.{even}": ("gain_ih", "bias"), "norm.{odd}": ("gain_hh", "bias")}),
            },
            layouts=(Layout(),),
            across_layers=("bias",),
        )
    },
    "lstms.pth": {
        "lstm": Source(
            cell="lstm",
            origin="seba-1511/lstms.pth, lstms/lstm.py, LayerNormLSTM",
            formula="i, f, o, g = norm(i2h(x)) + norm(h2h(h)), each norm over 4H, of an unbiased variance; "
            "c' = norm(σ(f)·c + σ(i)·tanh(g)) is carried on; h' = σ(o)·tanh(c')",
            variant=Variant(cell="carried", eps=1e-6),
            order="ifog",
            keys={
                "i2h.weight": Part("weight_ih"),
                "i2h.bias": Part("bias_ih", optional=True),
                "h2h.weight": Part("weight_hh"),
                "h2h.bias": Part("bias_hh", optional=True),
                **{
                    f"{norm}.{name}": Part(to, stacked=True)
                    for norm, parameters in (
                        ("ln_i2h", ("gain_ih", "bias")),
                        ("ln_h2h", ("gain_hh", "bias")),
                        ("ln_cell", ("gain_cell", "bias_cell")),
                    )
                    for name, to in zip(("alpha", "beta"), parameters, strict=True)
                },
            },
            layouts=(Layout("params.{layer}.{key}"), Layout(is_cell=True)),
            is_unbiased=True,
        )
    },
    "adept": {
        "lstm": Source(
            cell="lstm",
            origin="heronsystems/adeptRL, adept/modules/sequence.py, LSTMCellLayerNorm",
            formula="i, f, o, g = ih(x) + hh(h), without a norm; c' = norm(σ(f)·c + σ(i)·tanh(g)) is "
            "carried on; h' = σ(o)·tanh(c')",
            variant=Variant(inputs="plain", cell="carried"),
            order="ifog",
            keys={
                "ih.weight": Part("weight_ih"),
                "ih.bias": Part("bias_ih", optional=True),
                "hh.weight": Part("weight_hh"),
                "hh.bias": Part("bias_hh", optional=True),
                **_norms({"ln_cell": ("gain_cell", "bias_cell")}),
            },
            classes=("LSTMCellLayerNorm",),
        )
    },
    "pytorch-rnn-util": {
        "lstm": Source(
            cell="lstm",
            origin="daehwannam/pytorch-rnn-util, rnn_util/seq.py, LayerNormLSTMCell and LayerNormLSTM",
            formula="f, i, o, u = norm(W [x, h]), each gate by itself; c' = norm(σ(f)·c + σ(i)·tanh(u)) is "
            "carried on; h' = σ(o)·tanh(c')",
            variant=Variant(inputs="summed", scope="gate", cell="carried"),
            order="fiog",
            keys={
                "fiou_linear.weight": Part(("weight_ih", "weight_hh")),
                **_norms_of_gates("fiou_ln_layers.{}", dict(zip("0123", "fiog", strict=True))),
                **_norms({"cell_ln": ("gain_cell", "bias_cell")}),
            },
            layouts=_RNN_UTIL_LAYOUTS,
            classes=("LayerNormLSTM", "LayerNormLSTMCell"),
        ),
        "rnn": Source(
            cell="rnn",
            origin="daehwannam/pytorch-rnn-util, rnn_util/seq.py, LayerNormRNNCell",
            formula="h' = tanh(norm(W [x, h]))",
            variant=PRESETS["paper"]["rnn"],
            order="h",
            keys={
                "linear.weight": Part(("weight_ih", "weight_hh")),
                **_norms({"layer_norm": ("gain", "bias")}),
            },
            layouts=_RNN_UTIL_LAYOUTS,
        ),
    },
}

__all__ = ["SOURCES"]
