"""Online inference: a recurrent network one time step at a time, with its weights packed once.

``module.stream()`` makes a ``Stream``. On the CPU a step is one call into compiled code, which reads the
packed weights and writes the result; on a GPU it is the replay of one CUDA graph. Either has the bits of the
module's call over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor

from layernorm import autocast, backends, ops, recurrent_checks, reference, stream_checks
from layernorm.current_weights import current_weights
from layernorm.parameters import RecurrentParameters, State


class Stream:
    """The steps of one module over a batch of ongoing sequences; ``module.stream()`` makes it.

    It keeps the state between steps, and a copy of the weights that the module would have used when it was
    made, packed for the compiled kernel: what changes later is not seen until ``refresh()``. Weights that
    PyTorch's pruning, weight norm or spectral norm compute, by hooks or parametrizations, are computed for
    it. Steps run no hooks. Dropout is not applied, as in evaluation, autocast has no effect, and no
    derivative is recorded.

    The kernel is the module's: compiled for the CPU, or Triton's on a GPU, for which the first step
    captures a CUDA graph. A step then allocates nothing but its result, and has the bits
    that the module gives for the whole sequence, however it is cut into steps. Elsewhere, and where
    ``layernorm.backends`` says so when the stream is made or refreshed, ``layernorm.reference`` takes the
    steps, which gives the sequence's numbers up to the rounding of its products.

    A stream is for one thread at a time; streams of the same module in several threads are independent. It
    can be neither copied nor pickled; its ``state`` can, and makes another stream go on from there.

    Args:
        module: a ``LayerNormLSTM``, ``LayerNormGRU`` or ``LayerNormRNN`` of one direction.
        batch_size: N, the sequences that step together.
        state: as the attribute ``state``; None for zeros.
        weights: what the matrices of a float32 module on the CPU are kept as. None: as they are.
            ``"bfloat16"``: rounded to it. ``"int8"``: 127 steps up and down to the largest number of each
            row, which belongs to one feature of a gate; and inputs and states, when they meet a matrix, 32767
            steps to the largest of theirs. Input, state, norms, sums and result stay float32. A step of a
            large network is bound by reading its weights, so it takes about half as long, or a third; the
            docs say what error that costs.

    Attributes:
        batch_size: N.
        weights: the argument.
        kernel: what takes the steps, ``"native"``, ``"triton"``, ``"looped"``, ``"persistent"`` or
            ``"reference"``.

    Raises:
        ValueError: the module is bidirectional, batch_size not positive, or weights not a kind that there is
            for the module.
        TypeError: batch_size is not an int, or state not of the module's kind.
        RuntimeError: the state has the wrong shape, dtype or device; the module has a forward pre-hook that
            may compute a weight; a weight is sharded between processes.

    Examples:
        >>> import torch, layernorm
        >>> lstm = layernorm.LayerNormLSTM(10, 20, num_layers=2)
        >>> stream = lstm.stream(batch_size=3)
        >>> x = torch.randn(5, 3, 10)
        >>> steps = [stream.step(x_t) for x_t in x]
        >>> output, (h, c) = lstm(x)
        >>> torch.equal(torch.stack(steps), output), torch.equal(stream.state[0], h)
        (True, True)
    """

    def __init__(
        self,
        module: RecurrentParameters,
        batch_size: int = 1,
        state: State | None = None,
        weights: str | None = None,
    ) -> None:
        self._module = module
        self._name = f"{type(module).__name__}.stream"
        if module.bidirectional:
            raise ValueError(
                f"{self._name}: a bidirectional network has no online form: its reverse direction begins "
                "at the end of the sequence, which has not come yet; use a module with bidirectional=False"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"{self._name}: batch_size must be an int, got {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"{self._name}: batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size
        self._output_size = module.proj_size or module.hidden_size
        sizes = [self._output_size, *([module.hidden_size] if module.spec.cell == "lstm" else [])]
        self._shapes = [(module.num_layers, batch_size, size) for size in sizes]
        layers = self._current_weights()
        weight = layers[0]["weight_ih"]
        stream_checks.weight_kind(self._name, weights, weight)
        self.weights = weights
        with torch.inference_mode(False):  # the steps write to them in whichever mode
            options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
            self._state = tuple(torch.zeros(shape, **options) for shape in self._shapes)
        self._pack(layers)
        self.reset()
        if state is not None:
            self.state = state

    def refresh(self) -> None:
        """Take the module's weights as they are now; the state stays.

        Raises:
            RuntimeError: the module has moved to another dtype or device, a forward pre-hook may compute a
                weight, or a weight is sharded.
        """
        h, layers = self._state[0], self._current_weights()
        weight = layers[0]["weight_ih"]
        if weight.dtype != h.dtype or weight.device != h.device:
            raise RuntimeError(
                f"{self._name}: the module was {h.dtype} on {h.device} when this stream was made and is now "
                f"{weight.dtype} on {weight.device}; make another with stream()"
            )
        self._pack(layers)

    def _current_weights(self) -> list[dict[str, Tensor]]:
        module = self._module
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))  # of a replica
        any_weight = next(chain(module.parameters(), module.buffers(), attributes))
        with autocast.disabled(any_weight.device):
            return current_weights(module, self._name)

    def _pack(self, layers: list[dict[str, Tensor]]) -> None:
        h = self._state[0]
        with torch.inference_mode(False), torch.no_grad(), autocast.disabled(h.device):
            learned = self._module.learned_initial_state()
            self._start = None if learned is None else tuple(s.unsqueeze(1).clone() for s in learned)
            weights = [w for layer in layers for w in layer.values()]
            spec = self._module.spec
            kernel = backends.recurrent_kernel_for(spec.cell, h, weights)
            self.kernel = kernel if spec.codes else "reference"
            if self.kernel == "native":
                self._take_step = self._compiled(layers)
            else:
                self._layers = [{name: self._kept(w) for name, w in layer.items()} for layer in layers]
                self._captured: Captured | None = None
                self._take_step = self._by_sequences

    def _kept(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight, which the compiled kernel would keep rounded if it is a matrix."""
        if weight.dim() != 2 or self.weights is None:
            return weight.clone()
        if self.weights == "bfloat16":
            return weight.bfloat16().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        return torch.where(scale > 0, (weight / scale).round() * scale, 0.0)

    def _compiled(self, layers: list[dict[str, Tensor]]) -> Any:
        """Return a function of the input and ``out``, which takes a step or returns NotImplemented."""
        assert ops.native is not None  # noqa: S101 - it was chosen
        spec = self._module.spec
        h, *c = self._state
        listed = [spec.listed(layer) for layer in layers]
        kind = stream_checks.WEIGHT_KINDS.index(self.weights)
        return ops.native.Stream(listed, h, c[0] if c else None, spec.codes, spec.eps, kind).step

    def step(self, x_t: Tensor, out: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            x_t: (N, F), or (F) where N is 1; of the parameters' dtype and device, in any layout.
            out: where to write the result: of its shape, dtype and device, in any layout; it may overlap
                ``x_t``. None for a fresh tensor.

        Returns:
            h of the last layer: (N, P), or (P) for (F), P being proj_size or else hidden_size; ``out``
            where it is given. It does not require grad.

        Raises:
            TypeError: an argument is not a Tensor.
            ValueError: an argument has the wrong rank or dtype.
            RuntimeError: it has the wrong shape or device, ``out`` has elements that share memory or
                requires grad, or another thread is taking a step.

        Examples:
            >>> import torch, layernorm
            >>> stream = layernorm.LayerNormGRU(10, 20).stream()
            >>> stream.step(torch.randn(1, 10)).shape, stream.step(torch.randn(10)).shape
            (torch.Size([1, 20]), torch.Size([20]))
            >>> outputs = torch.empty(5, 1, 20)
            >>> for x_t, out in zip(torch.randn(5, 1, 10), outputs):
            ...     _ = stream.step(x_t, out=out)
        """
        result = self._take_step(x_t, out)
        if result is NotImplemented:
            return self._other_step(x_t, out)
        return result  # type: ignore[no-any-return]

    def _other_step(self, x_t: Tensor, out: Tensor | None) -> Tensor:
        """Take a step of tensors that the compiled entry leaves: raise, or read them as plain ones."""
        self._check_step(x_t, out)
        with torch.no_grad():
            plain = x_t.as_subclass(Tensor).resolve_neg().clone()
            fresh = self._take_step(plain, None)
            if fresh is NotImplemented:
                raise RuntimeError(
                    f"{self._name}: step() takes plain tensors, got {type(x_t).__name__}; inside of "
                    "transforms call the module over the sequence"
                )
            return fresh if out is None else out.copy_(fresh)

    def _by_sequences(self, x_t: Tensor, out: Tensor | None) -> Tensor:
        """Take a step as a sequence of one."""
        self._check_step(x_t, out)
        with torch.no_grad(), autocast.disabled(x_t.device):
            data = x_t.reshape(1, self.batch_size, -1)
            replayed = self.kernel != "reference" and x_t.is_cuda
            if replayed and not torch.cuda.is_current_stream_capturing():
                if self._captured is None:
                    self._captured = Captured(self._through_layers, data, self._state)
                result = self._captured(data).reshape(*x_t.shape[:-1], -1)
                return result.clone() if out is None else out.copy_(result)
            result = self._through_layers(data).reshape(*x_t.shape[:-1], -1)
            return result if out is None else out.copy_(result)

    def _through_layers(self, data: Tensor) -> Tensor:
        """Compute a sequence of one step; the state moves on."""
        compute = reference.recurrent_layer if self.kernel == "reference" else ops.recurrent_layer
        for layer, weights in enumerate(self._layers):
            held = tuple(s[layer] for s in self._state)
            data, final = compute(self._module.spec, data, held, weights)
            for s, new in zip(held, final, strict=True):
                s.copy_(new)
        return data

    def _check_step(self, x_t: Tensor, out: Tensor | None) -> None:
        h = self._state[0]
        stream_checks.step_argument(self._name, "x_t", x_t, self.batch_size, self._module.input_size, h)
        if out is None:
            return
        stream_checks.step_argument(self._name, "out", out, self.batch_size, self._output_size, h)
        stream_checks.out_argument(self._name, out, x_t)

    @property
    def state(self) -> State:
        """The state after the last step, a copy; setting it lets the next step go on from there.

        h (num_layers, N, P), and for an LSTM (h, c) with c (num_layers, N, H): the shapes of the module's
        own state. Where N is 1 it may also be set without N, as the module returns it for one sequence.

        Examples:
            >>> import torch, layernorm
            >>> gru = layernorm.LayerNormGRU(10, 20)
            >>> output, h = gru(torch.randn(5, 3, 10))
            >>> stream = gru.stream(batch_size=3, state=h)
            >>> y = stream.step(torch.randn(3, 10))
            >>> torch.equal(stream.state[-1], y)
            True
        """
        with torch.inference_mode(False):
            return self._module.as_state(tuple(s.clone() for s in self._state))

    @state.setter
    def state(self, state: State) -> None:
        given = [
            s.unsqueeze(1) if self.batch_size == 1 and s.dim() == 2 else s
            for s in self._module.as_tuple(state)
        ]
        for name, tensor, held in zip(("h", "c"), given, self._state, strict=False):
            stream_checks.state(self._name, name, tensor, held)
        with torch.no_grad():
            for tensor, held in zip(given, self._state, strict=True):
                held.copy_(tensor)

    def reset(self, resets: Tensor | None = None, reset_state: State | None = None) -> None:
        """Set the state to where it starts before the next step, as ``resets`` does in a sequence.

        Args:
            resets: bool (N), or numbers that are 0 or 1, with or without a last dimension of 1: true for the
                sequences that begin anew; None for all.
            reset_state: what they begin from in place of zeros, or of the state that the module has learned
                to begin from: of the shapes of ``state``, or any that broadcast to them.

        Raises:
            TypeError: resets is not a Tensor, or reset_state not of the module's kind.
            ValueError: resets has another number than 0 and 1.
            RuntimeError: an argument has the wrong shape or device.

        Examples:
            >>> import torch, layernorm
            >>> stream = layernorm.LayerNormGRU(10, 20).stream(batch_size=2)
            >>> y = stream.step(torch.randn(2, 10))
            >>> stream.reset(torch.tensor([True, False]))
            >>> stream.state.abs().sum(-1) > 0
            tensor([[False,  True]])
        """
        if resets is not None:
            of = "(batch_size)"
            resets = recurrent_checks.reset_mask(
                self._name, resets, self._state[0].shape[1:2], self._state[0], of
            )
        if reset_state is None and self._start is not None:
            reset_state = self._module.as_state(self._start)
        starts = recurrent_checks.reset_state(
            self._name, reset_state, True, self._shapes, self._state[0]
        ) or tuple(torch.zeros((), dtype=s.dtype, device=s.device) for s in self._state)
        with torch.no_grad():
            for s, start in zip(self._state, starts, strict=True):
                s.copy_(start if resets is None else torch.where(resets.unsqueeze(-1), start.to(s.dtype), s))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self._name}: a stream can be neither copied nor pickled; keep its state, and make another "
            "with module.stream(batch_size, state)"
        )

    def __repr__(self) -> str:
        module = self._module
        kept = "" if self.weights is None else f", weights={self.weights!r}"
        return (
            f"<{self._name}: batch_size={self.batch_size}, kernel={self.kernel!r}{kept}, "
            f"{type(module).__name__}({module.extra_repr()})>"
        )


class Captured:
    """A function of one tensor as a CUDA graph, with memory of its own for what comes in and goes out.

    Args:
        function: what is captured; called once before, which compiles its kernels.
        example: a tensor like those it is called with.
        state: what it changes, which that call must not.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], example: Tensor, state: Sequence[Tensor]
    ) -> None:
        self._input = example.contiguous().clone()
        before = [s.clone() for s in state]
        function(self._input)
        for s, held in zip(state, before, strict=True):
            s.copy_(held)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(example.device), torch.cuda.graph(self._graph):
            self._output = function(self._input)

    def __call__(self, input: Tensor) -> Tensor:
        """Return the result, which the next call overwrites."""
        self._input.copy_(input)
        self._graph.replay()
        return self._output
