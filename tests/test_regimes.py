"""GPVAE against the VAE where one option changes, from rows whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import regimes
from gpvae.errors import DataError
from gpvae.stats import Interval
from gpvae.variations import NOISELESS

VALUES = np.array([1.0, 2.0, 3.0, 5.0])
RANDOM = {"relative_f_var": np.array([0.1, 0.3, 0.2, 0.4])}


def plan(**options):
    return gpvae.Profile(
        "t", gpvae.RunConfig(), seeds=(0, 1, 2), outputs=("gaussian", "bernoulli"), **options
    )


def test_a_regime_is_compared_with_the_vae_of_the_same_setting(project_root):
    """Dimension 2: both methods are 4 nats worse, and equal."""
    dims = [{"model.latent_dim": dim} for dim in (2, 10)]
    settings = tuple({"model.encoder": e, **d} for e in ("vae", "gpvae") for d in dims)
    settings += ({"model.encoder": "gpvae", "model.gp.features": 7, **dims[0]},)
    profile = plan(variations={"latent-dim": settings})
    rows = [
        fake_row(e, seed, VALUES - loss + 0.01 * seed * (e == "gpvae"), **{"model.latent_dim": d})
        for e in ("vae", "gpvae")
        for d, loss in ((2, 4.0), (10, 0.0))
        for seed in range(3)
    ]
    rows += [
        fake_row("gpvae", seed, VALUES, **{"model.latent_dim": 2, "model.gp.features": 7})
        for seed in range(3)
    ]
    found = regimes.regime(profile, store_rows("t", rows), rows, "latent-dim")
    labels = ["latent_dim = 2", "latent_dim = 10", "features = 7, latent_dim = 2"]
    assert [setting.label for setting in found] == labels
    assert [setting.difference.value for setting in found] == pytest.approx([0.01, 0.01, 4.0])


def setting(value, n=3, **changes):
    """A setting of GPVAE with an interval of one nat to each side."""
    config = gpvae.RunConfig().override({"model.encoder": "gpvae", **changes})
    return regimes.Setting(changes, config, Interval(value, value - 1, value + 1, n))


def test_a_setting_of_several_variations_counts_once_and_the_control_not_at_all():
    usual, equal = setting(2.0), setting(2.0, **{"model.gp.features": 7})
    less, lone = setting(-3.0, **{"model.gp.rank": 2}), setting(9.0, 1, **{"model.gp.rank": 3})
    control = setting(5.0, **{"model.gp.temperature": 0.0})
    text = regimes.count({"a": [usual, equal], "b": [usual, less, lone, control]})
    assert text.startswith("3 different settings")
    assert "2 intervals lie above zero and 1 below" in text and "2 means are positive" in text
    assert regimes.count({"a": [lone]}).startswith("0 different settings")
    table = regimes.table({"b": [less, control]}, (0, 1, 2, 3))
    assert list(table.setting) == ["rank = 2", "temperature = 0.0 (control)"]
    assert list(table.seeds) == ["3 of 4"] * 2


def test_an_interval_that_ends_at_zero_is_neither_above_nor_below():
    ends = ((0.01, 0.03), (-0.03, -0.01), (0.0, 0.02), (-0.02, 0.0))
    settings = [
        replace(setting(0.0, **{"model.gp.rank": rank}), difference=Interval(sum(at) / 2, *at, 2))
        for rank, at in enumerate(ends, 1)
    ]
    text = regimes.sentence("rank", settings)
    assert text.endswith(
        "+0.02 [+0.01, +0.03] nats; above the VAE at rank = 1; below it at rank = 2"
    )
    text = regimes.count({"rank": settings})
    assert "1 interval lies above zero and 1 below" in text and "2 means are positive" in text
    no_gain = replace(settings[0], difference=Interval(0.0, -0.5, 0.5, 2))
    assert "0 means are positive" in regimes.count({"rank": [no_gain]})


def test_only_variations_of_gpvae_are_regimes():
    """IAF's flows, searches and the grid of sizes are questions of their own."""
    profile = plan(
        variations={
            "tuning": ({"training.learning_rate": 1e-3},),
            "flows": ({"model.encoder": "iaf", "model.flow.steps": 2},),
            "tuning-each": tuple({"model.encoder": e} for e in ("vae", "iaf", "gpvae")),
            "scaling": ({"model.encoder": "gpvae", "data.train_size": 10},),
            "rank": ({"model.encoder": "gpvae", "model.gp.rank": 2}, {"model.encoder": "vae"}),
        }
    )
    assert regimes.names(profile) == ["rank"]
    assert len(regimes.names(gpvae.get_profile("regimes"))) == 8
    assert regimes.names(gpvae.get_profile("rivals")) == []


def test_a_setting_starts_from_what_was_chosen_for_its_encoder(project_root):
    chosen = {("gpvae", "gaussian"): {"model.gp.features": 7}}
    change = {"model.encoder": "gpvae", "model.gp.temperature": 0.5}
    profile = plan(variations={"temperature": (change,)}, settings=chosen)
    rows = [fake_row("vae", seed, VALUES) for seed in range(3)]
    rows += [
        fake_row("gpvae", s, VALUES + 1 + 0.01 * s, **change | {"model.gp.features": 7})
        for s in range(3)
    ]
    (found,) = regimes.regime(profile, store_rows("t", rows), rows, "temperature")
    assert found.config.model.gp.features == 7 and found.difference.n == 3


