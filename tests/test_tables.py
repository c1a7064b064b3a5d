"""Intervals against references and known cases; tables that say what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

import gpvae
from gpvae.errors import DataError
from gpvae.results import Results
from gpvae.stats import Interval, mean_interval, paired_interval, spearman_interval
from gpvae.tables import benchmark_table, check_one_version, format_interval, select, to_markdown


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
    assert math.isnan(spearman_interval(x, np.ones(300)).value)


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


def fake_row(encoder, seed, value, output="gaussian", **extra):
    config = gpvae.RunConfig().override(**{"model.encoder": encoder, "model.output": output})
    config = config.override(seed=seed)
    estimate = {"mean": value, "stderr": 0.1, "samples": 5, "n": 3}
    return {
        "name": config.name,
        "key": "k",
        "config": config.to_dict(),
        "seed": seed,
        "code_hash": "c",
        "data_hash": "d",
        "seconds": {"train": 1.0},
        "elbo": estimate,
        "log_likelihood": estimate,
        "log_likelihood_neutral": estimate,
        "elbo_optimised": estimate,
        **extra,
    }


@pytest.fixture
def stored(project_root):
    store = Results("t")

    def add(row, values):
        arrays = {
            name: np.array(values) for name in ("log_likelihood", "log_likelihood_neutral", "elbo")
        }
        store.append(row, arrays)
        return row

    add(fake_row("vae", 0, 1.0), [0.0, 1.0, 2.0])
    add(fake_row("vae", 1, 2.0), [1.0, 2.0, 3.0])
    add(fake_row("gpvae", 1, 2.5), [1.5, 2.5, 3.5])
    add(fake_row("gpvae", 0, 1.5), [0.5, 1.5, 2.5])
    return store


def test_benchmark_table_from_known_rows(stored):
    profile = gpvae.Profile("t", gpvae.RunConfig(), seeds=(0, 1, 2), outputs=("gaussian",))
    table = benchmark_table(profile, stored, stored.rows()).set_index("method")
    assert list(table.seeds) == ["2 of 3", "2 of 3"]
    column = "difference to VAE, own"
    assert table.loc["GPVAE", column] == "+0.50 [+0.50, +0.50]"
    assert table.loc["VAE", column] == "-"
    assert table.loc["VAE", "log p(x), own proposal"].startswith("1.50 [")


def test_missing_method_prints_missing(stored):
    profile = gpvae.Profile("t", gpvae.RunConfig(), outputs=("gaussian", "bernoulli"))
    table = benchmark_table(profile, stored, stored.rows())
    missing = table[table.output == "bernoulli"]
    assert (missing["log p(x), own proposal"] == "missing").all()
    assert (missing.seeds == "0 of 5").all()
    assert missing["difference to VAE, own"].tolist() == ["-", "missing"]


def test_rows_of_different_versions_are_refused(stored):
    rows = stored.rows()
    check_one_version(rows)
    with pytest.raises(DataError, match="code_hash"):
        check_one_version([*rows, fake_row("vae", 2, 1.0, code_hash="other")])
    with pytest.raises(DataError, match="data_hash"):
        check_one_version([*rows, fake_row("vae", 2, 1.0, data_hash="other")])


def test_select_sorts_by_seed(stored):
    assert [row["seed"] for row in select(stored.rows(), encoder="gpvae")] == [0, 1]


def test_formatting():
    assert format_interval(Interval(1.234, 1.0, 1.5, 5)) == "1.23 [1.00, 1.50]"
    assert format_interval(Interval(0.5, -1.0, 2.0, 5), "+") == "+0.50 [-1.00, +2.00]"
    assert format_interval(mean_interval([])) == "missing"
    assert format_interval(mean_interval([3.0])) == "3.00 (one seed)"


def test_markdown():
    import pandas as pd

    text = to_markdown(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    assert text == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"
