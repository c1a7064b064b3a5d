"""Where a bound is lost: gap decomposition for any model, image by image.

    inference gap      log p(x) - ELBO(q)      =  approximation gap + amortization gap
    approximation gap  log p(x) - ELBO(q*)     what no diagonal Gaussian can reach
    amortization gap   ELBO(q*) - ELBO(q)      what the encoder leaves on the table

with q the model's own posterior and q* the image's own best diagonal Gaussian (`svi`). For models
with a richer q (flows, mixtures, full covariance) the same q* is the yardstick, so their
amortization gap can be negative: they beat the best diagonal Gaussian.

References:
    Inference Suboptimality in Variational Autoencoders (Cremer, Li and Duvenaud, 2018),
    https://arxiv.org/abs/1801.03558

log p(x) is estimated three times by importance weighting: with the model's own posterior, with q*
slightly widened (neutral: it depends on the decoder alone, but is poor where the posterior is far
from a diagonal Gaussian), and with an equal mixture of the two (Hesterberg, 1995), whose weights
are never more than twice those of the better one. All are lower bounds in expectation, and too low
by nats where S is too small for both proposals, as the standard errors of single images tell; the
third is the reference for the gaps. Choosing the larger of the first two instead would be biased
upwards.

Dimensions: N images, S samples. Everything is in nats per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError
from gpvae.evaluate import Estimate, elbo, log_likelihood
from gpvae.noise import Source
from gpvae.posteriors import Posterior
from gpvae.svi import Optimised, SearchOptions, optimise_posterior, widened
from gpvae.vae import VAE


@dataclass(frozen=True)
class Gaps:
    """Per-image bounds, estimates of log p(x) and their differences, for N images.

    Args:
        elbo: of the model's own posterior.
        elbo_optimised: of the image's best diagonal Gaussian.
        own: log p(x) with the model's own posterior as proposal.
        neutral: log p(x) with the optimised Gaussian, widened, as proposal.
        log_px: log p(x) with the mixture of both; the reference.
        optimised: result of the search, with its convergence flags.
    """

    elbo: Estimate
    elbo_optimised: Estimate
    own: Estimate
    neutral: Estimate
    log_px: Estimate
    optimised: Optimised

    @property
    def approximation(self) -> Estimate:
        """log p(x) minus the best diagonal Gaussian's bound."""
        return difference(self.log_px, self.elbo_optimised)

    @property
    def amortization(self) -> Estimate:
        """The best diagonal Gaussian's bound minus the model's."""
        return difference(self.elbo_optimised, self.elbo)

    @property
    def inference(self) -> Estimate:
        """log p(x) minus the model's bound."""
        return difference(self.log_px, self.elbo)

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean over images and its standard error, for each quantity by name."""
        names = ("elbo", "elbo_optimised", "own", "neutral", "log_px")
        names += ("approximation", "amortization", "inference")
        estimates = {name: getattr(self, name) for name in names}
        return {name: (e.mean, e.mean_stderr) for name, e in estimates.items()}


class Pooled(Posterior):
    """Equal mixture of two posteriors, from each of which exactly half of the samples come.

    log q = log(q_a + q_b) - log 2. With stratified halves the mean of the weights p / q stays
    unbiased for p(x), and its variance is no larger than for independent draws from the mixture,
    so that a standard error that assumes those is on the safe side.

    Args:
        a, b: posteriors of the same images.
    """

    def __init__(self, a: Posterior, b: Posterior) -> None:
        self.a, self.b = a, b

    @property
    def mean(self) -> Tensor:
        return 0.5 * (self.a.mean + self.b.mean)

    @property
    def std(self) -> Tensor:
        within = 0.5 * (self.a.std**2 + self.b.std**2)
        return (within + 0.25 * (self.a.mean - self.b.mean) ** 2).sqrt()

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        if not shape or shape[0] % 2:
            raise ConfigError(f"{shape} samples cannot be halved; expected an even number.")
        half = (shape[0] // 2, *shape[1:])
        return torch.cat([self.a.rsample(half, source), self.b.rsample(half, source)])

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.logaddexp(self.a.log_prob(z), self.b.log_prob(z)) - math.log(2)

    def __getitem__(self, index: slice | Tensor) -> Pooled:
        return Pooled(self.a[index], self.b[index])


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b with independent errors, image by image."""
    return Estimate(a.value - b.value, torch.hypot(a.stderr, b.stderr), min(a.samples, b.samples))


@torch.no_grad()
def decompose(
    model: VAE,
    x: Tensor,
    samples: int = 1000,
    elbo_samples: int = 200,
    options: SearchOptions | None = None,
    optimised: Optimised | None = None,
    seed: int = 0,
) -> Gaps:
    """Bounds, log p(x) and gaps of each image.

    Args:
        model: any model of this package.
        x: images [N, C, H, W]; binary for a Bernoulli output.
        samples: importance samples of each of the three estimates; even.
        elbo_samples: posterior samples of each of the two bounds.
        options: of the search for q*.
        optimised: result of an earlier search, for example `certify(model, x).best`.
        seed: of all noise, that of the search only without `options`. The five estimates use
            independent noise, unless `options` has one of the seeds 3 seed to 3 seed + 3.

    Raises:
        ConfigError: an odd number of samples.
        DataError: images that the model has no density of (`VAE.check_images`).
    """
    if samples < 2 or samples % 2:
        raise ConfigError(f"samples={samples}; expected an even number, half for each proposal.")
    model.check_images(x)
    if optimised is None:
        options = options or SearchOptions(seed=3 * seed + 4)
        optimised = optimise_posterior(model, x, options=options, elbo_samples=elbo_samples)
    q, neutral = model(x), widened(optimised.posterior)
    own, new, pooled = (
        log_likelihood(model, x, samples, proposal=proposal, seed=3 * seed + 1 + i)
        for i, proposal in enumerate((q, neutral, Pooled(q, neutral)))
    )
    bound = elbo(model, x, elbo_samples, seed=3 * seed)
    return Gaps(bound, optimised.elbo, own, new, pooled, optimised)