def test_scaling_slopes_find_the_exponents_of_each_seed():
    """M^(1 + 0.1 seed) at each N; N^-1 up to 250 and none after it, for the M that both have."""
    level = {100: 1 / 100, 250: 1 / 250, 600: 1 / 250}
    runs = [
        (m, n, seed, 0.3 * m ** (1.0 + 0.1 * seed) * level[n])
        for seed in (0, 1)
        for n, ms in ((100, (20, 100)), (250, (20, 100, 400)), (600, (400,)))
        for m in ms
    ]
    lone = [(20, 100, 2, 0.5)]  # decides nothing
    shares = pd.DataFrame(runs + lone, columns=["M", "N", "seed", "share"])
    slopes = regimes.scaling_slopes(shares)
    assert list(slopes) == ["M", "N, 100 to 250", "N, 250 to 600"]
    assert slopes["M"].value == pytest.approx(1.05) and slopes["M"].n == 2
    for name, value in (("N, 100 to 250", -1.0), ("N, 250 to 600", 0.0)):
        assert slopes[name][:3] == pytest.approx((value,) * 3, abs=1e-9)
    assert regimes.scaling_slopes(shares[-1:]) == {}


def test_scaling_table():
    runs = [(20, 100, 0, 0.1), (20, 100, 1, 0.3), (400, 100, 0, 0.5), (20, 250, 0, 1.0)]
    table = regimes.scaling_table(pd.DataFrame(runs, columns=["M", "N", "seed", "share"]))
    assert list(table.columns) == ["training images N", "M = 20", "M = 400"]
    assert table.to_numpy().tolist() == [
        [100, "0.2000 (2 runs)", "0.5000 (1 runs)"],
        [250, "1.0000 (1 runs)", "missing"],
    ]


def test_widths_come_from_profiles_of_their_own(project_root):
    values = {"regimes": 0.5, "regimes/small": 2.0, "regimes/large": -1.0}
    for name, gain in values.items():
        runs = gpvae.get_profile(name).runs("gaussian")
        rows = [
            fake_row(r.model.encoder, r.seed, VALUES + gain * (r.model.encoder == "gpvae"))
            | {"config": r.to_dict()}
            for r in runs
        ]
        store = store_rows(name, rows)
        if name == "regimes":
            own = rows, store
    found = regimes.widths(gpvae.get_profile("regimes"), own[1], own[0])
    assert {setting.label: setting.difference.value for setting in found} == pytest.approx(
        {"hidden = 20": 2.0, "hidden = 100-100": 0.5, "hidden = 400-400": -1.0}
    )
    store_rows("regimes/large", [row | {"code_hash": "other"} for row in rows])
    with pytest.raises(DataError, match="code_hash"):
        regimes.widths(gpvae.get_profile("regimes"), own[1], own[0])


def test_regimes_are_told_apart_and_summed_up(project_root):
    settings = tuple({"model.encoder": "gpvae", "model.gp.features": m} for m in (100, 7))
    profile = plan(variations={"features": settings})
    rows = [fake_row("vae", seed, VALUES) for seed in range(3)]
    rows += [fake_row("gpvae", seed, VALUES - 1 - 0.01 * seed) for seed in range(3)]
    rows += [
        fake_row("gpvae", seed, VALUES + 2 + 0.01 * seed, **{"model.gp.features": 7})
        for seed in range(3)
    ]
    store = store_rows("t", rows, **RANDOM)
    found = regimes.regime(profile, store, rows, "features")
    assert [setting.label for setting in found] == ["features = 100", "features = 7"]
    assert [setting.difference.value for setting in found] == pytest.approx([-1.01, 2.01])
    sentence = regimes.sentence("features", found)
    assert "best at features = 7" in sentence
    assert "above the VAE at features = 7; below it at features = 100" in sentence
    noise = regimes.shares(profile, store, rows, "features")
    assert noise == {"features = 100": pytest.approx(0.25), "features = 7": pytest.approx(0.25)}
    assert regimes.shares(profile, store, rows, "initial-std") == {}
    shares = regimes.noise_shares(profile, store, rows)
    assert sorted(set(shares[["M", "N"]].itertuples(index=False, name=None))) == [
        (7, 100),
        (100, 100),
    ]
    assert shares.share.tolist() == pytest.approx([0.25] * len(shares))


def test_the_worth_of_the_noise_is_measured_against_the_same_encoder(project_root):
    key = "model.gp.temperature"
    each = [{"model.encoder": "gpvae", key: t} for t in (1.0, 0.0)]
    profile = plan(variations={"temperature": (NOISELESS, *each)})
    rows = [
        fake_row("gpvae", seed, VALUES + gain + 0.01 * seed * (gain < 3), **changes)
        for changes, gain in ((each[0], 3.0), (each[1], 2.0), (NOISELESS, 1.0))
        for seed in range(3)
    ]
    store = store_rows("t", rows, **RANDOM)
    worth = regimes.worth_of_noise(profile, store, rows)
    less, none = "temperature = 0.0", "temperature = 0.0, initial_std = 1e-06"
    assert worth[less].value == pytest.approx(0.99) and worth[less].n == 3
    assert worth[none].value == pytest.approx(1.99) and worth[none].n == 3
    sentence = regimes.worth_sentence(profile, store, rows)
    assert "+0.99 [+0.97, +1.01] nats to temperature = 0.0 (3 seeds)" in sentence
    assert sentence.endswith("; 2.5e-01 at temperature = 0.0.")
    assert list(regimes.worth_of_noise(profile, store, rows[:6])) == [less]
    assert regimes.worth_of_noise(profile, store, rows[:3]) == {}  # no run without noise
    assert regimes.worth_of_noise(profile, store, rows[3:]) == {}  # nothing to compare with
    assert regimes.worth_of_noise(plan(), store, rows) == {}
    assert regimes.worth_sentence(plan(), store, rows) == ""
