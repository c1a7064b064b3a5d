"""The runs of profiles as jobs: which are done, stale, failed or missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpvae import experiment, jsonl, paths
from gpvae.config import RunConfig, check_names
from gpvae.results import Results, Row, not_finite, run_key

STATES = ("done", "stale", "failed", "missing")


@dataclass(frozen=True)
class Failure:
    """How a job failed; a line of `failures.jsonl`. The traceback is that of a defect only."""

    name: str
    key: str
    config_hash: str
    error: str
    message: str
    time: float
    traceback: str = ""

    @property
    def brief(self) -> str:
        """The error and the first line of its message."""
        return f"{self.error}: {(self.message.splitlines() or [''])[0]}"


@dataclass(frozen=True)
class Job:
    """One run of a profile.

    Args:
        profile: whose results folder holds its row.
        config: the run.
        key: digest of configuration, data and code.
        state: one of `STATES`.
        reason: why it is stale or how it failed.
        row: the newest row of its name, if there is one.
    """

    profile: str
    config: RunConfig
    key: str
    state: str
    reason: str = ""
    row: Row | None = None

    @property
    def id(self) -> tuple[str, str]:
        """Profile and name; at most one job has them."""
        return self.profile, self.config.name


def survey(
    configs_by_profile: Mapping[str, Sequence[RunConfig]], fresh_since: float = 0.0
) -> list[Job]:
    """The jobs of these runs with their states; nothing is computed.

    Args:
        configs_by_profile: the runs of each profile.
        fresh_since: what was finished before this time (seconds since 1970) is stale.

    Raises:
        DataError: the images of a job cannot be had.
        ConfigError: two runs of a profile differ in something that their names do not tell.
    """
    jobs, data, source = [], None, None
    for profile, configs in configs_by_profile.items():
        check_names(configs)
        results, failures = _Snapshot(profile), read_failures(profile)
        for config in dict.fromkeys(configs):
            if data is None or config.data != source:  # runs of the same images stand together
                data, source = experiment.load_data(config), config.data
            status, reason = experiment.status_of(results, config, data, fresh_since)
            key = run_key(config, data.hash)
            row = results.find(config.name, key)
            state = {"made": "missing", "recomputed": "stale", "reused": "done"}[status]
            if row is not None and row["key"] == key and (wrong := not_finite(row)):
                state, reason = "failed", f"not a finite number: {wrong}"
            failure = failures.get(config.name)
            if state != "done" and failure is not None and _counts(failure, key, row):
                state, reason = "failed", failure.brief
            jobs.append(Job(profile, config, key, state, reason, row))
    return jobs


def _counts(failure: Failure, key: str, row: Row | None) -> bool:
    """Whether this job failed as it is now and has not succeeded since."""
    return failure.key == key and (row is None or row["finished"] < failure.time)


class _Snapshot(Results):
    """Results whose rows are read once and not once for each job."""

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self._stored = super().stored()

    def stored(self) -> list[Row]:
        return self._stored


def failures_path(profile: str) -> Path:
    """File of one profile's failures."""
    return paths.results(profile) / "failures.jsonl"


def committed_failures_path(profile: str) -> Path:
    """File of the failures that are committed with the figures."""
    return paths.figures(profile) / "failures.jsonl"


def read_failures(profile: str, committed: bool = False) -> dict[str, Failure]:
    """The newest failure of each name, whether or not the job has succeeded since.

    Args:
        profile: whose failures.
        committed: read those in `figures/<profile>/`, too.
    """
    lines = jsonl.read(committed_failures_path(profile)) if committed else []
    found = {}
    for line in lines + jsonl.read(failures_path(profile)):
        try:
            failure = Failure(**line)
        except TypeError:  # damaged, or of another version
            continue
        found[failure.name] = failure
    return found
