"""Several data sets at once: which methods rank above which, and what a bound costs.

A block is a data set with an output distribution. In each block every method has a mean over
seeds, and methods are ranked by it (1 is best). Friedman's test asks whether the ranks differ at
all; two methods differ if their mean ranks lie further apart than Nemenyi's critical difference.

References:
    Statistical Comparisons of Classifiers over Multiple Data Sets (Demsar, 2006),
    https://jmlr.org/papers/v7/demsar06a.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gpvae import paths
from gpvae.profiles import CPU_PRESETS, Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval
from gpvae.stored import rows_of
from gpvae.tables import LABELS, by_encoder, mean_of, paired

Block = Mapping[str, float]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over blocks.

    Args:
        ranks: by encoder, the best one first; 1 is best.
        difference: Nemenyi's critical difference at the 5% level.
        p: of Friedman's test that all methods rank alike.
        blocks: how many there are.
    """

    ranks: dict[str, float]
    difference: float
    p: float
    blocks: int

    def equals(self, encoder: str) -> list[str]:
        """The methods whose mean rank is within the critical difference of this one's."""
        own = self.ranks[encoder]
        return [e for e, r in self.ranks.items() if e != encoder and abs(r - own) < self.difference]


def evidence_profiles() -> list[Profile]:
    """The profiles with every method whose rows are committed."""
    names = ["rivals", *(f"cpu/{preset}" for preset in CPU_PRESETS)]
    return [get_profile(n) for n in names if (paths.figures(n) / "rows.jsonl").exists()]


def blocks(profiles: Sequence[Profile], quantity: str) -> dict[str, dict[str, float]]:
    """For each data set and output the mean over seeds of a quantity, by encoder.

    A method that lacks a seed which others have is left out of the block.
    """
    found = {}
    for profile in profiles:
        rows = rows_of(profile.runs(), profile.name, stored=True, log=lambda line: None)
        for output in profile.outputs:
            methods = by_encoder(profile, output, rows)
            most = max(map(len, methods.values()), default=0)
            whole = {e: r for e, r in methods.items() if r and len(r) == most}
            if whole:
                name = f"{profile.base.data.name}, {output}"
                found[name] = {e: mean_of(r, quantity).value for e, r in whole.items()}
    return found


def ranking(blocks: Mapping[str, Block]) -> Ranking | None:
    """Ranks of the methods that every block has; None for fewer than 3 methods or 2 blocks."""
    common = [e for e in LABELS if blocks and all(e in block for block in blocks.values())]
    k, n = len(common), len(blocks)
    if k < 3 or n < 2:
        return None
    values = np.array([[block[e] for e in common] for block in blocks.values()])
    ranks = stats.rankdata(-values, axis=1).mean(0)
    order = sorted(zip(common, map(float, ranks), strict=True), key=lambda pair: pair[1])
    studentised = stats.studentized_range.ppf(0.95, k, math.inf) / math.sqrt(2)
    return Ranking(
        ranks=dict(order),
        difference=float(studentised * math.sqrt(k * (k + 1) / (6 * n))),
        p=float(stats.friedmanchisquare(*values.T).pvalue),
        blocks=n,
    )


def costs(bench: Sequence[Row], device: str) -> dict[str, float]:
    """Inference time of a single image relative to the VAE's, by method (such as `iaf4`).

    Args:
        bench: rows of `gpvae bench`.
        device: one of `devices`.
    """
    rows = [r for r in bench if r["section"] == "inference" and r["facts"]["device"] == device]
    single = {r["case"].partition(", ")[0]: r for r in rows if r["case"].endswith(", batch 1")}
    return {method: r["ratio"] for method, r in single.items() if r["ratio"]}


def devices(bench: Sequence[Row]) -> list[str]:
    """Devices on which inference was measured."""
    rows = (r["facts"]["device"] for r in bench if r["section"] == "inference")
    return list(dict.fromkeys(rows))


def bounds_and_costs(
    results: Results, methods: Mapping[str, Sequence[Row]], cost: Mapping[str, float]
) -> dict[str, tuple[float, Interval]]:
    """Encoder -> relative inference time and difference of the ELBO to the VAE's.

    The number of steps, flows or components counts; other options of an encoder do not, since the
    benchmark has its defaults.
    """
    found = {}
    for encoder, rows in methods.items():
        if not rows or not methods["vae"]:
            continue
        method = _method(rows[0])
        if method in cost:
            found[encoder] = cost[method], paired(results, rows, methods["vae"], "elbo")
    return found


def front(points: Mapping[str, tuple[float, Interval]]) -> list[str]:
    """The methods that no other beats in time and bound, the fastest first."""
    best, found = -math.inf, []
    for encoder, (_, gain) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1][0])):
        if gain.value > best:
            best = gain.value
            found.append(encoder)
    return found


def _method(row: Row) -> str:
    """The method as `gpvae bench` names it."""
    model = row["config"]["model"]
    counts = {
        "hf": model["flow"]["steps"],
        "iaf": model["flow"]["steps"],
        "me": model["mixture"]["components"],
        "rme": model["mixture"]["components"],
        "savae": model["savae"]["steps"],
        "vlae": model["vlae"]["steps"],
    }
    return f"{model['encoder']}{counts.get(model['encoder'], '')}"
