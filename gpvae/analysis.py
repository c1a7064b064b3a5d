"""From rows and per-image arrays to intervals over seeds: gaps, refinement, numbers of steps.

Everything is in nats per image. A row that lacks what is asked for (an older one, or one without
gaps) is left out, and a method without any prints as missing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from gpvae.config import RunConfig
from gpvae.profiles import Profile
from gpvae.refine import Study
from gpvae.results import Results, Row
from gpvae.stats import Interval, auroc, mean_interval, spearman
from gpvae.stored import history_of
from gpvae.tables import (
    LABELS,
    MISSING,
    PROPOSALS,
    by_encoder,
    format_interval,
    format_range,
    format_seeds,
    mean_of,
    paired,
    select,
)

SCORE, SCORE_NAME = "relative_f_var", "Var f / E h²"
POLICIES = {
    "none": "none",
    "uniform": "uniform",
    "random": "random",
    SCORE: SCORE_NAME,
    "-ELBO": "−ELBO",
    "oracle": "oracle",
}
REAL_POLICIES = ("uniform", "random", SCORE, "-ELBO")  # the oracle knows what nobody knows
SYMBOLS = {"savae": "T", "vlae": "T", "iaf": "K", "hf": "K", "me": "M", "rme": "M"}


LATE = 0.2  # the last part of training in which a curve should have become flat


def late_rise(history: Sequence[Mapping[str, float]]) -> float:
    """By how much the best validation bound rose in the last fifth of the epochs, in nats; NaN if
    no bound was measured before.
    """
    limit = (1 - LATE) * history[-1]["epoch"]
    early = [row["valid_elbo"] for row in history if row["epoch"] <= limit]
    return max(row["valid_elbo"] for row in history) - max(early) if early else math.nan


def convergence_table(profile: Profile, rows: Sequence[Row]) -> pd.DataFrame:
    """One line per output and method: how long training took and whether it had come to an end.

    SVI trains as the VAE and has no line.
    """
    lines = []
    for output in profile.outputs:
        for encoder, own in by_encoder(profile, output, rows).items():
            if encoder == "svi":
                continue
            rises = [late_rise(found) for row in own if (found := history_of(row, profile.name))]
            rises = [rise for rise in rises if math.isfinite(rise)]
            last = sum(row["best_epoch"] == row["epochs"] for row in own)
            lines.append(
                {
                    "output": output,
                    "method": LABELS.get(encoder, encoder),
                    "seeds": format_seeds(own, profile.seeds),
                    "epochs": format_range([row["epochs"] for row in own]),
                    "best epoch": format_range([row["best_epoch"] for row in own]),
                    "best epoch is the last": f"{last} of {len(own)}" if own else MISSING,
                    "rise in the last fifth": format_interval(mean_interval(rises)),
                }
            )
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Decomposition:
    """Where the bound of one method is lost: means over images with intervals over seeds.

    Args:
        log_px: log p(x) with the mixture of both proposals, the reference of the gaps.
        elbo: of the method's own posterior.
        approximation: log_px minus the bound of each image's best diagonal Gaussian.
        amortization: that bound minus the method's; negative if the method is better.
        inference: log_px minus the method's bound, the sum of the two.
        unconverged: images, over all seeds, whose best Gaussian was still improving.
        images: images over all seeds.
    """

    log_px: Interval
    elbo: Interval
    approximation: Interval
    amortization: Interval
    inference: Interval
    unconverged: int
    images: int


def decomposition(results: Results, rows: Sequence[Row]) -> Decomposition:
    """The gaps of one method from its rows, one for each seed."""
    rows = [row for row in rows if "log_px" in row]
    converged = [results.arrays(row)["converged"].astype(bool) for row in rows]
    return Decomposition(
        log_px=mean_of(rows, "log_px"),
        elbo=mean_of(rows, "elbo"),
        approximation=mean_of(rows, "log_px", minus="elbo_optimised"),
        amortization=mean_of(rows, "elbo_optimised", minus="elbo"),
        inference=mean_of(rows, "log_px", minus="elbo"),
        unconverged=sum(int((~c).sum()) for c in converged),
        images=sum(len(c) for c in converged),
    )


def decompositions(
    profile: Profile, results: Results, rows: Sequence[Row]
) -> dict[str, dict[str, Decomposition]]:
    """Output -> encoder -> decomposition, for every method of the profile's table."""
    return {
        output: {
            encoder: decomposition(results, found)
            for encoder, found in by_encoder(profile, output, rows).items()
        }
        for output in profile.outputs
    }


