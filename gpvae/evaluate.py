"""One estimator of the bound and of log p(x) for every model, in nats per image.

Dimensions: N images, S samples, D latent, P pixels. Noise belongs to the image (`ImageNoise`): an
image gets the same number alone, in any batch and at any place in it. Memory is bounded by decoding
at most `memory` bytes of pixels at a time; the numbers do not depend on it (rounding aside).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError, DataError, unknown
from gpvae.memory import Memory
from gpvae.noise import ImageNoise
from gpvae.posteriors import Posterior
from gpvae.vae import VAE, Generative

IMAGES_PER_BLOCK = 500
DRAWS_PER_BLOCK = 50
TEMPORARIES = 4  # tensors of the decoded pixels' size that exist at once

PROPOSALS: dict[str, Callable[[Posterior], Posterior]] = {
    "exact": lambda posterior: posterior,
    "gaussian": lambda posterior: posterior.gaussian(),
}


@dataclass(frozen=True)
class Estimate:
    """Per-image estimates in nats.

    Args:
        value: [N].
        stderr: [N], Monte Carlo standard error of each value; NaN for one sample.
        samples: S, exactly as many as were used for each image.
    """

    value: Tensor
    stderr: Tensor
    samples: int

    @property
    def mean(self) -> float:
        """Mean over the images."""
        return float(self.value.double().mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` over images, as a sample of the population of images."""
        n = len(self.value)
        return float(self.value.double().std() / math.sqrt(n)) if n > 1 else math.nan


@torch.no_grad()
def elbo(
    model: VAE, x: Tensor, samples: int = 100, *, seed: int = 0, memory: int | None = None
) -> Estimate:
    """ELBO(x) = E_q log p(x | z) - KL(q(z | x) || p(z)) by S posterior samples.

    The KL is exact where the posterior has a closed form; for GPVAE it is the expected KL, so
    this is E_{f, h} ELBO(x; f, h), the quantity that training maximises.

    Args:
        model: any model of this package.
        x: images [N, C, H, W]; binary for a Bernoulli output.
        samples: S.
        seed: seed of the posterior samples.
        memory: bound in bytes on the decoded pixels held at once; see `Memory`.

    Raises:
        DataError: images that the model has no density of (`VAE.check_images`).
        ConfigError: no samples.
    """
    check_samples(samples)
    model.check_images(x)
    budget = Memory(memory, x.device)
    values, errors = [], []
    for x_block, posterior, noise in blocks(model, x, seed):
        kl = posterior.kl()
        terms = [
            log_lik if kl is not None else log_lik + log_prior - log_q
            for log_lik, log_prior, log_q in weight_terms(
                model.generative, x_block, posterior, samples, noise, budget, kl is None
            )
        ]
        draws = torch.cat(terms).double()  # [S, B]
        values.append(draws.mean(0) - (0 if kl is None else kl.double()))
        errors.append(draws.std(0, correction=1) / math.sqrt(samples))
    return Estimate(torch.cat(values), torch.cat(errors), samples)


