"""The override of the choice of kernels: ``use`` for a context, the environment for the process.

A context is what ``contextvars`` has: a thread's own, or an asyncio task's. So blocks that overlap in several
threads or tasks never meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch

from layernorm.pytorch_internals import context_of_backward

KERNELS: Final = ("native", "triton", "looped", "persistent", "torch", "reference")
#: The variable that overrides the choice for the process.
VARIABLE: Final = "LAYERNORM_BACKEND"


class Choice(NamedTuple):
    """The kernel that computes a call, and the reason in one line."""

    kernel: str
    reason: str


# What the process asks for.
process: str | None = os.environ.get(VARIABLE) or None


class _Block:
    """A ``with`` block: the kernel that it asks for, and whether it was left from another context."""

    __slots__ = ("kernel", "left")

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.left = False


# The blocks around a call, the innermost last; None in a context that never had one.
_blocks: Final[ContextVar[tuple[_Block, ...] | None]] = ContextVar("layernorm.use", default=None)
#: Whether any context ever had one: until then no call need look, which would cost it more than this.
used = False
# The kernels that blocks inside a function ask for while Dynamo traces it.
_traced: tuple[str, ...] = ()
_this_module: Final[Any] = sys.modules[__name__]


def asked_for() -> str | None:
    """Return the kernel that the block around this call or else the process asks for, or None."""
    return (used and current()) or process


def current() -> str | None:
    """Return the kernel that the innermost block around this call asks for, or None."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo cannot read a context variable, but guards on attributes of modules: a change recompiles.
        return _traced[-1] if _traced else _this_module.outside
    return _of_this_context()


def __getattr__(name: str) -> Any:
    if name == "outside":
        return _of_this_context()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _of_this_context() -> str | None:
    blocks = _blocks.get()
    if blocks is None and (context := context_of_backward()) is not None:
        # PyTorch's threads for backward on other devices have empty contexts.
        blocks = context.get(_blocks)
    for block in reversed(blocks or ()):
        if not block.left:
            return block.kernel
    return None


def checked(kernel: str, name: str) -> str:
    """Return ``kernel`` if it is the name of one; ``name`` says where it came from."""
    if kernel not in KERNELS:
        raise ValueError(f"{name} must be one of {', '.join(KERNELS)}; got {kernel!r}")
    return kernel


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Use ``kernel`` for every call within the ``with`` block.

    The override belongs to a context (``contextvars``), not to the process: other threads and other asyncio
    tasks do not see it, and their blocks may overlap with this one in any way. A task created inside the
    block inherits it, for as long as the task runs. A thread started inside the block does not, unless it is
    given the context: ``Thread(target=contextvars.copy_context().run, args=(function,))``, or Python is
    3.14 with ``-X thread_inherit_context=1``. Backward uses the override of the call of ``backward()``,
    in whichever thread PyTorch runs it. To override the whole process, set ``LAYERNORM_BACKEND``.

    Args:
        kernel: ``"native"``, ``"triton"``, ``"looped"``, ``"persistent"``, ``"torch"`` or ``"reference"``.
            An operator that has no kernel of that kind raises when it is called. But recurrent operators,
            which have no ``"torch"`` kernel, keep the reference then, norms keep ``"torch"`` where
            ``"looped"`` or ``"persistent"`` is asked for, and layers that these cannot hold keep what would
            serve them otherwise.

    Raises:
        ValueError: ``kernel`` is none of these.

    Examples:
        >>> import torch, layernorm
        >>> with layernorm.backends.use("reference"):
        ...     output = layernorm.LayerNorm(4)(torch.zeros(2, 4))
    """
    global used, _traced
    checked(kernel, "kernel")
    used = True
    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, (*_traced, kernel)
        try:
            yield
        finally:
            _traced = before
        return
    block = _Block(kernel)
    token = _blocks.set((*(other for other in _blocks.get() or () if not other.left), block))
    try:
        yield
    finally:
        # Not what was before: blocks in generators may overlap, and the one entered first may end first.
        others = tuple(other for other in _blocks.get() or () if other is not block)
        try:
            _blocks.reset(token)
            _blocks.set(others)
        except ValueError:  # a generator that is finished in another context than it began in
            block.left = True
