"""Dawson's integral and the expected log-square of a normal variable, differentiable to any order.

For h ~ N(mean, std^2), F = E log h^2, s = hypot(mean, std) and u = (mean / s)^2 there are smooth
functions P_n, bounded on 0 <= u <= 1, with

    F                = 2 log s + P_0(u),
    d^n F / dmean^n  = s^-n (mean / s)^(n mod 2) P_n(u)   for n >= 1,
    dG / dstd        = std d^2 G / dmean^2                for G = F and each of its mean-derivatives

(the last is the heat equation of any normal expectation), and Dawson's integral is
D(x) = F'(x) / 4 at std = sqrt(1/2). The prefactors carry every scale, so each P_n is read from one
short table of local polynomials, with no switch between formulas and no special case at std = 0.

The tables come from an integral in which nothing cancels: with w = u / (1 - u) = (mean / std)^2,
p = (1 - tau^2) / 2 and Euler's constant gamma,

    F = 2 log std - gamma - log 2 + int_0^1 (1 - exp(-w p)) / p dtau,

so the k-th derivative of F by w is (-1)^(k-1) int_0^1 p^(k-1) exp(-w p) dtau.

References: "NIST Handbook of Mathematical Functions", chapter 7 (2010); "Expected Logarithm and
Negative Integer Moments of a Noncentral chi^2-Distributed Random Variable" (2020); "Double
Exponential Formulas for Numerical Integration" (1974), for the quadrature.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import factorial, log, pi, sqrt

import numpy as np
import torch
from torch import Tensor

__all__ = ["dawsn", "dawsn_prime", "expected_log_square", "log_square_and_slopes"]

_CELLS = 512  # equal cells of 0 <= u <= 1
_COLUMNS = {torch.float32: 3, torch.float64: 7}  # coefficients per cell
_TABLES: dict[tuple[torch.device, torch.dtype, int, int], tuple[Tensor]] = {}


def expected_log_square(mean: Tensor, std: Tensor) -> Tensor:
    """E log h^2 for h ~ N(mean, std^2).

    With r = mean / (sqrt(2) std), Dawson's integral D and Euler's constant gamma it is
    2 log std - gamma - log 2 + 4 int_0^r D(t) dt, which tends to log mean^2 as std -> 0; the
    derivatives are (2 sqrt(2) / std) D(r) and (2 / std) D'(r). For |mean| <= 1e4 and std from 1e-8
    to 1e4 all three are within 1e-12 (float64) or 1e-5 (float32) of the truth, relative where it
    exceeds 1. The exception is the derivative by std where it changes sign, at |r| = 0.924: there
    the error is relative to 1 / std. Forward mode works at one level (as in torch.func.hessian)
    outside torch.compile; PyTorch returns zeros for forward over forward mode through any custom
    Function.

    Args:
        mean: finite float32 or float64 tensor, any shape and device.
        std: tensor of the same type and device that broadcasts with mean; not negative, and not 0
            where mean is 0 (the result is NaN there). Values are not checked: a GPU would wait.

    Returns:
        Tensor of the broadcast shape; NaN gives NaN. The first call puts a table on the device, so
        make one before capturing a CUDA graph. It takes about ten temporary values per element.

    Raises:
        TypeError: mean or std is not a float32 or float64 tensor, or the two types differ.

    References:
        "Expected Logarithm and Negative Integer Moments of a Noncentral chi^2-Distributed Random
        Variable" (2020).

    Example:
        >>> mean = torch.tensor([0.0, 1.0, 1000.0], dtype=torch.float64)
        >>> expected_log_square(mean, torch.ones_like(mean))
        tensor([-1.2704, -0.4170, 13.8155], dtype=torch.float64)
    """
    _check("mean", mean)
    _check("std", std)
    if mean.dtype != std.dtype:
        raise TypeError(f"mean is {mean.dtype} and std is {std.dtype}; give both the same type")
    if mean.shape != std.shape:
        mean, std = torch.broadcast_tensors(mean, std)
    return _derivatives(mean, std, 0, 1)[0]


def log_square_and_slopes(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F = E log h^2, dF / dmean and dF / dstd, as `expected_log_square` has them, by one lookup.

    For functions that bring their own backward pass: the three have no gradient themselves.

    Args:
        mean, std: as for `expected_log_square`, of one shape.

    Example:
        >>> h = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> [v.tolist()[0] for v in log_square_and_slopes(*h)][1:]
        [0.0, 2.0]
    """
    value, by_mean, twice = _evaluate(mean.detach(), std.detach(), 0, 3)
    return value, by_mean, std.detach() * twice


