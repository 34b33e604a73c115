"""Cells written for TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from layernorm.interop.source import Constant, Layout, Part, Source
from layernorm.variants import PRESETS, Cell, Variant

_LINGVO = Variant(inputs="summed", scope="gate", cell="none", eps=1e-8, cell_clip=10.0)
_RESET_BEFORE = Variant(kind="none", reset_after=False)
_LINGVO_GATES = {"i_i": "g", "i_g": "i", "f_g": "f", "o_g": "o"}
_BIDIRECTIONAL = Layout("{direction}/{key}", ("forward", "backward"))


def _matrices(kernel: str = "kernel", recurrent: str = "recurrent_kernel") -> dict[str, Part]:
    return {
        kernel: Part("weight_ih", transposed=True),
        recurrent: Part("weight_hh", transposed=True),
    }


def _norms(**names: tuple[str, str]) -> dict[str, Part]:
    """Return the gamma and beta of norms by name, and the parameters that they are."""
    return {
        f"{norm}/{name}": Part(to)
        for norm, parameters in names.items()
        for name, to in zip(("gamma", "beta"), parameters, strict=True)
    }


SOURCES: Final[Mapping[str, Mapping[Cell, Source]]] = {
    "keras": {
        "lstm": Source(
            cell="lstm",
            origin="keras-team/keras, keras/src/layers/rnn/lstm.py, LSTM and LSTMCell",
            formula="i, f, c, o = x·kernel + h·recurrent_kernel + bias; c' = σ(f)·c + σ(i)·tanh(c); "
            "h' = σ(o)·tanh(c')",
            variant=PRESETS["none"]["lstm"],
            order="ifgo",
            keys={**_matrices(), "bias": Part("bias_ih", optional=True)},
            layouts=(Layout(), _BIDIRECTIONAL),
        ),
        "gru": Source(
            cell="gru",
            origin="keras-team/keras, keras/src/layers/rnn/gru.py, GRU and GRUCell with reset_after=True",
            formula="z, r, n as in torch.nn: n = tanh(x·kernel + b + r·(h·recurrent_kernel + b')); "
            "h' = z·h + (1 - z)·n\nWith reset_after=False the function is that of "
            "keras-reset-before; without a bias the weights do not tell.",
            variant=PRESETS["none"]["gru"],
            order="zrn",
            keys={**_matrices(), "bias": Part(("bias_ih", "bias_hh"), stacked=True, optional=True)},
            layouts=(Layout(), _BIDIRECTIONAL),
        ),
        "rnn": Source(
            cell="rnn",
            origin="keras-team/keras, keras/src/layers/rnn/simple_rnn.py, SimpleRNN and SimpleRNNCell",
            formula="h' = tanh(x·kernel + h·recurrent_kernel + bias)",
            variant=PRESETS["none"]["rnn"],
            order="h",
            keys={**_matrices(), "bias": Part("bias_ih", optional=True)},
            layouts=(Layout(), _BIDIRECTIONAL),
        ),
    },
    "keras-reset-before": {
        "gru": Source(
            cell="gru",
            origin="keras-team/keras, keras/src/layers/rnn/gru.py, GRU and GRUCell with reset_after=False, "
            "which was the default of Keras 1 and 2 and of TensorFlow 1's tf.keras",
            formula="z, r = σ(x·kernel + h·recurrent_kernel + bias); "
            "n = tanh(x·kernel + (r·h)·recurrent_kernel + bias); h' = z·h + (1 - z)·n",
            variant=_RESET_BEFORE,
            order="zrn",
            keys={**_matrices(), "bias": Part("bias_ih", optional=True)},
            layouts=(Layout(), _BIDIRECTIONAL),
        ),
    },
    "tfa": {
        "lstm": Source(
            cell="lstm",
            origin="tensorflow/addons, tensorflow_addons/rnn/layer_norm_lstm_cell.py, LayerNormLSTMCell",
            formula="i, f, c, o = norm(x·kernel) + norm(h·recurrent_kernel) + bias, each norm over 4H; "
            "c' = norm(σ(f)·c + σ(i)·tanh(c)) is carried on; h' = σ(o)·tanh(c')",
            variant=PRESETS["tfa"]["lstm"],
            order="ifgo",
            keys={
                **_matrices(),
                "bias": Part("bias", optional=True),
                **_norms(
                    kernel_norm=("gain_ih", "bias"),
                    recurrent_norm=("gain_hh", "bias"),
                    state_norm=("gain_cell", "bias_cell"),
                ),
            },
        ),
        "rnn": Source(
            cell="rnn",
            origin="tensorflow/addons, tensorflow_addons/rnn/layer_norm_simple_rnn_cell.py, "
            "LayerNormSimpleRNNCell",
            formula="h' = tanh(norm(x·kernel + h·recurrent_kernel) + bias); the norm has a gain alone",
            variant=PRESETS["tfa"]["rnn"],
            order="h",
            keys={
                **_matrices(),
                "bias": Part("bias", optional=True),
                "layer_norm/gamma": Part("gain"),
            },
        ),
    },
    "tf1": {
        "lstm": Source(
            cell="lstm",
            origin="tensorflow/tensorflow 1, tensorflow/contrib/rnn/python/ops/rnn_cell.py, "
            "LayerNormBasicLSTMCell",
            formula="i, j, f, o = norm([x, h]·kernel), each gate by itself; "
            "c' = norm(σ(f + forget_bias)·c + σ(i)·tanh(j)) is carried on; h' = tanh(c')·σ(o)",
            variant=PRESETS["tf1"]["lstm"],
            order="igfo",
            keys={
                "kernel": Part(("weight_ih", "weight_hh"), transposed=True),
                **{
                    f"{name}/{end}": Part(to, gates=gate)
                    for name, gate in (("input", "i"), ("transform", "g"), ("forget", "f"), ("output", "o"))
                    for end, to in (("gamma", "gain"), ("beta", "bias"))
                },
                **_norms(state=("gain_cell", "bias_cell")),
            },
            constants={"forget_bias": Constant("f", 1.0)},
        ),
        "gru": Source(
            cell="gru",
            origin="tensorflow/tensorflow 1, tensorflow/python/ops/rnn_cell_impl.py, GRUCell",
            formula="r, u = σ([x, h]·gates/kernel + gates/bias); "
            "c = tanh([x, r·h]·candidate/kernel + candidate/bias); h' = u·h + (1 - u)·c",
            variant=_RESET_BEFORE,
            order="rzn",
            keys={
                f"{name}/{end}": part
                for name, gates in (("gates", "rz"), ("candidate", "n"))
                for end, part in (
                    ("kernel", Part(("weight_ih", "weight_hh"), gates=gates, transposed=True)),
                    ("bias", Part("bias_ih", gates=gates)),
                )
            },
        ),
    },
    "supercell": {
        "lstm": Source(
            cell="lstm",
            origin="hardmaru/supercell, supercell.py, LayerNormLSTMCell",
            formula="i, j, f, o = norm(x·W_xh + h·W_hh), each gate by itself; "
            "c' = σ(f + forget_bias)·c + σ(i)·tanh(j); h' = tanh(norm(c'))·σ(o)\n"
            "Its state is one array [h, c].",
            variant=Variant(inputs="summed", scope="gate", eps=1e-3),
            order="igfo",
            keys={
                **_matrices("W_xh", "W_hh"),
                **{
                    f"ln_{name}/layer_norm_{end}": Part(to, gates=gate)
                    for name, gate in (("i", "i"), ("j", "g"), ("f", "f"), ("o", "o"))
                    for end, to in (("alpha", "gain"), ("bias", "bias"))
                },
                "ln_c/layer_norm_alpha": Part("gain_cell"),
                "ln_c/layer_norm_bias": Part("bias_cell"),
            },
            constants={"forget_bias": Constant("f", 1.0)},
        )
    },
    "sonnet": {
        "lstm": Source(
            cell="lstm",
            origin="google-deepmind/sonnet 1, sonnet/python/modules/gated_rnn.py, LSTM with "
            "use_layer_norm=True",
            formula="i, j, f, o = norm([x, h]·w_gates) + b_gates, over 4H; "
            "c' = σ(f + forget_bias)·c + σ(i)·tanh(j); h' = σ(o)·tanh(c')",
            variant=Variant(inputs="summed", cell="none"),
            order="igfo",
            keys={
                "w_gates": Part(("weight_ih", "weight_hh"), transposed=True),
                "b_gates": Part("bias"),
                **_norms(layer_norm=("gain", "bias")),
            },
            constants={"forget_bias": Constant("f", 1.0)},
        )
    },
    "skip-thoughts": {
        "gru": Source(
            cell="gru",
            origin="tensorflow/models, research/skip_thoughts/skip_thoughts/ops/gru_cell.py, "
            "LayerNormGRUCell",
            formula="z, r = σ(norm(x·w_x) + norm(h·w_h)), each norm over 2H; "
            "n = tanh(norm(x·w) + r·norm(h·u)), each over H; h' = (1 - z)·h + z·n",
            variant=Variant(eps=1e-12),
            order="zrn",
            keys={
                "gates/w_h": Part("weight_hh", gates="zr", transposed=True),
                "gates/w_x": Part("weight_ih", gates="zr", transposed=True),
                **{
                    f"gates/layer_norm/{name}/{end}": Part(to, gates="zr")
                    for name, gain in (("w_h", "gain_hh"), ("w_x", "gain_ih"))
                    for end, to in (("gamma", gain), ("beta", "bias"))
                },
                "candidate/w": Part("weight_ih", gates="n", transposed=True),
                "candidate/u": Part("weight_hh", gates="n", transposed=True),
                "candidate/layer_norm/w/gamma": Part("gain_ih", gates="n"),
                "candidate/layer_norm/w/beta": Part("bias", gates="n"),
                "candidate/layer_norm/u/gamma": Part("gain_hh", gates="n"),
                "candidate/layer_norm/u/beta": Part("bias_hn", gates="n"),
            },
            update="candidate",
        )
    },
    "sketch-rnn": {
        "lstm": Source(
            cell="lstm",
            origin="magenta/magenta, magenta/models/sketch_rnn/rnn.py, LayerNormLSTMCell",
            formula="i, j, f, o = norm(x·W_xh + h·W_hh), each gate by itself; "
            "c' = σ(f + forget_bias)·c + σ(i)·tanh(j); h' = tanh(norm(c'))·σ(o)\n"
            "Its state is one array [h, c].",
            variant=Variant(inputs="summed", scope="gate", eps=1e-3),
            order="igfo",
            keys={
                **_matrices("W_xh", "W_hh"),
                "ln_all/ln_gamma": Part("gain"),
                "ln_all/ln_beta": Part("bias"),
                "ln_c/ln_gamma": Part("gain_cell"),
                "ln_c/ln_beta": Part("bias_cell"),
            },
            constants={"forget_bias": Constant("f", 1.0)},
        )
    },
    "baselines": {
        "lstm": Source(
            cell="lstm",
            origin="openai/baselines, baselines/a2c/utils.py, lnlstm",
            formula="i, f, o, u = norm(x·wx) + norm(h·wh) + b, each norm over 4H; "
            "c' = σ(f)·c + σ(i)·tanh(u); h' = σ(o)·tanh(norm(c'))\n"
            "Its state is one array [c, h], and its mask is resets.",
            variant=PRESETS["paper"]["lstm"],
            order="ifog",
            keys={
                "wx": Part("weight_ih", transposed=True),
                "gx": Part("gain_ih"),
                "bx": Part("bias"),
                "wh": Part("weight_hh", transposed=True),
                "gh": Part("gain_hh"),
                "bh": Part("bias"),
                "b": Part("bias"),
                "gc": Part("gain_cell"),
                "bc": Part("bias_cell"),
            },
        )
    },
    **{
        name: {
            "lstm": Source(
                cell="lstm",
                origin=f"tensorflow/lingvo, lingvo/core/rnn_cell.py, {cls}",
                formula="i_i, i_g, f, o = norm([x, m]·wm), each gate by itself, with a scale and a bias; "
                f"c' = σ(f)·c + σ(i_g)·tanh(i_i), {clipping}; m' = σ(o)·tanh({seen})",
                variant=variant,
                order="gifo",
                keys={"wm": Part(("weight_ih", "weight_hh"), transposed=True), **keys},
                constants=constants,
            )
        }
        for name, cls, clipping, seen, variant, keys, constants in (
            (
                "lingvo",
                "LayerNormalizedLSTMCell",
                "in [-10, 10]",
                "c'",
                _LINGVO,
                {"b": Part(("bias", "gain"), offset=1)},
                {"forget_gate_bias": Constant("f", 0.0)},
            ),
            (
                "lingvo-simple",
                "LayerNormalizedLSTMCellSimple",
                "in [-10, 10] (cell_value_cap)",
                "c'), projected with w_proj (num_hidden_nodes",
                _LINGVO,
                {
                    "b": Part("bias", optional=True),
                    "ln_scale": Part("gain"),
                    "w_proj": Part("weight_hr", transposed=True, optional=True),
                },
                {"forget_gate_bias": Constant("f", 0.0)},
            ),
            (
                "lingvo-lean",
                "LayerNormalizedLSTMCellLean",
                "carried on",
                "norm(c')), projected with w_proj (num_hidden_nodes",
                dataclasses.replace(_LINGVO, cell="output", cell_clip=None),
                {
                    **{
                        f"ln_scale_{gate}": Part("gain", gates=letter, offset=1)
                        for gate, letter in _LINGVO_GATES.items()
                    },
                    **{f"bias_{gate}": Part("bias", gates=letter) for gate, letter in _LINGVO_GATES.items()},
                    "ln_scale_c": Part("gain_cell", offset=1),
                    "bias_c": Part("bias_cell"),
                    "w_proj": Part("weight_hr", transposed=True, optional=True),
                },
                {},
            ),
        )
    },
    "tflite": {
        "lstm": Source(
            cell="lstm",
            origin="tensorflow/tensorflow, tensorflow/lite/kernels/lstm_eval.cc, LSTM with layer norm",
            formula="each gate norm(W x + U h)·coefficients + bias by itself; c' = σ(f)·c + σ(i)·tanh(g); "
            "h' = σ(o)·tanh(c'), projected where there is a projection\nA clipped cell is cell_clip.",
            variant=PRESETS["tflite"]["lstm"],
            order="ifgo",
            keys={
                **{
                    name.format(gate): Part(to, gates=letter)
                    for name, to in (
                        ("input_to_{}_weights", "weight_ih"),
                        ("recurrent_to_{}_weights", "weight_hh"),
                        ("{}_layer_norm_coefficients", "gain"),
                        ("{}_gate_bias", "bias"),
                    )
                    for gate, letter in (("input", "i"), ("forget", "f"), ("cell", "g"), ("output", "o"))
                },
                "projection_weights": Part("weight_hr", optional=True),
            },
            layouts=(Layout(),),
        )
    },
}

__all__ = ["SOURCES"]
