"""Variational Newton search: each image's best diagonal Gaussian posterior.

For one image, with q = N(m, diag s^2), ELBO(m, s) is stationary where

    E_q grad_z log p(x, z) = 0   and   1 / s_j^2 = P_jj,   P = -E_q hess_z log p(x, z)

(Opper and Archambeau, 2009). Each step estimates both expectations from the same S gradients g at
z = m + s e, the second by Stein's lemma, P = -E[g e^T] diag(1 / s), so no second derivative is
taken and any differentiable decoder will do; P is averaged over steps, m moves by a damped Newton
step and s follows P (the variational online Newton method of Khan et al., 2018, with the Hessian
of a Gaussian-smoothed log joint). A few dozen steps do what Adam does in several hundred.

References:
    The Variational Gaussian Approximation Revisited (Opper and Archambeau, 2009)
    Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam (Khan et al., 2018),
    https://arxiv.org/abs/1806.04854

Dimensions: N images, B images that move at once, S samples, D latent. Bounds are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gpvae.errors import ConfigError, DataError
from gpvae.evaluate import TEMPORARIES
from gpvae.memory import Memory
from gpvae.noise import orthogonal_noise
from gpvae.posteriors import DiagonalGaussian
from gpvae.vae import Generative

T = TypeVar("T")

CPU_BYTES = 256 * 2**20  # enough images at once for the small matrices that each step factors
FEWEST_SAMPLES, MOST_SAMPLES = 16, 50  # of a step, unless asked for
MEASURE_SAMPLES = 100  # for the bound that decides what is kept and when to stop
SMALLEST_PRECISION = 1.0  # of the prior; what a Newton step assumes along flat directions
SMALLEST_DIAGONAL = 0.25  # of P: no standard deviation above twice the prior's
LARGEST_MOVE = 4.0  # of a full Newton step, in posterior standard deviations
LARGEST_LOG_RATIO = 0.2  # of a standard deviation, in one step
FALLEN = 10  # tolerances below the best so far: more than noise


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        samples: posterior samples per image and step; None is 2 D, which gives the curvature in
            every direction at every step, but at least 16 and at most 50.
        rate: fraction of the Newton step taken.
        forget: weight of the newest curvature in its running average.
        max_steps: bound on the steps; images still rising then are reported as not converged.
        check_every: steps between two measurements of the bound.
        tolerance: nats; an image is done when two checks in a row gain less.
        seed: of all noise.
    """

    samples: int | None = None
    rate: float = 0.5
    forget: float = 0.1
    max_steps: int = 500
    check_every: int = 10
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "forget"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected a number in (0, 1].")
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1.")
        if self.samples is not None and self.samples < 2:
            raise ConfigError(f"samples={self.samples}; expected at least 2, or None for 2 D.")
        if not self.tolerance > 0:
            raise ConfigError(f"tolerance={self.tolerance}; expected nats above 0.")

    def step_samples(self, latent_dim: int) -> int:
        """Samples of one step for D latent dimensions."""
        return self.samples or min(max(2 * latent_dim, FEWEST_SAMPLES), MOST_SAMPLES)


@dataclass(frozen=True)
class SearchState:
    """Where the search of B images is: m and s [B, D], and P [B, D, D] in float64."""

    mean: Tensor
    std: Tensor
    precision: Tensor

    @classmethod
    def at(cls, q: DiagonalGaussian) -> SearchState:
        """The state at q, whose precision is the first guess of the curvature."""
        return cls(q.mean, q.std, torch.diag_embed(q.std.double() ** -2))

    def __getitem__(self, index: Tensor) -> SearchState:
        return SearchState(self.mean[index], self.std[index], self.precision[index])


def gaussian_elbo(generative: Generative, x: Tensor, q: DiagonalGaussian, noise: Tensor) -> Tensor:
    """ELBO of images [B, C, H, W] at each of S samples, [S, B], for noise [S, B or 1, D]."""
    return generative.log_likelihood(x, q.mean + q.std * noise) - q.kl()


