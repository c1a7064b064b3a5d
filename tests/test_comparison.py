"""Ranks over data sets, fronts, calibration and outliers from numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import comparison
from gpvae.analysis import calibration, outlier_table
from gpvae.results import Results
from gpvae.stats import Interval, auroc


def block(**values):
    return values


def test_ranks_and_critical_difference_of_a_worked_example():
    """Five methods, ten blocks: Nemenyi's q is 2.728 (Demsar, 2006, table 5)."""
    methods = ("vae", "gpvae", "iaf", "hf", "me")
    best_first = {
        f"b{i}": dict(zip(methods, (5.0, 4.0, 3.0, 2.0, 1.0), strict=True)) for i in range(10)
    }
    found = comparison.ranking(best_first)
    assert found.ranks == {"vae": 1, "gpvae": 2, "iaf": 3, "hf": 4, "me": 5}
    assert found.difference == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 10)), abs=2e-3)
    assert found.blocks == 10 and found.p < 1e-6
    assert found.equals("gpvae") == ["vae", "iaf"]  # 1 apart; the others are 2 or more


def test_only_methods_of_every_block_are_ranked():
    blocks = {
        "a": block(vae=1.0, gpvae=2.0, iaf=3.0, hf=4.0),
        "b": block(vae=1.0, gpvae=3.0, iaf=2.0),
    }
    assert comparison.ranking(blocks).ranks == {"gpvae": 1.5, "iaf": 1.5, "vae": 3.0}
    assert comparison.ranking({"a": blocks["a"]}) is None
    assert comparison.ranking({}) is None
    assert comparison.ranking({"a": block(vae=1.0), "b": block(vae=1.0)}) is None


def test_front_keeps_what_nothing_beats_in_both():
    def at(cost, gain):
        return cost, Interval(gain, gain, gain, 3)

    points = {"svi": at(100, 2.0), "vae": at(1, 0.0), "iaf": at(3, -1.0), "me": at(2, 1.0)}
    assert comparison.front(points) == ["vae", "me", "svi"]
    assert comparison.front({"vae": at(1, 0.0), "me": at(1, 0.5)}) == ["me"]
    assert comparison.front({}) == []


def bench_row(case, ratio, device="cpu"):
    return {"section": "inference", "case": case, "ratio": ratio, "facts": {"device": device}}


def test_costs_are_those_of_one_image_on_one_device():
    rows = [
        bench_row("vae, batch 1", 1.0),
        bench_row("iaf4, batch 1", 3.0),
        bench_row("iaf4, batch 1000", 9.0),
        bench_row("iaf4, batch 1", 7.0, "gpu"),
        bench_row("svi, batch 1", None),
        bench_row("vae, batch 1", 1.0) | {"section": "training"},
    ]
    assert comparison.devices(rows) == ["cpu", "gpu"]
    assert comparison.costs(rows, "cpu") == {"vae": 1.0, "iaf4": 3.0}
    assert comparison.costs(rows, "gpu") == {"iaf4": 7.0}


def test_bounds_go_with_the_cost_of_their_number_of_steps(project_root):
    rows = {e: [fake_row(e, s, [1.0 + (e == "iaf"), 2.0]) for s in (0, 1)] for e in ("vae", "iaf")}
    store = store_rows("t", [*rows["vae"], *rows["iaf"]])
    steps = gpvae.RunConfig().model.flow.steps
    found = comparison.bounds_and_costs(store, rows, {"vae": 1.0, f"iaf{steps}": 4.0})
    assert found["iaf"][0] == 4.0 and found["iaf"][1].value == pytest.approx(0.5)
    assert "iaf" not in comparison.bounds_and_costs(store, rows, {"vae": 1.0, "iaf99": 4.0})


def test_a_method_without_all_seeds_is_left_out_of_a_block(project_root):
    profile = gpvae.get_profile("rivals")
    runs = {run.name: run for run in profile.runs("gaussian")}
    rows = [
        fake_row(run.model.encoder, run.seed, [1.0, 2.0]) | {"config": run.to_dict()}
        for run in runs.values()
        if run.model.encoder in ("vae", "gpvae") or (run.model.encoder == "iaf" and run.seed == 0)
    ]
    store_rows("rivals", [row | {"config_hash": "", "finished": 1.0} for row in rows])
    found = comparison.blocks([profile], "log_likelihood")
    assert {name: set(methods) for name, methods in found.items()} == {
        "digits, gaussian": {"vae", "gpvae"}
    }


def test_auroc():
    assert auroc(np.array([1, 2]), np.array([3, 4])) == 1
    assert auroc(np.array([3, 4]), np.array([1, 2])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx(2.5 / 4)


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


def test_calibration_groups_images_by_what_is_expected(project_root):
    expected = np.array([0.3, 0.1, 0.4, 0.2])
    rows = [fake_row("gpvae", s, [1.0, 2.0, 3.0, 4.0]) for s in (0, 1)]
    store = store_rows("t", rows, expected_gap=expected)
    a = store.arrays(rows[0])
    gap = a["elbo_optimised"] - a["elbo"]
    centres, observed = calibration(store, rows, bins=2)
    np.testing.assert_allclose(centres, [0.15, 0.35])
    assert observed[0].value == pytest.approx(gap[[1, 3]].mean())
    assert observed[1].value == pytest.approx(gap[[0, 2]].mean())
    none = calibration(store_rows("u", rows), rows, bins=2)
    assert np.isnan(none[0]).all() and none[1][0].n == 0
