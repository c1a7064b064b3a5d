"""Output distributions p(x | z) over pixels x in [0, 1]; densities in nats, summed over P pixels.

Dimensions: B images, P pixels. Everything here is computed in the dtype of the decoder's output,
which is float32 or float64 whatever precision the networks use inside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from gpvae.config import ModelConfig
from gpvae.data import binarise
from gpvae.errors import ConfigError, DataError, unknown


class Output(nn.Module, ABC):
    """A distribution over images, with parameters `raw` [..., B, P] from the decoder."""

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What the model sees of training images x in [0, 1]: x itself, or a random version."""
        return x

    def check(self, x: Tensor) -> None:
        """Raise DataError unless the density is defined at x."""
        return

    @abstractmethod
    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats, [..., B], for raw [..., B, P] and x [B, P]."""

    def mean(self, raw: Tensor) -> Tensor:
        """E[x | z] pixel by pixel."""
        return raw

    def bits_per_dim(self, nats: Tensor, pixels: int) -> Tensor:
        """A log-likelihood in nats per image as bits per dimension, -nats / (P log 2).

        For a continuous density this refers to pixels in [0, 1]; add log2(levels) to refer it to
        images of that many grey levels.
        """
        return -nats / (pixels * math.log(2))


class Bernoulli(Output):
    """Independent binary pixels with logits from the decoder.

    Training images in [0, 1] are binarised anew at every step (Burda et al., 2016); evaluation
    uses one fixed binarisation, whose seed is part of the configuration.
    """

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return binarise(x, generator)

    def check(self, x: Tensor) -> None:
        if not bool(((x == 0) | (x == 1)).all()):
            raise DataError(
                "a Bernoulli output was asked for the likelihood of pixels other than 0 and 1, "
                f"which range from {x.min():g} to {x.max():g}; expected binary images. Draw them "
                "with gpvae.binarise(x, generator)."
            )

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        return (raw * x).sum(-1) - softplus(raw).sum(-1)

    def mean(self, raw: Tensor) -> Tensor:
        return raw.sigmoid()


class Gaussian(Output):
    """N(x; mean, exp(log_std)^2) with one learned standard deviation for all pixels.

    Pixels are treated as continuous, so densities may exceed 1 and log-likelihoods be positive.

    Args:
        levels: if given, dequantise: add uniform noise of one of that many grey levels, so that
            the density is a lower bound on the probability of the discrete image (Theis et al.,
            2016, https://arxiv.org/abs/1511.01844).
        initial_std: standard deviation at the start, in units of the pixel range.
    """

    def __init__(self, levels: int | None = None, initial_std: float = 0.3) -> None:
        super().__init__()
        self.levels = levels
        self.log_std = nn.Parameter(torch.tensor(math.log(initial_std)))

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x if self.levels is None else dequantise(x, self.levels, generator)

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        square = ((raw - x) ** 2).sum(-1)
        constant = x.shape[-1] * (self.log_std + 0.5 * math.log(2 * math.pi))
        return -0.5 * square * torch.exp(-2 * self.log_std) - constant


def dequantise(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Spread grey levels k / (levels - 1) uniformly over [k, k + 1) / levels."""
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x * (levels - 1) + noise) / levels


class PixelGaussian(Output):
    """N(x; mean, std^2) with a learned standard deviation for each pixel, at least `floor`.

    Without a floor the density is unbounded: pixels that never change, such as a black border,
    would drive their standard deviation to zero.

    Args:
        pixels: P.
        floor: smallest standard deviation, in units of the pixel range.
        initial_std: standard deviation at the start.
    """

    def __init__(self, pixels: int, floor: float = 0.01, initial_std: float = 0.3) -> None:
        super().__init__()
        self.floor = floor
        self.log_std = nn.Parameter(torch.full((pixels,), math.log(initial_std)))

    def std(self) -> Tensor:
        """Standard deviation of each pixel, [P]."""
        return torch.hypot(self.log_std.exp(), torch.full_like(self.log_std, self.floor))

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        std = self.std()
        constant = std.log().sum() + 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return -0.5 * (((raw - x) / std) ** 2).sum(-1) - constant


class DiscretisedLogistic(Output):
    """Logistic density integrated over each grey level, the outermost levels taking the tails.

    p(x = k) = F((k + 1/2 - m) / s) - F((k - 1/2 - m) / s) for levels k, with F the logistic
    function, so that probabilities sum to one over the levels.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934

    Args:
        levels: number of grey levels of the data, on the grid k / (levels - 1).
        initial_scale: s at the start, in units of the pixel range.
    """

    def __init__(self, levels: int, initial_scale: float = 0.1) -> None:
        super().__init__()
        self.levels = levels
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial_scale)))

    def check(self, x: Tensor) -> None:
        k = x * (self.levels - 1)
        levels = (k.round() >= 0) & (k.round() < self.levels)
        off = ~(((k - k.round()).abs() < 1e-3) & levels)
        if bool(off.any()):
            raise DataError(
                f"a discretised logistic output with {self.levels} levels was given pixels that "
                f"are none of its levels k / {self.levels - 1} in [0, 1], such as "
                f"{x[off][0]:g}; set model.levels to that of the data."
            )

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        width = 1 / (self.levels - 1)
        inverse = torch.exp(-self.log_scale)
        low, high = (x - raw - 0.5 * width) * inverse, (x - raw + 0.5 * width) * inverse
        # F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)): no cancellation however far the tail.
        inner = torch.log(-torch.expm1(-width * inverse))
        above, below = logsigmoid(high), logsigmoid(-low)
        middle = above + below + inner
        end = 0.25 * width
        return torch.where(x < end, above, torch.where(x > 1 - end, below, middle)).sum(-1)


def make_output(shape: tuple[int, int, int], config: ModelConfig) -> Output:
    """The output distribution that the configuration names."""
    makers = {
        "bernoulli": Bernoulli,
        "gaussian": lambda: Gaussian(config.levels if config.dequantise else None),
        "pixel-gaussian": lambda: PixelGaussian(math.prod(shape)),
        "logistic": lambda: DiscretisedLogistic(config.levels),
    }
    if config.output not in makers:
        raise ConfigError(unknown("output distribution", config.output, makers))
    return makers[config.output]()
