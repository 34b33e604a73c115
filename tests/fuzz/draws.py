"""The draws of a case: sizes, magnitudes around the kernels' thresholds, layouts, settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layernorm import backends, ops
from tests.settings import CAPABILITIES, instruction_set, poisoned_memory, thread_count

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
EPS = (0.0, 1e-45, 1e-12, 1e-5, 1.0)
# Vectors hold 2 to 16 elements, sums 32 of them in each lane of a pair, rows up to 3072 bytes go together.
EDGES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
# Where a kernel takes another path: variances of 2^-100 and 2^127 (float64: 2^-960, 2^1022), and rstd of
# 2^±30 (2^±300) in backward. As exponents of the rows' deviation.
THRESHOLDS = {torch.float32: (-50, 63, -30, 30), torch.float64: (-480, 511, -300, 300)}


class Failure(AssertionError):
    """A case whose result is wrong."""


def check(fits: bool, message: str) -> None:
    """Fail the case unless ``fits``."""
    if not fits:
        raise Failure(message)


class Draw(random.Random):
    """The random numbers of one case; ``notes`` tell what was drawn."""

    def __init__(self, part: str, seed: int) -> None:
        super().__init__(f"{part} {seed}")
        self.notes: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(self.getrandbits(60))

    def note(self, **values: Any) -> None:
        """Keep what was drawn for the message of a failure."""
        self.notes |= values

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random() < probability

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float64."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def size(self, most: int = 130) -> int:
        """Return a small size more often than a large one, and often one next to the size of a vector."""
        if self.chance(0.3):
            return max(1, min(most, self.choice(EDGES[:5]) + self.randint(-1, 1)))
        return self.randint(1, self.choice((4, 20, most)))

    def exponent(self, dtype: torch.dtype) -> int:
        """Draw the power of two by which a row of this dtype is scaled."""
        least, most = finite_exponents(dtype)
        if self.chance(0.3):
            return self.randint(-3, 3)
        if dtype != torch.float16 and self.chance(0.4):
            threshold = self.choice(THRESHOLDS[torch.float64 if dtype == torch.float64 else torch.float32])
            return min(most, threshold + self.randint(-3, 3))
        return self.randint(least, most)

    def tensor(self, dtype: torch.dtype, *shape: int, extremes: bool = True, spread: int = 0) -> Tensor:
        """Draw normal numbers of one magnitude, ordinary or not, plus or minus ``spread`` binary orders."""
        a = self.normal(*shape)
        if spread:
            a = a * torch.exp2(torch.randint(-spread, spread + 1, shape, generator=self._generator).double())
        if extremes:
            a = torch.ldexp(a, torch.tensor(self.exponent(dtype)))
        return rounded(a, dtype)

    def laid(self, a: Tensor) -> Tensor:
        """Return the same values in a drawn layout."""
        kind = self.choice(("plain", "plain", "column-major", "sliced", "rows apart", "offset", "wide"))
        if kind == "column-major" and a.dim() > 1:
            a = a.transpose(0, -1).contiguous().transpose(0, -1)
        elif kind == "sliced":
            a = torch.stack([a, torch.full_like(a, float("nan"))], -1)[..., 0]
        elif kind == "offset":
            a = torch.cat([a.new_full((1,), float("nan")), a.reshape(-1)])[1:].view(a.shape)
        elif kind == "wide" and a.dim() > 1:
            a = torch.nn.functional.pad(a, (1, 2), value=float("nan"))[..., 1:-2]
        elif kind == "rows apart" and a.dim() > 1:
            a = torch.stack([a, torch.full_like(a, float("nan"))], 1)[:, 0]
        return a


def finite_exponents(dtype: torch.dtype) -> tuple[int, int]:
    """Return the powers of two whose products with normal numbers times 8 are finite, denormals included."""
    info = torch.finfo(dtype)
    least = math.frexp(info.tiny)[1] + round(math.log2(info.eps))
    return max(least, -1073), math.frexp(info.max)[1] - 4


def rounded(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest finite numbers of this dtype."""
    info = torch.finfo(dtype)
    return a.clamp(info.min, info.max).to(dtype)


def unit(dtype: torch.dtype) -> float:
    """Return the unit of roundoff."""
    return torch.finfo(dtype).eps / 2


def computed(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of this dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def setting(draw: Draw) -> Iterator[None]:
    """Draw a number of threads and an instruction set, and fill fresh memory with NaN."""
    if ops.native is None:
        yield
        return
    threads, capability = draw.choice((1, 1, 1, 2)), draw.choice(CAPABILITIES)
    draw.note(threads=threads, capability=capability)
    with thread_count(threads), instruction_set(capability), poisoned_memory():
        yield


@contextmanager
def by_reference() -> Iterator[None]:
    """Compute by the reference in one thread: several are slow for small tensors where others are busy."""
    with thread_count(1), backends.use("reference"):
        yield


def run_case(drawn: tuple[Draw, Any], judged: Callable[[Draw, Any], float]) -> float:
    """Judge a drawn case and return its largest share of what is allowed; a failure tells what was drawn."""
    draw, case = drawn
    try:
        with setting(draw), np.errstate(all="ignore"):
            return judged(draw, case)
    except Failure as failure:
        raise Failure(f"{failure}\n  {draw.notes}") from None


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Return whether two results are equal, NaN for NaN and 0 for either 0."""
    return all(
        x.shape == y.shape
        and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )
