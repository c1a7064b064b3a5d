"""Figures show what they are given: bars on the right side of zero, every method, every seed."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

import gpvae
from gpvae import plots
from gpvae.analysis import Decomposition
from gpvae.config import METHODS
from gpvae.profiles import titles
from gpvae.regimes import Setting
from gpvae.selective import POLICIES
from gpvae.stats import Interval, mean_interval
from gpvae.variations import NOISELESS


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def known(value, n=3):
    return Interval(value, value - 0.1, value + 0.1, n)


def gaps(approximation, amortization):
    inference = known(approximation + amortization)
    none = known(0.0)
    return Decomposition(none, none, known(approximation), known(amortization), inference, 0, 9)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_gap_bars_stack_to_both_sides_of_zero(ax):
    missing = mean_interval([])
    nothing = Decomposition(missing, missing, missing, missing, missing, 0, 0)
    plots.gap_bars(ax, {"vae": gaps(0.5, 1.0), "iaf": gaps(0.5, -0.2), "me": nothing})
    ends = [(b.get_x(), b.get_x() + b.get_width()) for b in ax.patches]
    assert ends[0] == pytest.approx((0, 0.5)) and ends[1] == pytest.approx((0.5, 1.5))
    assert ends[2] == pytest.approx((0, 0.5)) and ends[3] == pytest.approx((0, -0.2))
    totals = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    assert [float(x[0]) for x in totals] == pytest.approx([1.5, 0.3])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["VAE", "IAF", "ME"]
    assert texts(ax) == ["missing"]


def test_forest_marks_what_is_missing_and_draws_one_seed_without_a_bar(ax):
    one = mean_interval([0.4])
    plots.forest(
        ax, {"a": known(1.0), "b": one, "c": mean_interval([])}, shift=0.2, proposal="neutral"
    )
    assert texts(ax) == ["missing"] and ax.texts[0].xy[1] == 2.2
    heights = {float(line.get_ydata()[0]) for line in ax.lines[:-1]}
    assert heights == {0.2, 1.2}
    assert all(math.isnan(x) for x in ax.lines[2].get_xdata())
    assert ax.yaxis_inverted()


def test_every_method_has_a_colour_and_a_marker_of_its_own():
    assert len({tuple(plots.COLOURS[method]) for method in METHODS}) == len(METHODS)
    assert len({plots.MARKERS[method] for method in METHODS}) == len(METHODS)
    assert plots.POLICY_STYLES.keys() == POLICIES.keys()


def test_learning_curves_of_any_number_of_runs(ax):
    history = pd.DataFrame({"epoch": [10, 20, 30], "valid_elbo": [-3.0, -1.0, -2.0]})
    plots.learning_curves(ax, {"vae": [history, history], "gpvae": [history], "iaf": []})
    best = [line for line in ax.lines if line.get_marker() == "."]
    assert [float(line.get_xdata()[0]) for line in best] == [20] * 3
    plots.legend_beside(ax.figure)
    (legend,) = ax.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["VAE", "GPVAE", "IAF: missing"]
    plots.learning_curves(ax, {"vae": []})  # nothing stored: an empty panel, no error


def test_step_lines_name_their_parameter_and_keep_bars_apart(ax):
    curves = {"iaf": {1: known(0.1), 8: known(0.3)}, "me": {2: known(0.2), 5: mean_interval([])}}
    plots.step_lines(ax, curves)
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["IAF (K)", "ME (M); missing: 5"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "5", "8"]
    assert handles[0].lines[0].get_xdata()[0] < 1 < 2 < handles[1].lines[0].get_xdata()[0]


def test_a_saved_figure_tells_what_it_is_of(project_root):
    figure, _ = plt.subplots()
    plots.save(figure, "x", "t", gpvae.get_profile("cpu/mnist-long"))
    assert figure.get_suptitle() == "MNIST, D = 20, 120 epochs, 5 seeds"
    plt.close(figure)
    assert gpvae.get_profile("digits").title == "digits, D = 10, up to 500 epochs"


def test_no_title_takes_a_subset_or_a_derived_set_for_the_standard_one():
    names = ["mnist", "omniglot", "omniglot-28x28-rederived", "cifar10", "cifar10-subset"]
    found = {gpvae.get_profile(f"paper/{name}-d20").parts[0] for name in names}
    assert len(found) == len(names)


def test_titles_differ():
    names = ("frey", "mnist", "mnist-d50", "cifar10", "cifar10-slow")
    plans = [gpvae.get_profile(f"cpu/{name}") for name in names]
    assert list(titles(plans).values()) == [
        "Frey faces",
        "MNIST, D = 20",
        "MNIST, D = 50",
        "CIFAR-10 (subset), step 0.004",
        "CIFAR-10 (subset), step 0.002",
    ]


def test_saved_figures_are_equal_bit_for_bit(project_root):
    def draw():
        figure, ax = plt.subplots()
        plots.forest(ax, {"a": known(1.0)})
        plots.save(figure, "x", "t")
        plt.close(figure)
        return [(project_root / f"figures/t/x.{kind}").read_bytes() for kind in ("png", "pdf")]

    assert draw() == draw()


def test_ranks_show_every_block_and_a_difference_only_where_there_is_one(ax):
    ranks, blocks = {"iaf": 1.5, "vae": 2.0}, {"a": {"iaf": 1, "vae": 2}, "b": {"iaf": 2, "vae": 2}}
    plots.rank_lines(ax, ranks, blocks)
    drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    heights = {line.get_label(): line.get_ydata()[0] for line in ax.lines[2:]}
    assert heights["a"] != heights["b"]  # equal ranks stay apart
    assert drawn["a"] == [1, 2] and drawn["b"] == [2, 2]
    assert "critical difference" not in drawn
    plots.rank_lines(ax, ranks, blocks, 3.0)
    assert ax.lines[-1].get_xdata().tolist() == [1.5, 4.5]


def test_a_matrix_colours_only_what_lies_on_one_side_of_zero(ax):
    """And numbers what is there: two digits below one nat, none above a hundred."""
    lone, none = Interval(2.0, math.nan, math.nan, 1), mean_interval([])
    lines = {
        "a": {"vae": known(0.5), "me": known(-12.34), "iaf": known(0.05), "svi": lone},
        "b": {"vae": known(-123.4), "me": none, "svi": Interval(0.1, 0.0, 0.2, 3)},
    }
    plots.difference_matrix(ax, lines)
    assert texts(ax) == ["+0.50", "-12.3", "+0.05", "+2.0", "-123", "–", "–", "+0.10"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["VAE", "ME", "IAF", "SVI"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    above, below = (to_rgb(colour) for colour in plots.SIDE_COLOURS.values())
    white = (1.0, 1.0, 1.0)
    drawn = [patch.get_facecolor()[:3] for patch in ax.patches]
    assert drawn == [above, below, white, white, below, white, white, white]
    greys = [text.get_color() for text in ax.texts]
    assert greys == ["0.1", "0.1", "0.1", "0.5", "0.1", "0.5", "0.5", "0.1"]


def test_regime_panels_name_a_setting_by_what_the_panel_does_not_say():
    def setting(changes, interval):
        config = gpvae.RunConfig().override({"model.encoder": "gpvae", **changes})
        return Setting(changes, config, interval)

    key = "model.gp.temperature"
    figure = plots.regime_panels(
        {
            "temperature": [
                setting(NOISELESS, known(1.0)),
                setting({key: 0.0}, known(2.0)),
                setting({key: 1.0}, mean_interval([])),
            ],
            "train-size": [setting({"data.train_size": 100, key: 0.1}, known(3.0))],
        }
    )
    first, second = figure.axes
    grey, red = "0.5", plots.COLOURS["gpvae"]
    assert [line.get_color() for line in first.lines[:4]] == [grey] * 4  # controls
    assert [line.get_color() for line in second.lines[:2]] == [red] * 2
    names = ["0.0, no noise\n(control)", "0.0 (control)", "1.0"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == names
    assert [tick.get_text() for tick in second.get_yticklabels()] == ["100, τ = 0.1"]
    assert texts(first) == ["missing"]
    assert figure.get_supxlabel() == "log p(x), GPVAE − VAE (nats; mean, 95% over seeds)"
    plt.close(figure)


def test_the_usual_setting_is_open_in_every_panel():
    usual = gpvae.RunConfig().override(**{"model.encoder": "gpvae"})
    other = usual.override(**{"model.gp.features": 7})
    changes = {"model.gp.features": usual.model.gp.features}, {"model.gp.features": 7}
    settings = [Setting(changes[0], usual, known(1.0)), Setting(changes[1], other, known(2.0))]
    figure = plots.regime_panels({"features": settings, "again": settings[:1]}, usual)
    for ax in figure.axes:
        (mark,) = [line for line in ax.lines if line.get_mfc() == "white"]
        assert mark.get_xydata().tolist() == [[1.0, 0.0]]
    assert "open: the usual setting" in figure.get_supxlabel()
    plt.close(figure)


@pytest.mark.parametrize(
    ("low", "high", "count"),
    [
        (1.2e-3, 8e-3, 2),
        (1.2e-3, 2e-2, 2),
        (1.2e-3, 9e-2, 3),
        (1.2e-3, 2e-1, 2),
        (2.3e-2, 5.5e-2, 2),  # 3 and 5
        (3.5e-2, 5.5e-2, 2),  # 4 and 5
        (3.1e-2, 3.9e-2, 2),  # no round number
    ],
)
def test_a_short_logarithmic_axis_has_a_few_numbers(ax, low, high, count):
    ax.set(xscale="log", xlim=(low, high))
    plots.log_ticks(ax.xaxis)
    ax.figure.canvas.draw()
    shown = [t for t in ax.get_xticklabels() if low < t.get_position()[0] < high]
    assert len(shown) == count and all(t.get_text() for t in shown)
    assert not any(t.get_text() for t in ax.get_xticklabels(minor=True))


def test_one_image_does_not_flatten_all_others(ax):
    gap = np.linspace(1, 100, 500)
    plots.scatter(ax, gap, gap, "gpvae")
    assert ax.get_xscale() == ax.get_yscale() == "linear"
    plots.scatter(ax, gap, np.where(gap == 100, 4.5e5, gap), "gpvae")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "symlog")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "90", "$10^{5}$"]
    low, middle, high = ax.transData.transform([(0, 0), (0, 99), (0, 4.5e5)])[:, 1]
    assert middle - low > 0.4 * (high - low)


def test_the_front_of_bounds_and_costs_is_drawn_as_steps_and_what_lacks_is_named(ax):
    points = {"vae": (1.0, known(0.0)), "gpvae": (1.8, known(-1.0)), "savae": (30.0, known(5.0))}
    ax.set_title("digits")
    plots.cost_front(ax, points, ["vae", "savae"], {"iaf": "no rows", "hf": "no time"})
    assert ax.get_title() == "digits\nIAF: no rows\nHF: no time"
    bars, dots = ax.lines[0:6:2], ax.lines[1:6:2]
    assert [line.get_label() for line in dots] == ["VAE", "GPVAE", "SA-VAE"]
    assert [line.get_xydata()[0].tolist() for line in dots] == [[1, 0], [1.8, -1], [30, 5]]
    assert bars[2].get_xydata().tolist() == pytest.approx(np.array([[30, 4.9], [30, 5.1]]))
    step = ax.lines[6]
    assert step.get_drawstyle() == "steps-post"
    assert step.get_xydata().tolist() == [[1, 0], [30, 5], [45, 5]]
    assert ax.get_xscale() == "log"


def wide(value):
    return Interval(value, value - 500, value + 500, 5)


def test_one_wide_interval_does_not_flatten_the_front(ax):
    points = {"vae": (1.0, known(0.0)), "svi": (9.0, known(7.0)), "iaf": (3.0, known(2.0))}
    plots.cost_front(ax, points, ["vae"])
    assert "off the axis" not in ax.get_title()
    plots.cost_front(ax, points | {"gpvae": (2.0, wide(-180.0))}, ["vae"])
    assert ax.get_title() == "\nGPVAE: -180 [-680, +320], off the axis"
    low, high = ax.get_ylim()
    assert -1 < low < -0.1 and 7.1 < high < 8


def test_one_wide_interval_does_not_flatten_the_gaps(ax):
    none = known(0.0)
    off = Decomposition(none, none, none, known(260.0), wide(260.0), 0, 9)
    plots.gap_bars(ax, {"vae": gaps(1.0, 2.0), "gpvae": off, "iaf": gaps(0.5, -0.2)})
    assert texts(ax) == ["260 [-240, 760], off the axis"] and ax.texts[0].xy[1] == 1
    assert 3.1 < ax.get_xlim()[1] < 4


def test_an_interval_below_zero_is_marked_on_the_logarithmic_axis(ax):
    expected = np.array([1.0, 2.0, 4.0])
    plots.calibration(ax, expected, [known(2.0), Interval(8.0, -1.0, 17.0, 5), known(9.0)])
    (mark,) = [line for line in ax.lines if line.get_label() == "interval holds zero"]
    bottom = ax.get_ylim()[0]
    ax.figure.canvas.draw()
    assert mark.get_xydata().tolist() == [[2.0, bottom]] and 0 < bottom < 1
    plots.calibration(ax, expected, [known(2.0), known(-1.0), known(9.0)])  # below zero itself
    equality = next(line for line in ax.lines if line.get_label() == "as expected")
    assert equality.get_xydata().tolist() == [[1, 1], [4, 4]]


def test_a_front_without_points_is_missing(ax):
    plots.cost_front(ax, {}, [])
    assert texts(ax) == ["missing"] and not ax.lines


def test_every_block_of_ranks_is_drawn_however_many(ax):
    plots.rank_lines(
        ax, {"vae": 1.0, "iaf": 2.0}, {str(i): {"vae": 1, "iaf": 2} for i in range(12)}
    )
    assert len(ax.lines) == 2 + 12
