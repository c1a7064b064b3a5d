"""Tables as pure functions of result rows; a missing run prints as missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from gpvae import events, jsonl, paths
from gpvae.config import RunConfig
from gpvae.errors import ConfigError, DataError, unknown
from gpvae.profiles import Profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval, paired_interval

LABELS = {
    "vae": "VAE",
    "gpvae": "GPVAE",
    "iaf": "IAF",
    "hf": "HF",
    "me": "ME",
    "rme": "RME",
    "savae": "SA-VAE",
    "svi": "SVI",
    "vlae": "VLAE",
}
MISSING = "missing"


def select(rows: Sequence[Row], configs: Sequence[RunConfig]) -> list[Row]:
    """The rows of these runs, in their order; a run without a row is left out.

    Runs are told apart by name, which holds the method with its number of steps or components
    (`iaf4`), so that a variation of an encoder is not taken for the encoder of the main table.
    """
    found = {row["name"]: row for row in rows}
    return [found[config.name] for config in configs if config.name in found]


def by_encoder(profile: Profile, output: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of the main table for one output: encoder -> its rows by seed, empty if missing."""
    runs = profile.runs(output)
    return {
        encoder: select(rows, [run for run in runs if run.model.encoder == encoder])
        for encoder in profile.encoders
    }


def check_one_version(rows: Sequence[Row]) -> None:
    """Raise DataError if rows come from different code, from different data of one name, or from
    different sources of one method.
    """
    for key, of in (
        ("code_hash", lambda row: "of one table"),
        ("data_hash", _data_identity),
        ("method_hash", lambda row: f"of the method {row['config']['model']['encoder']}"),
    ):
        seen: dict[str, set[str]] = {}
        for row in rows:
            seen.setdefault(of(row), set()).add(row.get(key, ""))
        for name, hashes in seen.items():
            if len(hashes) > 1:
                raise DataError(
                    f"rows {name} have {len(hashes)} different values of {key} "
                    f"({', '.join(sorted(hashes))}) and cannot stand in one table. "
                    "Run the stale ones again."
                )


def _data_identity(row: Row) -> str:
    data = row["config"]["data"]
    return f"of {data['name']} (train_size {data['train_size']})"


def paired(results: Results, a: Sequence[Row], b: Sequence[Row], quantity: str) -> Interval:
    """Interval of a - b for a per-image estimate, over the seeds in which both have it.

    Raises:
        ConfigError: no such estimate.
    """
    if quantity not in ESTIMATES:
        raise ConfigError(unknown("estimate", quantity, ESTIMATES))
    pairs = paired_values(results, a, b, quantity)
    return paired_interval([left for left, _ in pairs], [right for _, right in pairs])


