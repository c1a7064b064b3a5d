"""Verdicts and sentences from rows whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import findings, paths, tables
from gpvae.errors import DataError
from gpvae.findings import FAILS, HOLDS, IN_PART, LACKS, OPEN, UNKNOWN
from gpvae.stats import mean_interval

VALUES = np.array([1.0, 2.0, 3.0, 5.0])
FACTS = {"code_hash": "timed", "device": "abacus", "threads": 1, "networks": [1, 28, 28, 500, 50]}
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
        ((0.1, 0.1), (0.05, 0.05), HOLDS),
        ((1.0, -1.0), (0.5, 0.5), IN_PART),
        ((1.0, 1.0), (2.0, 2.0), IN_PART),  # above the VAE, but not above every rival
        ((-1.0, 0.0), (0.5, 0.5), FAILS),
    ],
)
def test_likelihood_claim(project_root, ours, theirs, verdict):
    store, rows = stored(every(ours, theirs))
    found = findings.likelihood(plan(), store, rows)
    assert found.verdict == verdict
    assert len(found.evidence) == len(found.answers) == 8  # outputs, proposals, VAE and rivals
    assert found.claim == "1. Likelihood: higher than that of every rival"
    assert f"GPVAE − VAE = {ours[0] + 0.01 * (ours[0] != 0):+.2f}" in found.evidence[0]
    assert f"**Verdict: {verdict}** (8 comparisons: " in found.markdown()


def test_every_rival_has_to_be_beaten_not_only_the_best_on_average(project_root):
    """GPVAE exceeds HF least, by a difference that seeds leave open; IAF has the higher mean."""
    profile = replace(plan(), encoders=("vae", "gpvae", "iaf", "hf"), outputs=("gaussian",))
    noise = {0: -3.0, 1: 0.0, 2: 3.0}
    rows = [fake_row("vae", seed, VALUES - 5) for seed in noise]
    rows += [fake_row("gpvae", seed, VALUES + 0.01 * seed) for seed in noise]
    rows += [fake_row("iaf", seed, VALUES - 0.2) for seed in noise]
    rows += [fake_row("hf", seed, VALUES - 0.3 + shift) for seed, shift in noise.items()]
    found = findings.likelihood(profile, store_rows("t", rows), rows)
    assert found.verdict == IN_PART
    assert found.answers == ("in support", "open") * 2
    assert "the best rival = +0.21" in found.evidence[1] and "above IAF;" in found.evidence[1]


def test_intervals_that_hold_zero_decide_nothing(project_root):
    """Nothing is in support and nothing against: that is not a failure of the claim."""
    rows = [fake_row("vae", seed, VALUES) for seed in range(3)]
    rows += [fake_row("gpvae", seed, VALUES + (0.05, -0.04, 0.01)[seed]) for seed in range(3)]
    profile = replace(plan(), encoders=("vae", "gpvae"), outputs=("gaussian",))
    found = findings.likelihood(profile, store_rows("t", rows), rows)
    assert found.verdict == OPEN and set(found.answers) == {"open"}


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
    text = "incomplete: gaussian, VAE 2 of 3 (missing: 1); GPVAE 2 of 3"
    assert any(sentence.startswith(text) for sentence in found.evidence)


def test_estimates_that_are_missing_are_no_support(project_root):
    """Runs without gaps have no estimate by both proposals."""
    _, rows = stored(every((1.0, 1.0), (0.5, 0.5)))
    rows = [{k: v for k, v in row.items() if k != "log_px"} for row in rows]
    found = findings.likelihood(plan(), store_rows("t", rows), rows)
    assert found.verdict == IN_PART and found.answers.count(LACKS) == 4
    assert "gaussian, both proposals: GPVAE − VAE = missing" in found.evidence


def test_a_rival_without_the_estimate_is_missing_though_the_others_are_beaten(project_root):
    """HF's rows have no estimate by both proposals, and IAF is beaten by every proposal."""
    profile = replace(plan(), encoders=("vae", "gpvae", "iaf", "hf"), outputs=("gaussian",))
    gains = {("vae", "gaussian"): 0.0, ("gpvae", "gaussian"): 1.0}
    _, rows = stored(gains | {(rival, "gaussian"): 0.5 for rival in ("iaf", "hf")})
    for row in rows:
        if "-hf" in row["name"]:
            del row["log_px"]
    store = store_rows("t", rows)
    found = findings.likelihood(profile, store, rows)
    assert found.answers == ("in support", "in support", "in support", LACKS)
    (line,) = findings.summary(profile, findings.against(profile)).to_dict("records")
    assert line["GPVAE − best rival, both proposals"].startswith("IAF: +0.50 [")


