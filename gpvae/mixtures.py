"""Mixture encoders: M Gaussian components and their weights from one trunk.

`MixtureVAE` trains them jointly, `RecursiveMixtureVAE` one after the other.

Dimensions: S samples, B images, M components, D latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpvae.config import ModelConfig
from gpvae.errors import ConfigError
from gpvae.noise import Source, normal, uniform
from gpvae.posteriors import DiagonalGaussian, Posterior, normal_log_prob
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

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        batch, _, latent_dim = self.means.shape
        noise = normal((*shape, batch, latent_dim), self.means, source)
        index = self._draw_components(shape, source)[..., None, None]
        index = index.expand(*shape, batch, 1, latent_dim)
        pick = [p.expand(*shape, -1, -1, -1).gather(-2, index)[..., 0, :] for p in self._parts()]
        return pick[0] + pick[1] * noise

    def stratified(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        """Reparameterised samples of every component, [*shape, M, B, D]."""
        means, stds = (p.movedim(1, 0) for p in self._parts())
        return means + stds * normal((*shape, *means.shape), means, source)

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

    def _draw_components(self, shape: tuple[int, ...], source: Source) -> Tensor:
        """Indices m ~ w by inversion, [*shape, B]."""
        level = uniform((*shape, len(self.means)), self.means, source)
        # Leaving out the last sum, which rounding may put below 1, keeps the index below M.
        below = self.log_weights.detach().exp().cumsum(-1)[..., :-1]
        return (level[..., None] >= below).sum(-1)


def mixture_bound(
    generative: Generative,
    x: Tensor,
    q: GaussianMixture,
    samples: int,
    source: Source = None,
) -> tuple[Tensor, Tensor]:
    """The bound's two terms, each [S, B], from S samples of every component (M S decodings).

    E_q log p(x | z) = sum_m w_m E_m log p(x | z)
    KL(q || p) = sum_m w_m (KL(q_m || p) - E_m [log q_m(z) - log q(z)])

    with E_m over component m. Both are unbiased. The sum over m is exact, so the weights get
    their gradient without Gumbel noise or a score function, and KL(q_m || p) is closed form; what
    is sampled in the KL is at most log(1 / w_m) for each component.
    """
    z = q.stratified((samples,), source)  # [S, M, B, D]
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

    @torch.no_grad()
    def copy_component(self, source: int, target: int) -> None:
        """Make component `target` the same as `source`, with the same weight."""
        for new, old in zip(self.heads(target), self.heads(source), strict=True):
            new.load_state_dict(old.state_dict())
        for p in self.weight_head.parameters():
            p[target] = p[source]

    def forward(self, x: Tensor, generative: Generative | None = None) -> Posterior:
        """Posterior of images x [B, C, H, W]."""
        return self.mixture(self.trunk(x))


class MixtureVAE(VAE):
    """VAE whose posterior is a mixture of M Gaussians, all trained at once (ME).

    The bound samples every component (stratified), which costs M decodings for a sample. For
    each image it is at most log M nats above the bound of that image's best component.

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
        self, x: Tensor, samples: int = 1, source: Source = None
    ) -> tuple[Tensor, Tensor]:
        """As for `VAE`, by `mixture_bound`."""
        if self.encoder.active == 1:
            return super().bound_terms(x, samples, source)
        return mixture_bound(self.generative, x, self(x), samples, source)


