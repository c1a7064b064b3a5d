"""Stochastic variational inference: the best diagonal Gaussian posterior of each image by itself.

The reference for every gap (Cremer, Li and Duvenaud, 2018), and a method of its own: the encoder
`svi` uses the result in place of the amortised posterior. How the optimum is found is in
`gpvae.search`; here is what is reported about it.

References:
    Stochastic Variational Inference (Hoffman et al., 2013), https://arxiv.org/abs/1206.7051
    Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018),
    https://arxiv.org/abs/1801.03558

Dimensions: N images, S samples, D latent. Bounds are in nats per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError
from gpvae.evaluate import (
    IMAGES_PER_BLOCK,
    Estimate,
    check_count,
    check_samples,
    chunked_log_likelihood,
)
from gpvae.memory import Memory
from gpvae.noise import image_noise
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.search import MEASURE_SAMPLES, SearchOptions, search
from gpvae.vae import VAE, GaussianEncoder, Generative


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
        DataError: images that the model has no density of (`VAE.check_images`), or not one start
            for each.
        ConfigError: no samples.
    """
    check_samples(elbo_samples)
    model.check_images(x)
    options = options or SearchOptions()
    if start is not None:
        check_count("starting posteriors", start, x)
    q = gaussians(model, x) if start is None else start.gaussian()
    best, converged, steps = search(model.generative, x, q, options)
    estimate = measured(model.generative, x, best, elbo_samples, options.seed)
    return Optimised(best, estimate, converged, steps)


@torch.no_grad()
def gaussians(model: VAE, x: Tensor) -> DiagonalGaussian:
    """The Gaussian stand-ins of the model's posteriors of N images."""
    parts = [model(block).gaussian() for block in x.split(IMAGES_PER_BLOCK)]
    return DiagonalGaussian(torch.cat([q.mean for q in parts]), torch.cat([q.std for q in parts]))


@torch.no_grad()
def measured(
    generative: Generative, x: Tensor, q: DiagonalGaussian, samples: int, seed: int
) -> Estimate:
    """The ELBO of N images under given Gaussians, with noise that belongs to each image."""
    memory = Memory(None, x.device)
    values, errors = [], []
    for index in torch.arange(len(x), device=x.device).split(IMAGES_PER_BLOCK):
        z = q.mean[index] + q.std[index] * image_noise(x[index], samples, q.mean.shape[-1], seed)
        draws = chunked_log_likelihood(generative, x[index], z, memory).double()
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
    """VAE with stochastic variational inference at evaluation: no amortization gap, but slow.

    It is trained and selected as the VAE is, by the amortised bound, so that with the same seed
    it has the VAE's weights.
    """

    encoder_type = SVIEncoder

    def for_validation(self) -> SVI:
        return self.train()
