"""Selective refinement: a budget of refinement steps, spent on the images that a score picks.

Everything is in nats per image, with intervals over seeds. A row that lacks what is asked for (an
older one, or one without gaps) is left out, and a method without any prints as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from gpvae.difficulty import SCORE, SCORE_NAME
from gpvae.refine import Study
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
from gpvae.tables import MISSING, format_interval

POLICIES = {
    "none": "none",
    "uniform": "uniform",
    "random": "random",
    SCORE: SCORE_NAME,
    "-ELBO": "−ELBO",
    "oracle": "oracle",
}
REAL_POLICIES = ("uniform", "random", SCORE, "-ELBO")  # the oracle knows what nobody knows


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
        if not self.studies:
            return None
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
        if not refinement.studies:
            keys = ("a selected image gets", "policy", "gain")
            lines.append({"output": output} | dict.fromkeys(keys, MISSING))
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
    columns = ("steps per image", "policy", "steps of a selected image", "gain (nats)")
    lines = []
    for output, refinement in refinements.items():
        if not refinement.studies:
            lines.append({"output": output} | dict.fromkeys(columns, MISSING))
        for budget in budgets:
            uses = {policy: refinement.best_use(policy, budget) for policy in REAL_POLICIES}
            known = {policy: use for policy, use in uses.items() if use}
            for policy, (steps, gain) in sorted(known.items(), key=lambda u: -u[1][1].value):
                cells = (f"{budget:g}", POLICIES[policy], steps, format_interval(gain, digits=3))
                lines.append({"output": output} | dict(zip(columns, cells, strict=True)))
    return pd.DataFrame(lines)
