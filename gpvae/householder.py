"""Householder flow: a Gaussian turned by K reflections that the encoder chooses.

Dimensions: S samples, B images, D latent, K reflections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gpvae.config import ModelConfig
from gpvae.errors import ConfigError
from gpvae.noise import Source
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.vae import VAE, GaussianEncoder, Generative


def unit_vectors(v: Tensor) -> Tensor:
    """v / |v| along the last axis, to rounding for any length; a zero vector stays zero."""
    tiny = torch.finfo(v.dtype).tiny
    # The result does not depend on the scale, so it needs no gradient; without it the squares of
    # short vectors underflow and the reflection is no longer orthogonal.
    scale = v.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    return normalize(v / scale, dim=-1, eps=tiny)


def reflect(z: Tensor, u: Tensor) -> Tensor:
    """H z = z - 2 u (u^T z) for unit vectors u; the identity for u = 0."""
    return z - 2 * u * (u * z).sum(-1, keepdim=True)


class HouseholderGaussian(Posterior):
    """z = V (mean + std * noise) with V = H_K ... H_1, H_k = I - 2 v_k v_k^T / |v_k|^2.

    V is orthogonal, so the flow preserves volume and everything is closed form:

    - q(z | x) = N(z; V mean, V diag(std^2) V^T), and its density at z is that of the base at
      V^T z, in O(K D);
    - KL(q || N(0, I)) is the base's, because the prior does not change under V.

    Args:
        base: N(mean, diag std^2), [B, D].
        vectors: v_1..v_K, [B, K, D], of any length; a zero vector reflects nothing.
    """

    def __init__(self, base: DiagonalGaussian, vectors: Tensor) -> None:
        self.base, self.vectors = base, vectors
        self._units = unit_vectors(vectors).unbind(-2)

    @property
    def mean(self) -> Tensor:
        return self.turn(self.base.mean)

    @property
    def std(self) -> Tensor:
        return ((self.rotation() * self.base.std[:, None]) ** 2).sum(-1).sqrt()

    def turn(self, z: Tensor) -> Tensor:
        """V z for z [..., B, D]."""
        for u in self._units:
            z = reflect(z, u)
        return z

    def turn_back(self, z: Tensor) -> Tensor:
        """V^T z for z [..., B, D]."""
        for u in reversed(self._units):
            z = reflect(z, u)
        return z

    def rotation(self) -> Tensor:
        """V, [B, D, D]; orthogonal."""
        mean = self.base.mean
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        columns = self.turn(eye[:, None].expand(-1, *mean.shape))  # [D, B, D], V e_j at j
        return columns.movedim(0, -1)

    def covariance(self) -> Tensor:
        """V diag(std^2) V^T, [B, D, D]."""
        factor = self.rotation() * self.base.std[:, None]
        return factor @ factor.mT

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        return self.turn(self.base.rsample(shape, source))

    def rsample_with_log_prob(
        self, shape: tuple[int, ...] = (), source: Source = None
    ) -> tuple[Tensor, Tensor]:
        z, log_q = self.base.rsample_with_log_prob(shape, source)
        return self.turn(z), log_q

    def log_prob(self, z: Tensor) -> Tensor:
        return self.base.log_prob(self.turn_back(z))

    def kl(self) -> Tensor:
        return self.base.kl()

    def __getitem__(self, index: slice | Tensor) -> HouseholderGaussian:
        return HouseholderGaussian(self.base[index], self.vectors[index])


class HouseholderEncoder(GaussianEncoder):
    """x -> base Gaussian and K reflection vectors. Without vectors it is the VAE's encoder.

    Raises:
        ConfigError: D = 1 with reflections.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.count = config.flow.steps
        if self.count == 0:
            return
        if config.latent_dim < 2:
            raise ConfigError(
                f"model.latent_dim is {config.latent_dim} with {self.count} Householder steps: a "
                "reflection of one dimension only flips its sign. Expected model.latent_dim >= 2, "
                "or model.flow.steps = 0."
            )
        self.vector_head = nn.Linear(self.trunk.out_features, self.count * config.latent_dim)

    def forward(self, x: Tensor, generative: Generative | None = None) -> Posterior:
        """Posterior of images x [B, C, H, W]."""
        features = self.trunk(x)
        base = DiagonalGaussian(self.mean_head(features), self.log_std_head(features).exp())
        if self.count == 0:
            return base
        return HouseholderGaussian(base, self.vector_head(features).unflatten(-1, (self.count, -1)))


class HouseholderVAE(VAE):
    """VAE with a full-covariance Gaussian posterior from K Householder reflections.

    Departure: the paper makes each vector a linear function of the one before; here each is a
    linear function of the trunk's features, which contains the chain as a special case.

    References:
        Improving Variational Auto-Encoders using Householder Flow (Tomczak and Welling, 2016),
        https://arxiv.org/abs/1611.09630

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.flow.steps` for K.

    Example:
        >>> import gpvae
        >>> from gpvae.householder import HouseholderVAE
        >>> HouseholderVAE((1, 8, 8))(torch.rand(5, 1, 8, 8)).covariance().shape
        torch.Size([5, 10, 10])
    """

    encoder_type = HouseholderEncoder
