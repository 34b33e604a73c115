"""The parts of the recurrent layers' Triton kernels for the gates of rows: nonlinearities, norms, and back.

Gates are up to four tiles of features × rows, side by side in registers; COUNT or GATES says how many of the
arguments a, b, c, d there are, and the others are not looked at. A tile of one row gives it the bits that it
has among others. Statistics are in float32, the variance as Σ(a - mean)²/H; ``there`` says which rows exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.norm.forward_kernels import LEAST_VARIANCE, MOST_SQUARES


@triton.jit
def sigmoid(a):
    """Return 1/(1 + exp(-a))."""
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def tanh(a):
    """Return tanh to a few units in the last place: near zero by Cephes' polynomial."""
    z = a * a
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(a))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(a) < 0.625, p * z * a + a, tl.where(a < 0, -far, far))


@triton.jit
def nonlinear(a, RELU: tl.constexpr):
    """Return tanh(a), or a where it is positive and else 0; NaN either way."""
    if RELU:
        value = tl.where(a < 0.0, 0.0, a)
    else:
        value = tanh(a)
    return value


@triton.jit
def through_nonlinear(grad, value, RELU: tl.constexpr):
    """Return the gradient of a from that of ``nonlinear(a)``, which is ``value``."""
    if RELU:
        found = tl.where(value <= 0.0, 0.0, grad)
    else:
        found = grad * (1.0 - value * value)
    return found


@triton.jit
def _over(a, count):
    return tl.div_rn(a, count * tl.full([], 1.0, tl.float32))


@triton.jit
def _sum(a, b, c, d, COUNT: tl.constexpr):
    total = a
    if COUNT > 1:
        total += b
    if COUNT > 2:
        total += c
    if COUNT > 3:
        total += d
    return tl.sum(total, 0)


@triton.jit
def _squares(a, b, c, d, COUNT: tl.constexpr):
    return _sum(a * a, b * b, c * c, d * d, COUNT)


@triton.jit
def _less(a, b, c, d, mean, mask, COUNT: tl.constexpr):
    """Return each minus the mean, and zero beyond the width."""
    zero = tl.zeros(a.shape, a.dtype)
    a = tl.where(mask, a - mean, zero)
    if COUNT > 1:
        b = tl.where(mask, b - mean, zero)
    if COUNT > 2:
        c = tl.where(mask, c - mean, zero)
    if COUNT > 3:
        d = tl.where(mask, d - mean, zero)
    return a, b, c, d


@triton.jit
def normalized(a, b, c, d, mask, eps, H: tl.constexpr, COUNT: tl.constexpr, CENTRED: tl.constexpr):
    """Return (a - mean)·rstd of COUNT vectors that share statistics, and rstd; zero beyond the width."""
    width: tl.constexpr = COUNT * H
    p, q, r, s = a, b, c, d
    if CENTRED:
        p, q, r, s = _less(p, q, r, s, _over(_sum(p, q, r, s, COUNT), width), mask, COUNT)
        # What rounding the mean lost.
        p, q, r, s = _less(p, q, r, s, _over(_sum(p, q, r, s, COUNT), width), mask, COUNT)
    squares = _squares(p, q, r, s, COUNT)
    variance = _over(squares, width) + eps
    rstd = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(variance))
    ordinary = (variance > LEAST_VARIANCE) & (squares < MOST_SQUARES)
    p *= rstd
    q *= rstd
    r *= rstd
    s *= rstd
    if tl.min(ordinary.to(tl.int32), 0) == 0:  # float32 cannot hold a row's squares, or it has no number
        x, y, z, w = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
        if CENTRED:
            x, y, z, w = _less(x, y, z, w, _sum(x, y, z, w, COUNT) / width, mask, COUNT)
        exact = 1.0 / tl.sqrt(_squares(x, y, z, w, COUNT) / width + eps)
        p = tl.where(ordinary, p, (x * exact).to(tl.float32))
        q = tl.where(ordinary, q, (y * exact).to(tl.float32))
        r = tl.where(ordinary, r, (z * exact).to(tl.float32))
        s = tl.where(ordinary, s, (w * exact).to(tl.float32))
        rstd = tl.where(ordinary, rstd, exact.to(tl.float32))
    return p, q, r, s, rstd


