"""Mixture encoder: M Gaussian components and their weights from one trunk, trained jointly.

Dimensions: S samples, B images, M components, D latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpvae.config import ModelConfig
from gpvae.posteriors import DiagonalGaussian, Posterior, draw, normal_log_prob
from gpvae.vae import VAE, GaussianEncoder, Generative


class GaussianMixture(Posterior):
    """q(z | x) = sum_m w_m N(z; mean_m, diag std_m^2).

    `rsample` draws a component, then reparameterises within it: samples follow the mixture, but
    their gradient leaves out the weights. `stratified` samples every component instead, and a
    bound that weighs them by w has the full gradient (see `mixture_bound`).

    Args:
        log_weights: log w, [B, M], normalised.
        means: [B, M, D].
        stds: [B, M, D], positive.
    """

    def __init__(self, log_weights: Tensor, means: Tensor, stds: Tensor) -> None:
        self.log_weights, self.means, self.stds = log_weights, means, stds

    @property
    def mean(self) -> Tensor:
        return (self.log_weights.exp()[..., None] * self.means).sum(-2)

    @property
    def std(self) -> Tensor:
        spread = (self.means - self.mean[..., None, :]) ** 2
        return (self.log_weights.exp()[..., None] * (self.stds**2 + spread)).sum(-2).sqrt()

    def rsample(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        batch, _, latent_dim = self.means.shape
        noise = draw((*shape, batch, latent_dim), self.means, generator)
        index = self._draw_components(shape, generator)[..., None, None]
        index = index.expand(*shape, batch, 1, latent_dim)
        pick = [p.expand(*shape, -1, -1, -1).gather(-2, index)[..., 0, :] for p in self._parts()]
        return pick[0] + pick[1] * noise

    def stratified(
        self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Reparameterised samples of every component, [*shape, M, B, D]."""
        means, stds = (p.movedim(1, 0) for p in self._parts())
        return means + stds * draw((*shape, *means.shape), means, generator)

    def component_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; mean_m, std_m^2) for every m, [..., B, M], for z [..., B, D]."""
        return normal_log_prob(z[..., None, :], self.means, self.stds).sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        return (self.log_weights + self.component_log_prob(z)).logsumexp(-1)

    def components(self) -> DiagonalGaussian:
        """The components as one batch of Gaussians, [B, M, D]."""
        return DiagonalGaussian(self.means, self.stds)

    def __getitem__(self, index: slice | Tensor) -> GaussianMixture:
        return GaussianMixture(self.log_weights[index], self.means[index], self.stds[index])

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.means, self.stds

    def _draw_components(
        self, shape: tuple[int, ...], generator: torch.Generator | None
    ) -> Tensor:
        """Indices m ~ w by inversion, [*shape, B]."""
        uniform = torch.rand(
            (*shape, len(self.means)), generator=generator, dtype=self.means.dtype,
            device=self.means.device,
        )  # fmt: skip
        # Leaving out the last sum, which rounding may put below 1, keeps the index below M.
        below = self.log_weights.detach().exp().cumsum(-1)[..., :-1]
        return (uniform[..., None] >= below).sum(-1)


def mixture_bound(
    generative: Generative,
    x: Tensor,
    q: GaussianMixture,
    samples: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The bound's two terms, each [S, B], from S samples of every component (M S decodings).

    E_q log p(x | z) = sum_m w_m E_m log p(x | z)
    KL(q || p) = sum_m w_m (KL(q_m || p) - E_m [log q_m(z) - log q(z)])

    with E_m over component m. Both are unbiased. The sum over m is exact, so the weights get
    their gradient without Gumbel noise or a score function, and KL(q_m || p) is closed form; what
    is sampled in the KL is at most log(1 / w_m) for each component.
    """
    z = q.stratified((samples,), generator)  # [S, M, B, D]
    log_lik = generative.log_likelihood(x, z).mT  # [S, B, M]
    each = q.component_log_prob(z)  # [S, M, B, M], of each component's samples under each
    log_q = (q.log_weights + each).logsumexp(-1).mT
    own = each.diagonal(dim1=-3, dim2=-1)
    kl = q.components().kl() - (own - log_q)
    weights = q.log_weights.exp()
    return (weights * log_lik).sum(-1), (weights * kl).sum(-1)


class MixtureEncoder(GaussianEncoder):
    """x -> M Gaussians and weights, by linear heads on one trunk; inference is one pass.

    The first component has the VAE's heads, and with M = 1 this is the VAE's encoder. `active`
    counts the components in use, the first ones; a recursive mixture starts with fewer than M.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        width, latent_dim = self.trunk.out_features, config.latent_dim
        self.active = count = config.mixture.components
        self.more_heads = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, latent_dim), nn.Linear(width, latent_dim)])
            for _ in range(count - 1)
        )
        self.weight_head = nn.Linear(width, count) if count > 1 else None

    def heads(self, m: int) -> tuple[nn.Module, nn.Module]:
        """Mean and log std heads of component m = 0..M-1."""
        if m == 0:
            return self.mean_head, self.log_std_head
        return tuple(self.more_heads[m - 1])

    def component(self, features: Tensor, m: int) -> DiagonalGaussian:
        """Component m from the trunk's features [B, R]."""
        mean_head, log_std_head = self.heads(m)
        return DiagonalGaussian(mean_head(features), log_std_head(features).exp())

    def mixture(self, features: Tensor) -> Posterior:
        """The active components; a plain Gaussian if there is one."""
        parts = [self.component(features, m) for m in range(self.active)]
        if self.active == 1:
            return parts[0]
        log_weights = self.weight_head(features)[:, : self.active].log_softmax(-1)
        means, stds = (torch.stack(p, 1) for p in ([q.mean for q in parts], [q.std for q in parts]))
        return GaussianMixture(log_weights, means, stds)

    def forward(self, x: Tensor, generative: Generative | None = None) -> Posterior:
        """Posterior of images x [B, C, H, W]."""
        return self.mixture(self.trunk(x))


class MixtureVAE(VAE):
    """VAE whose posterior is a mixture of M Gaussians, all trained at once (ME).

    The bound samples every component (stratified), which costs M decodings for a sample. The
    gain over the best component is at most the entropy of the weights, log M nats, where the
    components already sit at their optimum.

    References:
        Automatic Differentiation Variational Inference with Mixtures (Morningstar et al., 2021),
        https://arxiv.org/abs/2003.01687, for the stratified bound

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.mixture.components` for M.

    Example:
        >>> import gpvae
        >>> from gpvae.mixtures import MixtureVAE
        >>> MixtureVAE((1, 8, 8))(torch.rand(5, 1, 8, 8)).log_weights.shape
        torch.Size([5, 3])
    """

    encoder_type = MixtureEncoder

    def bound_terms(
        self, x: Tensor, samples: int = 1, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """As for `VAE`, by `mixture_bound`."""
        if self.encoder.active == 1:
            return super().bound_terms(x, samples, generator)
        return mixture_bound(self.generative, x, self(x), samples, generator)
