"""Working through many runs in spite of failures and kills.

A job is a run of one profile, addressed by the hash of its configuration, data and code. Rows and
checkpoints are kept by `gpvae.experiment.run`, so whatever ends a sweep, the next one goes on.
"""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import asdict, dataclass, field

from gpvae import events, experiment, jsonl
from gpvae.config import RunConfig
from gpvae.disk import DISK
from gpvae.errors import GPVAEError, StorageError, TrainingError
from gpvae.jobs import Failure, Job, failures_path, survey
from gpvae.results import Row

Log = Callable[[str], None]

DIED = (
    "the process that ran it died twice; most often the system killed it for lack of memory: run "
    "the same command again with fewer --workers. A script of your own needs its calls below "
    "`if __name__ == '__main__':`, since worker processes import it."
)


@dataclass
class Outcome:
    """What a sweep did: the rows by profile and name, and the failures by the same."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)


def sweep(
    configs_by_profile: Mapping[str, Sequence[RunConfig]],
    executor: Executor | None = None,
    log: Log = print,
    *,
    fresh_since: float = 0.0,
    catch: type[Exception] = Exception,
    log_done: bool = False,
) -> Outcome:
    """Do every job that is not done. One that fails is recorded and does not stop the others.

    Args:
        configs_by_profile: the runs of each profile.
        executor: anything with the `submit` of `concurrent.futures`; it is given all jobs at
            once, as calls of `gpvae.experiment.run`. Its attribute `workers`, if any, says how
            many it does at a time. None does one after the other in this process. A job whose
            process dies is given to it a second time.
        log: called with a line for each job that ends.
        fresh_since: do anew what was finished before this time (seconds since 1970).
        catch: errors that count as a failed job; others end the sweep. A disk that cannot be
            written to always does.
        log_done: a line for each job that was done before, too.

    Raises:
        DataError: the images of a job cannot be had; nothing has been started then.
        ConfigError: two runs of a profile differ in something that their names do not tell.
    """
    jobs = survey(configs_by_profile, fresh_since)
    score = _Score(jobs, getattr(executor, "workers", 1), log, catch)
    score.reuse(log_done)
    waiting = [job for job in jobs if job.state != "done"]
    if executor is not None:
        _submit_all(waiting, executor, score, fresh_since)
        return score.outcome
    for profile in configs_by_profile:
        together = [job.config for job in waiting if job.profile == profile]
        experiment.train_together(together, profile, fresh_since, log)
    for job in waiting:
        score.settle(job, lambda j=job: experiment.run(j.config, j.profile, fresh_since, log))
    return score.outcome


class Pace:
    """Estimates how long jobs take from how long those of the same encoder took.

    Example:
        >>> pace = Pace()
        >>> pace.add("digits", "vae", 10.0)
        >>> pace.add("digits", "iaf", 20.0)
        >>> pace.remaining([("digits", "vae"), ("digits", "rme")], workers=2)  # 10 and 15 by two
        12.5
    """

    def __init__(self) -> None:
        self._times: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def add(self, profile: str, encoder: str, seconds: float) -> None:
        """Note how long a job took."""
        for group in self._groups(profile, encoder):
            self._times[group].append(seconds)

    def remaining(self, waiting: Iterable[tuple[str, str]], workers: int = 1) -> float | None:
        """Seconds until the waiting jobs (profile, encoder) are done; None before any is."""
        if not self._times:
            return None
        means = [self._mean(profile, encoder) for profile, encoder in waiting]
        return sum(means) / max(1, min(workers, len(means)))

    def _mean(self, profile: str, encoder: str) -> float:
        times = next(t for g in self._groups(profile, encoder) if (t := self._times.get(g)))
        return sum(times) / len(times)

    @staticmethod
    def _groups(profile: str, encoder: str) -> tuple[tuple[str, ...], ...]:
        """From the most to the least alike: profiles differ in their images and epochs."""
        return (profile, encoder), (encoder,), ()


class _Score:
    """Which jobs have ended and how; logs a line for each."""

    def __init__(self, jobs: list[Job], workers: int, log: Log, catch: type[Exception]) -> None:
        self.outcome, self.pace, self.workers = Outcome(), Pace(), workers
        self.log, self.catch, self.started = log, catch, time.monotonic()
        self.open = {job.id: job for job in jobs}
        self.total, self.several = len(self.open), len({job.profile for job in jobs}) > 1

    def reuse(self, log_done: bool) -> None:
        """Count the jobs that are done."""
        done = [job for job in self.open.values() if job.state == "done"]
        for job in done:
            events.record(job.profile, "row", job.config.name, "reused")
            self._succeed(job, job.row, quiet=not log_done)
        if done and not log_done:
            self.line(f"{len(done)} of {self.total} jobs are done already")

    def settle(self, job: Job, result: Callable[[], Row]) -> None:
        """Take the row of a job, or the error that calling for it raises."""
        try:
            row = result()
        except self.catch as error:
            if isinstance(error, StorageError) or getattr(error, "errno", None) in DISK:
                raise  # the next jobs could not be stored either
            self.fail(job, error)
        else:
            self._succeed(job, row)

    def fail(self, job: Job, error: Exception) -> None:
        """Record a failed job."""
        known = isinstance(error, GPVAEError)
        failure = self.outcome.failures[job.id] = Failure(
            name=job.config.name,
            key=job.key,
            config_hash=job.config.hash(),
            error=type(error).__name__,
            message=str(error),
            time=time.time(),
            traceback="" if known else "".join(traceback.format_exception(error)),
        )
        jsonl.append(failures_path(job.profile), asdict(failure))
        events.record(job.profile, "row", job.config.name, "failed", str(error))
        self._end(job, f"FAILED, {failure.brief}")

    def line(self, text: str) -> None:
        """Log a line with the time since the start."""
        self.log(f"[{time.monotonic() - self.started:6.1f} s] {text}")

    def title(self, job: Job) -> str:
        """The job's name, with its profile if there are several."""
        return f"{job.profile} {job.config.name}" if self.several else job.config.name

    def _succeed(self, job: Job, row: Row, quiet: bool = False) -> None:
        self.outcome.rows[job.id] = row
        self.pace.add(job.profile, job.config.model.encoder, sum(row["seconds"].values()))
        self._end(job, f"log p(x) >= {row['log_likelihood']['mean']:.2f} nats", quiet)

    def _end(self, job: Job, how: str, quiet: bool = False) -> None:
        self.open.pop(job.id, None)
        if quiet:
            return
        waiting = [(j.profile, j.config.model.encoder) for j in self.open.values()]
        seconds = self.pace.remaining(waiting, self.workers)
        left = f"; about {duration(seconds)} left" if seconds and waiting else ""
        done = self.total - len(self.open)
        self.line(f"{done}/{self.total} {self.title(job)}: {how}{left}")


def _submit_all(waiting: list[Job], executor: Executor, score: _Score, fresh_since: float) -> None:
    """Give the jobs to an executor and take the results as they come."""
    died: set[tuple[str, str]] = set()
    running: dict[Future, Job] = {}
    try:
        for job in waiting:
            running[_submit(job, executor, fresh_since)] = job
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if not _broke(future):
                    score.settle(job, future.result)
                elif job.id in died:
                    score.fail(job, TrainingError(DIED))
                else:
                    died.add(job.id)
                    score.line(f"{score.title(job)}: its process died; trying once more")
                    running[_submit(job, executor, fresh_since)] = job
    except BaseException:
        for future in running:
            future.cancel()
        raise


def _submit(job: Job, executor: Executor, fresh_since: float) -> Future:
    """Submit a job; an executor that is broken for good gives a future that is."""
    try:
        return executor.submit(
            experiment.run, job.config, job.profile, fresh_since, experiment._quiet
        )
    except BrokenExecutor as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def _broke(future: Future) -> bool:
    return not future.cancelled() and isinstance(future.exception(), BrokenExecutor)


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(8.2), duration(700), duration(9000)
        ('8 s', '12 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
