"""Wrong arguments for every public call and every raw operator: PyTorch's exceptions, never a crash.

The calls run in a process of their own, which says before each what it is about to do; where it dies, that
call is the failure. TypeError, ValueError and RuntimeError may come, NotImplementedError among them.
"""
# ruff: noqa: T201 - the process reports to the one that started it

from __future__ import annotations

import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .draws import DTYPES, Draw, Failure
from .subjects import SUBJECTS

ALLOWED = (TypeError, ValueError, RuntimeError)
OTHER_DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
#: The slowest of these calls take milliseconds.
SECONDS_PER_CALL = 0.1
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); from tests.fuzz import arguments; "
    "arguments.child(int(sys.argv[2]), int(sys.argv[3]))"
)


def negative_view(t: Tensor) -> Tensor:
    """Return a view whose memory holds -t: the imaginary part of a conjugate."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def wrong_tensor(draw: Draw, t: Tensor) -> Any:
    """Return a wrong value for a tensor: often not a tensor, or one of another kind, size or layout."""
    shape = tuple(t.shape)
    ways: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.choice(
            (3, 1.5, "x", [1.0, 2.0], (), {}, object(), torch.float32, Tensor, [t], t.tolist())
        ),
        lambda: t.detach().to(torch.float32).numpy(),
        lambda: t.to(draw.choice(DTYPES)),
        lambda: t.to(draw.choice(OTHER_DTYPES)),
        lambda: t.to("meta"),
        lambda: t.detach().to_sparse(),
        lambda: t.unsqueeze(draw.choice((0, -1))),
        lambda: t.reshape(-1),
        lambda: t.new_zeros(()),
        lambda: t.new_zeros(0),
        lambda: t.new_zeros([*shape[:-1], 0]),
        lambda: t[..., :-1] if shape else t,
        lambda: torch.cat([t, t], -1) if shape else t,
        lambda: t.new_zeros(draw.choice(((1,), (2, 2), (1, 2, 3, 4), (0, 3), (3, 0), (1, 0, 5)))),
        lambda: t.new_zeros(1).expand(shape),
        lambda: t.transpose(0, -1) if shape else t,
        lambda: t.detach().requires_grad_(t.is_floating_point()),
        lambda: negative_view(t) if t.dtype in (torch.float32, torch.float64) else t,
        lambda: (
            torch.full_like(t, float("nan")) if t.is_floating_point() else ~t if t.dtype == torch.bool else -t
        ),
        lambda: torch.nn.Parameter(t.detach(), requires_grad=False),
        lambda: torch.nested.nested_tensor([t.detach()]),
        lambda: t.detach().as_subclass(Subclass),
    ]
    return draw.choice(ways)()


class Subclass(Tensor):
    """A tensor of another class."""


def wrong(draw: Draw, value: Any) -> Any:
    """Return a wrong value for an argument that is not a tensor."""
    if isinstance(value, Tensor):
        return wrong_tensor(draw, value)
    anything = (
        *(None, 3, -1, 0, 1.5, "x", b"x", [], [None], {}, object()),
        *(torch.ones(2), float("nan"), 1 << 70),
    )
    if draw.chance(0.3):
        return draw.choice(anything)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((-1, 0, value + 1, 1 << 40, 1 << 70, float(value), str(value), None))
    if isinstance(value, float):
        return draw.choice((float("nan"), -1.0, float("inf"), -float("inf"), 1, None, 1j, 1e308, 5e-324))
    if isinstance(value, str):
        others = ("layer", "none", "gru", "lstm", "rnn_relu", "summed")
        return draw.choice(("", "x", value.upper(), value.encode(), *others))
    if isinstance(value, dict):
        return wrong_dict(draw, value)
    if isinstance(value, list | tuple):
        return wrong_list(draw, value)
    return draw.choice(anything)


def wrong_list(draw: Draw, values: Any) -> Any:
    """Return a sequence with something wrong in it."""
    kind, values = type(values), list(values)
    at = draw.randrange(len(values)) if values else 0
    way = draw.choice(("shorter", "longer", "other", "other", "other", "reversed", "empty", "iterator"))
    if way == "iterator":
        return iter(values)
    if way == "shorter":
        values = values[:at] + values[at + 1 :]
    elif way == "longer":
        values.insert(at, draw.choice((None, 1, -1, 1 << 40, *values[:1])))
    elif way == "reversed":
        values.reverse()
    elif way == "empty":
        values = []
    elif values:
        values[at] = wrong(draw, values[at])
    return kind(values) if kind in (list, tuple) else values


def wrong_dict(draw: Draw, values: dict[Any, Any]) -> Any:
    """Return a dictionary with something wrong in it."""
    values = dict(values)
    key = draw.choice(tuple(values)) if values else "x"
    way = draw.choice(("less", "more", "other", "other", "other", "renamed", "list"))
    if way == "list":
        return list(values.items())
    taken = values.pop(key, None)
    if way == "more":
        added = draw.choice(("bias_ih", "weight_hr", "gain", "x", 3, None))
        values |= {key: taken, added: draw.choice((None, torch.ones(4)))}
    elif way == "other":
        values[key] = wrong(draw, taken)
    elif way == "renamed":
        values[draw.choice(("gain", "bias", "x", 1))] = taken
    return values


# ---- in the separate process ----


def call_of(seed: int) -> tuple[str, Callable[[], Any]]:
    """Draw a call; return its description and the call."""
    draw = Draw("arguments", seed)
    torch.manual_seed(seed)
    subject = draw.choice(SUBJECTS)
    function, arguments = subject(draw)
    changed = draw.sample(sorted(arguments), min(len(arguments), draw.choice((1, 1, 1, 2, 3))))
    for name in changed:
        arguments[name] = wrong(draw, arguments[name])
    what = f"{subject.__name__}: {getattr(function, 'subject', '')} with " + ", ".join(
        f"{name}={described(arguments[name])}" for name in changed
    )
    return what, lambda: function(**arguments)


def described(value: Any) -> str:
    """Return a short description of a value."""
    if isinstance(value, Tensor):
        try:
            return (
                f"{type(value).__name__}({list(value.shape)}, {value.dtype}, {value.device}, {value.layout})"
            )
        except RuntimeError:  # a nested one has no shape
            return f"nested {value.dtype}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of " + ", ".join(map(described, value))
    if isinstance(value, dict):
        return "dict of " + ", ".join(f"{k!r}: {described(v)}" for k, v in value.items())
    return repr(value).replace("\n", " ")[:80]


def child(first: int, last: int) -> None:
    """Run calls; print each before it is made, and its outcome where that is wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in range(first, last):
        what, call = call_of(seed)
        print(f"call {seed} {what}", flush=True)
        try:
            call()
        except ALLOWED as error:
            if not str(error).strip():
                print(f"wrong {seed} {type(error).__name__} without a message", flush=True)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            print(f"wrong {seed} {type(error).__name__}: {error} ({where})".replace("\n", " "), flush=True)
    print("done", flush=True)


# ---- in the caller's ----


def failures(first: int, last: int) -> list[tuple[int, str]]:
    """Return the seeds in [first, last) whose calls misbehaved, and how."""
    found = []
    while first < last:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(first), str(last)]
        try:
            limit = 60 + SECONDS_PER_CALL * (last - first)
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            output, end = done.stdout, f"the process ended with {done.returncode}: {done.stderr[-300:]}"
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            end = f"the process did not end in {limit:.0f} s"
        calls = dict(line.split(" ", 2)[1:] for line in output.splitlines() if line.startswith("call "))
        for line in output.splitlines():
            if line.startswith("wrong "):
                _, seed, what = line.split(" ", 2)
                found.append((int(seed), f"{calls[seed]}\n  {what}"))
        if output.rstrip().endswith("done"):
            break
        if not calls:
            raise Failure(f"the calls did not start: {end}")
        dead = max(map(int, calls))
        found.append((dead, f"{calls[str(dead)]}\n  {end}"))
        first = dead + 1
    return found


def run(seed: int, count: int = 1) -> float:
    """Make calls in a separate process."""
    if found := failures(seed, seed + count):
        raise Failure("\n".join(f"arguments {at}: {what}" for at, what in found))
    return 0.0
