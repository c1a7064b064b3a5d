"""Intervals against references and known cases; tables that say what is missing."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from rows import fake_row, store_rows
from scipy import stats as scipy_stats

import gpvae
from gpvae import paths
from gpvae.errors import ConfigError, DataError
from gpvae.stats import Interval, mean_interval, paired_interval, spearman, spearman_interval
from gpvae.tables import (
    benchmark_table,
    by_encoder,
    check_one_version,
    differences,
    format_interval,
    format_range,
    format_seeds,
    image_error,
    least,
    mean_of,
    mean_ranks,
    paired,
    save_rows,
    save_table,
    select,
    to_markdown,
    verdict,
)


def test_mean_interval_against_scipy():
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    assert mean_interval(values) == pytest.approx((2.375, low, high, 4))


def test_mean_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    inside = [i.low < 0 < i.high for i in map(mean_interval, draws)]
    assert 0.94 < np.mean(inside) < 0.96


def test_pairing_removes_what_methods_share():
    generator = np.random.default_rng(0)
    images, seeds = generator.normal(scale=50, size=200), generator.normal(scale=20, size=5)
    b = [images + s for s in seeds]
    a = [v + 1 + generator.normal(scale=0.1, size=200) for v in b]
    interval = paired_interval(a, b)
    assert interval.low < 1 < interval.high
    assert interval.high - interval.low < 0.1
    with pytest.raises(ValueError, match="5 seeds"):
        paired_interval(a, b[:4])
    with pytest.raises(ValueError, match="200 images"):
        paired_interval(a, [v[:9] for v in b])


def test_spearman_against_scipy_and_its_limits():
    generator = np.random.default_rng(0)
    x = generator.normal(size=300)
    y = x + generator.normal(size=300)
    interval = spearman_interval(x, y)
    assert interval.value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low < 0.2
    assert spearman_interval(x, np.exp(x)).value == pytest.approx(1)
    assert spearman_interval(x, -x).value == pytest.approx(-1)
    assert spearman(x, y) == interval.value
    assert math.isnan(spearman(x, np.ones(300)))


def test_spearman_bootstrap_covers():
    generator = np.random.default_rng(1)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # of a bivariate normal with correlation 0.6
    inside = []
    for i in range(200):
        x = generator.normal(size=150)
        y = 0.6 * x + 0.8 * generator.normal(size=150)
        interval = spearman_interval(x, y, resamples=300, seed=i)
        inside.append(interval.low < truth < interval.high)
    assert np.mean(inside) > 0.9


@pytest.fixture
def stored(project_root):
    """Two seeds of the VAE and of GPVAE, which is half a nat better on every image."""
    return store_rows(
        "t",
        [
            fake_row("vae", 0, [0.0, 1.0, 2.0], seconds=2.0),
            fake_row("vae", 1, [1.0, 2.0, 3.0], seconds=4.0),
            fake_row("gpvae", 1, [1.5, 2.5, 3.5], seconds=6.0, epochs=80),
            fake_row("gpvae", 0, [0.5, 1.5, 2.5], seconds=6.0, epochs=60),
        ],
    )


def plan(**changes):
    """A profile with the rows of `stored` among its runs."""
    return gpvae.Profile("t", gpvae.RunConfig(), **{"outputs": ("gaussian",), **changes})


def test_benchmark_table_from_known_rows(stored):
    table = benchmark_table(plan(seeds=(0, 1)), stored, stored.rows()).set_index("method")
    assert list(table.seeds) == ["2 of 2", "2 of 2"]
    for column in (f"difference to VAE, {word}" for word in ("own", "neutral", "both")):
        assert table.loc["GPVAE", column] == "+0.50 [+0.50, +0.50]"
        assert table.loc["VAE", column] == "-"
    best = table["difference to the best other, own"]
    assert list(best) == ["GPVAE: -0.50 [-0.50, -0.50]", "VAE: +0.50 [+0.50, +0.50]"]
    assert table.loc["VAE", "log p(x), own proposal"].startswith("1.50 [")
    assert table.loc["GPVAE", "amortization gap"] == "0.30 [0.30, 0.30]"
    assert list(table["rank"]) == ["2.0 of 2", "1.0 of 2"]
    assert list(table.epochs) == ["70", "60 to 80"]
    assert list(table.parameters) == ["10", "10"]


def test_missing_method_and_seed_print_missing_and_nothing_is_blank(stored):
    wanted = plan(
        encoders=("vae", "gpvae", "iaf"), outputs=("gaussian", "bernoulli"), seeds=(0, 1, 2)
    )
    table = benchmark_table(wanted, stored, stored.rows())
    assert list(table.seeds[:3]) == ["2 of 3 (missing: 2)", "2 of 3 (missing: 2)", "missing"]
    absent = table[(table.output == "bernoulli") | (table.method == "IAF")]
    assert len(absent) == 4
    assert (absent.drop(columns=["output", "method"]) == "missing").all(axis=None)
    assert not table.isin(["", None, "0", "nan"]).any(axis=None)


def test_missing_baseline_leaves_the_other_columns(stored):
    rows = [row for row in stored.rows() if row["config"]["model"]["encoder"] == "gpvae"]
    table = benchmark_table(plan(seeds=(0, 1)), stored, rows).set_index("method")
    assert table.loc["GPVAE", "log p(x), own proposal"].startswith("2.00 [")
    assert list(table["difference to VAE, own"]) == ["missing", "missing"]


def test_other_numbers_of_steps_do_not_leak_into_the_main_table(project_root):
    rows = [fake_row("iaf", 0, [1.0], **{"model.flow.steps": n}) for n in (1, 4, 8)]
    rows += [fake_row("gpvae", 0, [1.0], **{"model.gp.features": n}) for n in (100, 800)]
    found = by_encoder(plan(encoders=("gpvae", "iaf"), seeds=(0, 1)), "gaussian", rows)
    assert [row["config"]["model"]["flow"]["steps"] for row in found["iaf"]] == [4]
    assert [row["config"]["model"]["gp"]["features"] for row in found["gpvae"]] == [100]


def test_pairs_are_made_of_seeds_that_both_have_measured(stored):
    vae, ours = by_encoder(plan(seeds=(0, 1)), "gaussian", stored.rows()).values()
    assert paired(stored, ours, vae[:1], "log_likelihood").n == 1
    without = [{k: v for k, v in row.items() if k != "log_likelihood_neutral"} for row in ours]
    assert paired(stored, without, vae, "log_likelihood_neutral").n == 0
    assert mean_of(without, "log_likelihood_neutral").n == 0
    assert mean_of(ours, "log_likelihood", minus="elbo").value == pytest.approx(0.5)


def test_the_best_rival_is_the_closest_over_common_seeds(project_root):
    """IAF's only seed is a lucky one of the data; HF's mean is the highest of those compared."""
    values = np.array([1.0, 3.0])
    found = {
        "gpvae": [fake_row("gpvae", seed, values + 10 * seed) for seed in (0, 1, 2)],
        "hf": [fake_row("hf", seed, values + 10 * seed - 1) for seed in (0, 1, 2)],
        "me": [fake_row("me", seed, values + 10 * seed - 2) for seed in (1, 2)],
        "iaf": [fake_row("iaf", 2, values + 20 + 5)],
        "svi": [],
    }
    store = store_rows("t", [row for rows in found.values() for row in rows])
    gains = differences(store, found, "gpvae", "log_likelihood")
    best, nearest = least(gains)
    assert (best, nearest.n) == ("hf", 3) and nearest.value == pytest.approx(1.0)
    assert set(gains) == {"hf", "me", "iaf"}
    lone = {"gpvae": found["gpvae"], "iaf": found["iaf"]}
    assert least(differences(store, lone, "gpvae", "log_likelihood"))[0] == "iaf"
    assert least(differences(store, {"gpvae": []}, "gpvae", "log_likelihood"))[0] == ""


def test_error_over_images_of_a_difference(project_root):
    """Images differ by 1 and 3 nats in the mean over seeds: std sqrt(2), of two images."""
    a = [fake_row("gpvae", seed, np.array([1.0, 3.0]) + seed) for seed in (0, 1)]
    b = [fake_row("vae", seed, np.array([0.0, 0.0]) + seed) for seed in (1, 0)]
    store = store_rows("t", a + b)
    assert image_error(store, a, b) == pytest.approx(1.0)
    assert np.isnan(image_error(store, a[:1], b[:1]))


def test_mean_ranks_are_those_of_the_methods_with_every_seed():
    rows = {
        "a": [fake_row("vae", seed, [value]) for seed, value in ((0, 1.0), (1, 5.0), (2, 9.0))],
        "b": [fake_row("vae", seed, [value]) for seed, value in ((0, 2.0), (1, 4.0))],
        "c": [fake_row("vae", seed, [value]) for seed, value in ((1, 3.0), (0, 2.0))],
        "d": [],
        "e": [fake_row("vae", 1, [9.0])],
    }
    expected = {"a": "2.0 of 3", "b": "1.8 of 3", "c": "2.2 of 3"}  # a tie shares ranks
    assert mean_ranks(rows, (0, 1)) == expected
    assert mean_ranks(rows, (2,)) == {"a": "1.0 of 1"}
    assert mean_ranks(rows, (0, 1, 2, 3)) == {}


def test_rows_and_arrays_are_kept_beside_the_tables(stored):
    rows = stored.rows()
    save_rows(rows, "t")
    folder = paths.figures("t")
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == sorted(row["name"] for row in rows)
    assert len(list((folder / "arrays").iterdir())) == len(rows)
    save_rows(rows[:1], "t")  # what no row needs any more goes
    (path,) = (folder / "arrays").iterdir()
    with np.load(path) as file:
        assert file["log_likelihood"].dtype == np.float32
        np.testing.assert_array_equal(file["log_likelihood"], [0.0, 1.0, 2.0])
        assert "valid_index" not in file


def test_a_kill_while_rows_are_written_loses_none(stored, monkeypatch):
    path = paths.figures("t") / "rows.jsonl"
    save_rows(stored.rows(), "t")
    before = path.read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_rows(stored.rows()[:1], "t")
    assert path.read_text() == before


def test_rows_of_different_versions_are_refused(stored):
    rows = stored.rows()
    check_one_version(rows)
    with pytest.raises(DataError, match="code_hash"):
        check_one_version([*rows, fake_row("vae", 2, [1.0], row={"code_hash": "other"})])
    with pytest.raises(DataError, match="data_hash"):
        check_one_version([*rows, fake_row("vae", 2, [1.0], row={"data_hash": "other"})])
    check_one_version([*rows, fake_row("iaf", 2, [1.0], row={"method_hash": "one"})])
    with pytest.raises(DataError, match="rows of the method vae have 2 different values"):
        check_one_version([*rows, fake_row("vae", 2, [1.0], row={"method_hash": "other"})])


def test_select_follows_the_runs_and_leaves_out_what_is_missing(stored):
    runs = plan(encoders=("gpvae",), seeds=(0, 3, 1)).runs()
    assert [row["seed"] for row in select(stored.rows(), runs)] == [0, 1]


def test_formatting():
    assert format_interval(Interval(1.234, 1.0, 1.5, 5)) == "1.23 [1.00, 1.50]"
    assert format_interval(Interval(0.5, -1.0, 2.0, 5), "+") == "+0.50 [-1.00, +2.00]"
    assert format_interval(mean_interval([])) == "missing"
    assert format_interval(mean_interval([3.0])) == "3.00 (one seed)"
    assert format_interval(Interval(0.5, 0.4, 0.6, 5), "+", 3) == "+0.500 [+0.400, +0.600]"
    assert [format_range(values) for values in ([3, 3], [5, 3], [])] == ["3", "3 to 5", "missing"]
    assert format_seeds([{"seed": 1}, {"seed": 2}], (0, 1, 2, 3)) == "2 of 4 (missing: 0, 3)"


def test_verdicts():
    assert verdict(Interval(1.0, 0.5, 1.5, 3)) == "above"
    assert verdict(Interval(-1.0, -1.5, -0.5, 3), below="worse") == "worse"
    assert verdict(Interval(1.0, -0.5, 1.5, 3)) == "no difference outside seed noise"
    assert verdict(mean_interval([1.0])) == "one seed, so no interval"
    assert verdict(mean_interval([])) == "missing"


def test_markdown():
    text = to_markdown(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    assert text == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"
    assert to_markdown(pd.DataFrame({"|a|": ["x"]})) == "| \\|a\\| |\n| --- |\n| x |\n"


def test_a_note_stands_below_the_markdown_table(project_root):
    save_table(pd.DataFrame({"a": [1]}), "x", "t", "p = 0.5.")
    assert (paths.figures("t") / "x.md").read_text().endswith("| 1 |\n\np = 0.5.\n")
    assert "0.5" not in (paths.figures("t") / "x.csv").read_text()


def test_a_misspelt_estimate_is_no_missing_one(project_root):
    rows = [fake_row("vae", seed, [1.0, 2.0]) for seed in range(2)]
    with pytest.raises(ConfigError, match="Did you mean 'log_likelihood'"):
        paired(store_rows("t", rows), rows, rows, "log_liklihood")
