"""Fixtures of all GPU tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from layernorm.gpu import tiers


@pytest.fixture
def pretend_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Call it with a compute capability: devices have it, and nothing chosen before is remembered."""

    def forget() -> None:
        for function in (tiers._architecture, tiers._tier, tiers.least_row):
            function.cache_clear()

    def pretend(major: int, minor: int) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    yield pretend
    forget()
