"""Lines of handwriting as steps of the pen with their text, from two sets of pen strokes.

``iam``: lines of English by 221 writers (IAM-OnDB, as in the paper), the pen as it was recorded.

``omniglot``: characters that people drew one at a time (Omniglot), put side by side: a line is made of
drawings by one person, its text are the characters drawn. They were drawn by mouse or touchpad on a grid of
pixels; the strokes are simplified to their corners, and these moved by a random part of a pixel, without
which the density of coordinates that are whole numbers would have no bound.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from layernorm.experiments import data
from layernorm.experiments.task import ExperimentError

#: Graves' alphabet of 57: the letters, what follows, and one for everything else.
_CHARACTERS: Final = string.ascii_letters + " .,'"
_OTHER: Final = "�"
#: Of ten writers, how many are held out.
_HELD_OUT: Final = 2
#: Pixels (of 105) that a simplified stroke may be off, and between characters written side by side.
_TOLERANCE: Final = 1.5
_GAP: Final = 10.0

#: A character and the strokes that one person drew it with.
_Drawn: TypeAlias = tuple[str, list[np.ndarray]]
_Written = TypeVar("_Written")


@dataclass(frozen=True)
class Line:
    """One line of handwriting.

    Attributes:
        characters: what is written, each in the alphabet.
        pen: float64 (steps, 3): the offset from the point before, x to the right and y up, and 1 where a
            stroke ends. The first point is where the line begins; its offset is 0.
    """

    characters: tuple[str, ...]
    pen: np.ndarray


@dataclass(frozen=True)
class Lines:
    """Lines side by side, their offsets standardized.

    Attributes:
        pen: float32 (lines, steps + 1, 3), 0 beyond a line's end.
        steps: of each line after its first point, int64 (lines).
        text: indices into the alphabet, int64 (lines, characters); beyond a text's end the alphabet's size.
    """

    pen: Tensor
    steps: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, cases: Tensor) -> Lines:
        """Return these lines, cut to the longest of them."""
        steps = self.steps[cases]
        return Lines(self.pen[cases, : int(steps.max()) + 1], steps, self.text[cases])

    def to(self, device: torch.device) -> Lines:
        """Return the same on a device."""
        return Lines(self.pen.to(device), self.steps.to(device), self.text.to(device))


@dataclass(frozen=True)
class Corpus:
    """Lines to learn from, and lines of other writers.

    Attributes:
        alphabet: the characters.
        train: lines.
        valid: lines of the writers held out.
        mean: of the training offsets, float32 (2).
        deviation: of the training offsets, float32 (2): standardized offsets are (offset - mean)/deviation.
    """

    alphabet: tuple[str, ...]
    train: Lines
    valid: Lines
    mean: Tensor
    deviation: Tensor

    def offsets(self, pen: Tensor) -> Tensor:
        """Turn standardized steps (..., 3) into offsets (..., 2) in the units of the data."""
        return pen[..., :2] * self.deviation.to(pen.device) + self.mean.to(pen.device)


def load(source: str, steps: int, lines: int, valid_lines: int) -> Corpus:
    """Load the corpus of a source.

    Args:
        source: ``"omniglot"`` or ``"iam"``.
        steps: to which a line is cut.
        lines: to learn from, at most.
        valid_lines: of other writers, at most.

    Raises:
        MissingData: the source is not here.
        ExperimentError: there is no such source, or a size is not positive.
    """
    for name, number in (("steps", steps), ("lines", lines), ("valid_lines", valid_lines)):
        if number < 1:
            raise ExperimentError(f"{name} of handwriting must be at least 1, got {number}")
    if source not in _SOURCES:
        raise ExperimentError(f"unknown source {source!r} of handwriting; expected {' or '.join(_SOURCES)}")
    alphabet, train, valid = _SOURCES[source](steps, lines, valid_lines)
    offsets = np.concatenate([line.pen[1:, :2] for line in train])
    mean, deviation = offsets.mean(0), offsets.std(0)

    def side_by_side(chosen: Sequence[Line]) -> Lines:
        return _side_by_side(chosen, alphabet, mean, deviation)

    scale = [torch.from_numpy(numbers).float() for numbers in (mean, deviation)]
    return Corpus(alphabet, side_by_side(train), side_by_side(valid), *scale)


def pen_steps(strokes: Iterable[np.ndarray]) -> np.ndarray:
    """Turn strokes (points, 2 or more) of x, y, ... into steps of the pen (steps, 3), as ``Line`` has them.

    Examples:
        >>> import numpy as np
        >>> from layernorm.experiments.tasks.handwriting.lines import pen_steps
        >>> pen_steps([np.array([[5.0, 5.0], [6.0, 7.0]]), np.array([[0.0, 7.0]])])
        array([[ 0.,  0.,  0.],
               [ 1.,  2.,  1.],
               [-6.,  0.,  1.]])
    """
    parts = [stroke[:, :2] for stroke in strokes]
    points = np.concatenate(parts)
    ends = np.zeros(len(points))
    ends[np.cumsum([len(part) for part in parts]) - 1] = 1.0
    return np.column_stack((np.diff(points, axis=0, prepend=points[:1]), ends))


def simplified(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the corners of a polyline (points, 2) that is nowhere further than this from the original.

    The algorithm of Ramer (1972) and of Douglas and Peucker (1973).

    Examples:
        >>> import numpy as np
        >>> from layernorm.experiments.tasks.handwriting.lines import simplified
        >>> simplified(np.array([[0.0, 0.0], [1.0, 0.2], [2.0, 0.0], [2.0, 5.0]]), 0.5)
        array([[0., 0.],
               [2., 0.],
               [2., 5.]])
    """
    keep = np.zeros(len(points), bool)
    keep[[0, -1]] = True
    spans = [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord = points[last] - points[first]
        inner = points[first + 1 : last] - points[first]
        length = chord @ chord
        along = np.clip(inner @ chord / length, 0.0, 1.0) if length else np.zeros(len(inner))
        distance = np.square(inner - along[:, None] * chord).sum(1)
        furthest = int(distance.argmax())
        if distance[furthest] > tolerance**2:
            corner = first + 1 + furthest
            keep[corner] = True
            spans += [(first, corner), (corner, last)]
    return points[keep]


def _omniglot(steps: int, lines: int, valid_lines: int) -> _Found:
    """Return lines that each hold as many characters as fit, of a random person's random drawings."""
    random = np.random.default_rng(0)
    drawings = data.omniglot_strokes()
    alphabet = tuple(sorted({f"{drawing.alphabet} {drawing.character}" for drawing in drawings}))
    written: dict[str, list[_Drawn]] = defaultdict(list)
    for drawing in drawings:
        corners = [simplified(stroke[:, :2], _TOLERANCE) for stroke in drawing.strokes]
        strokes = [stroke + random.uniform(-0.5, 0.5, stroke.shape) for stroke in corners]
        writer = f"{drawing.alphabet} {drawing.drawer:02d}"
        written[writer].append((f"{drawing.alphabet} {drawing.character}", strokes))
    train, valid = _by_writer(written)

    def compose(writers: Sequence[list[_Drawn]], count: int) -> list[Line]:
        # Of its own, so that the lines held out do not depend on the number of those to learn from.
        random = np.random.default_rng(0)
        return [_line(writers[int(random.integers(len(writers)))], steps, random) for _ in range(count)]

    return alphabet, compose(train, lines), compose(valid, valid_lines)


def _line(drawn: list[_Drawn], steps: int, random: np.random.Generator) -> Line:
    """Put drawings side by side, left to right, until the next would make more than this many steps."""
    characters: list[str] = []
    strokes: list[np.ndarray] = []
    right, points = 0.0, 0
    while True:
        character, own = drawn[int(random.integers(len(drawn)))]
        points += sum(map(len, own))
        if characters and points > steps + 1:
            break
        left = min(stroke[:, 0].min() for stroke in own)
        moved = [stroke + np.array((right - left, 0.0)) for stroke in own]
        right = max(stroke[:, 0].max() for stroke in moved) + _GAP
        characters.append(character)
        strokes += moved
    return Line(tuple(characters), pen_steps(strokes)[: steps + 1])


def _iam(steps: int, lines: int, valid_lines: int) -> _Found:
    """Return lines cut to a number of steps; their texts are whole, as the window does not get beyond."""
    written: dict[str, list[Line]] = defaultdict(list)
    for line in data.iam_ondb():
        if sum(map(len, line.strokes)) < 2:
            continue
        # The recorder's y grows downwards.
        pen = pen_steps(stroke[:, :2] * (1.0, -1.0) for stroke in line.strokes)
        text = tuple(character if character in _CHARACTERS else _OTHER for character in line.text)
        written[line.writer].append(Line(text, pen[: steps + 1]))
    train, valid = _by_writer(written)

    def choose(writers: Sequence[list[Line]], count: int) -> list[Line]:
        found = [line for writer in writers for line in writer]
        return [found[index] for index in np.random.default_rng(0).permutation(len(found))[:count]]

    return (*_CHARACTERS, _OTHER), choose(train, lines), choose(valid, valid_lines)


def _by_writer(written: dict[str, list[_Written]]) -> tuple[list[list[_Written]], list[list[_Written]]]:
    """Return what the writers wrote, those to learn from and those held out: the last two of every ten."""
    train: list[list[_Written]] = []
    valid: list[list[_Written]] = []
    for index, writer in enumerate(sorted(written)):
        (valid if index % 10 >= 10 - _HELD_OUT else train).append(written[writer])
    if not train or not valid:
        raise ExperimentError(f"handwriting needs the strokes of 9 writers or more, got {len(written)}")
    return train, valid


def _side_by_side(
    lines: Sequence[Line], alphabet: tuple[str, ...], mean: np.ndarray, deviation: np.ndarray
) -> Lines:
    index = {character: number for number, character in enumerate(alphabet)}
    steps = torch.tensor([len(line.pen) - 1 for line in lines])
    pen = torch.zeros(len(lines), int(steps.max()) + 1, 3)
    text = torch.full((len(lines), max(len(line.characters) for line in lines)), len(alphabet))
    for number, line in enumerate(lines):
        offsets = (line.pen[1:, :2] - mean) / deviation
        pen[number, 1 : len(line.pen), :2] = torch.from_numpy(offsets)
        pen[number, : len(line.pen), 2] = torch.from_numpy(line.pen[:, 2])
        text[number, : len(line.characters)] = torch.tensor([index[each] for each in line.characters])
    return Lines(pen, steps, text)


#: An alphabet, lines to learn from, lines held out.
_Found: TypeAlias = tuple[tuple[str, ...], list[Line], list[Line]]
_SOURCES: Final[dict[str, Callable[[int, int, int], _Found]]] = {"omniglot": _omniglot, "iam": _iam}
