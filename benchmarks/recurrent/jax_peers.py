"""The paper's layer-normalized cells in JAX: one step, and a jitted ``lax.scan`` over it.

Statistics are float32 as in Flax; everything else has the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.core.jax_arrays import array, jitted
from benchmarks.core.subjects import Subject, module
from benchmarks.recurrent.case import Case

EPS = 1e-5


def functions(cell: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the input's contribution, ``project(x, weights)``, and ``step(state, x, weights)``."""
    return {"lstm": _lstm, "gru": _gru, "rnn": _rnn}[cell]()


def _norm(a: Any, gain: Any, bias: Any = 0.0) -> Any:
    jax, jnp = module("jax"), module("jax.numpy")
    a32 = a.astype(jnp.float32)
    mean = a32.mean(-1, keepdims=True)
    var = jnp.square(a32 - mean).mean(-1, keepdims=True)
    return ((a32 - mean) * (jax.lax.rsqrt(var + EPS) * gain) + bias).astype(a.dtype)


def _lstm() -> tuple[Callable[..., Any], Callable[..., Any]]:
    jax, jnp = module("jax"), module("jax.numpy")
    sigmoid = jax.nn.sigmoid

    def project(x: Any, w: Any) -> Any:
        return _norm(x @ w["weight_ih"].T, w["gain_ih"], w["bias"])

    def step(state: Any, x: Any, w: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x + _norm(h @ w["weight_hh"].T, w["gain_hh"]), 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(_norm(c, w["gain_cell"], w["bias_cell"]))
        return h, c

    return project, step


def _gru() -> tuple[Callable[..., Any], Callable[..., Any]]:
    jax, jnp = module("jax"), module("jax.numpy")

    def two_norms(a: Any, gain: Any, bias_rz: Any, bias_n: Any) -> tuple[Any, Any]:
        rz = 2 * a.shape[-1] // 3
        return _norm(a[..., :rz], gain[:rz], bias_rz), _norm(a[..., rz:], gain[rz:], bias_n)

    def project(x: Any, w: Any) -> Any:
        bias, rz = w["bias"], 2 * w["bias_hn"].shape[0]
        return two_norms(x @ w["weight_ih"].T, w["gain_ih"], bias[:rz], bias[rz:])

    def step(state: Any, x: Any, w: Any) -> Any:
        (h,), (x_rz, x_n) = state, x
        b_rz, b_n = two_norms(h @ w["weight_hh"].T, w["gain_hh"], 0.0, w["bias_hn"])
        r, z = jnp.split(jax.nn.sigmoid(x_rz + b_rz), 2, -1)
        n = jnp.tanh(x_n + r * b_n)
        return (n + z * (h - n),)

    return project, step


def _rnn() -> tuple[Callable[..., Any], Callable[..., Any]]:
    jnp = module("jax.numpy")

    def project(x: Any, w: Any) -> Any:
        return x @ w["weight_ih"].T

    def step(state: Any, x: Any, w: Any) -> Any:
        return (jnp.tanh(_norm(x + state[0] @ w["weight_hh"].T, w["gain"], w["bias"])),)

    return project, step


def sequence(case: Case) -> Subject:
    """Return a whole sequence, in training with the gradients of the input and all weights."""
    jax, jnp = module("jax"), module("jax.numpy")
    project, step = functions(case.cell)
    rows = (case.x.size(1), case.hidden)

    def forward(x: Any, w: Any) -> Any:
        state = (jnp.zeros(rows, x.dtype),) * (2 if case.cell == "lstm" else 1)

        def scanned(state: Any, x: Any) -> Any:
            state = step(state, x, w)
            return state, state[0]

        return jax.lax.scan(scanned, state, project(x, w))[1]

    def train(x: Any, w: Any, grad: Any) -> Any:
        output, pullback = jax.vjp(forward, x, w)
        grad_x, grad_w = pullback(grad)
        return output, grad_x, [grad_w[name] for name in case.normalized]

    arguments = [array(case.x), {name: array(value) for name, value in case.normalized.items()}]
    if case.training:
        arguments.append(array(case.grad))
    return jitted(train if case.training else forward, arguments)
