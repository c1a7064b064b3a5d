"""Figures: functions from arrays to axes, one style, one colour for each method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator

from gpvae import events, paths
from gpvae.analysis import SYMBOLS, Decomposition
from gpvae.config import RunConfig
from gpvae.profiles import Profile
from gpvae.regimes import Setting, parts
from gpvae.selective import POLICIES, Refinement
from gpvae.stats import Interval, mean_interval
from gpvae.tables import LABELS, MISSING, format_interval, verdict
from gpvae.variations import NOISELESS

COLUMN, TEXT = 3.4, 7.0  # widths in inches
STRAY = 20  # times the 99% quantile: an image so far off has an axis of its own
STRAY_WIDTH = 5  # times the second widest interval: one so wide is named and left out
_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "vae": _PALETTE[0],
    "gpvae": _PALETTE[3],
    "iaf": _PALETTE[1],
    "hf": (0.30, 0.18, 0.51),  # the palette's yellow is hard to see on white
    "me": _PALETTE[9],
    "rme": _PALETTE[2],
    "savae": _PALETTE[4],
    "svi": _PALETTE[7],
    "vlae": _PALETTE[5],
    "exact": (0.25, 0.25, 0.25),
}
MARKERS = dict(zip(LABELS, "oDs^v<PX>", strict=True))  # colours are not enough for every eye
GAP_COLOURS = {"approximation gap": "0.8", "amortization gap": "0.5"}
_SIDES = {"above": _PALETTE[0], "below": _PALETTE[1]}  # by `tables.verdict`
SIDE_COLOURS = {side: sns.light_palette(colour, 5)[2] for side, colour in _SIDES.items()}
# A small remark in a panel, readable over the lines that it covers.
NOTE = {"color": "0.5", "fontsize": 6, "zorder": 3}
NOTE |= {"bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
POLICY_STYLES = {
    "none": {"color": "0.7", "ls": "-", "lw": 0.8},
    "uniform": {"color": "0.5", "ls": (0, (4, 1))},
    "random": {"color": "0.2", "ls": ":"},
    "relative_f_var": {"color": COLOURS["gpvae"], "ls": "-"},
    "-ELBO": {"color": "0.4", "ls": "-"},
    "oracle": {"color": "0.2", "ls": (0, (5, 1, 1, 1))},
}


def use_style() -> None:
    """Apply the project's style sheet."""
    plt.style.use(Path(__file__).with_name("gpvae.mplstyle"))


def save(figure: Figure, name: str, profile: str, plan: Profile | None = None) -> Figure:
    """Write `figures/<profile>/<name>.png` and `.pdf` without timestamps; returns the figure.

    With a `plan`, a line on top tells the data set, the budget and the number of seeds.
    """
    if plan:
        figure.set_figheight(figure.get_figheight() + 0.18)
        figure.suptitle(f"{plan.title}, {len(plan.seeds)} seeds", fontsize=7, color="0.4")
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
    """Validation bound against epoch: one thin line for each seed, best points as dots, and their
    mean over the epochs that every seed reached, with the method's marker.
    """
    for i, (encoder, runs) in enumerate(histories.items()):
        style = {"color": COLOURS[encoder], "zorder": 3 - 0.01 * i}  # VAE and GPVAE on top
        for history in runs:
            ax.plot(history.epoch, history.valid_elbo, alpha=0.3, lw=0.5, **style)
            best = history.loc[history.valid_elbo.idxmax()]
            ax.plot(best.epoch, best.valid_elbo, ".", ms=3, **style)
        label = LABELS[encoder] if runs else f"{LABELS[encoder]}: {MISSING}"
        curves = [history.set_index("epoch").valid_elbo for history in runs]
        mean = pd.concat(curves, axis=1, join="inner").mean(axis=1) if runs else pd.Series()
        every = (0.01 * i, 0.1)  # of the panel's diagonal, so that markers do not coincide
        style |= {"marker": MARKERS[encoder], "ms": 3, "mew": 0, "markevery": every}
        ax.plot(mean.index, mean, lw=1, label=label, **style)
    bounds = [history.valid_elbo for runs in histories.values() for history in runs]
    if bounds:  # the first epochs would flatten everything
        low, high = np.quantile(np.concatenate(bounds), 0.2), max(map(max, bounds))
        ax.set_ylim(low, high + 0.1 * (high - low))
    ax.set(xlabel="epoch", ylabel="validation ELBO (nats)")


