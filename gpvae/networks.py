"""Networks: a trunk from images to features, and a decoder from latents to pixels.

An encoder's heads (b, c, psi and those of the rivals) all read the same trunk. Fully connected or
convolutional, for any image size; what comes out is float32 (or float64) even if the layers
compute in bfloat16. Dimensions: B images, R features, D latent, P = C H W pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from gpvae.config import ModelConfig

ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "tanh": nn.Tanh}


class Network(nn.Module):
    """Layers behind one precision switch.

    Args:
        layers: the network.
        precision: "float32", or "bfloat16" to compute inside the layers in that type.
    """

    def __init__(self, layers: nn.Module, precision: str) -> None:
        super().__init__()
        self.layers = layers
        self.low_precision = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        if not self.low_precision:
            return self.layers(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.layers(x).to(x.dtype)


class Trunk(Network):
    """[B, C, H, W] -> [B, R] features that every head of an encoder shares.

    Args:
        shape: (C, H, W).
        config: `network` "mlp" or "conv", `hidden` and, for "conv", `channels`.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        if config.network == "conv":
            layers = conv_layers(shape, config)
            flat = config.channels[-1] * math.prod(halvings(shape, len(config.channels))[-1])
        else:
            layers, flat = [], math.prod(shape)
        layers += [nn.Flatten(), *linear_layers([flat, *config.hidden], config.activation)]
        super().__init__(nn.Sequential(*layers), config.precision)
        self.out_features = config.hidden[-1] if config.hidden else flat


class Decoder(Network):
    """[R, D] latents -> [R, P] raw parameters of the output distribution.

    The trunk's mirror image: transposed convolutions double the size at each layer and are cropped
    where the encoder halved an odd size.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        widths = [config.latent_dim, *reversed(config.hidden)]
        layers = linear_layers(widths, config.activation)
        if config.network == "conv":
            layers += deconv_layers(shape, widths[-1], config)
        else:
            layers += [nn.Linear(widths[-1], math.prod(shape))]
        super().__init__(nn.Sequential(*layers), config.precision)


def linear_layers(sizes: list[int], activation: str) -> list[nn.Module]:
    """Linear layers, each followed by the activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return layers


def halvings(shape: tuple[int, int, int], steps: int) -> list[tuple[int, int]]:
    """Sizes (H, W) before and after each of `steps` halvings, rounded up."""
    sizes = [tuple(shape[1:])]
    for _ in range(steps):
        sizes.append(tuple(math.ceil(n / 2) for n in sizes[-1]))
    return sizes


def conv_layers(shape: tuple[int, int, int], config: ModelConfig) -> list[nn.Module]:
    """Convolutions of stride 2: [B, C, H, W] to [B, channels[-1], about H / 2^n, W / 2^n]."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([shape[0], *config.channels]):
        conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
        layers += [conv, ACTIVATIONS[config.activation]()]
    return layers


def deconv_layers(shape: tuple[int, int, int], inputs: int, config: ModelConfig) -> list[nn.Module]:
    """[B, inputs] to [B, P] by transposed convolutions of stride 2."""
    sizes = halvings(shape, len(config.channels))[::-1]
    channels = [*reversed(config.channels), shape[0]]
    activation = ACTIVATIONS[config.activation]
    layers: list[nn.Module] = [
        nn.Linear(inputs, channels[0] * math.prod(sizes[0])),
        activation(),
        nn.Unflatten(1, (channels[0], *sizes[0])),
    ]
    for (before, after), size in zip(pairwise(channels), sizes[1:], strict=True):
        layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)]
        layers += [Crop(size), activation()]
    return [*layers[:-1], nn.Flatten()]


class Crop(nn.Module):
    """Keep the first rows and columns of [B, C, H, W]."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size[0], : self.size[1]]
