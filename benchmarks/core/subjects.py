"""What a benchmark measures: a peer made ready for one point, and checked before it is timed."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NotInstalledError(Exception):
    """The peer's package is missing."""


class NotSupportedError(Exception):
    """The peer cannot do what this point asks for; the text says why."""


@dataclass(frozen=True)
class Subject:
    """A peer that is ready to be measured.

    Attributes:
        call: what is timed.
        results: calls it and returns the outputs and, in training, the gradients of all inputs.
        context: what has to surround each sample.
        forward: the forward pass of training alone, whose outputs still hold what backward needs.
        compile_s: seconds that compiling took, where the peer is compiled for the point.
        release: frees the gradients that the call before has left.
    """

    call: Callable[[], object]
    results: Callable[[], list[Tensor]]
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    forward: Callable[[], Sequence[Tensor]] | None = None
    compile_s: float | None = None
    release: Callable[[], None] = lambda: None


def prepare(
    names: Sequence[str],
    build: Callable[[str], Subject],
    check: Callable[[str, Subject], None],
    note: Callable[[str], None],
) -> tuple[dict[str, Subject], dict[str, str]]:
    """Return the peers that can be measured, and why the others cannot.

    Args:
        names: of peers.
        build: makes one ready; may raise ``NotInstalledError`` and ``NotSupportedError``.
        check: raises where its results are not what they should be.
        note: is told why a peer has no figures.
    """
    gc.collect()
    subjects, problems = {}, {}
    for name in names:
        try:
            subject = build(name)
            check(name, subject)
            subjects[name] = subject
        except NotInstalledError:
            problems[name] = "not installed"
        except NotSupportedError as error:
            problems[name] = "not supported"
            if str(error):
                note(f"{name} is not supported: {first_line(error)}")
        except Exception as error:
            # A peer that fails must not end the run; it is shown, and stands in the table.
            problems[name] = "failed"
            note(f"{name} failed: {first_line(error)}")
    return subjects, problems


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of the results, relative to their norms; NaN if one is NaN.

    Examples:
        >>> import torch
        >>> from benchmarks.core.subjects import difference
        >>> difference([torch.tensor([3.0, 4.625])], [torch.tensor([3.0, 4.0])])
        0.125
    """
    if len(found) != len(expected):
        raise RuntimeError(f"{len(found)} results, expected {len(expected)}")
    largest = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise RuntimeError(f"a result of shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        relative = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
        if math.isnan(relative):
            return relative
        largest = max(largest, relative)
    return largest


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that is not empty, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def module(name: str) -> Any:
    """Return the module of that name.

    Raises:
        NotInstalledError: there is none.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotInstalledError(str(error.name)) from error
