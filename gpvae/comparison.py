"""Several data sets at once: which methods rank above which, and what a bound costs.

A block is a data set: its outputs and latent dimensions share images, so that their ranks are
averaged. Methods are ranked by their mean over seeds (1 is best). Friedman's test, by permutation
within blocks since there are few, asks whether the ranks differ at all; if so, two methods differ
whose mean ranks lie further apart than Nemenyi's critical difference.

References:
    Statistical Comparisons of Classifiers over Multiple Data Sets (Demsar, 2006),
    https://jmlr.org/papers/v7/demsar06a.html
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from gpvae import paths
from gpvae.bench.report import place
from gpvae.config import RunConfig, from_dict
from gpvae.presets import CPU_PRESETS
from gpvae.profiles import Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval
from gpvae.stored import find_rows
from gpvae.tables import LABELS, by_encoder, check_one_version, mean_of, paired

Block = Mapping[str, float]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over blocks.

    Args:
        ranks: by encoder, the best one first; 1 is best.
        difference: Nemenyi's critical difference at the 5% level.
        p: of Friedman's test that all methods rank alike, by permutation.
        blocks: the ranks in each block, by encoder.
    """

    ranks: dict[str, float]
    difference: float
    p: float
    blocks: dict[str, dict[str, float]]

    @property
    def differs(self) -> bool:
        """Whether Friedman's test rejects at the 5% level, so that methods may be compared."""
        return self.p < 0.05

    def apart(self) -> list[tuple[str, str]]:
        """The pairs (better, worse) whose mean ranks lie the critical difference apart or more, if
        the ranks differ at all.
        """
        pairs = combinations(self.ranks.items(), 2) if self.differs else ()
        return [(a, b) for (a, best), (b, rank) in pairs if rank - best >= self.difference]


def evidence_profiles() -> list[Profile]:
    """The profiles with every method whose rows are committed."""
    names = ["rivals", *(f"cpu/{preset}" for preset in CPU_PRESETS)]
    return [get_profile(n) for n in names if (paths.figures(n) / "rows.jsonl").exists()]


def blocks(profiles: Sequence[Profile], quantity: str) -> dict[str, dict[str, float]]:
    """For each data set the mean rank of every method over its outputs, dimensions and budgets.

    A block needs a row of every method and seed of its profile; an output that lacks some is left
    out, and a data set that has none left. A block's name says what went into it.

    Args:
        profiles: those of a data set count together.
        quantity: such as `log_likelihood`; methods are ranked by its mean over seeds.

    Raises:
        DataError: rows of several versions of the code or the data.
    """
    ranks, parts, used = defaultdict(list), defaultdict(list), []
    for profile in profiles:
        rows = find_rows(profile.runs(), profile.name)
        for output in profile.outputs:
            methods = by_encoder(profile, output, rows)
            if all(len(own) == len(profile.seeds) for own in methods.values()):
                values = {e: mean_of(own, quantity).value for e, own in methods.items()}
                name = profile.parts[0]
                ranks[name].append(_ranks(values))
                part = f"{output}, D = {profile.base.model.latent_dim}"
                if part in parts[name]:
                    part += f", {profile.base.training.epochs} epochs"
                parts[name].append(part)
                used += [row for own in methods.values() for row in own]
    check_one_version(used)
    return {
        f"{name} ({'; '.join(parts[name])})": {
            e: float(np.mean([r[e] for r in each])) for e in each[0]
        }
        for name, each in ranks.items()
    }


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    ranks = stats.rankdata([-value for value in values.values()])
    return dict(zip(values, map(float, ranks), strict=True))


def ranking(blocks: Mapping[str, Block]) -> Ranking | None:
    """Mean ranks of the methods that every block has; None for under 3 methods or 2 blocks."""
    common = [e for e in LABELS if blocks and all(e in block for block in blocks.values())]
    k, n = len(common), len(blocks)
    if k < 3 or n < 2:
        return None
    values = np.array([[block[e] for e in common] for block in blocks.values()])
    ranks = stats.rankdata(values, axis=1)  # again, since a method may have been left out
    means = map(float, ranks.mean(0))
    order = sorted(zip(common, means, strict=True), key=lambda pair: pair[1])
    studentised = stats.studentized_range.ppf(0.95, k, math.inf) / math.sqrt(2)
    return Ranking(
        ranks=dict(order),
        difference=float(studentised * math.sqrt(k * (k + 1) / (6 * n))),
        p=_friedman(ranks),
        blocks={
            name: dict(zip(common, map(float, line), strict=True))
            for name, line in zip(blocks, ranks, strict=True)
        },
    )


def _friedman(ranks: np.ndarray, draws: int = 20_000) -> float:
    """Chance that the mean ranks spread as much if each block's [n, k] were in random order."""
    shuffled = np.random.default_rng(0).permuted(np.tile(ranks, (draws, 1, 1)), axis=-1)
    spread, observed = shuffled.mean(1).var(-1), ranks.mean(0).var()
    return float((1 + (spread >= observed - 1e-12).sum()) / (1 + draws))


def costs(bench: Sequence[Row], device: str) -> dict[str, float]:
    """Inference time of a single image relative to the VAE's, by method (such as `iaf4`).

    Args:
        bench: rows of `gpvae bench`.
        device: one of `devices`.
    """
    rows = _inference(bench, device)
    single = {r["case"].partition(", ")[0]: r for r in rows if r["case"].endswith(", batch 1")}
    return {method: r["ratio"] for method, r in single.items() if r["ratio"]}


def timed_versions(bench: Sequence[Row], device: str) -> set[str]:
    """Hashes of the code whose inference was measured on that device."""
    return {row["facts"]["code_hash"] for row in _inference(bench, device)}


def _inference(bench: Sequence[Row], device: str) -> list[Row]:
    return [r for r in bench if r["section"] == "inference" and place(r["facts"]) == device]


def devices(bench: Sequence[Row]) -> list[str]:
    """Devices (a CPU with its number of threads) on which inference was measured."""
    return list(dict.fromkeys(place(r["facts"]) for r in bench if r["section"] == "inference"))


def bounds_and_costs(
    results: Results, methods: Mapping[str, Sequence[Row]], cost: Mapping[str, float]
) -> dict[str, tuple[float, Interval]]:
    """Encoder -> relative inference time and difference of the ELBO to the VAE's.

    The number of steps, flows or components counts; other options of an encoder do not, since the
    benchmark has its defaults.
    """
    found = {}
    for encoder, rows in methods.items():
        if not rows or not methods.get("vae"):
            continue
        count = from_dict(RunConfig, rows[0]["config"]).model.count
        method = encoder if count is None else f"{encoder}{count}"
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
