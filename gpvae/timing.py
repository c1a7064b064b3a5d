"""Timings that can be compared: several functions in turns within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, the functions called in turns, so that drift meets all alike.

    Args:
        functions: by name.
        repeats: counted calls of each.
        warmup: calls of each that are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def relative(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over turns of the ratio to `base` in the same turn."""
    return {
        name: float(
            torch.tensor([t / b for t, b in zip(times, seconds[base], strict=True)]).median()
        )
        for name, times in seconds.items()
    }
