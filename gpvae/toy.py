"""A toy whose exact posterior can be drawn: two latents, sixteen binary pixels, a known decoder.

Dimensions: B images, D = 2, G grid points.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gpvae.config import RunConfig
from gpvae.data import Dataset, Raw, split
from gpvae.vae import VAE

LIMIT = 5.0  # the grid for log p(x) covers [-LIMIT, LIMIT]^2


class BentDecoder(nn.Module):
    """16 logits, linear in (z1, z2 + z1^2 - 1): posteriors follow a bent coordinate."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("directions", torch.randn(2, 16, generator=generator))

    def forward(self, z: Tensor) -> Tensor:
        """Logits [..., 16] for z [..., 2]."""
        bent = torch.stack([z[..., 0], z[..., 1] + z[..., 0] ** 2 - 1], -1)
        return bent @ self.directions


def toy_config(epochs: int) -> RunConfig:
    """Networks and training for the toy."""
    return RunConfig().override(
        **{
            "data.name": "toy",
            "model.output": "bernoulli",
            "model.latent_dim": 2,
            "model.hidden": (64, 64),
            "training.epochs": epochs,
            "training.batch_size": 50,
            "training.learning_rate": 2e-3,
            "training.patience": 300,
            "training.device": "cpu",
        }
    )


def toy_data(seed: int = 0) -> Dataset:
    """100 training, 100 validation and 80 test images drawn from the toy's own model."""
    generator = torch.Generator().manual_seed(seed)
    logits = BentDecoder()(torch.randn(400, 2, generator=generator))
    pixels = (torch.rand(400, 16, generator=generator) < logits.sigmoid()).numpy()
    raw = Raw(pixels.reshape(-1, 1, 4, 4).astype(np.uint8), levels=2)
    return split("toy", raw, train_size=100, valid_size=100)


def with_known_decoder(model: VAE) -> VAE:
    """The model with the toy's decoder in place of its own; the encoder is all that is left."""
    model.generative.decoder = BentDecoder()
    return model


def log_joint_on(model: VAE, x: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """log p(x, z) in nats of one image [1, 1, 4, 4] as a function of points z [G, 2]."""

    def log_density(points: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(points).float()[:, None]
        with torch.no_grad():
            return model.generative.log_joint(x, z)[:, 0].double().numpy()

    return log_density


def posterior_on(model: VAE, x: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """log q(z | x) in nats of one image as a function of points z [G, 2]."""
    with torch.no_grad():
        q = model(x)

    def log_density(points: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(points).float()[:, None]
        with torch.no_grad():
            return q.log_prob(z)[:, 0].double().numpy()

    return log_density


@torch.no_grad()
def exact_log_prob(model: VAE, x: Tensor, size: int = 201) -> Tensor:
    """log p(x) in nats by summing over a grid, [B]; the prior has no mass outside to speak of."""
    side = torch.linspace(-LIMIT, LIMIT, size)
    z = torch.cartesian_prod(side, side)[:, None]
    cell = math.log(2 * LIMIT / (size - 1))
    return model.generative.log_joint(x, z).double().logsumexp(0) + 2 * cell
