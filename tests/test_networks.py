"""Shapes for every image size, and equal numbers in every memory layout."""

from __future__ import annotations

import pytest
import torch

import gpvae
from gpvae.config import ModelConfig
from gpvae.networks import Decoder, Trunk

SHAPES = [(1, 8, 8), (1, 28, 28), (1, 28, 20), (3, 32, 32), (3, 64, 64), (2, 7, 13), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("channels", [(4,), (4, 8, 8)])
def test_any_image_size(shape, network, channels):
    config = ModelConfig(network=network, hidden=(12,), channels=channels)
    features = Trunk(shape, config)(torch.rand(2, *shape))
    assert features.shape == (2, 12)
    raw = Decoder(shape, config)(torch.randn(5, config.latent_dim))
    assert raw.shape == (5, shape[0] * shape[1] * shape[2])


def test_without_hidden_layers():
    for network in ("mlp", "conv"):
        config = ModelConfig(network=network, hidden=(), channels=(4,))
        model = gpvae.GPVAE((1, 6, 6), config)
        assert model(torch.rand(2, 1, 6, 6)).mean.shape == (2, config.latent_dim)


def test_every_pixel_depends_on_the_latents_and_every_feature_on_all_pixels():
    config = ModelConfig(network="conv", hidden=(16,), channels=(4, 8), activation="elu")
    shape = (1, 9, 5)
    jacobian = torch.func.jacrev(Decoder(shape, config))(torch.randn(1, config.latent_dim))
    assert (jacobian.abs().sum((2, 3)) > 0).all()
    x = torch.rand(1, *shape, requires_grad=True)
    Trunk(shape, config)(x)[0, 3].backward()
    assert (x.grad != 0).all()


def test_memory_layout_does_not_change_densities():
    shape = (3, 12, 10)
    torch.manual_seed(0)
    model = gpvae.GPVAE(shape, ModelConfig(network="conv", channels=(4, 8))).double()
    x = torch.rand(4, *shape, dtype=torch.float64)
    plain = gpvae.log_likelihood(model, x, 20)
    model = model.to(memory_format=torch.channels_last)
    other = gpvae.log_likelihood(model, x.to(memory_format=torch.channels_last), 20)
    torch.testing.assert_close(plain.value, other.value, rtol=1e-10, atol=1e-10)


def test_conv_decoder_mirrors_the_encoder():
    config = ModelConfig(network="conv", hidden=(12,), channels=(4, 8))
    trunk, decoder = Trunk((1, 28, 20), config), Decoder((1, 28, 20), config)
    sizes = []
    for layer in trunk.layers:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:])))
    trunk(torch.rand(1, 1, 28, 20))
    assert sizes == [(4, 14, 10), (8, 7, 5)]
    assert any(getattr(layer, "unflattened_size", None) == (8, 7, 5) for layer in decoder.layers)
