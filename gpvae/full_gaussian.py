"""Gaussian posterior with a full covariance, held as its Cholesky factor.

Dimensions: S samples, B images, D latent. Densities are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpvae.noise import Source, normal
from gpvae.posteriors import LOG_2PI, Posterior
from gpvae.step import capturing


class FullGaussian(Posterior):
    """N(mean, L L^T) with L lower triangular and a positive diagonal.

    z = mean + L e with e ~ N(0, I), so that log q(z) = -|e|^2 / 2 - sum_j log L_jj - D/2 log 2 pi.

    Args:
        mean: [B, D].
        scale_tril: L, [B, D, D].

    Example:
        >>> q = FullGaussian(torch.zeros(5, 3), torch.eye(3).expand(5, 3, 3))
        >>> q.rsample((7,)).shape, float(q.kl().sum())
        (torch.Size([7, 5, 3]), 0.0)
    """

    def __init__(self, mean: Tensor, scale_tril: Tensor) -> None:
        if scale_tril.shape != (*mean.shape, mean.shape[-1]):
            raise ValueError(
                f"scale_tril has shape {tuple(scale_tril.shape)}; a mean of shape "
                f"{tuple(mean.shape)} needs {(*mean.shape, mean.shape[-1])}."
            )
        self._mean, self.scale_tril = mean, scale_tril

    @classmethod
    def from_precision(cls, mean: Tensor, precision: Tensor) -> FullGaussian:
        """N(mean, precision^-1) for a positive definite precision [B, D, D].

        Neither the precision nor the covariance is inverted: the Cholesky factor of the precision
        with its axes reversed, reversed back, is an upper-triangular U^T with
        precision = U^T U and U lower triangular, so L = U^-1 is one triangular solve.
        """
        # A graph cannot hold the check, which looks at numbers; the loss is NaN then.
        turned, check = precision.flip(-1, -2), not capturing()
        reversed_factor = torch.linalg.cholesky_ex(turned, check_errors=check).L
        lower = reversed_factor.flip(-1, -2).mT
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        return cls(mean, torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False))

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def std(self) -> Tensor:
        return self.scale_tril.square().sum(-1).sqrt()

    def covariance(self) -> Tensor:
        """L L^T, [B, D, D], made explicit for inspection and tests."""
        return self.scale_tril @ self.scale_tril.mT

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        return self.rsample_with_log_prob(shape, source)[0]

    def rsample_with_log_prob(
        self, shape: tuple[int, ...] = (), source: Source = None
    ) -> tuple[Tensor, Tensor]:
        """Samples and log q; the noise is at hand, so no triangular solve is needed."""
        noise = normal((*shape, *self.mean.shape), self.mean, source)
        z = self.mean + torch.einsum("bij,...bj->...bi", self.scale_tril, noise)
        return z, self._log_density(noise)

    def log_prob(self, z: Tensor) -> Tensor:
        # Samples become columns, so that one triangular solve per image serves all of them.
        flat = (z - self.mean).reshape(-1, *self.mean.shape).permute(1, 2, 0)  # [B, D, S]
        noise = torch.linalg.solve_triangular(self.scale_tril, flat, upper=False)
        return self._log_density(noise.permute(2, 0, 1).reshape(z.shape))

    def kl(self) -> Tensor:
        trace = self.scale_tril.square().sum((-2, -1))
        square = self.mean.square().sum(-1)
        return 0.5 * (trace + square - self.mean.shape[-1]) - self._half_log_det()

    def __getitem__(self, index: slice | Tensor) -> FullGaussian:
        return FullGaussian(self.mean[index], self.scale_tril[index])

    def _half_log_det(self) -> Tensor:
        """sum_j log L_jj, [B]."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _log_density(self, noise: Tensor) -> Tensor:
        """log q, [..., B], at z = mean + L noise."""
        constant = 0.5 * LOG_2PI * noise.shape[-1]
        return -0.5 * noise.square().sum(-1) - constant - self._half_log_det()
