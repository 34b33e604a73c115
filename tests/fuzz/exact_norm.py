"""The norms and their derivatives to the second order in numbers wider than float64, with bounds of errors.

A number here is a pair: the value, and the sum of the magnitudes of the terms that it is made of. What a
kernel computes in units of u = 2^-24 (float32; 2^-53 in float64) may be off by a few u of the latter: a few
of its own roundings, and √H for the sums over H features, whose roundings are independent. The terms are
taken with n + 1 in place of |n| for the normalized n, whose own error is of the order of u whatever it is.

Where the mean is large compared with the deviation, by κ = max|a|·rstd, the difference a - mean loses κ
units: all of it is allowed in a derivative, for which the mean is kept in one number of the type computed in.
Forward has more of it than that; in float32 a loss of float64's units only is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import longdouble
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[longdouble]

#: Whether this machine has numbers wider than float64; float64 results cannot be judged without them.
IS_WIDER = np.finfo(longdouble).nmant > 60


def wide(a: Tensor) -> Array:
    """Return the same numbers in the wide type of the judge."""
    return a.detach().double().numpy().astype(longdouble)


@dataclass
class Exact:
    """An exact number, and the allowed error of a kernel's number before it is rounded."""

    value: Array
    bound: Array

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.bound + other.bound)


def over_rows(a: Exact) -> Exact:
    """Return the sum over the rows."""
    return Exact(a.value.sum(0), a.bound.sum(0))


@dataclass
class Normalized:
    """Rows (R, H): n, rstd (R, 1), and the relative amplification of errors."""

    n: Array
    rstd: Array
    loss: Array  # 1 + κ in units of what is computed in, for derivatives
    forward_loss: Array
    size: Array  # |n| + 1
    units: float  # how many are allowed, times u
    least: float  # the same of the type's smallest number, which a product may round to
    centred: bool
    plain: NDArray[np.bool_]  # (R, 1): whether all numbers are finite


def mean(a: Array) -> Array:
    """Return the means of rows about their first element: exact for rows of equal elements."""
    first = a[:, :1]
    return first + (a - first).sum(1, keepdims=True) / a.shape[1]


def average(a: Array) -> Array:
    """Return the plain means of rows."""
    return a.sum(1, keepdims=True) / a.shape[1]


def normalized(a: Array, eps: float, centred: bool, u: float, least: float) -> Normalized:
    """Return the rows normalized; ``u`` and ``least`` are the unit and the smallest number computed with."""
    rest = a - mean(a) if centred else a
    rstd = 1 / np.sqrt(average(rest * rest) + longdouble(eps))
    n = rest * rstd
    plain = np.isfinite(a).all(1, keepdims=True)
    kappa = np.abs(a).max(1, keepdims=True) * rstd if centred else np.zeros_like(rstd)
    kappa = np.where(plain, kappa, 0)
    if centred and a.shape[1] == 1:
        kappa = np.zeros_like(kappa)  # such a row is its own mean, exactly
    of_float64 = longdouble(2.0**-53 / u)
    roundings = 8 + 2 * a.shape[1] ** 0.5
    if of_float64 == 1:
        roundings += a.shape[1] / 4  # its extreme rows are summed one by one, and equal ones round alike
    return Normalized(
        n=n,
        rstd=rstd,
        loss=1 + kappa,
        forward_loss=1 + kappa * of_float64,
        size=np.abs(n) + 1,
        units=u * roundings,
        least=least * roundings,
        centred=centred,
        plain=plain,
    )


def _exact(s: Normalized, value: Array, terms: Array, loss: Array) -> Exact:
    # A row with an infinity or NaN has that in its result, exactly there.
    return Exact(value, np.where(s.plain, s.units * loss * terms, 0))


def output(s: Normalized, gain: Array | None, bias: Array | None) -> Exact:
    """Return n·gain + bias."""
    g = longdouble(1) if gain is None else gain
    value, terms = s.n * g, s.size * np.abs(g)
    if bias is not None:
        value, terms = value + bias, terms + np.abs(bias)
    if s.n.shape[1] == 1 and s.centred:
        terms = np.zeros_like(terms)
    return _exact(s, value, terms, s.forward_loss)


def gradient(s: Normalized, t: Array) -> Exact:
    """Return the gradient of the rows, rstd·(t - mean t - n·mean(t·n)), for that of n, which is t."""
    value = t - s.n * average(t * s.n)
    terms = np.abs(t) + s.size * average(np.abs(t) * s.size)
    if s.centred:
        value, terms = value - average(t), terms + average(np.abs(t))
        if s.n.shape[1] == 1:
            return Exact(s.rstd * np.where(np.isfinite(s.n), 0, s.n), np.zeros_like(terms))
    return _exact(s, s.rstd * value, s.rstd * (terms + s.least / s.units * s.size), s.loss)


def of_gain(s: Normalized, g: Array) -> Exact:
    """Return the rows' terms of the gradient of the gain, g·n."""
    terms = np.abs(g) * s.size
    if s.n.shape[1] == 1 and s.centred:
        terms = np.zeros_like(terms)
    return _exact(s, g * s.n, terms, s.loss)


@dataclass
class Tangent:
    """The derivatives of n and rstd when the rows move along v."""

    n: Exact
    ratio: Exact  # of rstd, to rstd


def tangent(s: Normalized, v: Array) -> Tangent:
    """Return the derivatives of n and of log rstd along v."""
    moved = v - average(v) if s.centred else v
    moved_terms = np.abs(v) + (average(np.abs(v)) if s.centred else 0)
    ratio = -s.rstd * average(s.n * moved)
    ratio_terms = s.rstd * average(s.size * moved_terms)
    return Tangent(
        n=_exact(s, moved * s.rstd + s.n * ratio, moved_terms * s.rstd + s.size * ratio_terms, s.loss),
        ratio=_exact(s, ratio, ratio_terms, s.loss),
    )


def gradient_along(s: Normalized, t: Array, v: Array) -> Exact:
    """Return the derivative of ``gradient`` along v: what v·gradient has for the rows' own gradient.

    The gradient is that of φ = Σ t·n, a function of the rows; so this is φ's Hessian times v, either way.
    """
    along, scale = tangent(s, v), s.units * s.loss
    n_terms, ratio_terms = along.n.bound / scale, along.ratio.bound / scale
    value = -along.n.value * average(t * s.n) - s.n * average(t * along.n.value)
    inner = t - s.n * average(t * s.n)
    terms = n_terms * average(np.abs(t) * s.size) + s.size * average(np.abs(t) * n_terms)
    inner_terms = np.abs(t) + s.size * average(np.abs(t) * s.size)
    if s.centred:
        inner, inner_terms = inner - average(t), inner_terms + average(np.abs(t))
    value = s.rstd * (along.ratio.value * inner + value)
    least = (
        s.least
        / s.units
        * s.rstd
        * s.size
        * np.maximum(s.rstd * np.maximum(np.abs(v).max(1, keepdims=True), 1), 1)
    )
    return _exact(s, value, s.rstd * (ratio_terms * inner_terms + terms) + least, s.loss)
