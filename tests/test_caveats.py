"""What a table's intervals do not tell, from rows whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rows import fake_row, store_rows
from scipy import stats

from gpvae.caveats import (
    caveats,
    chance_note,
    image_note,
    p_value,
    single_image_note,
    vague_note,
    vague_share,
)
from gpvae.caveats import without_one_image as without
from gpvae.results import Results
from gpvae.stats import Interval, mean_interval


def test_estimates_from_too_few_samples_are_named(project_root):
    rows = [fake_row(e, seed, [1.0, 2.0, 3.0]) for e in ("vae", "hf") for seed in (0, 1)]
    errors = {"vae": [0.1, 0.2, 0.5], "hf": [0.1, 0.6, 0.4]}
    results = Results("t")
    for row in rows:
        results.append(row, {"log_px_stderr": np.array(errors[row["config"]["model"]["encoder"]])})
    methods = {"gaussian": {"vae": rows[:2], "hf": rows[2:], "iaf": []}}
    assert vague_share(results, rows[:2]) == 0 and vague_share(results, rows[2:]) == 1 / 3
    assert "more: HF (gaussian) 33%. There" in vague_note(results, methods)
    assert vague_note(results, {"gaussian": {"vae": rows[:2]}}) == ""
    assert math.isnan(vague_share(results, []))


def methods_of(*rows):
    """Rows by output and encoder, of one output."""
    found = {}
    for row in rows:
        found.setdefault(row["config"]["model"]["encoder"], []).append(row)
    return {"gaussian": found}


def test_how_well_the_images_stand_for_others_is_said_of_each_method(project_root):
    """ME exceeds the VAE by 1 and 3 nats: std sqrt(2), of two images; IAF has no common seed."""
    rows = [fake_row("vae", 0, [0.0, 0.0]), fake_row("me", 0, [1.0, 3.0])]
    rows.append(fake_row("iaf", 1, [1.0, 3.0]))
    results, methods = store_rows("t", rows), methods_of(*rows)
    assert image_note(results, methods).endswith("in nats: gaussian: ME 1.00.")
    assert image_note(results, methods_of(rows[0])) == ""


@pytest.fixture
def lost():
    """Two seeds of which GPVAE exceeds the VAE by 1 nat or a little more, but for one image that
    one seed loses: 20 nats of its mean.
    """
    vae = [fake_row("vae", seed, np.arange(5.0)) for seed in (0, 1)]
    gains = ([1.0, 1.0, -100.0, 1.0, 1.0], [1.2, 1.0, 1.0, 1.0, 1.0])
    gpvae = [fake_row("gpvae", seed, np.arange(5.0) + gains[seed]) for seed in (0, 1)]
    return vae, gpvae


def test_a_difference_that_one_image_decides_is_named_with_its_value_without_it(project_root, lost):
    vae, gpvae = lost
    results = store_rows("t", vae + gpvae)
    rest = without(results, gpvae, vae, "log_likelihood")
    half = 12.7062 * 0.025  # Student's t of one degree of freedom times the standard error
    assert rest[:3] == pytest.approx((1.025, 1.025 - half, 1.025 + half), abs=1e-4)
    note = single_image_note(results, methods_of(*vae, *gpvae))
    assert "GPVAE (gaussian, own proposal) +1.02 [+0.71, +1.34]; GPVAE (gaussian, both" in note
    assert caveats(results, methods_of(*vae, *gpvae)).count("\n\n") == 1  # and the images' error


def test_a_difference_that_no_single_image_decides_is_not_named(project_root, lost):
    vae, gpvae = lost
    results = store_rows("t", vae + gpvae)
    assert single_image_note(results, methods_of(*vae[:1], *gpvae[:1])) == ""  # one seed
    few = [fake_row("me", seed, np.arange(5.0) + 1 + 0.1 * seed) for seed in (0, 1)]
    results = store_rows("t", few)
    assert single_image_note(results, methods_of(*vae, *few)) == ""


def test_p_value_is_that_of_a_t_test():
    values = [0.4, 1.3, 0.2, 0.9, 1.1]
    expected = stats.ttest_1samp(values, 0).pvalue
    assert p_value(mean_interval(values)) == pytest.approx(expected)
    edge = mean_interval([value - mean_interval(values).low for value in values])
    assert p_value(edge) == pytest.approx(0.05)


def test_differences_above_zero_are_counted_against_chance():
    above, below = mean_interval([1.0, 1.1, 0.9, 1.0]), mean_interval([-1.0, -1.1, -0.9, -1.0])
    own, both = "own proposal", "both proposals"
    pairs = {("a", "gaussian", own): {"vae": above, "iaf": above}}
    pairs |= {("a", "gaussian", both): {"vae": below}, ("b", "gaussian", own): {"vae": below}}
    pairs |= {("c", "gaussian", own): {"vae": Interval(1.0, math.nan, math.nan, 1)}}
    note = chance_note(pairs)
    assert "in 2 lines by each proposal, of which 0.1 would" in note  # one seed gives no interval
    p = p_value(above)
    assert note.endswith(f"lines): a (gaussian, own proposal) p = {p:.2g}, corrected {2 * p:.2g}.")
    assert chance_note({}).endswith("lines): none.")
