"""Inverse autoregressive flow: a Gaussian bent by K steps that the encoder conditions.

Dimensions: S samples, B images, D latent, K steps, H hidden units of a step, C context.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, sigmoid

from gpvae.config import ModelConfig
from gpvae.errors import ConfigError
from gpvae.networks import ACTIVATIONS
from gpvae.noise import Source
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.vae import VAE, GaussianEncoder, Generative

GATE_BIAS = 2.0  # a step starts near the identity: sigmoid(2) = 0.88
MOMENT_PAIRS = 256  # antithetic pairs of draws behind the reported mean and std
PAIRS_AT_ONCE = 8


class AutoregressiveStep(nn.Module):
    """One step: y_j = s_j z_j + (1 - s_j) m_j with (m_j, s_j) from earlier z's and the context.

    The network is a MADE with one hidden layer. Latent dimensions have degrees 1..D in the step's
    order; hidden unit i has degree i mod D. A hidden unit sees inputs of its degree or less; an
    output sees hidden units of lower degree. Units of degree 0 see the context only and reach
    every output, so that the context also moves the first dimension, which sees no z at all.

    References:
        Masked Autoencoder for Distribution Estimation (Germain et al., 2015),
        https://arxiv.org/abs/1502.03509

    Args:
        latent_dim: D, at least 2.
        hidden: H, at least D, so that every degree has a unit.
        context: C.
        reverse: whether the order is D..1.
        activation: name of the hidden layer's activation.
    """

    def __init__(
        self, latent_dim: int, hidden: int, context: int, reverse: bool, activation: str
    ) -> None:
        super().__init__()
        degrees = torch.arange(1, latent_dim + 1)
        self.order = list(range(latent_dim))  # in which the inverse finds the dimensions
        if reverse:
            degrees, self.order = degrees.flip(0), self.order[::-1]
        hidden_degrees = torch.arange(hidden) % latent_dim
        self.inputs = nn.Linear(latent_dim, hidden, bias=False)
        self.context = nn.Linear(context, hidden)
        self.outputs = nn.Linear(hidden, 2 * latent_dim)
        self.activation = ACTIVATIONS[activation]()
        dtype = self.inputs.weight.dtype
        input_mask = (hidden_degrees[:, None] >= degrees).to(dtype)  # [H, D]
        output_mask = (degrees[:, None] > hidden_degrees).to(dtype)  # [D, H]
        self.register_buffer("input_mask", input_mask, persistent=False)
        self.register_buffer("output_mask", output_mask.repeat(2, 1), persistent=False)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(m, raw gate), each [..., B, D], for z [..., B, D] and context [B, C]."""
        hidden = linear(z, self.inputs.weight * self.input_mask) + self.context(context)
        weight = self.outputs.weight * self.output_mask
        shift, gate = linear(self.activation(hidden), weight, self.outputs.bias).chunk(2, -1)
        return shift, gate + GATE_BIAS

    def push(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """y and log |det dy/dz| = sum_j log s_j, in one pass. The determinant is exact."""
        shift, gate = self(z, context)
        return shift + sigmoid(gate) * (z - shift), logsigmoid(gate).sum(-1)

    def pull(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The z that `push` maps to y, and log |det dy/dz|, in D passes, one for each dimension.

        Rounding grows with 1 / s, so samples should keep the density that came with them.
        """
        z, log_det = torch.zeros_like(y), 0
        for j in self.order:
            shift, gate = (value[..., j] for value in self(z, context))
            # Column j depends on columns that are already right. Replacing no other keeps
            # unfinished values, which may be huge, out of the masked products.
            column = shift + (y[..., j] - shift) / sigmoid(gate)
            z = torch.cat([z[..., :j], column[..., None], z[..., j + 1 :]], -1)
            log_det = log_det + logsigmoid(gate)
        return z, log_det


class IAFPosterior(Posterior):
    """z_0 ~ N(mean, diag std^2), then z_k = s_k z_{k-1} + (1 - s_k) m_k for k = 1..K.

    log q(z_K | x) = log N(z_0; mean, diag std^2) - sum_k sum_j log s_kj.

    - Samples and their density come from one pass (`rsample_with_log_prob`), exactly.
    - `log_prob` of other points inverts the steps one dimension at a time: K D passes.
    - There is no closed form of the KL or of the moments. `mean` and `std` are estimates from 512
      draws (more for D > 64), without gradient. The draws are antithetic, white and the same for
      every image, so that moments of an affine flow are exact; otherwise the standard error of
      the mean is at most std / 16, and that of std a few percent.

    Args:
        base: N(mean, diag std^2), [B, D].
        context: [B, C], the encoder's message to every step.
        steps: K steps.
    """

    def __init__(self, base: DiagonalGaussian, context: Tensor, steps: nn.ModuleList) -> None:
        self.base, self.context, self.steps = base, context, steps

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def std(self) -> Tensor:
        return self._moments[1]

    def rsample(self, shape: tuple[int, ...] = (), source: Source = None) -> Tensor:
        return self.rsample_with_log_prob(shape, source)[0]

    def rsample_with_log_prob(
        self, shape: tuple[int, ...] = (), source: Source = None
    ) -> tuple[Tensor, Tensor]:
        z, log_q = self.base.rsample_with_log_prob(shape, source)
        for step in self.steps:
            z, log_det = step.push(z, self.context)
            log_q = log_q - log_det
        return z, log_q

    def log_prob(self, z: Tensor) -> Tensor:
        total = 0
        for step in reversed(self.steps):
            z, log_det = step.pull(z, self.context)
            total = total + log_det
        log_q = self.base.log_prob(z) - total
        # Far from all samples the inverse overflows: inf - inf. The density there is zero.
        return log_q.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def __getitem__(self, index: slice | Tensor) -> IAFPosterior:
        return IAFPosterior(self.base[index], self.context[index], self.steps)

    @cached_property
    @torch.no_grad()
    def _moments(self) -> tuple[Tensor, Tensor]:
        total = square = 0
        noise = _white_noise(self.base.mean)
        for part in noise.split(PAIRS_AT_ONCE):
            pair = torch.cat([part, -part])[:, None]
            z = self.base.mean + self.base.std * pair  # [2 PAIRS_AT_ONCE, B, D]
            for step in self.steps:
                z = step.push(z, self.context)[0]
            # Around the base's mean, which keeps the difference of squares well conditioned.
            total = total + (z - self.base.mean).sum(0)
            square = square + ((z - self.base.mean) ** 2).sum(0)
        shift = total / (2 * len(noise))
        var = square / (2 * len(noise)) - shift**2
        return self.base.mean + shift, var.clamp_min(torch.finfo(var.dtype).tiny).sqrt()


def _white_noise(like: Tensor) -> Tensor:
    """[R, D] standard normal draws, always the same, made white: noise^T noise / R = I."""
    latent_dim = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    shape = (max(MOMENT_PAIRS, 4 * latent_dim), latent_dim)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(noise.T @ noise / len(noise))
    return torch.linalg.solve_triangular(factor, noise.T, upper=False).T.to(like)


class IAFEncoder(GaussianEncoder):
    """x -> base Gaussian and context; K steps follow, with the order reversed between steps.

    Without steps it is the VAE's encoder.

    Raises:
        ConfigError: D = 1, or fewer hidden units than latent dimensions.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        flow, latent_dim = config.flow, config.latent_dim
        self.steps = nn.ModuleList()
        if flow.steps == 0:
            return
        if latent_dim < 2:
            raise ConfigError(
                f"model.latent_dim is {latent_dim} with {flow.steps} IAF steps: one dimension has "
                "no other to depend on, and the posterior stays the VAE's Gaussian. Expected "
                "model.latent_dim >= 2, or model.flow.steps = 0."
            )
        if flow.hidden < latent_dim:
            raise ConfigError(
                f"model.flow.hidden is {flow.hidden}, below model.latent_dim = {latent_dim}: some "
                f"dimension would be cut off by the masks. Expected at least {latent_dim}."
            )
        self.context_head = nn.Linear(self.trunk.out_features, flow.context)
        for k in range(flow.steps):
            self.steps.append(
                AutoregressiveStep(
                    latent_dim, flow.hidden, flow.context, k % 2 == 1, config.activation
                )
            )

    def forward(self, x: Tensor, generative: Generative | None = None) -> Posterior:
        """Posterior of images x [B, C, H, W]."""
        features = self.trunk(x)
        base = DiagonalGaussian(self.mean_head(features), self.log_std_head(features).exp())
        if not self.steps:
            return base
        return IAFPosterior(base, self.context_head(features), self.steps)


class IAFVAE(VAE):
    """VAE with an inverse autoregressive flow as its posterior.

    Departures: one masked hidden layer, and the context enters each step's hidden layer through
    its own linear map. sigmoid(raw + 2) is the paper's stable gate with its suggested start.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.flow` for K, hidden units and context.

    Example:
        >>> import gpvae
        >>> from gpvae.iaf import IAFVAE
        >>> posterior = IAFVAE((1, 8, 8))(torch.rand(5, 1, 8, 8))
        >>> z, log_q = posterior.rsample_with_log_prob((7,))
        >>> z.shape, log_q.shape
        (torch.Size([7, 5, 10]), torch.Size([7, 5]))
    """

    encoder_type = IAFEncoder