class RecursiveMixtureVAE(MixtureVAE):
    """VAE whose mixture posterior grows by one component at a time (RME).

    The functional gradient of the bound with respect to q, at the mixture Q so far, says that a
    new component q gains most where E_q [log p(x, z) - log Q(z)] = ELBO(q) + KL(q || Q) is
    largest. The KL has no upper bound, and the entropy of q cancels in the sum, so that q would
    shrink to a point. With C nats (`divergence_bound`) the new component maximises

        ELBO(q) + E_q min(log q(z) - log Q(z), C)   <=   ELBO(q) + C.

    Being different can raise the mixture's bound by log M nats at most, so C is of that order.

    Stages: 1 is the VAE. Stage s = 2..M goes on from the weights with the best validation bound
    so far; a component that did not raise it is thereby dropped, and tried anew. Then

    - fit: the heads of the new component, at first a copy of component 1 (from random heads it
      ends far below the others and gets no weight), follow the criterion above by one
      reparameterised sample; decoder, trunk and Q are held still;
    - refit: the mixing weights, now with the new component, follow the mixture's bound, and with
      them everything else (`refit = "all"`) or the decoder only (`refit = "weights"`).

    Which phase it is depends on the epoch only (`phase_starts`), and what the phases leave
    behind is in the state, so a checkpoint of any epoch continues. Inference is the same one pass
    as for `MixtureVAE`. Choices of this project, on which the paper's abstract is silent: the
    form and value of the bound, linear heads on a shared trunk, the copy, and the phases.

    References:
        Recursive Inference for Variational Autoencoders (Kim and Pavlovic, NeurIPS 2020),
        https://arxiv.org/abs/2011.08544

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.mixture` for M, C and the lengths of the phases.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig | None = None) -> None:
        config = config or ModelConfig(encoder="rme")
        super().__init__(shape, config)
        self.options = config.mixture
        self.encoder.active = self.stage = 1
        self.fitting = False

    def phase_starts(self, epochs: int) -> list[int]:
        """Epochs at which phases start: stage 1, then fit and refit of stages 2..M.

        Raises:
            ConfigError: fewer epochs than phases.
        """
        o, count = self.options, 2 * self.options.components - 1
        if epochs < count:
            raise ConfigError(
                f"training.epochs is {epochs}; a recursive mixture of {o.components} components "
                f"has {count} phases and needs at least {count} epochs."
            )
        shares, share = [0.0], (1 - o.first_share) / max(o.components - 1, 1)
        for s in range(o.components - 1):
            start = o.first_share + s * share
            shares += [start, start + o.fit_share * share]
        starts: list[int] = []
        for i, value in enumerate(shares):
            earliest, latest = (starts[-1] + 1 if starts else 0), epochs - (count - i)
            starts.append(min(max(round(value * epochs), earliest), latest))
        return starts

    def start_epoch(
        self, epoch: int, epochs: int, best_weights: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Enter the phase of this epoch (counted from 0); returns what the history shows of it."""
        phase = sum(start <= epoch for start in self.phase_starts(epochs)) - 1
        stage, fitting = 1 + (phase + 1) // 2, phase % 2 == 1
        if stage > self.stage:
            self.load_state_dict(best_weights)
            self.encoder.copy_component(0, self.encoder.active)
        if self.fitting and not fitting:
            self.encoder.active += 1
        self.stage, self.fitting = stage, fitting
        return {"stage": stage, "components": self.encoder.active}

    def loss_terms(self, x: Tensor, n_train: int, source: Source = None) -> dict[str, Tensor]:
        """As for `VAE`, with minus the bounded divergence of a component that is being fitted."""
        if self.fitting:
            return self._fit_terms(x, source)
        held = self._held_in_refit() if self.options.refit == "weights" and self.stage > 1 else []
        with frozen(held):
            terms = super().loss_terms(x, n_train, source)
        return terms | {"divergence": torch.zeros_like(terms["weight_kl"])}

    def get_extra_state(self) -> Tensor:
        """Stage, phase and active components, for `state_dict`."""
        return torch.tensor([self.stage, self.fitting, self.encoder.active])

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.stage, fitting, self.encoder.active = state.tolist()
        self.fitting = bool(fitting)

    def _fit_terms(self, x: Tensor, source: Source) -> dict[str, Tensor]:
        with torch.no_grad():
            features = self.encoder.trunk(x)
            mixture = self.encoder.mixture(features)
        q = self.encoder.component(features, self.encoder.active)
        z, log_q = q.rsample_with_log_prob((1,), source)
        divergence = (log_q - mixture.log_prob(z)).clamp_max(self.options.divergence_bound)
        with frozen(list(self.generative.parameters())):
            log_lik = self.generative.log_likelihood(x, z)
        return {
            "reconstruction": -log_lik.mean(),
            "kl": q.kl().mean(),
            "weight_kl": self.encoder.weight_kl(),
            "divergence": -divergence.mean(),
        }

    def _held_in_refit(self) -> list[nn.Parameter]:
        weight_head = set(self.encoder.weight_head.parameters())
        return [p for p in self.encoder.parameters() if p not in weight_head]


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Graphs built inside pass gradients through, but not to, these parameters."""
    free = [p for p in parameters if p.requires_grad]
    try:
        for p in free:
            p.requires_grad_(False)
        yield
    finally:
        for p in free:
            p.requires_grad_(True)
