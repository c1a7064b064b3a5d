"""Rows and models that are there already: to draw and tabulate without training anything.

With `stored=True` the notebooks show what was computed before, by whatever version of the code,
here (`results/<profile>/`) or by whoever committed the figures (`figures/<profile>/`), and say what
is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gpvae import events, jsonl, paths, tables
from gpvae.checkpoint import load_checkpoint
from gpvae.config import RunConfig, check_names, from_dict
from gpvae.data import Dataset
from gpvae.errors import ConfigError, TrainingError
from gpvae.experiment import Log, run_all, trained
from gpvae.jobs import Failure, committed_failures_path, read_failures
from gpvae.profiles import Profile
from gpvae.results import Results, Row, checkpoint_name, code_hash, not_finite
from gpvae.training import load_model, with_weights
from gpvae.vae import VAE

SHOWN = 4  # names of missing runs that are printed


def rows_of(
    configs: Sequence[RunConfig],
    profile: str,
    fresh_since: float = 0.0,
    workers: int | None = None,
    stored: bool = False,
    log: Log = print,
) -> list[Row]:
    """Rows of these runs: computed where they are missing or stale, or only read.

    Args:
        configs: the runs.
        profile: whose rows.
        fresh_since, workers: see `run_all`; for computing.
        stored: compute nothing; take the rows of exactly these configurations, whatever code made
            them, and leave out what is missing.
        log: called with progress or with what is missing.
    """
    if not stored:
        return run_all(configs, profile, fresh_since, workers, log)
    rows = find_rows(configs, profile, log)
    there = {row["name"] for row in rows}
    for config in configs:
        status = "reused" if config.name in there else "missing"
        events.record(profile, "row", config.name, status)
    return rows


def find_rows(
    configs: Sequence[RunConfig], profile: str, log: Log = lambda line: None
) -> list[Row]:
    """The stored rows of exactly these configurations, whatever code made them; `log` is told what
    failed, what is missing and whether other code made them.

    Raises:
        ConfigError: two runs differ in something that their names do not tell.
    """
    check_names(configs)
    known = _newest(profile)
    found = {config.name: known.get(config.hash()) for config in configs}
    rows = [row for row in found.values() if row]
    lacking = [config for config in configs if not found[config.name]]
    failures = failures_of(lacking, profile) if lacking else []
    failed = {failure.name: failure.brief for failure in failures}
    for name, brief in failed.items():
        log(f"failed: {name}: {brief}")
    missing = [config.name for config in lacking if config.name not in failed]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        log(f"{len(missing)} of {len(found)} runs are missing: {', '.join(missing[:SHOWN])}{more}")
    codes = sorted({row["code_hash"] for row in rows} - {code_hash()})
    if codes:
        log(f"stored rows were made by code {', '.join(codes)}; the present code is {code_hash()}")
    return rows


def failures_of(configs: Sequence[RunConfig], profile: str) -> list[Failure]:
    """How those of these runs failed that have no row, here or where the figures were made; one
    whose row has an estimate that is no finite number failed, too.
    """
    known = _newest(profile)
    failures = {f.config_hash: f for f in read_failures(profile, committed=True).values()}
    failures |= {
        _hash(row): Failure(
            row["name"],
            row["key"],
            _hash(row),
            TrainingError.__name__,
            f"not a finite number: {wrong}",
            row["finished"],
        )
        for row in Results(profile).everything()
        if (wrong := not_finite(row))
    }
    hashes = [config.hash() for config in configs]
    return [failures[key] for key in hashes if key in failures and key not in known]


def keep_evidence(plan: Profile) -> int:
    """Copy what is behind a profile's tables to `figures/<profile>/`: the rows and arrays of its
    runs, and the failures of those that have none; returns the number of rows.

    Committed rows of other runs stay: they may be nowhere else.
    """
    runs, path = plan.jobs(), committed_failures_path(plan.name)
    rows = find_rows(runs, plan.name)
    names = {row["name"] for row in rows}
    rows += [row for row in Results(plan.name).committed() if row["name"] not in names]
    failures = [replace(f, traceback="") for f in failures_of(runs, plan.name)]
    tables.save_rows(rows, plan.name)
    if failures:
        jsonl.save(path, map(asdict, failures))
    else:
        path.unlink(missing_ok=True)
    return len(rows)


def _newest(profile: str) -> dict[str, Row]:
    """The newest stored row of each configuration, by hash, among those with per-image arrays.

    One with an estimate that is no finite number is that of a failed run, and none.
    """
    results = Results(profile)
    rows = sorted(results.everything(), key=lambda row: row["finished"])
    return {_hash(row): row for row in rows if results.has_arrays(row) and not not_finite(row)}


def _hash(row: Row) -> str:
    """Hash of the row's configuration; keys that came later count with their defaults."""
    try:
        return from_dict(RunConfig, row["config"]).hash()
    except ConfigError:  # a key or a value that is gone
        return row["config_hash"]


def model_of(
    config: RunConfig, profile: str, data: Dataset, stored: bool = False, log: Log = print
) -> VAE | None:
    """The trained model of a run on the CPU; None if only stored ones are wanted and it is not.

    Args:
        config: the run.
        profile: whose checkpoints.
        data: the run's data.
        stored: train nothing.
        log: called with progress lines.
    """
    if not stored:
        return trained(config, profile, data, log).model.cpu()
    row = _newest(profile).get(config.hash())
    if row is None:
        return None
    path = _checkpoint(row, profile)
    if not path.exists():
        return None
    return with_weights(config, load_model(path, data.shape)[0], data.shape)


def history_of(row: Row, profile: str) -> list[dict[str, float]]:
    """Epochs and validation bounds of a stored run; empty if neither row nor checkpoint has them.

    Rows of older code hold none.
    """
    if "history" in row:
        return row["history"]
    path = _checkpoint(row, profile)
    return load_checkpoint(path)["history"] if path.exists() else []


def _checkpoint(row: Row, profile: str) -> Path:
    config = from_dict(RunConfig, row["config"])
    hashes = row["data_hash"], row["code_hash"], row.get("method_hash", "")
    return paths.results(profile) / "runs" / checkpoint_name(config, *hashes) / "checkpoint.pt"
