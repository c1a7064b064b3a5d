"""Standard normal noise for Monte Carlo estimates whose numbers must not depend on the batch.

`image_noise` belongs to an image: it is computed from the image's pixels and a seed, so an image
gets the same noise alone, in any batch and at any place in it. `orthogonal_noise` is shared by all
images of a step, which has the same virtue, and integrates quadratic functions almost exactly.

Dimensions: S samples, B images, D latent, P pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**32 - 1


def image_noise(x: Tensor, samples: int, dim: int, seed: int | Tensor = 0) -> Tensor:
    """N(0, 1) noise [S, B, D] as a function of each image's pixels and the seed.

    A counter-based generator: each number is a hash of (image, seed, index) turned into a
    quantile of the normal. Only integers are summed, so the order of sums cannot matter. Images
    with equal pixels share their noise.

    Args:
        x: images [B, C, H, W].
        samples: S.
        dim: D.
        seed: an integer, or a tensor of one integer (no synchronisation with a GPU).
    """
    count = torch.arange(samples * dim, device=x.device).view(samples, 1, dim)
    keys = image_keys(x)
    keys = _mix(keys ^ _mix(torch.zeros_like(keys) + seed))
    hashed = _mix(_mix(count + 1) ^ keys[:, None])
    # Centred in its cell, the uniform number is never 0 or 1; the largest normal is about 6.3.
    uniform = (hashed.double() + 0.5) / 2**32
    return torch.special.ndtri(uniform).to(x.dtype)


def image_keys(x: Tensor) -> Tensor:
    """A 32-bit hash of each image's pixels, [B]; equal pixels in float32 and float64 agree."""
    bits = x.detach().flatten(1).double().view(torch.int64)
    place = torch.arange(bits.shape[1], device=x.device)
    low = _mix((bits & _MASK) ^ _mix(2 * place + 1))
    high = _mix(((bits >> 32) & _MASK) ^ _mix(2 * place + 2))
    return _mix((low + high).sum(-1))


def orthogonal_noise(samples: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Antithetic pairs of N(0, I) vectors, orthogonal in groups of D; [S, 1, D] for S even.

    Within a group the directions are a random rotation of the axes and the lengths are those of
    independent normal vectors, so each vector by itself is exactly normal (orthogonal Monte Carlo)
    while averages over 2 D samples integrate odd functions exactly and quadratics nearly so.

    References:
        Orthogonal Random Features (Yu et al., 2016), https://arxiv.org/abs/1610.09072

    Args:
        samples: S; an odd number is rounded up.
        like: a tensor [..., D] with the dtype and device wanted.
        generator: on any device; drawn on its own.
    """
    dim, pairs = like.shape[-1], -(-samples // 2)
    groups = -(-pairs // dim)
    options = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    directions, upper = torch.linalg.qr(torch.randn(groups, dim, dim, **options))
    # Signs that make the rotation uniformly distributed: QR alone fixes them by convention.
    directions = directions * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(groups, dim, dim, **options).norm(dim=-1)
    half = (directions.mT * lengths[..., None]).flatten(0, 1)[:pairs]
    return torch.cat([half, -half])[:, None, :].to(like)


def _mix(v: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers held in int64; no product overflows 63 bits."""
    v = v & _MASK
    for _ in range(2):
        v = (((v >> 16) ^ v) * 0x45D9F3B) & _MASK
    return (v >> 16) ^ v