def legend_beside(figure: Figure) -> None:
    """One legend for all panels, to their right, each label once."""
    _shared_legend(figure, loc="outside right center")


def legend_below(figure: Figure, columns: int = 4) -> None:
    """One legend for all panels, in lines below them, each label once."""
    _shared_legend(figure, loc="outside lower center", ncols=columns)


def _shared_legend(figure: Figure, **options: object) -> None:
    entries: dict[str, object] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), **options)


def proposal_legend(figure: Figure) -> None:
    """Below the panels: what full and open markers of a forest plot mean."""
    handles = [
        Line2D([], [], color="0.3", label=f"{word} proposal{'s' * (word == 'both')}", **style)
        for word, style in _marker_styles("0.3").items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _marker_styles(colour: object) -> dict[str, dict[str, object]]:
    """Markers of the three estimates of log p(x), by the names in `tables.PROPOSALS`."""
    return {
        "own": {"marker": "o", "mfc": colour},
        "neutral": {"marker": "o", "mfc": "white"},
        "both": {"marker": "D", "mfc": colour, "ms": 3},
    }


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


def mark_missing(ax: Axes, y: float, text: str = MISSING) -> None:
    """Say at this height, by the left edge, that there is nothing to draw."""
    where = {"xy": (0.02, y), "xycoords": ax.get_yaxis_transform()}
    ax.annotate(text, **where, va="center", **NOTE)


def forest(
    ax: Axes,
    intervals: Mapping[str, Interval],
    colours: Mapping[str, object] | None = None,
    shift: float = 0.0,
    proposal: str = "own",
) -> None:
    """Values with intervals, one line each, the first on top; zero is marked.

    Args:
        ax: where to draw.
        intervals: by label; one from no observation is marked as missing.
        colours: by label.
        shift: moves everything down by a part of a line, for several values in one line.
        proposal: of the estimate that is drawn, which sets the markers.
    """
    for i, (label, interval) in enumerate(intervals.items()):
        if not interval.n:
            mark_missing(ax, i + shift)
            continue
        colour, y = (colours or {}).get(label, "0.2"), i + shift
        ax.plot([interval.low, interval.high], [y, y], color=colour)
        ax.plot(interval.value, y, color=colour, **_marker_styles(colour)[proposal])
    ax.axvline(0, color="0.5", lw=0.8, zorder=0)
    ax.set_yticks(range(len(intervals)), list(intervals))
    ax.set_ylim(len(intervals) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def regime_panels(
    regimes: Mapping[str, Sequence[Setting]], usual: RunConfig | None = None
) -> Figure:
    """A panel for each option: GPVAE - VAE in log p(x) for each of its settings, with intervals.

    Controls are grey; the marker of `usual`, which may stand in several panels, is open.
    """
    columns = min(3, len(regimes))
    lines = -(-len(regimes) // columns)
    size = (max(COLUMN, TEXT * columns / 3), 1.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharex=True)
    for ax, (name, settings) in zip(axes.flat, regimes.items(), strict=False):
        shown = {_brief(name, setting): setting.difference for setting in settings}
        shades = ["0.5" if setting.is_control else COLOURS["gpvae"] for setting in settings]
        forest(ax, shown, dict(zip(shown, shades, strict=True)))
        for i, setting in enumerate(settings):
            if usual and setting.config == usual:
                ax.plot(setting.difference.value, i, "o", color=COLOURS["gpvae"], mfc="white")
        ax.set_title(name.replace("-", " "))
        ax.tick_params(labelbottom=True)
    label = "log p(x), GPVAE − VAE (nats; mean, 95% over seeds)"
    figure.supxlabel(label + "\nopen: the usual setting, the same in every panel" * bool(usual))
    for ax in axes.flat[len(regimes) :]:
        ax.remove()
    return figure


def _brief(name: str, setting: Setting) -> str:
    """A setting without the name of the option that the panel is about, in lines if it is long."""
    values = parts(setting.changes)
    about = name.replace("-", "_")
    about = about if about in values else next(iter(values))
    others = [_brief_part(option, value) for option, value in values.items() if option != about]
    named = [values[about], *others]
    text = ", ".join(named)
    text = text if len(text) < 15 else ",\n".join(named)
    gap = "\n" if len(text) > 6 else " "
    return text + f"{gap}(control)" * setting.is_control


def _brief_part(option: str, value: str) -> str:
    if option == "initial_std" and value == str(NOISELESS["model.gp.initial_std"]):
        return "no noise"
    return f"{'τ' if option == 'temperature' else option} = {value}"


def interval_line(
    ax: Axes,
    x: Sequence[float],
    intervals: Sequence[Interval],
    encoder: str,
    shift: float = 1.0,
    label: str | None = None,
) -> None:
    """A line through values with 95% bars; `shift` moves it sideways by a factor (log axes)."""
    position = np.asarray(x, float) * shift
    value = np.array([i.value for i in intervals])
    bars = np.array([[i.value - i.low, i.high - i.value] for i in intervals]).T
    ax.errorbar(
        position,
        value,
        yerr=bars,
        fmt=f"{MARKERS[encoder]}-",
        color=COLOURS[encoder],
        label=label or LABELS[encoder],
        capsize=2,
        lw=1,
    )


def step_lines(ax: Axes, curves: Mapping[str, Mapping[int, Interval]]) -> None:
    """Differences to the VAE against the number of steps, one line per method, zero marked."""
    counts = sorted({count for each in curves.values() for count in each})
    shifts = np.geomspace(0.93, 1.07, len(curves))  # bars of one count side by side
    for (encoder, each), shift in zip(curves.items(), shifts, strict=True):
        label = f"{LABELS[encoder]} ({SYMBOLS.get(encoder, 'n')})"
        if lacking := [str(count) for count, interval in each.items() if not interval.n]:
            label += f"; {MISSING}: {', '.join(lacking)}"
        interval_line(ax, list(each), list(each.values()), encoder, shift, label)
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set(xscale="log", xlabel="T, K or M")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()


def gap_bars(ax: Axes, methods: Mapping[str, Decomposition]) -> None:
    """Approximation and amortization gap of each method as stacked bars, the first on top.

    Positive parts are stacked to the right of zero, negative ones to its left. The dot is their
    sum, the inference gap, with its interval.
    """
    for i, d in enumerate(methods.values()):
        if not d.inference.n:
            mark_missing(ax, i)
            continue
        ends = {True: 0.0, False: 0.0}
        for label, part in (
            ("approximation gap", d.approximation.value),
            ("amortization gap", d.amortization.value),
        ):
            ax.barh(i, part, 0.7, ends[part > 0], color=GAP_COLOURS[label], label=label)
            ends[part > 0] += part
        total = d.inference
        bars = [[total.value - total.low], [total.high - total.value]]
        label = "inference gap [95% over seeds]"
        ax.errorbar(total.value, i, xerr=bars, fmt="o", color="0.1", lw=1, label=label)
    totals = {encoder: d.inference for encoder, d in methods.items()}
    if off := stray(totals):
        ax.set_xlim(*_limits(each for encoder, each in totals.items() if encoder != off))
        where = {"xy": (0.99, list(methods).index(off)), "xycoords": ax.get_yaxis_transform()}
        text = f"{format_interval(totals[off], digits=0)}, off the axis"
        ax.annotate(text, **where, ha="right", va="center", **NOTE)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_axisbelow(True)
    ax.set_yticks(range(len(methods)), [LABELS.get(encoder, encoder) for encoder in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel("nats per image")
    ax.grid(axis="y", visible=False)


def stray(intervals: Mapping[str, Interval]) -> str:
    """The label whose interval is so much wider than all others that it would flatten them; empty
    if there is none.
    """
    widths = {label: each.high - each.low for label, each in intervals.items() if each.n > 1}
    if len(widths) < 3:
        return ""
    *_, second, (label, widest) = sorted(widths.items(), key=lambda item: item[1])
    return label if widest > STRAY_WIDTH * second[1] else ""


def _limits(intervals: Iterable[Interval]) -> tuple[float, float]:
    """Limits of an axis that shows zero and these intervals."""
    ends = [0.0, *(end for each in intervals for end in (each.low, each.high) if each.n > 1)]
    margin = 0.05 * (max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def refinement_curves(ax: Axes, refinement: Refinement, each: int) -> None:
    """Mean bound against mean cost of every policy."""
    for policy, label in POLICIES.items():
        ax.plot(*refinement.curve(policy, each), label=label, **POLICY_STYLES[policy])
    ax.set_xlabel("cost (SVI steps per image)")


def scatter(ax: Axes, x: np.ndarray, y: np.ndarray, encoder: str) -> None:
    """Per-image scatter in the method's colour, for narrow panels.

    Where single images would flatten all others, the axis is logarithmic beyond the other 99%,
    from a dotted line on.
    """
    ax.plot(x, y, ".", color=COLOURS[encoder], alpha=0.5, ms=3, mew=0)
    ax.locator_params(axis="x", nbins=3)  # numbers of thousands would overlap
    for set_scale, axis, mark, values in (
        (ax.set_xscale, ax.xaxis, ax.axvline, np.abs(x)),
        (ax.set_yscale, ax.yaxis, ax.axhline, np.abs(y)),
    ):
        usual, largest = float(np.quantile(values, 0.99)), values.max()
        if largest > STRAY * usual:
            set_scale("symlog", linthresh=usual, linscale=3)
            mark(usual, color="0.5", ls=":", lw=0.8)
            # A tick for each power of ten would overlap, and none would lie below the line.
            digit, power = (10.0 ** np.floor(np.log10(v)) for v in (usual, largest))
            middle = digit * np.floor(usual / digit)
            names = ["0", f"{middle:g}", f"$10^{{{np.log10(power):.0f}}}$"]
            axis.set_ticks([0, middle, power], names)


def calibration(ax: Axes, expected: np.ndarray, observed: Sequence[Interval]) -> None:
    """Observed against expected gap on log axes; the line is equality."""
    value, low, high = (np.array(each) for each in list(zip(*observed, strict=True))[:3])
    ends = np.array([expected.min(), expected.max()])
    bottom = 0.7 * min(ends[0], *(v for v in (*value, *low) if v > 0))
    style = {"fmt": "o", "color": COLOURS["gpvae"], "capsize": 2, "lw": 1}
    bars = [value - np.minimum(np.maximum(low, bottom), value), high - value]
    ax.errorbar(expected, value, yerr=bars, label="decile [95% over seeds]", **style)
    if (through := low <= 0).any():
        style = {"color": COLOURS["gpvae"], "ls": "", "marker": CARETDOWN}
        feet = np.full(through.sum(), bottom)
        ax.plot(expected[through], feet, label="interval holds zero", **style)
    ax.plot(ends, ends, color="0.5", lw=0.8, label="as expected")
    ax.set(xscale="log", yscale="log", xlabel="2 × expected gap (nats)")
    ax.set_ylim(bottom=bottom)
    log_ticks(ax.xaxis)


def cost_front(
    ax: Axes,
    points: Mapping[str, tuple[float, Interval]],
    front: Sequence[str],
    lacking: Mapping[str, str] | None = None,
) -> None:
    """Difference of the bound to the VAE's against relative inference time; the front as steps.

    Args:
        ax: where to draw.
        points: see `gpvae.comparison.bounds_and_costs`.
        front: the methods on it, the fastest first.
        lacking: why methods have no point, which the title tells.
    """
    gains = {encoder: gain for encoder, (_, gain) in points.items()}
    notes = [f"{LABELS[encoder]}: {reason}" for encoder, reason in (lacking or {}).items()]
    if off := stray(gains):
        notes.append(f"{LABELS[off]}: {format_interval(gains[off], '+', 0)}, off the axis")
        ax.set_ylim(*_limits(gain for encoder, gain in gains.items() if encoder != off))
    ax.set_title("\n".join([ax.get_title(), *notes]))
    if not points:
        ax.annotate(MISSING, (0.5, 0.5), xycoords="axes fraction", color="0.5", ha="center")
        return
    for i, (encoder, (cost, gain)) in enumerate(points.items()):
        style = {"color": COLOURS[encoder], "zorder": 3 - 0.01 * i}  # VAE and GPVAE on top
        ax.plot([cost, cost], [gain.low, gain.high], lw=1, **style)
        ax.plot(cost, gain.value, MARKERS[encoder], label=LABELS[encoder], **style)
    steps = [(points[e][0], points[e][1].value) for e in front]
    steps.append((1.5 * max(cost for cost, _ in points.values()), steps[-1][1]))
    dashed = {"color": "0.3", "lw": 0.8, "ls": (0, (4, 2)), "zorder": 1}
    ax.step(*zip(*steps, strict=True), where="post", label="front of the means", **dashed)
    ax.axhline(0, color="0.8", lw=0.6, zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")


def rank_lines(
    ax: Axes,
    ranks: Mapping[str, float],
    blocks: Mapping[str, Mapping[str, float]],
    difference: float | None = None,
) -> None:
    """Mean ranks (filled), the best on top, with the rank in each block.

    Args:
        ax: where to draw.
        ranks: mean ranks by encoder.
        blocks: the ranks by encoder in each block, by name.
        difference: critical difference, drawn as a bar from the best method's rank.
    """
    for i, (encoder, rank) in enumerate(ranks.items()):
        ax.plot(rank, i, "o", ms=7, color=COLOURS[encoder])
    shifts = np.linspace(-0.22, 0.22, len(blocks)) if len(blocks) > 1 else [0.0]
    for name, marker, shift in zip(blocks, cycle("sv^<>DPX*"), shifts, strict=False):
        each = [blocks[name][encoder] for encoder in ranks]
        style = {"ls": "", "ms": 3.5, "mfc": "white", "mew": 0.7, "color": "0.2", "zorder": 3}
        label = fill(name, 90)  # a legend's line that fits the figure
        ax.plot(each, np.arange(len(ranks)) + shift, marker, label=label, **style)
    if difference is not None:
        first = next(iter(ranks.values()))
        ax.plot([first, first + difference], [-0.3, -0.3], color="0.2", label="critical difference")
    ax.set_yticks(range(len(ranks)), [LABELS[encoder] for encoder in ranks])
    ax.set_ylim(len(ranks) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def difference_matrix(ax: Axes, lines: Mapping[str, Mapping[str, Interval]]) -> None:
    """GPVAE minus each method (columns) in each line of `lines`, coloured by the side of zero on
    which its whole interval lies. Grey numbers are of one seed, a dash is missing.
    """
    encoders = max(lines.values(), key=len)
    for (y, line), (x, encoder) in product(enumerate(lines.values()), enumerate(encoders)):
        difference = line.get(encoder, mean_interval([]))
        side = SIDE_COLOURS.get(verdict(difference), "white")
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, ec="0.85", fc=side))
        digits = sum(abs(difference.value) < limit for limit in (1, 100))
        text = f"{difference.value:+.{digits}f}" if difference.n else "–"
        style = {"ha": "center", "va": "center", "color": "0.1" if difference.n > 1 else "0.5"}
        ax.text(x, y, text, fontsize=6, **style)
    ax.set_xlim(-0.5, len(encoders) - 0.5)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xticks(range(len(encoders)), [LABELS[encoder] for encoder in encoders], rotation=45)
    ax.set_yticks(range(len(lines)), list(lines))
    ax.grid(visible=False)


def side_legend(figure: Figure) -> None:
    """The colours of `difference_matrix`, below everything."""
    sides = SIDE_COLOURS.items()
    patches = [Patch(fc=colour, ec="0.7", label=f"GPVAE {side}") for side, colour in sides]
    level = Patch(fc="white", ec="0.7", label="not told apart, or missing (–)")
    figure.legend(handles=[*patches, level], loc="outside lower center", ncols=3)


def log_ticks(axis: Axis) -> None:
    """Number a logarithmic axis, after drawing, with the fewest round numbers that are two."""
    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axis.set_major_locator(MaxNLocator(2))  # of a range that holds no two round numbers
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), range(1, 10)):
        if sum(low <= digit * 10.0**power <= high for digit in digits for power in powers) > 1:
            axis.set_major_locator(LogLocator(subs=digits))
            break
    axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    axis.set_minor_formatter("")