def test_summary_says_over_how_many_seeds_the_best_rival_is_compared(project_root):
    _, rows = stored(every((1.0, 1.0), (0.5, 0.5)))
    lost = [r for r in rows if "gaussian" in r["name"] and "iaf" in r["name"] and r["seed"] == 2]
    rest = [row for row in rows if row not in lost]
    store_rows("u", rest)
    profile = replace(plan(), name="u")
    lines = findings.summary(profile, findings.against(profile))
    gaussian, bernoulli = lines.to_dict("records")
    assert gaussian["GPVAE − best rival, own proposal"].endswith("] (2 seeds)")
    assert bernoulli["GPVAE − best rival, own proposal"].endswith("]")


def test_no_claim_holds_once_a_row_is_gone(project_root):
    """Every claim holds on the whole evidence; without any part of it none does."""
    gap = {"elbo": VALUES, "elbo_optimised": VALUES + np.array([1.0, 3.0, 2.0, 4.0])}
    gap |= {"q_var": np.array([1.0, 3.0, 4.0, 2.0])}
    _, rows = stored(every((1.0, 1.0), (0.5, 0.5)))
    store = store_rows("t", rows, **RANDOM, **gap)
    claims = findings.likelihood, findings.difficulty
    assert [claim(plan(), store, rows).verdict for claim in claims] == [HOLDS, HOLDS]
    for i, lost in enumerate(rows):
        rest = rows[:i] + rows[i + 1 :]
        assert findings.likelihood(plan(), store, rest).verdict == IN_PART, lost["name"]
        expected = IN_PART if "gpvae" in lost["name"] else HOLDS
        assert findings.difficulty(plan(), store, rest).verdict == expected, lost["name"]


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
    assert found.verdict == HOLDS
    assert "abacus" in found.evidence[0] and "MLP 784-500, D = 50" in found.evidence[0]
    assert "1.40 times" in found.evidence[0] and "12.0 times" in found.evidence[0]
    assert found.conditions.endswith("code that was timed: timed (abacus).")
    other = [
        row | {"facts": FACTS | {"device": "loom"}}
        for row in (bench_row("gpvae, batch 1", 20.0), *rows[1:])
    ]
    both = findings.speed(rows + other)  # each device has ratios of its own
    assert both.verdict == IN_PART and len(both.evidence) == 2 and "loom" in both.evidence[1]
    slow = [bench_row("gpvae, batch 9", 8.0), bench_row("savae4, batch 9", 12.0)]
    assert findings.speed(rows + slow).verdict == IN_PART
    step = [row | {"section": "training"} for row in slow]
    unmeasured = bench_row("gpvae, batch 7", None)
    assert findings.speed([*rows, *step, unmeasured]) == found
    alone = findings.speed([*rows, slow[0]])  # nothing to compare the second batch with
    assert alone.verdict == IN_PART and alone.evidence[1].endswith("SA-VAE with 4 steps missing")


@pytest.mark.parametrize(("ours", "verdict"), [(5.9, HOLDS), (6.1, FAILS)])
def test_far_faster_is_less_than_half_of_the_time(ours, verdict):
    rows = [bench_row("gpvae, batch 1", ours), bench_row("savae4, batch 1", 12.0)]
    assert findings.speed(rows).verdict == verdict


def test_an_interval_of_no_number_is_missing():
    """Such as that of rank correlations one of which is of a constant score."""
    assert findings.answer(mean_interval([0.2, np.nan, 0.3])) == LACKS


