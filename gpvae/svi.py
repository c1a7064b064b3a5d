"""Stochastic variational inference: the best diagonal Gaussian posterior of each image by itself.

The reference for every gap (Cremer, Li and Duvenaud, 2018), and a method of its own: the encoder
`svi` uses the result in place of the amortised posterior. For one image, with q = N(m, diag s^2),
ELBO(m, s) is stationary where

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
    Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018),
    https://arxiv.org/abs/1801.03558

Dimensions: N images, B images in a block, S samples, D latent. Bounds are in nats per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError, DataError
from gpvae.evaluate import (
    IMAGES_PER_BLOCK,
    MEMORY,
    Estimate,
    check_samples,
    chunked_log_likelihood,
)
from gpvae.noise import image_noise, orthogonal_noise
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.vae import VAE, GaussianEncoder, Generative

MEASURE_SAMPLES = 100  # for the bound that decides what is kept and when to stop
SMALLEST_PRECISION = 1.0  # of the prior; what a Newton step assumes along flat directions
LARGEST_MOVE = 2.0  # trust region of a Newton step, in posterior standard deviations
LARGEST_LOG_RATIO = 0.2  # of a standard deviation, in one step


@dataclass(frozen=True)
class Optimised:
    """Result of `optimise_posterior` for N images.

    Args:
        posterior: the best Gaussian found for each image.
        elbo: its bound in nats, on samples that played no part in the search.
        converged: [N], whether the bound had stopped rising when the search ended.
        steps: [N], how many steps each image took.
    """

    posterior: DiagonalGaussian
    elbo: Estimate
    converged: Tensor
    steps: Tensor


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


def optimise_posterior(
    model: VAE,
    x: Tensor,
    start: Posterior | None = None,
    options: SearchOptions | None = None,
    elbo_samples: int = MEASURE_SAMPLES,
) -> Optimised:
    """Maximise each image's ELBO over the mean and std of a diagonal Gaussian, until it stops.

    Images are independent: each has its own curvature and its own stopping rule, the search's
    noise is shared by all of them and that of the returned bound belongs to the image, so the
    result of an image does not depend on its batch (rounding aside). What is kept is chosen by a
    bound measured with the same noise at every check; the bound that is returned uses fresh noise,
    since the best of many checks is lucky on the noise that chose it.

    The optimum is a local one: see `certify`.

    Args:
        model: its decoder is used, and its encoder if `start` is None.
        x: images [N, C, H, W].
        start: posteriors of all images to start from, of which the mean and marginal std are
            used; the encoder's output by default, `prior(x, D)` for none.
        options: see `SearchOptions`.
        elbo_samples: samples for the returned bound.

    Raises:
        DataError: not one start for each image.
    """
    check_samples(elbo_samples)
    options = options or SearchOptions()
    if start is not None and len(start.mean) != len(x):
        raise DataError(f"{len(start.mean)} starting posteriors were given for {len(x)} images.")
    with torch.no_grad():
        q = (model(x) if start is None else start).gaussian()
    best, converged, steps = search(model.generative, x, q, options)
    estimate = measured(model.generative, x, best, elbo_samples, options.seed)
    return Optimised(best, estimate, converged, steps)


def gaussian_elbo(generative: Generative, x: Tensor, q: DiagonalGaussian, noise: Tensor) -> Tensor:
    """ELBO of images [B, C, H, W] at each of S samples, [S, B], for noise [S, B or 1, D]."""
    return generative.log_likelihood(x, q.mean + q.std * noise) - q.kl()


@torch.no_grad()
def measured(
    generative: Generative, x: Tensor, q: DiagonalGaussian, samples: int, seed: int
) -> Estimate:
    """The ELBO of N images under given Gaussians, with noise that belongs to each image."""
    values, errors = [], []
    for index in torch.arange(len(x), device=x.device).split(IMAGES_PER_BLOCK):
        z = q.mean[index] + q.std[index] * image_noise(x[index], samples, q.mean.shape[-1], seed)
        draws = chunked_log_likelihood(generative, x[index], z, MEMORY).double()
        values.append(draws.mean(0) - q[index].kl().double())
        errors.append(draws.std(0) / math.sqrt(samples))
    return Estimate(torch.cat(values), torch.cat(errors), samples)


def widened(q: DiagonalGaussian, factor: float = 1.2) -> DiagonalGaussian:
    """The same Gaussians with standard deviations times `factor`, as a safer proposal."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor is {factor}; expected a positive number.")
    return DiagonalGaussian(q.mean, q.std * factor)


def prior(x: Tensor, latent_dim: int) -> DiagonalGaussian:
    """N(0, I) for each of the images: a start that knows nothing of them."""
    mean = x.new_zeros(len(x), latent_dim)
    return DiagonalGaussian(mean, torch.ones_like(mean))


