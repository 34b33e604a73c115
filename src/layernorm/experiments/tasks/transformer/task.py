"""A transformer on the characters of Shakespeare's plays: norms in various places, and none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.transformer.network import FORMS, Transformer

VALIDATION_BITS: Final = Metric("validation_bits", "validation bits a character", form="{:.3f}", log=True)
TEST_BITS: Final = Metric("test_bits", "test bits a character", form="{:.3f}", log=True, is_test=True)
_AT_ONCE: Final = 64
# Bits a character by which two networks are alike.
_ALIKE: Final = 0.02


class Characters(Problem):
    """The next character of a text, whose last twentieth is the test part, the one before validation.

    A case is a window of the text as long as the context, the first of which starts at the beginning; its
    start is drawn anew each time, within the length of the context.

    Args:
        context: characters that are seen at once.
        width: features, a multiple of ``heads``.
        layers: pairs of attention and feed-forward network.
        heads: of attention.
        held_out: characters of the validation and of the test part each, from their beginnings.
        cases: training windows, from the beginning of the text.

    Raises:
        ExperimentError: a size is not possible, or the text cannot be had.
    """

    def __init__(
        self,
        context: int = 64,
        width: int = 64,
        layers: int = 6,
        heads: int = 4,
        held_out: int = 50_000,
        cases: int = 15_000,
    ) -> None:
        for name, value, most in (("context", context, 4096), ("width", width, 4096), ("layers", layers, 96)):
            if not 0 < value <= most:
                raise ExperimentError(f"{name} must be 1 to {most}, got {value}")
        if heads < 1 or width % heads:
            raise ExperimentError(f"heads must divide the width, {width}, got {heads}")
        if held_out <= context:
            raise ExperimentError(f"held_out must be more than the context, {context}, got {held_out}")
        text = data.tiny_shakespeare()
        self.alphabet = "".join(sorted(set(text)))
        codes = {character: code for code, character in enumerate(self.alphabet)}
        coded = torch.tensor([codes[character] for character in text])
        part = len(coded) // 20
        self._train, self._valid, self._test = coded.split([len(coded) - 2 * part, part, part])
        self._valid, self._test = self._valid[:held_out], self._test[:held_out]
        self._sizes = (context, width, layers, heads)
        self._context = context
        there = (len(self._train) - 1) // context - 1
        if not 0 < cases <= there:
            raise ExperimentError(f"cases must be 1 to {there} with a context of {context}, got {cases}")
        self.cases = cases

    def to(self, device: torch.device) -> None:
        """Move the text to a device."""
        self._train, self._valid, self._test = (
            part.to(device) for part in (self._train, self._valid, self._test)
        )

    def network(self, norm: str) -> nn.Module:
        """Make the transformer of a name of ``FORMS``."""
        return Transformer(len(self.alphabet), *self._sizes, norm)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the cross-entropy in nats, by character."""
        offsets = (batch.uniform() * self._context).long()
        starts = batch.cases * self._context + offsets
        windows = self._train[starts[:, None] + torch.arange(self._context + 1, device=starts.device)]
        total = _cross_entropy(network, windows)
        return Loss(total, windows[:, 1:].numel())

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Return bits a character of both parts, cut into windows of the context's length."""
        return {
            metric.name: self._bits(network, part)
            for metric, part in ((VALIDATION_BITS, self._valid), (TEST_BITS, self._test))
        }

    def _bits(self, network: nn.Module, part: Tensor) -> float:
        windows = part.unfold(0, self._context + 1, self._context)
        total = sum(_cross_entropy(network, some).item() for some in windows.split(_AT_ONCE))
        return total / windows[:, 1:].numel() / math.log(2)


def _cross_entropy(network: nn.Module, windows: Tensor) -> Tensor:
    logits = network(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def _card(results: pd.DataFrame, norm: str, than: str, claim: str, section: str, within: float = 0.0) -> Card:
    return judging.better(
        results,
        TEST_BITS,
        norm=norm,
        than=than,
        claim=claim,
        section=section,
        within=within,
        is_of_budget=True,
    )


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge the forms at their best learning rates and warm-ups."""
    alike = f"is as good as layer norm, at most {_ALIKE:g} bits worse, after as many updates."
    without = "Without norms a transformer is better with {} after as many updates."
    return (
        _card(
            results,
            "pre-layer",
            "none",
            "A transformer is better with layer norm than without norms, after as many updates.",
            "Vaswani et al. 2017",
        ),
        _card(results, "pre-rms", "pre-layer", f"RMS norm {alike}", "Zhang and Sennrich 2019", _ALIKE),
        _card(results, "pre-dyt", "pre-layer", f"Dynamic tanh {alike}", "Zhu et al. 2025", _ALIKE),
        _card(results, "fixup", "none", without.format("Fixup"), "Zhang et al. 2019"),
        _card(results, "rezero", "none", without.format("ReZero"), "Bachlechner et al. 2020"),
        _card(results, "fixup", "pre-layer", f"Fixup without norms {alike}", "Zhang et al. 2019", _ALIKE),
    )


def judge_settings(results: pd.DataFrame) -> Sequence[Card]:
    """Judge what needs a warm-up, and what bears the greatest learning rate."""
    cold, warm = results[results.warmup == 0], results[results.warmup > 0]
    greatest = cold[cold.learning_rate == results.learning_rate.max()]
    of_post = [
        judging.at_best_rates(table[table.norm == "post-layer"], VALIDATION_BITS).assign(norm=name)
        for table, name in ((cold, "without a warm-up"), (warm, "with a warm-up"))
    ]
    return (
        _card(
            pd.concat(of_post),
            "with a warm-up",
            "without a warm-up",
            "With layer norm after the blocks a transformer needs a warm-up.",
            "Xiong et al. 2020",
        ),
        _card(
            judging.at_best_rates(cold, VALIDATION_BITS),
            "pre-layer",
            "post-layer",
            "Without a warm-up layer norm is better before the branches than after the blocks.",
            "Xiong et al. 2020",
        ),
        _card(
            greatest,
            "pre-layer-qk",
            "pre-layer",
            "At the greatest learning rate norms of queries and keys are better than none of them.",
            "Dehghani et al. 2023",
        ),
    )


_PRESET = Preset(
    epochs=1,
    batch_sizes=(16,),
    norms=tuple(FORMS),
    seeds=(0, 1, 2),
    learning_rates=(3e-3, 1e-2, 3e-2),
    warmups=(0, 100),
    schedule="linear",
    evaluate_every=100,
    sizes={"context": 48, "width": 48, "layers": 6, "heads": 4, "held_out": 10_000, "cases": 8_000},
)

TASK = Task(
    name="transformer",
    title="Transformer",
    section="after the paper",
    summary=(
        "the characters of Tiny Shakespeare, a transformer that predicts the next one from those before it, "
        "with norms in various places or without any, Adam"
    ),
    problem=Characters,
    metrics=(VALIDATION_BITS, TEST_BITS),
    norms=tuple(FORMS),
    presets={
        "small": _PRESET,
        # That of nanoGPT on a CPU: 2,000 updates.
        "paper": replace(
            _PRESET,
            epochs=2,
            batch_sizes=(12,),
            learning_rates=(3e-4, 1e-3, 3e-3),
            schedule="cosine",
            evaluate_every=250,
            sizes={"context": 64, "width": 128, "layers": 4, "heads": 4, "held_out": 50_000, "cases": 12_000},
        ),
    },
    judge=judge,
    judge_settings=judge_settings,
)
