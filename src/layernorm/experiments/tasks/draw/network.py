"""DRAW: an LSTM that paints a picture glimpse by glimpse (Gregor et al. 2015, arXiv 1502.04623).

An encoder reads a small patch of the picture and of what the canvas still lacks of it; a decoder, given a
latent sample of what the encoder saw, adds a small patch to the canvas. Both are LSTMs whose cell is
normalized where it is put out, and nowhere else (Ba et al. 2016, §6.4 and eq. 29-31).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import layernorm
from layernorm.experiments.task import ExperimentError

_MODULES: Final[MappingProxyType[str, Callable[[int], nn.Module]]] = MappingProxyType(
    {"none": nn.Identity, "layer": layernorm.LayerNorm, "rms": layernorm.RMSNorm, "weight": nn.Identity}
)
#: What the cells can be normalized with; "weight" is weight norm of what makes the gates.
NORMS: Final = tuple(_MODULES)


class State(NamedTuple):
    """The state of an LSTM: its output h and its cell c, each (cases, hidden)."""

    hidden: Tensor
    cell: Tensor


class OutputNormLSTMCell(nn.Module):
    """One step of an LSTM whose cell is normalized on its way out (paper eq. 29-31).

    (i, f, g, o) = W [inputs, h] + b, c' = σ(f)·c + σ(i)·tanh(g), h' = σ(o)·tanh(N(c')): the gates have no
    norm, and c' is carried on as it is. Norm "none" is ``torch.nn.LSTMCell`` with the two biases as one.

    Args:
        norm: one of ``NORMS``.
        inputs: features of the input.
        hidden: units.

    Raises:
        ExperimentError: there is no such norm.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.draw.network import OutputNormLSTMCell, State
        >>> cell = OutputNormLSTMCell("layer", 3, 4)
        >>> cell((torch.ones(2, 3),), State(torch.zeros(2, 4), torch.zeros(2, 4))).hidden.shape
        torch.Size([2, 4])
    """

    def __init__(self, norm: str, inputs: int, hidden: int) -> None:
        super().__init__()
        if norm not in _MODULES:
            raise ExperimentError(f"unknown norm {norm!r} for draw; expected one of {', '.join(NORMS)}")
        # Input and state side by side: one product a step, and one sum of weight gradients over the steps.
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)
        self.norm = _MODULES[norm](hidden)
        for parameter in self.gates.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)  # as torch.nn.LSTMCell
        if norm == "weight":
            weight_norm(self.gates)

    def forward(self, inputs: tuple[Tensor, ...], state: State) -> State:
        """Take one step.

        Args:
            inputs: tensors (cases, features) that make up the input, side by side.
            state: before the step.
        """
        i, f, g, o = self.gates(torch.cat((*inputs, state.hidden), 1)).chunk(4, 1)
        cell = torch.addcmul(f.sigmoid() * state.cell, i.sigmoid(), g.tanh())
        return State(o.sigmoid() * self.norm(cell).tanh(), cell)


class Grid(NamedTuple):
    """The place of size x size Gaussian filters on a square picture (Gregor et al., eq. 21-24).

    Pixels are counted from 1; x is before y.

    Attributes:
        centre: (2, cases), in pixels.
        stride: (cases,), pixels between the filters.
        log_variance: (cases,), of the filters, in squared pixels.
        log_intensity: (cases,), of what is read or written.
    """

    centre: Tensor
    stride: Tensor
    log_variance: Tensor
    log_intensity: Tensor


def grid(parameters: Tensor, size: int, side: int) -> Grid:
    """Return the grid that an LSTM asks for.

    Args:
        parameters: (cases, 5): centre x and y, each from -1 to 1 over the picture, log variance, log stride,
            log intensity.
        size: filters along each side of the grid, at least 2.
        side: pixels of the picture.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.draw.network import grid
        >>> whole = grid(torch.zeros(1, 5), size=3, side=28)
        >>> whole.centre.tolist(), whole.stride.tolist()
        ([[14.5], [14.5]], [13.5])
    """
    x, y, log_variance, log_stride, log_intensity = parameters.unbind(1)
    centre = (torch.stack((x, y)) + 1) * ((side + 1) / 2)
    return Grid(centre, log_stride.exp() * ((side - 1) / (size - 1)), log_variance, log_intensity)


def filterbanks(grid: Grid, size: int, side: int) -> Tensor:
    """Return the filters of columns and rows, each with the sum 1 (Gregor et al., eq. 19, 20, 25, 26).

    Args:
        grid: where.
        size: filters along each side of the grid.
        side: pixels of the picture.

    Returns:
        Tensor (2, cases, size, side): F_X and F_Y.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.draw.network import filterbanks, grid
        >>> where = grid(torch.zeros(1, 5), size=2, side=4)
        >>> filterbanks(where, size=2, side=4)[0]
        tensor([[[0.5705, 0.3460, 0.0772, 0.0063],
                 [0.0063, 0.0772, 0.3460, 0.5705]]])
    """
    device = grid.stride.device
    offsets = torch.arange(size, device=device) - (size - 1) / 2
    pixels = torch.arange(1, side + 1, device=device)
    means = torch.addcmul(grid.centre[..., None], grid.stride[:, None], offsets)
    scale = (-grid.log_variance).exp().mul(-0.5)[:, None, None]
    # A softmax is the Gaussians over their sum, and no 0/0 where a filter is far from the picture.
    return ((pixels - means[..., None]).square() * scale).softmax(-1)


def read(pictures: Tensor, where: Grid, size: int) -> Tensor:
    """Return what a window shows of pictures side by side (Gregor et al., eq. 27).

    Args:
        pictures: (cases, side, count·side), ``count`` square pictures of each case.
        where: the window.
        size: filters along each side of the window.

    Returns:
        Tensor (cases, count·size·size), by row, picture and column.
    """
    side = pictures.shape[1]
    columns, rows = filterbanks(where, size, side)
    columns = columns * where.log_intensity.exp()[:, None, None]
    seen: Tensor = (rows @ pictures).view(len(pictures), -1, side) @ columns.mT
    return seen.flatten(1)


def write(canvas: Tensor, patch: Tensor, where: Grid) -> Tensor:
    """Return the canvas with a patch added through a window (Gregor et al., eq. 29).

    Args:
        canvas: (cases, side, side).
        patch: (cases, size, size).
        where: the window.
    """
    columns, rows = filterbanks(where, patch.shape[1], canvas.shape[1])
    return torch.baddbmm(canvas, rows.mT, patch * (-where.log_intensity).exp()[:, None, None] @ columns)


class Bound(NamedTuple):
    """The two parts of each case's variational bound, in nats, each (cases,).

    Attributes:
        reconstruction: -log p(x | z) of the final canvas (Gregor et al., eq. 9).
        divergence: KL of the latent samples' distributions from the standard normal one (eq. 10).
    """

    reconstruction: Tensor
    divergence: Tensor


class DRAW(nn.Module):
    """The network, with selective attention for reading and for writing.

    Args:
        norm: of both LSTMs' cells, one of ``NORMS``.
        side: pixels of the square pictures.
        hidden: units of the encoder and of the decoder.
        latent: features of the sample of a glimpse.
        read: filters along each side of the reading window.
        write: of the writing window.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.draw.network import DRAW
        >>> network = DRAW("layer", side=28, hidden=16, latent=4, read=2, write=5)
        >>> bound = network(torch.zeros(3, 28, 28), noise=torch.randn(3, 8, 4))
        >>> bound.reconstruction.shape, bound.divergence.shape
        (torch.Size([3]), torch.Size([3]))
    """

    def __init__(self, norm: str, *, side: int, hidden: int, latent: int, read: int, write: int) -> None:
        super().__init__()
        self.side, self.read, self.write = side, read, write
        self.encoder = OutputNormLSTMCell(norm, 2 * read**2 + hidden, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = OutputNormLSTMCell(norm, latent, hidden)
        # What the decoder's output decides, in one product: both windows, and the patch to write.
        self.hand = nn.Linear(hidden, 5 + 5 + write**2)
        # The states before the first glimpse are learned, but for the carried cells, which start at 0.
        self.encoder_start = nn.Parameter(torch.zeros(hidden))
        self.decoder_start = nn.Parameter(torch.zeros(hidden))
        self.canvas_start = nn.Parameter(torch.zeros(side, side))

    @parametrize.cached()  # the weight is made once for all glimpses
    def forward(self, pictures: Tensor, noise: Tensor) -> Bound:
        """Compute the bound of pictures (Gregor et al., eq. 3-12).

        Args:
            pictures: (cases, side, side) of 0 and 1 in float.
            noise: (cases, glimpses, latent), standard normal.
        """
        encoder, canvas, decoder, hand = self._start(len(pictures))
        moments = []
        for step in noise.unbind(1):
            both = torch.cat((pictures, pictures - canvas.sigmoid()), 2)
            seen = read(both, hand.reading, self.read)
            encoder = self.encoder((seen, decoder.hidden), encoder)
            moments.append(self.posterior(encoder.hidden))
            mean, log_deviation = moments[-1].chunk(2, 1)
            decoder = self.decoder((torch.addcmul(mean, log_deviation.exp(), step),), decoder)
            hand = self._hand(decoder.hidden)
            canvas = write(canvas, hand.patch, hand.writing)
        reconstruction = F.binary_cross_entropy_with_logits(canvas, pictures, reduction="none")
        return Bound(reconstruction.sum((1, 2)), divergence(*torch.stack(moments, 1).chunk(2, 2)).sum(1))

    @parametrize.cached()
    def generate(self, latent: Tensor) -> tuple[Tensor, list[Grid]]:
        """Draw pictures from latent samples alone (Gregor et al., eq. 13-15).

        Args:
            latent: (cases, glimpses, latent), standard normal for samples of the model.

        Returns:
            The probabilities (cases, glimpses + 1, side, side) that a pixel is 1, before the first glimpse
            and after each, and where each glimpse wrote.
        """
        _, canvas, decoder, _ = self._start(len(latent))
        canvases, grids = [canvas], []
        for sample in latent.unbind(1):
            decoder = self.decoder((sample,), decoder)
            hand = self._hand(decoder.hidden)
            canvas = write(canvas, hand.patch, hand.writing)
            canvases.append(canvas)
            grids.append(hand.writing)
        return torch.stack(canvases, 1).sigmoid(), grids

    def _hand(self, hidden: Tensor) -> _Hand:
        reading, writing, patch = self.hand(hidden).split((5, 5, self.write**2), 1)
        return _Hand(
            grid(reading, self.read, self.side),
            grid(writing, self.write, self.side),
            patch.unflatten(1, (self.write, self.write)),
        )

    def _start(self, cases: int) -> tuple[State, Tensor, State, _Hand]:
        """Return encoder, canvas, decoder, and what the decoder decides, before the first glimpse."""
        encoder, decoder = (
            State(start.expand(cases, -1), start.new_zeros(cases, len(start)))
            for start in (self.encoder_start, self.decoder_start)
        )
        return encoder, self.canvas_start.expand(cases, -1, -1), decoder, self._hand(decoder.hidden)


class _Hand(NamedTuple):
    """The places where the network reads next and writes, and the patch (cases, size, size) written."""

    reading: Grid
    writing: Grid
    patch: Tensor


def divergence(mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Compute KL of normal distributions from the standard one, in nats, summed over the last dimension.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.draw.network import divergence
        >>> divergence(torch.tensor([3.0, 4.0]), torch.zeros(2))
        tensor(12.5000)
    """
    return (mean.square() + (2 * log_deviation).exp() - 2 * log_deviation - 1).sum(-1) / 2
