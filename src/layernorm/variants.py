"""Which function "layer-normalized LSTM" means: the frozen spec and its named presets.

Published layer-normalized cells differ in what is normalized together, in where biases enter, and in
whether the normalized cell is carried on. ``Variant`` says which; ``PRESETS`` names the public
ones. In the formulas below N is the normalizer without gain and bias, a = W_ih x and b = W_hh h.

==========  ============================================================================================
``inputs``  what the gates are made of
==========  ============================================================================================
separate    N(a)·gain_ih + N(b)·gain_hh + bias
summed      N(a + b)·gain + bias
plain       a + b, with ``bias_ih`` and ``bias_hh``: LSTM only, whose cell is normalized then
==========  ============================================================================================

==========  ============================================================================================
``scope``   the features that share one mean and one rstd
==========  ============================================================================================
matrix      the outputs of one weight matrix: LSTM 4H; GRU 2H (r, z) and H (n), as in the paper; RNN H
all         all gates together: LSTM 4H, GRU 3H, RNN H
gate        each gate by itself: H
==========  ============================================================================================

==========  ============================================================================================
``cell``    LSTM only; c' = σ(f)·c + σ(i)·tanh(g)
==========  ============================================================================================
output      h' = σ(o)·tanh(N(c')·gain_cell + bias_cell), and c' itself is carried on (the paper)
carried     c' is replaced by N(c')·gain_cell + bias_cell, for the output and for the next step
none        the cell is not normalized
==========  ============================================================================================

With ``cell_clip`` c' is held in [-cell_clip, cell_clip], before its norm. ``cell_eps`` is the eps of its norm
where that is another than the gates'.

The candidate of a GRU, where the reset gate r meets the hidden state:

===============================  =======================================================================
separate                         n = tanh(N(a)_n·gain_ih_n + bias_n + r·(N(b)_n·gain_hh_n + bias_hn))
summed, scope matrix or gate     n = tanh(N(a_n + r·b_n)·gain_n + bias_n)
summed, scope all                n = tanh(r·(N(a + b)_n·gain_n + bias_n))
===============================  =======================================================================

With ``reset_after=False`` r comes before the product, as in Cho et al. 2014 and Keras: b_n = W_hn (r·h), and
n = tanh(N(a)_n·gain_ih_n + N(b)_n·gain_hh_n + bias_n), or tanh(N(a + b)_n·gain_n + bias_n) where inputs are
summed. It has no kernel but the reference.

With ``projection_bias`` a = W_ih x + bias_ih and b = W_hh h + bias_hh: biases inside the norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

Cell = Literal["lstm", "gru", "rnn"]
Kind = Literal["layer", "rms", "none"]
Inputs = Literal["separate", "summed", "plain"]
Scope = Literal["matrix", "all", "gate"]
CellNorm = Literal["output", "carried", "none"]

#: Gates of each cell; their order in memory is PyTorch's: LSTM i, f, g, o; GRU r, z, n.
GATES: Final[Mapping[Cell, int]] = MappingProxyType({"lstm": 4, "gru": 3, "rnn": 1})


@dataclasses.dataclass(frozen=True, repr=False)
class Variant:
    """The spec of a normalized recurrent cell; see the module's tables for the formulas.

    Args:
        kind: the normalizer: ``"layer"``, ``"rms"`` or ``"none"``. ``"none"`` is PyTorch's own
            cell: nothing else applies then, and the other fields take their one value for it.
        inputs: ``"separate"``, ``"summed"`` or ``"plain"``.
        scope: ``"matrix"``, ``"all"`` or ``"gate"``.
        cell: ``"output"``, ``"carried"`` or ``"none"``; of the LSTM only.
        projection_bias: whether the two products have a bias of their own inside the norm.
        eps: added to the variance (layer) or to the mean square (RMS); finite, not negative.
        cell_eps: likewise for the cell's norm; None for ``eps``.
        cell_clip: the largest magnitude of an LSTM's cell; None for any. With ``kind="none"`` too.
        reset_after: whether a GRU's reset gate comes after the product with W_hn. With ``kind="none"`` too.

    Raises:
        ValueError: a field has a value it does not know, or fields do not go together.
        TypeError: ``projection_bias`` or ``reset_after`` is not a bool; an eps or ``cell_clip`` not a number.

    Examples:
        >>> from layernorm import Variant
        >>> Variant(inputs="summed", scope="gate", eps=1e-5)
        Variant(inputs='summed', scope='gate')
    """

    kind: Kind = "layer"
    inputs: Inputs = "separate"
    scope: Scope = "matrix"
    cell: CellNorm = "output"
    projection_bias: bool = False
    eps: float = 1e-5
    cell_eps: float | None = None
    cell_clip: float | None = None
    reset_after: bool = True

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(
                    f"Variant: {field} must be one of {', '.join(map(repr, choices))}; got {value!r}"
                )
        for field in ("projection_bias", "reset_after"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise TypeError(f"Variant: {field} must be a bool, got {type(value).__name__}")
        for field in ("eps", "cell_eps", "cell_clip"):
            value = getattr(self, field)
            if value is None and field != "eps":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Variant: {field} must be a float, got {type(value).__name__}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"Variant: {field} must be finite and not negative, got {value}")
        if self.cell_clip == 0:
            raise ValueError("Variant: cell_clip must be positive, or None for no clipping; got 0")
        if self.inputs == "plain" and self.kind != "none" and self.cell == "none":
            raise ValueError(
                "Variant: inputs='plain' with cell='none' normalizes nothing; give kind='none' for that"
            )
        fixed = {"none": _UNNORMALIZED}.get(self.kind, _PLAIN if self.inputs == "plain" else {})
        for field, value in fixed.items():
            object.__setattr__(self, field, value)
        if self.scope == "all" and not self.reset_after:
            raise ValueError(
                "Variant: scope='all' has statistics of r, z and n together, and with reset_after=False n "
                "follows from r; use scope='matrix' or 'gate'"
            )
        if self.cell == "none" or self.cell_eps == self.eps:
            object.__setattr__(self, "cell_eps", None)

    def __repr__(self) -> str:
        given = (
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        )
        return f"Variant({', '.join(given)})"

    @property
    def normalizes_gates(self) -> bool:
        """Tell whether there is a norm at the gates."""
        return self.kind != "none" and self.inputs != "plain"


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "kind": get_args(Kind),
        "inputs": get_args(Inputs),
        "scope": get_args(Scope),
        "cell": get_args(CellNorm),
    }
)

# PyTorch's cells in the words of the spec: equal specs compare equal, whatever else was given.
_UNNORMALIZED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "inputs": "separate",
        "scope": "matrix",
        "cell": "none",
        "projection_bias": True,
        "eps": 1e-5,
    }
)
# Likewise of a cell whose gates have no norm: its one eps is the cell's.
_PLAIN: Final[Mapping[str, Any]] = MappingProxyType(
    {"scope": "matrix", "projection_bias": True, "cell_eps": None}
)

_PAPER = Variant()
_PAPER_RNN = Variant(inputs="summed")
_CARRIED = Variant(cell="carried")


def _presets(
    table: Mapping[str, Mapping[Cell, Variant]],
) -> Mapping[str, Mapping[Cell, Variant]]:
    return MappingProxyType({name: MappingProxyType(dict(cells)) for name, cells in table.items()})


#: Every named variant, by the cells that its source has. Where a source stores its gates in another
#: order or folds a constant into a gate (a forget bias, Dreamer's update - 1), that is a matter of
#: importing its weights, not of the function.
PRESETS: Final[Mapping[str, Mapping[Cell, Variant]]] = _presets(
    {
        # Ba, Kiros and Hinton 2016: RNN eq. 4, LSTM eq. 20-22, GRU eq. 26-28.
        "paper": {"lstm": _PAPER, "gru": _PAPER, "rnn": _PAPER_RNN},
        # The paper's functions with the root mean square in place of mean and variance.
        "rms": {
            "lstm": Variant(kind="rms"),
            "gru": Variant(kind="rms"),
            "rnn": Variant(kind="rms", inputs="summed"),
        },
        # No norm: torch.nn.LSTM, GRU and RNN.
        "none": dict.fromkeys(GATES, Variant(kind="none")),
        # lmnt-com/haste.
        "haste": {"lstm": _PAPER, "gru": Variant(scope="all")},
        # ryankiros/layer-norm, the paper's own code.
        "kiros": {
            "lstm": Variant(projection_bias=True),
            "gru": Variant(projection_bias=True),
        },
        # PyTorch's benchmarks/fastrnns, and NVIDIA NeMo after it.
        "fastrnns": {"lstm": _CARRIED},
        "nemo": {"lstm": _CARRIED},
        # torchaudio's RNN-T predictor.
        "torchaudio": {"lstm": Variant(inputs="summed", cell="carried")},
        # k2-fsa/icefall.
        "icefall": {
            "lstm": Variant(inputs="summed", scope="gate", cell="carried", projection_bias=True),
            "gru": Variant(inputs="summed", scope="gate", projection_bias=True),
        },
        # TensorFlow Addons; its two cells have different defaults of eps.
        "tfa": {
            "lstm": Variant(cell="carried", eps=1e-3),
            "rnn": Variant(inputs="summed"),
        },
        # TensorFlow 1's LayerNormBasicLSTMCell.
        "tf1": {"lstm": Variant(inputs="summed", scope="gate", cell="carried", eps=1e-12)},
        # The GRU of Dreamer V3 in sheeprl. V2's is this with projection_bias=True and eps=1e-5.
        "sheeprl": {"gru": Variant(inputs="summed", scope="all", eps=1e-3)},
        # TensorFlow Lite's LSTM kernel with layer-norm coefficients.
        "tflite": {"lstm": Variant(inputs="summed", scope="gate", cell="none", eps=1e-8)},
    }
)


def resolve(variant: str | Variant, cell: Cell) -> Variant:
    """Return the spec that ``variant`` means for ``cell``.

    Args:
        variant: a preset's name or a spec, which is returned as it is.
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.

    Raises:
        ValueError: no preset has that name, the preset has no such cell, or there is none.
        TypeError: ``variant`` is neither a name nor a ``Variant``.

    Examples:
        >>> from layernorm.variants import resolve
        >>> resolve("paper", "rnn").inputs
        'summed'
    """
    if isinstance(variant, Variant):
        return variant
    if not isinstance(variant, str):
        raise TypeError(
            f"variant must be a preset's name or a layernorm.Variant, got {type(variant).__name__}"
        )
    if variant not in PRESETS:
        raise ValueError(f"unknown variant {variant!r}; expected one of {', '.join(PRESETS)}")
    cells = PRESETS[variant]
    if cell not in cells:
        _check_cell(cell)
        having = ", ".join(name for name, known in PRESETS.items() if cell in known)
        raise ValueError(
            f"variant {variant!r} has no {cell.upper()}; its cells: "
            f"{', '.join(name.upper() for name in cells)}. Variants with a {cell.upper()}: {having}"
        )
    return cells[cell]


def name_of(cell: Cell, variant: Variant) -> str | Variant:
    """Return the name of the first preset that is this variant; the variant itself where none is.

    Examples:
        >>> from layernorm.variants import Variant, name_of
        >>> name_of("gru", Variant(inputs="summed", scope="all", eps=1e-3))
        'sheeprl'
    """
    return next((name for name, cells in PRESETS.items() if cells.get(cell) == variant), variant)


def parameter_shapes(
    cell: Cell,
    variant: Variant,
    input_size: int,
    hidden_size: int,
    *,
    proj_size: int = 0,
    bias: bool = True,
    gain: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer and direction's parameters, in order, by name without suffix.

    ``weight_*``, ``bias_ih`` and ``bias_hh`` are what ``torch.nn`` has under these names; every
    ``gain*`` starts at 1, ``bias``, ``bias_hn`` and ``bias_cell`` at 0. ``bias=False`` leaves every
    bias out, ``gain=False`` every gain. G is the number of gates, H the hidden size.

    =======================  =============  ==================================================
    ``weight_ih``            (G·H, input)
    ``weight_hh``            (G·H, H)       (G·H, proj_size) with a projection
    ``bias_ih, bias_hh``     (G·H)          inside the norm: ``projection_bias``, and no norm there
    ``weight_hr``            (proj, H)      with a projection
    ``gain_ih, gain_hh``     (G·H)          ``inputs="separate"``
    ``gain``                 (G·H)          ``inputs="summed"``
    ``bias``                 (G·H)          after the norm
    ``bias_hn``              (H)            GRU, ``inputs="separate"``: inside the reset product
    ``gain_cell, bias_cell`` (H)            LSTM, unless ``cell="none"``
    =======================  =============  ==================================================

    Examples:
        >>> from layernorm.variants import Variant, parameter_shapes
        >>> list(parameter_shapes("rnn", Variant(inputs="summed"), 3, 5))
        ['weight_ih', 'weight_hh', 'gain', 'bias']
    """
    _check_cell(cell)
    width = GATES[cell] * hidden_size
    names: dict[str, tuple[int, ...]] = {
        "weight_ih": (width, input_size),
        "weight_hh": (width, proj_size or hidden_size),
    }
    if variant.projection_bias:
        names |= {"bias_ih": (width,), "bias_hh": (width,)}
    if proj_size:
        names["weight_hr"] = (proj_size, hidden_size)
    if variant.normalizes_gates:
        gains = ("gain_ih", "gain_hh") if variant.inputs == "separate" else ("gain",)
        names |= dict.fromkeys((*gains, "bias"), (width,))
        if cell == "gru" and variant.inputs == "separate" and variant.reset_after:
            names["bias_hn"] = (hidden_size,)
    if cell == "lstm" and variant.cell != "none":
        names |= {"gain_cell": (hidden_size,), "bias_cell": (hidden_size,)}
    left_out = (*([] if bias else ["bias"]), *([] if gain else ["gain"]))
    return {name: shape for name, shape in names.items() if not name.startswith(left_out)}


def _check_cell(cell: object) -> None:
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(map(repr, GATES))}; got {cell!r}")


__all__ = ["GATES", "PRESETS", "Variant", "name_of", "parameter_shapes", "resolve"]