@triton.jit
def normalized_gates(
    a,
    b,
    c,
    d,
    mask,
    eps,
    stats,
    there,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
):
    """Normalize the gates by their groups; write rstd of each group to ``stats``, unless that is None."""
    CENTRED: tl.constexpr = KIND == "layer"
    if SCOPE == "gate":
        a, _, _, _, of_a = normalized(a, a, a, a, mask, eps, H, 1, CENTRED)
        if stats is not None:
            tl.store(stats, of_a, there)
        if GATES > 1:
            b, _, _, _, of_b = normalized(b, b, b, b, mask, eps, H, 1, CENTRED)
            if stats is not None:
                tl.store(stats + 1, of_b, there)
        if GATES > 2:
            c, _, _, _, of_c = normalized(c, c, c, c, mask, eps, H, 1, CENTRED)
            if stats is not None:
                tl.store(stats + 2, of_c, there)
        if GATES > 3:
            d, _, _, _, of_d = normalized(d, d, d, d, mask, eps, H, 1, CENTRED)
            if stats is not None:
                tl.store(stats + 3, of_d, there)
    elif SCOPE == "matrix" and CELL == "gru":
        a, b, _, _, of_a = normalized(a, b, a, a, mask, eps, H, 2, CENTRED)
        if stats is not None:
            tl.store(stats, of_a, there)
        if GATES > 2:
            c, _, _, _, of_c = normalized(c, c, c, c, mask, eps, H, 1, CENTRED)
            if stats is not None:
                tl.store(stats + 1, of_c, there)
    else:
        a, b, c, d, of_a = normalized(a, b, c, d, mask, eps, H, GATES, CENTRED)
        if stats is not None:
            tl.store(stats, of_a, there)
    return a, b, c, d


@triton.jit
def through_norm(
    a,
    b,
    c,
    d,
    p,
    q,
    r,
    s,
    rstd,
    mask,
    H: tl.constexpr,
    COUNT: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Return the gradients of what was normalized, from those of the normalized p, q, r, s."""
    width: tl.constexpr = COUNT * H
    along = _over(_sum(a * p, b * q, c * r, d * s, COUNT), width)
    if CENTRED:
        a, b, c, d = _less(a, b, c, d, _over(_sum(a, b, c, d, COUNT), width), mask, COUNT)
    return (
        (a - p * along) * rstd,
        (b - q * along) * rstd,
        (c - r * along) * rstd,
        (d - s * along) * rstd,
    )


@triton.jit
def through_norms(
    a,
    b,
    c,
    d,
    p,
    q,
    r,
    s,
    stats,
    there,
    mask,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
):
    """Do what ``through_norm`` does for the groups of ``normalized_gates``, whose rstd are at ``stats``."""
    CENTRED: tl.constexpr = KIND == "layer"
    first = tl.load(stats, there, other=0.0)
    if SCOPE == "gate":
        a, _, _, _ = through_norm(a, a, a, a, p, p, p, p, first, mask, H, 1, CENTRED)
        if GATES > 1:
            b, _, _, _ = through_norm(
                b, b, b, b, q, q, q, q, tl.load(stats + 1, there, other=0.0), mask, H, 1, CENTRED
            )
        if GATES > 2:
            c, _, _, _ = through_norm(
                c, c, c, c, r, r, r, r, tl.load(stats + 2, there, other=0.0), mask, H, 1, CENTRED
            )
        if GATES > 3:
            d, _, _, _ = through_norm(
                d, d, d, d, s, s, s, s, tl.load(stats + 3, there, other=0.0), mask, H, 1, CENTRED
            )
    elif SCOPE == "matrix" and CELL == "gru":
        a, b, _, _ = through_norm(a, b, a, a, p, q, p, p, first, mask, H, 2, CENTRED)
        if GATES > 2:
            c, _, _, _ = through_norm(
                c, c, c, c, r, r, r, r, tl.load(stats + 1, there, other=0.0), mask, H, 1, CENTRED
            )
    else:
        a, b, c, d = through_norm(a, b, c, d, p, q, r, s, first, mask, H, GATES, CENTRED)
    return a, b, c, d


@triton.jit
def read_gates(row, column, mask, GATES: tl.constexpr, H: tl.constexpr):
    """Load GATES vectors of each row; the others are the first."""
    a = tl.load(row + column, mask, other=0.0)
    b, c, d = a, a, a
    if GATES > 1:
        b = tl.load(row + H + column, mask, other=0.0)
    if GATES > 2:
        c = tl.load(row + 2 * H + column, mask, other=0.0)
    if GATES > 3:
        d = tl.load(row + 3 * H + column, mask, other=0.0)
    return a, b, c, d


@triton.jit
def in_float32(a, b, c, d):
    """Return the four in float32."""
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def write_gates(row, column, mask, a, b, c, d, GATES: tl.constexpr, H: tl.constexpr):
    """Store GATES vectors to each row, in its own type."""
    TYPE: tl.constexpr = row.dtype.element_ty
    tl.store(row + column, a.to(TYPE), mask)
    if GATES > 1:
        tl.store(row + H + column, b.to(TYPE), mask)
    if GATES > 2:
        tl.store(row + 2 * H + column, c.to(TYPE), mask)
    if GATES > 3:
        tl.store(row + 3 * H + column, d.to(TYPE), mask)
