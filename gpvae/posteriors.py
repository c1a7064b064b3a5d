"""Approximate posteriors q(z | x): one interface for every encoder.

Dimensions: S samples, B images in the batch, D latent, Q quadrature nodes. Everything downstream
(the bound, importance weighting, evaluation, plots) uses `Posterior` only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gpvae.noise import Source, normal
from gpvae.special import log_square_and_slopes

LOG_2PI = math.log(2 * math.pi)
REACH = 7.0  # standard deviations of h that the quadrature covers


def normal_log_prob(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z; mean, std^2), elementwise, in nats."""
    return -0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * LOG_2PI


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
    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        """Reparameterised samples, [*shape, B, D]."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x) in nats, [..., B], for z of shape [..., B, D]."""

    def rsample_with_log_prob(
        self, shape: tuple[int, ...] = (), source: Source = None
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log q(z | x); flows override it, since they get both in one pass."""
        z = self.rsample(shape, source)
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

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        noise = normal((*shape, *self.mean.shape), self.mean, source)
        return torch.addcmul(self.mean, self.std, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        return normal_log_prob(z, self.mean, self.std).sum(-1)

    def kl(self) -> Tensor:
        terms = self.mean**2 + self.std**2 - 1 - 2 * self.std.log()
        return 0.5 * terms.sum(-1)

    def __getitem__(self, index: slice | Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean[index], self.std[index])


class ExpectedKL(torch.autograd.Function):
    """E_{f, h} KL(N(f, h^2) || N(0, 1)) = (F^2 + S^2 + H^2 + T^2 - 1 - E log h^2) / 2, elementwise.

    The gradient of E log h^2 comes from the same table lookup as its value.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        f_mean: Tensor, f_std: Tensor, h_mean: Tensor, h_std: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_square, by_mean, by_std = log_square_and_slopes(h_mean, h_std)
        squares = f_mean**2 + f_std**2 + h_mean**2 + h_std**2
        by_h = torch.add(h_mean, by_mean, alpha=-0.5), torch.add(h_std, by_std, alpha=-0.5)
        return 0.5 * (squares - 1 - log_square), *by_h

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(grad * slope for slope in ctx.saved_tensors)


class RandomFunctionPosterior(Posterior):
    """GPVAE's posterior: z = f + h e with random f ~ N(F, S^2), h ~ N(H, T^2), e ~ N(0, 1).

    f and h are the values at x of the random mean and standard deviation functions, under the
    posterior of their weights. h enters squared, so its sign is free.

    - `rsample` draws f, h and z (local reparameterisation), so samples follow the predictive
      density q(z | x) = E_{f, h} N(z; f, h^2).
    - `log_prob` is that density, exactly: for each latent dimension it is the one-dimensional
      E_h N(z; F, S^2 + h^2), by quadrature in log space (`quadrature`).
    - `kl` is the *expected* KL, E_{f, h} KL(N(f, h^2) || N(0, 1)), as in the training objective.
      By convexity it is at least the KL of the predictive density, for which `marginal` asks: it
      has no closed form, so `kl` is None then and the bound samples log q(z | x) instead.
    - `gaussian` is the moment-matched stand-in, N(F, S^2 + H^2 + T^2).
    - `scores` has Var f / E h^2 (`relative_f_var`), Var f and Var h summed over dimensions, and
      `expected_gap`, E_{f, h} KL(N(f, h^2) || gaussian()) in nats: the mean divergence of the
      random Gaussian from the one with the predictive moments. The amortization gap that is
      expected, if the image's best Gaussian is one more draw of the functions, is about twice it.

    References:
        Reducing the Amortization Gap in Variational Autoencoders: A Bayesian Random Function
        Approach (Kim and Pavlovic, 2021), https://arxiv.org/abs/2102.03151
        Variational Dropout and the Local Reparameterization Trick (Kingma et al., 2015)

    Args:
        f_mean, f_std: F and S, [B, D]; S may be zero.
        h_mean, h_std: H and T, [B, D]; T may be zero where H is not.
        nodes: Q, for the quadrature over h.
        marginal: whether bounds are those of the predictive density.
    """

    def __init__(
        self,
        f_mean: Tensor,
        f_std: Tensor,
        h_mean: Tensor,
        h_std: Tensor,
        nodes: int = 48,
        marginal: bool = False,
    ) -> None:
        self.f_mean, self.f_std = f_mean, f_std
        self.h_mean, self.h_std = h_mean, h_std
        self.nodes, self.marginal = nodes, marginal

    @property
    def mean(self) -> Tensor:
        return self.f_mean

    @property
    def std(self) -> Tensor:
        return (self.f_std**2 + self.h_mean**2 + self.h_std**2).sqrt()

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        e1, e2, e3 = normal((3, *shape, *self.f_mean.shape), self.f_mean, source)
        f = torch.addcmul(self.f_mean, self.f_std, e1)
        h = torch.addcmul(self.h_mean, self.h_std, e2)
        return torch.addcmul(f, h, e3)

    def log_prob(self, z: Tensor) -> Tensor:
        square = (z - self.f_mean) ** 2  # [..., B, D]
        variances, log_weights = self.quadrature()
        offsets = (log_weights - 0.5 * (LOG_2PI + variances.log())).to(z.dtype)
        factors = (0.5 / variances).to(z.dtype)
        if z.is_cuda:  # memory is fast and launches are not
            ahead = (slice(None), *[None] * (z.ndim - 2))
            terms = torch.addcmul(offsets[ahead], square, factors[ahead], value=-1)
            return terms.logsumexp(0).sum(-1)
        # One node at a time: a tensor of all nodes would leave the caches.
        total = None
        for offset, factor in zip(offsets, factors, strict=True):
            term = torch.addcmul(offset, square, factor, value=-1)
            total = term if total is None else torch.logaddexp(total, term)
        return total.sum(-1)

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Variances S^2 + h^2 at Q nodes and their log weights, both [Q, B, D] in float64.

        q(z) is a mixture of N(F, S^2 + h^2) over h ~ N(H, T^2). As a function of h the integrand
        is only as smooth as S is large near h = 0, which defeats Gauss-Hermite rules. With
        h = s sinh(u), s about S, it is smooth in u at every scale, so an equidistant rule in u
        converges geometrically. Where zero is many T away, it carries no mass and s may be larger.
        With 48 nodes the density is within 3e-5 nats for every H and T, up to six standard
        deviations from F, where S is at least T / 10. With a smaller S (such as a function that is
        not random) q has a peak at F that h near zero makes: within a tenth of a standard deviation
        of F the density may be too low by tenths of a nat. The weights are normalised, so the rule
        is exact for T = 0.
        """
        f_std, mean, std = (v.double() for v in (self.f_std, self.h_mean, self.h_std))
        std = torch.maximum(std, 1e-9 * (mean.abs() + f_std)).clamp_min(1e-150)
        floor = (0.05 * ((mean / std) ** 2 / 4).clamp_max(30).exp()).clamp_max(3)
        scale = torch.hypot(f_std, floor * std)
        low, high = (((mean + sign * REACH * std) / scale).asinh() for sign in (-1, 1))
        steps = torch.linspace(0, 1, self.nodes, dtype=torch.float64, device=mean.device)
        u = low + (high - low) * steps[:, None, None]
        h = scale * u.sinh()
        log_weights = -0.5 * ((h - mean) / std) ** 2 + u.cosh().log()
        variance = (f_std**2 + h**2).clamp_min(1e-300)  # a node may fall on h = 0 where S = 0
        return variance, log_weights - log_weights.logsumexp(0)

    def kl(self) -> Tensor | None:
        if self.marginal:
            return None
        return ExpectedKL.apply(self.f_mean, self.f_std, self.h_mean, self.h_std)[0].sum(-1)

    def scores(self) -> dict[str, Tensor]:
        f_var, h_var = self.f_std**2, self.h_std**2
        # Of all diagonal Gaussians q, the one with the predictive moments is nearest on average
        # to the random N(f, h^2): E KL(N(f, h^2) || q).
        spread = 2 * self.std.log() - log_square_and_slopes(self.h_mean, self.h_std)[0]
        return {
            "relative_f_var": (f_var / (self.h_mean**2 + h_var)).mean(-1),
            "expected_gap": 0.5 * spread.sum(-1),
            "f_var": f_var.sum(-1),
            "h_var": h_var.sum(-1),
        }

    def __getitem__(self, index: slice | Tensor) -> RandomFunctionPosterior:
        parts = (self.f_mean, self.f_std, self.h_mean, self.h_std)
        return RandomFunctionPosterior(*(p[index] for p in parts), self.nodes, self.marginal)
