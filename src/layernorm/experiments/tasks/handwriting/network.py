"""The network that writes a given text with a pen (Graves 2013, arXiv 1308.0850, section 5).

Three LSTM layers. The first also reads the text through a soft window that it moves along the text itself,
so it goes step by step; the others know all their inputs beforehand and run as whole sequences. Shapes: T
steps, N lines, F features, H hidden units, K characters in the alphabet, U in the longest text.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layernorm import functional
from layernorm.experiments.networks import recurrent
from layernorm.experiments.task import ExperimentError
from layernorm.experiments.tasks.handwriting.density import sample

#: What the network can be normalized with, and the variant of the normalized LSTM that each is.
NORMS: Final = {"none": "none", "layer": "paper", "rms": "rms", "weight": "none"}
#: Features of a step of the pen: offset in x and in y, and whether a stroke ends.
PEN: Final = 3


class Reading(NamedTuple):
    """The state of the first layer between two steps.

    Attributes:
        hidden: its state h (N, H).
        cell: its state c (N, H).
        places: of the window's components, in characters from the first one (N, components).
        window: the mixture of characters seen (N, K).
    """

    hidden: Tensor
    cell: Tensor
    places: Tensor
    window: Tensor


class _WholeGradient(torch.autograd.Function):
    """Adds nothing to (T, N, O), and in backward gives a matrix its gradient over all T steps as one product.

    Args (of ``apply``): the tensor (T, N, O), the matrix (O, I), and the list that until backward has been
    filled with the T inputs (N, I) which the matrix was applied to.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        return start.view_as(start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs = torch.stack(ctx.inputs).flatten(0, 1).to(gradient.dtype)
        return gradient, (gradient.flatten(0, 1).t() @ inputs).to(ctx.dtype), None


class _StepProduct:
    """``start[t] + input @ weight.T`` for t = 0, 1, ..., an input (N, I) for each call.

    Autograd would make the gradient of the weight (O, I) at each step from N rows, as much traffic as all of
    the step's products; here it is made once.
    """

    def __init__(self, start: Tensor, weight: Tensor) -> None:
        self._inputs: list[Tensor] = []
        self._keep = torch.is_grad_enabled()
        self._starts = iter(_WholeGradient.apply(start, weight, self._inputs).unbind(0))  # type: ignore[no-untyped-call]
        self._weight = weight.detach().t()

    def __call__(self, input: Tensor) -> Tensor:
        if self._keep:
            self._inputs.append(input.detach())
        return torch.addmm(next(self._starts), input, self._weight)


class WindowedLSTM(nn.Module):
    """An LSTM that reads its input and, through a soft window, a text (Graves' equations 46 to 52).

    From its output h_t it finds for each component of the window a weight α, a sharpness β and a step:
    κ_t = κ_{t-1} + exp(κ̂_t). The window is w_t = Σ_u φ(t, u) c_u with φ(t, u) = Σ α exp(-β (κ_t - u)²) and
    c_u the character u = 0, 1, ..., one of K. The next step reads w_t together with its input.

    Args:
        norm: a key of ``NORMS``.
        input_size: F.
        characters: K.
        hidden_size: H.
        components: of the window.
        pace: the characters by which a fresh network advances in a step.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.handwriting.network import WindowedLSTM
        >>> layer = WindowedLSTM("layer", 3, 57, 20, components=10)
        >>> text = torch.eye(57)[torch.tensor([[4, 11, 11]])]
        >>> hidden, windows = layer(torch.randn(5, 1, 3), text)
        >>> hidden.shape, windows.shape
        (torch.Size([5, 1, 20]), torch.Size([5, 1, 57]))
    """

    def __init__(
        self,
        norm: str,
        input_size: int,
        characters: int,
        hidden_size: int,
        components: int,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        size = input_size + characters
        self.cell = recurrent.lstm_cell(norm, size, hidden_size)
        self.reader = nn.Linear(hidden_size, 3 * components)
        with torch.no_grad():
            self.reader.bias.view(3, components)[2] += torch.tensor(pace).log()
        self.input_size, self.components = input_size, components
        self.variant = NORMS[norm]

    def start(self, text: Tensor) -> Reading:
        """Return the state before the first step; text (N, U, K) of zeros and ones."""
        hidden = text.new_zeros(len(text), self.cell.hidden_size)
        places = text.new_zeros(len(text), self.components)
        return Reading(hidden, hidden, places, text.new_zeros(len(text), text.size(2)))

    def step(self, input: Tensor, text: Tensor, before: Reading) -> tuple[Reading, Tensor]:
        """Take one step: input (N, F), text (N, U, K) to the next state and φ (N, U)."""
        rows = torch.cat((input, before.window), 1)
        hidden, cell = self.cell(rows, (before.hidden, before.cell))
        positions = torch.arange(text.size(1), dtype=text.dtype, device=text.device)
        window, places, attention = self._look(self.reader(hidden), text, positions, before.places)
        return Reading(hidden, cell, places, window), attention

    def forward(self, inputs: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map inputs (T, N, F), text (N, U, K) to h (T, N, H) and the windows (T, N, K): ``step`` T times."""
        hidden, cell, places, window = self.start(text)
        # A weight-normalized matrix is called parametrizations.weight_ih.original0 and original1.
        names = [name.removeprefix("parametrizations.") for name, _ in self.cell.named_parameters()]
        weights: dict[str, Tensor] = {n: getattr(self.cell, n) for n in (n.partition(".")[0] for n in names)}
        own, read = weights["weight_ih"].split((self.input_size, text.size(2)), 1)
        # Without a norm the bias belongs to the products, otherwise it comes after the norm.
        bias = weights["bias_ih"] + weights["bias_hh"] if self.variant == "none" else None
        from_input = _StepProduct(F.linear(inputs, own, bias), read)
        nothing = inputs.new_zeros(*inputs.shape[:2], len(read))
        from_hidden = _StepProduct(nothing, weights["weight_hh"])
        weights = {name: weight for name, weight in weights.items() if not name.startswith("weight")}
        reader = _StepProduct(self.reader.bias.expand(*inputs.shape[:2], -1), self.reader.weight)
        positions = torch.arange(text.size(1), dtype=text.dtype, device=text.device)
        outputs, windows = [], []
        for _ in range(len(inputs)):
            hidden, cell = self._update(weights, from_input(window), from_hidden(hidden), cell)
            window, places, _ = self._look(reader(hidden), text, positions, places)
            outputs.append(hidden)
            windows.append(window)
        return torch.stack(outputs), torch.stack(windows)

    def _update(
        self, weights: dict[str, Tensor], from_input: Tensor, from_hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the next h and c from W x and W h (N, 4H), as ``self.cell`` has it (paper eq. 20-22)."""
        if self.variant != "none":
            return functional.lstm_gates(from_input, from_hidden, cell, weights, variant=self.variant)
        size = cell.size(1)
        opens, new, shows = (from_input + from_hidden).split((2 * size, size, size), 1)
        enters, stays = opens.sigmoid().chunk(2, 1)
        cell = torch.addcmul(stays * cell, enters, new.tanh())
        return shows.sigmoid() * cell.tanh(), cell

    def _look(
        self, numbers: Tensor, text: Tensor, positions: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the window (N, K), where its components are, and φ (N, U) from ``self.reader``'s output."""
        weight, sharpness, forward = numbers.exp().chunk(3, 1)
        places = places + forward
        distance = (places.unsqueeze(2) - positions).square()
        attention = torch.bmm(weight.unsqueeze(1), torch.exp(-sharpness.unsqueeze(2) * distance))
        return torch.bmm(attention, text).squeeze(1), places, attention.squeeze(1)


class HandwritingNetwork(nn.Module):
    """Graves' synthesis network: the next step of the pen, as a mixture, from those before and the text.

    Layers 2 and 3 read the pen, the window and the layer below; the output reads all three layers.

    Args:
        norm: a key of ``NORMS``, of all three layers.
        characters: K.
        hidden_size: H of each layer.
        mixtures: bivariate Gaussians in the output.
        components: Gaussians in the window.
        pace: the characters by which a fresh network advances in a step.

    Raises:
        ExperimentError: there is no such norm.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.handwriting.network import HandwritingNetwork
        >>> network = HandwritingNetwork("layer", characters=57, hidden_size=20)
        >>> network(torch.randn(5, 1, 3), torch.tensor([[4, 11, 11]])).shape  # 6 for each of 20 Gaussians, 1
        torch.Size([5, 1, 121])
    """

    def __init__(
        self,
        norm: str,
        characters: int,
        hidden_size: int = 400,
        mixtures: int = 20,
        components: int = 10,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ExperimentError(f"unknown norm {norm!r} of handwriting; expected one of {', '.join(NORMS)}")
        self.characters, self.mixtures = characters, mixtures
        self.first = WindowedLSTM(norm, PEN, characters, hidden_size, components, pace)
        size = PEN + characters + hidden_size
        self.second = recurrent.lstm(norm, size, hidden_size)
        self.third = recurrent.lstm(norm, size, hidden_size)
        self.output = nn.Linear(3 * hidden_size, 6 * mixtures + 1)

    def forward(self, pen: Tensor, text: Tensor) -> Tensor:
        """Predict what comes after each step.

        Args:
            pen: the steps so far (T, N, 3).
            text: the characters 0 to K - 1, int64 (N, U); K where a line has none.

        Returns:
            The parameters of ``handwriting_density``, (T, N, 6 mixtures + 1).
        """
        hidden, windows = self.first(pen, self.one_hot(text))
        seen = torch.cat((pen, windows), 2)
        second, _ = self.second(torch.cat((seen, hidden), 2))
        third, _ = self.third(torch.cat((seen, second), 2))
        parameters: Tensor = self.output(torch.cat((hidden, second, third), 2))
        return parameters

    @torch.no_grad()
    def write(self, text: Tensor, steps: int, generator: torch.Generator, bias: float = 0.0) -> list[Tensor]:
        """Write texts by hand, step by step; a line ends where the window has left its text.

        Args:
            text: as for ``forward``, (N, U).
            steps: at most.
            generator: of the random numbers, on the network's device.
            bias: of ``handwriting_density.sample``.

        Returns:
            For each line its steps (steps, 3), the first of which is the point where the line begins.
        """
        lengths = (text < self.characters).sum(1)
        # One place more, for the window to see that the text is over.
        codes = self.one_hot(F.pad(text, (0, 1), value=self.characters))
        reading, second_state, third_state = self.first.start(codes), None, None
        pen = codes.new_zeros(1, len(text), PEN)
        written, over = [pen], torch.zeros_like(lengths, dtype=torch.bool)
        counts = torch.zeros_like(lengths)
        while not over.all() and len(written) <= steps:
            reading, attention = self.first.step(pen[0], codes, reading)
            seen, hidden = torch.cat((pen, reading.window[None]), 2), reading.hidden[None]
            second, second_state = self.second(torch.cat((seen, hidden), 2), second_state)
            third, third_state = self.third(torch.cat((seen, second), 2), third_state)
            parameters = self.output(torch.cat((hidden, second, third), 2))
            pen = sample(parameters[0], generator, bias)[None]
            written.append(pen)
            over |= attention.argmax(1) >= lengths
            counts += ~over
        lines = torch.cat(written).transpose(0, 1)
        return [line[: count + 1] for line, count in zip(lines, counts.tolist(), strict=True)]

    def one_hot(self, text: Tensor) -> Tensor:
        """Turn characters (N, U) into (N, U, K) in the dtype of the weights; zeros where there is none."""
        codes = F.one_hot(text, self.characters + 1)[..., : self.characters]
        return codes.to(self.output.weight.dtype)
