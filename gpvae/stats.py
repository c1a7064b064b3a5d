"""Intervals: over seeds by Student's t, over images by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A value with a confidence interval from n observations."""

    value: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent values (one for each seed) with Student's t interval.

    One value gives an interval of NaN; none gives NaN throughout.
    """
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(array.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = stats.t.ppf(0.5 + level / 2, n - 1) * array.std(ddof=1) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], level: float = 0.95
) -> Interval:
    """Mean of a - b, paired by seed and image, with Student's t interval over seeds.

    Args:
        a, b: for each seed, values [N] of the same N test images in the same order.
        level: of the interval.

    Raises:
        ValueError: different numbers of seeds or images.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} seeds cannot be paired with {len(b)}.")
    differences = []
    for left, right in zip(a, b, strict=True):
        if len(left) != len(right):
            raise ValueError(f"{len(left)} images cannot be paired with {len(right)}.")
        differences.append(float(np.mean(np.asarray(left, float) - np.asarray(right, float))))
    return mean_interval(differences, level)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of values [N]; NaN where one of them is constant."""
    return float(_pearson(stats.rankdata(x)[None], stats.rankdata(y)[None])[0])


def spearman_interval(
    x: np.ndarray, y: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Spearman's rank correlation over images with a percentile bootstrap interval.

    Args:
        x, y: values of the same N images.
        level: of the interval.
        resamples: bootstrap resamples of the images.
        seed: of the resampling.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    index = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    draws = _pearson(stats.rankdata(x[index], axis=1), stats.rankdata(y[index], axis=1))
    low, high = np.nanquantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(spearman(x, y), float(low), float(high), len(x))


def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """Probability that a value of `high` exceeds one of `low`, ties counting half: the area under
    the ROC curve of a score that should be larger for `high`; 0.5 is chance.
    """
    u = stats.mannwhitneyu(np.asarray(high, float), np.asarray(low, float)).statistic
    return float(u / (len(low) * len(high)))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each row of x with the same row of y; NaN where a row is constant."""
    x = x - x.mean(1, keepdims=True)
    y = y - y.mean(1, keepdims=True)
    norm = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.divide((x * y).sum(1), norm, out=np.full(len(x), np.nan), where=norm > 0)
