"""Approximate posteriors q(z | x): one interface for every encoder.

Dimensions: S samples, B images in the batch, D latent, Q quadrature nodes. Everything downstream
(the bound, importance weighting, evaluation, plots) uses `Posterior` only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gpvae.special import expected_log_square

LOG_2PI = math.log(2 * math.pi)


def normal_log_prob(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z; mean, std^2), elementwise, in nats."""
    return -0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * LOG_2PI


def draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise with the dtype and device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class Posterior(ABC):
    """A batch of B distributions over z in R^D."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean, [B, D]."""

    @property
    @abstractmethod
    def std(self) -> Tensor:
        """Marginal standard deviation, [B, D]."""

    @abstractmethod
    def rsample(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Reparameterised samples, [*shape, B, D]."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x) in nats, [..., B], for z of shape [..., B, D]."""

    def rsample_with_log_prob(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log q(z | x); flows override it, since they get both in one pass."""
        z = self.rsample(shape, generator)
        return z, self.log_prob(z)

    @abstractmethod
    def __getitem__(self, index: slice | Tensor) -> Posterior:
        """The posteriors of some of the images."""

    def kl(self) -> Tensor | None:
        """KL(q || N(0, I)) in nats, [B], or None where there is no closed form."""
        return None

    def gaussian(self) -> DiagonalGaussian:
        """The diagonal Gaussian with the same mean and variance."""
        return DiagonalGaussian(self.mean, self.std)

    def scores(self) -> dict[str, Tensor]:
        """Scores of difficulty by name, each [B]; larger means harder. Empty if it has none."""
        return {}


class DiagonalGaussian(Posterior):
    """N(mean, diag std^2), the VAE's posterior (Kingma and Welling, 2014).

    Args:
        mean: [B, D].
        std: [B, D], positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self._mean, self._std = mean, std

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def std(self) -> Tensor:
        return self._std

    def rsample(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        noise = draw((*shape, *self.mean.shape), self.mean, generator)
        return self.mean + self.std * noise

    def log_prob(self, z: Tensor) -> Tensor:
        return normal_log_prob(z, self.mean, self.std).sum(-1)

    def kl(self) -> Tensor:
        terms = self.mean**2 + self.std**2 - 1 - 2 * self.std.log()
        return 0.5 * terms.sum(-1)

    def __getitem__(self, index: slice | Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean[index], self.std[index])


class RandomFunctionPosterior(Posterior):
    """GPVAE's posterior: z = f + h e with random f ~ N(F, S^2), h ~ N(H, T^2), e ~ N(0, 1).

    f and h are the values at x of the random mean and standard deviation functions, under the
    posterior of their weights. h enters squared, so its sign is free.

    - `rsample` draws f, h and z (local reparameterisation), so samples follow the predictive
      density q(z | x) = E_{f, h} N(z; f, h^2).
    - `log_prob` is that density, exactly: for each latent dimension it is the one-dimensional
      E_h N(z; F, S^2 + h^2), by Gauss-Hermite quadrature over h in log space.
    - `kl` is the *expected* KL, E_{f, h} KL(N(f, h^2) || N(0, 1)), as in the training objective.
      By convexity it is at least the KL of the predictive density.
    - `gaussian` is the moment-matched stand-in, N(F, S^2 + H^2 + T^2).

    References:
        Reducing the Amortization Gap in Variational Autoencoders: A Bayesian Random Function
        Approach (Kim and Pavlovic, 2021), https://arxiv.org/abs/2102.03151
        Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)

    Args:
        f_mean, f_std: F and S, [B, D]; S may be zero.
        h_mean, h_std: H and T, [B, D]; T may be zero where H is not.
        nodes: Q. The quadrature converges geometrically while |H| or S is at least about T; 32
            nodes then give 1e-6 nats or better. Where T exceeds both (a standard deviation
            indistinguishable from zero) the density has a cusp at F and more nodes help slowly.
    """

    def __init__(
        self, f_mean: Tensor, f_std: Tensor, h_mean: Tensor, h_std: Tensor, nodes: int = 32
    ) -> None:
        self.f_mean, self.f_std = f_mean, f_std
        self.h_mean, self.h_std = h_mean, h_std
        self.nodes = nodes

    @property
    def mean(self) -> Tensor:
        return self.f_mean

    @property
    def std(self) -> Tensor:
        return (self.f_std**2 + self.h_mean**2 + self.h_std**2).sqrt()

    def rsample(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        e1, e2, e3 = draw((3, *shape, *self.f_mean.shape), self.f_mean, generator)
        f = self.f_mean + self.f_std * e1
        h = self.h_mean + self.h_std * e2
        return f + h * e3

    def log_prob(self, z: Tensor) -> Tensor:
        square = (z - self.f_mean) ** 2  # [..., B, D]
        total = None
        for node, log_weight in zip(*_gauss_hermite(self.nodes), strict=True):
            h = self.h_mean + self.h_std * node
            # A floor far below any variance met in practice keeps h = S = 0 from giving 0/0.
            var = (self.f_std**2 + h**2).clamp_min(torch.finfo(z.dtype).tiny)
            term = (log_weight - 0.5 * LOG_2PI - 0.5 * var.log()) - square * (0.5 / var)
            total = term if total is None else torch.logaddexp(total, term)
        return total.sum(-1)

    def kl(self) -> Tensor:
        second_moments = self.f_mean**2 + self.f_std**2 + self.h_mean**2 + self.h_std**2
        log_h_square = expected_log_square(self.h_mean, self.h_std)
        return 0.5 * (second_moments - 1 - log_h_square).sum(-1)

    def scores(self) -> dict[str, Tensor]:
        f_var, h_var = self.f_std**2, self.h_std**2
        return {
            "relative_f_var": (f_var / (self.h_mean**2 + h_var)).mean(-1),
            "f_var": f_var.sum(-1),
            "h_var": h_var.sum(-1),
        }

    def __getitem__(self, index: slice | Tensor) -> RandomFunctionPosterior:
        parts = (self.f_mean, self.f_std, self.h_mean, self.h_std)
        return RandomFunctionPosterior(*(p[index] for p in parts), nodes=self.nodes)


@lru_cache
def _gauss_hermite(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and log weights for an expectation over N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points.tolist(), (np.log(weights) - 0.5 * LOG_2PI).tolist()
