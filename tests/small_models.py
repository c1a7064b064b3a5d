"""Small float64 models and checks that several test modules share."""

from __future__ import annotations

import pytest
import torch

import gpvae
from gpvae.config import ModelConfig

SHAPE = (1, 4, 4)


def make(kind=gpvae.VAE, seed=0, **options):
    """A model in eval mode with a decoder that is far from linear; D = 3."""
    config = ModelConfig(latent_dim=3, hidden=(16,), activation="tanh", **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(SHAPE, config).double().eval()
    with torch.no_grad():
        for parameter in model.generative.decoder.parameters():
            parameter.mul_(2)
    return model


def images(count=6, seed=1, shape=SHAPE):
    """Binary images, [count, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64).round()


def loss(model, x, seed=3):
    """The training loss with fixed noise."""
    return sum(model.loss_terms(x, len(x), torch.Generator().manual_seed(seed)).values())


def assert_gradients(model, x):
    """Gradients of `loss`, which must be there, against central differences of it."""
    for name, parameter in model.named_parameters():
        values = parameter.data.view(-1)
        for i in range(0, len(values), max(1, len(values) // 4)):
            step, start, ends = 1e-5, values[i].item(), []
            for sign in (1, -1):
                values[i] = start + sign * step
                ends.append(loss(model, x).item())
            values[i] = start
            numeric = (ends[0] - ends[1]) / (2 * step)
            analytic = parameter.grad.view(-1)[i].item()
            assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-7), (name, i)
