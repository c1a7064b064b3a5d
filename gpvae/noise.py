"""Where random numbers come from, and whom they belong to.

Everything that is drawn inside a model goes through `normal` and `uniform`, whose `source` may be

- a `torch.Generator` (or None, the global one): the next numbers of a stream;
- `ImageNoise`: numbers that belong to the images, so that an estimate of an image does not depend
  on its batch or on its place in it;
- `Replay`: numbers that were drawn before, in the same order (see `gpvae.ensemble`).

`orthogonal_noise` is shared by all images of a step, and integrates quadratics almost exactly.

Dimensions: S samples, B images, D latent, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Noise as a function of each image's pixels, a seed and how much was drawn before.

    A counter-based generator: each number is a hash of (image, seed, counter). An image gets the
    same numbers alone, in any batch and at any place in it, however its samples are chunked.
    Images with equal pixels share their noise.

    Args:
        x: images [B, C, H, W].
        seed: an integer, or a tensor of one integer (no synchronisation with a GPU).
    """

    def __init__(self, x: Tensor, seed: int | Tensor = 0) -> None:
        keys = image_keys(x)
        if isinstance(seed, int):
            seed = seed & 0xFFFFFFFF
            seed -= (seed >> 31) << 32  # the same 32 bits as a signed number
        self.keys = _mix(keys ^ _mix(torch.zeros_like(keys) + seed))
        self.drawn = 0

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """N(0, 1) noise [..., B, D] of the dtype of `like`; the largest is about 6.3."""
        *lead, _, dim = shape
        hashed = self._next(math.prod(lead), dim).view(shape)
        # Centred in its cell, the uniform number is never -1, 0 or 1.
        centred = hashed.double().mul_(2.0**-31).add_(2.0**-32)
        return (torch.erfinv(centred) * math.sqrt(2)).to(like.dtype)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """U(0, 1) noise [..., B] of the dtype of `like`; 0 and 1 are left out in float64."""
        *lead, _ = shape
        hashed = self._next(math.prod(lead), 1).view(shape)
        return hashed.double().mul_(2.0**-32).add_(0.5 + 2.0**-33).to(like.dtype)

    def _next(self, samples: int, dim: int) -> Tensor:
        """32 random bits for each of [S, B, D] numbers that were not drawn yet."""
        count = torch.arange(1, samples * dim + 1, device=self.keys.device, dtype=torch.int32)
        count = (count + self.drawn).view(samples, 1, dim)
        self.drawn += samples * dim
        return _mix(_mix(count) ^ self.keys[:, None])


class Replay:
    """Gives draws that were made before, in their order."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = iter(draws)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The next draw, which must have that shape."""
        value = next(self.draws)
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"a draw of shape {tuple(value.shape)} cannot replay {tuple(shape)}.")
        return value

    uniform = normal


class Recorder:
    """Draws from a generator and remembers what was asked for, as (kind, shape)."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `gpvae.noise.normal`."""
        self.asked.append(("normal", tuple(shape)))
        return normal(shape, like, self.generator)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """As `gpvae.noise.uniform`."""
        self.asked.append(("uniform", tuple(shape)))
        return uniform(shape, like, self.generator)


Source = torch.Generator | ImageNoise | Replay | Recorder | None


def normal(shape: Sequence[int], like: Tensor, source: Source) -> Tensor:
    """N(0, 1) noise of that shape, [..., B, D], with the dtype and device of `like`."""
    if source is None or isinstance(source, torch.Generator):
        return torch.randn(tuple(shape), generator=source, dtype=like.dtype, device=like.device)
    return source.normal(shape, like)


def uniform(shape: Sequence[int], like: Tensor, source: Source) -> Tensor:
    """U(0, 1) noise of that shape, [..., B], with the dtype and device of `like`."""
    if source is None or isinstance(source, torch.Generator):
        return torch.rand(tuple(shape), generator=source, dtype=like.dtype, device=like.device)
    return source.uniform(shape, like)


def image_noise(x: Tensor, samples: int, dim: int, seed: int | Tensor = 0) -> Tensor:
    """N(0, 1) noise [S, B, D] that belongs to the images x [B, C, H, W] (see `ImageNoise`)."""
    return ImageNoise(x, seed).normal((samples, len(x), dim), x)


def image_keys(x: Tensor) -> Tensor:
    """32 bits of hash for each image's pixels, [B]; equal pixels in float32 and float64 agree.

    Only integers are summed, so the order of sums cannot matter.
    """
    bits = x.detach().flatten(1).double().view(torch.int32)  # two words for each pixel
    place = torch.arange(1, bits.shape[1] + 1, device=x.device, dtype=torch.int32)
    return _mix(_mix(bits ^ _mix(place)).sum(-1, dtype=torch.int32))


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
    """A bijective hash of 32-bit integers; products wrap around, shifts bring in zeros."""
    for _ in range(2):
        v = (((v >> 16) & 0xFFFF) ^ v) * 0x45D9F3B
    return ((v >> 16) & 0xFFFF) ^ v