@torch.no_grad()
def log_likelihood(
    model: VAE,
    x: Tensor,
    samples: int = 100,
    *,
    proposal: str | Posterior = "exact",
    seed: int = 0,
    memory: int | None = None,
) -> Estimate:
    """log p(x) >= E log (1/S) sum_s p(x, z_s) / q(z_s), z_s ~ q (Burda et al., 2016).

    A stochastic lower bound that rises with S; exactly S samples are used.

    Args:
        model: any model of this package.
        x: images [N, C, H, W]; binary for a Bernoulli output.
        samples: S.
        proposal: "exact" for the model's own q(z | x) (for GPVAE the quadrature density),
            "gaussian" for the Gaussian with its moments, or posteriors of all N images.
        seed: seed of the proposal's samples.
        memory: bound in bytes on the decoded pixels held at once; see `Memory`.

    Returns:
        Values and their standard errors by the delta method,
        sqrt((S sum w_s^2 / (sum w_s)^2 - 1) / (S - 1)), which is itself optimistic while a few
        weights dominate.

    Raises:
        DataError: images that the model has no density of (`VAE.check_images`), or not one
            proposal for each.
        ConfigError: unknown proposal, or no samples.
    """
    check_samples(samples)
    if isinstance(proposal, str) and proposal not in PROPOSALS:
        raise ConfigError(unknown("proposal", proposal, PROPOSALS))
    model.check_images(x)
    budget = Memory(memory, x.device)
    values, errors = [], []
    for x_block, q, noise in blocks(model, x, seed, proposal):
        first = torch.full((len(x_block),), -math.inf, dtype=torch.float64, device=x.device)
        second = first.clone()
        for log_lik, log_prior, log_q in weight_terms(
            model.generative, x_block, q, samples, noise, budget, True
        ):
            log_w = (log_lik + log_prior - log_q).double()  # [block of samples, B]
            first = torch.logaddexp(first, log_w.logsumexp(0))
            second = torch.logaddexp(second, (2 * log_w).logsumexp(0))
        values.append(first - math.log(samples))
        spread = samples * (second - 2 * first).exp() - 1
        errors.append((spread.clamp_min(0) / (samples - 1 or math.nan)).sqrt())
    return Estimate(torch.cat(values), torch.cat(errors), samples)


def check_samples(samples: int) -> None:
    """Raise ConfigError unless there is at least one sample."""
    if samples < 1:
        raise ConfigError(f"samples={samples}; expected at least 1.")


def check_count(what: str, posteriors: Posterior, x: Tensor) -> None:
    """Raise DataError unless there is one posterior for each image."""
    if len(posteriors.mean) != len(x):
        raise DataError(
            f"{len(posteriors.mean)} {what} were given for {len(x)} images; give one for each, "
            "such as model(x) of the same images."
        )


def blocks(
    model: VAE, x: Tensor, seed: int, proposal: str | Posterior = "exact"
) -> Iterator[tuple[Tensor, Posterior, ImageNoise]]:
    """Images, their posterior and their noise, for each block of images. The encoder runs once."""
    if isinstance(proposal, Posterior):
        check_count("proposals", proposal, x)
    for start in range(0, len(x), IMAGES_PER_BLOCK):
        index = slice(start, start + IMAGES_PER_BLOCK)
        noise = ImageNoise(x[index], seed)
        if isinstance(proposal, Posterior):
            yield x[index], proposal[index], noise
        else:
            yield x[index], PROPOSALS[proposal](model(x[index])), noise


def weight_terms(
    generative: Generative,
    x: Tensor,
    q: Posterior,
    samples: int,
    noise: ImageNoise,
    memory: Memory,
    densities: bool,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """log p(x | z), log p(z) and log q(z), each [block, B], until S samples have been drawn.

    Without `densities` the last two, which cost time, are None.
    """
    for start in range(0, samples, DRAWS_PER_BLOCK):
        shape = (min(DRAWS_PER_BLOCK, samples - start),)
        if densities:
            z, log_q = q.rsample_with_log_prob(shape, noise)
            yield chunked_log_likelihood(generative, x, z, memory), generative.log_prior(z), log_q
        else:
            z = q.rsample(shape, noise)
            yield chunked_log_likelihood(generative, x, z, memory), None, None


def chunked_log_likelihood(generative: Generative, x: Tensor, z: Tensor, memory: Memory) -> Tensor:
    """log p(x | z), [S, B], decoding as many samples, or images of one sample, as fit."""
    row = math.prod(generative.shape) * z.element_size() * TEMPORARIES

    def of_samples(s: slice) -> Tensor:
        if len(z[s]) > 1:
            return generative.log_likelihood(x, z[s])

        def of_images(b: slice) -> Tensor:
            return generative.log_likelihood(x[b], z[s, b])

        return torch.cat(memory.chunks(of_images, len(x), row), dim=1)

    return torch.cat(memory.chunks(of_samples, len(z), row * len(x)))