def search(
    generative: Generative, x: Tensor, q: DiagonalGaussian, options: SearchOptions
) -> tuple[DiagonalGaussian, Tensor, Tensor]:
    """The best Gaussians of N images, whether each had stopped rising, and its steps.

    As many images move at once as fit into memory.
    """
    samples = max(options.samples or 2 * generative.latent_dim, MEASURE_SAMPLES)
    pixels = samples * math.prod(generative.shape) * x.element_size() * 4  # and temporaries
    index = torch.arange(len(x), device=x.device).split(max(1, MEMORY // pixels))
    parts = [_search_block(generative, x[i], q[i], options) for i in index]
    means, stds, converged, steps = (torch.cat(part) for part in zip(*parts, strict=True))
    return DiagonalGaussian(means, stds), converged, steps


def _search_block(
    generative: Generative, x: Tensor, q: DiagonalGaussian, options: SearchOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`search` for images that move at once; finished ones leave, so the last steps are cheap."""
    check = _Check(generative, x, q, options.seed)
    state = SearchState.at(q)
    active = torch.arange(len(x), device=x.device)
    quiet = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    steps = torch.zeros_like(quiet)
    generator = torch.Generator().manual_seed(options.seed)
    while len(active) and int(steps.max()) < options.max_steps:
        count = min(options.check_every, options.max_steps - int(steps.max()))
        state, average, finite = advance(generative, x[active], state, options, count, generator)
        gain = check(active, average)
        quiet[active] = torch.where(gain < options.tolerance, quiet[active] + 1, 0)
        # An image whose gradient is not finite cannot move: it ends with what it has.
        quiet[active[~finite]] = -1
        steps[active] += count
        going = finite & (quiet[active] < 2)
        state, active = state[going], active[going]
    return check.mean, check.std, quiet >= 2, steps


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


class _Check:
    """Keeps the best Gaussian of each image by a bound measured with one fixed noise."""

    def __init__(self, generative: Generative, x: Tensor, q: DiagonalGaussian, seed: int) -> None:
        self.generative, self.x = generative, x
        # Not the search's noise: the bound on that would favour what fits it.
        generator = torch.Generator().manual_seed(seed + 1)
        self.noise = orthogonal_noise(MEASURE_SAMPLES, q.mean, generator)
        self.mean, self.std = q.mean.clone(), q.std.clone()
        self.elbo = self._measure(x, q)

    def __call__(self, index: Tensor, q: DiagonalGaussian) -> Tensor:
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


@dataclass(frozen=True)
class Certificate:
    """Whether two searches from different starts reached the same bound.

    Args:
        best: the better result of each image.
        difference: [N], bound from the encoder minus bound from the prior, in nats, both on the
            same noise.
        agrees: [N], |difference| within the tolerance and both searches converged.
        tolerance: in nats.
    """

    best: Optimised
    difference: Tensor
    agrees: Tensor
    tolerance: float

    @property
    def disputed(self) -> list[int]:
        """Images whose reported optimum is not certified, hardest disagreement first."""
        order = self.difference.abs().argsort(descending=True)
        return [int(i) for i in order if not self.agrees[i]]


def certify(
    model: VAE,
    x: Tensor,
    options: SearchOptions | None = None,
    elbo_samples: int = MEASURE_SAMPLES,
    tolerance: float = 0.1,
) -> Certificate:
    """Search from the encoder's output and from the prior, and compare the two bounds.

    Agreement does not prove a global optimum, but disagreement proves that one search ended in a
    poorer local one: such images are reported, with the better of the two results.
    """
    generative = model.generative
    first = optimise_posterior(model, x, None, options, elbo_samples)
    start = prior(x, generative.latent_dim)
    second = optimise_posterior(model, x, start, options, elbo_samples)
    difference = first.elbo.value - second.elbo.value
    agrees = (difference.abs() <= tolerance) & first.converged & second.converged
    return Certificate(_better(first, second), difference, agrees, tolerance)


def _better(a: Optimised, b: Optimised) -> Optimised:
    """The result with the higher bound, image by image; both bounds share their noise."""
    take = a.elbo.value >= b.elbo.value
    p, q = a.posterior, b.posterior
    row = take[:, None]
    posterior = DiagonalGaussian(torch.where(row, p.mean, q.mean), torch.where(row, p.std, q.std))
    elbo = Estimate(
        torch.where(take, a.elbo.value, b.elbo.value),
        torch.where(take, a.elbo.stderr, b.elbo.stderr),
        a.elbo.samples,
    )
    converged = torch.where(take, a.converged, b.converged)
    return Optimised(posterior, elbo, converged, a.steps + b.steps)


class SVIEncoder(GaussianEncoder):
    """The VAE's encoder, whose posterior is optimised for each image at evaluation.

    In training mode it is the amortised encoder, so training is that of the VAE. In eval mode the
    posterior is the instance-wise optimum, found from `start`: "encoder" or "prior". Its gradient
    is not recorded.
    """

    start: str = "encoder"
    options = SearchOptions()

    def forward(self, x: Tensor, generative: Generative) -> DiagonalGaussian:
        """Posterior of images x [B, C, H, W]."""
        if self.training:
            return super().forward(x)
        if self.start not in ("encoder", "prior"):
            raise ConfigError(f"start is {self.start!r}; expected 'encoder' or 'prior'.")
        with torch.no_grad():
            amortised = super().forward(x)
        q = amortised if self.start == "encoder" else prior(x, generative.latent_dim)
        return search(generative, x, q, self.options)[0]


class SVI(VAE):
    """VAE with stochastic variational inference at evaluation: no amortization gap, but slow."""

    encoder_type = SVIEncoder