def test_conditions_name_the_seeds_of_each_output_where_they_differ():
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    assert "3 seeds (gaussian), 0 seeds (bernoulli)" in findings.conditions(plan(), rows)
    rows += [fake_row("gpvae", seed, VALUES, "bernoulli") for seed in range(3)]
    assert "D = 10, 3 seeds, at most" in findings.conditions(plan(), rows)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        ([1, 3, 2, 4], HOLDS),  # the score's order, which is not that of the free scores
        ([4, 2, 3, 1], FAILS),
    ],
)
def test_difficulty_claim(project_root, gap, verdict):
    rows = [fake_row("gpvae", seed, VALUES, o) for seed in range(3) for o in plan().outputs]
    gap, variance = np.array(gap, float), np.array([1.0, 3.0, 4.0, 2.0])
    arrays = {"elbo": VALUES, "elbo_optimised": VALUES + gap, "q_var": variance}
    found = findings.difficulty(plan(), store_rows("t", rows, **RANDOM, **arrays), rows)
    assert found.verdict == verdict
    assert ("+1.00" if verdict == HOLDS else "-1.00") in found.evidence[0]


def test_difficulty_does_not_hold_on_half_of_the_evidence(project_root):
    """One output of two, and no encoder variance."""
    rows = [fake_row("gpvae", seed, VALUES) for seed in range(3)]
    gap = np.array([1.0, 3.0, 2.0, 4.0])
    store = store_rows("t", rows, **RANDOM, elbo=VALUES, elbo_optimised=VALUES + gap)
    found = findings.difficulty(plan(), store, rows)
    assert found.verdict == IN_PART and found.answers.count(LACKS) == 2
    assert found.evidence[-1] == "incomplete: bernoulli, no rows of GPVAE"


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
    lines = findings.summary(plan(), findings.against(plan()))
    gaussian, bernoulli = lines.to_dict("records")
    assert (gaussian["profile"], gaussian["output"]) == ("t", "gaussian")
    assert gaussian["seeds"] == "3 of 3" and gaussian["complete methods"] == "3 of 3"
    assert gaussian["GPVAE − VAE, both proposals"].startswith("+1.01 [")
    assert bernoulli["GPVAE − best rival, own proposal"].startswith("IAF: -3.01 [")
    assert not (paths.results("t") / "events.jsonl").exists()  # a look is no event of that profile
    assert gaussian["correlation of the negative encoder variance"] == "missing"
    assert set(gaussian) == set(bernoulli)


def test_every_method_is_compared_in_every_output(project_root):
    _, rows = stored(every((1.0, 0.0), (0.5, 3.0)))
    store_rows("u", [r for r in rows if not ("bernoulli" in r["name"] and "iaf" in r["name"])])
    found = findings.against(replace(plan(), name="u"))
    assert list(found) == [(o, w) for o in plan().outputs for w in findings.JUDGED]
    own = found["gaussian", "own proposal"]
    assert list(own) == ["vae", "iaf"]
    assert (own["vae"].value, own["iaf"].value) == pytest.approx((1.01, 0.5))
    assert found["bernoulli", "both proposals"]["vae"].value == pytest.approx(0.0)
    assert found["bernoulli", "both proposals"]["iaf"].n == 0
    table = findings.against_table({("u", *key): line for key, line in found.items()})
    assert list(table.columns) == ["profile", "output", "proposal", "GPVAE − VAE", "GPVAE − IAF"]
    assert list(table.proposal) == ["own", "both"] * 2
    assert [cell[:5] for cell in table["GPVAE − IAF"]] == ["+0.50", "+0.50", "missi", "missi"]
    other = findings.against_table(
        {("v", "gaussian", "own proposal"): {"vae": own["vae"]}}
        | {("u", *key): line for key, line in found.items()}
    )
    assert other["GPVAE − IAF"][0] == "missing"


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


@pytest.mark.parametrize(
    "table",
    [
        lambda rows, store: tables.benchmark_table(plan(), store, rows),
        lambda rows, store: findings.against(plan()),
        lambda rows, store: findings.summary(plan(), {}),
    ],
    ids=["benchmark", "against", "summary"],
)
def test_rows_of_two_versions_make_no_table(project_root, table):
    _, rows = stored(every((1.0, 1.0), (0.5, 0.5)))
    rows[3]["code_hash"] = "other"
    with pytest.raises(DataError, match="code_hash"):
        table(rows, store_rows("t", rows))


def test_rows_of_two_versions_are_no_literature(project_root):
    rows = []
    for i, job in enumerate(gpvae.get_profile("burda").jobs()):
        own = {"name": job.name, "config": job.to_dict(), "config_hash": job.hash()}
        rows.append(fake_row("vae", 0, VALUES, row=own | {"code_hash": f"version {i}"}))
    store_rows("burda", rows)
    with pytest.raises(DataError, match="code_hash"):
        findings.literature()
