"""GPVAE: the encoder's mean and standard deviation as Gaussian-process random functions.

    f(x) = W psi(x) + b(x),   h(x) = U psi(x) + c(x),   rows w_j, u_j ~ N(0, I_M)

so that f_j ~ GP(b_j, k) and h_j ~ GP(c_j, k) with k(x, x') = psi(x)^T psi(x'). The rows have
Gaussian posteriors q(w_j) = N(mu_j, Sigma_j) and q(u_j) = N(eta_j, Gamma_j).

References:
    Reducing the Amortization Gap in Variational Autoencoders: A Bayesian Random Function
    Approach (Kim and Pavlovic, 2021), https://arxiv.org/abs/2102.03151

Dimensions: B images, D latent, M kernel features, R trunk features, K rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gpvae.config import GPConfig, ModelConfig
from gpvae.errors import ConfigError, unknown
from gpvae.posteriors import RandomFunctionPosterior
from gpvae.vae import VAE, GaussianEncoder, Generative


class WeightPosterior(nn.Module, ABC):
    """prod_j N(w_j; mean_j, Sigma_j) over the rows of a D x M matrix with prior N(0, I)."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(rows, features))

    @abstractmethod
    def variance(self, psi: Tensor) -> Tensor:
        """psi^T Sigma_j psi, [B, D], for psi [B, M]."""

    @abstractmethod
    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over the rows."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Sigma, [D, M, M], made explicit for inspection and tests."""

    def forward(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of w_j^T psi, each [B, D]."""
        # The floor keeps the square root's gradient finite; it is far below rounding error.
        variance = self.variance(psi).clamp_min(torch.finfo(psi.dtype).tiny)
        return psi @ self.mean.T, variance.sqrt()


class DiagonalWeights(WeightPosterior):
    """Sigma_j = diag(exp(2 log_std_j))."""

    def __init__(self, rows: int, features: int, config: GPConfig) -> None:
        super().__init__(rows, features)
        start = math.log(config.initial_std)
        self.log_std = nn.Parameter(torch.full((rows, features), start))

    def variance(self, psi: Tensor) -> Tensor:
        return psi**2 @ torch.exp(2 * self.log_std).T

    def kl(self) -> Tensor:
        log_variance = 2 * self.log_std
        return 0.5 * (self.mean**2 + log_variance.exp() - log_variance - 1).sum()

    def covariance(self) -> Tensor:
        return torch.diag_embed(torch.exp(2 * self.log_std))


class LowRankWeights(DiagonalWeights):
    """Sigma_j = diag(exp(2 log_std_j)) + L_j L_j^T with L_j of shape [M, K]."""

    def __init__(self, rows: int, features: int, config: GPConfig) -> None:
        super().__init__(rows, features, config)
        if config.rank > features:
            raise ConfigError(
                f"model.gp.rank is {config.rank}, above model.gp.features = {features}; "
                "lower the rank or use covariance='full'."
            )
        # Small random columns: from zero, every column would get the same (zero) gradient.
        scale = 0.1 * config.initial_std / math.sqrt(config.rank)
        self.factor = nn.Parameter(scale * torch.randn(rows, features, config.rank))

    def variance(self, psi: Tensor) -> Tensor:
        projected = torch.einsum("bm,dmk->bdk", psi, self.factor)
        return super().variance(psi) + (projected**2).sum(-1)

    def kl(self) -> Tensor:
        # Matrix determinant lemma: |S + L L^T| = |S| |I + L^T S^-1 L|, a K x K problem.
        scaled = self.factor * torch.exp(-self.log_std)[..., None]
        small = scaled.mT @ scaled
        eye = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
        log_det = torch.linalg.slogdet(eye + small).logabsdet.sum()
        return super().kl() + 0.5 * ((self.factor**2).sum() - log_det)

    def covariance(self) -> Tensor:
        return super().covariance() + self.factor @ self.factor.mT


class FullWeights(WeightPosterior):
    """Sigma_j = C_j C_j^T with a lower-triangular Cholesky factor; costs B D M^2 a batch."""

    def __init__(self, rows: int, features: int, config: GPConfig) -> None:
        super().__init__(rows, features)
        start = math.log(config.initial_std)
        self.log_diagonal = nn.Parameter(torch.full((rows, features), start))
        self.lower = nn.Parameter(torch.zeros(rows, features, features))

    def cholesky(self) -> Tensor:
        """C, [D, M, M]."""
        return self.lower.tril(-1) + torch.diag_embed(self.log_diagonal.exp())

    def variance(self, psi: Tensor) -> Tensor:
        return (torch.einsum("bm,dmk->bdk", psi, self.cholesky()) ** 2).sum(-1)

    def kl(self) -> Tensor:
        trace, log_det = (self.cholesky() ** 2).sum(), 2 * self.log_diagonal.sum()
        return 0.5 * (trace + (self.mean**2).sum() - self.mean.numel() - log_det)

    def covariance(self) -> Tensor:
        return self.cholesky() @ self.cholesky().mT


WEIGHTS = {"diagonal": DiagonalWeights, "full": FullWeights, "low-rank": LowRankWeights}


class RandomFunctionEncoder(GaussianEncoder):
    """x -> the distribution of N(f(x), diag h(x)^2) under the weights' posterior.

    b and log c are the VAE's heads; psi is one more head on the same trunk, so inference stays
    one pass. With zero weight means and covariances it is the VAE's encoder.

    Attributes:
        weights: posterior of the rows of W, then of those of U: together they need half as many
            products. A function that is not random has no rows; None if neither is.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        gp = config.gp
        if gp.covariance not in WEIGHTS:
            raise ConfigError(unknown("covariance", gp.covariance, WEIGHTS))
        weights = WEIGHTS[gp.covariance]
        self.scale = gp.amplitude / math.sqrt(gp.features)
        self.psi_head = nn.Linear(self.trunk.out_features, gp.features)
        self.random = (gp.random_mean, gp.random_std)
        rows = sum(self.random) * config.latent_dim
        self.weights = weights(rows, gp.features, gp) if rows else None
        self.marginal = gp.bound == "marginal"
        self.residual_head = None
        if gp.residual:
            self.residual_head = nn.Linear(self.trunk.out_features, config.latent_dim)
            nn.init.constant_(self.residual_head.bias, math.log(gp.initial_std))

    def psi(self, x: Tensor) -> Tensor:
        """Kernel features, [B, M]; k(x, x') = psi(x)^T psi(x')."""
        return self._psi(self.trunk(x))

    def forward(self, x: Tensor, generative: Generative | None = None) -> RandomFunctionPosterior:
        """Posterior of images x [B, C, H, W]."""
        r = self.trunk(x)
        psi = self._psi(r)
        b, c = self.mean_head(r), self.log_std_head(r).exp()
        (f, f_std), (h, h_std) = self._functions(psi, torch.zeros_like(b))
        if self.residual_head is not None:
            f_std = torch.hypot(f_std, self.residual_head(r).exp())
        return RandomFunctionPosterior(f + b, f_std, h + c, h_std, marginal=self.marginal)

    def weight_kl(self) -> Tensor:
        """KL(q(W) || p(W)) + KL(q(U) || p(U)), in nats for the whole training set."""
        return super().weight_kl() if self.weights is None else self.weights.kl()

    def _functions(self, psi: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation of W psi and of U psi, each [B, D]."""
        if self.weights is None:
            return [(zero, zero)] * 2
        count = sum(self.random)
        parts = iter(zip(*(v.chunk(count, -1) for v in self.weights(psi)), strict=True))
        return [next(parts) if random else (zero, zero) for random in self.random]

    def _psi(self, trunk: Tensor) -> Tensor:
        return self.scale * self.psi_head(trunk).tanh()


class GPVAE(VAE):
    """VAE whose encoder is a pair of random functions (see the module's docstring).

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.gp` for kernel, weight posterior and temperature.

    Example:
        >>> import gpvae
        >>> posterior = gpvae.GPVAE((1, 8, 8))(torch.rand(5, 1, 8, 8))
        >>> sorted(posterior.scores())
        ['expected_gap', 'f_var', 'h_var', 'relative_f_var']
    """

    encoder_type = RandomFunctionEncoder

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig | None = None) -> None:
        config = config or ModelConfig(encoder="gpvae")
        super().__init__(shape, config)
        self.temperature = config.gp.temperature
