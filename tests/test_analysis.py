"""Convergence, gaps, searches and step counts from rows whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae.analysis import (
    by_step_count,
    convergence_table,
    decomposition,
    decompositions,
    gap_table,
    hours,
    late_rise,
    search_table,
    step_differences,
    step_table,
    time_table,
)
from gpvae.variations import VALIDATION


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


def test_times_tell_devices_apart_and_what_is_missing(plan):
    rows = [fake_row("vae", 0, [1.0], seconds=3600.0), fake_row("vae", 1, [1.0], seconds=7200.0)]
    rows[1] |= {"device": "loom"}
    first, second, iaf = time_table(plan, rows).to_dict("records")
    assert (first["seeds"], first["training (s)"]) == ("0", "3600")
    assert second["on"].startswith("loom") and second["training (s)"] == "7200"
    assert iaf["on"] == iaf["seeds"] == iaf["evaluation (s)"] == "missing"
    svi = fake_row("svi", 0, [1.0], seconds=3600.0)
    evaluation = sum(row["seconds"]["evaluate"] for row in [*rows, svi])
    assert hours([*rows, svi]) == pytest.approx(3 + evaluation / 3600)
    same = gpvae.Profile("t", plan.base, encoders=("svi",), outputs=("gaussian",))
    assert time_table(same, [svi])["training (s)"].tolist() == ["as the VAE"]


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
    tried = "learning_rate: 0.0001, 0.001, 0.01"
    assert (vae["values tried"], vae["epochs"]) == (tried, "7")
    assert vae["chosen"] == "learning_rate = 0.01" and vae["its validation ELBO"] == "-2.00"
    assert iaf["chosen"] == "as it was"  # of two equal ones the one that changes nothing
    assert me["chosen"] == me["its validation ELBO"] == "missing" and me["measured"] == 0
