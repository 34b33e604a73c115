"""Recurrent layers: this package's kernels, cuDNN's un-normalized ones, and the cell by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from benchmarks.core import cuda
from benchmarks.first_contact.figures import Setting, off
from benchmarks.recurrent.case import Case, make_case
from benchmarks.recurrent.loops import SEQUENCES
from layernorm import backends
from layernorm.gpu import settings, tiers
from layernorm.gpu.recurrent import operators
from layernorm.spec import layer_spec

# A graph of 16 steps, one more, two of 4 and a single step: whatever a loop is put together from.
_CHECKED_STEPS: Final = 41
_SANITIZED_STEPS: Final = 5


class Layer(NamedTuple):
    """A layer of the paper's variant as the operators take it, and its numbers."""

    case: Case
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, cell: Any, hidden: int, batch: int, steps: int, dtype: torch.dtype, device: str) -> Layer:
        """Return a layer that begins with a state of zeros."""
        case = make_case(cell, batch, hidden, steps, True, device).to(dtype)
        spec = layer_spec(cell, "paper")
        h = case.x.new_zeros(batch, hidden)
        c = torch.zeros_like(h) if cell == "lstm" else None
        weights = spec.listed(case.normalized)
        arguments = (case.x, h, c, weights, None, None, None, None, spec.codes, spec.eps, False)
        return cls(case, arguments)

    def inference(self) -> tuple[Tensor, ...]:
        """Compute the output and keep nothing."""
        return operators.recurrent(*self.arguments, False)

    def forward(self) -> tuple[Tensor, ...]:
        """Compute the output, and keep what backward needs."""
        return operators.recurrent_forward(*self.arguments, False)

    def backward(self, kept: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Compute all gradients."""
        output, _, _, *saved = kept
        _, _, c, weights, *_ = self.arguments
        wanted = [True, True, c is not None, False, False, *(weight is not None for weight in weights)]
        grads = (self.case.grad, None, None)
        return operators.recurrent_backward(*self.arguments, *grads, output, *saved, wanted)

    def results(self) -> list[Tensor]:
        """Return output and the gradients of the input and of W_hh."""
        kept = self.forward()
        found = self.backward(kept)
        return [kept[0].clone(), found[0].clone(), found[5][1].clone()]

    def exact(self) -> list[Tensor]:
        """Return the same in float64, by the cell as people write it."""
        case = self.case.to(torch.float64)
        x = case.x.double().requires_grad_()
        weights = {name: t.requires_grad_(name == "weight_hh") for name, t in case.normalized.items()}
        output = SEQUENCES[case.cell](x, *weights.values())
        return [output.detach(), *torch.autograd.grad(output, (x, weights["weight_hh"]), case.grad.double())]


def ours(setting: Setting, kernel: str, cell: str, dtype_name: str) -> None:
    """Print errors, whether bits are the same each time, and what a step takes, at each size."""
    dtype = getattr(torch, dtype_name)
    for hidden, batch in setting.sizes:
        at = {"hidden": hidden, "batch": batch}
        with backends.use(kernel):
            if kernel != "triton" and not _serves(kernel, cell, hidden, dtype, at, setting):
                continue
            _check(Layer.of(cell, hidden, batch, _steps(setting), dtype, setting.device), at, setting)
            if setting.only_right:
                continue
            layer = Layer.of(cell, hidden, batch, setting.steps, dtype, setting.device)
            for precision in ("ieee", "tf32") if dtype == torch.float32 else (None,):
                named = {} if precision is None else {"precision": precision}
                with _precision(precision):
                    _time(layer, at | named, setting)


def _steps(setting: Setting) -> int:
    if setting.rehearse:
        return setting.steps
    return _SANITIZED_STEPS if setting.only_right else _CHECKED_STEPS


def dependent(setting: Setting, cell: str, dtype_name: str) -> None:
    """Print bits and times where each kernel of a step begins before the one before it ends."""
    dtype, device = getattr(torch, dtype_name), torch.device(setting.device)
    architecture = None if setting.rehearse else torch.cuda.get_device_capability()
    for hidden, batch in setting.sizes:
        at = {"hidden": hidden, "batch": batch}
        layer = Layer.of(cell, hidden, batch, _steps(setting), dtype, setting.device)
        with backends.use("triton"), _dependent({architecture}):
            runs = [layer.results() for _ in range(1 if setting.only_right else 3)]
            setting.emit(**at, dependent=tiers.is_dependent(device))
        with backends.use("triton"), _dependent(set()):
            usual = layer.results()
        setting.emit(**at, as_usual=[all(map(torch.equal, usual, run)) for run in runs])
        if not setting.only_right:
            with backends.use("triton"), _dependent({architecture}):
                _time(Layer.of(cell, hidden, batch, setting.steps, dtype, setting.device), at, setting)


@contextmanager
def _dependent(architectures: set[Any]) -> Iterator[None]:
    before, settings.DEPENDENT = settings.DEPENDENT, frozenset(architectures)  # type: ignore[misc]
    try:
        yield
    finally:
        settings.DEPENDENT = before  # type: ignore[misc]


def _serves(kernel: str, cell: Any, hidden: int, dtype: torch.dtype, at: Any, setting: Setting) -> bool:
    """Print what computes each direction; return whether forward is this kernel's."""
    variant, device = layer_spec(cell, "paper").variant, torch.device(setting.device)
    choices = [
        backends.tier(cell, variant, hidden, dtype, device, backward=backward) for backward in (False, True)
    ]
    setting.emit(**at, tier=[each.kernel for each in choices], why=[each.reason for each in choices])
    return choices[0].kernel == kernel


def _check(layer: Layer, at: Any, setting: Setting) -> None:
    """Compare with float64, and the bits of a launch with those of a capture and of a replay."""
    with _precision("ieee"):
        exact = layer.exact()
        runs = [layer.results() for _ in range(1 if setting.only_right else 3)]
    same = [all(map(torch.equal, runs[0], other)) for other in runs[1:]]
    setting.emit(**at, off=[off(a, b) for a, b in zip(runs[0], exact, strict=True)], same_bits=same)


def _time(layer: Layer, at: Any, setting: Setting) -> None:
    kept = layer.forward()
    calls: dict[str, Callable[[], object]] = {
        "inference": layer.inference,
        "forward": layer.forward,
        "backward": lambda: layer.backward(kept),
        "training": lambda: layer.backward(layer.forward()),
    }
    setting.emit(**at, us_a_step={name: setting.a_step(call) for name, call in calls.items()})


def _precision(name: str | None) -> Any:
    """Return a context in which float32 products are exact ("ieee") or of TF32, as cuDNN's are by default."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=name != "ieee")


def cudnn(setting: Setting) -> None:
    """Print what a step of ``torch.nn.LSTM`` takes, and the names of its kernels."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden, batch in setting.sizes:
            case = make_case("lstm", batch, hidden, setting.steps, True, setting.device).to(dtype)
            lstm = torch.nn.LSTM(hidden, hidden, device=setting.device, dtype=dtype)
            x = case.x.requires_grad_()

            def inference(lstm: Any = lstm, x: Tensor = x) -> None:
                with torch.inference_mode():
                    lstm(x)

            def training(lstm: Any = lstm, x: Tensor = x, grad: Tensor = case.grad) -> None:
                torch.autograd.grad(lstm(x)[0], (x, *lstm.parameters()), grad)

            us = {"inference": setting.a_step(inference), "training": setting.a_step(training)}
            at: dict[str, Any] = {
                "dtype": str(dtype).removeprefix("torch."),
                "hidden": hidden,
                "batch": batch,
            }
            if dtype == torch.float32:
                at["precision"] = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
            setting.emit(**at, us_a_step=us, kernels=_kernels(inference, setting))


def _kernels(call: Callable[[], object], setting: Setting) -> list[tuple[str, int]]:
    """Return the names of the kernels that a call launches most often, and how often."""
    if setting.rehearse:
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.count)
    return [(event.key[:100], event.count) for event in events[:3]]


def by_hand(setting: Setting, cell: str, dtype_name: str) -> None:
    """Print what a step of the cell by hand takes under ``torch.compile``, also in a graph of all steps."""
    from benchmarks.gpu_recurrent.peers import PEERS

    for hidden, batch in setting.sizes:
        at = {"hidden": hidden, "batch": batch}
        for training in (False, True):
            case = make_case(cell, batch, hidden, setting.steps, training, setting.device)
            with torch.inference_mode(not training):
                made = PEERS["compile-step"](case.to(getattr(torch, dtype_name)))
                us = {"training" if training else "inference": setting.a_step(made.call)}
                setting.emit(**at, us_a_step=us, compile_s=round(made.compile_s or 0.0, 1))
                if not training:
                    _in_graph(made.call, at, setting)


def _in_graph(call: Callable[[], object], at: Any, setting: Setting) -> None:
    try:
        us = setting.a_step(cuda.in_graph(call, setting.device))
    except Exception as error:  # what cannot be captured can still be trained
        setting.emit(**at, problem=f"{type(error).__name__}: {error}"[:300])
        return
    setting.emit(**at, us_a_step={"inference in a graph": us})
