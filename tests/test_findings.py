"""Verdicts and sentences from rows whose numbers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import findings
from gpvae.findings import FAILS, HOLDS, IN_PART, UNKNOWN
from gpvae.stats import Interval

VALUES = np.array([1.0, 2.0, 3.0, 5.0])
FACTS = {"device": "abacus", "threads": 1, "networks": [1, 28, 28, 500, 50]}
RANDOM = {"relative_f_var": np.array([0.1, 0.3, 0.2, 0.4])}


def plan(**options):
    return gpvae.Profile(
        "t",
        gpvae.RunConfig(),
        encoders=("vae", "gpvae", "iaf"),
        seeds=(0, 1, 2),
        outputs=("gaussian", "bernoulli"),
        **options,
    )


def stored(gains):
    """Rows in which a method's log p(x) exceeds the VAE's by so much, with some seed noise."""
    rows = [
        fake_row(encoder, seed, VALUES + gain + 0.01 * seed * (gain != 0), output)
        for (encoder, output), gain in gains.items()
        for seed in range(3)
    ]
    return store_rows("t", rows, **RANDOM), rows


def every(ours, theirs):
    return {
        (encoder, output): gain
        for output, mine, his in zip(("gaussian", "bernoulli"), ours, theirs, strict=True)
        for encoder, gain in (("vae", 0.0), ("gpvae", mine), ("iaf", his))
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((1.0, 1.0), (0.5, 0.5), HOLDS),
        ((1.0, -1.0), (0.5, 0.5), IN_PART),
        ((1.0, 1.0), (2.0, 2.0), IN_PART),  # above the VAE, but not above every rival
        ((-1.0, 0.0), (0.5, 0.5), FAILS),
    ],
)
def test_likelihood_claim(project_root, ours, theirs, verdict):
    store, rows = stored(every(ours, theirs))
    found = findings.likelihood(plan(), store, rows)
    assert found.verdict == verdict
    assert len(found.evidence) == 6
    assert found.claim == "1. Likelihood: higher than that of every rival"
    assert f"GPVAE − VAE = {ours[0] + 0.01 * (ours[0] != 0):+.2f}" in found.evidence[0]
    assert f"**Verdict: {verdict}.**" in found.markdown()


@pytest.mark.parametrize("lost", [("iaf", "bernoulli"), ("gpvae", "bernoulli")])
def test_a_claim_does_not_hold_on_half_of_the_evidence(project_root, lost):
    """GPVAE wins wherever there are rows."""
    gains = {key: gain for key, gain in every((1.0, 1.0), (0.5, 0.5)).items() if key != lost}
    store, rows = stored(gains)
    found = findings.likelihood(plan(), store, rows)
    assert found.verdict == IN_PART
    name = {"iaf": "IAF", "gpvae": "GPVAE"}[lost[0]]
    assert found.evidence[-1] == f"incomplete: bernoulli, no rows of {name}"
    rows = [row for row in rows if (row["name"][:15], row["seed"]) != ("digits-gaussian", 1)]
    found = findings.likelihood(plan(), store, rows)
    assert "incomplete: gaussian, VAE 2 of 3 (missing: 1); GPVAE 2 of 3" in found.evidence[-2]


def test_nothing_is_claimed_without_rows(project_root):
    store, rows = stored({})
    for found in (
        findings.likelihood(plan(), store, rows),
        findings.difficulty(plan(), store, rows),
        findings.speed([]),
    ):
        assert found.verdict == UNKNOWN


def bench_row(case, ratio):
    return {"section": "inference", "case": case, "ratio": ratio, "facts": FACTS}


def test_speed_claim_compares_with_refinement():
    rows = [bench_row("gpvae, batch 1", 1.4), bench_row("savae4, batch 1", 12.0)]
    found = findings.speed(rows)
    assert found.verdict == HOLDS and "MLP 784-500, D = 50" in found.conditions
    assert "abacus" in found.conditions
    assert "1.40 times" in found.evidence[0] and "12.0 times" in found.evidence[0]
    other = [
        row | {"facts": FACTS | {"device": "loom"}}
        for row in (bench_row("gpvae, batch 1", 20.0), *rows[1:])
    ]
    both = findings.speed(rows + other)  # each device has ratios of its own
    assert both.verdict == IN_PART and len(both.evidence) == 2 and "loom" in both.evidence[1]
    slow = [bench_row("gpvae, batch 9", 8.0), bench_row("savae4, batch 9", 12.0)]
    assert findings.speed(rows + slow).verdict == IN_PART


def test_conditions_name_the_seeds_of_each_output_where_they_differ():
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    assert "3 seeds (gaussian), 0 seeds (bernoulli)" in findings.conditions(plan(), rows)
    rows += [fake_row("gpvae", seed, VALUES, "bernoulli") for seed in range(3)]
    assert "D = 10, 3 seeds, at most" in findings.conditions(plan(), rows)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        ([1, 3, 2, 4], IN_PART),  # the score's order, which is not that of -ELBO: better than it
        ([4, 2, 3, 1], FAILS),
    ],
)
def test_difficulty_claim(project_root, gap, verdict):
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    gap = np.array(gap, float)
    store = store_rows("t", rows, **RANDOM, elbo=VALUES, elbo_optimised=VALUES + gap)
    found = findings.difficulty(plan(), store, rows)
    assert found.verdict == (HOLDS if verdict == IN_PART else FAILS)
    sign = "+1.00" if verdict == IN_PART else "-1.00"
    assert sign in found.evidence[0]


def test_an_uncorrelated_score_gains_nothing_from_a_worse_rival(project_root):
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    gap = np.array([2.5, 2.0, 3.0, 1.0])  # order 3 2 4 1 against the score's 1 3 2 4
    arrays = {"elbo": VALUES, "elbo_optimised": VALUES + gap, "q_var": gap}
    store = store_rows("t", rows, **RANDOM, **arrays)
    found = findings.difficulty(plan(), store, rows)
    assert "amortization gap -0.80" in found.evidence[0]
    assert "the score's minus it +0.20" in found.evidence[2]
    assert found.verdict == FAILS


def test_a_score_that_a_free_one_beats_holds_in_part(project_root):
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    store = store_rows(
        "t", rows, **RANDOM, elbo=-np.array([1.0, 2.0, 3.0, 4.0]), elbo_optimised=np.zeros(4)
    )
    found = findings.difficulty(plan(), store, rows)
    assert found.verdict == IN_PART
    assert "+0.80" in found.evidence[0] and "+1.00" in found.evidence[1]
    assert "minus it -0.20" in found.evidence[1]


def test_the_encoders_precision_is_a_rival_of_the_score(project_root):
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    gap, variance = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 3.0, 2.0, 1.0])
    arrays = {"elbo": VALUES, "elbo_optimised": VALUES + gap, "q_var": variance}
    store = store_rows("t", rows, **RANDOM, **arrays)
    found = findings.difficulty(plan(), store, rows)
    assert found.verdict == IN_PART
    assert "negative encoder variance" in found.evidence[2] and "+1.00" in found.evidence[2]


def test_summary_has_a_line_for_each_output_with_rows(project_root):
    stored(every((1.0, 0.0), (0.5, 3.0)))
    gaussian, bernoulli = findings.summary([plan()]).to_dict("records")
    assert (gaussian["profile"], gaussian["output"]) == ("t", "gaussian")
    assert gaussian["seeds"] == "3 of 3" and gaussian["complete methods"] == "3 of 3"
    assert gaussian["GPVAE − VAE"].startswith("+1.01 [")
    assert bernoulli["GPVAE − best rival"].startswith("IAF -3.01 [")
    assert gaussian["correlation of the negative encoder variance"] == "missing"
    assert set(gaussian) == set(bernoulli)


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
    found = findings.regime(profile, store_rows("t", rows), rows, "latent-dim")
    assert list(found) == ["latent_dim = 2", "latent_dim = 10", "features = 7, latent_dim = 2"]
    assert [d.value for d in found.values()] == pytest.approx([0.01, 0.01, 4.0])


def test_a_setting_of_several_variations_counts_once():
    usual, other, less = (Interval(v, v - 1, v + 1, 3) for v in (2.0, 0.5, -3.0))
    one = Interval(9.0, np.nan, np.nan, 1)
    text = findings.regimes_sentence({"a": {"x": usual, "y": other}, "b": {"x": usual, "z": less}})
    assert (
        text.startswith("3 different settings") and "1 interval lies above zero and 1 below" in text
    )
    assert "2 means are positive" in text
    assert findings.regimes_sentence({"a": {"x": one}}).startswith("0 different settings")


def test_scaling_slopes_find_the_exponents_of_each_seed():
    runs = [
        (m, n, seed, 0.3 * m ** (1.0 + 0.1 * seed) / n)
        for seed in (0, 1)
        for m in (20, 100)
        for n in (100, 250)
    ]
    lone = [(20, 100, 2, 0.5)]  # decides nothing
    shares = pd.DataFrame(runs + lone, columns=["M", "N", "seed", "share"])
    slopes = findings.scaling_slopes(shares)
    assert slopes["M"].value == pytest.approx(1.05) and slopes["M"].n == 2
    assert slopes["N"].value == pytest.approx(-1.0) and slopes["N"].low == pytest.approx(-1.0)
    assert findings.scaling_slopes(shares[:1])["M"].n == 0


def test_scaling_table():
    runs = [(20, 100, 0, 0.1), (20, 100, 1, 0.3), (400, 100, 0, 0.5), (20, 250, 0, 1.0)]
    table = findings.scaling_table(pd.DataFrame(runs, columns=["M", "N", "seed", "share"]))
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
    found = findings.widths(gpvae.get_profile("regimes"), own[1], own[0])
    assert {label: d.value for label, d in found.items()} == pytest.approx(
        {"hidden = 20": 2.0, "hidden = 100-100": 0.5, "hidden = 400-400": -1.0}
    )


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
    found = findings.regime(profile, store, rows, "features")
    assert found["features = 100"].value == pytest.approx(-1.01)
    assert found["features = 7"].value == pytest.approx(2.01)
    sentence = findings.regime_sentence("features", found)
    assert "best at features = 7" in sentence
    assert "above the VAE at features = 7; below it at features = 100" in sentence
    noise = findings.noise(profile, store, rows, "features")
    assert noise == {"features = 100": pytest.approx(0.25), "features = 7": pytest.approx(0.25)}
    assert findings.noise(profile, store, rows, "initial-std") == {}
    shares = findings.noise_shares(profile, store, rows)
    assert sorted(set(shares[["M", "N"]].itertuples(index=False, name=None))) == [
        (7, 100),
        (100, 100),
    ]
    assert shares.share.tolist() == pytest.approx([0.25] * len(shares))


def test_the_worth_of_the_noise_is_measured_against_the_same_encoder(project_root):
    key = "model.gp.temperature"
    settings = tuple({"model.encoder": "gpvae", key: t} for t in (1.0, 0.0))
    profile = plan(variations={"temperature": settings})
    rows = [
        fake_row("gpvae", seed, VALUES + gain + 0.01 * seed * (t == 0), **{key: t})
        for t, gain in ((1.0, 3.0), (0.0, 2.0))
        for seed in range(3)
    ]
    store = store_rows("t", rows, **RANDOM)
    worth = findings.worth_of_noise(profile, store, rows)
    assert worth.value == pytest.approx(0.99) and worth.n == 3
    assert findings.worth_of_noise(profile, store, rows[:3]).n == 0  # no run without noise
    assert findings.worth_of_noise(plan(), store, rows).n == 0


def test_literature_says_what_each_run_had_and_what_was_not_run(project_root):
    (job,) = [c for c in gpvae.get_profile("burda").jobs() if c.model.importance_samples == 1]
    row = fake_row("vae", 0, VALUES, row={"name": job.name, "epochs": 123})
    row |= {"config": job.to_dict(), "config_hash": job.hash()}
    store_rows("burda", [row])
    least, short, long, weighted = findings.literature().to_dict("records")
    assert (short["published"], weighted["published"]) == ("-86.76", "-84.78")
    assert short["ours − published"] == "+89.51"  # 2.75 + 86.76
    assert short["epochs, ours / theirs"] == "123 / 3280"
    assert long["ours − published"] == weighted["test images"] == "missing"
    assert least["epochs, ours / theirs"] == weighted["epochs, ours / theirs"] == "60 / 3280"
    assert long["epochs, ours / theirs"] == "1640 / 3280"
