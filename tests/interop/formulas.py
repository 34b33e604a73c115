"""The formulas of the sources, written out in NumPy from their code and not from this package's tables.

Each has the shapes of the source's tensors, by the names that they have there, and one step, which takes
them, the input and the state and gives the state. They are analytic functions, so they also take complex
numbers, whose imaginary part is then a derivative (Squire and Trapp, 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

F, H, P = 4, 5, 3

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Formula:
    """One step of a source, with the shapes of its tensors."""

    shapes: Mapping[str, tuple[int, ...]]
    step: Callable[..., tuple[np.ndarray, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    output: int = H


FORMULAS: Final[dict[tuple[str, str], Formula]] = {}


def formula(name: str, cell: str, shapes: Mapping[str, tuple[int, ...]], output: int = H, **options: Any):
    def add(step):
        FORMULAS[name, cell] = Formula(shapes, step, options, output)
        return step

    return add


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def ln(a, gain=1.0, bias=0.0, eps=1e-5):
    mean = a.mean(-1, keepdims=True)
    var = ((a - mean) ** 2).mean(-1, keepdims=True)
    return (a - mean) / np.sqrt(var + eps) * gain + bias


def split(a, count):
    return np.split(a, count, -1)


def cat(*parts):
    return np.concatenate(parts, -1)


def norms(**sizes):
    return {f"{name}.{end}": (size,) for name, size in sizes.items() for end in ("weight", "bias")}


def affine(w, name):
    return w[f"{name}.weight"], w[f"{name}.bias"]


# ---- PyTorch ----


def torch_shapes(gates):
    shapes = {"weight_ih": (gates * H, F), "weight_hh": (gates * H, H)}
    return shapes | {"bias_ih": (gates * H,), "bias_hh": (gates * H,)}


@formula(
    "torch.nn",
    "lstm",
    {f"{name}_l0": shape for name, shape in torch_shapes(4).items()}
    | {"weight_hh_l0": (4 * H, P), "weight_hr_l0": (P, H)},
    P,
)
def torch_lstm(w, x, h, c):
    v = x @ w["weight_ih_l0"].T + w["bias_ih_l0"] + h @ w["weight_hh_l0"].T + w["bias_hh_l0"]
    i, f, g, o = split(v, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c) @ w["weight_hr_l0"].T, c


@formula("torch.nn", "gru", torch_shapes(3))
def torch_gru(w, x, h):
    (xr, xz, xn), (hr, hz, hn) = (
        split(a @ w[f"weight_{side}"].T + w[f"bias_{side}"], 3) for a, side in ((x, "ih"), (h, "hh"))
    )
    z = sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * h,)


@formula("torch.nn", "rnn", torch_shapes(1))
def torch_rnn(w, x, h):
    return (np.tanh(x @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]),)


@formula(
    "haste",
    "lstm",
    {
        "kernel": (F, 4 * H),
        "recurrent_kernel": (H, 4 * H),
        "bias": (4 * H,),
        "gamma": (2, 4 * H),
        "gamma_h": (H,),
        "beta_h": (H,),
    },
)
def haste_lstm(w, x, h, c):
    v = ln(x @ w["kernel"], w["gamma"][0]) + ln(h @ w["recurrent_kernel"], w["gamma"][1]) + w["bias"]
    i, g, f, o = split(v, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(ln(c, w["gamma_h"], w["beta_h"])), c


@formula(
    "haste",
    "gru",
    {
        "kernel": (F, 3 * H),
        "recurrent_kernel": (H, 3 * H),
        "bias": (3 * H,),
        "recurrent_bias": (3 * H,),
        "gamma": (2, 3 * H),
    },
)
def haste_gru(w, x, h):
    xz, xr, xg = split(ln(x @ w["kernel"], w["gamma"][0]) + w["bias"], 3)
    hz, hr, hg = split(ln(h @ w["recurrent_kernel"], w["gamma"][1]) + w["recurrent_bias"], 3)
    z, r = sigmoid(xz + hz), sigmoid(xr + hr)
    return (z * h + (1 - z) * np.tanh(xg + r * hg),)


@formula(
    "kiros",
    "lstm",
    {"W": (F, 4 * H), "U": (H, 4 * H), "b": (4 * H,)}
    | dict.fromkeys(("s1", "b1", "s2", "b2"), (4 * H,))
    | {"s3": (H,), "b3": (H,)},
)
def kiros_lstm(w, x, h, c):
    v = ln(x @ w["W"] + w["b"], w["s1"], w["b1"]) + ln(h @ w["U"], w["s2"], w["b2"]) + w["b"]
    i, f, o, g = split(v, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(ln(c, w["s3"], w["b3"])), c


@formula(
    "kiros",
    "gru",
    {"W": (F, 2 * H), "U": (H, 2 * H), "b": (2 * H,), "Wx": (F, H), "Ux": (H, H), "bx": (H,)}
    | dict.fromkeys(("s1", "b1", "s3", "b3"), (2 * H,))
    | dict.fromkeys(("s2", "b2", "s4", "b4"), (H,)),
)
def kiros_gru(w, x, h):
    rz = ln(x @ w["W"] + w["b"], w["s1"], w["b1"]) + ln(h @ w["U"], w["s3"], w["b3"])
    r, u = split(sigmoid(rz), 2)
    n = np.tanh(ln(x @ w["Wx"] + w["bx"], w["s2"], w["b2"]) + r * ln(h @ w["Ux"], w["s4"], w["b4"]))
    return (u * h + (1 - u) * n,)


FASTRNNS = {"weight_ih": (4 * H, F), "weight_hh": (4 * H, H)}
FASTRNNS |= norms(layernorm_i=4 * H, layernorm_h=4 * H, layernorm_c=H)


@formula("nemo", "lstm", FASTRNNS)
@formula("fastrnns", "lstm", FASTRNNS)
def fastrnns_lstm(w, x, h, c):
    v = ln(x @ w["weight_ih"].T, *affine(w, "layernorm_i")) + ln(
        h @ w["weight_hh"].T, *affine(w, "layernorm_h")
    )
    i, f, g, o = split(v, 4)
    c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), *affine(w, "layernorm_c"))
    return sigmoid(o) * np.tanh(c), c


@formula(
    "torchaudio",
    "lstm",
    {"x2g.weight": (4 * H, F), "p2g.weight": (4 * H, H)} | norms(c_norm=H, g_norm=4 * H),
)
def torchaudio_lstm(w, x, h, c):
    i, f, g, o = split(ln(x @ w["x2g.weight"].T + h @ w["p2g.weight"].T, *affine(w, "g_norm")), 4)
    c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), *affine(w, "c_norm"))
    return sigmoid(o) * np.tanh(c), c


def icefall_shapes(gates, names, rows=H):
    shapes = {"weight_ih": (gates * H, F), "weight_hh": (gates * H, rows)}
    shapes |= {"bias_ih": (gates * H,), "bias_hh": (gates * H,)}
    return shapes | {f"layernorm_{name}.{end}": (H,) for name in names for end in ("weight", "bias")}


@formula(
    "icefall",
    "lstm",
    {
        f"layers.0.cell.{name}": shape
        for name, shape in (icefall_shapes(4, ("i", "f", "cx", "cy", "o"), P) | {"weight_hr": (P, H)}).items()
    },
    P,
)
def icefall_lstm(w, x, h, c):
    w = {name.removeprefix("layers.0.cell."): value for name, value in w.items()}
    v = split(x @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"], 4)
    i, f, g, o = (
        ln(part, *affine(w, f"layernorm_{k}")) for part, k in zip(v, ("i", "f", "cx", "o"), strict=True)
    )
    c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), *affine(w, "layernorm_cy"))
    return sigmoid(o) * np.tanh(c) @ w["weight_hr"].T, c


@formula("icefall", "gru", icefall_shapes(3, "rin"))
def icefall_gru(w, x, h):
    (xr, xi, xn), (hr, hi, hn) = (
        split(a @ w[f"weight_{side}"].T + w[f"bias_{side}"], 3) for a, side in ((x, "ih"), (h, "hh"))
    )
    r, i = sigmoid(ln(xr + hr, *affine(w, "layernorm_r"))), sigmoid(ln(xi + hi, *affine(w, "layernorm_i")))
    n = np.tanh(ln(xn + r * hn, *affine(w, "layernorm_n")))
    return (n + i * (h - n),)


@formula("bertsum", "lstm", torch_shapes(4) | norms(ln_ih=4 * H, ln_hh=4 * H, ln_ho=H))
def bertsum_lstm(w, x, h, c):
    a = ln(x @ w["weight_ih"].T + w["bias_ih"], *affine(w, "ln_ih"))
    b = ln(h @ w["weight_hh"].T + w["bias_hh"], *affine(w, "ln_hh"))
    i, f, o, g = split(a + b, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(ln(c, *affine(w, "ln_ho"))), c


@formula(
    "labml",
    "lstm",
    {"hidden_lin.weight": (4 * H, H), "hidden_lin.bias": (4 * H,), "input_lin.weight": (4 * H, F)}
    | {f"layer_norm.{k}.{end}": (H,) for k in range(4) for end in ("weight", "bias")}
    | norms(layer_norm_c=H),
)
def labml_lstm(w, x, h, c):
    v = split(h @ w["hidden_lin.weight"].T + w["hidden_lin.bias"] + x @ w["input_lin.weight"].T, 4)
    i, f, g, o = (ln(part, *affine(w, f"layer_norm.{k}")) for k, part in enumerate(v))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(ln(c, *affine(w, "layer_norm_c"))), c


@formula(
    "di-engine",
    "lstm",
    {"wx.0": (F, 4 * H), "wh.0": (H, 4 * H), "bias": (1, 4 * H)}
    | {f"norm.{k}.{end}": (4 * H,) for k in (0, 1) for end in ("weight", "bias")},
)
def di_engine_lstm(w, x, h, c):
    v = ln(x @ w["wx.0"], *affine(w, "norm.0")) + ln(h @ w["wh.0"], *affine(w, "norm.1")) + w["bias"][0]
    i, f, o, u = split(v, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
    return sigmoid(o) * np.tanh(c), c


@formula(
    "lstms.pth",
    "lstm",
    {"i2h.weight": (4 * H, F), "i2h.bias": (4 * H,), "h2h.weight": (4 * H, H), "h2h.bias": (4 * H,)}
    | {
        f"{norm}.{end}": (1, size)
        for norm, size in (("ln_i2h", 4 * H), ("ln_h2h", 4 * H), ("ln_cell", H))
        for end in ("alpha", "beta")
    },
)
def lstms_pth_lstm(w, x, h, c):
    def norm(a, name):
        centred = a - a.mean(-1, keepdims=True)
        var = (centred**2).sum(-1, keepdims=True) / (a.shape[-1] - 1)
        return centred / np.sqrt(var + 1e-6) * w[f"{name}.alpha"] + w[f"{name}.beta"]

    v = norm(x @ w["i2h.weight"].T + w["i2h.bias"], "ln_i2h")
    i, f, o, g = split(v + norm(h @ w["h2h.weight"].T + w["h2h.bias"], "ln_h2h"), 4)
    c = norm(sigmoid(f) * c + sigmoid(i) * np.tanh(g), "ln_cell")
    return sigmoid(o) * np.tanh(c), c


@formula(
    "adept",
    "lstm",
    {"ih.weight": (4 * H, F), "ih.bias": (4 * H,), "hh.weight": (4 * H, H), "hh.bias": (4 * H,)}
    | norms(ln_cell=H),
)
def adept_lstm(w, x, h, c):
    i, f, o, g = split(x @ w["ih.weight"].T + w["ih.bias"] + h @ w["hh.weight"].T + w["hh.bias"], 4)
    c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), *affine(w, "ln_cell"))
    return sigmoid(o) * np.tanh(c), c


@formula(
    "pytorch-rnn-util",
    "lstm",
    {"fiou_linear.weight": (4 * H, F + H)}
    | {f"fiou_ln_layers.{k}.{end}": (H,) for k in range(4) for end in ("weight", "bias")}
    | norms(cell_ln=H),
)
def rnn_util_lstm(w, x, h, c):
    v = split(cat(x, h) @ w["fiou_linear.weight"].T, 4)
    f, i, o, u = (ln(part, *affine(w, f"fiou_ln_layers.{k}")) for k, part in enumerate(v))
    c = ln(sigmoid(i) * np.tanh(u) + c * sigmoid(f), *affine(w, "cell_ln"))
    return np.tanh(c) * sigmoid(o), c


@formula("pytorch-rnn-util", "rnn", {"linear.weight": (H, F + H)} | norms(layer_norm=H))
def rnn_util_rnn(w, x, h):
    return (np.tanh(ln(cat(x, h) @ w["linear.weight"].T, *affine(w, "layer_norm"))),)


# ---- TensorFlow ----


def keras_shapes(gates, bias):
    return {"kernel": (F, gates * H), "recurrent_kernel": (H, gates * H), "bias": bias}


@formula("keras", "lstm", keras_shapes(4, (4 * H,)))
def keras_lstm(w, x, h, c):
    i, f, g, o = split(x @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@formula("keras", "gru", keras_shapes(3, (2, 3 * H)))
def keras_gru(w, x, h):
    xz, xr, xn = split(x @ w["kernel"] + w["bias"][0], 3)
    hz, hr, hn = split(h @ w["recurrent_kernel"] + w["bias"][1], 3)
    z = sigmoid(xz + hz)
    return (z * h + (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn),)


@formula("keras-reset-before", "gru", keras_shapes(3, (3 * H,)))
def keras_reset_before(w, x, h):
    x_z, x_r, x_n = split(x @ w["kernel"] + w["bias"], 3)
    w_z, w_r, w_n = split(w["recurrent_kernel"], 3)
    z, r = sigmoid(x_z + h @ w_z), sigmoid(x_r + h @ w_r)
    return (z * h + (1 - z) * np.tanh(x_n + (r * h) @ w_n),)


@formula("keras", "rnn", keras_shapes(1, (H,)))
def keras_rnn(w, x, h):
    return (np.tanh(x @ w["kernel"] + w["bias"] + h @ w["recurrent_kernel"]),)


def gammas(*names, size=4 * H):
    return {f"{name}/{end}": (size,) for name in names for end in ("gamma", "beta")}


@formula(
    "tfa",
    "lstm",
    keras_shapes(4, (4 * H,)) | gammas("kernel_norm", "recurrent_norm") | gammas("state_norm", size=H),
)
def tfa_lstm(w, x, h, c):
    def norm(a, name):
        return ln(a, w[f"{name}/gamma"], w[f"{name}/beta"], 1e-3)

    z = norm(x @ w["kernel"], "kernel_norm") + norm(h @ w["recurrent_kernel"], "recurrent_norm") + w["bias"]
    i, f, g, o = split(z, 4)
    c = norm(sigmoid(f) * c + sigmoid(i) * np.tanh(g), "state_norm")
    return sigmoid(o) * np.tanh(c), c


@formula("tfa", "rnn", keras_shapes(1, (H,)) | {"layer_norm/gamma": (H,)})
def tfa_rnn(w, x, h):
    return (np.tanh(ln(x @ w["kernel"] + h @ w["recurrent_kernel"], w["layer_norm/gamma"]) + w["bias"]),)


TF1_GATES = ("input", "transform", "forget", "output")


@formula("tf1", "lstm", {"kernel": (F + H, 4 * H)} | gammas(*TF1_GATES, "state", size=H))
def tf1_lstm(w, x, h, c):
    def norm(a, name):
        return ln(a, w[f"{name}/gamma"], w[f"{name}/beta"], 1e-12)

    i, j, f, o = map(norm, split(cat(x, h) @ w["kernel"], 4), TF1_GATES)
    c = norm(c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j), "state")
    return np.tanh(c) * sigmoid(o), c


@formula(
    "tf1",
    "gru",
    {"gates/kernel": (F + H, 2 * H), "gates/bias": (2 * H,)}
    | {"candidate/kernel": (F + H, H), "candidate/bias": (H,)},
)
def tf1_gru(w, x, h):
    r, u = split(sigmoid(cat(x, h) @ w["gates/kernel"] + w["gates/bias"]), 2)
    return (u * h + (1 - u) * np.tanh(cat(x, r * h) @ w["candidate/kernel"] + w["candidate/bias"]),)


@formula(
    "sketch-rnn",
    "lstm",
    {"W_xh": (F, 4 * H), "W_hh": (H, 4 * H)}
    | {
        f"ln_{name}/ln_{end}": (size,)
        for name, size in (("all", 4 * H), ("c", H))
        for end in ("gamma", "beta")
    },
)
def sketch_rnn_lstm(w, x, h, c):
    v = (x @ w["W_xh"] + h @ w["W_hh"]).reshape(-1, 4, H)
    v = ln(v, eps=1e-3).reshape(-1, 4 * H) * w["ln_all/ln_gamma"] + w["ln_all/ln_beta"]
    i, j, f, o = split(v, 4)
    c = c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j)
    return np.tanh(ln(c, w["ln_c/ln_gamma"], w["ln_c/ln_beta"], 1e-3)) * sigmoid(o), c


@formula(
    "supercell",
    "lstm",
    {"W_xh": (F, 4 * H), "W_hh": (H, 4 * H)}
    | {f"ln_{name}/layer_norm_{end}": (H,) for name in "ijfoc" for end in ("alpha", "bias")},
)
def supercell_lstm(w, x, h, c):
    def norm(a, k):
        return ln(a, w[f"ln_{k}/layer_norm_alpha"], w[f"ln_{k}/layer_norm_bias"], 1e-3)

    i, j, f, o = map(norm, split(x @ w["W_xh"] + h @ w["W_hh"], 4), "ijfo")
    c = c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j)
    return np.tanh(norm(c, "c")) * sigmoid(o), c


@formula(
    "sonnet", "lstm", {"w_gates": (F + H, 4 * H), "b_gates": (4 * H,)} | gammas("layer_norm"), forget_bias=0.5
)
def sonnet_lstm(w, x, h, c):
    v = ln(cat(x, h) @ w["w_gates"], w["layer_norm/gamma"], w["layer_norm/beta"]) + w["b_gates"]
    i, j, f, o = split(v, 4)
    c = sigmoid(f + 0.5) * c + sigmoid(i) * np.tanh(j)
    return sigmoid(o) * np.tanh(c), c


@formula(
    "skip-thoughts",
    "gru",
    {"gates/w_h": (H, 2 * H), "gates/w_x": (F, 2 * H), "candidate/w": (F, H), "candidate/u": (H, H)}
    | gammas("gates/layer_norm/w_h", "gates/layer_norm/w_x", size=2 * H)
    | gammas("candidate/layer_norm/w", "candidate/layer_norm/u", size=H),
)
def skip_thoughts_gru(w, x, h):
    def norm(a, name):
        return ln(a, w[f"{name}/gamma"], w[f"{name}/beta"], 1e-12)

    v = norm(x @ w["gates/w_x"], "gates/layer_norm/w_x") + norm(h @ w["gates/w_h"], "gates/layer_norm/w_h")
    z, r = split(sigmoid(v), 2)
    x_n, h_n = x @ w["candidate/w"], h @ w["candidate/u"]
    n = np.tanh(norm(x_n, "candidate/layer_norm/w") + r * norm(h_n, "candidate/layer_norm/u"))
    return ((1 - z) * h + z * n,)


@formula(
    "baselines",
    "lstm",
    {"wx": (F, 4 * H), "wh": (H, 4 * H)}
    | dict.fromkeys(("gx", "bx", "gh", "bh", "b"), (4 * H,))
    | {"gc": (H,), "bc": (H,)},
)
def baselines_lstm(w, x, h, c):
    z = ln(x @ w["wx"], w["gx"], w["bx"]) + ln(h @ w["wh"], w["gh"], w["bh"]) + w["b"]
    i, f, o, u = split(z, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
    return sigmoid(o) * np.tanh(ln(c, w["gc"], w["bc"])), c


TFLITE_GATES = ("input", "forget", "cell", "output")


@formula(
    "tflite",
    "lstm",
    {f"input_to_{gate}_weights": (H, F) for gate in TFLITE_GATES}
    | {f"recurrent_to_{gate}_weights": (H, P) for gate in TFLITE_GATES}
    | {f"{gate}_{end}": (H,) for gate in TFLITE_GATES for end in ("gate_bias", "layer_norm_coefficients")}
    | {"projection_weights": (P, H)},
    P,
)
def tflite_lstm(w, x, h, c):
    i, f, g, o = (
        ln(
            x @ w[f"input_to_{gate}_weights"].T + h @ w[f"recurrent_to_{gate}_weights"].T,
            w[f"{gate}_layer_norm_coefficients"],
            w[f"{gate}_gate_bias"],
            1e-8,
        )
        for gate in TFLITE_GATES
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c) @ w["projection_weights"].T, c


def lingvo_step(w, x, h, c, gates):
    c = np.clip(sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"]), -0.4, 0.4)
    return sigmoid(gates["o"]) * np.tanh(c), c


def lingvo_gates(w, x, h, scale, bias):
    parts = zip("gifo", split(cat(x, h) @ w["wm"], 4), split(scale, 4), split(bias, 4), strict=True)
    return {gate: ln(a, s, b, 1e-8) for gate, a, s, b in parts}


@formula("lingvo", "lstm", {"wm": (F + H, 4 * H), "b": (8 * H,)}, cell_clip=0.4, forget_gate_bias=0.5)
def lingvo_lstm(w, x, h, c):
    bias, scale = split(w["b"], 2)
    gates = lingvo_gates(w, x, h, scale + 1, bias)
    gates["f"] = gates["f"] + 0.5
    return lingvo_step(w, x, h, c, gates)


@formula(
    "lingvo-simple",
    "lstm",
    {"wm": (F + P, 4 * H), "b": (4 * H,), "ln_scale": (4 * H,), "w_proj": (H, P)},
    P,
    cell_clip=0.4,
)
def lingvo_simple_lstm(w, x, h, c):
    h, c = lingvo_step(w, x, h, c, lingvo_gates(w, x, h, w["ln_scale"], w["b"]))
    return h @ w["w_proj"], c


LINGVO_NAMES = ("i_i", "i_g", "f_g", "o_g")


@formula(
    "lingvo-lean",
    "lstm",
    {"wm": (F + P, 4 * H), "w_proj": (H, P)}
    | {f"{name}_{gate}": (H,) for name in ("ln_scale", "bias") for gate in (*LINGVO_NAMES, "c")},
    P,
)
def lingvo_lean_lstm(w, x, h, c):
    scale = cat(*(w[f"ln_scale_{gate}"] + 1 for gate in LINGVO_NAMES))
    gates = lingvo_gates(w, x, h, scale, cat(*(w[f"bias_{gate}"] for gate in LINGVO_NAMES)))
    c = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
    seen = ln(c, w["ln_scale_c"] + 1, w["bias_c"], 1e-8)
    return sigmoid(gates["o"]) * np.tanh(seen) @ w["w_proj"], c


# ---- Flax ----


@formula(
    "flax",
    "lstm",
    {f"i{gate}/kernel": (F, H) for gate in "ifgo"}
    | {f"h{gate}/kernel": (H, H) for gate in "ifgo"}
    | {f"h{gate}/bias": (H,) for gate in "ifgo"},
)
def flax_lstm(w, x, h, c):
    i, f, g, o = (x @ w[f"i{k}/kernel"] + h @ w[f"h{k}/kernel"] + w[f"h{k}/bias"] for k in "ifgo")
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@formula(
    "flax",
    "gru",
    {f"i{gate}/kernel": (F, H) for gate in "rzn"}
    | {f"i{gate}/bias": (H,) for gate in "rzn"}
    | {f"h{gate}/kernel": (H, H) for gate in "rzn"}
    | {"hn/bias": (H,)},
)
def flax_gru(w, x, h):
    xr, xz, xn = (x @ w[f"i{k}/kernel"] + w[f"i{k}/bias"] for k in "rzn")
    hr, hz, hn = (h @ w[f"h{k}/kernel"] for k in "rzn")
    z = sigmoid(xz + hz)
    return ((1 - z) * np.tanh(xn + sigmoid(xr + hr) * (hn + w["hn/bias"])) + z * h,)


@formula("flax", "rnn", {"i/kernel": (F, H), "i/bias": (H,), "h/kernel": (H, H)})
def flax_rnn(w, x, h):
    return (np.tanh(x @ w["i/kernel"] + w["i/bias"] + h @ w["h/kernel"]),)


# ---- Reinforcement learning ----


def dreamer(v, h, gain, bias):
    reset, candidate, update = split(ln(v, gain, bias, 1e-3), 3)
    update = sigmoid(update - 1)
    return (update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * h,)


@formula(
    "sheeprl", "gru", {"linear.weight": (3 * H, H + F), "linear.bias": (3 * H,)} | norms(layer_norm=3 * H)
)
def sheeprl_gru(w, x, h):
    return dreamer(cat(h, x) @ w["linear.weight"].T + w["linear.bias"], h, *affine(w, "layer_norm"))


@formula(
    "dreamerv3-torch",
    "gru",
    {"layers.GRU_linear.weight": (3 * H, F + H)}
    | {f"layers.GRU_norm.{end}": (3 * H,) for end in ("weight", "bias")},
)
def dreamerv3_torch_gru(w, x, h):
    return dreamer(cat(x, h) @ w["layers.GRU_linear.weight"].T, h, *affine(w, "layers.GRU_norm"))


@formula(
    "dreamerv2",
    "gru",
    {"dense/kernel": (F + H, 3 * H), "dense/bias": (3 * H,)} | gammas("layer_normalization", size=3 * H),
)
def dreamerv2_gru(w, x, h):
    v = cat(x, h) @ w["dense/kernel"] + w["dense/bias"]
    return dreamer(v, h, w["layer_normalization/gamma"], w["layer_normalization/beta"])


@formula(
    "dreamerv3", "gru", {"gru/kernel": (H + F, 3 * H), "gru/norm/scale": (3 * H,), "gru/norm/bias": (3 * H,)}
)
def dreamerv3_gru(w, x, h):
    return dreamer(cat(h, x) @ w["gru/kernel"], h, w["gru/norm/scale"], w["gru/norm/bias"])


@formula(
    "innereye", "gru", {"weight_ih": (3 * H, F), "weight_hh": (3 * H, H)} | norms(ln_r=H, ln_z=H, ln_n=H)
)
def innereye_gru(w, x, h):
    (xr, xz, xn), (hr, hz, hn) = split(x @ w["weight_ih"].T, 3), split(h @ w["weight_hh"].T, 3)
    r, z = sigmoid(ln(xr + hr, *affine(w, "ln_r"))), sigmoid(ln(xz + hz, *affine(w, "ln_z")))
    return ((1 - z) * np.tanh(ln(xn + r * hn, *affine(w, "ln_n"))) + z * h,)
