"""Gaps, selective refinement and step counts from rows whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae.analysis import (
    SCORE,
    Refinement,
    budget_table,
    by_step_count,
    calibration_table,
    convergence_table,
    decomposition,
    decompositions,
    gap_table,
    late_rise,
    noise_share,
    per_image,
    rank_correlations,
    refinement_table,
    search_table,
    step_differences,
    step_table,
)
from gpvae.profiles import VALIDATION


@pytest.fixture
def plan():
    return gpvae.Profile(
        "t",
        gpvae.RunConfig(),
        encoders=("vae", "iaf"),
        seeds=(0, 1),
        outputs=("gaussian",),
        variations={
            "steps": (
                {"model.encoder": "iaf", "model.flow.steps": 4},
                {"model.encoder": "iaf", "model.flow.steps": 1},
                {"model.encoder": "me", "model.mixture.components": 2},
            )
        },
    )


def history(*bounds):
    """Bounds measured every ten epochs."""
    return [{"epoch": 10 * i, "valid_elbo": bound} for i, bound in enumerate(bounds, 1)]


@pytest.mark.parametrize(
    ("bounds", "rise"),
    [
        ((-9.0, -5.0, -4.0, -4.0, -1.5), 2.5),  # 50 epochs: the bound at 40 is the last early one
        ((-9.0, -5.0, -1.0, -2.0, -1.5), 0.0),  # the best checkpoint is an early one: flat
        ((-9.0, -1.0, -4.0, -4.0, -0.5), 0.5),  # a dip is not made good for twice
        ((-9.0,), math.nan),
    ],
)
def test_late_rise_is_that_of_the_best_bound_in_the_last_fifth(bounds, rise):
    assert late_rise(history(*bounds)) == pytest.approx(rise, nan_ok=True)


def test_convergence_tells_runs_that_ended_from_runs_that_were_stopped(project_root, plan):
    rising = {"history": history(-9, -5, -4, -3, -1), "epochs": 50, "best_epoch": 50}
    flat = {"history": history(-9, -2, -1, -2, -3), "epochs": 50, "best_epoch": 30}
    once = {"history": history(-9), "epochs": 10, "best_epoch": 10}
    rows = [
        fake_row("vae", 0, [1.0], row=rising),
        fake_row("vae", 1, [1.0], row=flat),
        fake_row("iaf", 0, [1.0], row=once),
    ]
    store_rows("t", rows)
    with_svi = replace(plan, encoders=("vae", "svi", "iaf"))
    table = convergence_table(with_svi, rows).set_index("method")
    assert list(table.index) == ["VAE", "IAF"]
    assert table.loc["VAE", "rise in the last fifth"] == "1.00 [-11.71, 13.71]"  # t(1) = 12.71
    assert list(table["best epoch"]) == ["30 to 50", "10"]
    assert list(table["best epoch is the last"]) == ["1 of 2", "1 of 1"]
    assert table.loc["IAF", "rise in the last fifth"] == "missing"


def test_gaps_add_up_and_may_be_negative(project_root, plan):
    better = {"elbo": {"mean": 1.45}}  # the best diagonal Gaussian reaches 1.3, log p(x) is 1.6
    rows = [
        fake_row("vae", 0, [1.0, 2.0]),
        fake_row("vae", 1, [2.0, 4.0]),
        fake_row("iaf", 0, [1.0, 2.0], row=better),
    ]
    store = store_rows("t", rows)
    gaps = decompositions(plan, store, rows)
    vae, iaf = gaps["gaussian"]["vae"], gaps["gaussian"]["iaf"]
    assert vae.log_px.value == pytest.approx(2.35) and vae.elbo.value == pytest.approx(1.75)
    assert vae.approximation.value == pytest.approx(0.3)
    assert vae.amortization.value == pytest.approx(0.3)
    assert vae.inference[:3] == pytest.approx((0.6, 0.6, 0.6))
    assert (vae.unconverged, vae.images) == (2, 4)
    assert iaf.amortization.value == pytest.approx(-0.15)
    assert iaf.inference.value == pytest.approx(iaf.approximation.value - 0.15)
    table = gap_table(plan, gaps, rows).set_index("method")
    assert table.loc["VAE", "inference gap"] == "0.60 [0.60, 0.60]"
    assert table.loc["IAF", "amortization gap"] == "-0.15 (one seed)"
    assert list(table.seeds) == ["2 of 2", "1 of 2 (missing: 1)"]
    assert list(table["images not converged"]) == ["2 of 4", "1 of 2"]


def test_rows_without_gaps_are_missing_not_zero(project_root, plan):
    row = {k: v for k, v in fake_row("vae", 0, [1.0]).items() if k != "log_px"}
    store = store_rows("t", [row])
    assert decomposition(store, [row]).images == 0
    table = gap_table(plan, decompositions(plan, store, [row]), [row]).set_index("method")
    assert (table.drop(columns=["output", "seeds"]) == "missing").all(axis=None)


def test_noise_share_of_a_gap_that_is_noise_is_one(project_root):
    rng = np.random.default_rng(0)
    rows = [fake_row("gpvae", s, np.zeros(40_000)) for s in (0, 1)]
    gap = rng.normal(scale=5.0, size=40_000)
    same, none = np.full(40_000, 3.0), np.full(40_000, 4.0)
    bounds = {"elbo": np.zeros(40_000), "elbo_optimised": gap}
    store = store_rows("t", rows, **bounds, elbo_stderr=same, elbo_optimised_stderr=none)
    assert noise_share(store, rows) == pytest.approx(1.0, abs=0.03)
    assert np.isnan(noise_share(store, []))


def refined(seed, score, count=4):
    """A row of GPVAE whose image i gains i / 10 in the first step and as much in the second."""
    steps = np.array([0.0, 1.0, 2.0])
    bounds = np.array([-1.0] * count) + steps[:, None] * np.arange(count) / 10
    arrays = {"refine_steps": steps, "refine_bounds": bounds, "refine_ranking": bounds}
    row = fake_row("gpvae", seed, np.zeros(count))
    store = store_rows("t", [row], **arrays, **{SCORE: np.asarray(score, float)})
    return store, row


def test_a_score_that_knows_the_gain_is_the_oracle_and_its_reverse_loses(project_root):
    store, good = refined(0, [0, 1, 2, 3])
    _, bad = refined(1, [3, 2, 1, 0])
    best, worst = Refinement(store, [good]), Refinement(store, [bad])
    assert best.choices == {"1 step": 1, "2 steps": 2}
    for each in best.choices.values():
        assert best.areas(SCORE, each) == best.areas("oracle", each)
        assert best.difference(SCORE, "random", each).value > 0
        assert worst.difference(SCORE, "random", each).value < 0
        assert best.areas("none", each) == [0.0]
    # Half of the budget of one step: the two images that gain most, of a total of 0.6 / 4.
    assert best.gains(SCORE, 1, 0.5) == pytest.approx([0.5 / 4])
    assert best.gains("random", 1, 0.5) == pytest.approx([0.3 / 4])
    # Each step gains as much as the one before: two steps for the best image, or one for two.
    steps, gain = best.best_use(SCORE, 0.5)
    assert (steps, gain.value) == (2, pytest.approx(0.6 / 4))
    assert best.best_use("uniform", 0.5) is None
    assert best.best_use("uniform", 2.0)[0] == 2 and best.best_use(SCORE, 2.0)[0] == 2
    table = budget_table({"gaussian": best}, (0.5, 1.0))
    assert list(table["steps per image"]) == ["0.5"] * 3 + ["1"] * 4
    assert list(table.policy[:3]) == ["Var f / E h²", "random", "−ELBO"]  # whose bounds are equal
    assert best.best(1) == [SCORE]
    assert worst.best(1) == ["uniform", "random"]  # the same where everybody gets one step


def test_refinement_is_averaged_over_seeds_and_tabulated(project_root):
    store, good = refined(0, [0, 1, 2, 3])
    _, bad = refined(1, [3, 2, 1, 0])
    both = Refinement(store, [good, bad])
    cost, bound = both.curve(SCORE, 1)
    np.testing.assert_allclose(cost, np.linspace(0, 1, 5))
    np.testing.assert_allclose(bound, both.curve("random", 1)[1])  # the two scores cancel
    table = refinement_table({"gaussian": both})
    assert list(table.columns[:3]) == ["output", "a selected image gets", "policy"]
    assert len(table) == 2 * 8
    difference = table[table.policy == "Var f / E h² − (−ELBO)"].iloc[:, -1]
    assert all(text.startswith(("+", "-")) for text in difference)


def test_a_model_without_a_recorded_study_has_no_refinement(project_root):
    row = fake_row("vae", 0, [1.0])
    refinement = Refinement(store_rows("t", [row]), [row])
    assert refinement.studies == [] and refinement.choices == {}


def test_step_counts_are_read_from_the_configuration():
    config = gpvae.RunConfig().override(**{"model.encoder": "iaf", "model.flow.steps": 8})
    assert config.model.count == 8
    assert config.override(**{"model.importance_samples": 5}).model.count == 8
    assert gpvae.RunConfig().model.count is None


def test_steps_are_compared_with_the_baseline(project_root, plan):
    base = [fake_row("vae", seed, [1.0, 2.0]) for seed in (0, 1)]
    few = [fake_row("iaf", seed, [1.5, 2.5], **{"model.flow.steps": 1}) for seed in (0, 1)]
    more = [fake_row("iaf", 0, [2.0, 3.0], **{"model.flow.steps": 4})]
    store = store_rows("t", [*base, *few, *more])
    found = by_step_count(plan, [*more, *few])
    assert {encoder: list(counts) for encoder, counts in found.items()} == {
        "iaf": [1, 4],
        "me": [2],
    }
    curves = step_differences(plan, store, [*more, *few], base, "log_likelihood")
    assert curves["iaf"][1][:3] == pytest.approx((0.5, 0.5, 0.5))
    assert curves["iaf"][4].value == pytest.approx(1.0) and curves["iaf"][4].n == 1
    assert curves["me"][2].n == 0
    table = step_table(plan, store, [*more, *few], base).set_index("T, K or M")
    assert table.loc["K = 1", "difference to VAE, own"] == "+0.50 [+0.50, +0.50]"
    assert table.loc["K = 4", "difference to VAE, neutral"] == "+1.00 (one seed)"
    assert (table.loc["M = 2"].drop("method") == "missing").all()


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


def test_calibration_table(project_root):
    plan = gpvae.Profile("t", gpvae.RunConfig(), seeds=(0, 1, 2))
    rows = [fake_row("gpvae", s, [1.0, 2.0, 3.0, 4.0]) for s in (0, 1)]
    arrays = {"elbo": np.zeros(4), "elbo_optimised": np.array([8.0, 16.0, 24.0, 32.0])}
    store = store_rows("t", rows, **arrays, expected_gap=np.array([0.1, 0.2, 0.3, 0.4]))
    gaussian, bernoulli = calibration_table(plan, store, rows).to_dict("records")
    assert gaussian["observed gap / (2 × expected gap)"] == "40 [40, 40]"
    assert gaussian["seeds"] == "2 of 3 (missing: 2)"
    assert set(bernoulli.values()) == {"bernoulli", "missing"}


def test_search_table_names_the_choice_the_failures_and_what_is_missing(project_root):
    rate = "training.learning_rate"
    tried = [{"model.encoder": "vae", rate: r, "training.epochs": 7} for r in (1e-4, 1e-3, 1e-2)]
    tried += [{"model.encoder": "iaf", "model.flow.hidden": h} for h in (100, 7)]
    tried += [{"model.encoder": "me", "model.mixture.components": 2}]
    candidates = tuple(changes | VALIDATION for changes in tried)
    base = gpvae.RunConfig()
    plan = gpvae.Profile("t", base, seeds=(0,), variations={"tuning-each": candidates})
    runs = plan.variation("tuning-each")
    bounds = [-3.0, None, -2.0, -1.0, -1.0, None]
    rows = [
        fake_row("vae", 0, [1.0]) | {"name": run.name, "valid_elbo": bound}
        for run, bound in zip(runs, bounds, strict=True)
        if bound is not None
    ]
    vae, iaf, me = search_table(plan, rows, {runs[1].name}).to_dict("records")
    assert (vae["candidates"], vae["measured"], vae["failed"]) == (3, 2, 1)
    assert (vae["varied"], vae["epochs"]) == ("learning_rate", "7")
    assert vae["chosen"] == "learning_rate = 0.01" and vae["its validation ELBO"] == "-2.00"
    assert iaf["chosen"] == "as it was"  # of two equal ones the one that changes nothing
    assert me["chosen"] == me["its validation ELBO"] == "missing" and me["measured"] == 0
