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
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError
from gpvae.evaluate import MEMORY
from gpvae.noise import orthogonal_noise
from gpvae.posteriors import DiagonalGaussian
from gpvae.vae import Generative

MEASURE_SAMPLES = 100  # for the bound that decides what is kept and when to stop
SMALLEST_PRECISION = 1.0  # of the prior; what a Newton step assumes along flat directions
LARGEST_MOVE = 2.0  # trust region of a Newton step, in posterior standard deviations
LARGEST_LOG_RATIO = 0.2  # of a standard deviation, in one step


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        samples: posterior samples per image and step; None is 2 D, which gives the curvature in
            every direction at every step.
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
    """
    samples = max(options.samples or 2 * generative.latent_dim, MEASURE_SAMPLES)
    index = torch.arange(len(x), device=x.device).split(images_at_once(generative, x, samples))
    parts = [_search_block(generative, x[i], q[i], options) for i in index]
    means, stds, converged, steps = (torch.cat(part) for part in zip(*parts, strict=True))
    return DiagonalGaussian(means, stds), converged, steps


def images_at_once(generative: Generative, x: Tensor, samples: int) -> int:
    """How many images, each decoded `samples` times, fit into memory together."""
    image = samples * math.prod(generative.shape) * x.element_size() * 4  # pixels, temporaries
    return max(1, MEMORY // image)


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
        quiet[active] = torch.where(gain < options.tolerance, quiet[active] + 1, 0)
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

    The average has less Monte Carlo noise than the last Gaussian.
    """
    samples = options.samples or 2 * state.mean.shape[-1]
    mean, log_std = torch.zeros_like(state.mean), torch.zeros_like(state.mean)
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        noise = orthogonal_noise(samples, state.mean, generator)
        state, fine = newton_step(generative, x, state, noise, options)
        finite &= fine
        mean, log_std = mean + state.mean / steps, log_std + state.std.log() / steps
    return state, DiagonalGaussian(mean, log_std.exp()), finite


def newton_step(
    generative: Generative, x: Tensor, state: SearchState, noise: Tensor, options: SearchOptions
) -> tuple[SearchState, Tensor]:
    """One step of every image, for noise [S, 1, D]; costs S passes through the decoder and back.

    Images whose gradient is not finite stay where they are; the second result [B] is False there.
    """
    z = state.mean + state.std * noise
    g = _log_joint_gradient(generative, x, z)
    finite = torch.isfinite(g).flatten(2).all(-1).all(0)
    g = torch.where(finite[:, None], g, 0).double()
    e = noise[:, 0].double()
    curvature = -torch.einsum("sbi,sj->bij", g, e) / len(e) / state.std.double()[:, None, :]
    curvature = 0.5 * (curvature + curvature.mT)
    precision = torch.lerp(state.precision, curvature, options.forget)
    precision = torch.where(finite[:, None, None], precision, state.precision)
    # Absolute eigenvalues turn saddles into ascent; the floor keeps noise from long steps.
    values, vectors = torch.linalg.eigh(precision)
    values = values.abs().clamp_min(SMALLEST_PRECISION)
    move = options.rate * (vectors.mT @ g.mean(0)[..., None])[..., 0] / values.sqrt()
    move = move * (LARGEST_MOVE / move.norm(dim=-1, keepdim=True).clamp_min(LARGEST_MOVE))
    mean = state.mean + (vectors @ (move / values.sqrt())[..., None])[..., 0].to(state.mean)
    target = (vectors**2 @ values[..., None])[..., 0].rsqrt().to(state.std)
    ratio = (target / state.std).log().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    std = torch.where(finite[:, None], state.std * ratio.exp(), state.std)
    return SearchState(mean, std, precision), finite


def _log_joint_gradient(generative: Generative, x: Tensor, z: Tensor) -> Tensor:
    """grad_z log p(x, z), [S, B, D]; also inside `torch.no_grad` and `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors made under inference mode cannot take part in a gradient.
        z = z.clone().requires_grad_()
        return torch.autograd.grad(generative.log_joint(x.clone(), z).sum(), z)[0]


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
        """Gain in nats, 0 or more, of q over the best so far of the images `index`."""
        elbo = self._measure(self.x[index], q)
        better = elbo > self.elbo[index]  # False where the new bound is not a number
        gain = torch.where(better, elbo - self.elbo[index], 0)
        where = index[better]
        self.mean[where], self.std[where] = q.mean[better], q.std[better]
        self.elbo[where] = elbo[better]
        return gain

    @torch.no_grad()
    def _measure(self, x: Tensor, q: DiagonalGaussian) -> Tensor:
        return gaussian_elbo(self.generative, x, q, self.noise).double().mean(0)