def search(
    generative: Generative, x: Tensor, q: DiagonalGaussian, options: SearchOptions
) -> tuple[DiagonalGaussian, Tensor, Tensor]:
    """The best Gaussians of N images, whether each had stopped rising, and its steps.

    As many images move at once as fit into memory.

    Raises:
        DataError: a start that is not finite.
    """
    fine = (torch.isfinite(q.mean) & torch.isfinite(q.std) & (q.std > 0)).all(-1)
    if not bool(fine.all()):
        raise DataError(
            f"the starting posteriors of {int((~fine).sum())} of {len(x)} images are not finite, "
            "or have a standard deviation of 0."
        )
    q = DiagonalGaussian(q.mean.detach(), q.std.detach())
    samples = decoded_at_once(options, generative.latent_dim)
    parts = in_blocks(
        generative, x, samples, lambda i: _search_block(generative, x[i], q[i], options)
    )
    means, stds, converged, steps = (torch.cat(part) for part in zip(*parts, strict=True))
    return DiagonalGaussian(means, stds), converged, steps


def decoded_at_once(options: SearchOptions, latent_dim: int) -> int:
    """How many samples of an image are decoded at once in a search."""
    return max(options.step_samples(latent_dim), MEASURE_SAMPLES)


def in_blocks(
    generative: Generative, x: Tensor, samples: int, function: Callable[[slice], T]
) -> list[T]:
    """Results of `function` for blocks of images that, each decoded `samples` times, fit into
    memory together (see `Memory`).
    """
    image = samples * math.prod(generative.shape) * x.element_size() * TEMPORARIES
    memory = Memory(CPU_BYTES if x.device.type == "cpu" else None, x.device)
    return memory.chunks(function, len(x), image)


