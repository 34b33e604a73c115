"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from layernorm import ops

# Several workers with several threads each would wait for one another; so would their subprocesses.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def native() -> None:
    """Skips where there are no compiled kernels."""
    if ops.NATIVE_PROBLEM is not None:
        pytest.skip(f"no compiled kernels: {ops.NATIVE_PROBLEM}")


def pytest_configure(config: pytest.Config) -> None:
    if ops.NATIVE_PROBLEM is not None:
        # Said once in a process, in whichever test comes first; test_backends.py tests it.
        config.addinivalue_line("filterwarnings", "ignore:layernorm. no compiled kernels:RuntimeWarning")


@pytest.fixture(autouse=True)
def _fixed_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors are filled with NaN, so that an element nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
