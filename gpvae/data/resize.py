"""Exact area averaging of 8-bit images, in integers: the same bytes on every machine."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np


@lru_cache(maxsize=16)
def overlaps(source: int, target: int) -> tuple[np.ndarray, int]:
    """Overlap of each target pixel with each source pixel, [target, source], and its row sum.

    In units of 1/q source pixels, where source/target = p/q in lowest terms: every overlap is an
    integer and every row sums to p.
    """
    common = gcd(source, target)
    p, q = source // common, target // common
    start = np.arange(target)[:, None] * p
    pixel = np.arange(source)[None, :] * q
    overlap = np.minimum(start + p, pixel + q) - np.maximum(start, pixel)
    # float32 for its fast matrix product, exact here: sums stay below 255 p^2 < 2^24 for p <= 256
    return np.maximum(overlap, 0).astype(np.float32), p


def area_mean(pixels: np.ndarray, size: int) -> np.ndarray:
    """Average square images over the area of each new pixel and round to the nearest level.

    Args:
        pixels: [..., n, n] uint8, n >= size.
        size: side of the result.

    Returns:
        [..., size, size] uint8.
    """
    weights, total = overlaps(pixels.shape[-1], size)
    assert total <= 256, f"{pixels.shape[-1]} -> {size} has no exact sum in float32"
    sums = (weights @ pixels.astype(np.float32) @ weights.T).astype(np.int64)
    area = total * total
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)
