"""Fixtures of the tests of streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layernorm import backends


@pytest.fixture(params=["native", "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compute by the compiled kernels, then by the reference."""
    if request.param == "native":
        request.getfixturevalue("native")
    with backends.use(request.param):
        yield request.param
