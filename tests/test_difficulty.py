"""Scores against gaps from rows whose answer is known: correlation, calibration, outliers."""

from __future__ import annotations

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae.difficulty import (
    calibration,
    calibration_table,
    noise_share,
    outlier_table,
    per_image,
    rank_correlations,
)
from gpvae.results import Results
from gpvae.stats import auroc


def test_auroc():
    assert auroc(np.array([1, 2]), np.array([3, 4])) == 1
    assert auroc(np.array([3, 4]), np.array([1, 2])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx(2.5 / 4)


def test_rank_correlations_are_those_of_rows_that_have_both(project_root):
    rows = [fake_row("gpvae", seed, [1.0, 2.0, 3.0, 4.0]) for seed in (0, 1)]
    gap, variance = np.array([1.0, 2.0, 4.0, 3.0]), np.array([4.0, 3.0, 2.0, 1.0])
    arrays = {"elbo": -gap, "elbo_optimised": np.zeros(4), "q_var": variance}
    store = store_rows("t", rows, **arrays)
    assert rank_correlations(store, rows, "minus_elbo") == pytest.approx([1.0, 1.0])
    assert rank_correlations(store, rows, "minus_q_var") == pytest.approx([0.8, 0.8])
    assert rank_correlations(store, rows, "f_var") == []
    with_px = per_image(store, rows[0])
    np.testing.assert_allclose(with_px["inference_gap"], with_px["log_px"] + gap)


def test_noise_share_of_a_gap_that_is_noise_is_one(project_root):
    rng = np.random.default_rng(0)
    rows = [fake_row("gpvae", s, np.zeros(40_000)) for s in (0, 1)]
    gap = rng.normal(scale=5.0, size=40_000)
    same, none = np.full(40_000, 3.0), np.full(40_000, 4.0)
    bounds = {"elbo": np.zeros(40_000), "elbo_optimised": gap}
    store = store_rows("t", rows, **bounds, elbo_stderr=same, elbo_optimised_stderr=none)
    assert noise_share(store, rows) == pytest.approx(1.0, abs=0.03)
    assert np.isnan(noise_share(store, []))


def test_calibration_groups_images_by_what_is_expected(project_root):
    expected = np.array([0.3, 0.1, 0.4, 0.2])
    rows = [fake_row("gpvae", s, [1.0, 2.0, 3.0, 4.0]) for s in (0, 1)]
    store = store_rows("t", rows, expected_gap=expected)
    a = store.arrays(rows[0])
    gap = a["elbo_optimised"] - a["elbo"]
    centres, observed = calibration(store, rows, bins=2)
    np.testing.assert_allclose(centres, [0.3, 0.7])  # two draws: twice the score
    assert observed[0].value == pytest.approx(gap[[1, 3]].mean())
    assert observed[1].value == pytest.approx(gap[[0, 2]].mean())
    none = calibration(store_rows("u", rows), rows, bins=2)
    assert np.isnan(none[0]).all() and none[1][0].n == 0


def test_calibration_table(project_root):
    plan = gpvae.Profile("t", gpvae.RunConfig(), seeds=(0, 1, 2))
    rows = [fake_row("gpvae", s, [1.0, 2.0, 3.0, 4.0]) for s in (0, 1)]
    arrays = {"elbo": np.zeros(4), "elbo_optimised": np.array([8.0, 16.0, 24.0, 32.0])}
    store = store_rows("t", rows, **arrays, expected_gap=np.array([0.1, 0.2, 0.3, 0.4]))
    gaussian, bernoulli = calibration_table(plan, store, rows).to_dict("records")
    assert gaussian["observed gap / (2 × expected gap)"] == "40 [40, 40]"
    assert gaussian["seeds"] == "2 of 3 (missing: 2)"
    assert set(bernoulli.values()) == {"bernoulli", "missing"}


def test_outliers_with_a_larger_score_or_a_smaller_bound(project_root):
    plan = gpvae.Profile("t", gpvae.RunConfig(), outputs=("gaussian",), seeds=(0, 1))
    rows = [fake_row(e, s, [1.0, 2.0]) for e in ("vae", "gpvae") for s in (0, 1)]
    bound = Results("t").arrays(store_rows("t", rows) and rows[0])["elbo"]
    more = {"outlier_elbo": bound - 10, "f_var": np.array([0.1, 0.2])}
    more |= {"outlier_f_var": np.array([0.0, 0.15])}
    store = store_rows("t", rows, **more)
    table = outlier_table(plan, store, rows).set_index("score")["AUROC"]
    assert list(table.index) == ["Var f", "−ELBO of GPVAE", "−ELBO of VAE"]
    assert table["−ELBO of VAE"].startswith("1.000") and table["Var f"].startswith("0.250")
    assert outlier_table(plan, store_rows("u", rows), rows).empty