def paired_values(
    results: Results, a: Sequence[Row], b: Sequence[Row], quantity: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Values [N] of both, for each seed in which both have the quantity."""
    left, right = (
        {r["seed"]: results.arrays(r)[quantity] for r in rows if quantity in r} for rows in (a, b)
    )
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def mean_of(rows: Sequence[Row], quantity: str, minus: str | None = None) -> Interval:
    """Interval over seeds of a row's mean, or of the difference of two, over the rows that have it.

    Args:
        rows: of one method, one for each seed.
        quantity: such as `elbo`.
        minus: a quantity to subtract.
    """
    names = [name for name in (quantity, minus) if name]
    complete = [row for row in rows if all(name in row for name in names)]
    return mean_interval(
        [row[quantity]["mean"] - (row[minus]["mean"] if minus else 0.0) for row in complete]
    )


QUANTITIES = {
    "ELBO": "elbo",
    "log p(x), own proposal": "log_likelihood",
    "log p(x), neutral proposal": "log_likelihood_neutral",
    "log p(x), both proposals": "log_px",
}
ESTIMATES = (*QUANTITIES.values(), "elbo_optimised")
# Both: the equal mixture of the two, which is good wherever one of them is.
PROPOSALS = {"own": "log_likelihood", "neutral": "log_likelihood_neutral", "both": "log_px"}


def benchmark_table(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """One line per output distribution and method: bounds, paired differences, gap and size.

    Likelihoods are in nats per test image, as mean [95% interval over seeds]; differences are
    paired by seed and image. The best other method is that with the lowest difference to it.
    """
    check_one_version(rows)
    lines = []
    for output in profile.outputs:
        methods = by_encoder(profile, output, rows)
        ranks = mean_ranks(methods, profile.seeds)
        for encoder, own in methods.items():
            line = {"output": output, "method": LABELS.get(encoder, encoder)}
            line["seeds"] = format_seeds(own, profile.seeds)
            for label, key in QUANTITIES.items():
                line[label] = format_interval(mean_of(own, key))
            for label, key in PROPOSALS.items():
                difference = format_interval(paired(results, own, methods.get("vae", []), key), "+")
                reference = encoder == "vae" and own
                line[f"difference to {LABELS['vae']}, {label}"] = "-" if reference else difference
            best, difference = least(differences(results, methods, encoder, "log_likelihood"))
            line["difference to the best other, own"] = (
                f"{LABELS[best]}: {format_interval(difference, '+')}" if best else MISSING
            )
            gap = mean_of(own, "elbo_optimised", minus="elbo")
            line["amortization gap"] = format_interval(gap)
            line["parameters"] = format_range([row["parameters"] for row in own])
            line["epochs"] = format_range([row["epochs"] for row in own])
            lines.append(line | {"rank": ranks.get(encoder, MISSING)})
    return pd.DataFrame(lines)


def differences(
    results: Results, methods: Mapping[str, Sequence[Row]], encoder: str, quantity: str
) -> dict[str, Interval]:
    """One method minus each other one that shares a seed with it, paired by seed and image."""
    found = {
        other: paired(results, methods[encoder], rows, quantity)
        for other, rows in methods.items()
        if other != encoder
    }
    return {other: difference for other, difference in found.items() if difference.n}


def least(found: Mapping[str, Interval]) -> tuple[str, Interval]:
    """The method that one exceeds least, and by how much, of its `differences`; "" if there is
    none. One that shares a single seed counts only if all do.
    """
    sure = {other: d for other, d in found.items() if d.n > 1} or found
    if not sure:
        return "", mean_interval([])
    return min(sure.items(), key=lambda item: item[1].value)


def image_error(
    results: Results, a: Sequence[Row], b: Sequence[Row], quantity: str = "log_likelihood"
) -> float:
    """Standard error over images of the paired difference a - b, averaged over the seeds of both:
    how well these test images stand for others. NaN without a common seed.
    """
    pairs = paired_values(results, a, b, quantity)
    if not pairs:
        return math.nan
    difference = np.mean([left - right for left, right in pairs], axis=0)
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def mean_ranks(methods: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> dict[str, str]:
    """Mean rank by log p(x), own proposal, over seeds, such as `1.4 of 9`; 1 is best. Only methods
    with a row for every seed are ranked: `of` says how many they are.
    """
    values = {
        name: {row["seed"]: row["log_likelihood"]["mean"] for row in rows}
        for name, rows in methods.items()
    }
    complete = {name: each for name, each in values.items() if each.keys() >= set(seeds)}
    if not complete:
        return {}
    table = -np.array([[each[seed] for seed in seeds] for each in complete.values()])
    ranks = stats.rankdata(table, axis=0).mean(1)
    return {n: f"{rank:.1f} of {len(ranks)}" for n, rank in zip(complete, ranks, strict=True)}


def format_seeds(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """`3 of 3`, `2 of 3 (missing: 1)` or `missing`."""
    lacking = sorted(set(seeds) - {row["seed"] for row in rows})
    if not rows:
        return MISSING
    count = f"{len(rows)} of {len(seeds)}"
    return f"{count} (missing: {', '.join(map(str, lacking))})" if lacking else count


def format_range(values: Sequence[int]) -> str:
    """`low to high` of whole numbers, one number if all are equal, `missing` for none."""
    if not values:
        return MISSING
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def format_interval(interval: Interval, sign: str = "", digits: int = 2) -> str:
    """`mean [low, high]`, without an interval for one seed, `missing` for none."""
    if not interval.n:
        return MISSING
    value, low, high = (f"{number:{sign}.{digits}f}" for number in interval[:3])
    return f"{value} (one seed)" if interval.n == 1 else f"{value} [{low}, {high}]"


def verdict(difference: Interval, above: str = "above", below: str = "below") -> str:
    """What a paired difference says, in words."""
    if not difference.n:
        return MISSING
    if difference.n == 1:
        return "one seed, so no interval"
    if difference.low > 0:
        return above
    return below if difference.high < 0 else "no difference outside seed noise"


def to_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of the frame's columns; a bar in a cell is escaped."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [list(record) for record in table.itertuples(index=False)]
    lines = [[str(cell).replace("|", r"\|") for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def save_table(table: pd.DataFrame, name: str, profile: str, note: str = "") -> pd.DataFrame:
    """Write `figures/<profile>/<name>.csv` and `.md`; returns the table for display.

    Args:
        table: what to write.
        name: of the files.
        profile: whose folder.
        note: a sentence that stands below the Markdown table.
    """
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    text = to_markdown(table) + (f"\n{note}\n" if note else "")
    (folder / f"{name}.md").write_text(text, "utf-8")
    events.record(profile, "table", name, "made")
    return table


def save_rows(rows: Sequence[Row], profile: str) -> None:
    """Write the rows behind the tables, and their per-image arrays, to `figures/<profile>/`.

    `rows.jsonl` is sorted by name; `arrays/` holds one file for each row that has arrays and
    nothing else. `gpvae.stored` reads both.
    """
    rows = sorted(rows, key=lambda row: row["name"])
    jsonl.save(paths.figures(profile) / "rows.jsonl", rows)  # some may be nowhere else
    Results(profile).keep_arrays(rows)
    events.record(profile, "table", "rows", "made")