def gap_table(
    profile: Profile, gaps: Mapping[str, Mapping[str, Decomposition]], rows: Sequence[Row]
) -> pd.DataFrame:
    """One line per output and method: log p(x), ELBO and the three gaps, in nats per image.

    Args:
        profile: whose methods.
        gaps: see `decompositions`.
        rows: which they are of.
    """
    lines = []
    for output in profile.outputs:
        for encoder, found in by_encoder(profile, output, rows).items():
            d = gaps[output][encoder]
            count = f"{d.unconverged} of {d.images}" if d.images else MISSING
            lines.append(
                {
                    "method": LABELS.get(encoder, encoder),
                    "output": output,
                    "seeds": format_seeds(found, profile.seeds),
                    "log p(x)": format_interval(d.log_px),
                    "ELBO": format_interval(d.elbo),
                    "approximation gap": format_interval(d.approximation),
                    "amortization gap": format_interval(d.amortization),
                    "inference gap": format_interval(d.inference),
                    "images not converged": count,
                }
            )
    return pd.DataFrame(lines)


GAPS = {"amortization gap": "amortization_gap", "inference gap": "inference_gap"}
OWN_SCORES = (SCORE_NAME, "Var f", "Var h", "expected gap")  # those of the random functions
SCORES = {  # label -> score, and whose it is; each is meant to be larger where the gap is
    SCORE_NAME: (SCORE, "gpvae"),
    "Var f": ("f_var", "gpvae"),
    "Var h": ("h_var", "gpvae"),
    "expected gap": ("expected_gap", "gpvae"),
    "−ELBO": ("minus_elbo", "gpvae"),
    "−encoder variance": ("minus_q_var", "gpvae"),
    "−encoder variance (VAE)": ("minus_q_var", "vae"),
}


def per_image(results: Results, row: Row) -> dict[str, np.ndarray]:
    """Arrays of a row, with both gaps and the scores that need no random function, [N] each."""
    a = results.arrays(row)
    a["minus_elbo"] = -a["elbo"]
    if "q_var" in a:
        a["minus_q_var"] = -a["q_var"]
    if "elbo_optimised" in a:
        a["amortization_gap"] = a["elbo_optimised"] - a["elbo"]
    if "log_px" in a:
        a["inference_gap"] = a["log_px"] - a["elbo"]
    return a


def rank_correlations(
    results: Results, rows: Sequence[Row], score: str, gap: str = "amortization_gap"
) -> list[float]:
    """Spearman's correlation over images of a score with a gap, for each row that has both."""
    images = [per_image(results, row) for row in rows]
    return [spearman(a[score], a[gap]) for a in images if score in a and gap in a]


def noise_share(results: Results, rows: Sequence[Row]) -> float:
    """Part of the amortization gap's variance over images that is Monte Carlo noise of the two
    bounds, averaged over rows; NaN without any that has gaps.
    """
    shares = []
    for a in (per_image(results, row) for row in rows):
        if "amortization_gap" in a:
            noise = a["elbo_stderr"] ** 2 + a["elbo_optimised_stderr"] ** 2
            shares.append(noise.mean() / a["amortization_gap"].var())
    return mean_interval(shares).value


