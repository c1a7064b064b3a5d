"""Figures: functions from arrays to axes, one style, one colour for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpvae import events, paths
from gpvae.stats import Interval
from gpvae.tables import LABELS

COLUMN, TEXT = 3.4, 7.0  # widths in inches
_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "vae": _PALETTE[0],
    "gpvae": _PALETTE[3],
    "iaf": _PALETTE[1],
    "hf": _PALETTE[8],
    "me": _PALETTE[9],
    "rme": _PALETTE[2],
    "savae": _PALETTE[4],
    "svi": _PALETTE[7],
    "vlae": _PALETTE[5],
    "exact": (0.25, 0.25, 0.25),
}


def use_style() -> None:
    """Apply the project's style sheet."""
    plt.style.use(Path(__file__).with_name("gpvae.mplstyle"))


def save(figure: Figure, name: str, profile: str) -> Figure:
    """Write `figures/<profile>/<name>.png` and `.pdf` without timestamps; returns the figure."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    # The program's name and the date would make equal figures differ.
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None})
    events.record(profile, "figure", name, "made")
    return figure


def image_row(ax: Axes, images: np.ndarray, label: str = "", columns: int | None = None) -> None:
    """Images [N, C, H, W] in [0, 1] side by side, in rows of `columns`.

    Grey images that are mostly 0, such as handwriting, are drawn as dark ink on white.
    """
    n, channels, height, width = images.shape
    columns = columns or n
    rows = -(-n // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.nan)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    if channels == 1:
        tones = "gray_r" if images.mean() < 0.5 else "gray"
        ax.imshow(canvas[..., 0], vmin=0, vmax=1, cmap=tones, interpolation="nearest")
    else:
        ax.imshow(np.nan_to_num(canvas, nan=1).clip(0, 1), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    if label:
        ax.set_ylabel(label, rotation=0, ha="right", va="center")


def learning_curves(ax: Axes, histories: Mapping[str, Sequence[pd.DataFrame]]) -> None:
    """Validation bound against epoch: one thin line for each seed, best points marked."""
    for encoder, runs in histories.items():
        for i, history in enumerate(runs):
            label = LABELS[encoder] if i == 0 else None
            ax.plot(
                history.epoch,
                history.valid_elbo,
                color=COLOURS[encoder],
                alpha=0.7,
                lw=0.8,
                label=label,
            )
            best = history.loc[history.valid_elbo.idxmax()]
            ax.plot(best.epoch, best.valid_elbo, "o", color=COLOURS[encoder])
    bounds = np.concatenate([h.valid_elbo for runs in histories.values() for h in runs])
    low, high = np.quantile(bounds, 0.2), bounds.max()
    ax.set_ylim(low, high + 0.1 * (high - low))  # the first epochs would flatten everything
    ax.set(xlabel="epoch", ylabel="validation ELBO (nats)")
    ax.legend()


def density_contours(
    ax: Axes, log_density: Callable[[np.ndarray], np.ndarray], limit: float = 3.0, size: int = 121
) -> np.ndarray:
    """Filled contours of an unnormalised 2-D log density, at its 95, 80, 50 and 20% regions.

    Args:
        ax: where to draw.
        log_density: maps points [G, 2] to nats [G].
        limit: the grid covers [-limit, limit]^2.
        size: points of the grid on each side.

    Returns:
        The density on the grid, [size, size], normalised to sum to one.
    """
    side = np.linspace(-limit, limit, size)
    grid = np.stack(np.meshgrid(side, side), -1)
    log_p = log_density(grid.reshape(-1, 2)).reshape(size, size)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    ordered = np.sort(p.ravel())[::-1]
    mass = ordered.cumsum()
    levels = sorted({float(ordered[np.searchsorted(mass, m)]) for m in (0.95, 0.8, 0.5, 0.2)})
    ax.contourf(side, side, p, levels=[*levels, p.max() * 1.01], cmap="Blues", extend="neither")
    ax.contour(side, side, p, levels=levels, colors="0.3", linewidths=0.4)
    ax.set(aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    ax.grid(False)
    return p


def forest(
    ax: Axes, intervals: Mapping[str, Interval], colours: Mapping[str, object] | None = None
) -> None:
    """Values with intervals, one line each, the first on top; zero is marked."""
    for i, (label, interval) in enumerate(intervals.items()):
        colour = (colours or {}).get(label, "0.2")
        ax.plot([interval.low, interval.high], [i, i], color=colour)
        ax.plot(interval.value, i, "o", color=colour)
    ax.axvline(0, color="0.5", lw=0.8, zorder=0)
    ax.set_yticks(range(len(intervals)), list(intervals))
    ax.set_ylim(len(intervals) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def interval_line(
    ax: Axes, x: Sequence[float], intervals: Sequence[Interval], encoder: str, shift: float = 1.0
) -> None:
    """A line through values with 95% bars; `shift` moves it sideways by a factor (log axes)."""
    position = np.asarray(x, float) * shift
    value = np.array([i.value for i in intervals])
    bars = np.array([[i.value - i.low, i.high - i.value] for i in intervals]).T
    ax.errorbar(
        position,
        value,
        yerr=bars,
        fmt="o-",
        color=COLOURS[encoder],
        label=LABELS[encoder],
        capsize=2,
        lw=1,
    )


def scatter(ax: Axes, x: np.ndarray, y: np.ndarray, encoder: str) -> None:
    """Per-image scatter in the method's colour."""
    ax.plot(x, y, ".", color=COLOURS[encoder], alpha=0.5, ms=3, mew=0)
