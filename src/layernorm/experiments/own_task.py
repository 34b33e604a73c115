"""A task of one's own: model, data, loss and metrics as they are, with which norms are compared.

A file defines ``TASK = layernorm.task(...)``, and ``layernorm compare file.py`` compares norms on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, TypeAlias, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from layernorm.baselines import Norm
from layernorm.experiments import registry
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.results import judging
from layernorm.experiments.task import (
    Batch,
    Loss,
    Metric,
    Optimizer,
    Preset,
    Problem,
    Schedule,
    Task,
    final_metric,
)

#: Inputs and targets, each a tensor or an array, of inputs perhaps several; or a dataset of such pairs.
Data: TypeAlias = Any
#: Of a network's outputs and the targets: a loss, or a metric.
Measure: TypeAlias = Callable[[Any, Tensor], Any]

NORMS: Final = ("none", "batch", "layer", "rms")
RATES: Final = (3e-4, 1e-3, 3e-3)
LOSS: Final = "loss"
_AT_ONCE: Final = 1000


class Options(TypedDict, total=False):
    """The arguments of ``task`` that have defaults."""

    test: Data
    metrics: Mapping[str, Measure] | None
    maximize: Sequence[str]
    norms: Sequence[str | Callable[[int], nn.Module]]
    batch_sizes: Sequence[int]
    learning_rates: Sequence[float]
    warmups: Sequence[int]
    seeds: int | Sequence[int]
    epochs: int
    optimizer: Optimizer
    schedule: Schedule
    clip: float | None
    evaluate_every: int | None
    name: str
    title: str


def task(
    *,
    model: Callable[[Norm], nn.Module],
    train: Data,
    valid: Data,
    test: Data = None,
    loss: Measure,
    metrics: Mapping[str, Measure] | None = None,
    maximize: Sequence[str] = (),
    norms: Sequence[str | Callable[[int], nn.Module]] = NORMS,
    batch_sizes: Sequence[int] = (128,),
    learning_rates: Sequence[float] = RATES,
    warmups: Sequence[int] = (0,),
    seeds: int | Sequence[int] = 5,
    epochs: int = 10,
    optimizer: Optimizer = "adam",
    schedule: Schedule = "constant",
    clip: float | None = None,
    evaluate_every: int | None = None,
    name: str = "own",
    title: str = "",
) -> Task:
    """Return a task that compares norms on a model of one's own.

    Args:
        model: makes the network, with fresh weights, from a ``layernorm.baselines.Norm``: ``norm(64)`` is the
            norm of 64 features, ``norm(64, dim=1)`` that of 64 channels.
        train: inputs and targets of equal lengths, tensors or arrays; several inputs as a tuple of them; or a
            dataset of pairs, which is read whole. Arrays of float64 become float32.
        valid: likewise, the cases by which learning rates are chosen.
        test: likewise, the cases that the results are of; None for the validation cases, which also chose
            then.
        loss: the mean over a batch, from the network's outputs and the targets.
        metrics: by name, each from outputs and targets a number; the first decides. Without any the loss
            does.
        maximize: the metrics of which more is better.
        norms: names that ``Norm`` knows, or what makes a module of a width.
        batch_sizes: cases per update.
        learning_rates: the greatest of the schedule; each norm is compared at the one that is best for it.
        warmups: updates over which the learning rate rises from 0, likewise.
        seeds: how many, or which.
        epochs: passes over the training cases.
        optimizer: ``"adam"``, ``"sgd"`` (with momentum 0.9) or ``"rmsprop"``.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``.
        clip: the greatest norm of all gradients together.
        evaluate_every: updates between evaluations; None for four an epoch.
        name: of the task; ``runs/NAME`` is its folder.
        title: of its report.

    Raises:
        ValueError: data of unequal lengths, an unknown norm, a number out of its range.
        TypeError: something is not what it has to be, the model among it.

    Examples:
        >>> import torch, layernorm
        >>> x, y = torch.randn(60, 5), torch.randint(0, 3, (60,))
        >>> from torch import nn
        >>> def model(norm):
        ...     return nn.Sequential(nn.Linear(5, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
        >>> task = layernorm.task(
        ...     model=model, train=(x[:40], y[:40]), valid=(x[40:], y[40:]),
        ...     loss=torch.nn.functional.cross_entropy,
        ... )
        >>> task.norms, task.metrics[0].label
        (('none', 'batch', 'layer', 'rms'), 'validation loss')
    """
    parts = {"train": _data("train", train), "valid": _data("valid", valid)}
    if test is not None:
        parts["test"] = _data("test", test)
    if not callable(loss):
        raise TypeError(f"loss must be a function of outputs and targets, got {type(loss).__name__}")
    measures = dict(metrics or {})
    for metric, measure in measures.items():
        if not callable(measure):
            raise TypeError(f"metric {metric!r} must be a function, got {type(measure).__name__}")
        if metric == LOSS:
            raise ValueError(f"a metric cannot be called {LOSS!r}, which is the loss")
    for metric in maximize:
        if metric not in measures:
            raise ValueError(f"maximize: there is no metric {metric!r}, only {', '.join(measures) or 'none'}")
    makers = {norm.name: norm for norm in map(Norm, norms)}
    if not makers:
        raise ValueError(f"norms must not be empty; expected some of {', '.join(NORMS)}")
    networks = {norm: _network(model, maker) for norm, maker in makers.items()}
    preset = Preset(
        epochs=_whole("epochs", epochs),
        batch_sizes=tuple(_whole("batch_sizes", size) for size in batch_sizes),
        norms=tuple(makers),
        seeds=tuple(range(_whole("seeds", seeds))) if isinstance(seeds, int) else _seeds(seeds),
        learning_rates=tuple(_above_0("learning_rates", rate) for rate in learning_rates),
        warmups=tuple(_whole("warmups", updates, 0) for updates in warmups),
        optimizer=_one_of("optimizer", optimizer, get_args(Optimizer)),
        schedule=_one_of("schedule", schedule, get_args(Schedule)),
        clip=None if clip is None else _above_0("clip", clip),
        evaluate_every=None if evaluate_every is None else _whole("evaluate_every", evaluate_every),
        sizes={"data": _digest(parts), "networks": _digest_of_text(*map(str, networks.values()))},
    )
    for option in ("batch_sizes", "seeds", "learning_rates", "warmups"):
        if not getattr(preset, option):
            raise ValueError(f"{option} must not be empty")
    columns = _metrics(list(measures) or [LOSS], maximize, "test" in parts)
    counts = f"{len(parts['train'][1])} training, {len(parts['valid'][1])} validation"
    return OwnTask(
        name=name,
        title=title or name,
        section="own",
        summary=f"{counts} and {len(parts['test'][1]) if 'test' in parts else 'no'} test cases, "
        f"{type(next(iter(networks.values()))).__name__}",
        problem=partial(_problem, model, parts, loss, measures, makers),
        metrics=columns,
        norms=tuple(makers),
        presets={"small": preset, "paper": preset},
        judge=partial(judging.ranking, metric=final_metric(columns), curve=columns[0]),
    )


class OwnTask(Task):
    """A task whose report can be made from what its folder says, without its model and data."""

    @property
    def description(self) -> dict[str, Any]:
        """Return what the report needs."""
        return {
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "norms": list(self.norms),
            "metrics": [asdict(metric) for metric in self.metrics],
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> OwnTask:
        """Return a task that reads and reports, and cannot be trained."""
        metrics = tuple(Metric(**metric) for metric in description["metrics"])
        return cls(
            name=description["name"],
            title=description["title"],
            section="own",
            summary=description["summary"],
            problem=_cannot_be_trained,
            metrics=metrics,
            norms=tuple(description["norms"]),
            presets={},
            judge=partial(judging.ranking, metric=final_metric(metrics), curve=metrics[0]),
        )


def task_of(config: Mapping[str, Any]) -> Task:
    """Return the task of a folder, by its ``config.json``.

    Raises:
        ExperimentError: there is none of its name.
    """
    if "described" in config:
        return OwnTask.described(config["described"])
    return registry.find(config["task"])


@dataclass
class OwnProblem(Problem):
    """Data, networks, loss and metrics that were given."""

    model: Callable[[Norm], nn.Module]
    parts: dict[str, tuple[tuple[Tensor, ...], Tensor]]
    measure: Measure
    metrics: Mapping[str, Measure]
    norms: Mapping[str, Norm]

    def __post_init__(self) -> None:
        self.cases = len(self.parts["train"][1])

    def to(self, device: torch.device) -> None:
        """Move the data to a device."""
        self.parts = {
            name: (tuple(each.to(device) for each in inputs), targets.to(device))
            for name, (inputs, targets) in self.parts.items()
        }

    def network(self, norm: str) -> nn.Module:
        """Make the network for a norm."""
        return _network(self.model, self.norms[norm])

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the given loss, by case."""
        inputs, targets = self.parts["train"]
        outputs = network(*(each[batch.cases] for each in inputs))
        found = self._loss(outputs, targets[batch.cases])
        return Loss(found * len(batch.cases), len(batch.cases))

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute loss and metrics on the validation cases, and on the test cases where there are any."""
        found = {}
        for part, word in (("valid", "validation"), ("test", "test")):
            if part not in self.parts:
                continue
            inputs, targets = self.parts[part]
            splits = zip(*(each.split(_AT_ONCE) for each in inputs), strict=True)
            outputs = _joined([network(*some) for some in splits])
            for name, measure in (self.metrics or {LOSS: self._loss}).items():
                found[f"{word}_{name}"] = _number(name, measure(outputs, targets))
            if self.metrics and part == "valid":
                found[f"{word}_{LOSS}"] = float(self._loss(outputs, targets))
        return found

    def _loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of some cases."""
        found = self.measure(outputs, targets)
        if not isinstance(found, Tensor) or found.dim() != 0:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ExperimentError(f"loss must return a scalar tensor, the mean over the cases; got {got}")
        return found


def _problem(*arguments: Any, data: str = "", networks: str = "") -> OwnProblem:
    """Make the problem; the digests tell a folder of other data or networks from this one."""
    return OwnProblem(*arguments)


def _cannot_be_trained(**sizes: Any) -> Problem:
    raise ExperimentError("the model and data of this folder are not here; run what made it again")


def _metrics(names: Sequence[str], maximize: Sequence[str], has_test: bool) -> tuple[Metric, ...]:
    """Return the columns, of validation and then of test cases."""

    def of(part: str, name: str) -> Metric:
        higher, is_test = name in maximize, part == "test"
        return Metric(f"{part}_{name}", f"{part} {name}", higher, form="{:.4g}", is_test=is_test)

    valid = [of("validation", name) for name in dict.fromkeys((*names, LOSS))]
    return (*valid, *(of("test", name) for name in names if has_test))


def _data(name: str, given: Data) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return inputs and targets as tensors."""
    if not isinstance(given, (tuple, list)) and hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        if isinstance(given, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be a pair of inputs and targets, got one {type(given).__name__}")
        given = default_collate([given[index] for index in range(len(given))])
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        got = f"{len(given)} of them" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"{name} must be a pair of inputs and targets, or a dataset of pairs; got {got}")
    inputs, targets = given
    several = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    tensors = tuple(_tensor(name, each) for each in several)
    target = _tensor(name, targets)
    lengths = {len(each) for each in (*tensors, target)}
    if len(lengths) > 1 or not lengths or not len(target):
        raise ValueError(
            f"{name}: inputs and targets must have equal lengths, at least 1; got "
            f"{', '.join(str(len(each)) for each in tensors)} and {len(target)}"
        )
    return tensors, target


def _tensor(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    try:
        array = np.asarray(given)
        return torch.as_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be of tensors or arrays of numbers, got {type(given).__name__}"
        ) from error


def _network(model: Callable[[Norm], nn.Module], norm: Norm) -> nn.Module:
    if not callable(model) or isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a function of a norm that makes a network, got {type(model).__name__}: "
            "model=lambda norm: Net(norm)"
        )
    made = model(norm)
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must return a torch.nn.Module, got {type(made).__name__}")
    return made


def _number(name: str, found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ExperimentError(f"metric {name!r} must give one number, got {got}") from error


def _joined(outputs: Sequence[Any]) -> Any:
    """Return the outputs of several calls as those of one."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return {key: _joined([each[key] for each in outputs]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(_joined(parts) for parts in zip(*outputs, strict=True))
    raise ExperimentError(f"the network must return tensors, got {type(first).__name__}")


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_whole("seeds", seed, 0) for seed in seeds))


def _above_0(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number greater than 0, got {value!r}")
    return float(value)


def _one_of(name: str, value: Any, choices: Sequence[str]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def _digest(parts: Mapping[str, tuple[tuple[Tensor, ...], Tensor]]) -> str:
    total = hashlib.sha256()
    for name, (inputs, targets) in parts.items():
        for each in (*inputs, targets):
            total.update(f"{name} {each.dtype} {list(each.shape)}".encode())
            total.update(each.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def _digest_of_text(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


__all__ = ["Data", "Measure", "Options", "OwnTask", "task", "task_of"]
