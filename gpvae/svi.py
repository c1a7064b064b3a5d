"""Instance-wise optimum: the best diagonal Gaussian posterior of each image by itself.

The reference for the amortization gap (Cremer, Li and Duvenaud, 2018). Dimensions: N images,
B images in a block, S samples, D latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.evaluate import IMAGES_PER_BLOCK, Estimate, check_samples
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.vae import VAE

MEASURE_SAMPLES = 100  # for the bound that decides what is kept and when to stop


@dataclass(frozen=True)
class Optimised:
    """Result of `optimise_posterior` for N images.

    Args:
        posterior: the best Gaussian found for each image.
        elbo: its bound in nats, on samples that played no part in the search.
        converged: [N], whether the bound had stopped rising when the search ended.
    """

    posterior: DiagonalGaussian
    elbo: Estimate
    converged: Tensor


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        samples: posterior samples per image and gradient.
        learning_rate: first step size of Adam on mean and log std.
        max_steps: bound on the steps; images still rising then are reported as not converged.
        check_every: steps between two measurements of the bound.
        tolerance: nats; an image is done when two checks in a row gain less.
        seed: of all noise.
    """

    samples: int = 16
    learning_rate: float = 0.05
    max_steps: int = 2000
    check_every: int = 50
    tolerance: float = 0.02
    seed: int = 0


def optimise_posterior(
    model: VAE,
    x: Tensor,
    start: Posterior | None = None,
    options: SearchOptions | None = None,
    elbo_samples: int = MEASURE_SAMPLES,
) -> Optimised:
    """Maximise each image's ELBO over the mean and log std of its Gaussian, by Adam.

    All images of a block move at once, each with its own gradient, so the result does not depend
    on which images share a block, noise aside. The bound that selects is measured with the same
    noise at every check; the bound that is returned uses fresh noise, since the best of many
    checks is lucky on the noise that chose it.

    Args:
        model: its decoder is used, and its encoder if `start` is None.
        x: images [N, C, H, W].
        start: where to start; the Gaussian stand-in of the encoder's output by default.
        options: see `SearchOptions`.
        elbo_samples: samples for the returned bound.
    """
    check_samples(elbo_samples)
    options = options or SearchOptions()
    parts = []
    for first in range(0, len(x), IMAGES_PER_BLOCK):
        block = x[first : first + IMAGES_PER_BLOCK]
        with torch.no_grad():
            q = model(block) if start is None else start[first : first + IMAGES_PER_BLOCK]
        parts.append(_optimise_block(model, block, q.gaussian(), options, elbo_samples))
    means, stds, values, errors, converged = (torch.cat(p) for p in zip(*parts, strict=True))
    estimate = Estimate(values, errors, elbo_samples)
    return Optimised(DiagonalGaussian(means, stds), estimate, converged)


def gaussian_elbo(
    model: VAE, x: Tensor, q: DiagonalGaussian, samples: int, generator: torch.Generator
) -> Tensor:
    """ELBO of images [B, C, H, W] under given Gaussians for each of S samples, [S, B]."""
    z = q.rsample((samples,), generator)
    return model.generative.log_likelihood(x, z) - q.kl()


def widened(q: DiagonalGaussian, factor: float = 1.2) -> DiagonalGaussian:
    """The same Gaussians with standard deviations times `factor`, as a safer proposal."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor is {factor}; expected a positive number.")
    return DiagonalGaussian(q.mean, q.std * factor)


def _optimise_block(
    model: VAE, x: Tensor, q: DiagonalGaussian, options: SearchOptions, elbo_samples: int
) -> tuple[Tensor, ...]:
    mean = q.mean.clone().requires_grad_()
    log_std = q.std.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_std], lr=options.learning_rate)
    generator = torch.Generator(x.device).manual_seed(options.seed)

    @torch.no_grad()
    def measure(q: DiagonalGaussian, samples: int, offset: int) -> Tensor:
        noise = torch.Generator(x.device).manual_seed(options.seed + offset)
        return gaussian_elbo(model, x, q, samples, noise)

    best, best_elbo = q, measure(q, MEASURE_SAMPLES, 1).mean(0)
    quiet = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for _ in range(math.ceil(options.max_steps / options.check_every)):
        for _ in range(options.check_every):
            current = DiagonalGaussian(mean, log_std.exp())
            draws = gaussian_elbo(model, x, current, options.samples, generator)
            loss = -draws.mean(0).sum()
            mean.grad, log_std.grad = torch.autograd.grad(loss, [mean, log_std])
            optimizer.step()
        current = DiagonalGaussian(mean.detach().clone(), log_std.detach().exp())
        gain = (measure(current, MEASURE_SAMPLES, 1).mean(0) - best_elbo).nan_to_num(0)
        gain = gain.clamp_min(0)
        better = (gain > 0)[:, None]
        best = DiagonalGaussian(
            torch.where(better, current.mean, best.mean), torch.where(better, current.std, best.std)
        )
        best_elbo = best_elbo + gain
        quiet = torch.where(gain < options.tolerance, quiet + 1, torch.zeros_like(quiet))
        if bool((quiet >= 2).all()):
            break
        if float(gain.mean()) < options.tolerance:  # bouncing around: smaller steps
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    draws = measure(best, elbo_samples, 2).double()
    error = draws.std(0) / math.sqrt(elbo_samples)
    return best.mean, best.std, draws.mean(0), error, quiet >= 2