def dawsn(x: Tensor) -> Tensor:
    """Dawson's integral D(x) = exp(-x^2) int_0^x exp(t^2) dt.

    It is odd, near x for small and near 1 / (2 x) for large arguments. The relative error is
    within 1e-12 in float64 and 1e-5 in float32.

    Args:
        x: finite float32 or float64 tensor, any shape and device.

    Returns:
        Tensor of x's shape, differentiable like expected_log_square. NaN and infinity give NaN.

    Raises:
        TypeError: x is not a float32 or float64 tensor.

    References:
        "NIST Handbook of Mathematical Functions", section 7.2 (2010).

    Example:
        >>> dawsn(torch.tensor([-1.0, 0.0, 1.0, 50.0], dtype=torch.float64))
        tensor([-0.5381,  0.0000,  0.5381,  0.0100], dtype=torch.float64)
    """
    return _dawsn_derivative(x, 0)


def dawsn_prime(x: Tensor) -> Tensor:
    """Derivative D'(x) = 1 - 2 x D(x) of Dawson's integral, without that form's cancellation.

    It is even, 1 at zero, changes sign at 0.924 and tends to -1 / (2 x^2). Arguments, result,
    errors and reference are those of dawsn, but near the change of sign the accuracy is absolute.

    Example:
        >>> dawsn_prime(torch.tensor([0.0, 1.0, 1e8], dtype=torch.float64))
        tensor([ 1.0000e+00, -7.6159e-02, -5.0000e-17], dtype=torch.float64)
    """
    return _dawsn_derivative(x, 1)


def _dawsn_derivative(x: Tensor, order: int) -> Tensor:
    """The order-th derivative of D: 4 D(x) is the mean-derivative at std = sqrt(1/2)."""
    _check("x", x)
    return _derivatives(x, torch.full_like(x, sqrt(0.5)), order + 1, 1)[0] / 4


def _check(name: str, value: Tensor) -> None:
    """Refuse what the tables do not cover, before an obscure error does."""
    given = value.dtype if isinstance(value, Tensor) else type(value).__name__
    if given not in _COLUMNS:
        raise TypeError(f"{name} must be a float32 or float64 tensor, given {given}")


