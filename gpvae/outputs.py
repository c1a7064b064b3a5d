"""Output distributions p(x | z) over pixels. Densities are in nats, summed over the P pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gpvae.data import binarise
from gpvae.errors import ConfigError, DataError, unknown


class Bernoulli(nn.Module):
    """Independent binary pixels with logits from the decoder.

    Training images in [0, 1] are binarised anew at every step (Burda et al., 2016); evaluation
    uses one fixed binarisation, whose seed is part of the configuration.
    """

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A fresh binarisation of x in [0, 1]."""
        return binarise(x, generator)

    def check(self, x: Tensor) -> None:
        """Raise DataError unless every pixel is 0 or 1: the density is defined there only."""
        if not bool(((x == 0) | (x == 1)).all()):
            raise DataError(
                "a Bernoulli output was asked for the likelihood of pixels other than 0 and 1; "
                "expected binary images. Draw them with gpvae.binarise(x, generator)."
            )

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), [..., B], for logits `raw` [..., B, P] and x [B, P]."""
        return (raw * x).sum(-1) - softplus(raw).sum(-1)

    def mean(self, raw: Tensor) -> Tensor:
        """E[x | z] in [0, 1]."""
        return raw.sigmoid()


class Gaussian(nn.Module):
    """N(x; mean, exp(log_std)^2) with one learned standard deviation for all pixels.

    Pixels are in [0, 1] and treated as continuous, so densities may exceed 1 and log-likelihoods
    may be positive.
    """

    def __init__(self, initial_std: float = 0.3) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(math.log(initial_std)))

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """X itself: nothing is random."""
        return x

    def check(self, x: Tensor) -> None:
        """Any real pixels are accepted."""

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), [..., B], for means `raw` [..., B, P] and x [B, P]."""
        square = ((raw - x) ** 2).sum(-1)
        constant = x.shape[-1] * (self.log_std + 0.5 * math.log(2 * math.pi))
        return -0.5 * square * torch.exp(-2 * self.log_std) - constant

    def mean(self, raw: Tensor) -> Tensor:
        """E[x | z]; not confined to [0, 1]."""
        return raw


OUTPUTS = {"bernoulli": Bernoulli, "gaussian": Gaussian}


def make_output(name: str) -> Bernoulli | Gaussian:
    """The output distribution of that name."""
    if name not in OUTPUTS:
        raise ConfigError(unknown("output distribution", name, OUTPUTS))
    return OUTPUTS[name]()