def _search_block(
    generative: Generative, x: Tensor, q: DiagonalGaussian, options: SearchOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`search` for images that move at once; finished ones leave, so the last steps are cheap."""
    best = BestSoFar(generative, x, q, options.seed)
    state = SearchState.at(q)
    active = torch.arange(len(x), device=x.device)
    quiet = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    steps = torch.zeros_like(quiet)
    generator = torch.Generator().manual_seed(options.seed)
    while len(active) and int(steps.max()) < options.max_steps:
        count = min(options.check_every, options.max_steps - int(steps.max()))
        state, average, finite = advance(generative, x[active], state, options, count, generator)
        gain = best.update(active, average)
        # Well below the best so far is not quiet: the search may be crossing a valley.
        still = (gain < options.tolerance) & (gain > -FALLEN * options.tolerance)
        quiet[active] = torch.where(still, quiet[active] + 1, 0)
        # An image whose gradient is not finite cannot move: it ends with what it has.
        quiet[active[~finite]] = -1
        steps[active] += count
        going = finite & (quiet[active] < 2)
        state, active = state[going], active[going]
    return best.mean, best.std, quiet >= 2, steps


def advance(
    generative: Generative,
    x: Tensor,
    state: SearchState,
    options: SearchOptions,
    steps: int,
    generator: torch.Generator,
) -> tuple[SearchState, DiagonalGaussian, Tensor]:
    """Some steps, the average of the Gaussians on the way, and whether all stayed finite [B].

    The average, of means and precisions, has less Monte Carlo noise than the last Gaussian.
    """
    samples = options.step_samples(state.mean.shape[-1])
    mean, precision = torch.zeros_like(state.mean), torch.zeros_like(state.mean)
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        noise = orthogonal_noise(samples, state.mean, generator)
        state, fine = newton_step(generative, x, state, noise, options)
        finite &= fine
        mean, precision = mean + state.mean / steps, precision + state.std**-2 / steps
    return state, DiagonalGaussian(mean, precision.rsqrt()), finite


def newton_step(
    generative: Generative, x: Tensor, state: SearchState, noise: Tensor, options: SearchOptions
) -> tuple[SearchState, Tensor]:
    """One step of every image, for noise [S, 1, D]; costs S passes through the decoder and back.

    Images whose gradient is not finite stay where they are; the second result [B] is False there.
    """
    g = _likelihood_gradient(generative, x, state.mean + state.std * noise).double()
    e, std = noise[:, 0].double(), state.std.double()
    curvature = -torch.einsum("sbi,sj->bij", g, e) / len(e) / std[:, None, :]
    finite = torch.isfinite(curvature).flatten(1).all(-1)
    curvature = 0.5 * (curvature + curvature.mT)
    # The prior's part of gradient and curvature is known: -m and I.
    curvature = curvature + torch.eye(curvature.shape[-1], dtype=g.dtype, device=g.device)
    ascent = g.mean(0) - state.mean.double()
    precision = torch.lerp(state.precision, curvature, options.forget)
    precision = torch.where(finite[:, None, None], precision, state.precision)
    move = options.rate * whitened_step(precision, ascent).to(state.mean)
    mean = torch.where(finite[:, None], state.mean + move, state.mean)
    diagonal = precision.diagonal(dim1=-2, dim2=-1).clamp_min(SMALLEST_DIAGONAL)
    ratio = (diagonal.rsqrt().to(state.std) / state.std).log()
    std = state.std * ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    std = torch.where(finite[:, None], std, state.std)
    return SearchState(mean, std, precision), finite


def whitened_step(precision: Tensor, gradient: Tensor) -> Tensor:
    """precision^-1 gradient, [B, D], safe where the precision is not positive definite.

    Absolute eigenvalues turn saddles into ascent, a floor keeps noise from making long steps, and
    the step is no longer than LARGEST_MOVE in units of the standard deviations.
    """
    values, vectors = torch.linalg.eigh(precision)
    root = values.abs().clamp_min(SMALLEST_PRECISION).sqrt()
    move = (vectors.mT @ gradient[..., None])[..., 0] / root
    move = move * (LARGEST_MOVE / move.norm(dim=-1, keepdim=True).clamp_min(LARGEST_MOVE))
    return (vectors @ (move / root)[..., None])[..., 0]


def _likelihood_gradient(generative: Generative, x: Tensor, z: Tensor) -> Tensor:
    """grad_z log p(x | z), [S, B, D]; also inside `torch.no_grad` and `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors made under inference mode cannot take part in a gradient.
        z = z.clone().requires_grad_()
        return torch.autograd.grad(generative.log_likelihood(x.clone(), z).sum(), z)[0]


class BestSoFar:
    """Keeps the best Gaussian of each image by a bound measured with one fixed noise."""

    def __init__(self, generative: Generative, x: Tensor, q: DiagonalGaussian, seed: int) -> None:
        self.generative, self.x = generative, x
        # Not the search's noise: the bound on that would favour what fits it.
        generator = torch.Generator().manual_seed(seed + 1)
        self.noise = orthogonal_noise(MEASURE_SAMPLES, q.mean, generator)
        self.mean, self.std = q.mean.clone(), q.std.clone()
        self.elbo = self._measure(x, q)

    def update(self, index: Tensor, q: DiagonalGaussian) -> Tensor:
        """Keep what is better for the images `index`; what it gains, or loses, in nats."""
        elbo = self._measure(self.x[index], q)
        gain = elbo - self.elbo[index]
        better = gain > 0
        where = index[better]
        self.mean[where], self.std[where] = q.mean[better], q.std[better]
        self.elbo[where] = elbo[better]
        return gain

    @torch.no_grad()
    def _measure(self, x: Tensor, q: DiagonalGaussian) -> Tensor:
        elbo = gaussian_elbo(self.generative, x, q, self.noise).double().mean(0)
        return elbo.nan_to_num(nan=-math.inf)  # any number is better than none