def _derivatives(mean: Tensor, std: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """Differentiable mean-derivatives of E log h^2 of orders first, ..., first + count - 1."""
    # torch.compile refuses a Function that has a jvp; everything else may need one.
    function = _Derivatives if torch.compiler.is_compiling() else _ForwardModeDerivatives
    return function.apply(mean, std, first, count)


class _Derivatives(torch.autograd.Function):
    """Mean-derivatives whose own derivatives are the next orders."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, std: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        return _evaluate(mean, std, first, count)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mean, std, ctx.first, ctx.count = inputs
        ctx.save_for_backward(mean, std)
        ctx.save_for_forward(mean, std)

    @staticmethod
    def backward(ctx, *grads):
        mean, std = ctx.saved_tensors
        by_std = ctx.needs_input_grad[1]
        higher = _derivatives(mean, std, ctx.first + 1, ctx.count + by_std)
        grad_mean = _dot(grads, higher)
        return grad_mean, std * _dot(grads, higher[1:]) if by_std else None, None, None


# Function.apply asks for this signature at each call; storing it saves some 10 us of each.
_Derivatives.forward.__signature__ = inspect.signature(_Derivatives.forward)


class _ForwardModeDerivatives(_Derivatives):
    """The same, in forward mode too, as torch.func.hessian needs."""

    @staticmethod
    def jvp(ctx, mean_tangent, std_tangent, *_):
        mean, std = ctx.saved_tensors
        higher = _derivatives(mean, std, ctx.first + 1, ctx.count + 1)
        std_tangent = std * std_tangent
        return tuple(
            mean_tangent * higher[i] + std_tangent * higher[i + 1] for i in range(ctx.count)
        )


def _dot(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """Sum of weights[i] * terms[i]; terms may be longer."""
    total = weights[0] * terms[0]
    for i in range(1, len(weights)):
        total = torch.addcmul(total, weights[i], terms[i])
    return total


def _evaluate(mean: Tensor, std: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """What _derivatives returns; one lookup serves all orders."""
    s = torch.hypot(mean, std)
    c = mean / s
    x = c.square() * _CELLS
    # Clamping integers keeps NaN inside the table: the offset t stays NaN, and so does the result.
    cell = x.long().clamp(0, _CELLS - 1)
    t = x - cell
    table = _table(mean.device, mean.dtype, first, count)[0]
    rows = table.gather(1, cell.reshape(1, -1).expand(len(table), -1))
    *lower, value = rows.view(len(table) // count, count, *mean.shape).unbind(0)
    for coefficient in reversed(lower):
        value = torch.addcmul(coefficient, value, t)
    return tuple(_scaled(profile, s, c, first + i) for i, profile in enumerate(value.unbind(0)))


def _scaled(profile: Tensor, s: Tensor, c: Tensor, order: int) -> Tensor:
    """Put the scale back onto P_order(u)."""
    if order == 0:
        return torch.add(profile, s.log(), alpha=2)
    return (profile * c if order % 2 else profile) / (s if order == 1 else s**order)


@torch.compiler.assume_constant_result  # torch.compile embeds the table, and does not trace NumPy
def _table(device: torch.device, dtype: torch.dtype, first: int, count: int) -> tuple[Tensor]:
    """Coefficients [powers * count, cells], made at the first call for each device and dtype.

    In a tuple, because torch.compile cannot hold two bare tensors from the same function.
    """
    key = (device, dtype, first, count)
    if key not in _TABLES:
        orders = [_coefficients(first + i, _COLUMNS[dtype]) for i in range(count)]
        flat = np.stack(orders, axis=1).reshape(-1, _CELLS)
        with torch.inference_mode(False):  # or a table made there could not be used elsewhere
            _TABLES[key] = (torch.tensor(flat, dtype=dtype, device=device),)
    return _TABLES[key]


def _coefficients(order: int, columns: int) -> np.ndarray:
    """Interpolate P_order at Chebyshev points: powers of 0 <= t <= 1 by cells, float64."""
    t = (1 - np.cos(pi * (np.arange(columns) + 0.5) / columns)) / 2
    u = (np.arange(_CELLS) + t[:, None]) / _CELLS
    return np.linalg.solve(np.vander(t, increasing=True), _profile(order, u))


def _profile(order: int, u: np.ndarray) -> np.ndarray:
    """P_order(u) for 0 <= u < 1 in float64."""
    p, weight = _quadrature()
    w = u / (1 - u)
    exponent = np.multiply.outer(-w, p)
    if order == 0:
        return -np.euler_gamma - log(2) - np.log1p(w) - (np.expm1(exponent) / p) @ weight
    decay = np.exp(exponent)
    odd = order % 2
    total = np.zeros_like(u)
    for j in range(order // 2 + 1):  # chain rule for w = (mean / std)^2
        k = order - j
        moment = (-1) ** (k - 1) * (decay @ (weight * p ** (k - 1)))
        ways = factorial(order) // (factorial(j) * factorial(order - 2 * j))
        total += ways * 2 ** (order - 2 * j) * w ** (order // 2 - j) * moment
    return (1 + w) ** ((order + odd) // 2) * total


def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Tanh-sinh nodes p and weights dtau; it resolves the layer of width 1 / w at tau = 1."""
    step = 0.02
    theta = step * np.arange(-180, 181)
    q = 1 / (1 + np.exp(pi * np.sinh(theta)))  # 1 - tau, with full relative accuracy
    return q * (2 - q) / 2, step * pi * np.cosh(theta) * q * (1 - q)
