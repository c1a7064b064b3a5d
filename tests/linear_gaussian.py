"""A model whose posterior and evidence are known: x = W z + b + sigma noise, z ~ N(0, I)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from gpvae.config import ModelConfig
from gpvae.evaluate import log_likelihood
from gpvae.vae import VAE

SHAPE = (1, 2, 3)


def linear_gaussian(kind: type[VAE], latent_dim: int = 2, sigma: float = 0.8, **options) -> VAE:
    """A float64 model with a linear decoder and encoder heads; always the same weights."""
    config = ModelConfig(latent_dim=latent_dim, hidden=(), activation="tanh", **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(SHAPE, config).double().eval()
    with torch.no_grad():
        model.generative.output.log_std.fill_(sigma).log_()
    return model


def decoder_head(model: VAE) -> nn.Linear:
    """The decoder's only layer: W and b."""
    return model.generative.decoder.layers[-1]


def images(count: int, seed: int = 5) -> Tensor:
    """[count, 1, 2, 3], float64, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *SHAPE), generator=generator, dtype=torch.float64)


def exact_evidence(model: VAE, x: Tensor) -> Tensor:
    """log p(x), [B]."""
    head, sigma = decoder_head(model), model.generative.output.log_std.exp()
    eye = torch.eye(len(head.weight), dtype=x.dtype)
    cov = head.weight @ head.weight.T + sigma**2 * eye
    return MultivariateNormal(head.bias, cov).log_prob(x.flatten(1)).detach()


def exact_posterior(model: VAE, x: Tensor) -> MultivariateNormal:
    """p(z | x) for each image."""
    head, sigma = decoder_head(model), model.generative.output.log_std.exp()
    eye = torch.eye(head.in_features, dtype=x.dtype)
    precision = eye + head.weight.T @ head.weight / sigma**2
    right = (x.flatten(1) - head.bias) @ head.weight / sigma**2
    mean = torch.linalg.solve(precision, right.T).T
    return MultivariateNormal(mean.detach(), precision_matrix=precision.detach())


def fit_encoder(model: VAE, x: Tensor, steps: int = 80) -> None:
    """Raise the bound of these images by the encoder alone, so that proposals cover."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model.loss_terms(x, len(x), generator).values()).backward()
        optimizer.step()


def assert_meets_evidence(model: VAE, samples: int = 4000) -> None:
    """The importance-weighted estimate of log p(x) agrees with the truth within its own error."""
    x = images(6)
    fit_encoder(model, x)
    estimate = log_likelihood(model, x, samples, seed=2)
    assert float(estimate.stderr.max()) < 0.02  # otherwise agreement says little
    distance = (estimate.value - exact_evidence(model, x)).abs() / estimate.stderr
    assert float(distance.max()) < 4
