"""Networks: a trunk from images to features, and a decoder from latents to pixels."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from gpvae.config import ModelConfig

ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(sizes: list[int], activation: str) -> nn.Sequential:
    """Linear layers, each followed by the activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class Trunk(nn.Module):
    """[B, C, H, W] -> [B, R] features that every head of an encoder shares (b, c, psi)."""

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        self.layers = mlp([math.prod(shape), *config.hidden], config.activation)
        self.out_features = config.hidden[-1] if config.hidden else math.prod(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class Decoder(nn.Module):
    """[R, D] latents -> [R, P] raw parameters of the output distribution, P = C H W."""

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        widths = [config.latent_dim, *reversed(config.hidden)]
        self.layers = mlp(widths, config.activation)
        self.head = nn.Linear(widths[-1], math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.layers(z))
