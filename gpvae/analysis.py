"""From rows and per-image arrays to intervals over seeds: convergence, gaps, searches, steps.

Everything is in nats per image. A row that lacks what is asked for (an older one, or one without
gaps) is left out, and a method without any prints as missing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pandas as pd

from gpvae.config import RunConfig
from gpvae.profiles import Profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
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


def time_table(profile: Profile, rows: Sequence[Row]) -> pd.DataFrame:
    """One line per output, method and device: the seconds that runs took, from the lowest to the
    highest. They were not measured in turns, and perhaps beside other work: `gpvae bench` is fair.
    """
    lines = []
    for output in profile.outputs:
        for encoder, own in by_encoder(profile, output, rows).items():
            for place in dict.fromkeys(map(_place, own)) or (MISSING,):
                found = [row for row in own if _place(row) == place]
                train, evaluate = (
                    format_range([round(row["seconds"][part]) for row in found])
                    for part in ("train", "evaluate")
                )
                line = {"output": output, "method": LABELS.get(encoder, encoder), "on": place}
                line["seeds"] = ", ".join(str(row["seed"]) for row in found) or MISSING
                line["training (s)"] = "as the VAE" if encoder == "svi" else train
                lines.append(line | {"evaluation (s)": evaluate})
    return pd.DataFrame(lines)


def _place(row: Row) -> str:
    return f"{row['device']}, torch {row['versions']['torch']}"


def hours(rows: Sequence[Row]) -> float:
    """What these runs took together, one after the other; SVI's training is the VAE's."""
    seconds = [row["seconds"]["evaluate"] for row in rows]
    trained = [row for row in rows if row["config"]["model"]["encoder"] != "svi"]
    return (sum(seconds) + sum(row["seconds"]["train"] for row in trained)) / 3600


def search_table(
    profile: Profile, rows: Sequence[Row], failed: Collection[str], name: str = "tuning-each"
) -> pd.DataFrame:
    """One line per method and output: the candidates of a search and the one with the highest
    validation bound (nats), of equal ones that which changes least.

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
        runs = [run for _, run in candidates]
        measured = [(changes, by_name[r.name]) for changes, r in candidates if r.name in by_name]
        keys = dict.fromkeys(key for changes, _ in candidates for key in changes)
        varied = [key for key in keys if len({c.get(key) for c, _ in candidates}) > 1]
        line = {
            "method": LABELS.get(encoder, encoder),
            "output": output,
            "candidates": len(candidates),
            "measured": len(measured),
            "failed": sum(run.name in failed for run in runs),
            "epochs": format_range(sorted({run.training.epochs for run in runs})),
            "values tried": "; ".join(_tried(key, runs) for key in varied),
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


def _tried(key: str, runs: Sequence[RunConfig]) -> str:
    """The values of one key in a search, such as `learning_rate: 0.002, 0.004`."""
    values = dict.fromkeys(reduce(getattr, key.split("."), run) for run in runs)
    return f"{key.split('.', 1)[-1]}: {', '.join(map(str, values))}"


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
