"""Shared pieces: one CPU thread, and a model whose log p(x) is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gpvae
from gpvae.data import Dataset, Raw, split

torch.set_num_threads(1)


class LinearDecoder(nn.Module):
    """x = A z + b."""

    def __init__(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.matrix.T + self.offset


class LinearGaussian:
    """A VAE-family model with a linear decoder, its exact log p(x) and exact posterior."""

    def __init__(self, kind: type, *, orthogonal: bool, std: float = 0.5, **options) -> None:
        generator = torch.Generator().manual_seed(0)
        config = gpvae.RunConfig().override(
            **{"model.latent_dim": 2, "model.hidden": (8,), "model.gp.features": 6, **options}
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = kind((1, 2, 3), config.model).double()
        matrix = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        if orthogonal:
            matrix = torch.linalg.qr(matrix).Q * torch.tensor([1.5, 0.7], dtype=torch.float64)
        self.matrix = matrix
        self.offset = torch.randn(6, generator=generator, dtype=torch.float64)
        self.model.generative.decoder = LinearDecoder(matrix, self.offset)
        with torch.no_grad():
            self.model.generative.output.log_std.fill_(math.log(std))
        self.std = std
        self.x = self.sample(20, generator)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        z = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        return (z @ self.matrix.T + self.offset + self.std * noise).reshape(count, 1, 2, 3)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x), [B]."""
        eye = torch.eye(6, dtype=torch.float64)
        covariance = self.matrix @ self.matrix.T + self.std**2 * eye
        exact = torch.distributions.MultivariateNormal(self.offset, covariance)
        return exact.log_prob(x.flatten(1))

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact posterior mean [B, D] and covariance [D, D]."""
        eye = torch.eye(2, dtype=torch.float64)
        precision = eye + self.matrix.T @ self.matrix / self.std**2
        covariance = torch.linalg.inv(precision)
        residual = x.flatten(1) - self.offset
        return residual @ self.matrix @ covariance / self.std**2, covariance


@pytest.fixture
def linear_gaussian() -> type[LinearGaussian]:
    return LinearGaussian


def make_dataset(count: int = 60, shape: tuple[int, int, int] = (1, 4, 4), **sizes) -> Dataset:
    """Random grey blobs; small enough to train on in a second."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 17, (4, *shape))
    pixels = base[generator.integers(0, 4, count)] + generator.integers(-2, 3, (count, *shape))
    return split("blobs", Raw(pixels.clip(0, 16).astype(np.uint8), levels=17), **sizes)


@pytest.fixture
def blobs() -> Dataset:
    return make_dataset()


@pytest.fixture
def tiny_config() -> gpvae.RunConfig:
    return gpvae.RunConfig().override(
        **{
            "model.latent_dim": 2,
            "model.hidden": (8,),
            "model.gp.features": 5,
            "training.epochs": 6,
            "training.batch_size": 16,
            "training.evaluate_every": 1,
            "training.device": "cpu",
            "evaluation.samples": 10,
            "evaluation.elbo_samples": 10,
        }
    )


@pytest.fixture
def config(tiny_config) -> gpvae.RunConfig:
    """Two epochs on forty digits, without gaps: a row in a fraction of a second."""
    return tiny_config.override(
        **{
            "data.train_size": 40,
            "data.valid_size": 20,
            "data.test_size": 12,
            "training.epochs": 2,
            "evaluation.gaps": False,
        }
    )


@pytest.fixture
def lines() -> list[str]:
    """What a log is told."""
    return []


@pytest.fixture
def project_root(tmp_path, monkeypatch):
    """An empty folder for results and figures."""
    monkeypatch.setenv("GPVAE_ROOT", str(tmp_path))
    return tmp_path
