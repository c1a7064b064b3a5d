"""Tables as pure functions of result rows; a missing run prints as missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pandas as pd

from gpvae import events, paths
from gpvae.config import Profile
from gpvae.errors import DataError
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


def select(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows whose configuration has these values, sorted by seed: `select(rows, encoder="vae")`.

    Names are those of the model configuration, or `train_size`.
    """
    found = [
        row
        for row in rows
        if all(
            {**row["config"]["model"], **row["config"]["data"]}[k] == v for k, v in wanted.items()
        )
    ]
    return sorted(found, key=lambda row: row["seed"])


def check_one_version(rows: Sequence[Row]) -> None:
    """Raise DataError if rows come from different code, or from different data of one name."""
    for key, of in (("code_hash", lambda r: ""), ("data_hash", _data_identity)):
        seen: dict[str, set[str]] = {}
        for row in rows:
            seen.setdefault(of(row), set()).add(row[key])
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
    """Interval of a - b for a per-image quantity, over the seeds that both have."""
    common = sorted({r["seed"] for r in a} & {r["seed"] for r in b})
    arrays = [
        [results.arrays(next(r for r in rows if r["seed"] == seed))[quantity] for seed in common]
        for rows in (a, b)
    ]
    return paired_interval(*arrays)


def benchmark_table(
    profile: Profile, results: Results, rows: Sequence[Row], baseline: str = "vae"
) -> pd.DataFrame:
    """One line per output distribution and method: bounds, paired differences, gaps.

    Likelihoods are in nats per test image, as mean [95% interval over seeds]; differences are
    paired by seed and image.
    """
    check_one_version(rows)
    lines = []
    for output in profile.outputs:
        base = select(rows, output=output, encoder=baseline)
        for encoder in profile.encoders:
            own = select(rows, output=output, encoder=encoder)
            line = {"output": output, "method": LABELS.get(encoder, encoder)}
            line["seeds"] = f"{len(own)} of {len(profile.seeds)}"
            for label, key in QUANTITIES.items():
                line[label] = format_interval(
                    mean_interval([r[key]["mean"] for r in own if key in r])
                )
            for label, key in (("own", "log_likelihood"), ("neutral", "log_likelihood_neutral")):
                if encoder == baseline:
                    line[f"difference to {LABELS[baseline]}, {label}"] = "-"
                else:
                    difference = paired(results, own, base, key)
                    line[f"difference to {LABELS[baseline]}, {label}"] = format_interval(
                        difference, "+"
                    )
            line["amortization gap"] = format_interval(
                mean_interval([r["elbo_optimised"]["mean"] - r["elbo"]["mean"] for r in own])
            )
            lines.append(line)
    return pd.DataFrame(lines)


QUANTITIES = {
    "ELBO": "elbo",
    "log p(x), own proposal": "log_likelihood",
    "log p(x), neutral proposal": "log_likelihood_neutral",
}


def format_interval(interval: Interval, sign: str = "") -> str:
    """`mean [low, high]`, without an interval for one seed, `missing` for none."""
    if not interval.n:
        return MISSING
    if math.isnan(interval.low):
        return f"{interval.value:{sign}.2f} (one seed)"
    return f"{interval.value:{sign}.2f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


def to_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of the frame's columns."""
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[str(value) for value in record] for record in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def save_table(table: pd.DataFrame, name: str, profile: str) -> pd.DataFrame:
    """Write `figures/<profile>/<name>.csv` and `.md`; returns the table for display."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.md").write_text(to_markdown(table), "utf-8")
    events.record(profile, "table", name, "made")
    return table


def save_rows(rows: Sequence[Row], profile: str) -> None:
    """Write the rows behind the tables to `figures/<profile>/rows.jsonl`, sorted by name."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: row["name"])]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    events.record(profile, "table", "rows", "made")