class Refinement:
    """What selective refinement gains for one output, over seeds.

    Args:
        results: where the arrays are.
        rows: of a model with a score, one for each seed; those without a study are left out.
    """

    def __init__(self, results: Results, rows: Sequence[Row]) -> None:
        arrays = [results.arrays(row) for row in rows]
        self.studies = [_study(a) for a in arrays if "refine_bounds" in a]

    @property
    def choices(self) -> dict[str, int]:
        """What a selected image may get, in words, and its index into the recorded steps."""
        if not self.studies:
            return {}
        counts = [int(count) for count in self.studies[0].steps]
        words = {i: f"{counts[i]} step{'s' * (counts[i] != 1)}" for i in (1, len(counts) - 1)}
        return {word: i for i, word in words.items()}

    def curve(self, policy: str, each: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean cost, in SVI steps per image, and mean bound over images and seeds."""
        curves = [study.curve(policy, each) for study in self.studies]
        return curves[0].cost.numpy(), np.mean([c.bound.numpy() for c in curves], axis=0)

    def areas(self, policy: str, each: int) -> list[float]:
        """Mean gain over the budgets from 0 to `each` for all, for each seed."""
        return [study.curve(policy, each).area() for study in self.studies]

    def gains(self, policy: str, each: int, budget: float) -> list[float]:
        """Gain over no refinement at one budget (SVI steps per image), for each seed."""
        curves = [study.curve(policy, each) for study in self.studies]
        return [float(np.interp(budget, c.cost, c.bound) - c.bound[0]) for c in curves]

    def best_use(self, policy: str, budget: float) -> tuple[int, Interval] | None:
        """The number of steps for a selected image with which a policy gains most at one budget,
        and that gain over seeds; None if it cannot spend just this much.
        """
        found = []
        for each, steps in enumerate(self.studies[0].steps.tolist()):
            if steps == budget or (steps > budget and policy != "uniform"):
                found.append((int(steps), mean_interval(self.gains(policy, each, budget))))
        return max(found, key=lambda use: use[1].value, default=None)

    def difference(self, policy: str, other: str, each: int) -> Interval:
        """Mean gain of one policy minus that of another, paired by seed."""
        pairs = zip(self.areas(policy, each), self.areas(other, each), strict=True)
        return mean_interval([a - b for a, b in pairs])

    def best(self, each: int) -> list[str]:
        """The policies with the largest mean gain among those that need no oracle."""
        means = {policy: float(np.mean(self.areas(policy, each))) for policy in REAL_POLICIES}
        most = max(means.values())
        return [policy for policy, mean in means.items() if math.isclose(mean, most, abs_tol=1e-9)]


def _study(arrays: dict[str, np.ndarray]) -> Study:
    """The study whose arrays a row keeps."""
    keys = ("refine_steps", "refine_bounds", "refine_ranking", SCORE)
    steps, bounds, ranking, score = (torch.from_numpy(arrays[k]).double() for k in keys)
    return Study(steps, bounds, ranking, {SCORE: score})


def refinement_table(refinements: dict[str, Refinement]) -> pd.DataFrame:
    """Mean gain over the budgets of each policy and panel, and differences of the score."""
    lines = []
    for output, refinement in refinements.items():
        for words, each in refinement.choices.items():
            line = {"output": output, "a selected image gets": words}
            for policy, label in POLICIES.items():
                areas = mean_interval(refinement.areas(policy, each))
                lines.append(line | {"policy": label, "gain": format_interval(areas, digits=3)})
            for other in ("random", "-ELBO"):
                difference = format_interval(refinement.difference(SCORE, other, each), "+", 3)
                label = f"{POLICIES[SCORE]} − {POLICIES[other]}".replace("− −ELBO", "− (−ELBO)")
                lines.append(line | {"policy": label, "gain": difference})
    return pd.DataFrame(lines).rename(columns={"gain": "mean gain over budgets (nats)"})


def budget_table(
    refinements: Mapping[str, Refinement], budgets: Sequence[float] = (0.5, 1.0, 2.0)
) -> pd.DataFrame:
    """What each policy gains at some budgets, each with its best number of steps for a selected
    image (chosen on the same images), the best policy first.
    """
    lines = []
    for output, refinement in refinements.items():
        for budget in budgets:
            uses = {policy: refinement.best_use(policy, budget) for policy in REAL_POLICIES}
            known = {policy: use for policy, use in uses.items() if use}
            for policy, (steps, gain) in sorted(known.items(), key=lambda u: -u[1][1].value):
                lines.append(
                    {
                        "output": output,
                        "steps per image": f"{budget:g}",
                        "policy": POLICIES[policy],
                        "steps of a selected image": steps,
                        "gain (nats)": format_interval(gain, digits=3),
                    }
                )
    return pd.DataFrame(lines)


OUTLIER_SCORES = {  # label -> score, and whose it is
    SCORE_NAME: (SCORE, "gpvae"),
    "Var f": ("f_var", "gpvae"),
    "Var h": ("h_var", "gpvae"),
    "expected gap": ("expected_gap", "gpvae"),
    "−ELBO of GPVAE": ("elbo", "gpvae"),
    "−ELBO of VAE": ("elbo", "vae"),
}


def outlier_table(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC of each score between test images and those of another data set, over seeds.

    Empty if no row has outliers.
    """
    lines = []
    for output in profile.outputs:
        methods = by_encoder(profile, output, rows)
        for label, (score, encoder) in OUTLIER_SCORES.items():
            arrays = [results.arrays(row) for row in methods.get(encoder, [])]
            sign = -1 if score == "elbo" else 1
            areas = [
                auroc(sign * a[score], sign * a[f"outlier_{score}"])
                for a in arrays
                if f"outlier_{score}" in a
            ]
            if areas:
                name = profile.base.evaluation.outliers
                line = {"output": output, "outliers": name, "score": label}
                lines.append(line | {"AUROC": format_interval(mean_interval(areas), digits=3)})
    return pd.DataFrame(lines)


def calibration(
    results: Results, rows: Sequence[Row], bins: int = 10
) -> tuple[np.ndarray, list[Interval]]:
    """Expected against observed amortization gap by decile of the expected one.

    The bound of GPVAE averages over the random functions. If an image's best Gaussian is a draw of
    them, too, the gap is the divergence of two independent draws, for small noise twice that of one
    from the Gaussian of the predictive moments, which the posterior's score `expected_gap` is.

    Args:
        results: whose arrays.
        rows: of GPVAE for one output, one for each seed; those without gaps are left out.
        bins: number of equal groups of images.

    Returns:
        Mean expected gap of each group, averaged over seeds, [bins], and the observed mean with
        its interval over seeds, both in nats.
    """
    expected, observed = [], []
    for row in rows:
        a = per_image(results, row)
        if "expected_gap" in a and "amortization_gap" in a:
            groups = np.array_split(a["expected_gap"].argsort(kind="stable"), bins)
            gap = a["amortization_gap"]
            expected.append([2 * a["expected_gap"][g].mean() for g in groups])
            observed.append([gap[g].mean() for g in groups])
    if not expected:
        return np.full(bins, np.nan), [mean_interval([])] * bins
    return np.mean(expected, 0), [mean_interval(values) for values in zip(*observed, strict=True)]


def calibration_table(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """One line per output: how many times the expected gap the observed one is, over seeds."""
    lines = []
    for output in profile.outputs:
        own = by_encoder(profile, output, rows)["gpvae"]
        images = [a for row in own if "expected_gap" in (a := per_image(results, row))]
        images = [a for a in images if "amortization_gap" in a]
        ratios = [a["amortization_gap"].mean() / (2 * a["expected_gap"].mean()) for a in images]
        steps = np.diff([gap.value for gap in calibration(results, own)[1]])
        ratio = format_interval(mean_interval(ratios), digits=0)
        lines.append(
            {
                "output": output,
                "seeds": format_seeds([row for row in own if "log_px" in row], profile.seeds),
                "observed gap / (2 × expected gap)": ratio,
                "deciles over which it rises": (
                    f"{int((steps > 0).sum())} of {len(steps)}" if images else MISSING
                ),
            }
        )
    return pd.DataFrame(lines)


def search_table(
    profile: Profile, rows: Sequence[Row], failed: Collection[str], name: str = "tuning-each"
) -> pd.DataFrame:
    """One line per method and output: the candidates of a search and the one with the highest
    validation bound (nats). Of equal ones (RME's best checkpoint may come before its later stages)
    it is the one that changes least.

    Args:
        profile: with that variation.
        rows: of its runs, as far as they are there.
        failed: names of runs that failed.
        name: of the variation.
    """
    by_name = {row["name"]: row for row in rows}
    searched: dict[tuple[str, str], list[tuple[Mapping[str, Any], RunConfig]]] = {}
    for changes in profile.variations[name]:
        run = profile.base.override(**changes)
        searched.setdefault((run.model.encoder, run.model.output), []).append((changes, run))
    lines = []
    for (encoder, output), candidates in searched.items():
        measured = [(changes, by_name[r.name]) for changes, r in candidates if r.name in by_name]
        keys = dict.fromkeys(key for changes, _ in candidates for key in changes)
        varied = [key for key in keys if len({c.get(key) for c, _ in candidates}) > 1]
        line = {
            "method": LABELS.get(encoder, encoder),
            "output": output,
            "candidates": len(candidates),
            "measured": len(measured),
            "failed": sum(run.name in failed for _, run in candidates),
            "epochs": format_range(sorted({run.training.epochs for _, run in candidates})),
            "varied": ", ".join(key.split(".", 1)[1] for key in varied),
        }
        chosen, bound = MISSING, MISSING
        if measured:
            news = [_news(profile.base, changes, varied) for changes, _ in measured]
            bounds = [row["valid_elbo"] for _, row in measured]
            best = max(range(len(news)), key=lambda i: (bounds[i], -len(news[i])))
            chosen = ", ".join(f"{k.split('.', 1)[1]} = {v}" for k, v in news[best].items())
            chosen, bound = chosen or "as it was", f"{bounds[best]:.2f}"
        lines.append(line | {"chosen": chosen, "its validation ELBO": bound})
    return pd.DataFrame(lines)


def _news(base: RunConfig, changes: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The entries of some keys that differ from the base configuration."""
    return {k: v for k, v in changes.items() if k in keys and base.override(**{k: v}) != base}


def by_step_count(profile: Profile, rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Encoder -> count -> rows by seed, for the runs of the variation `steps`."""
    groups: dict[str, dict[int, list[RunConfig]]] = {}
    for run in profile.variation("steps"):
        counts = groups.setdefault(run.model.encoder, {})
        counts.setdefault(run.model.count, []).append(run)
    return {
        encoder: {count: select(rows, runs) for count, runs in sorted(counts.items())}
        for encoder, counts in groups.items()
    }


def step_differences(
    profile: Profile, results: Results, rows: Sequence[Row], base: Sequence[Row], quantity: str
) -> dict[str, dict[int, Interval]]:
    """Encoder -> count -> paired difference to the baseline's rows."""
    return {
        encoder: {n: paired(results, found, base, quantity) for n, found in counts.items()}
        for encoder, counts in by_step_count(profile, rows).items()
    }


def step_table(
    profile: Profile, results: Results, rows: Sequence[Row], base: Sequence[Row]
) -> pd.DataFrame:
    """One line per method and count: log p(x) and the paired differences to the baseline."""
    lines = []
    for encoder, counts in by_step_count(profile, rows).items():
        for count, found in counts.items():
            line = {
                "method": LABELS.get(encoder, encoder),
                "T, K or M": f"{SYMBOLS.get(encoder, 'n')} = {count}",
                "seeds": format_seeds(found, profile.seeds),
            }
            for word, key in PROPOSALS.items():
                line[f"log p(x), {word}"] = format_interval(mean_of(found, key))
                difference = paired(results, found, base, key)
                line[f"difference to {LABELS['vae']}, {word}"] = format_interval(difference, "+")
            lines.append(line)
    return pd.DataFrame(lines)
